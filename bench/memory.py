"""Memory: which model fits which card, and what loading and saving take. And what a run costs.

    python -m bench.memory count [--only NAME]      the table of README and docs: minutes a row
    python -m bench.memory cost                     operations, hours and disk of 60,000 pairs
    python -m bench.memory dpo                      ORPO's step beside DPO's
    python -m bench.memory load FOLDER              1.1 billion parameters, written to FOLDER first

count: a row is a model of a published shape, in pairs of UltraFeedback's mean lengths, two
micro-batches a step, bfloat16 products and float32 sums, as on a GPU. No card is needed: one
training step runs on tensors that have a shape and no content, while PyTorch's MemTracker adds up
what is alive; a process of several is one beside processes that are not there. It cannot see what
a card holds besides, CUDA's context and the allocator's gaps, 1 to 3 GB: "fits" allows for 3.

cost: the operations that 60,000 such pairs need, once; the hours that they take where a GPU does
400 TFLOPS of them a second (40% of what an H100 can do in bfloat16), which is an assumption and not
a measurement; and what the model and each checkpoint take on disk.

load: peak memory of a process that loads and saves, alone and as one of two (--shard).
"""

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import model as model_file
import train
from attention import Gather
from formats.families import FAMILIES
from model import ModelConfig, Transformer
from run import processes
from run.lora import add_lora
from run.plan import count_parameters, fixed_memory, peak_memory_gb
from run.processes import is_one_of_several, pick_device, rank, shard, world_size

GB = 2**30
# As sold, and what CUDA says they have; 16 GB is a T4, which has no bfloat16 and no Flash kernel.
CARDS = {"16 GB": 14.5, "24 GB": 23.6, "80 GB": 79.1, "141 GB": 139.8}
LENGTHS = (193, 289, 260)  # UltraFeedback's means: prompt, chosen, rejected


def shape(family: str, *sizes, **more) -> ModelConfig:
    values = FAMILIES[family].values | {"family": family, "max_seq_len": 2048}
    return ModelConfig(*sizes, **values | more)


SHAPES = {  # vocabulary, width, layers, heads, MLP width, as in the checkpoints' config.json
    "OPT-125M": shape("opt", 50272, 768, 12, 12, 3072),
    "Qwen2-0.5B": shape("qwen2", 151936, 896, 24, 14, 4864, n_kv_heads=2, tie_embeddings=True),
    "Phi-2": shape("phi", 51200, 2560, 32, 32, 10240),
    "Llama-2-7B": shape("llama", 32000, 4096, 32, 32, 11008),
    "Mistral-7B": shape("mistral", 32000, 4096, 32, 32, 14336, n_kv_heads=8),
    "Qwen2.5-7B": shape("qwen2", 152064, 3584, 28, 28, 18944, n_kv_heads=4),
    "Llama-3-8B": shape("llama", 128256, 4096, 32, 32, 14336, n_kv_heads=8),
}


class Row(NamedTuple):
    name: str
    checkpointed: int = 0  # blocks that are computed twice
    tokens: int = 8192  # --micro-batch-tokens
    lora: int = 0
    gpus: int = 1
    dtype: str = "bfloat16"
    reference: bool = False  # DPO's, frozen in bfloat16, is in memory too

    def flags(self) -> str:
        flags = []
        if self.checkpointed:
            n = "" if self.checkpointed >= SHAPES[self.name].n_layers else f" {self.checkpointed}"
            flags.append("--activation-checkpointing" + n)
        if self.tokens != 8192:
            flags.append(f"--micro-batch-tokens {self.tokens}")
        if self.lora:
            flags.append(f"--lora-rank {self.lora}")
        if self.dtype != "bfloat16":
            flags.append(f"--dtype {self.dtype}")
        if self.gpus > 1:
            flags.append("--shard")
        return " ".join(flags)


ALL = 1000
ROWS = [
    Row("OPT-125M"),
    Row("Qwen2-0.5B"),
    Row("Qwen2-0.5B", ALL),
    Row("Qwen2-0.5B", ALL, 2048, dtype="float32"),
    Row("Phi-2"),
    Row("Phi-2", ALL),
    Row("Phi-2", ALL, lora=16),
    Row("Llama-2-7B", ALL),
    Row("Llama-2-7B", 16, 4096),
    Row("Llama-2-7B", 0, 4096),
    Row("Mistral-7B", ALL),
    Row("Mistral-7B", ALL, gpus=8),
    Row("Mistral-7B", ALL, lora=16),
    Row("Qwen2.5-7B", ALL),
    Row("Qwen2.5-7B", ALL, gpus=8),
    Row("Qwen2.5-7B", ALL, lora=16),
    Row("Llama-3-8B", ALL),
    Row("Llama-3-8B", ALL, gpus=8),
    Row("Llama-3-8B", ALL, lora=16),
    Row("Llama-3-8B", ALL, 4096, lora=16),
]


