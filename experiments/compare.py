"""SFT, SFT then DPO, ORPO, and ORPO by probability ratio on the built-in pairs.

    python -m experiments.compare                  runs what is not yet in out/compare, and reports

Every method starts from the same base model and gets the same pairs in the same order, the same
number of updates and the same code path (methods.py). SFT then DPO gets SFT's updates first, and
then as many of its own. The held-out pairs are drawn like the training pairs, about facts that no
training pair is about. What is counted is right and in form: a held-out question is answered well
where the model says one of the two statements that its row accepts.

The learning rate (of DPO: with its beta) is chosen for each method on an eighth of the *training*
facts, held out for that alone, by the share of greedy answers that are good, with one seed. The
reported facts choose nothing. Then three seeds, with all training pairs: at each method's own best
rate, and all at one rate, LR. With SFT and ORPO also on pairs of which 20% or 50% of the labels are
flipped. CLAIMS, below, was written before the comparison ran.

A finished run is a file in --out, so an interrupted comparison continues where it stopped; remove
the folder to start again. Two processes run side by side, a thread each. Needs matplotlib
(requirements-dev.txt).
"""

import argparse
import copy
import itertools
import os
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # two runs side by side are faster than two threads in one

import torch

import data
import train
from examples.task import load_facts, manner_of, state
from experiments.compare_report import write_report
from experiments.evidence import PUBLISHED, kept, pool
from experiments.methods import Method, fit, logps_of
from model import Transformer
from run.answers import answers
from run.processes import keep_freed_memory
from tools.report import about_machine

FACTS = Path(__file__).resolve().parents[1] / "examples" / "facts"

# What each claim asks for, written before the comparison ran. An interval is 95%, by bootstrap over
# the held-out facts (two questions each), paired, of the mean over three seeds. "Above" means: the
# interval is above 0, and so is every seed's own value. "Below" means: the interval is below 0.
# Where neither yes nor no applies the answer is "not shown". Each is asked twice, at each method's
# own best learning rate and at one rate for all, and "yes" needs both. ORPO and the ratio have lam
# 1. Log-probabilities are a token's mean, on held-out pairs, at the end of training.
CLAIMS = {
    "raises": (
        "SFT on the chosen raises the log-probability of the rejected too (Fig. 3)",
        "Chosen and rejected both end above where the base model has them.",
        "One of them ends below.",
    ),
    "separates": (
        "ORPO separates chosen from rejected (Fig. 7)",
        "The margin, chosen less rejected, ends above SFT's, and the rejected end below SFT's.",
        "The margin ends below SFT's, or the rejected end above SFT's.",
    ),
    "better": (
        "ORPO answers better than SFT (Tab. 1 to 3)",
        "The share of greedy answers that are good is above SFT's.",
        "It is below SFT's.",
    ),
    "ratio": (
        "The probability ratio pushes the rejected further down than the odds ratio (Sec. 7.1)",
        "The rejected end below ORPO's, by more than a tenth of ORPO's margin.",
        "They do not: the difference is less than that.",
    ),
    "noise": (
        "What ORPO gains over SFT comes from the labels",
        "The gain in good greedy answers over SFT on the same pairs is above the gain with 50% of "
        "the labels flipped.",
        "It is below.",
    ),
}

LR = 5e-4  # of the built-in job
BASE, SFT, ORPO, RATIO = ("base model", 0.0), ("SFT", 0.0), ("ORPO", 1.0), ("ratio", 1.0)
FLIPS = (0.2, 0.5)


class Sizes(NamedTuple):
    steps: int = 248  # four epochs, as in the built-in job
    batch_size: int = 32
    lrs: tuple = (2.5e-4, 5e-4, 1e-3)  # further ones follow while the best is the last
    dpo_lrs: tuple = (1e-5, 3e-5, 1e-4)
    dpo_betas: tuple = (0.03, 0.1, 0.3)  # at the best rate of the middle one
    seeds: tuple = (42, 43, 44)
    n_asked: int = 1000  # held-out pairs at most
    k: int = 2  # sampled answers to a question
    eval_every: int = 31  # updates


class Job(NamedTuple):
    kind: str
    weight: float
    lr: float
    seed: int
    flipped: float = 0.0
    sweep: bool = False
    sft_lr: float | None = None  # of the model that DPO starts from

    @property
    def method(self) -> Method:
        return Method(self.kind, self.weight)


# ---------------------------------------------------------------------------------------------
# Data.


def load(sizes: Sizes):
    """The base model, its tokenizer, and (pairs, facts) of training and of the held-out set."""
    folder, length = FACTS, 96
    model = Transformer.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(folder / "base")
    fact_of = {state(fact): fact for fact in load_facts()}
    sets = []
    for name in ("train", "eval"):
        rows = data.load_preferences(folder / f"{name}.jsonl")
        pairs, _ = data.encode_pairs(tokenizer, rows, length, length)
        sets.append((pairs, [fact_of[pair.accept[0]] for pair in pairs]))
    (held_out, facts) = sets[1]
    return model, tokenizer, sets[0], (held_out[: sizes.n_asked], facts[: sizes.n_asked])


