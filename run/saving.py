"""What a run saves, and restores: checkpoints, OUT/model, OUT/best, OUT/adapters.

A checkpoint is a folder step-N: weights, moments and counts by torch.distributed.checkpoint, the
settings of the run, and in model/ what a model folder has beside its weights (tools/export.py makes
such a folder of it). It is written beside the others and then renamed, so that a folder with that
name is complete. The order of pairs follows from the step, so no more state is needed.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data import Pair
from formats.chat_template import MORE_TEMPLATES
from formats.config import write_config
from formats.files import NotWritten, optional_json, reason_of, write_json
from model import ModelConfig, Transformer
from run.flags import (
    SETTINGS,
    TrainConfig,
    read_settings,
    refuse_other_settings,
    settings_of,
)
from run.folder import FINISHED, checkpoints, read_best, remove, replaced, way_on
from run.lora import lora_layers, merge_lora, write_adapters
from run.processes import max_over_processes, rank


class Run(NamedTuple):
    """A run, as far as it is saved and restored."""

    config: TrainConfig
    out: Path
    model: Transformer
    optimizer: torch.optim.Optimizer
    tokenizer: object
    chat: bool  # some pairs were messages, and went through the chat template
    plain: bool  # some pairs were strings
    n_steps: int
    digests: dict[str, str]  # of the pairs of --data and --eval-data


def digest(pairs: list[Pair]) -> str:
    """The number of pairs, and a hash of their lengths and token ids, by which a run that is
    resumed recognises them."""
    sha256 = hashlib.sha256()
    for pair in pairs:
        sha256.update(np.array(pair.lengths, np.int32).tobytes())
        for ids in pair[:3]:
            sha256.update(np.asarray(ids, np.int32).tobytes())
    return f"{len(pairs)} pairs, {sha256.hexdigest()[:16]}"


NO_PAIRS = digest([])  # of a run without evaluation

# ---------------------------------------------------------------------------------------------
# Checkpoints.


def training_state(model: Transformer, optimizer) -> dict[str, Tensor]:
    """Weights, Adam's moments and its count, by name: the tensors themselves, to save or to fill.

    What is frozen is in --model: here only as one number, by which `load_checkpoint` recognises it.
    """
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state |= {name: p.detach()} | {f"{name}.{k}": x for k, x in optimizer.state[p].items()}
    if frozen := [p.detach() for p in model.parameters() if not p.requires_grad]:
        state["frozen"] = torch.stack([*map(norm_of, frozen)]).sum()
    return state


def norm_of(p: Tensor) -> Tensor:
    """In float64, in parts: a copy of a whole embedding in float64 may not fit a GPU."""
    return torch.stack([part.double().norm() for part in p.flatten().split(2**24)]).norm()


def save_checkpoint(run: Run, step: int):
    """Raises NotWritten. After the last step it only says what is wrong, because the model, which
    is smaller than a checkpoint, may still fit the disk."""

    def write_more(folder: Path):
        (folder / "model").mkdir()
        write_model_files(folder / "model", run)

    settings = settings_of(run.config) | {"pairs": run.digests}
    state = training_state(run.model, run.optimizer)
    try:
        save_state(run.out, step, state, settings, run.config.keep, write_more)
    except NotWritten as error:
        if step < run.n_steps:
            raise
        if rank() == 0:
            print(f"train.py: {error.path}: not written: {error.reason}", file=sys.stderr)


# torch.distributed.checkpoint says so each time that there is a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def save_state(
    out: Path, step: int, state: dict[str, Tensor], settings: dict, keep: int, write_more
):
    """Writes a checkpoint, by all processes together, and removes all but the newest `keep`.

    write_more(folder) writes what else belongs in it, in one process. Raises NotWritten; the older
    checkpoints stay then.
    """
    temporary, final = out / "checkpoints" / "unfinished", out / "checkpoints" / f"step-{step:08d}"
    failed = None
    try:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            (temporary / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
            write_more(temporary)
    except OSError as error:
        failed = error
    try:
        # All processes learn of it, because whoever does not would wait for the others.
        if max_over_processes(int(failed is not None)):
            raise failed or OSError("process 0 could not write its files")
        dcp.save(state, checkpoint_id=temporary)  # returns when all processes are done
        if rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            before = [folder for folder in checkpoints(out) if folder.name <= final.name]
            for old in before[keep:]:
                remove(old)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        advice = f"{last_good(out)}; fix this, then {way_on(out)}"
        raise NotWritten(final, first_line(error), advice) from None


def last_good(out: Path) -> str:
    names = [folder.name for folder in checkpoints(out)]
    return f"the last good checkpoint is {names[0] if names else 'none'}"


def load_checkpoint(run: Run) -> int:
    """Restores the newest checkpoint that can be read and returns its step; 0 without any yet.

    Raises ValueError where it is of other flags, other pairs, another model, or a later step.
    """
    config = run.config

    def check(settings: dict, folder: Path):
        refuse_other_settings(config, settings, folder, may_move=True)
        then, now = settings.get("model"), settings_of(config)["model"]
        if then != now:  # moved, or downloaded again; the weights are the checkpoint's
            shapes = ModelConfig.from_json(folder / "model" / "config.json"), run.model.config
            # As text, which leaves out `source`: a downloaded config.json says more than is used.
            if len({str(dataclasses.replace(x, dtype="float32")) for x in shapes}) > 1:
                raise ValueError(f"--resume: {folder} was trained on another model than {now}")
            if rank() == 0:
                print(f"--resume: --model was {then}; its weights are those of {folder}")
        for name, now in run.digests.items():
            then = settings.get("pairs", run.digests)[name]
            if now != then and NO_PAIRS in (now, then):
                had, do = ("had", "give") if now == NO_PAIRS else ("had no", "leave out")
                raise ValueError(f"--resume: {folder} {had} evaluation pairs: {do} --eval-data")
            if now != then:
                file = getattr(config, name) or config.data
                raise ValueError(
                    f"--resume: {file} does not give the pairs that {folder} was trained with "
                    f"({then}; now {now}); restore the file and the tokenizer, or start a new run"
                )

    state = training_state(run.model, run.optimizer)
    frozen = state["frozen"].clone() if "frozen" in state else None
    folder = load_state(run.out, state, check)
    if folder is None:
        print(f"--resume: {run.out} has no checkpoint yet, so the run starts from its beginning")
        return 0
    if frozen is not None and not torch.isclose(frozen, state["frozen"], rtol=1e-9):
        raise ValueError(f"--resume: {folder} was trained on another model than {config.model}")
    step = int(folder.name.removeprefix("step-"))
    if step > run.n_steps:
        raise ValueError(f"--resume: {folder} is after the last of {run.n_steps} steps")
    print(f"--resume: continues after step {step} of {run.n_steps}")
    return step


def load_state(out: Path, state: dict[str, Tensor], check) -> Path | None:
    """Fills the tensors of state from the newest checkpoint that can be read; returns its folder.

    check(settings, folder) may raise ValueError. None where the run has no checkpoint yet; raises
    ValueError where it has some and none can be read.
    """
    folders = checkpoints(out)
    for folder in folders:
        try:
            settings = read_settings(folder)
            if settings is None:
                raise OSError(f"no {SETTINGS} that can be read")
            check(settings, folder)
            dcp.load(state, checkpoint_id=folder)
            return folder
        except (OSError, json.JSONDecodeError, dcp.CheckpointException) as error:
            if rank() == 0:
                print(f"{folder}: an older one is tried: {first_line(error)}", file=sys.stderr)
    if folders:
        raise ValueError(f"{out / 'checkpoints'}: none can be read; remove it to start again")
    return None


def first_line(error: BaseException) -> str:
    """The first line of what caused an error of torch.distributed.checkpoint, or of another."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------
