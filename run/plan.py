"""What a run will do and need, counted before it does it: steps, operations, memory, disk.

Here, and not in the loop, because nothing of it changes a number that is trained: it is what
--dry-run prints, and what an out-of-memory error is explained by.
"""

import contextlib
import math
import os
import resource
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import (
    GROUP_ROWS,
    Pair,
    balance_over_ranks,
    show,
    split_by_tokens,
    step_pairs,
    steps_in_epoch,
    use_colour,
)
from model import ModelConfig, Transformer, trainable
from run.compiled import keeps_products
from run.flags import TrainConfig
from run.folder import existing_parent
from run.lora import add_lora, lora_layers
from run.processes import remember_peak, world_size


class Plan(NamedTuple):
    n_steps: int
    steps_an_epoch: int
    largest: list[Pair]  # the micro-batch of most tokens
    several: bool  # some step has several micro-batches in a process
    widest: list[Pair] | tuple = ()  # the one with most logits at a time, if it is another


def make_plan(model: Transformer, tokenizer, pairs: list[Pair], config: TrainConfig) -> Plan:
    """Goes through the steps without computing them, and prints what they will be: all of them, or
    of a long run the first two epochs, as the others only bring the same pairs in other orders."""
    c, n_processes = config, world_size()
    an_epoch = steps_in_epoch(len(pairs), c.batch_size)
    n_steps = c.max_steps or c.epochs * an_epoch
    n_looked_at = min(n_steps, max(2 * an_epoch, 1000))
    steps = [step_pairs(pairs, step, c.batch_size, c.seed) for step in range(1, n_looked_at + 1)]
    shares = [share for step in steps for share in balance_over_ranks(step, n_processes)]
    splits = [split_by_tokens(share, c.token_budget) for share in shares]
    parts = [part for split in splits for part in split]
    tokens = [sum(pair.n_tokens for pair in part) for part in parts]
    largest = parts[tokens.index(max(tokens))]
    widest = max(parts, key=most_logits)
    if most_logits(widest) <= max(GROUP_ROWS, most_logits(largest)):
        widest = ()
    several = max(map(len, splits)) > 1  # not by len(parts): a process may have no pair in a step
    lines = [
        f"{n_steps} of {c.batch_size} pairs ({an_epoch} an epoch), "
        f"{sum(tokens) / n_looked_at:.0f} tokens a step in {len(parts) / n_looked_at:.1f} "
        f"micro-batches, the largest of {max(tokens)}"
    ]
    if n_processes > 1:
        loads = [sum(pair.n_tokens for pair in share) for share in shares]
        busiest = [max(loads[i : i + n_processes]) for i in range(0, len(loads), n_processes)]
        ratio = n_processes * sum(busiest) / sum(tokens)
        load = f"the busiest with {ratio:.2f} of an equal share"
        lines.append(f"over {n_processes} processes, {load}")
    lines.append(
        f"lam {c.lam}, SFT over {c.sft_loss}, lr {c.lr} "
        f"({c.lr_schedule}, {c.warmup_steps} warm-up), seed {c.seed}"
    )
    if c.warmup_steps > n_steps:
        share = n_steps / c.warmup_steps
        lines.append(f"warning: the run ends within the warm-up, at {share:.0%} of --lr")
    tell("steps", *lines)
    n_pairs = sum(map(len, steps)) * n_steps / n_looked_at
    n_flops = step_flops(model, pairs, c) * n_pairs / len(pairs)
    tell("time", time_line(model, n_flops, c))
    tell_slow_bfloat16(c)
    tell("memory", memory_line(model, c))
    tell("disk", disk_line(model, n_steps, c))
    print("the first pair, as trained on:")
    print(show(pairs[0], tokenizer, colour=use_colour()), flush=True)
    return Plan(n_steps, an_epoch, largest, several, widest)


