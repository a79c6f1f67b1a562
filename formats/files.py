"""Single files and model folders: a JSON object that is read, a file that is written whole or not
at all, and where the model is that somebody names.

Here, apart from any one format, because every other file of this folder needs them.
"""

import contextlib
import json
import os
import re
from pathlib import Path


class NotWritten(OSError):
    """A file or a folder that was not written. advice: what its reader can do about it."""

    def __init__(self, path, reason, advice: str = ""):
        super().__init__(f"{path}: not written: {reason}" + (f"; {advice}" if advice else ""))
        self.path, self.reason = path, reason


def reason_of(error: OSError) -> str:
    """Why, without the path: whoever raises it again names another one."""
    return error.reason if isinstance(error, NotWritten) else error.strerror or str(error)


def read_json(path: Path, wanted: str = "a Hugging Face model folder has one") -> dict:
    """A JSON object from a file. Raises FileNotFoundError, which says what is wanted, or ValueError
    with the path."""
    if path.parent.is_file():
        raise ValueError(f"{path.parent}: is a file; the folder of a Hugging Face model is wanted")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {wanted}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def optional_json(file: Path) -> dict:
    """A JSON object; an empty one where there is no such file."""
    return read_json(file) if file.is_file() else {}


def write_json(file: Path, value: dict):
    text = json.dumps(value, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary file's path, which becomes `path` when it is written, and else is removed.

    Raises NotWritten.
    """
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise NotWritten(path, reason_of(error)) from None
    finally:
        temporary.unlink(missing_ok=True)


HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"  # ORG/NAME, or gpt2


def model_folder(name, weights: bool = True) -> Path:
    """The folder of a model: a path, or a model's name on the Hugging Face hub (ORG/NAME), where it
    is in the cache of that on this machine already, with its weights if these are needed; nothing
    is downloaded. Raises FileNotFoundError or ValueError that says what to do."""
    path = Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            base = optional_json(path / "adapter_config.json").get("base_model_name_or_path")
            has_model = (path / "config.json").is_file()
            what = "an adapter beside the model" if has_model else "an adapter, and no model"
            raise ValueError(
                f"{path}: holds {what} (adapter_config.json, for {base}): merge it first, with "
                "peft's merge_and_unload and save_pretrained, or move the adapter's files away"
            )
        return path
    if path.exists() or not re.fullmatch(HUB_NAME, str(name)):
        return path  # whoever reads it says what is missing
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    model = cache / f"models--{str(name).replace('/', '--')}"
    newest = model / "refs" / "main"
    snapshot = model / "snapshots" / (newest.read_text().strip() if newest.is_file() else "none")
    complete = any(snapshot.glob("*.safetensors")) or any(snapshot.glob("*.bin"))
    if (snapshot / "config.json").is_file() and (complete or not weights):
        return snapshot  # else the cache has only what a tokenizer or a config needed
    if "/" not in str(name):  # gpt2 on the hub; here rather a folder that is not there
        return path
    raise FileNotFoundError(
        f"{name}: no such folder, and no such model in the hub's cache {cache}; download it: "
        f"hf download {name} --local-dir {path.name}, and then name the folder {path.name}"
    )
