"""Plan."""

import contextlib
import math
import resource
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import fsdp

from data import (
    Pair,
    PairSet,
    balance_over_ranks,
    digest,
    show,
    split_by_tokens,
    step_pairs,
    steps_in_epoch,
    use_colour,
)
from model import ModelConfig, Transformer, trainable
from run.flags import TrainConfig
from run.folder import existing_parent
from run.lora import add_lora, lora_layers
from run.processes import world_size


class Plan(NamedTuple):
    n_steps: int
    steps_an_epoch: int
    largest: list[Pair]  # the micro-batch of most tokens
    several: bool  # some step has several micro-batches in a process
    digests: dict[str, str]  # of the pairs of --data and --eval-data


def make_plan(model, tokenizer, train_set: PairSet, eval_set: PairSet, config: TrainConfig) -> Plan:
    """Goes through all steps without computing them, and prints what they will be."""
    c, pairs, n_processes = config, train_set.pairs, world_size()
    trained, n_parameters = count_parameters(model)
    an_epoch = steps_in_epoch(len(pairs), c.batch_size)
    n_steps = c.max_steps or c.epochs * an_epoch
    steps = [step_pairs(pairs, step, c.batch_size, c.seed) for step in range(1, n_steps + 1)]
    shares = [share for step in steps for share in balance_over_ranks(step, n_processes)]
    splits = [split_by_tokens(share, c.micro_batch_tokens) for share in shares]
    parts = [part for split in splits for part in split]
    tokens = [sum(pair.n_tokens for pair in part) for part in parts]
    largest = parts[tokens.index(max(tokens))]
    several = max(map(len, splits)) > 1  # not by len(parts): a process may have no pair in a step

    print(f"model    {c.model}: {n_parameters:,} parameters, stored as {model.config.dtype}")
    print(f"         {trained:,} trained, in float32, products in {c.dtype}, on {c.device}")
    for name, pair_set in (("train", train_set), ("eval", eval_set)):
        if pair_set.pairs:
            print(f"{name:<8} {pair_set.about}")
    print(
        f"steps    {n_steps} of {c.batch_size} pairs ({an_epoch} an epoch), "
        f"{sum(tokens) / n_steps:.0f} tokens a step in {len(parts) / n_steps:.1f} micro-batches, "
        f"the largest of {max(tokens)}"
    )
    if n_processes > 1:
        loads = [sum(pair.n_tokens for pair in share) for share in shares]
        busiest = [max(loads[i : i + n_processes]) for i in range(0, len(loads), n_processes)]
        ratio = n_processes * sum(busiest) / sum(tokens)
        print(
            f"         over {n_processes} processes, the busiest with {ratio:.2f} of an equal share"
        )
    print(
        f"         lam {c.lam}, SFT over {c.sft_loss}, lr {c.lr} "
        f"({c.lr_schedule}, {c.warmup_steps} warm-up), seed {c.seed}"
    )
    n_flops = sum(step_flops(model, step, c) for step in steps)
    repeated = min(model.checkpointed_blocks, model.config.n_layers) / model.config.n_layers
    seconds = n_flops * (1 + repeated / 3) / (0.5 * product_rate(model) * n_processes)
    print(
        f"time     about {duration(seconds)}, if matrix products reach half of their speed alone; "
        "by the clock after 3 steps"
    )
    state = gigabytes(fixed_memory(trained, n_parameters, c))
    each = " in each process" if c.shard else ""
    print(
        f"memory   {state}{each} for weights, gradients and Adam's moments; the rest is tried next"
    )
    needed, n_checkpoints = disk_needed(model, n_steps, c)
    free = disk_free(Path(c.out or "."))
    warning = "" if needed < free else ": NOT ENOUGH; lower --keep, or name another --out"
    print(
        f"disk     {gigabytes(needed)} for the model{', the best one' if c.eval_every else ''} and "
        f"{n_checkpoints} checkpoint{'' if n_checkpoints == 1 else 's'}, "
        f"of {gigabytes(free)} free{warning}"
    )
    print("the first pair, as trained on:")
    print(show(pairs[0], tokenizer, colour=use_colour()), flush=True)
    sets = (("data", train_set), ("eval_data", eval_set))
    digests = {name: digest(pair_set.pairs) for name, pair_set in sets}
    return Plan(n_steps, an_epoch, largest, several, digests)


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


def disk_needed(model: Transformer, n_steps: int, config: TrainConfig) -> tuple[int, int]:
    """Bytes of OUT/model, OUT/best, OUT/adapters and the checkpoints at the most, and how many
    checkpoints these are: one more than --keep, as an old one goes when a new one is complete, or
    all of a short run. (So it is with OUT/best, but before there is OUT/model.)"""
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