def without(pairs: list, facts: list, every: int = 8):
    """Training pairs without those about each eighth fact, and these: two (pairs, facts)."""
    number = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
    both = list(zip(pairs, facts, strict=True))
    apart = [x for x in both if number[x[1]] % every == 0]
    rest = [x for x in both if number[x[1]] % every]
    return tuple(tuple(map(list, zip(*part, strict=True))) for part in (rest, apart))


def flip(pairs: list, share: float, seed: int) -> list:
    """The pairs with this share of the labels turned round, at random by the seed."""
    turned = random.Random(seed).sample(range(len(pairs)), round(share * len(pairs)))
    pairs = list(pairs)
    for i in turned:
        pairs[i] = pairs[i]._replace(chosen=pairs[i].rejected, rejected=pairs[i].chosen)
    return pairs


def manners(model, tokenizer, pairs: list, facts: list, k: int, seed: int) -> list[list[str]]:
    """How each question is answered (task.manner_of): k times at temperature 1; k = 0: greedily."""
    options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(seed)} if k else {}
    k, every_fact = max(k, 1), load_facts()
    prompts = [pair.prompt for pair in pairs for _ in range(k)]
    texts = answers(model, tokenizer, prompts, 40, **options)
    asked = [fact for fact in facts for _ in range(k)]
    found = [manner_of(t, fact, every_fact) for t, fact in zip(texts, asked, strict=True)]
    return [found[i : i + k] for i in range(0, len(found), k)]


def own_answers(sizes: Sizes) -> dict[str, list[str]]:
    """The manners of the held-out pairs' own answers: what a perfect imitation of them would be."""
    _, _, _, (pairs, facts) = load(sizes)
    rows = {row.where: row for row in data.load_preferences(FACTS / "eval.jsonl")}
    every_fact, found = load_facts(), {}
    for side in ("chosen", "rejected"):
        texts = [getattr(rows[pair.where], side)[0]["content"] for pair in pairs]
        both = zip(texts, facts, strict=True)
        found[side] = [manner_of(answer, fact, every_fact) for answer, fact in both]
    return found


# ---------------------------------------------------------------------------------------------
# A run.


def run(job: Job, sizes: Sizes, out: Path) -> dict:
    """Trains and measures; of a run of the sweep only its score."""
    torch.set_num_threads(1)
    keep_freed_memory()
    start = time.perf_counter()
    model, tokenizer, (pairs, facts), (held_out, held_out_facts) = load(sizes)
    if job.sweep:
        (pairs, facts), (apart, apart_facts) = without(pairs, facts)
    pairs, result = flip(pairs, job.flipped, job.seed), {"curve": []}

    def watch(step: int):
        if job.sweep or (step % sizes.eval_every and step != sizes.steps):
            return
        x = logps_of(model, held_out)
        row = {"chosen": x.chosen.mean().item(), "rejected": x.rejected.mean().item()}
        result["curve"].append({"step": step} | row)
        result.update(chosen=x.chosen.tolist(), rejected=x.rejected.tolist())  # of each pair

    watch(0)
    reference = None
    if job.kind == "DPO":
        model.load_state_dict(torch.load(sft_weights(job, out), weights_only=True))
        reference = copy.deepcopy(model)
    if job.kind != "base model":
        config = train.TrainConfig(lr=job.lr, batch_size=sizes.batch_size, seed=job.seed)
        fit(job.method, model, reference, pairs, sizes.steps, config, watch)
    if job.kind == "SFT" and not job.flipped:
        torch.save(model.state_dict(), sft_weights(job._replace(sft_lr=job.lr), out))
    if job.sweep:
        found = manners(model, tokenizer, apart, apart_facts, 0, job.seed)
        result["score"] = statistics.mean(x == "good" for x in itertools.chain(*found))
    else:
        about = model, tokenizer, held_out, held_out_facts
        result |= {"greedy": manners(*about, 0, job.seed)}
        result |= {"sampled": manners(*about, sizes.k, job.seed)}
    return result | {"seconds": time.perf_counter() - start}


def sft_weights(job: Job, out: Path) -> Path:
    """Where an SFT run leaves its model for the DPO runs of the same seed and the same pairs."""
    out.mkdir(parents=True, exist_ok=True)
    return out / f"sft-{job.sft_lr:g}-seed{job.seed}{'-sweep' if job.sweep else ''}.pt"


