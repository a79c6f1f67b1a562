"""Saving."""

import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data import Pair
from formats.families import write_config
from model import Transformer
from run.flags import TrainConfig, settings_of
from run.folder import FINISHED, checkpoints, read_best, refuse_other_settings, replaced
from run.lora import lora_layers, merge_lora, write_adapters
from run.plan import Plan
from run.processes import barrier, max_over_processes, rank


def training_state(model: Transformer, optimizer) -> dict[str, torch.Tensor]:
    """Weights, Adam's moments and its count, by name: the tensors themselves, to save or to fill.

    The order of pairs follows from the step. What is frozen is in --model: here only as one number,
    by which `load_checkpoint` knows it again.
    """
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state |= {name: p.detach()} | {f"{name}.{k}": x for k, x in optimizer.state[p].items()}
    if frozen := [p.detach() for p in model.parameters() if not p.requires_grad]:
        state["frozen"] = torch.stack([p.double().norm() for p in frozen]).sum()
    return state


def save_checkpoint(
    out: Path, step: int, model, optimizer, tokenizer, pairs, plan: Plan, config: TrainConfig
):
    """Raises OSError, but behind the last step it only says what is wrong: the model, which is
    smaller than a checkpoint, may still fit the disk."""

    def write_more(folder: Path):  # what checkpoint.py needs to make a model folder of it
        shapes = {name: p.shape for name, p in model.named_parameters()}
        describe_weights(folder, shapes, config.model)
        (folder / "model").mkdir()
        write_model_files(folder / "model", model, tokenizer, pairs, config)

    settings = settings_of(config) | {"pairs": plan.digests}
    try:
        save_state(out, step, training_state(model, optimizer), settings, config.keep, write_more)
    except OSError as error:
        if step < plan.n_steps:
            raise
        if rank() == 0:
            print(f"train.py: {str(error).rpartition('; ')[0]}", file=sys.stderr)


def load_checkpoint(
    out: Path, model: Transformer, optimizer, plan: Plan, config: TrainConfig
) -> int:
    """Restores the newest checkpoint that can be read and returns its step; 0 without any yet.

    Raises ValueError where it is of other flags, other pairs, another model, or a later step.
    """

    def check(settings: dict, folder: Path):
        refuse_other_settings(config, settings, folder)
        for name, digest in plan.digests.items():
            if digest != settings.get("pairs", plan.digests)[name]:
                file = getattr(config, name) or config.data
                then, now = settings["pairs"][name], digest
                raise ValueError(
                    f"--resume: {file} does not give the pairs that {folder} was trained with "
                    f"({then}; now {now}); restore the file and the tokenizer, or start a new run"
                )

    state = training_state(model, optimizer)
    frozen = state["frozen"].clone() if "frozen" in state else None
    folder = load_state(out, state, check)
    if folder is None:
        print(f"--resume: {out} has no checkpoint yet, so the run starts from its beginning")
        return 0
    if frozen is not None and not torch.isclose(frozen, state["frozen"], rtol=1e-9):
        raise ValueError(f"--resume: {folder} was trained on another model than {config.model}")
    step = int(folder.name.removeprefix("step-"))
    if step > plan.n_steps:
        raise ValueError(f"--resume: {folder} is behind the last of {plan.n_steps} steps")
    return step


TOKENIZER_FILES = (  # what else a model folder needs, handed on as it came
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)


def write_model_files(folder: Path, model: Transformer, tokenizer, pairs, config: TrainConfig):
    """What a model folder holds beside the weights."""
    write_config(folder, model.config, getattr(torch, model.config.dtype))
    for name in TOKENIZER_FILES:
        if (Path(config.model) / name).is_file():
            shutil.copyfile(Path(config.model) / name, folder / name)
    # Trained on messages: whoever chats needs the template, and BOS in front of it.
    if any(pair.chat for pair in pairs):
        tokenizer.save_chat_template(folder)
    if not (folder / "generation_config.json").exists():  # where to stop
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def finish(
    model: Transformer, tokenizer, pairs: list[Pair], n_steps: int, config: TrainConfig, out: Path
):
    """Writes OUT/model, OUT/adapters, and then that the run is finished. Raises OSError."""
    try:
        save_model(model, tokenizer, pairs, config, out / "model")
        if config.lora_adapters:
            save_adapters(model, config, out / "adapters")
        if rank() == 0:
            (out / FINISHED).write_text(f"{n_steps}\n", encoding="utf-8")
    except OSError as error:
        what = str(error) if str(out) in str(error) else f"{out / 'model'}: {error}"
        last = next((folder.name for folder in checkpoints(out)), "none")
        raise OSError(
            f"{what}; the last good checkpoint is {last}; make space, then continue with --resume"
        ) from None