def most_logits(pairs: list[Pair]) -> int:
    """The most rows of logits in memory at once: those of one pair cannot be divided."""
    return max((sum(pair.lengths[1:]) for pair in pairs), default=0)


def tell(heading: str, *lines: str):
    """Prints lines, the first of them after a heading."""
    for i, line in enumerate(lines):
        print(f"{'' if i else heading:<8} {line}", flush=True)


def tell_model(model: Transformer, config: TrainConfig):
    trained, n_parameters = count_parameters(model)
    tell(
        "model",
        f"{config.model}: {n_parameters:,} parameters, stored as {model.config.dtype}",
        f"{trained:,} trained, in float32, products in {config.dtype}, on {config.device}",
    )
    load, cores = os.getloadavg()[0], os.cpu_count()
    if config.device == "cpu" and load > cores + 1:
        advice = "OMP_NUM_THREADS=1 may be several times faster"
        tell("", f"this machine is busy (load {load:.0f} on {cores} cores): {advice}")


def bytes_of(pair: Pair) -> bytes:
    """The prompt, as something that a set can hold."""
    return np.asarray(pair.prompt, np.int32).tobytes()


def tell_problems(model: Transformer, tokenizer, pairs: list[Pair], eval_pairs: list[Pair]):
    """Warns of what a user should know of the pairs before the first step."""
    tell_overlap(pairs, eval_pairs)
    if names := unlearnable(model, tokenizer, pairs):
        text = f"warning: the rows of lm_head for {', '.join(names)} are zero, or equal to those of"
        tell("", f"{text} other tokens, and adapters do not change lm_head: the model cannot learn")
        tell("", "to write them. Train without --lora-rank, or use a chat template without them.")


def unlearnable(model: Transformer, tokenizer, pairs: list[Pair]) -> list[str]:
    """The special tokens of the chosen responses that a frozen lm_head cannot tell from others, as
    a base model never saw those of a chat template."""
    head = model.lm_head_weight
    if head.requires_grad or not pairs:
        return []
    special = tokenizer.added_ids | {tokenizer.eos_id}
    used = special & {*np.unique(np.concatenate([pair.chosen for pair in pairs])).tolist()}
    first = head[:, :64]  # enough to tell two rows apart
    alike = [i for i in sorted(used) if not head[i].any() or (first == first[i]).all(1).sum() > 1]
    return [repr(tokenizer.decode([i])) for i in alike]


def tell_overlap(pairs: list[Pair], eval_pairs: list[Pair]):
    """Says how many held-out pairs have a prompt that is trained on."""
    trained = {bytes_of(pair) for pair in pairs}
    if n := sum(bytes_of(pair) in trained for pair in eval_pairs):
        text = f"{n} of {len(eval_pairs)} pairs have a prompt that is trained on"
        tell("", f"warning: {text}: they are not held out")


# ---------------------------------------------------------------------------------------------
# Operations.

# Dense bfloat16 operations a second by the makers' data sheets, in 1e12; the first name that fits.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}
PEAK_TFLOPS |= {"RTX 4090": 165, "RTX 3090": 71}  # by the white papers of their chips
# The share of its products that a training step reaches on a CPU, roughly: with 1 and with 135
# million parameters.
CPU_SHARE = {"small": 0.25, "large": 0.5}