def run_all(jobs: list[Job], sizes: Sizes, out: Path, workers) -> dict[Job, dict]:
    """The jobs, as many at a time as there are workers; a finished one is read from its file."""
    futures = {}
    for job in dict.fromkeys(jobs):
        file = out / ("-".join(map(str, job)).replace(" ", "") + ".json")
        futures[job] = workers.submit(kept, file, [job, sizes], run, job, sizes, out)
    results = {}
    for job, future in futures.items():
        results[job] = result = future.result()
        good = statistics.mean(m == "good" for m in itertools.chain(*result.get("greedy", [[""]])))
        found = f"score {result['score']:.3f}" if job.sweep else f"good, greedy {good:.3f}"
        about = f"{job.method}, lr {job.lr:g}, {job.flipped:.0%} flipped, seed {job.seed}"
        print(f"{about}: {found}, {result['seconds']:.0f} s", flush=True)
    return results


# ---------------------------------------------------------------------------------------------
# The comparison.


def sweep(sizes: Sizes, out: Path, workers) -> tuple[dict, dict]:
    """(every sweep's scores {method: {lr: score}}, the best {method: lr}), of the first seed.

    A sweep is widened until its best rate is not the lowest or the highest, or three times. DPO
    starts from SFT at SFT's best rate. Its rate is swept at the middle beta, and the other betas at
    the best rate.
    """
    seed = sizes.seeds[0]

    def scores(method, lrs, **more) -> dict[float, float]:
        jobs = {lr: Job(*method, lr, seed, sweep=True, **more) for lr in lrs}
        found = run_all(list(jobs.values()), sizes, out, workers)
        return {lr: found[job]["score"] for lr, job in jobs.items()}

    def widened(method, lrs, **more) -> dict[float, float]:
        found, factor = scores(method, lrs, **more), lrs[-1] / lrs[-2]
        for _ in range(3):
            if (lr := best(found)) not in (min(found), max(found)):
                break
            beyond = lr * factor if lr == max(found) else lr / factor
            found |= scores(method, [float(f"{beyond:.2g}")], **more)
        return found

    swept = {method: widened(method, sizes.lrs) for method in (SFT, ORPO, RATIO)}
    sft_lr = best(swept[SFT])
    dpo = {}
    middle = sizes.dpo_betas[len(sizes.dpo_betas) // 2]
    dpo[middle] = widened(("DPO", middle), sizes.dpo_lrs, sft_lr=sft_lr)
    lr = best(dpo[middle])
    for beta in sizes.dpo_betas:
        if beta != middle:
            dpo[beta] = scores(("DPO", beta), [lr], sft_lr=sft_lr)
    beta = max(dpo, key=lambda b: (max(dpo[b].values()), b == middle))
    swept |= {("DPO", b): dpo[b] for b in sorted(dpo)}
    return swept, {m: best(swept[m]) for m in (SFT, ORPO, RATIO, ("DPO", beta))}


def best(by_lr: dict[float, float]) -> float:
    """The learning rate with the highest score; of equals the smallest."""
    return max(sorted(by_lr), key=by_lr.get)


def compare(sizes: Sizes, out: Path) -> dict:
    """All runs: the sweep's scores, what they chose, and the results by (method, lr, flips)."""
    with pool(2) as workers:
        swept, chosen = sweep(sizes, out, workers)
        settings = [(BASE, 0.0, 0.0)]
        settings += [(m, lr, 0.0) for m, lr in chosen.items() if m[0] != "DPO"]
        settings += [(m, LR, 0.0) for m in (SFT, ORPO, RATIO)]
        settings += [(m, LR, flips) for flips in FLIPS for m in (SFT, ORPO)]
        settings = list(dict.fromkeys(settings))
        (dpo,) = (m for m in chosen if m[0] == "DPO")
        jobs = {s: [Job(*s[0], s[1], seed, s[2]) for seed in sizes.seeds] for s in settings}
        found = run_all(list(itertools.chain(*jobs.values())), sizes, out, workers)
        jobs[dpo, chosen[dpo], 0.0] = after_sft = [
            Job(*dpo, chosen[dpo], seed, sft_lr=chosen[SFT]) for seed in sizes.seeds
        ]
        found |= run_all(after_sft, sizes, out, workers)
    return {
        "swept": swept,
        "chosen": chosen,
        "runs": {setting: [found[job] for job in some] for setting, some in jobs.items()},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="finished runs")
    parser.add_argument("--publish", action="store_true", help="into docs/evidence, not OUT/report")
    args = parser.parse_args(argv)
    sizes = Sizes()
    results = compare(sizes, args.out)
    _, _, (_, facts), (_, held_out_facts) = load(sizes)
    results |= {"facts": held_out_facts, "trained on": facts, "pairs' own": own_answers(sizes)}
    results |= {"sizes": sizes._asdict(), "machine": about_machine(), "lr": LR}
    write_report(results, CLAIMS, PUBLISHED if args.publish else args.out / "report")


if __name__ == "__main__":
    main()
