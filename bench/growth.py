"""How a training step's time and memory grow: with response length, vocabulary, pairs a step.

    python -m bench.growth [--dtype float32|bfloat16] [--trl] [--out FILE.svg]
    python -m bench.growth --loss        the loss by itself, for responses of up to 32,768 tokens

Every point is a process of its own, for its peak memory. The base is one pair, a prompt of 64
tokens, responses of 256, a vocabulary of 32,000; one of the three grows at a time. Draws a log-log
plot with the fitted exponents and prints the points (needs matplotlib, requirements-dev.txt).
--trl adds TRL's ORPOTrainer, without recomputation (needs requirements-peers.txt).
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench import peers, step
from bench.peers import VARIANTS, Worker
from orpo import fused_linear_orpo
from run.plan import peak_memory_gb
from tools.report import head

SWEEPS = {  # what grows: its name, its values
    "response": ("tokens of each response", (256, 512, 1024, 2048, 4096, 8192)),
    "vocab_size": ("vocabulary", (32000, 128000, 152000)),
    "n_pairs": ("pairs a step", (1, 2, 4, 8, 16)),
}
BASE = {"response": 256, "vocab_size": 32000, "n_pairs": 1}
PROMPT = 64
TRL_LIMIT = 2048  # tokens of a response: above, its logits and their gradients are tens of GB
LOSS_VOCABULARY, LOSS_WIDTH, LOSS_LENGTHS = 150_000, 64, (1000, 3000, 6000, 12_000, 32_768)
GREY, COLOURS = "#808080", {"ours": "#2a9d5c", "plain": "#d1495b"}


def measure(name: str, dtype: str, response: int, vocab_size: int, n_pairs: int):
    """(ms a step, peak GB above the imports): one step to warm up, then up to three in 10 s."""
    rng, lengths = np.random.default_rng(0), (PROMPT, response, response)
    pairs = [[rng.integers(3, vocab_size, n).tolist() for n in lengths] for _ in range(4 * n_pairs)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.json")
        file.write_text(json.dumps(pairs))
        step.save_random_model(folder, dataclasses.replace(step.SHAPE, vocab_size=vocab_size))
        arguments = ["--model", folder, "--pairs", file, "--batch-size", n_pairs, "--dtype", dtype]
        worker = Worker(VARIANTS[name], [str(x) for x in arguments])
        try:
            worker.hear()
            worker.ask("step")
            seconds = [worker.ask("step")["seconds"]]
            while len(seconds) < 3 and sum(seconds) < 10:
                seconds.append(worker.ask("step")["seconds"])
            memory = worker.ask("memory")
        finally:
            worker.stop()
    return 1000 * statistics.median(seconds), memory["peak"] - memory["imported"]


def loss_peak(response: int) -> tuple[float, float]:
    """(GB at the peak above what is there before, seconds) of the fused loss of one pair."""
    hidden = torch.randn(2 * response, LOSS_WIDTH, requires_grad=True)
    lm_head = torch.randn(LOSS_VOCABULARY, LOSS_WIDTH, requires_grad=True)
    which = torch.arange(2).repeat_interleave(response)
    weight, before = torch.ones(2 * response) / response, peak_memory_gb(hidden.device)
    begin = time.perf_counter()
    output = fused_linear_orpo(hidden, lm_head, torch.zeros_like(which), which, weight, 0.1, 1)
    output.loss.backward()
    return peak_memory_gb(hidden.device) - before, time.perf_counter() - begin


def print_losses():
    """Each length in a process of its own, for its peak."""
    print(f"the loss of one pair, vocabulary {LOSS_VOCABULARY:,}, width {LOSS_WIDTH}, float32")
    for response in LOSS_LENGTHS:
        with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds = pool.apply(loss_peak, (response,))
        print(f"{response:>7,} tokens a response: {peak:.2f} GB, {seconds:.1f} s", flush=True)


def exponent(xs, ys) -> float:
    """The slope of the least-squares line through the points' logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def draw(found: dict, file: Path):
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    matplotlib.rcParams |= {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
        **{"axes.edgecolor": GREY, "grid.color": GREY, "grid.alpha": 0.25, "axes.grid": True},
        **{
            "svg.hashsalt": "orpo",
            "svg.fonttype": "none",
            "font.size": 10,
            "axes.spines.top": False,
        },
        **{"axes.spines.right": False},
    }
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained", sharey="row")
    for column, (what, (label, _)) in zip(axes.T, SWEEPS.items(), strict=True):
        for (name, swept), points in found.items():
            if swept != what:
                continue
            xs, *rows = zip(*points, strict=True)
            for ax, ys in zip(column, rows, strict=True):
                text = f"{VARIANTS[name].name}: exponent {exponent(xs, ys):.2f}"
                ax.loglog(xs, ys, "o-", color=COLOURS[name], label=text, lw=1.8, ms=4)
                ax.legend(frameon=False, fontsize=8)
                values = SWEEPS[what][1]  # less what would stand on its neighbour's label
                ax.set_xticks([x for x in values if not any(x < y < 1.5 * x for y in values)])
                ax.xaxis.set_major_formatter(
                    lambda x, _: f"{x / 1000:.0f}k" if x > 9999 else f"{x:.0f}"
                )
                ax.xaxis.set_minor_formatter(NullFormatter())
        column[1].set_xlabel(label)
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("peak GB above the imports")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, transparent=True, metadata={"Date": None} if file.suffix == ".svg" else {})


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=peers.TOLERANCE, default="float32")
    parser.add_argument("--only", choices=SWEEPS, nargs="+", default=list(SWEEPS))
    parser.add_argument("--loss", action="store_true", help="the loss by itself")
    parser.add_argument("--trl", action="store_true", help="TRL beside ours")
    parser.add_argument("--out", type=Path, default=peers.results_file("growth", "svg"))
    args = parser.parse_args()
    if args.out.suffix not in (".svg", ".png"):
        parser.error(f"--out {args.out}: its name must end in .svg or .png")
    print(head(os.cpu_count()))
    if args.loss:
        return print_losses()
    found, known = {}, {}
    try:
        for name in ("ours", "plain")[: 1 + args.trl]:
            for what in args.only:
                rows = []
                for x in SWEEPS[what][1]:
                    point = BASE | {what: x}
                    key = name, *point.values()
                    if name != "ours" and point["response"] > TRL_LIMIT:
                        continue
                    if key not in known:  # the base is in all three
                        known[key] = measure(name, args.dtype, **point)
                    rows.append((x, *known[key]))
                    ms, memory = known[key]
                    print(
                        f"{name:<6} {what:<10} {x:>7} {ms:>9.0f} ms {memory:>6.2f} GB", flush=True
                    )
                found[name, what] = rows
                xs, ms, memory = zip(*rows, strict=True)
                print(f"exponents: time {exponent(xs, ms):.2f}, memory {exponent(xs, memory):.2f}")
        draw(found, args.out)
    except (OSError, RuntimeError) as error:
        print(f"growth.py: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
