"""A real model on real pairs, trained by this program and by TRL: quality, time and memory.

    python -m bench.real MODEL TRAIN.jsonl EVAL.jsonl [--dtype float32|bfloat16] [--steps N]
                         [--batch-size N] [--eval-pairs N] [--seeds N [N ...]] [--out FILE.md]

Both programs get the same token ids, in the same order, with the same loss (`--sft-loss full`),
learning rate (constant), clipping and AdamW, and each step is one micro-batch, on which TRL's
gradient is that of the step. TRL runs as it is fastest here: without recomputation, and glibc keeps
its buffers for both programs. Each run has a process of its own, and nothing runs beside it. What
was trained is written as a model folder, and this program's evaluation measures all of them on the
same held-out pairs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import data
import train
from bench.step import memory_gb, positive
from model import Transformer
from run.flags import TrainConfig, page_parser
from run.processes import keep_freed_memory, pick_device
from tools.report import head, table, write

LIMITS = 512, 256  # tokens of a pair's longer sequence, of its prompt
METRICS = ("rewards/accuracies", "log_odds_chosen", "logps/chosen", "logps/rejected")


def config_of(args) -> TrainConfig:
    return TrainConfig(
        model=str(args.model),
        device="cpu",
        dtype=args.dtype,
        lam=args.lam,
        lr=args.lr,
        lr_schedule="constant",
        warmup_steps=0,
        sft_loss="full",
        batch_size=args.batch_size,
        micro_batch_tokens=10**9,
        seed=args.seed or 0,
    )


def pairs_of(file: Path, tokenizer, n: int) -> list[data.Pair]:
    """The first n pairs of a file that fit LIMITS; the others are dropped."""
    rows = data.load_preferences(file)
    return data.encode_pairs(tokenizer, rows, *LIMITS)[0][:n]


def training_steps(args) -> list[list[data.Pair]]:
    tokenizer = data.load_tokenizer(args.model)
    pairs = pairs_of(args.train, tokenizer, args.steps * args.batch_size)
    steps = range(1, args.steps + 1)
    return [data.step_pairs(pairs, step, args.batch_size, args.seed) for step in steps]


# ---------------------------------------------------------------------------------------------
# The two programs, each in its own process: a folder, and the seconds of each step.


def ours(args, folder: Path) -> list[float]:
    config = config_of(args)
    pick_device(config)
    model, seconds = train.load_model(config), []
    optimizer = train.make_optimizer(model, config)
    for pairs in training_steps(args):
        start = time.perf_counter()
        train.training_step(model, optimizer, train.pack(pairs, config), config)
        seconds.append(time.perf_counter() - start)
    model.save_pretrained(folder)
    return seconds


def trl(args, folder: Path) -> list[float]:
    from transformers import AutoModelForCausalLM, TrainerCallback

    from tests.peers import trl_orpo

    keep_freed_memory()
    marks = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            marks[-1] = time.perf_counter() - marks[-1]

    pairs = [tuple(map(list, pair[:3])) for step in training_steps(args) for pair in step]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        trainer = trl_orpo.make_trainer(
            model,
            pairs,
            out=out,
            bf16=args.dtype == "bfloat16",
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps,
            learning_rate=args.lr,
            beta=args.lam,
            lr_scheduler_type="constant",
            logging_steps=500,
        )
        trainer.add_callback(Clock())
        trainer.train()
    model.save_pretrained(folder)
    return marks


def serve(args):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = {"ours": ours, "TRL": trl}[args.serve](args, folder)
        print(json.dumps([*seconds, memory_gb()]))
        sys.stdout.flush()
        evaluate(args, folder)


def evaluate(args, folder: Path):
    """Prints the metrics of a model folder on the held-out pairs, as one JSON object."""
    pairs = pairs_of(args.eval, data.load_tokenizer(args.model), args.eval_pairs)
    config = config_of(args)
    pick_device(config)
    config.micro_batch_tokens = 2048
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    model.compute_dtype = getattr(torch, args.dtype)
    print(json.dumps(train.evaluate(model, pairs, config)))


# ---------------------------------------------------------------------------------------------


def run(arguments: list[str], *more: str) -> list:
    """What a process prints, as JSON lines."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "bench.real", *arguments, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(more)} ended early:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]


def report(args, base: dict, runs: dict[tuple[str, int], tuple[list, dict]]) -> str:
    """One table: a column for the untrained model and for each run."""
    tokens = {
        seed: sum(pair.n_tokens for step in steps for pair in step) / args.steps
        for seed in args.seeds
        if (steps := training_steps(argparse.Namespace(**vars(args) | {"seed": seed})))
    }
    rows = [["", "before", *(f"{name}, seed {seed}" for name, seed in runs)]]
    for name in METRICS:
        values = [base, *(metrics for _, metrics in runs.values())]
        rows.append([f"held out: {name}", *(f"{v['eval_' + name]:.3f}" for v in values)])
    times = {key: statistics.median(seconds[1:-1]) for key, (seconds, _) in runs.items()}
    rows.append(["seconds a step, median", "", *(f"{times[key]:.2f}" for key in runs)])
    rows.append(["tokens a second", "", *(f"{tokens[key[1]] / times[key]:.0f}" for key in runs)])
    rows.append(["peak memory, GB", "", *(f"{s[-1]:.1f}" for s, _ in runs.values())])
    ratios = [times["TRL", seed] / times["ours", seed] for seed in args.seeds]
    text = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    about = (
        f"{args.model.name}, {args.dtype}: {args.steps} steps of {args.batch_size} pairs, lam "
        f"{args.lam}, learning rate {args.lr:g}; {args.eval_pairs} held-out pairs. The first step "
        "of each run is not counted in its time. Tokens count each prompt once."
    )
    return f"{about}\n\n{table(rows)}\nTRL's time over ours, a seed each: {text}\n"


def main():
    parser = page_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=positive, default=12)
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--eval-pairs", type=positive, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--lam", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--serve", choices=("ours", "TRL", "base"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve == "base":
        return evaluate(args, args.model)
    if args.serve:
        return serve(args)
    arguments = sys.argv[1:]
    (base,) = run(arguments, "--serve", "base")
    runs = {}
    for seed in args.seeds:
        for name in ("ours", "TRL"):
            runs[name, seed] = tuple(run(arguments, "--serve", name, "--seed", str(seed)))
            print(f"{name}, seed {seed}: {runs[name, seed][1]}", file=sys.stderr, flush=True)
    text = f"{head(os.cpu_count())}\n{report(args, base, runs)}"
    for path in (args.model, args.train, args.eval, args.out):
        text = text.replace(str(path), path.name) if path else text
    print(text)
    if args.out:
        write(text, args.out)


if __name__ == "__main__":
    main()
