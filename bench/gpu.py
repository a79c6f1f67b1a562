"""Is the CUDA path right, and how fast is it? `bench/gpu.sh` runs this and the CUDA tests.

The comparison: one micro-batch through one random model, loss and every gradient, on each device
and in each dtype, against float64 on the CPU. Without CUDA only the CPU's rows are shown.
The speed table: whole training steps on random weights of real shapes, UltraFeedback-like lengths,
plain, compiled, with activation checkpointing; MFU, and peak memory beside train.py's estimate.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import model as model_module
from model import ModelConfig, Transformer
from train import (
    TrainConfig,
    estimate_memory,
    forward,
    make_optimizer,
    peak_flops,
    step_flops,
    training_step,
)

SMALL = ModelConfig(
    vocab_size=1000, dim=256, n_layers=3, n_heads=8, n_kv_heads=2, hidden_dim=512, head_dim=64
)
SHAPES = {  # name: (config, pairs a step, micro-batch tokens)
    "0.1B": (ModelConfig(32000, 768, 12, 12, 2048, max_seq_len=4096), 32, 16384),
    "1.1B": (ModelConfig(32000, 2048, 22, 32, 5632, n_kv_heads=4, max_seq_len=4096), 32, 16384),
    "6.7B": (ModelConfig(32000, 4096, 32, 32, 11008, max_seq_len=4096), 16, 8192),
}
VARIANTS_OF_A_STEP = {  # name: settings of TrainConfig, and the shapes that have the memory
    "plain": ({}, ("0.1B", "1.1B")),
    "compiled": ({"compile": True}, ("0.1B", "1.1B")),
    "checkpointed": ({"activation_checkpointing": True}, ("1.1B", "6.7B")),
    "both": ({"activation_checkpointing": True, "compile": True}, ("6.7B",)),
}


def random_pairs(n: int, means: tuple[int, int, int], vocab_size: int, seed: int):
    """Pairs of random tokens with gamma-distributed lengths (shape 2) of these means."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.gamma(2, np.array(means) / 2, (n, 3)).astype(int), 2, 4 * max(means))
    return [data.Pair(*(rng.integers(0, vocab_size, k).tolist() for k in row)) for row in lengths]


def gradients(device: str, dtype: torch.dtype, varlen=True, tf32=False):
    """(loss, every parameter's gradient flattened) of SMALL on six fixed pairs, in float64."""
    torch.manual_seed(0)
    # float64 in, so that every variant starts from the same numbers
    model = Transformer(SMALL).double().to(device)
    if dtype != torch.float64:
        model, model.compute_dtype = model.float(), dtype
    pairs = random_pairs(6, (20, 30, 25), SMALL.vocab_size, seed=1)
    (batch,) = data.micro_batches(pairs, 10**9, "full")
    model_module.USE_VARLEN = varlen
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        output = forward(model, batch, 0.5, len(pairs), torch.device(device))
        output.loss.backward()
    finally:
        model_module.USE_VARLEN = True
    flat = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])
    return output.loss.item(), flat


VARIANTS = [  # name, arguments of gradients, largest relative error of the gradient
    ("cpu float32", ("cpu", torch.float32), 1e-5),
    ("cpu bfloat16", ("cpu", torch.bfloat16), 3e-2),
    ("cuda float64", ("cuda", torch.float64), 1e-9),
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
    for name, arguments, bound in VARIANTS:
        if arguments[0] == "cuda" and not torch.cuda.is_available():
            continue
        value, grads = gradients(*arguments)
        error = ((grads - reference).norm() / reference.norm()).item()
        fine = error < bound
        ok &= fine
        verdict = "" if fine else "  TOO FAR"
        print(f"{name:<28} {abs(value / loss - 1):>10.1e} {error:>10.1e} {bound:>8.0e}{verdict}")
    return ok


def speed(device: torch.device, steps: int, shapes: list[str]):
    """Whole steps by train.training_step; MFU is of the needed operations (training_flops)."""
    columns = f"{'shape':<6} {'variant':<13} {'pairs':>6} {'ms a step':>10} {'pairs/s':>8}"
    print(f"\n{columns} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>5} {'GB':>6} {'estimate':>9}")
    for name in shapes:
        model_config, n_pairs, budget = SHAPES[name]
        torch.manual_seed(0)
        with device:
            model = Transformer(model_config)
        model.compute_dtype = torch.bfloat16
        pairs = random_pairs(n_pairs, (193, 289, 260), model_config.vocab_size, seed=2)
        for variant, (settings, fits) in VARIANTS_OF_A_STEP.items():
            if name not in fits:
                continue
            config = TrainConfig(dtype="bfloat16", lr=1e-5, micro_batch_tokens=budget, **settings)
            model.activation_checkpointing = config.activation_checkpointing
            for block in model.layers:
                block._compiled_call_impl = None
                if config.compile:
                    block.compile(dynamic=True)
            optimizer = make_optimizer(model, config)
            seconds = []
            torch.cuda.reset_peak_memory_stats()
            try:
                for i in range(steps):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    torch._dynamo.config.error_on_recompile = i > 2
                    training_step(model, optimizer, pairs, config, device)
                    torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - start)
            except torch.OutOfMemoryError:
                print(f"{name:<6} {variant:<13} out of memory")
                continue
            finally:
                torch._dynamo.config.error_on_recompile = False
                del optimizer
                model.zero_grad(set_to_none=True)
            median = statistics.median(seconds[min(3, steps - 1) :])
            rate = step_flops(model, pairs, config) / median
            peak = peak_flops(config, device)
            parts = data.cut(pairs, budget)
            largest = max(parts, key=lambda part: sum(pair.n_tokens for pair in part))
            estimate = estimate_memory(model, largest, len(parts) > 1, config.sft_loss)
            mfu = f"{rate / peak:.0%}" if peak else "?"
            tokens = sum(pair.n_tokens for pair in pairs)
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"{name:<6} {variant:<13} {n_pairs:>6} {1000 * median:>10.1f} "
                f"{n_pairs / median:>8.1f} {tokens / median:>9.0f} {rate / 1e12:>8.1f} {mfu:>5} "
                f"{memory:>6.1f} {estimate / 2**30:>9.1f}",
                flush=True,
            )
        del model
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else platform.machine()}"
    )
    ok = compare()
    if cuda:
        speed(torch.device("cuda"), args.steps, args.shapes)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
