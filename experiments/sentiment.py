"""Controlled sentiment on a real checkpoint: how much reward each method buys for how much KL.

    python -m experiments.sentiment MODEL             runs what is not yet in out/sentiment, reports
    python -m experiments.sentiment MODEL --try       the same on a few samples, to see that it runs

After DPO's first experiment (Rafailov et al., arXiv 2305.18290, Sec. 6.1). MODEL is stories260K, a
Llama of 260 thousand parameters trained on TinyStories; any checkpoint without a chat template
would do. The base model writes openings of 24 tokens, and two continuations of each, of exactly 48
tokens at temperature 1. VADER, a sentiment lexicon with rules, scores the continuations. The one
with the higher score is chosen; then 10% of the labels are flipped. Every method trains on the same
pairs, one pass. Data is token ids from end to end: no text is tokenised anew.

After 15, 40, 80 and 120 updates each model continues 400 openings that no training pair has,
twice each. Such a checkpoint is a point: the mean score of its continuations, against its KL to the
base model. The KL is estimated on the model's own samples, summed over the 48 tokens; at each token
it is the exact sum over the vocabulary, which has the same mean as log pi - log pi_ref of the token
drawn and less noise. No point is left out, and no checkpoint or setting is selected.

Each of three seeds draws its own openings, continuations, flips and order. The second scorer is one
that nothing was trained on: how much likelier the *base* model makes "They were very happy." than
"They were very sad." after the continuation. It knows no word list, and correlates with VADER by
0.3 on the base model's samples. CLAIMS, below, was written before the experiment ran.

A finished run is a file in --out, so an interrupted experiment continues where it stopped. Two
processes run side by side, a thread each. Needs vaderSentiment and matplotlib
(requirements-dev.txt).
"""

import argparse
import copy
import itertools
import os
import re
import time
import zlib
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # two runs side by side are faster than two threads in one

import numpy as np
import torch
from torch import Tensor

import data
import train
from data import Pair
from experiments.evidence import PUBLISHED, kept, pool
from experiments.methods import Method, fit, logps_of
from experiments.sentiment_report import write_report
from model import Transformer
from run.processes import keep_freed_memory
from tools.report import about_machine

OPENING, CONTINUATION = 24, 48  # tokens
HAPPY, SAD = "\nThey were very happy.", "\nThey were very sad."
AT_A_TIME = 400  # sequences that are generated or read together

# What each claim asks for, written before the experiment ran. An interval is 95%, by bootstrap over
# the evaluation openings, of the mean over the three seeds. "Above" means: the interval is above 0,
# and so is every seed's own value. "Below" means: the interval is below 0. Where neither yes nor no
# applies the answer is "not shown". ORPO without a lam has 0.5; the learning rate is 1e-3 unless
# said. The end is the checkpoint after 120 updates. KL and score are read off a run's curve from
# the base model (KL 0) through its checkpoints, straight lines between them.
CLAIMS = {
    "raises": (
        "SFT on the chosen raises the log-probability of the rejected too (Fig. 3)",
        "On held-out pairs, chosen and rejected both end above where the base model has them.",
        "One of them ends below. This is what we expect: both are the base model's own samples, "
        "and by Gibbs' inequality no model makes those likelier on average than the base itself "
        "does. Figure 3 needs responses that the base model did not write.",
    ),
    "separates": (
        "ORPO separates chosen from rejected (Fig. 7)",
        "On held-out pairs ORPO's margin (chosen less rejected, a token's mean) ends above SFT's, "
        "and the rejected end below where the base model has them.",
        "The margin ends below SFT's, or the rejected end above the base model's.",
    ),
    "equal KL": (
        "ORPO earns more reward than SFT at equal KL",
        "At both learning rates (1e-3 and 3e-4): at the largest KL that both curves reach, ORPO's "
        "score is above SFT's.",
        "It is below at one of them.",
    ),
    "second": (
        "A scorer that nothing was trained on agrees",
        "The same at 1e-3 by the second scorer: at the largest KL that both reach, ORPO above SFT.",
        "It is below.",
    ),
    "lam": (
        "A larger lam buys more reward and costs more KL",
        "At the end score and KL of lam 2 are above those of 0.5, and those of 0.5 above 0.1's.",
        "One of these four differences is below 0.",
    ),
    "control": (
        "Without a preference in the labels there is nothing to learn",
        "ORPO on shuffled labels: the interval of its final score, less the base model's score, "
        "lies within 0.05 of 0.",
        "The interval lies wholly further from 0 than that.",
    ),
}

