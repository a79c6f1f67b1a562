"""The CUDA path on a card: is it right, how fast is it, where does the time go?

    bash bench/gpu.sh STAGE         with date, hardware and versions in front: what to keep
    python -m bench.gpu STAGE       each at most eight minutes on an H200, each useful alone

    check      gradients of every dtype and attention path against float64 on the CPU
    speed      whole steps of 0.1 and 1.1 billion parameters, eager and compiled
    7b         6.7 billion: recomputed, compiled, without recomputation; memory beside its count
    trl        TRL's ORPOTrainer on the same pairs, as installed and at its best
    profile    one step of 6.7 billion: the share of products, attention, the rest, and idle time

Without a card `check` shows the CPU's rows, and `profile --count` counts, on tensors without
content, what a step computes and moves, and what that takes at an H200's measured rates.

A step is train.training_step on random weights, in pairs of UltraFeedback's mean lengths.
"""

import argparse
import dataclasses
import gc
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

if "--count" in sys.argv:  # before CUDA starts: a driver that only pretends has no such memory
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import data
import train
from formats.config import config_json
from model import ModelConfig, Transformer
from run.flags import TrainConfig
from run.plan import peak_flops, step_flops

LENGTHS = (193, 289, 260)  # UltraFeedback's means: prompt, chosen, rejected
SMALL = ModelConfig(
    vocab_size=1000, dim=256, n_layers=3, n_heads=8, n_kv_heads=2, hidden_dim=512, head_dim=64
)

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # name: (config, pairs a step)
    "0.1B": (ModelConfig(32000, 768, 12, 12, 2048, max_seq_len=4096), 32),
    "1.1B": (ModelConfig(32000, 2048, 22, 32, 5632, n_kv_heads=4, max_seq_len=4096), 32),
    "6.7B": (ModelConfig(32000, 4096, 32, 32, 11008, max_seq_len=4096), 64),
}


class Variant(NamedTuple):
    shape: str
    name: str
    tokens: int  # of a micro-batch
    compiled: bool = False
    checkpointed: int = 0  # blocks


STAGES = {
    "speed": [
        Variant("0.1B", "eager", 16384),
        Variant("0.1B", "compiled", 16384, True),
        Variant("1.1B", "eager", 16384),
        Variant("1.1B", "compiled", 16384, True),
    ],
    "7b": [
        Variant("6.7B", "all blocks twice", 8192, False, 32),
        Variant("6.7B", "all twice, compiled", 8192, True, 32),
        Variant("6.7B", "none twice, compiled", 4096, True, 0),
    ],
}


def random_pairs(n: int, means: tuple[int, int, int], vocab_size: int, seed: int):
    """Pairs of random tokens with gamma-distributed lengths (shape 2) of these means."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.gamma(2, np.array(means) / 2, (n, 3)).astype(int), 2, 4 * max(means))
    return [data.Pair(*(rng.integers(0, vocab_size, k) for k in row)) for row in lengths]


# ---------------------------------------------------------------------------------------------
# check


def gradients(device: str, dtype: torch.dtype, varlen=True, tf32=False):
    """(loss, every parameter's gradient flattened) of SMALL on six fixed pairs, in float64."""
    torch.manual_seed(0)
    # float64 in, so that every variant starts from the same numbers
    model = Transformer(SMALL).double().to(device)
    if dtype != torch.float64:
        model, model.compute_dtype = model.float(), dtype
    pairs = random_pairs(6, (20, 30, 25), SMALL.vocab_size, seed=1)
    (batch,) = data.micro_batches(pairs, 10**9, "full")
    attention.USE_VARLEN = varlen
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        output = train.forward(model, batch, 0.5)
        output.loss.backward()
    finally:
        attention.USE_VARLEN = True
    flat = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])
    return output.loss.item(), flat


COMPARED = [  # name, arguments of gradients, largest relative error of the gradient
    ("cpu float32", ("cpu", torch.float32), 1e-5),
    ("cpu bfloat16", ("cpu", torch.bfloat16), 3e-2),
    ("cuda float64", ("cuda", torch.float64), 1e-6),  # rotary angles are float32 on both
    ("cuda float32", ("cuda", torch.float32), 1e-5),
    ("cuda float32, tf32", ("cuda", torch.float32, True, True), 5e-3),
    ("cuda bfloat16, varlen_attn", ("cuda", torch.bfloat16), 3e-2),
    ("cuda bfloat16, by segment", ("cuda", torch.bfloat16, False), 3e-2),
]


