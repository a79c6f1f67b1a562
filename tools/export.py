"""Turns a checkpoint of train.py into a model folder, as OUT/model is.

    python -m tools.export OUT/checkpoints/step-N --out FOLDER
    python -m tools.export ... --model BASE       of a LoRA run whose base model has moved

One process without a GPU is enough, however many processes trained. Adam's moments are not loaded.
"""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from formats.weights import read_weights, write_weights
from model import ModelConfig, Transformer
from run.flags import page_parser
from run.folder import read_settings, replaced
from run.lora import add_lora, merge_adapter
from run.saving import first_line


def export(step: Path, out: Path, base: Path | None = None):
    """base: the model of a LoRA run, where it has moved. Raises ValueError, OSError."""
    config_file = step / "model" / "config.json"
    if not config_file.is_file() or not (step / ".metadata").is_file():
        reason = "not a checkpoint, as it lacks model/config.json or .metadata"
        raise ValueError(f"{step}: {reason}; name a folder such as OUT/checkpoints/step-00000500")
    if out.exists():
        raise ValueError(f"--out {out}: exists; name a new folder")
    settings, config = read_settings(step) or {}, ModelConfig.from_json(config_file)
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):  # which names and shapes there are
        model = Transformer(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if is_lora := bool(settings.get("lora_rank")):
        add_lora(model, settings["lora_rank"], settings["lora_alpha"])
        adapters = {n: p for n, p in model.named_parameters() if n not in shapes}
        state = {name: torch.empty(p.shape) for name, p in adapters.items()}
        state["frozen"] = torch.zeros((), dtype=torch.float64)
    else:  # cast to the dtype of the model as they are read
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    if base is not None and not is_lora:
        raise ValueError(f"--model {base}: is for LoRA runs only, and {step} holds all weights")
    try:
        dcp.load(state, checkpoint_id=step)
    except (OSError, dcp.CheckpointException) as error:
        raise ValueError(f"{step}: cannot be read: {first_line(error)}") from None
    if is_lora:
        base = base or Path(settings["model"])
        if not base.is_dir():
            raise ValueError(f"{base}: the base model of {step} is not there; name it by --model")
        state = merged(base, config.family, shapes, state, settings)
    with replaced(out) as folder:
        shutil.copytree(step / "model", folder, dirs_exist_ok=True)
        write_weights(folder, config.family, state, dtype)


def merged(base: Path, family: str, shapes: dict, adapters: dict, settings: dict) -> dict:
    """The parameters of base, whose shapes are given, with the adapters added."""
    scale, norms, found = settings["lora_alpha"] / settings["lora_rank"], [], {}
    for name, weight in read_weights(base, family, shapes):
        norms.append(weight.to(getattr(torch, settings["dtype"])).double().norm())
        pair = [adapters.get(name.removesuffix("weight") + leaf) for leaf in ("lora_A", "lora_B")]
        changed = weight if pair[0] is None else merge_adapter(weight, *pair, scale)
        found[name] = changed.to(weight.dtype, copy=True)
    if not torch.isclose(torch.stack(norms).sum(), adapters["frozen"], rtol=1e-9):
        raise ValueError(f"{base}: is not the model that was trained; name that by --model")
    return {name: found[name] for name in shapes}  # in the order of the model, not of its files


def main(argv=None):
    parser = page_parser(__doc__, "export.py")
    parser.add_argument("checkpoint", type=Path, help="OUT/checkpoints/step-N of a run")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--model", type=Path, help="base model of a LoRA run, where it has moved")
    given = parser.parse_args(argv)
    try:
        export(given.checkpoint, given.out, given.model)
    except (OSError, ValueError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {given.out}, a Hugging Face folder")


if __name__ == "__main__":
    main()