# Added when six of the 33 runs had been seen. KL is largest early and falls again as the learning
# rate decays, so the checkpoints of a run do not lie on one curve, and "equal KL" above compares
# early checkpoints. The ends of runs do, with the learning rate as the dial. DPO had no claim.
ADDED = {
    "ends": (
        "The same by the ends of runs alone (added)",
        "On lines from the base model through the ends at 3e-4 and at 1e-3: at the largest KL that "
        "both reach, ORPO's score is above SFT's.",
        "It is below.",
    ),
    "dpo": (
        "ORPO earns more reward than DPO at equal KL (added)",
        "At the largest KL that ORPO with lam 2 (1e-3) and DPO (3e-4) both reach, ORPO's score is "
        "above DPO's.",
        "It is below.",
    ),
}


class Sizes(NamedTuple):
    n_openings: int = 5600  # sampled for training; equal ones and ties go, n_pairs stay
    n_pairs: int = 3840  # one pass of 120 updates
    n_evaluated: int = 400  # openings
    per_opening: int = 2  # continuations of each, at every checkpoint
    steps: int = 120
    batch_size: int = 32
    checkpoints: tuple = (15, 40, 80, 120)


SMALL = Sizes(60, 32, 12, 2, 4, 8, (2, 4))


class Job(NamedTuple):
    kind: str
    weight: float
    lr: float
    seed: int
    flipped: float = 0.1  # share of labels

    @property
    def method(self) -> Method:
        return Method(self.kind, self.weight)


BASE = ("base model", 0.0)
SFT, ORPO, RATIO, DPO = ("SFT", 0.0), ("ORPO", 0.5), ("ratio", 0.5), ("DPO", 0.1)
ORPO_LOW, ORPO_HIGH, SHUFFLED = ("ORPO", 0.1), ("ORPO", 2.0), 0.5
SEEDS = (1, 2, 3)


def all_jobs() -> list[Job]:
    """Seed by seed: the base model, every method at 1e-3, three of them at 3e-4, the control."""
    jobs = []
    for seed in SEEDS:
        jobs.append(Job(*BASE, 0.0, seed))
        jobs += [Job(*m, 1e-3, seed) for m in (SFT, ORPO_LOW, ORPO, ORPO_HIGH, RATIO, DPO)]
        jobs += [Job(*m, 3e-4, seed) for m in (SFT, ORPO, DPO)]
        jobs.append(Job(*ORPO, 1e-3, seed, SHUFFLED))
    return jobs


# ---------------------------------------------------------------------------------------------
# Samples and their scores. A sequence is (OPENING + CONTINUATION,) ids, BOS in front included.


def continued(model: Transformer, openings: Tensor, n: int, seed: int) -> Tensor:
    """openings (B, T) -> (B, T + n): n tokens more of each, sampled at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    new = []
    for part in openings.split(AT_A_TIME):
        new += model.generate(part, n, 1.0, generator=generator)
    return torch.cat([openings, torch.tensor(new)], 1)


def continuations(model: Transformer, openings: Tensor, seed: int) -> Tensor:
    """openings (n, OPENING) -> (n, OPENING + CONTINUATION), sampled at temperature 1."""
    return continued(model, openings, CONTINUATION, seed)


def sample_openings(model: Transformer, bos_id: int, n: int, seed: int) -> Tensor:
    """(at most n, OPENING): the beginnings of the model's own texts, each once."""
    found = continued(model, torch.full((n, 1), bos_id), OPENING - 1, seed)
    return torch.tensor(list(dict.fromkeys(map(tuple, found.tolist()))))


def texts(tokenizer, sequences: Tensor) -> list[str]:
    """The continuations as text. The base model ends a story with BOS, which is left out."""
    found = []
    for ids in sequences.tolist():
        text = tokenizer.decode(ids)[len(tokenizer.decode(ids[:OPENING])) :]
        found.append(text.replace("<s>", " ").replace("</s>", " "))
    return found