def compare() -> bool:
    """Prints the table; whether every row is within its bound."""
    loss, reference = gradients("cpu", torch.float64)
    ok = True
    print(f"{'against cpu float64':<28} {'loss':>10} {'gradient':>10} {'bound':>8}")
    for name, arguments, bound in COMPARED:
        if arguments[0] == "cuda" and not torch.cuda.is_available():
            continue
        value, grads = gradients(*arguments)
        error = ((grads - reference).norm() / reference.norm()).item()
        fine = error < bound
        ok &= fine
        verdict = "" if fine else "  TOO FAR"
        print(f"{name:<28} {abs(value / loss - 1):>10.1e} {error:>10.1e} {bound:>8.0e}{verdict}")
    return ok


# ---------------------------------------------------------------------------------------------
# speed, 7b


def make(variant: Variant, device: torch.device):
    """(model, optimizer, config, one step's pairs, its micro-batches)"""
    shape, n_pairs = SHAPES[variant.shape]
    torch.manual_seed(0)
    with device:
        model = Transformer(shape)
    model.compute_dtype, model.checkpointed_blocks = torch.bfloat16, variant.checkpointed
    for block in model.layers if variant.compiled else ():
        block.compile(dynamic=True)
    config = TrainConfig(dtype="bfloat16", lr=1e-5, micro_batch_tokens=variant.tokens)
    pairs = random_pairs(n_pairs, LENGTHS, shape.vocab_size, seed=2)
    optimizer = train.make_optimizer(model, config)
    return model, optimizer, config, pairs, train.pack(pairs, config)


def measure(variant: Variant, n_steps: int, device: torch.device) -> str:
    """One row: the median of the steps after three that warm up. MFU is of the operations that a
    step needs, without what is computed twice."""
    torch._dynamo.reset()  # graphs of another shape would be guarded against, and count as many
    torch.cuda.reset_peak_memory_stats()
    model, optimizer, config, pairs, batches = make(variant, device)
    seconds = []
    for i in range(3 + n_steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch._dynamo.config.error_on_recompile = i > 2
        train.training_step(model, optimizer, batches, config)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    torch._dynamo.config.error_on_recompile = False
    median = statistics.median(seconds[3:])
    rate = step_flops(model, pairs, config) / median
    peak = peak_flops(device, config)
    tokens = sum(pair.n_tokens for pair in pairs)
    memory = torch.cuda.max_memory_allocated() / 2**30
    return (
        f"{len(pairs) / median:>8.1f} {1000 * median:>9.0f} {tokens / median:>9.0f} "
        f"{rate / 1e12:>8.1f} {f'{rate / peak:.1%}' if peak else '?':>6} {memory:>6.1f} "
        f"{seconds[0]:>8.1f}"
    )


def speed(stage: str, n_steps: int, device: torch.device):
    heads = f"{'pairs/s':>8} {'ms a step':>9} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>6} {'GB':>6}"
    print(f"{'shape':<6} {'variant':<22} {'tokens':>6} {heads} {'first s':>8}")
    for variant in STAGES[stage]:
        try:
            row = measure(variant, n_steps, device)
        except torch.OutOfMemoryError:
            row = "out of memory"
        finally:
            torch._dynamo.config.error_on_recompile = False
            gc.collect()
            torch.cuda.empty_cache()
        print(f"{variant.shape:<6} {variant.name:<22} {variant.tokens:>6} {row}", flush=True)
    if stage == "7b":  # afterwards, as it takes the CPU a minute a row
        from bench import memory

        for variant in STAGES[stage]:
            row = memory.Row(variant.name, variant.checkpointed, variant.tokens)
            peak, _ = memory.count_apart(SHAPES[variant.shape][0], row)
            print(f"{variant.name:<29} counted, eager: {peak / 2**30:.1f} GB", flush=True)


# ---------------------------------------------------------------------------------------------
# trl


def measure_trl(name: str, way: str, n_steps: int, device) -> str:
    """TRL's row: pairs a second, and peak memory. Batches of 8 pairs, or 4 at 6.7B."""
    from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

    from tests.peers import trl_orpo

    cuda, (shape, n_pairs) = device.type == "cuda", SHAPES[name]
    pairs = [pair[:3] for pair in random_pairs(n_pairs, LENGTHS, shape.vocab_size, seed=2)]
    settings, batch = dict(TRL_WAYS[way]), 4 if name == "6.7B" else 8
    if way != "as installed":  # neighbours of one length: less padding
        pairs.sort(key=lambda pair: len(pair[0]) + max(len(pair[1]), len(pair[2])))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(config_json(shape)))
    moments = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        trainer = trl_orpo.make_trainer(
            model,
            pairs,
            out=out,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=n_pairs // batch,
            max_steps=2 + n_steps,
            learning_rate=1e-5,
            logging_steps=10**6,
            bf16=True,
            use_cpu=not cuda,
            **settings,
        )
        trainer.add_callback(Clock())
        trainer.train()
    median = statistics.median([b - a for a, b in itertools.pairwise(moments)][1:])
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return f"{n_pairs / median:>8.1f} {1000 * median:>9.0f} {memory:>6.1f}"