def peak_flops(device, config: TrainConfig) -> float | None:
    """What MFU is a share of; None where the device or the dtype is not in the table."""
    if device.type != "cuda" or config.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a training step's three products (y = x W^T, and its gradients
    g W and g^T x) on this CPU, measured in half a second at most or in one round: the best of a
    few on one core, times the cores, as others may be using the machine."""
    x, weight = (torch.ones(n, 512, dtype=dtype, requires_grad=True) for n in (256, 512))
    gradient, seconds = torch.ones(256, 512, dtype=dtype), []
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    while len(seconds) < 8 and sum(seconds) < 0.5:
        start = time.perf_counter()
        y = torch.nn.functional.linear(x, weight)
        torch.autograd.grad(y, (x, weight), gradient)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(n_threads)
    return 3 * 2 * x.numel() * len(weight) / min(seconds) * n_threads


def tell_slow_bfloat16(config: TrainConfig):
    """A CPU without instructions for it (AVX2 only) multiplies bfloat16 in plain loops, those of
    the backward pass far slower than those of the forward pass."""
    if config.device == "cpu" and config.dtype == "bfloat16":
        slower = product_rate(torch.float32) / product_rate(torch.bfloat16)
        if slower > 1.2:
            text = f"products in bfloat16 take {slower:.1f} times as long as in float32 on this CPU"
            advice = "" if config.resume else ": use --dtype float32"
            tell("", f"warning: {text}{advice}")


def step_flops(model: Transformer, pairs: list[Pair], config: TrainConfig) -> int:
    """Operations that training on these pairs once needs."""
    lengths = [pair.lengths for pair in pairs]
    n_predicted = sum(c + r + (p - 1 if config.sft_loss == "full" else 0) for p, c, r in lengths)
    return model.training_flops(lengths, n_predicted)


def time_line(model: Transformer, n_flops: float, config: TrainConfig) -> str:
    """The time of n_flops at a rate that is stated: by a GPU's data sheet, by a CPU's products."""
    peak = peak_flops(model.device, config)
    if peak is None and model.device.type == "cuda":
        return f"{n_flops:.2g} operations; after 3 steps the log has the measured time"
    size = "small" if count_parameters(model)[1] < 5e7 else "large"
    rate = 0.4 * peak if peak else CPU_SHARE[size] * product_rate(getattr(torch, config.dtype))
    share = min(model.checkpointed_blocks, model.config.n_layers) / model.config.n_layers
    if config.compile and keeps_products(model, config.shard):
        share = 0
    # The forward pass again: a third of the needed operations, or half of them with a frozen model.
    again = share / (2 if config.lora_rank else 3)
    seconds = n_flops * (1 + again) / rate / world_size()
    return (
        f"{n_flops:.2g} operations: {timedelta(seconds=round(seconds))} if each process does "
        f"{rate / 1e12:.3g} TFLOP/s; after 3 steps the log has the measured time"
    )


# ---------------------------------------------------------------------------------------------
# Memory.


def count_parameters(model: Transformer) -> tuple[int, int]:
    """Those that are trained, and those of the model without adapters."""
    trained, n = (
        sum(p.numel() for p in trainable(model)),
        sum(p.numel() for p in model.parameters()),
    )
    return trained, n - trained if lora_layers(model) else n


def fixed_memory(trained: int, n_parameters: int, config: TrainConfig) -> int:
    """Bytes of a process that no micro-batch changes: in float32 weights, gradients and Adam's two
    moments, which --shard divides; or adapters in the same way, and frozen weights in --dtype."""
    if config.lora_rank:
        return 16 * trained + n_parameters * getattr(torch, config.dtype).itemsize
    return 16 * n_parameters // (world_size() if config.shard else 1)


def memory_line(model: Transformer, config: TrainConfig) -> str:
    state = gigabytes(fixed_memory(*count_parameters(model), config))
    each = " in each process" if config.shard else ""
    return f"{state}{each} for weights, gradients and Adam's moments; activations are measured next"


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MB"


def peak_memory_gb(device) -> float:
    """GB (2^30) at the most so far: of CUDA's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KB on Linux


def tell_peak(device, several: bool):
    """Says what the largest micro-batch took. No step takes more, but for the gaps that a CPU's
    allocator leaves between buffers: up to half as much again was seen (give_back_memory)."""
    peak = peak_memory_gb(device)
    text = f"{peak:.2f} GB at the most in a step"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        text += f", of {total:.2f} GB"
        if several and peak < total / 3:  # a small model is faster than the host can ask it to be
            text += ": a larger --micro-batch-tokens may be faster"
    else:
        remember_peak(peak * 2**30)
        text += "; the allocator of a CPU may hold half as much again"
    tell("memory", text)  # with its heading, as the first pair was shown in between