# Models.

TOKENIZER_FILES = (  # what else a model folder needs, handed on as it came
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)


def write_model_files(folder: Path, run: Run):
    """What a model folder holds beside the weights."""
    write_config(folder, run.model.config, getattr(torch, run.model.config.dtype))
    write_serving_files(folder, run)
    # One of each here: llama.cpp's converter passes over a list, and then takes an id of its own.
    ids = {"bos_token_id": run.tokenizer.bos_id, "eos_token_id": next(iter(stop_ids(run)), None)}
    ids = {name: i for name, i in ids.items() if i is not None}
    write_json(folder / "config.json", optional_json(folder / "config.json") | ids)


def write_serving_files(folder: Path, run: Run):
    """The tokenizer, and the tokens that end an answer, for whoever serves a model or adapters by
    the folder's own files: a prompt is to get the ids that were trained."""
    source = Path(run.config.model)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, folder / MORE_TEMPLATES, dirs_exist_ok=True)
    run.tokenizer.save_class(folder)
    # Messages get BOS from the chat template, and strings from the tokenizer.
    if run.chat:
        run.tokenizer.save_chat_template(folder)
    if run.plain:
        run.tokenizer.save_bos(folder)
    if stops := stop_ids(run):
        known = optional_json(folder / "generation_config.json")
        known = known or {"bos_token_id": run.tokenizer.bos_id}
        ends = {"eos_token_id": stops[0] if len(stops) == 1 else stops}
        write_json(folder / "generation_config.json", known | ends)