TRL_WAYS = {
    "as installed": {"gradient_checkpointing": True},
    "at its best": {"gradient_checkpointing": False},
    "with Liger": {"gradient_checkpointing": False, "use_liger_kernel": True},
}


def trl(n_steps: int, device: torch.device, shapes: list[str]):
    missing = [name for name in ("trl", "transformers", "datasets") if find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; TRL is not measured")
        return
    print(f"{'shape':<6} {'TRL':<14} {'pairs/s':>8} {'ms a step':>9} {'GB':>6}")
    for name, way in itertools.product(shapes, TRL_WAYS):
        if way == "with Liger" and find_spec("liger_kernel") is None:
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            row = measure_trl(name, way, n_steps, device)
        except (torch.OutOfMemoryError, ImportError) as error:
            row = f"{type(error).__name__}: {error}"[:80]
        finally:
            gc.collect()  # the trainer is in a cycle with its callbacks
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"{name:<6} {way:<14} {row}", flush=True)


# ---------------------------------------------------------------------------------------------
# profile

KINDS = {  # the first that a kernel's or an operation's name holds
    "attention": ("flash", "varlen", "fmha"),
    "products": ("gemm", "cutlass", "nvjet", "sm90", "mm", "cublas"),
    "optimizer": ("adam", "foreach", "norm_out", "multi_tensor"),
    "norms": ("rms_norm", "layer_norm", "rmsnorm", "layernorm"),
    "gathers": ("index", "gather", "scatter", "embedding"),
}


def kind_of(name: str) -> str:
    for kind, words in KINDS.items():
        if any(word in name.lower() for word in words):
            return kind
    return "elementwise"


def profile(variant: Variant, device: torch.device):
    """One step after three others: time by kind of kernel, and what the device was idle for."""
    model, optimizer, config, _, batches = make(variant, device)
    for _ in range(3):
        train.training_step(model, optimizer, batches, config)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        begin = time.perf_counter()
        train.training_step(model, optimizer, batches, config)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    times, kernels = dict.fromkeys([*KINDS, "elementwise"], 0.0), []
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[kind_of(event.name)] += event.device_time / 1e6
            kernels.append((event.name, event.device_time / 1e6))
    print(f"{variant.shape}, {variant.name}: {seconds:.3f} s a step, profiled")
    for kind, spent in [*times.items(), ("idle", seconds - sum(times.values()))]:
        print(f"{kind:<12} {1000 * spent:>9.1f} ms {spent / seconds:>6.1%}")
    totals = {}
    for name, spent in kernels:
        totals[name[:90]] = totals.get(name[:90], 0) + spent
    print("the ten kernels that take the most:")
    for name, spent in sorted(totals.items(), key=lambda item: -item[1])[:10]:
        print(f"{1000 * spent:>9.1f} ms {spent / seconds:>6.1%}  {name}")


PRODUCTS, ATTENTION, BYTES = 790e12, 350e12, 4.3e12  # a second, as seen on an H200 (assumed: 350)


