"""The paper's Figures 3 and 7 with a real language model: SFT and ORPO on real pairs.

    python -m experiments.real_model MODEL TRAIN.jsonl EVAL.jsonl         an hour on two cores
    python -m experiments.real_model MODEL TRAIN.jsonl EVAL.jsonl --try   minutes, to see it run

(An hour where the processor multiplies bfloat16, many hours on others.)

MODEL is SmolLM2-135M-Instruct (the paper's smallest model has 125 million parameters), the pairs
are AlpacaEval's published annotations: typical answers of 77 models, the better one by a GPT-4
judge, split by instruction. With each seed all methods get the same pairs in the same order, and as
many updates, by train.py's own step (`--sft-loss response`). The learning rate of each method is
the one of RATES by which its own loss is lowest on training instructions that are held out for
that, with half of the updates of the first seed. The held-out instructions of EVAL choose nothing.
CLAIMS was written before the first run.

Longer answers win in 72% of these pairs, so accuracy is also given for the others, and beside it
the length of the model's own answers.
"""

import itertools
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
import train
from experiments.evidence import (
    PAGE,
    PUBLISHED,
    claims_table,
    kept,
    resampled,
    text,
    verdict,
    write_into,
)
from model import Transformer
from run.answers import answers
from run.flags import TrainConfig, page_parser
from run.processes import pick_device
from tools.report import about_machine, table, write

METHODS = {"SFT": 0.0, "ORPO, lam 0.1": 0.1, "ORPO, lam 1": 1.0}
RATES = (1e-5, 3e-5)

# Two methods, or a method and the base model, are subtracted. An interval is 95%, of the mean over
# the seeds, by bootstrap over the held-out pairs, paired. "Above" means that it is above 0, and so
# is the difference of each seed; "below" that it is below 0.
CLAIMS = {
    "raises": (
        "SFT on the chosen raises the log-probability of the rejected too (Fig. 3)",
        "Chosen and rejected both end above where the base model has them.",
        "One of them ends below.",
    ),
    "separates": (
        "ORPO separates chosen from rejected (Fig. 7, lam 1)",
        "The margin, chosen less rejected, ends above SFT's, and the rejected end below SFT's.",
        "The margin ends below SFT's, or the rejected end above SFT's.",
    ),
    "lam": (
        "A larger lam separates them further (App. E)",
        "The margin with lam 1 ends above that with lam 0.1.",
        "It ends below.",
    ),
    "prefers": (
        "ORPO prefers the chosen answers of more held-out pairs than SFT does (lam 1)",
        "Its reward accuracy ends above SFT's.",
        "It ends below.",
    ),
}


class Sizes(NamedTuple):
    n_steps: int = 12
    batch_size: int = 16
    n_eval: int = 160  # held-out pairs
    n_choose: int = 48  # pairs of training instructions that choose the rate
    n_asked: int = 24  # held-out instructions that are answered
    n_new: int = 64  # tokens of an answer
    max_length: int = 512
    seeds: tuple[int, ...] = (42, 43)


SMALL = Sizes(n_steps=2, batch_size=2, n_eval=4, n_choose=2, n_asked=2, n_new=8, max_length=128)


def load(folder: Path, train_file: Path, eval_file: Path, sizes: Sizes):
    """(tokenizer, pairs to train on, pairs that choose the rate, held-out pairs)."""
    tokenizer = data.load_tokenizer(folder)
    rows = data.load_preferences(train_file)
    rows, choosing = data.hold_out(rows, 0.1, sizes.seeds[0])
    held_out = data.load_preferences(eval_file)
    parts = (rows, None), (choosing, sizes.n_choose), (held_out, sizes.n_eval)
    limits = sizes.max_length, sizes.max_length // 2
    return tokenizer, *(data.encode_pairs(tokenizer, r, *limits)[0][:k] for r, k in parts)


