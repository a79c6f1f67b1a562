"""What `compare.py` found: a verdict on each of its claims, tables, figures.

A verdict is a function of the measured figures alone. Intervals are 95%, by bootstrap over the
held-out facts (all questions about a fact together), paired, of the mean over the seeds.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from experiments.evidence import (
    NO,
    OPEN,
    PAGE,
    PUBLISHED,
    YES,
    claims_table,
    interval,
    resampled,
    text,
    verdict,
    write_into,
)
from tools.plot import CHOSEN, GREY, OTHER, REJECTED, style
from tools.report import table

BASE, SFT, ORPO, RATIO = ("base model", 0.0), ("SFT", 0.0), ("ORPO", 1.0), ("ratio", 1.0)
STATEMENTS = ("good", "wrong")  # the manner that the judge likes best, with either value


class Found:
    """The runs by setting (method, learning rate, share of flips); a value a held-out fact."""

    def __init__(self, results: dict):
        self.runs, self.chosen, self.lr = results["runs"], results["chosen"], results["lr"]
        self.facts = list(dict.fromkeys(results["facts"]))
        number = {fact: i for i, fact in enumerate(self.facts)}
        self.fact_of_pair = torch.tensor([number[fact] for fact in results["facts"]])
        self.kinds = [fact.kind for fact in self.facts]
        self.cache = {}

    def best(self, method):
        """The setting of a method at its own best learning rate."""
        return method, self.chosen.get(method, 0.0), 0.0

    def at_one_rate(self, method, flips: float = 0.0):
        return method, self.lr, flips

    def by_fact(self, setting, measure) -> Tensor:
        """(facts, seeds): measure(run), a number a held-out pair, as a mean over a fact's pairs."""
        by_seed = []
        for run in self.runs[setting]:
            values = torch.tensor([float(x) for x in measure(run)], dtype=torch.double)
            sums = torch.zeros(len(self.facts), dtype=torch.double)
            counts = sums.index_add(0, self.fact_of_pair, torch.ones_like(values))
            by_seed.append(sums.index_add(0, self.fact_of_pair, values) / counts)
        return torch.stack(by_seed, 1)

    def values(self, setting, name: str) -> Tensor:
        """(resamples, seeds) of MEASURES[name]."""
        key = setting, name
        if key not in self.cache:
            self.cache[key] = resampled(self.by_fact(setting, MEASURES[name]))
        return self.cache[key]

    def good_of_kind(self, setting, kind: str) -> float:
        of_kind = torch.tensor([k == kind for k in self.kinds])
        return self.by_fact(setting, MEASURES["greedy"])[of_kind].mean().item()


def margins(run: dict) -> list[float]:
    return [c - r for c, r in zip(run["chosen"], run["rejected"], strict=True)]


def share(name: str, wanted: tuple):
    """A measure: of the answers to each held-out pair's question, how many are in these manners."""
    return lambda run: [sum(m in wanted for m in x) / len(x) for x in run[name]]


MEASURES = {
    "chosen": lambda run: run["chosen"],
    "rejected": lambda run: run["rejected"],
    "margin": margins,
    "accuracy": lambda run: [x > 0 for x in margins(run)],
    "greedy": share("greedy", ("good",)),
    "sampled": share("sampled", ("good",)),
    "form": share("greedy", STATEMENTS),
}


def both_rates(found: Found, differences) -> tuple[str, list[list[Tensor]]]:
    """A verdict that needs yes at each method's best rate and at one rate for all.

    differences(of) gives the differences that should be above 0; of(method) is a setting.
    """
    parts = [differences(of) for of in (found.best, found.at_one_rate)]
    verdicts = [verdict(part) for part in parts]
    return NO if NO in verdicts else OPEN if OPEN in verdicts else YES, parts