# ---------------------------------------------------------------------------------------------
# Counting.


class Footprint(torch.autograd.Function):
    """What a fused GPU kernel keeps: its inputs, its output if asked, a number a row."""

    @staticmethod
    def forward(ctx, keeps_output, *inputs):
        out = torch.empty_like(inputs[0])
        ctx.save_for_backward(*inputs, *([out] if keeps_output else []))
        ctx.numbers = out.new_empty(out.shape[:-1], dtype=torch.float32)
        ctx.n = len(inputs)
        return out

    @staticmethod
    def backward(ctx, grad):
        return None, *(torch.empty_like(x) for x in ctx.saved_tensors[: ctx.n])


def stand_in_for_kernels():
    """Without a CUDA build of PyTorch: attention and norms that take what those on a GPU do."""

    def attention(q, k, v, segments, window=None):
        copies = segments.key_index, segments.first_copy, segments.last_copy
        return Footprint.apply(True, q, *(Gather.apply(x, *copies) for x in (k, v)))

    def norm(self, x):
        bias = [] if self.bias is None else [self.bias.to(x.dtype)]
        return Footprint.apply(False, x, self.weight.to(x.dtype), *bias)

    model_file.attention, model_file.Norm.forward = attention, norm


class Twice:
    """A step's two equal micro-batches: in the second there are gradients. A reference model reads
    each before it is trained on."""

    def __init__(self, batch: data.Batch, tracker: MemTracker, reference: Transformer | None):
        self.batch, self.tracker, self.reference = batch, tracker, reference

    def __iter__(self):
        for _ in range(2):
            self.tracker.reset_mod_stats()  # without it a module is counted once
            if self.reference is not None:
                with torch.no_grad():
                    train.forward(self.reference, self.batch, lam=0.0)
            yield self.batch


def count(config: ModelConfig, row: Row) -> tuple[int, int]:
    """Bytes alive at the peak of a step, and those that no micro-batch changes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        stand_in_for_kernels()
    settings = train.TrainConfig(
        dtype=row.dtype,
        sft_loss="full",
        micro_batch_tokens=row.tokens,
        shard=row.gpus > 1,
        lora_rank=row.lora,
        device=str(device),
    )
    pair = data.Pair(*([token] * n for token, n in zip((1, 2, 3), LENGTHS, strict=True)))
    (batch,) = train.pack([pair] * (row.tokens // pair.n_tokens), settings)
    torch.Tensor.pin_memory = lambda x: x  # tensors without content cannot be pinned
    if row.gpus > 1:
        dist.init_process_group("fake", rank=0, world_size=row.gpus, store=FakeStore())
        mesh = processes.init_device_mesh(device.type, (row.gpus,))
        processes.init_device_mesh = lambda *_: mesh
    if row.lora:  # the tracker wants to hear of every parameter's gradient, also where is none
        trained = torch.ones((), requires_grad=True)
        for name in ("register_hook", "register_post_accumulate_grad_hook"):
            hook = getattr(torch.Tensor, name)
            hook = lambda p, f, hook=hook: hook(p if p.requires_grad else trained, f)  # noqa: E731
            setattr(torch.Tensor, name, hook)
        torch.set_default_dtype(getattr(torch, row.dtype))
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            model = Transformer(config)
        torch.set_default_dtype(torch.float32)
        if row.lora:
            add_lora(model, row.lora, 16.0)
        if row.gpus > 1:
            shard(model, settings)
        model.compute_dtype = getattr(torch, row.dtype)
        model.checkpointed_blocks = row.checkpointed
        optimizer = train.make_optimizer(model, settings)
        train.training_step(model, optimizer, [batch], settings)  # makes the moments
        reference = None
        if row.reference:
            torch.set_default_dtype(torch.bfloat16)
            with device:
                reference = Transformer(config)
            torch.set_default_dtype(torch.float32)
            reference.compute_dtype = torch.bfloat16
            tracker.track_external(reference)
        tracker.track_external(model, optimizer)
        with tracker:
            train.training_step(model, optimizer, Twice(batch, tracker, reference), settings)
    peaks = tracker.get_tracker_snapshot("peak").items()
    (peak,) = (found["Total"] for where, found in peaks if where.type == device.type)
    return peak, fixed_memory(*count_parameters(model), settings)


def count_apart(config: ModelConfig, row: Row) -> tuple[int, int]:
    """In a process of its own, as it leaves its marks on the modules."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(count, (config, row))


