"""What `sentiment.py` found: a verdict on each of its claims, a table, and a figure.

A verdict is a function of the measured figures alone. Intervals are 95%, by bootstrap over the
evaluation openings (or held-out pairs), of the mean over the seeds.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.evidence import (
    PAGE,
    PUBLISHED,
    claims_table,
    resampled,
    table,
    text,
    verdict,
    write_into,
)
from tools.plot import CHOSEN, GREY, OTHER, REJECTED, style


def at_equal_kl(a: tuple, b: tuple) -> tuple[Tensor, Tensor]:
    """What a reads less what b reads at the largest KL that both reach; and that KL.

    a, b: (KL, values), each (resamples, seeds, points); straight lines between the points.
    """
    a, b = ([values.numpy() for values in x] for x in (a, b))
    kl = np.minimum(a[0].max(2), b[0].max(2))  # (resamples, seeds)
    found = np.empty((2, *kl.shape))
    for i, (x, y) in enumerate((a, b)):
        order = x.argsort(2)
        x, y = (np.take_along_axis(values, order, 2) for values in (x, y))
        for j in np.ndindex(kl.shape):
            found[i][j] = np.interp(kl[j], x[j], y[j])
    return torch.from_numpy(found[0] - found[1]), torch.from_numpy(kl)


class Found:
    """The results by setting, a method with its weight, learning rate and share of flips: tensors
    (openings, seeds, points), of which the first point is the base model."""

    def __init__(self, results: dict):
        self.runs, self.base = {}, {}
        for job, result in results.items():
            of = self.base if job.lr == 0 else self.runs.setdefault(job[:3] + job[4:], {})
            of[job.seed] = result
        self.seeds = sorted(self.base)
        self.cache = {}

    def values(self, setting, name: str) -> Tensor:
        """Resampled: (resamples, seeds, points). setting: kind, weight, learning rate, flips."""
        key = setting, name
        if key not in self.cache:
            by_seed = []
            for seed in self.seeds:
                rows = self.base[seed]["checkpoints"] + self.runs[setting][seed]["checkpoints"]
                by_seed.append(torch.tensor([row[name] for row in rows]))  # (points, openings)
            self.cache[key] = resampled(torch.stack(by_seed).permute(2, 0, 1))
        return self.cache[key]

    def end(self, setting, name: str) -> Tensor:
        return self.values(setting, name)[:, :, -1]

    def change(self, setting, name: str) -> Tensor:
        values = self.values(setting, name)
        return values[:, :, -1] - values[:, :, 0]

    def margin(self, setting) -> Tensor:
        return self.end(setting, "chosen") - self.end(setting, "rejected")

    def ends(self, settings, name: str) -> Tensor:
        """(resamples, seeds, 1 + settings): the base model, then the end of a run of each."""
        base = self.values(settings[0], name)[:, :, :1]
        return torch.cat([base, *(self.values(x, name)[:, :, -1:] for x in settings)], 2)

    def win_rate(self, a, b) -> Tensor:
        """Of a's continuations over b's of the same opening, at the end; ties count a half."""
        by_seed = []
        for seed in self.seeds:
            x, y = (
                torch.tensor(self.runs[s][seed]["checkpoints"][-1]["scores"])
                .view(len(self.runs[s][seed]["checkpoints"][-1]["score"]), -1)
                for s in (a, b)
            )  # fmt: skip
            x, y = x[:, :, None], y[:, None, :]
            by_seed.append(((x > y).double() + (x == y).double() / 2).mean((1, 2)))
        return resampled(torch.stack(by_seed, 1))

    def last(self, setting, name: str) -> list[float]:
        return [self.runs[setting][seed]["checkpoints"][-1][name] for seed in self.seeds]


FLIPPED, SHUFFLED = 0.1, 0.5
SFT, ORPO = ("SFT", 0.0, 1e-3, FLIPPED), ("ORPO", 0.5, 1e-3, FLIPPED)
SFT_SLOW, ORPO_SLOW = ("SFT", 0.0, 3e-4, FLIPPED), ("ORPO", 0.5, 3e-4, FLIPPED)
DPO_SLOW = "DPO", 0.1, 3e-4, FLIPPED
LOW, HIGH = ("ORPO", 0.1, 1e-3, FLIPPED), ("ORPO", 2.0, 1e-3, FLIPPED)
CONTROL = ("ORPO", 0.5, 1e-3, SHUFFLED)
CLOSE = 0.05  # to the base model's score, of the control


def judge(found: Found) -> dict[str, tuple[str, str]]:
    """{claim: (yes, no or not shown, the figures)}, as sentiment.CLAIMS and ADDED say."""
    chosen, rejected = (found.change(SFT, name) for name in ("chosen", "rejected"))
    wider = found.margin(ORPO) - found.margin(SFT)
    falls = -found.change(ORPO, "rejected")

    def curve(setting, name="score"):
        return found.values(setting, "kl"), found.values(setting, name)

    def ends(*settings):
        return found.ends(settings, "kl"), found.ends(settings, "score")

    fast, kl = at_equal_kl(curve(ORPO), curve(SFT))
    slow, slow_kl = at_equal_kl(curve(ORPO_SLOW), curve(SFT_SLOW))
    second, _ = at_equal_kl(curve(ORPO, "second"), curve(SFT, "second"))
    last, last_kl = at_equal_kl(ends(ORPO_SLOW, ORPO), ends(SFT_SLOW, SFT))
    dpo, dpo_kl = at_equal_kl(curve(HIGH), curve(DPO_SLOW))
    steps = [
        found.end(b, name) - found.end(a, name)
        for name in ("score", "kl")
        for a, b in ((LOW, ORPO), (ORPO, HIGH))
    ]
    control = found.change(CONTROL, "score")
    return {
        "raises": (
            verdict([chosen, rejected]),
            f"change of chosen {text(chosen)}, of rejected {text(rejected)}",
        ),
        "separates": (
            verdict([wider, falls]),
            f"margin less SFT's {text(wider)}, change of rejected {text(-falls)}",
        ),
        "equal KL": (
            verdict([fast, slow]),
            f"at 1e-3, KL {kl[0].mean():.2f}: {text(fast)}; "
            f"at 3e-4, KL {slow_kl[0].mean():.2f}: {text(slow)}",
        ),
        "second": (verdict([second]), f"KL {kl[0].mean():.2f}: {text(second)} nats"),
        "lam": (
            verdict(steps),
            "score {} and {}; KL {} and {}".format(*map(text, steps)),
        ),
        "ends": (verdict([last]), f"KL {last_kl[0].mean():.2f}: {text(last)}"),
        "dpo": (verdict([dpo]), f"KL {dpo_kl[0].mean():.2f}: {text(dpo)}"),
        "control": (verdict([control + CLOSE, CLOSE - control]), text(control)),
    }


def name(setting) -> str:
    kind, weight, lr, flipped = setting
    weight = f", {'beta' if kind == 'DPO' else 'lam'} {weight:g}" if weight else ""
    return kind + weight + (", shuffled labels" if flipped == SHUFFLED else "") + f", lr {lr:g}"


COLUMNS = ("method", "KL", "score", "second scorer", "win rate over SFT, %", "distinct-2",
           "base's log p", "held-out chosen", "held-out rejected")  # fmt: skip


RESULTS = """## Results