def stop_ids(run: Run) -> list[int]:
    """The tokens that end an answer: first the one that was trained, then those that the base model
    names, which may have several. Raises ValueError where its file is broken."""
    named = optional_json(Path(run.config.model) / "generation_config.json").get("eos_token_id")
    named = run.model.config.source.get("eos_token_id") if named is None else named
    named = named if isinstance(named, list) else [named]
    return [i for i in dict.fromkeys([run.tokenizer.eos_id, *named]) if isinstance(i, int)]


def save_model(run: Run, folder: Path, row: dict | None = None):
    """The trained model as a Hugging Face folder, in the dtype that the checkpoint had; with row,
    its evaluation, by which OUT/best is recognised. Raises NotWritten."""
    model, config = run.model, run.config
    if rank() > 0:
        if config.shard:  # takes part in gathering each tensor
            model.save_pretrained(None)
        return
    if config.lora_rank:
        model = merge_lora(model, Transformer.from_pretrained(config.model))
    with replaced(folder) as new:
        model.save_pretrained(new, dtype=getattr(torch, model.config.dtype))
        write_model_files(new, run)
        if row is not None:
            (new / "evaluation.json").write_text(json.dumps(row, indent=2) + "\n")


def save_best(run: Run, row: dict):
    """With --eval-every: saves the model as OUT/best where row has this run's lowest eval_loss.

    It is compared with the row in OUT/best, which belongs to those weights whatever happens. Rows
    of metrics.jsonl may be cut by --resume, and be computed again with other roundings.
    """
    if row["step"] == 0 or not run.config.eval_every:  # step 0 is --model itself
        return
    best = read_best(run.out).get("eval_loss", math.inf)
    if max_over_processes(
        int(rank() == 0 and row["eval_loss"] < best)
    ):  # process 0 decides for all
        try:
            save_model(run, run.out / "best", row)
        except NotWritten as error:
            advice = f"fix this, then {way_on(run.out)}"
            raise NotWritten(error.path, error.reason, advice) from None


def save_adapters(run: Run, folder: Path):
    """The adapters by themselves, as peft reads them, and the tokenizer that they belong to."""
    if rank() == 0:
        adapters = {name: (m.lora_A, m.lora_B) for name, m in lora_layers(run.model).items()}
        numbers = run.config.lora_rank, run.config.lora_alpha
        with replaced(folder) as new:
            write_adapters(new, run.model.config.family, adapters, *numbers, run.config.model)
            write_serving_files(new, run)


def finish(run: Run):
    """Writes OUT/model, OUT/adapters, and then that the run is finished. Raises NotWritten."""
    try:
        save_model(run, run.out / "model")
        if run.config.lora_adapters:
            save_adapters(run, run.out / "adapters")
        if rank() == 0:
            (run.out / FINISHED).write_text(f"{run.n_steps}\n", encoding="utf-8")
    except OSError as error:
        path = error.path if isinstance(error, NotWritten) else run.out
        advice = f"{last_good(run.out)}; make space, then {way_on(run.out)}"
        raise NotWritten(path, reason_of(error), advice) from None