def print_table(only: str | None):
    print("| model | flags | GPUs | weights, gradients, moments, GB | all, GB | fits a card of |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        if only in (None, row.name):
            peak, fixed = count_apart(SHAPES[row.name], row)
            fits = [card for card, size in CARDS.items() if peak / GB + 3 < size]
            print(
                f"| {row.name} | {row.flags()} | {row.gpus} | {fixed / GB:.1f} | {peak / GB:.1f} "
                f"| {fits[0] if fits else 'none of these'} |",
                flush=True,
            )


DPO_ROWS = [Row("Llama-2-7B", ALL), Row("Mistral-7B", ALL), Row("Mistral-7B", ALL, lora=16)]


def print_dpo_table():
    """ORPO's step beside DPO's. Per pair DPO's loss takes two numbers more than ORPO's, the
    reference's log-probabilities, and its gradient goes the same way through the fused linear. So
    ORPO's step stands for DPO's where these are stored; else a reference model comes on top."""
    print("| model | flags | ORPO, or DPO with the reference's log-probabilities stored, GB "
          "| DPO with the reference in memory, GB |")  # fmt: skip
    print("| --- | --- | --- | --- |")
    for row in DPO_ROWS:
        config = SHAPES[row.name]
        orpo, _ = count_apart(config, row)
        if row.lora:  # with the adapters left out, the model itself is the reference
            dpo = orpo
        else:
            dpo, _ = count_apart(config, row._replace(reference=True))
        print(f"| {row.name} | {row.flags()} | {orpo / GB:.1f} | {dpo / GB:.1f} |", flush=True)


# ---------------------------------------------------------------------------------------------
# What a run costs.

N_PAIRS, RATE = 60_000, 4e14  # UltraFeedback's; operations a second


def print_costs():
    print("| model | 10^18 operations, an epoch | hours, 1 GPU | 8 GPUs | model | a checkpoint |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, config in SHAPES.items():
        with torch.device("meta"):
            model = Transformer(config)
        n = sum(p.numel() for p in model.parameters())
        flops = N_PAIRS * model.training_flops([LENGTHS], LENGTHS[1] + LENGTHS[2])
        hours = flops / RATE / 3600
        print(
            f"| {name} | {flops / 1e18:.2f} | {hours:.2f} | {hours / 8:.2f} "
            f"| {2 * n / GB:.1f} GB | {12 * n / GB:.1f} GB |"
        )


# ---------------------------------------------------------------------------------------------
# Loading and saving.

LOADED = ModelConfig(32000, 2048, 22, 32, 5632, n_kv_heads=4)


def peak_gb() -> float:
    return peak_memory_gb(torch.device("cpu"))


def load_and_save(folder: Path, dtype: str):
    """One process, or one of torchrun's, of which each keeps a part of every weight."""
    several = is_one_of_several()
    config, shard_it = train.TrainConfig(dtype="bfloat16", device="cpu", shard=several), None
    if several:
        pick_device(config)
        shard_it = functools.partial(shard, config=config)
    before = peak_gb()
    model = Transformer.from_pretrained(folder / "in", "cpu", getattr(torch, dtype), shard_it)
    parameters = [p.to_local() if several else p for p in model.parameters()]
    size, loaded = sum(p.nbytes for p in parameters) / GB, peak_gb()
    model.save_pretrained(folder / "out" if rank() == 0 else None, dtype=torch.bfloat16)
    found = [(size, before, loaded, peak_gb())]
    if several:
        found = [None] * world_size()
        dist.all_gather_object(found, (size, before, loaded, peak_gb()))
    for i, (size, before, loaded, saved) in enumerate(found):
        print(
            f"{dtype}, process {i + 1} of {len(found)}: holds {size:.2f} GB; peak {before:.2f} GB "
            f"before, {loaded:.2f} GB loaded, {saved:.2f} GB saved as bfloat16"
        )
    sys.stdout.flush()
    os._exit(0)  # as train.py does, and for its reason


def load(folder: Path):
    with torch.device("meta"):
        model = Transformer(LOADED)
    model.to(torch.bfloat16).to_empty(device="cpu").save_pretrained(folder / "in")
    one, two = [sys.executable], [sys.executable, "-m", "torch.distributed.run"]
    two += ["--standalone", "--nproc-per-node", "2"]
    for start, dtype in ((one, "bfloat16"), (one, "float32"), (two, "float32")):
        command = [*start, "-m", "bench.memory", "load", folder, "--dtype", dtype]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    counting = commands.add_parser("count", help="which model fits which card")
    counting.add_argument("--only", help="rows of this model alone", choices=SHAPES)
    commands.add_parser("cost", help="operations, hours and disk of 60,000 pairs")
    commands.add_parser("dpo", help="ORPO's step beside DPO's")
    loading = commands.add_parser("load", help="peak memory of loading and saving")
    loading.add_argument("folder", type=Path)
    loading.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command == "count":
        print_table(arguments.only)
    elif arguments.command == "cost":
        print_costs()
    elif arguments.command == "dpo":
        print_dpo_table()
    elif arguments.dtype:
        load_and_save(arguments.folder, arguments.dtype)
    else:
        load(arguments.folder)


if __name__ == "__main__":
    main()