After 120 updates; three seeds, intervals of 95% over the evaluation openings or the held-out pairs.
Lr is the learning rate.

- KL: to the base model, in nats, summed over the 48 tokens of a continuation
- score: VADER's compound score of the model's continuations, from -1 to 1, on whose order it was
  trained; second scorer: log p("They were very happy.") - log p("They were very sad.") after the
  continuation, by the base model, in nats
- win rate over SFT: how often a continuation scores above one of SFT's (at the same learning rate)
  of the same opening; ties count a half
- distinct-2: of all neighbouring words in the continuations, the share that are different pairs
- base's log p: what the base model gives a token of the continuations, a mean
- held-out chosen, held-out rejected: log P of held-out pairs, a token's mean; of the base model
  itself, and of the others their difference from it
"""


def rows_of(found: Found) -> list[list[str]]:
    """The table's rows: the base model, then every setting at its last checkpoint."""
    rows, first = [], next(iter(found.runs))
    base = {k: found.values(first, k)[:, :, 0] for k in
            ("score", "second", "fluency", "chosen", "rejected")}  # fmt: skip
    distinct = [found.base[seed]["checkpoints"][0]["distinct-2"] for seed in found.seeds]
    values = [text(base["score"], 3, ""), text(base["second"], 2, ""), "",
              f"{sum(distinct) / len(distinct):.2f}"]  # fmt: skip
    values += [f"{base[k][0].mean():.2f}" for k in ("fluency", "chosen", "rejected")]
    rows.append(["base model", "0", *values])
    for setting in found.runs:
        sft = ("SFT", 0.0, setting[2], FLIPPED)
        win = text(100 * found.win_rate(setting, sft), 1, "") if setting != sft else ""
        distinct = found.last(setting, "distinct-2")
        row = [name(setting), text(found.end(setting, "kl"), 2, "")]
        row += [text(found.end(setting, "score"), 3, ""), text(found.end(setting, "second"), 2, "")]
        row += [win, f"{sum(distinct) / len(distinct):.2f}"]
        row.append(f"{found.end(setting, 'fluency')[0].mean():.2f}")
        row += [text(found.change(setting, k), 3) for k in ("chosen", "rejected")]
        rows.append(row)
    return rows