def judge(found: Found) -> dict[str, tuple[str, str]]:
    """{claim: (yes, no or not shown, the figures)}, as compare.CLAIMS says."""
    base = BASE, 0.0, 0.0
    value = found.values

    def raises(of):
        return [value(of(SFT), k) - value(base, k) for k in ("chosen", "rejected")]

    def separates(of):
        wider = value(of(ORPO), "margin") - value(of(SFT), "margin")
        return [wider, value(of(SFT), "rejected") - value(of(ORPO), "rejected")]

    def better(of):
        return [value(of(ORPO), "greedy") - value(of(SFT), "greedy")]

    def ratio(of):
        lower = value(of(ORPO), "rejected") - value(of(RATIO), "rejected")
        return [lower - value(of(ORPO), "margin") / 10]

    def gain(flips: float) -> Tensor:
        pair = (value(found.at_one_rate(m, flips), "greedy") for m in (ORPO, SFT))
        return next(pair) - next(pair)

    said = {}
    words = {
        "raises": (raises, "change of chosen {}, of rejected {}"),
        "separates": (separates, "margin wider by {}, rejected lower by {}"),
        "better": (better, "{}"),
        "ratio": (ratio, "rejected lower by a tenth of the margin and {}"),
    }
    for key, (differences, form) in words.items():
        came_out, (own, one) = both_rates(found, differences)
        said[key] = (
            came_out,
            f"own rates: {form.format(*map(text, own))}; "
            f"lr {found.lr:g}: {form.format(*map(text, one))}",
        )
    flips = sorted({s[2] for s in found.runs})
    gains = [gain(share_of) for share_of in flips]
    said["noise"] = (
        verdict([gains[0] - gains[-1]]),
        "gain over SFT in good greedy answers: "
        + ", ".join(f"{s:.0%} flipped {text(g)}" for s, g in zip(flips, gains, strict=True)),
    )
    return said


# ---------------------------------------------------------------------------------------------
# Tables.


def title(setting) -> str:
    (kind, weight), lr, flips = setting
    if kind == "base model":
        return kind
    name = {"DPO": f"SFT then DPO, beta {weight:g}", "SFT": "SFT"}.get(
        kind, f"{kind}, lam {weight:g}"
    )
    return f"{name}, lr {lr:g}" + (f", {flips:.0%} flipped" if flips else "")


def main_table(found: Found) -> str:
    columns = [("greedy", "good, greedy", ".2f"), ("sampled", "good, sampled", ".2f")]
    columns += [("accuracy", "reward accuracy", ".2f"), ("chosen", "log P chosen", ".2f")]
    columns += [("rejected", "rejected", ".2f"), ("margin", "margin", ".2f")]
    rows = [["method", *(name for _, name, _ in columns)]]
    for setting in sorted(found.runs, key=lambda s: s[2]):
        row = [text(found.values(setting, key), 2, "") for key, _, _ in columns]
        rows.append([title(setting), *row])
    return table(rows)


def base_rates(found: Found, results: dict) -> str:
    """Good answers split into manner and value and by kind of fact, beside what guessing gives."""
    kinds = list(dict.fromkeys(found.kinds))
    rows = [["greedy answers", "in form", "right value where in form", "good", *kinds]]

    def row(name: str, form: float, good: float, of_kind: list[float]) -> list[str]:
        value = f"{good / form:.2f}" if form else ""
        return [name, f"{form:.2f}", value, f"{good:.2f}", *(f"{x:.2f}" for x in of_kind)]

    dpo = next(m for m in found.chosen if m[0] == "DPO")
    for setting in (found.best(m) for m in (BASE, SFT, ORPO, RATIO, dpo)):
        form, good = (found.values(setting, k)[0].mean().item() for k in ("form", "greedy"))
        of_kind = [found.good_of_kind(setting, kind) for kind in kinds]
        rows.append(row(title(setting), form, good, of_kind))
    for side, manners in results["pairs' own"].items():
        both = list(zip(manners, results["facts"], strict=True))
        form = sum(m in STATEMENTS for m in manners) / len(manners)
        of_kind = []
        for kind in kinds:
            answers = [m for m, fact in both if fact.kind == kind]
            of_kind.append(answers.count("good") / len(answers))
        rows.append(
            row(f"the pairs' {side} answers", form, manners.count("good") / len(manners), of_kind)
        )
    guesses = []
    for kind in kinds:
        seen = Counter(f.value for f in dict.fromkeys(results["trained on"]) if f.kind == kind)
        guess = seen.most_common(1)[0][0]
        asked = [f.value for f in found.facts if f.kind == kind]
        guesses.append((asked.count(guess), len(asked)))
    right, asked = map(sum, zip(*guesses, strict=True))
    guessed = "in form, with the kind's most common value"
    rows.append(row(guessed, 1.0, right / asked, [a / b for a, b in guesses]))
    return table(rows)


def sweep_table(results: dict) -> str:
    lrs = sorted({lr for by_lr in results["swept"].values() for lr in by_lr})
    rows = [["good, greedy, on held-out training facts", *(f"{lr:g}" for lr in lrs)]]
    for method, by_lr in results["swept"].items():
        best = results["chosen"].get(method)
        cells = [f"{by_lr[lr]:.2f}" if lr in by_lr else "" for lr in lrs]
        cells = [f"**{c}**" if lr == best else c for c, lr in zip(cells, lrs, strict=True)]
        rows.append([title((method, 0, 0)).split(", lr")[0], *cells])
    return table(rows)


# ---------------------------------------------------------------------------------------------
# Figures.


