"""ORPO on a real checkpoint and real pairs: TRL's ORPOTrainer beside train.py, same settings.

    python -m tests.peers.politeness split PAIRS.jsonl FOLDER
        writes FOLDER/train.jsonl (900 pairs) and FOLDER/eval.jsonl (the rest); needs no peer
    python -m tests.peers.politeness compare --model DIR --data PAIRS.jsonl --out FOLDER
        splits, runs each side in a process of its own, prints one table
    python -m tests.peers.politeness trl --model DIR --data FILE --eval-data FILE --out DIR
        TRL alone, with metrics.jsonl as train.py writes it

Both sides get the same token ids (ours), the same pairs (equal answers dropped, as the paper
does), float32, the same AdamW, learning rates, clipping and number of steps. They differ in the
order of the pairs. TRL's SFT term covers prompt and chosen, so `--sft-loss full` is its like; the
default, the paper's formula, stands beside it.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def split(lines: list[str], n_train: int = 900, seed: int = 0) -> tuple[list[str], list[str]]:
    """JSON lines -> (train, eval): the same every time, and a prompt stays on one side."""
    by_prompt = {}
    for line in lines:
        by_prompt.setdefault(json.loads(line)["prompt"], []).append(line)
    groups = list(by_prompt.values())
    random.Random(seed).shuffle(groups)
    train, held_out = [], []
    for group in groups:
        fits = len(train) + len(group) <= n_train
        (train if fits else held_out).extend(group)
    return train, held_out


def write_split(source: Path, folder: Path, n_train: int) -> tuple[Path, Path]:
    lines = source.read_text(encoding="utf-8").splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, part in zip(paths, split(lines, n_train), strict=True):
        path.write_text("".join(line + "\n" for line in part), encoding="utf-8")
        print(f"{path}: {len(part)} pairs")
    return paths


def encode(model: Path, path: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """The rows as train.py would see them: (prompt ids, chosen ids, rejected ids)."""
    import data

    tokenizer = data.load_tokenizer(model)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        (
            tokenizer.encode(row["prompt"], bos=True),
            tokenizer.encode(row["chosen"], eos=True, continuation=True),
            tokenizer.encode(row["rejected"], eos=True, continuation=True),
        )
        for row in rows
        if row["chosen"] != row["rejected"]
    ]


def run_trl(args) -> None:
    from tests.peers import trl_orpo

    rows, _, seconds = trl_orpo.run_trl(
        args.model,
        encode(args.model, args.data),
        encode(args.model, args.eval_data),
        batch_size=args.batch_size,
        epochs=args.epochs,
        lr=args.lr,
        lam=args.lam,
        lr_schedule=args.lr_schedule,
        warmup_steps=args.warmup_steps,
        seed=args.seed,
        in_given_order=False,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "metrics.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    print(f"trained in {seconds:.1f} s")


def settings(args) -> list[str]:
    """The flags that both sides take, spelled the same."""
    return [
        *("--lr", str(args.lr), "--lam", str(args.lam), "--lr-schedule", args.lr_schedule),
        *("--warmup-steps", str(args.warmup_steps), "--epochs", str(args.epochs)),
        *("--batch-size", str(args.batch_size), "--seed", str(args.seed)),
    ]


def timed(command: list[str], out: Path) -> dict:
    """Run one side. Its evaluations, and the seconds of the whole command, imports and all."""

    def cpu_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start, cpu_start = time.perf_counter(), cpu_seconds()
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if "eval_rewards/accuracies" in row]
    steps = max(row["step"] for row in rows)
    return {
        "before": evals[0],
        "after": evals[-1],
        "steps": str(steps),
        "seconds": f"{seconds:.1f}",
        "cpu": f"{cpu:.1f}",
    }


def compare(args) -> None:
    train, held_out = write_split(args.data, args.out, args.n_train)
    common = ["--model", args.model, "--data", train, "--eval-data", held_out, *settings(args)]
    ours = [sys.executable, ROOT / "train.py", *common, "--device", "cpu", "--sft-loss"]
    runs = {
        "TRL": ("trl", [sys.executable, "-m", "tests.peers.politeness", "trl", *common]),
        "ours, `--sft-loss full`": ("full", [*ours, "full"]),
        "ours, `--sft-loss response`": ("response", [*ours, "response"]),
    }
    if args.without_trl:
        del runs["TRL"]
    for name, _ in runs.values():
        if (args.out / name).exists():
            sys.exit(f"{args.out / name} is there already; name another --out")
    results = {}
    for title, (name, command) in runs.items():
        results[title] = timed([*command, "--out", args.out / name], args.out / name)
    print(" ".join(settings(args)))
    print(table(results))


def table(results: dict[str, dict]) -> str:
    def change(key, digits=3):
        return [
            f"{r['before'][key]:.{digits}f} -> {r['after'][key]:.{digits}f}"
            for r in results.values()
        ]

    lines = [
        ["held-out, before -> after", *results],
        ["---"] * (1 + len(results)),
        ["reward accuracy", *change("eval_rewards/accuracies")],
        ["log odds ratio", *change("eval_log_odds_chosen")],
        ["chosen mean log-probability", *change("eval_logps/chosen")],
        ["rejected mean log-probability", *change("eval_logps/rejected")],
        ["optimizer steps", *(r["steps"] for r in results.values())],
        ["whole command, seconds", *(r["seconds"] for r in results.values())],
        ["the same, CPU seconds", *(r["cpu"] for r in results.values())],
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("split", help="write train.jsonl and eval.jsonl")
    sub.add_argument("data", type=Path)
    sub.add_argument("out", type=Path)
    sub.add_argument("--n-train", type=int, default=900)
    for name in ("compare", "trl"):
        sub = commands.add_parser(name)
        sub.add_argument("--model", type=Path, required=True)
        sub.add_argument("--data", type=Path, required=True)
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument("--lr", type=float, default=3e-3)
        sub.add_argument("--lam", type=float, default=1.0)
        sub.add_argument("--lr-schedule", default="cosine")
        sub.add_argument("--warmup-steps", type=int, default=10)
        sub.add_argument("--epochs", type=int, default=2)
        sub.add_argument("--batch-size", type=int, default=8)
        sub.add_argument("--seed", type=int, default=42)
        if name == "trl":
            sub.add_argument("--eval-data", type=Path, required=True)
        else:
            sub.add_argument("--n-train", type=int, default=900)
            sub.add_argument("--without-trl", action="store_true")
    args = parser.parse_args()
    if args.command == "split":
        write_split(args.data, args.out, args.n_train)
    else:
        {"compare": compare, "trl": run_trl}[args.command](args)


if __name__ == "__main__":
    main()
