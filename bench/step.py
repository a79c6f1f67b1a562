"""Whole optimizer steps of train.py on random weights and random pairs: time, share of the
machine's own matrix-product rate, memory.

    python -m bench.step [--set short|long] [--dtype float32|bfloat16] [--steps N] [--threads N]
                         [--profile]                       which operations take the time
    torchrun --nproc-per-node N -m bench.step --threads 1 ...      the same steps over N processes

A step is what train.py does between two rows of metrics: packing, forward, backward, clipping at
1.0, AdamW, `--sft-loss full`, lam 0.1, float32 master weights. The model is a Llama of 6 layers,
width 384 and a vocabulary of 32,000, tied. No two steps have the same pairs, as in training.

bench/peers.py starts this file with --serve and steps it in turn with other people's code.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
import train
from model import ModelConfig, Transformer
from run.plan import Plan
from run.processes import pick_device, rank, world_size

SHAPE = ModelConfig(32000, 384, 6, 6, 1024, tie_embeddings=True, max_seq_len=16384)
LAM, LR = 0.1, 1e-4
PAIRS_A_STEP = {"short": 8, "long": 2}


def make_pairs(name: str, n_steps: int, vocab_size: int = SHAPE.vocab_size, seed: int = 0):
    """n_steps steps of `name` pairs, as one list, the same every time.

    short: lengths distributed as the politeness pairs' under Llama 2's tokenizer: log-normal, the
    two responses correlated; means 15, 18 and 18 tokens. long: prompts about 200, responses 350.
    """
    rng = np.random.default_rng(seed)
    prompt, ours, theirs, both = rng.standard_normal((n_steps * PAIRS_A_STEP[name], 4)).T
    chosen, rejected = (math.sqrt(0.62) * both + math.sqrt(0.38) * x for x in (ours, theirs))
    if name == "short":
        lengths = np.exp([2.656 + 0.329 * prompt, 2.759 + 0.5 * chosen, 2.752 + 0.5 * rejected])
    else:
        lengths = np.array([200 + 40 * prompt, 350 + 70 * chosen, 350 + 70 * rejected])
    lengths = lengths.round().astype(int).clip(2).T
    return [data.Pair(*(rng.integers(3, vocab_size, n) for n in row)) for row in lengths]


def n_predicted(pairs: list[data.Pair]) -> int:
    """Predictions that carry weight under --sft-loss full."""
    return sum(p - 1 + c + r for p, c, r in (pair.lengths for pair in pairs))


def needed_flops(model: Transformer, pairs: list[data.Pair]) -> int:
    return model.training_flops([pair.lengths for pair in pairs], n_predicted(pairs))


def padded_flops(model: Transformer, pairs: list[data.Pair]) -> int:
    """The same where each response has its own prompt, lm_head runs everywhere, and all sequences
    are padded to the longest; nothing is computed again in the backward pass."""
    longest = max(p + max(c, r) for p, c, r in (pair.lengths for pair in pairs))
    sequences = [(0, longest, 0)] * 2 * len(pairs)
    return model.training_flops(sequences, longest * len(sequences))


def start(folder, dtype: str, steps: list[list[data.Pair]]):
    """(model, optimizer, config) as train.py has them before step 1: the largest step has
    been tried."""
    config = train.TrainConfig(
        lam=LAM, sft_loss="full", lr=LR, grad_clip=1.0, device="cpu", dtype=dtype
    )
    device = pick_device(config)  # which also tells malloc to keep what it has
    model = Transformer.from_pretrained(folder, device=device, dtype=torch.float32)
    model.compute_dtype = getattr(torch, dtype)
    optimizer = train.make_optimizer(model, config)
    shares = [s for pairs in steps for s in data.balance_over_ranks(pairs, world_size())]
    largest = max(shares, key=lambda pairs: sum(pair.n_tokens for pair in pairs))
    plan = Plan(len(steps), len(steps), largest, False)
    train.try_largest(model, optimizer, plan, config)
    return model, optimizer, config


def save_random_model(folder, shape: ModelConfig = SHAPE, seed: int = 0):
    torch.manual_seed(seed)
    Transformer(shape).save_pretrained(folder)


def product_rate(dtype: torch.dtype, n: int = 1024, seconds: float = 0.25) -> float:
    """Operations a second of (n, n, n) matrix products, sustained, nothing allocated.

    1,024 was the fastest of 512 to 4,096 and of lm_head's own shape where this was written.
    """
    a, b = torch.randn(2, n, n).to(dtype)
    out = torch.empty(n, n, dtype=dtype)
    torch.mm(a, b, out=out)
    done, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds:
        torch.mm(a, b, out=out)
        done += 2 * n**3
    return done / taken


def memory_gb(field: str = "VmHWM") -> float:
    """GB (2^30) of this process, from the system: VmHWM the peak, VmRSS now.

    Not ru_maxrss: that starts with the peak of the process from which this one was forked.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**20
    raise OSError(f"/proc/self/status has no {field}")