# The headings of compare.md, and what the columns of its tables are.
RESULTS = """## Results

Held-out questions, after the last update; three seeds, intervals of 95% over the questions. Lr is
the learning rate. "20% flipped": a fifth of the training pairs had chosen and rejected swapped.

- good, greedy; good, sampled: the share of answers that state the right value in the wanted form,
  of one greedy answer to each question, and of two sampled at temperature 1
- reward accuracy: the share of held-out pairs whose chosen response is the likelier, by log P
- log P chosen, rejected: the mean over a response's tokens, then over pairs
- margin: their difference
"""
BASE_RATES = """## Base rates

Greedy answers: in the wanted form; with the right value, of those in form; good, which is both; and
good by the kind of fact. The last row gives each question the commonest value of its kind, in form.
"""
SWEEP = """## The sweep

How the learning rates were chosen: good greedy answers on an eighth of the training facts, held out
for that, one seed. A column is a learning rate, an empty cell was not run, and the best of a row is
bold (of DPO, the best of its three rows).
"""


def draw(found: Found, folder: Path):
    """compare.svg: log-probabilities through training. noise.svg: good answers against flips."""
    plt = style("svg")
    dpo = next(m for m in found.chosen if m[0] == "DPO")
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.9), sharey=True, layout="constrained")
    for ax, method in zip(axes, (SFT, ORPO, RATIO, dpo), strict=True):
        setting = found.best(method)
        for name, colour, line in (("chosen", CHOSEN, "-"), ("rejected", REJECTED, "--")):
            for run in found.runs[setting]:
                steps = [row["step"] for row in run["curve"]]
                ax.plot(steps, [row[name] for row in run["curve"]], line, color=colour, lw=1.1)
            ax.plot([], [], line, color=colour, label=name)
        ax.set_title(title(setting).replace(", lr", "\nlr"), fontsize=10, color=GREY)
        ax.set_xlabel("update")
    axes[0].set_ylabel("log-probability of a token")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(folder / "compare.svg", transparent=True, metadata={"Date": None})

    flips = sorted({s[2] for s in found.runs})
    figure, ax = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
    for method, colour, marker in ((SFT, OTHER, "o"), (ORPO, CHOSEN, "s")):
        values = [found.values(found.at_one_rate(method, x), "greedy") for x in flips]
        means = [x[0].mean().item() for x in values]
        ends = [interval(x) for x in values]
        errors = [[m - low for m, (low, _) in zip(means, ends, strict=True)],
                  [high - m for m, (_, high) in zip(means, ends, strict=True)]]  # fmt: skip
        label = title((method, 0, 0)).split(", lr")[0]
        x = [100 * share_of for share_of in flips]
        ax.errorbar(x, means, errors, color=colour, marker=marker, capsize=3, label=label)
    ax.set_xlabel("labels flipped, %")
    ax.set_ylabel("good greedy answers")
    ax.set_ylim(0, 1)
    ax.legend(frameon=False, fontsize=9)
    figure.savefig(folder / "noise.svg", transparent=True, metadata={"Date": None})


def write_report(results: dict, claims: dict, folder: Path):
    """compare.md (verdicts, tables), compare.json (the figures), compare.svg and noise.svg; where
    the folder is docs/evidence, also the tables on docs/evidence.md."""
    found = Found(results)
    judged = judge(found)
    folder.mkdir(parents=True, exist_ok=True)
    claimed, rates = claims_table(claims, judged), base_rates(found, results)
    heads = "# SFT, DPO, ORPO and the probability ratio on the built-in pairs", "## Claims"
    parts = [*heads, claimed, RESULTS, main_table(found), BASE_RATES, rates]
    parts = [part.rstrip("\n") for part in (*parts, SWEEP, sweep_table(results))]
    (folder / "compare.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if folder == PUBLISHED:
        write_into(PAGE, "compare", claimed)
        write_into(PAGE, "base rates", rates)
    seconds = round(sum(run["seconds"] for runs in found.runs.values() for run in runs))
    numbers = {
        title(setting): {name: found.values(setting, name)[0].tolist() for name in MEASURES}
        for setting in found.runs
    }
    about = {"command": "python -m experiments.compare", "sizes": results["sizes"]}
    about |= results["machine"] | {"seconds of all runs but the sweep's": seconds}
    kept = {"about": about, "verdicts": judged, "by seed": numbers}
    (folder / "compare.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    draw(found, folder)
    for key, (claim, *_) in claims.items():
        print(f"{judged[key][0].upper()}: {claim}\n    {judged[key][1]}")
    print(f"wrote {folder}/compare.md, compare.json, compare.svg, noise.svg")
