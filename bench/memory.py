"""Which model fits which card: train.py's estimate beside PyTorch's own count of live tensors.

    python bench/memory.py [--count] [--only NAME]

A row is a model of a published shape, micro-batches of 8,192 tokens in pairs of UltraFeedback's
mean lengths, two to a step, bfloat16 products and float32 sums, as on a GPU. No memory is needed
for it: with --count one training step runs on fake tensors, which have a shape and no content,
while MemTracker adds up what is alive (minutes a row); a process of several is one beside fake
others. It cannot see what a card holds besides: CUDA's context and the allocator's gaps, 1 to 3 GB,
of which "fits" allows for 3.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import model as model_file
import train
from model import FAMILIES, ModelConfig, Transformer

GB = 2**30
CARDS = (24, 80, 141)  # GB as sold, 10^9 bytes
LENGTHS = (193, 289, 260)  # UltraFeedback's means: prompt, chosen, rejected


def shape(family: str, *sizes, **more) -> ModelConfig:
    return ModelConfig(
        *sizes, **FAMILIES[family].fields | {"family": family, "max_seq_len": 2048} | more
    )


SHAPES = {  # vocabulary, width, layers, heads, MLP width, as in the checkpoints' config.json
    "OPT-125M": shape("opt", 50272, 768, 12, 12, 3072),
    "Qwen2-0.5B": shape("qwen2", 151936, 896, 24, 14, 4864, n_kv_heads=2, tie_embeddings=True),
    "Phi-2": shape("phi", 51200, 2560, 32, 32, 10240),
    "Llama-2-7B": shape("llama", 32000, 4096, 32, 32, 11008),
    "Mistral-7B": shape("mistral", 32000, 4096, 32, 32, 14336, n_kv_heads=8),
}


class Row(NamedTuple):
    name: str
    checkpointing: bool = False
    lora: int = 0
    gpus: int = 1


ROWS = [
    Row("OPT-125M"),
    Row("Qwen2-0.5B"),
    Row("Qwen2-0.5B", True),
    Row("Phi-2"),
    Row("Phi-2", True),
    Row("Phi-2", True, lora=16),
    Row("Llama-2-7B", True),
    Row("Mistral-7B", True),
    Row("Mistral-7B", True, gpus=8),
    Row("Mistral-7B", True, lora=16),
]


class FlashFootprint(torch.autograd.Function):
    """Of attention what a Flash kernel keeps: its inputs, its output, a number a query and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def attention(q, k, v, segments, window=None):
    return FlashFootprint.apply(q, *(x.index_select(0, segments.key_index) for x in (k, v)))


def planned(row: Row) -> tuple[Transformer, train.TrainConfig, list[data.Pair]]:
    config = train.TrainConfig(dtype="bfloat16", sft_loss="full", shard=row.gpus > 1)
    with torch.device("meta"):
        model = Transformer(SHAPES[row.name])
    if row.lora:
        model.to(torch.bfloat16).add_lora(row.lora, 16.0)
    model.compute_dtype, model.activation_checkpointing = torch.bfloat16, row.checkpointing
    pair = data.Pair(*([token] * n for token, n in zip((1, 2, 3), LENGTHS, strict=True)))
    return model, config, [pair] * (config.micro_batch_tokens // pair.n_tokens)


def count(row: Row) -> int:
    """Bytes alive at the peak of a step."""
    model, config, pairs = planned(row)
    cpu = torch.device("cpu")
    (batch,) = train.micro_batches(pairs, config)
    groups, tracker = train.pair_groups(batch.response), MemTracker()

    def two(*_):
        for _ in range(2):  # in the second there are gradients
            tracker.reset_mod_stats()  # it counts a module once else
            yield batch

    # What looks into numbers is done before: a fake tensor has none.
    train.micro_batches, train.pair_groups = two, lambda _: groups
    model_file.attention = attention
    if row.gpus > 1:
        dist.init_process_group("fake", rank=0, world_size=row.gpus, store=FakeStore())
        train.shard(model, config, cpu)
    if row.lora:  # the tracker wants to hear of every parameter's gradient, also where is none
        trained = torch.ones((), requires_grad=True)
        for name in ("register_hook", "register_post_accumulate_grad_hook"):
            hook = getattr(torch.Tensor, name)
            hook = lambda p, f, hook=hook: hook(p if p.requires_grad else trained, f)  # noqa: E731
            setattr(torch.Tensor, name, hook)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=cpu)
        optimizer = train.make_optimizer(model, config)
        train.training_step(model, optimizer, pairs, config, cpu)  # makes the moments
        tracker.track_external(model, optimizer)
        with tracker:
            train.training_step(model, optimizer, pairs, config, cpu)
    (peak,) = (device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", action="store_true", help="run a step on fake tensors, too")
    parser.add_argument("--only", help="rows of this model alone", choices=SHAPES)
    arguments = parser.parse_args()
    print("| model | trained | GPUs | estimate, GB | counted, GB | fits a card of |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        if arguments.only not in (None, row.name):
            continue
        model, config, pairs = planned(row)
        estimate = train.estimate_memory(model, pairs, True, config.sft_loss, row.gpus)
        # In a process of its own, as it leaves its marks on the modules.
        counted = "-"
        if arguments.count:
            context = torch.multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                counted = f"{pool.apply(count, (row,)) / GB:.1f}"
        needed = estimate + 3 * GB
        fits = [f"{card} GB" for card in CARDS if card * 1e9 > needed]
        method = f"LoRA, rank {row.lora}" if row.lora else "all"
        method += ", --activation-checkpointing" * row.checkpointing + ", --shard" * (row.gpus > 1)
        print(
            f"| {row.name} | {method} | {row.gpus} | {estimate / GB:.1f} | {counted} "
            f"| {fits[0] if fits else 'none of these'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
