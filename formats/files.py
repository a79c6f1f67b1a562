"""Single files: a JSON object that is read, and a file that is written whole or not at all.

Here, apart from any one format, because every other file of this folder needs them.
"""

import contextlib
import json
import os
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