class Traffic(TorchDispatchMode):
    """What the operations within it compute and move, by kind: each reads its tensors, and writes
    what it returns. A view costs nothing, and what fits a cache is counted as if it did not."""

    def __init__(self):
        super().__init__()
        self.seconds = dict.fromkeys([*KINDS, "elementwise"], 0.0)
        self.gigabytes = dict.fromkeys(self.seconds, 0.0)
        self.operations = {}  # name: calls, gigabytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name, is_view = function._schema.name, function.is_view
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        outputs = [x for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)]
        made = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::detach")
        if is_view or not inputs or name in made or name.startswith("prim::"):
            return out
        kind = kind_of(name.removeprefix("aten::").removeprefix("torch_attn::"))
        written = outputs or inputs  # without a result it is in place
        n_bytes = sum(x.nbytes for x in (*inputs, *written))
        if name in ("aten::index_select", "aten::embedding"):  # reads the rows that it takes
            n_bytes = 2 * sum(x.nbytes for x in outputs)
        seconds = n_bytes / BYTES
        if name in ("aten::mm", "aten::addmm"):
            a, b = [x for x in inputs if x.dim() == 2][-2:]
            seconds = max(seconds, 2 * a.shape[0] * a.shape[1] * b.shape[1] / PRODUCTS)
        self.seconds[kind] += seconds
        self.gigabytes[kind] += n_bytes / 1e9
        operation = self.operations.setdefault(name.removeprefix("aten::"), [0, 0.0])
        operation[0] += 1
        operation[1] += n_bytes / 1e9
        return out


def count_step(variant: Variant):
    """Prints what a step computes and moves, and the time that it takes at the rates above."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("cuda")
    torch.Tensor.pin_memory = lambda x: x  # tensors without content cannot be pinned
    shape, n_pairs = SHAPES[variant.shape]
    shape = dataclasses.replace(shape)  # a copy, which is changed below
    config = TrainConfig(dtype="bfloat16", micro_batch_tokens=variant.tokens)
    pairs = random_pairs(n_pairs, LENGTHS, shape.vocab_size, seed=2)
    batches = train.pack(pairs, config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            model = Transformer(shape)
        model.compute_dtype, model.checkpointed_blocks = torch.bfloat16, variant.checkpointed
        optimizer = train.make_optimizer(model, config)
        train.training_step(model, optimizer, batches[:1], config)  # makes Adam's moments
        with Traffic() as traffic:
            train.training_step(model, optimizer, batches, config)
        needed = step_flops(model, pairs, config)
        model.config.head_dim = 0  # what is left of the operations is without attention
        attention = needed - step_flops(model, pairs, config)
    # Of attention's three parts the forward pass is one. Where blocks run twice it comes again, and
    # the backward pass of a Flash kernel computes the scores again, half a forward pass.
    attention *= 3.5 / 3 + variant.checkpointed / shape.n_layers / 3
    traffic.seconds["attention"] = attention / ATTENTION
    total = sum(traffic.seconds.values())
    print(f"{variant.shape}, {variant.name}, micro-batches of {variant.tokens}: counted, eager")
    for kind, seconds in traffic.seconds.items():
        moved = traffic.gigabytes[kind]
        print(f"{kind:<12} {moved:>9.0f} GB {1000 * seconds:>9.1f} ms {seconds / total:>6.1%}")
    print("the ten operations that move the most:")
    for name, (n, moved) in sorted(traffic.operations.items(), key=lambda x: -x[1][1])[:10]:
        print(f"{name:<32} {n:>6} times {moved:>9.0f} GB {1000 * moved * 1e9 / BYTES:>9.1f} ms")
    mfu = needed / total / 989e12
    print(f"{'together':<12} {'':>12} {1000 * total:>9.1f} ms, MFU at most {mfu:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("check", "speed", "7b", "trl", "profile"))
    parser.add_argument("--steps", type=int, default=6, help="after those that warm up")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of trl")
    parser.add_argument("--count", action="store_true", help="profile: without a card, count")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else platform.machine()}"
    )
    if args.stage == "check":
        sys.exit(0 if compare() else 1)
    if args.stage == "trl":
        return trl(args.steps, device, args.shapes)
    if not cuda:
        sys.exit(f"gpu.py: {args.stage} needs a CUDA device")
    if args.stage != "profile":
        return speed(args.stage, args.steps, device)
    for variant in STAGES["7b"][:1] if not args.count else [*STAGES["7b"], *STAGES["speed"][2:3]]:
        count_step(variant) if args.count else profile(variant, device)


if __name__ == "__main__":
    main()