# Colour and marker of each method; the shuffled control is grey.
LOOKS = {("SFT", 0.0): (OTHER, "o"), ("ORPO", 0.1): ("#9bd1b1", "s"), ("ORPO", 0.5): (CHOSEN, "s"),
         ("ORPO", 2.0): ("#17603a", "s"), ("ratio", 0.5): ("#d17b1f", "^"),
         ("DPO", 0.1): (REJECTED, "D")}  # fmt: skip


def draw(found: Found, better_of_two: float, file: Path):
    """Score and second scorer against KL; a line a seed, a marker a checkpoint, the last large."""
    plt = style("svg")
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.6), layout="constrained")
    panels = (("score", 1e-3, "VADER score, lr 1e-3"), ("score", 3e-4, "VADER score, lr 3e-4"),
              ("second", 1e-3, "second scorer, lr 1e-3"))  # fmt: skip
    for ax, (measured, lr, title) in zip(axes, panels, strict=True):
        for setting in (s for s in found.runs if s[2] == lr):
            colour, marker = LOOKS[setting[:2]]
            colour = GREY if setting[3] == SHUFFLED else colour
            kl, y = (found.values(setting, k)[0] for k in ("kl", measured))
            for a, b in zip(kl, y, strict=True):
                ax.plot(a, b, color=colour, marker=marker, ms=2.5, lw=0.8, alpha=0.45)
                ax.plot(a[-1], b[-1], color=colour, marker=marker, ms=6)
        if measured == "score":
            kl = math.log(2) - 0.5  # of the better of two samples, without training
            ax.plot(kl, better_of_two, "*", color=GREY, ms=9)
        ax.set_title(title, fontsize=10, color=GREY)
        ax.set_xscale("function", functions=(np.sqrt, np.square))  # reward grows about so
        ax.set_xlim(0, 110 if lr == 1e-3 else 16)
        ax.set_xticks([0, 1, 5, 10, 20, 50, 100] if lr == 1e-3 else [0, 1, 2, 5, 10, 15])
        ax.set_xlabel("KL to the base model, nats")
    handles = [
        plt.Line2D([], [], color=c, marker=m, ms=5, label=name((*key, 0, FLIPPED))[:-6])
        for key, (c, m) in LOOKS.items()
    ]
    handles.append(plt.Line2D([], [], color=GREY, marker="s", ms=5, label="ORPO, shuffled labels"))
    handles.append(
        plt.Line2D([], [], color=GREY, marker="*", ms=8, ls="", label="the better of two samples")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, transparent=True, metadata={"Date": None})


def write_report(results: dict, claims: dict, better_of_two: float, about: dict, folder: Path):
    """sentiment.svg, sentiment.md (verdicts and table) and sentiment.json (every checkpoint); where
    the folder is docs/evidence, also the verdicts on docs/evidence.md."""
    found = Found(results)
    judged, rows = judge(found), rows_of(found)
    folder.mkdir(parents=True, exist_ok=True)
    claimed = claims_table(claims, judged)
    heads = "# Controlled sentiment on stories260K", "## Claims"
    parts = [*heads, claimed, RESULTS, table([list(COLUMNS), *rows])]
    page = "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
    (folder / "sentiment.md").write_text(page, encoding="utf-8")
    if folder == PUBLISHED:
        write_into(PAGE, "sentiment", claimed)
    points = {
        name(setting): {
            k: found.values(setting, k)[0].round(decimals=4).tolist()
            for k in ("kl", "score", "second")
        }
        for setting in found.runs
    }
    kept = {"about": about, "verdicts": judged, "points, by seed": points,
            "better of two": better_of_two}  # fmt: skip
    (folder / "sentiment.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    draw(found, better_of_two, folder / "sentiment.svg")
    for key, (claim, *_) in claims.items():
        print(f"{judged[key][0].upper()}: {claim}\n    {judged[key][1]}")
    print(f"wrote {folder}/sentiment.md, sentiment.json, sentiment.svg")