# ---------------------------------------------------------------------------------------------
# One of several processes that compute in turn. A line of JSON in, a line of JSON out.


class Turns:
    """`wait` returns when a step is asked for; `done` reports it. Other questions `wait` answers.

    Make it before anything can print: standard output then becomes standard error for all others.
    """

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.imported = memory_gb()

    def say(self, **answer):
        print(json.dumps(answer), file=self.out)

    def ready(self, **facts):
        self.say(**facts)

    def wait(self):
        for line in sys.stdin:
            question = json.loads(line)
            if question == "step":
                self.begin = time.perf_counter()
                return
            if question == "memory":
                self.say(peak=memory_gb(), imported=self.imported)
            else:
                self.say(rate=product_rate(getattr(torch, question["rate"])))
        sys.exit()

    def done(self, loss):
        seconds = time.perf_counter() - self.begin
        self.say(seconds=seconds, loss=float(loss))


def serve(args):
    """Ours. Each step takes the next pairs of the file."""
    turns = Turns()
    pairs = [data.Pair(*map(np.array, pair)) for pair in json.loads(args.pairs.read_text())]
    steps = [pairs[i : i + args.batch_size] for i in range(0, len(pairs), args.batch_size)]
    model, optimizer, config = start(args.model, args.dtype, steps)
    flops, padded = ([f(model, step) for step in steps] for f in (needed_flops, padded_flops))
    turns.ready(flops=flops, padded=padded)
    for step in steps:
        turns.wait()
        outputs, _ = train.training_step(model, optimizer, train.pack(step, config), config)
        turns.done(sum(output.loss.detach() for output in outputs))
    turns.wait()


def measure(args):
    """The card: warm up, then steps and matrix products in turn."""
    pairs, size, rows = make_pairs(args.set, args.steps + 3), PAIRS_A_STEP[args.set], []
    steps = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder)
        model, optimizer, config = start(folder, args.dtype, steps)
    for step in steps:
        begin = time.perf_counter()
        train.training_step(model, optimizer, train.pack(step, config), config)
        seconds = time.perf_counter() - begin
        rate = product_rate(model.compute_dtype)
        tokens = sum(pair.n_tokens for pair in step)
        rows.append((seconds, tokens / seconds, needed_flops(model, step) / seconds / rate, rate))
    if args.profile:
        with torch.profiler.profile() as profile:
            for step in steps[3:]:
                train.training_step(model, optimizer, train.pack(step, config), config)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
    seconds, speed, share, rate = (statistics.median(c) for c in zip(*rows[3:], strict=True))
    result = {
        **{"set": args.set, "dtype": args.dtype, "threads": torch.get_num_threads()},
        **{"ms_a_step": 1000 * seconds, "tokens_per_second": speed},
        **{"product_gflops": rate / 1e9, "share_of_product_rate": share},
        "peak_gb": memory_gb(),
        **{"torch": torch.__version__, "machine": platform.machine()},
    }
    if rank() == 0:
        result["processes"] = world_size()
        for name, value in result.items():
            print(f"{name:<22} {value:.4g}" if isinstance(value, float) else f"{name:<22} {value}")
        print(json.dumps(result))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n\n")[0])
    parser.add_argument("--set", choices=PAIRS_A_STEP, default="short", help="of pairs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=positive, default=20, help="after three to warm up")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--profile", action="store_true", help="then the same steps, profiled")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=positive, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    serve(args) if args.serve else measure(args)


if __name__ == "__main__":
    main()
