"""Is the CUDA path right, and how fast is it? `bench/gpu.sh` runs this and the CUDA tests.

The comparison: one micro-batch through one random model, loss and every gradient, on each device
and in each dtype, against float64 on the CPU. Without CUDA only the CPU's rows are shown.
The speed table: whole training steps on random weights of real shapes, UltraFeedback-like lengths.
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
from train import forward

SMALL = ModelConfig(
    vocab_size=1000, dim=256, n_layers=3, n_heads=8, n_kv_heads=2, hidden_dim=512, head_dim=64
)
SHAPES = {
    "0.1B": ModelConfig(32000, 768, 12, 12, 2048, max_seq_len=4096),
    "1.1B": ModelConfig(32000, 2048, 22, 32, 5632, n_kv_heads=4, max_seq_len=4096),
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


def needed_flops(config: ModelConfig, pairs: list[data.Pair]) -> float:
    """Operations that a training step needs: 2 a weight a token forward, twice that backward;
    attention 4 H d a (query, key) forward, over the causal part; lm_head at predictions only."""
    c, total = config, 0
    heads = (c.n_heads + c.n_kv_heads) * 2 * c.head_dim  # q and o, k and v
    block = c.dim * heads + 3 * c.dim * c.hidden_dim
    for p, m, r in (pair.lengths for pair in pairs):
        seen = (p + m) * (p + m + 1) / 2 + r * (r + 1) / 2 + p * r
        total += c.n_layers * (6 * (p + m + r) * block + 12 * seen * c.n_heads * c.head_dim)
        total += 6 * (m + r) * c.vocab_size * c.dim
    return total


def speed(device: torch.device, steps: int):
    print(
        f"\n{'shape':<6} {'pairs':>6} {'ms a step':>10} {'tokens/s':>10} {'TFLOP/s':>8} {'GB':>6}"
    )
    for name, config in SHAPES.items():
        torch.manual_seed(0)
        with device:
            model = Transformer(config)
        model.compute_dtype = torch.bfloat16
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        pairs = random_pairs(16, (193, 289, 260), config.vocab_size, seed=2)
        seconds = []
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for batch in data.micro_batches(pairs, 8192, "response"):
                forward(model, batch, 0.1, len(pairs), device).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[2:])
        n = sum(pair.n_tokens for pair in pairs)
        rate = needed_flops(config, pairs) / median / 1e12
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{name:<6} {len(pairs):>6} {1000 * median:>10.1f} {n / median:>10.0f} "
            f"{rate:>8.1f} {memory:>6.1f}"
        )
        del model, optimizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else platform.machine()}"
    )
    ok = compare()
    if cuda:
        speed(torch.device("cuda"), args.steps)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