def config_of(folder: Path, lam: float, lr: float, seed: int, sizes: Sizes) -> TrainConfig:
    return TrainConfig(
        model=str(folder),
        device="cpu",
        dtype="bfloat16",
        lam=lam,
        lr=lr,
        warmup_steps=max(1, sizes.n_steps // 10),
        batch_size=sizes.batch_size,
        micro_batch_tokens=4096,
        seed=seed,
    )


@torch.no_grad()
def logps_of(model: Transformer, pairs: list[data.Pair], config: TrainConfig) -> dict:
    """Lists of numbers, a pair each: mean log-probabilities of chosen and rejected, and the loss of
    all of them."""
    batches = train.pack(pairs, config, share=False)
    outputs = [train.forward(model, batch, config.lam) for batch in batches]
    chosen = torch.cat([output.chosen_logps for output in outputs]).tolist()
    rejected = torch.cat([output.rejected_logps for output in outputs]).tolist()
    loss = sum(output.loss.item() for output in outputs)
    return {"chosen": chosen, "rejected": rejected, "loss": loss}


def fit(config: TrainConfig, pairs: list[data.Pair], n_steps: int, watch) -> Transformer:
    """Trains for n_steps; calls watch(step, model) after each."""
    pick_device(config)
    model = train.load_model(config)
    optimizer = train.make_optimizer(model, config)
    for step in range(1, n_steps + 1):
        train.set_lr(optimizer, train.lr_at(step, n_steps, config))
        now = data.step_pairs(pairs, step, config.batch_size, config.seed)
        train.training_step(model, optimizer, train.pack(now, config), config)
        watch(step, model)
    return model


def choose_rate(folder: Path, lam: float, loaded, sizes: Sizes) -> dict:
    """The loss on held-out training instructions, by rate."""
    _, pairs, choosing, _ = loaded
    losses = {}
    for lr in RATES:
        config = config_of(folder, lam, lr, sizes.seeds[0], sizes)
        model = fit(config, pairs, max(1, sizes.n_steps // 2), lambda step, model: None)
        losses[f"{lr:g}"] = logps_of(model, choosing, config)["loss"]
    return {"losses": losses}


def run(folder: Path, lam: float, lr: float, seed: int, loaded, sizes: Sizes) -> dict:
    """A whole run: log-probabilities of the held-out pairs in its middle and at its end, and the
    model's own greedy answers."""
    tokenizer, pairs, _, held_out = loaded
    start, config, points = time.time(), config_of(folder, lam, lr, seed, sizes), {}

    def watch(step: int, model: Transformer):
        if step in (sizes.n_steps // 2, sizes.n_steps):
            points[step] = logps_of(model, held_out, config)

    model = fit(config, pairs, sizes.n_steps, watch)
    said = answer(model, tokenizer, held_out, sizes)
    return {"points": points, "answers": said, "seconds": time.time() - start, "lr": lr}


def untrained(folder: Path, loaded, sizes: Sizes) -> dict:
    """What run() returns, of the base model."""
    config = config_of(folder, 0.0, 0.0, sizes.seeds[0], sizes)
    pick_device(config)
    model = train.load_model(config)
    points = {0: logps_of(model, loaded[3], config)}
    return {"points": points, "answers": answer(model, loaded[0], loaded[3], sizes), "lr": 0.0}


def answer(model: Transformer, tokenizer, pairs: list[data.Pair], sizes: Sizes) -> list[str]:
    """Greedy answers to different prompts; in float32, which decoding on a CPU is faster in."""
    model.compute_dtype = torch.float32
    prompts = list({tuple(pair.prompt.tolist()): None for pair in pairs})[: sizes.n_asked]
    return answers(model, tokenizer, [list(p) for p in prompts], sizes.n_new, batch_tokens=20_000)


# ---------------------------------------------------------------------------------------------
# The report.


def logps_at_end(runs: list[dict]) -> dict[str, Tensor]:
    """Chosen and rejected, each (pairs, seeds), from a run of each seed."""
    ends = [list(run["points"].values())[-1] for run in runs]
    return {k: torch.tensor([end[k] for end in ends]).T for k in ("chosen", "rejected")}


def judge(base: dict, ends: dict[str, dict]) -> dict[str, tuple[str, str]]:
    """{claim: (verdict, figures)} from logps_at_end() of the base model and of each method."""
    before, (sft, small, large) = base, (ends[name] for name in METHODS)

    def margin(side: dict) -> Tensor:
        return side["chosen"] - side["rejected"]

    def right(side: dict) -> Tensor:
        return (margin(side) > 0).double()

    asked = {
        "raises": [sft["chosen"] - before["chosen"], sft["rejected"] - before["rejected"]],
        "separates": [margin(large) - margin(sft), sft["rejected"] - large["rejected"]],
        "lam": [margin(large) - margin(small)],
        "prefers": [right(large) - right(sft)],
    }
    judged = {}
    for claim, differences in asked.items():
        draws = [resampled(difference) for difference in differences]
        judged[claim] = verdict(draws), "; ".join(map(text, draws))
    return judged


def distinct_2(said: list[str]) -> float:
    """The share of different ones among all pairs of neighbouring words."""
    words = [text.split() for text in said]
    pairs = [pair for line in words for pair in itertools.pairwise(line)]
    return len(set(pairs)) / max(1, len(pairs))


def span(values: Tensor, digits: int) -> str:
    """The lowest and the highest of the seeds, or one number where they agree."""
    ends = [f"{end:.{digits}f}" for end in (values.min().item(), values.max().item())]
    return " to ".join(dict.fromkeys(ends))


def summary(results: dict[str, list[dict]], held_out: list[data.Pair]) -> str:
    """A row for the base model and for each method; of several seeds the lowest and the highest."""
    shorter = torch.tensor([len(pair.chosen) < len(pair.rejected) for pair in held_out])
    heads = ["", "learning rate", "log P chosen", "log P rejected", "accuracy"]
    heads += ["of them where the rejected is longer", "words an answer", "distinct-2"]
    rows = [heads]
    for name, runs in results.items():
        logps = logps_at_end(runs)
        right = (logps["chosen"] > logps["rejected"]).double()
        n_words = [sum(len(text.split()) for text in run["answers"]) for run in runs]
        row = [name, f"{runs[0]['lr']:g}" if runs[0]["lr"] else ""]
        row += [span(logps[k].double().mean(0), 3) for k in ("chosen", "rejected")]
        row += [span(right.mean(0), 3), span(right[shorter].mean(0), 3)]
        row += [span(torch.tensor(n_words) / len(runs[0]["answers"]), 0)]
        row += [span(torch.tensor([distinct_2(run["answers"]) for run in runs]), 2)]
        rows.append(row)
    about = f"{len(held_out)} held-out pairs, {int(shorter.sum())} with the longer answer rejected."
    return f"{table(rows)}\n{about}\n"


def main():
    parser = page_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/real_model"), help="finished runs")
    parser.add_argument("--publish", action="store_true", help="into docs/evidence.md")
    parser.add_argument("--try", dest="small", action="store_true", help="a few pairs")
    args = parser.parse_args()
    sizes = SMALL if args.small else Sizes()
    loaded = load(args.model, args.train, args.eval, sizes)
    size = "small-" if args.small else ""
    key = [str(args.model), sizes]
    base = kept(args.out / f"{size}base", key, untrained, args.model, loaded, sizes)
    results = {"base model": [base]}
    for name, lam in METHODS.items():
        slug = f"{size}lam-{lam:g}"
        key = [str(args.model), lam, sizes]
        rates = kept(args.out / f"rate-{slug}", key, choose_rate, args.model, lam, loaded, sizes)
        lr = float(min(rates["losses"], key=rates["losses"].get))
        print(f"{name}: loss by rate {rates['losses']}", flush=True)
        results[name] = []
        for seed in sizes.seeds:
            file = args.out / f"{slug}-seed-{seed}"
            now = kept(file, [*key, lr, seed], run, args.model, lam, lr, seed, loaded, sizes)
            print(f"{name}, seed {seed}: {now['seconds']:.0f} s", flush=True)
            results[name].append(now)
    ends = {name: logps_at_end(runs) for name, runs in results.items()}
    judged = judge(ends["base model"], ends)
    content = claims_table(CLAIMS, judged) + "\n" + summary(results, loaded[3])
    print(content)
    if args.publish:
        about = {"command": "python -m experiments.real_model MODEL TRAIN.jsonl EVAL.jsonl"}
        about |= about_machine() | {"sizes": sizes._asdict(), "verdicts": judged}
        about |= {"results": results}
        write(json.dumps(about, indent=1) + "\n", PUBLISHED / "real_model.json")
        write_into(PAGE, "real model", content)


if __name__ == "__main__":
    main()