def product_rate(model: Transformer, seconds: float = 0.05) -> float:
    """Operations a second of square matrix products on the model's device, in its compute dtype."""
    cuda = model.device.type == "cuda"
    n = 4096 if cuda else 512
    a, b = torch.randn(2, n, n, device=model.device).to(model.compute_dtype)
    float((a @ b)[0, 0])  # the first one sets kernels up; float waits for the device
    n_products, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds:
        float((a @ b)[0, 0])
        n_products += 1
    return n_products * 2 * n**3 / taken


def duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MB"


def block_memory(model: Transformer, pairs: list[Pair]) -> tuple[int, int]:
    """Bytes that a block keeps of a micro-batch for its backward pass, and of them its input.

    Without torch.compile, and with fused norms and Flash attention, as on a GPU in bfloat16.
    """
    c, itemsize = model.config, (model.compute_dtype or torch.float32).itemsize
    n = sum(pair.n_tokens for pair in pairs)
    n_keys = n + sum(len(pair.prompt) for pair in pairs)  # a prompt's are gathered twice
    norms = 2 if c.parallel else 4  # what each of them reads and writes, in widths D
    wide = 4 if c.gated else 1 if c.activation == "relu" else 2  # in widths of the MLP
    # Attention keeps queries, keys, values and its output.
    per_token = norms * c.dim + 2 * c.n_heads * c.head_dim + wide * c.hidden_dim
    kept = n * per_token + 2 * n_keys * c.n_kv_heads * c.head_dim
    # The copies in compute_dtype to which weights are cast. What is frozen is stored in that dtype,
    # and FSDP2 casts as it gathers, and lets go of what it gathered behind the block.
    if not isinstance(model, fsdp.FSDPModule):
        weights = [p for p in model.layers[0].parameters() if p.dtype.itemsize != itemsize]
        kept += sum(p.numel() for p in weights if p.dim() == 2)
    return itemsize * kept, itemsize * n * c.dim


@contextlib.contextmanager
def out_of_memory_advice(config: TrainConfig, pairs: list[Pair] = ()):
    """An out-of-memory error within it becomes a ValueError that says what helps in this case."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(advice_on_memory(config, pairs)) from None


def advice_on_memory(config: TrainConfig, pairs: list[Pair] = ()) -> str:
    """What to change, where a micro-batch of these pairs, or the model alone, does not fit."""
    with torch.device("meta"):  # the model at hand may be half loaded
        model = Transformer(ModelConfig.from_json(Path(config.model) / "config.json"))
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    trained, n_parameters = count_parameters(model)
    fixed = fixed_memory(trained, n_parameters, config)
    total = torch.cuda.get_device_properties(config.device).total_memory
    state = f"{gigabytes(fixed)} for weights, gradients and Adam's moments"
    card = f"{gigabytes(total)} of {config.device}"
    shard = "--shard over more GPUs (torchrun --nproc-per-node N train.py ... --shard)"
    shard = "more GPUs" if config.shard else shard
    lora = "" if config.lora_rank or config.shard else " or --lora-rank 16"
    if fixed > 0.95 * total or not pairs:
        return (
            f"out of memory: {state} do not fit the {card}; smaller micro-batches and "
            f"--activation-checkpointing do not change that, {shard}{lora} would"
        )
    n, longest = (f(pair.n_tokens for pair in pairs) for f in (sum, max))
    ways = []
    if int(config.activation_checkpointing) == 0:
        ways.append("--activation-checkpointing")
    elif config.activation_checkpointing is not True:
        ways.append("--activation-checkpointing of more blocks")
    if n > longest:
        ways.append(f"--micro-batch-tokens below {config.micro_batch_tokens}")
    else:  # it is a single pair, which is never split
        ways.append(f"--max-length below {config.max_length}")
    ways.append(shard + lora)
    return (
        f"out of memory: beside {state} the largest micro-batch, {n} tokens, does not fit the "
        f"{card}; what helps: {', '.join(ways)}"
    )


# Dense bfloat16 operations a second by the makers' data sheets, in 1e12; the first name that fits.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}


def peak_flops(device, config: TrainConfig) -> float | None:
    """What MFU is a share of; None where the device or the dtype is not in the table."""
    if device.type != "cuda" or config.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def step_flops(model: Transformer, pairs: list[Pair], config: TrainConfig) -> int:
    lengths = [pair.lengths for pair in pairs]
    n_predicted = sum(c + r + (p - 1 if config.sft_loss == "full" else 0) for p, c, r in lengths)
    return model.training_flops(lengths, n_predicted)


def peak_memory_gb(device) -> float:
    """GB (2^30) at the most so far: of CUDA's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KB