def save_model(model, tokenizer, pairs, config: TrainConfig, folder: Path, row: dict | None = None):
    """The trained model as a Hugging Face folder, in the dtype that the checkpoint had; with row,
    its evaluation, which is how OUT/best is known."""
    if rank() > 0:
        if config.shard:  # takes part in gathering each tensor
            model.save_pretrained(None)
        return
    if config.lora_rank:
        model = merge_lora(model, Transformer.from_pretrained(config.model))
    with replaced(folder) as new:
        model.save_pretrained(new, dtype=getattr(torch, model.config.dtype))
        write_model_files(new, model, tokenizer, pairs, config)
        if row is not None:
            (new / "evaluation.json").write_text(json.dumps(row, indent=2) + "\n")


def save_best(row: dict, model, tokenizer, pairs, config: TrainConfig, out: Path):
    """With --eval-every: saves the model as OUT/best where row has this run's lowest eval_loss.

    It is compared with the row in OUT/best, which belongs to those weights whatever happens. Rows
    of metrics.jsonl may be cut by --resume, and be computed again with other roundings.
    """
    if row["step"] == 0 or not config.eval_every:  # step 0 is --model itself
        return
    is_best = rank() == 0 and row["eval_loss"] < read_best(out).get("eval_loss", math.inf)
    if max_over_processes(int(is_best)):  # process 0 decides for all
        try:
            save_model(model, tokenizer, pairs, config, out / "best", row)
        except OSError as error:
            raise OSError(f"{error}; fix this, then continue with --resume") from None


def save_adapters(model: Transformer, config: TrainConfig, folder: Path):
    """The adapters by themselves, as peft reads them."""
    if rank() == 0:
        adapters = {name: (m.lora_A, m.lora_B) for name, m in lora_layers(model).items()}
        family, numbers = model.config.family, (config.lora_rank, config.lora_alpha)
        with replaced(folder) as new:
            write_adapters(new, family, adapters, *numbers, config.model)


# torch.distributed.checkpoint says so each time that there is a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def save_state(
    out: Path, step: int, state: dict[str, Tensor], settings: dict, keep: int, write_more
):
    """Writes a checkpoint, by all processes together, and removes all but the newest `keep`.

    write_more(folder) writes what else belongs in it, in one process. Raises OSError with the
    reason where it fails; the older checkpoints stay then.
    """
    temporary, final = out / "checkpoints" / "unfinished", out / "checkpoints" / f"step-{step:08d}"
    try:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            (temporary / "config.json").write_text(json.dumps(settings), encoding="utf-8")
            write_more(temporary)
        barrier()
        dcp.save(state, checkpoint_id=temporary)  # returns when all processes are done
        if rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in checkpoints(out)[keep:]:
                shutil.rmtree(old)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = next((folder.name for folder in checkpoints(out)), "none")
        raise OSError(
            f"{final}: not written: {_reason(error)}; the last good checkpoint is {last}; "
            "fix this, then continue with --resume"
        ) from None


def load_state(out: Path, state: dict[str, Tensor], check) -> Path | None:
    """Fills the tensors of state from the newest checkpoint that can be read; returns its folder.

    check(settings, folder) may raise ValueError. None where the run has no checkpoint yet; raises
    ValueError where it has some and none can be read.
    """
    folders = checkpoints(out)
    for folder in folders:
        try:
            check(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder)
            dcp.load(state, checkpoint_id=folder)
            return folder
        except (OSError, json.JSONDecodeError, dcp.CheckpointException) as error:
            if rank() == 0:
                print(f"{folder}: an older one is tried: {_reason(error)}", file=sys.stderr)
    if folders:
        raise ValueError(f"{out / 'checkpoints'}: none can be read; remove it to start again")
    return None


def _reason(error: BaseException) -> str:
    """The first line of what is behind an error of torch.distributed.checkpoint, or another."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe_weights(folder: Path, shapes: dict[str, torch.Size], base: Path | str):
    """Writes weights.json: shapes in the order of the model, and the folder it was loaded from."""
    base = str(Path(base).resolve())
    about = {"base": base, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    (folder / "weights.json").write_text(json.dumps(about), encoding="utf-8")