@contextlib.contextmanager
def out_of_memory_advice(config: TrainConfig, pairs: list[Pair] = ()):
    """An out-of-memory error within it becomes a ValueError that says what was needed and what
    helps. pairs: the micro-batch that ran; without them the model itself did not fit."""
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one; a CPU has no own kind
        on_cpu = config.device == "cpu" and "CPUAllocator" in str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
            raise
        raise ValueError(advice_on_memory(config, pairs)) from None


def advice_on_memory(config: TrainConfig, pairs: list[Pair] = ()) -> str:
    """What was needed and what helps, in one sentence."""
    with torch.device("meta"):  # the model at hand may be half loaded
        model = Transformer(ModelConfig.from_json(Path(config.model) / "config.json"))
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    fixed = gigabytes(fixed_memory(*count_parameters(model), config))
    if config.device == "cpu":  # other programs, or a limit (ulimit), may have taken some of it
        has = "what is left of this machine's memory"
    else:
        total = torch.cuda.get_device_properties(config.device).total_memory
        has = f"the {gigabytes(total)} of {config.device}"
    batch, ways = "", []
    if pairs:
        batch = f" and a micro-batch of {sum(pair.n_tokens for pair in pairs)} tokens"
        ways = ["a lower --micro-batch-tokens or --max-length"]
        ways += [] if config.activation_checkpointing is True else ["--activation-checkpointing"]
    if not config.lora_rank:  # which does not go together with --shard
        sharded = ["more GPUs"] if config.shard else ["--shard over more GPUs"]
        ways += [] if config.device == "cpu" else sharded
        ways += [] if config.shard else ["--lora-rank 16"]
    return (
        f"out of memory: {fixed} for weights, gradients and Adam's moments{batch} do not fit the "
        f"{has}; what helps: {', '.join(ways or ['a smaller model'])}"
    )


# ---------------------------------------------------------------------------------------------
# Disk.


def disk_needed(model: Transformer, n_steps: int, config: TrainConfig) -> tuple[int, int]:
    """The most bytes that OUT/model, OUT/best, OUT/adapters and the checkpoints take, and how many
    checkpoints there are at most: one more than --keep, because an old one is removed only when the
    new one is complete. (A new OUT/best needs no more: it is written before there is OUT/model.)"""
    trained, n_parameters = count_parameters(model)
    stored = n_parameters * getattr(torch, model.config.dtype).itemsize
    needed = stored * (2 if config.eval_every else 1)
    needed += 4 * trained if config.lora_adapters else 0
    written = math.ceil(n_steps / config.save_every) if config.save_every else 0
    n_checkpoints = min(config.keep + 1, written)
    return needed + 12 * trained * n_checkpoints, n_checkpoints


def disk_free(out: Path) -> int:
    """Bytes that a run may fill: those that are free, and those that its folder, which is resumed
    or replaced, has already."""
    names = ("checkpoints", "model", "best", "adapters")
    files = (file for name in names for file in (out / name).rglob("*"))
    own = sum(file.stat().st_size for file in files if file.is_file())
    return own + shutil.disk_usage(existing_parent(out)).free


def disk_line(model: Transformer, n_steps: int, config: TrainConfig) -> str:
    needed, n_checkpoints = disk_needed(model, n_steps, config)
    free = disk_free(Path(config.out or "."))
    warning = "" if needed < free else ": NOT ENOUGH; lower --keep, or name another --out"
    return (
        f"{gigabytes(needed)} for the model{', the best one' if config.eval_every else ''} and "
        f"{n_checkpoints} checkpoint{'' if n_checkpoints == 1 else 's'}, "
        f"of {gigabytes(free)} free{warning}"
    )
