"""Turns a checkpoint of train.py into a model folder, as OUT/model is.

python -m tools.export OUT/checkpoints/step-N --out FOLDER
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from formats.files import read_json
from formats.weights import read_weights, write_weights
from run.folder import replaced
from run.lora import merge_adapter
from run.saving import _reason


def export(step: Path, out: Path, base: Path | None = None):
    """Turns a checkpoint of train.py into a model folder, as OUT/model is.

    One process and no GPU do, however many trained; Adam's moments are not loaded. base: the model
    of a LoRA run, where it has moved. Raises ValueError, OSError.
    """
    if not (step / "weights.json").is_file():
        reason = "not a checkpoint, as it has no weights.json"
        raise ValueError(f"{step}: {reason}; name a folder such as OUT/checkpoints/step-00000500")
    if out.exists():
        raise ValueError(f"--out {out}: exists; name a new folder")
    about, config = (read_json(step / name) for name in ("weights.json", "model/config.json"))
    dtype, model_type = getattr(torch, config["torch_dtype"]), config["model_type"]
    shapes = {name: torch.Size(shape) for name, shape in about["shapes"].items()}
    frozen = {name: shape for name, shape in shapes.items() if ".lora_" not in name}
    is_lora = len(frozen) < len(shapes)
    if base is not None and not is_lora:
        raise ValueError(f"--model {base}: is for LoRA runs only, and {step} holds all weights")
    # The tensors are the wanted ones alone, and cast as they are read.
    if is_lora:
        state = {name: torch.empty(shapes[name]) for name in shapes.keys() - frozen.keys()}
        state["frozen"] = torch.zeros((), dtype=torch.float64)
    else:
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    try:
        dcp.load(state, checkpoint_id=step)
    except (OSError, dcp.CheckpointException) as error:
        raise ValueError(f"{step}: cannot be read: {_reason(error)}") from None
    if is_lora:
        base = base or Path(about["base"])
        if not base.is_dir():
            raise ValueError(f"{base}: the base model of {step} is not there; name it by --model")
        state = _merge(base, model_type, frozen, state, read_json(step / "config.json"))
    with replaced(out) as folder:
        shutil.copytree(step / "model", folder, dirs_exist_ok=True)
        write_weights(folder, model_type, state, dtype)


def _merge(base: Path, model_type: str, shapes: dict, adapters: dict, settings: dict) -> dict:
    """The parameters of base, whose shapes are given, with the adapters added."""
    scale, norms, merged = settings["lora_alpha"] / settings["lora_rank"], [], {}
    for name, weight in read_weights(base, model_type, shapes):
        norms.append(weight.to(getattr(torch, settings["dtype"])).double().norm())
        pair = [adapters.get(name.removesuffix("weight") + leaf) for leaf in ("lora_A", "lora_B")]
        changed = weight if pair[0] is None else merge_adapter(weight, *pair, scale)
        merged[name] = changed.to(weight.dtype, copy=True)
    if not torch.isclose(torch.stack(norms).sum(), adapters["frozen"], rtol=1e-9):
        raise ValueError(f"{base}: is not the model that was trained; name that by --model")
    return {name: merged[name] for name in shapes}  # in the order of the model, not of its files


class Parser(argparse.ArgumentParser):
    def error(self, message):  # without the dump of the usage
        raise ValueError(f"{message} (see python -m tools.export --help)")


def main(argv=None):
    parser = Parser(prog="export.py", description=export.__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="OUT/checkpoints/step-N of a run")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--model", type=Path, help="base model of a LoRA run, where it has moved")
    try:
        given = parser.parse_args(argv)
        export(given.checkpoint, given.out, given.model)
    except (OSError, ValueError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"wrote {given.out}, a Hugging Face folder")


if __name__ == "__main__":
    main()