def vader(found: list[str]) -> Tensor:
    """(n,): VADER's compound score of each text, from -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return torch.tensor([analyzer.polarity_scores(text)["compound"] for text in found])


def distinct_2(found: list[str]) -> float:
    """Of all neighbouring words in the texts, the share that are different pairs."""
    words = [re.findall(r"[a-z']+", text.lower()) for text in found]
    pairs = [pair for text in words for pair in itertools.pairwise(text)]
    return len(set(pairs)) / max(1, len(pairs))


@torch.no_grad()
def kl_and_fluency(model: Transformer, base: Transformer, sequences: Tensor):
    """(n,) KL(model || base) of each continuation, in nats, summed over its tokens; and (n,) the
    base model's mean log-probability of a token of it."""
    kls, fluency = [], []
    for part in sequences.split(AT_A_TIME // 2):
        ours, theirs = (
            torch.log_softmax(m(part[:, :-1])[:, OPENING - 1 :], -1) for m in (model, base)
        )  # (n, CONTINUATION, V)
        kls.append((ours.exp() * (ours - theirs)).sum((1, 2)))
        fluency.append(theirs.gather(2, part[:, OPENING:, None]).mean((1, 2)))
    return torch.cat(kls), torch.cat(fluency)


@torch.no_grad()
def happier(base: Transformer, tokenizer, sequences: Tensor) -> Tensor:
    """(n,): log p(HAPPY) - log p(SAD) after each sequence, by the base model. The second scorer."""

    def logp(sentence: str) -> Tensor:
        ids = torch.tensor(tokenizer.encode(sentence, continuation=True))
        found = []
        for part in sequences.split(AT_A_TIME // 2):
            ids_of_each = ids.expand(len(part), -1)
            logits = base(torch.cat((part, ids_of_each[:, :-1]), 1))[:, -len(ids) :]
            logps = torch.log_softmax(logits, -1).gather(2, ids_of_each[..., None])
            found.append(logps.sum((1, 2)))
        return torch.cat(found)

    return logp(HAPPY) - logp(SAD)


# ---------------------------------------------------------------------------------------------
# Data and runs.


def make_data(folder: str, seed: int, n: int) -> dict:
    """Openings and two scored continuations of each, by the base model."""
    torch.set_num_threads(1)
    base, tokenizer = load(folder)
    openings = sample_openings(base, tokenizer.bos_id, n, 10 * seed)
    sequences = continuations(base, openings.repeat_interleave(2, 0), 10 * seed + 1)
    scores = vader(texts(tokenizer, sequences))
    return {"sequences": sequences.tolist(), "scores": scores.tolist()}


def order_pairs(sequences, scores, flipped: float, seed: int, leave_out=()) -> list[Pair]:
    """Neighbours (0 and 1, 2 and 3, ...) as pairs, the higher score chosen; ties are dropped.

    A share `flipped` of the labels is then turned round, at random by the seed. Openings in
    leave_out, tuples of ids, are dropped.
    """
    generator, pairs = np.random.default_rng(seed), []
    for i in range(0, len(sequences), 2):
        turned = generator.random() < flipped  # drawn for each, so that pairs do not shift
        opening = sequences[i][:OPENING]
        if scores[i] == scores[i + 1] or tuple(opening) in leave_out:
            continue
        better = i if (scores[i] > scores[i + 1]) != turned else i + 1
        worse = 2 * i + 1 - better
        ids = opening, sequences[better][OPENING:], sequences[worse][OPENING:]
        pairs.append(Pair(*(np.array(x, np.int32) for x in ids)))
    return pairs


def load(folder: str):
    return Transformer.from_pretrained(folder, dtype=torch.float32), data.load_tokenizer(folder)


def run(job: Job, folder: str, sizes: Sizes, training: dict, evaluation: dict) -> dict:
    """Trains by one method and measures every checkpoint; of the base model there is only one."""
    torch.set_num_threads(1)
    keep_freed_memory()
    start = time.perf_counter()
    base, tokenizer = load(folder)
    model = copy.deepcopy(base)
    held_out = order_pairs(evaluation["sequences"], evaluation["scores"], 0.0, 0)
    openings = torch.tensor(evaluation["sequences"])[: 2 * sizes.n_evaluated : 2, :OPENING]
    known = set(map(tuple, openings.tolist()))
    pairs = order_pairs(
        training["sequences"], training["scores"], job.flipped, job.seed, leave_out=known
    )[: sizes.n_pairs]
    result = {"n_pairs": len(pairs), "n_held_out": len(held_out), "checkpoints": [], "samples": []}

    def measure(step: int):
        """Adds the row of a checkpoint, at the steps that have one."""
        if step not in (0, *sizes.checkpoints):
            return
        seed = zlib.crc32(f"{file_name(job)} {step}".encode())  # its own in each checkpoint
        sequences = continuations(model, openings.repeat_interleave(sizes.per_opening, 0), seed)
        found = texts(tokenizer, sequences)
        kl, fluency = kl_and_fluency(model, base, sequences)
        x = logps_of(model, held_out)
        values = {"score": vader(found), "second": happier(base, tokenizer, sequences)}
        values |= {"kl": kl, "fluency": fluency}
        row = {k: [round(y, 4) for y in by_opening(v, sizes)] for k, v in values.items()}
        row |= {"step": step, "distinct-2": distinct_2(found)}
        row |= {"scores": [round(y, 4) for y in values["score"].tolist()]}  # for win rates
        row |= {k: [round(y, 4) for y in getattr(x, k).tolist()] for k in ("chosen", "rejected")}
        result["checkpoints"].append(row)
        result["samples"] = [tokenizer.decode(x) for x in sequences[:6:2].tolist()]

    if job.method == BASE:
        measure(0)
    else:
        config = train.TrainConfig(lr=job.lr, batch_size=sizes.batch_size, seed=job.seed)
        fit(job.method, model, base, pairs, sizes.steps, config, measure)
    return result | {"seconds": time.perf_counter() - start}


def by_opening(values: Tensor, sizes: Sizes) -> list[float]:
    """The mean over an opening's continuations, which stand together."""
    return values.view(-1, sizes.per_opening).mean(1).tolist()


def file_name(job: Job) -> str:
    flipped = "-shuffled" if job.flipped == SHUFFLED else ""
    return f"{job.kind}-{job.weight:g}-{job.lr:g}{flipped}-seed{job.seed}.json"


def experiment(folder: str, out: Path, sizes: Sizes) -> tuple[dict[Job, dict], dict]:
    """All runs, by job, and the evaluation's data; what is finished is read from its file."""
    jobs, results = all_jobs(), {}
    with pool(2) as workers:
        made = {}
        for seed, n in ((0, sizes.n_evaluated), *((seed, sizes.n_openings) for seed in SEEDS)):
            file, arguments = out / f"data-seed{seed}.json", (folder, seed, n)
            made[seed] = workers.submit(kept, file, arguments, make_data, *arguments)
        made = {seed: future.result() for seed, future in made.items()}
        futures = {
            job: workers.submit(
                kept, out / file_name(job), [job, folder, sizes],
                run, job, folder, sizes, made[job.seed], made[0],
            )
            for job in jobs
        }  # fmt: skip
        for i, (job, future) in enumerate(futures.items(), 1):
            results[job] = future.result()
            end = results[job]["checkpoints"][-1]
            score, kl = (sum(end[k]) / len(end[k]) for k in ("score", "kl"))
            about = f"{job.method}, lr {job.lr:g}, {job.flipped:.0%} flipped, seed {job.seed}"
            print(f"[{i}/{len(jobs)}] {about}: score {score:.3f} at KL {kl:.2f}", flush=True)
    return results, made[0]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder of the base model")
    parser.add_argument("--out", type=Path, default=Path("out/sentiment"), help="finished runs")
    parser.add_argument("--publish", action="store_true", help="into docs/evidence, not OUT/report")
    parser.add_argument("--try", dest="small", action="store_true", help="few samples and updates")
    args = parser.parse_args(argv)
    sizes = SMALL if args.small else Sizes()
    results, evaluation = experiment(args.model, args.out, sizes)
    scores = torch.tensor(evaluation["scores"]).view(-1, 2)
    about = {"command": "python -m experiments.sentiment MODEL"} | about_machine()
    about |= {
        "sizes": sizes._asdict(),
        "seconds": round(sum(x["seconds"] for x in results.values())),
    }
    report = PUBLISHED if args.publish else args.out / "report"
    write_report(results, CLAIMS | ADDED, scores.amax(1).mean().item(), about, report)


if __name__ == "__main__":
    main()
