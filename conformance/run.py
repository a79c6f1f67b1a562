"""Who computes ORPO: ours and its peers against the golden vectors, and where each one breaks.

    python conformance/run.py [--implementation FILE.py:FUNCTION] [--out [FILE.md]]
    python conformance/run.py --plot FILE.svg

To check yours, write one function, and name it with --implementation or add it to
conformance/implementations.py. How many arguments it takes says where it starts; autograd does
the rest.

    f(chosen_logps, rejected_logps)    mean log-probabilities, each (B,) -> L_OR (B,), or its sum
    f(batch)                           an implementations.Batch -> L_SFT + lam * mean L_OR, a scalar

The tables: the golden vectors that are right; how far towards certainty and impossibility the
numbers hold, found by bisection; and the answers to the questions of conformance/judge.py.
"""

import datetime
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))  # for peers.py
from step import Parser

from bench.peers import head, table, write
from conformance import implementations
from conformance.implementations import IMPLEMENTATIONS, Implementation, level_of, ours_plain
from conformance.judge import (
    FLOAT32,
    QUIRKS,
    RTOL,
    Case,
    Verdict,
    computed,
    golden_cases,
    judge,
    near_certainty,
    truth,
    with_lead,
)

HERE = Path(__file__).resolve().parent
LEVELS = {"pairs": "log-probabilities", "logits": "logits"}


# ---------------------------------------------------------------------------------------------
# Where it breaks: from an ordinary point on, towards a limit.


class Sweep(NamedTuple):
    region: str  # {} is t, which goes from an ordinary place to an extreme one
    level: str
    start: float
    stop: float
    case: Callable[[float], Case]


SWEEPS = [
    Sweep("log P_w > -{}", "pairs", 0.5, 1e-40, lambda t: near_certainty(t, "chosen")),
    Sweep("log P_l > -{}", "pairs", 0.5, 1e-40, lambda t: near_certainty(t, "rejected")),
    Sweep("log P_w < -{}", "pairs", 1, 1e6, lambda t: near_certainty(t, "chosen")),
    Sweep("chosen leads by {} nats", "logits", 1, 1000, lambda t: with_lead(t, "chosen")),
    Sweep("rejected leads by {} nats", "logits", 1, 1000, lambda t: with_lead(t, "rejected")),
    Sweep("chosen trails by {} nats", "logits", 1, 1000, lambda t: with_lead(-t, "chosen")),
]
N_STEPS, N_HALVINGS = 120, 8  # a third of a decade, halved to a relative 0.3%, at the coarsest


def wrong(verdict: Verdict) -> bool:
    return not (verdict.value and verdict.gradient)


def lost(verdict: Verdict) -> bool:
    return verdict.lost


def two_digits(t: float) -> str:
    return f"{float(f'{t:.2g}'):g}"


def first_break(function, sweep: Sweep, dtype, broken: Callable[[Verdict], bool]) -> float | None:
    """The t at which `broken` first holds; sweep.start if at once, None if not on the way."""

    def is_broken(t):
        return broken(judge(function, sweep.case(t), dtype))

    ratio = (sweep.stop / sweep.start) ** (1 / N_STEPS)
    path = [sweep.start * ratio**i for i in range(N_STEPS + 1)]
    at = next((i for i, t in enumerate(path) if is_broken(t)), None)
    if not at:
        return None if at is None else sweep.start
    good, bad = path[at - 1], path[at]
    for _ in range(N_HALVINGS):
        middle = math.sqrt(good * bad)
        good, bad = (good, middle) if is_broken(middle) else (middle, bad)
    return bad


# ---------------------------------------------------------------------------------------------
# The tables.


def score(one: Implementation, cases: list[Case]) -> list[str]:
    """A row of `scores`."""
    verdicts = {dtype: [judge(one.function, case, dtype) for case in cases] for dtype in RTOL}
    fine = [not wrong(v) for v in verdicts[FLOAT32]]
    # Which tokens L_SFT covers is the implementation's choice: it is judged by its own.
    kinds = [
        sft
        for sft in ("response", "full")
        if all(
            ok for ok, c in zip(fine, cases, strict=True) if (c.kind, c.sft) == ("ordinary", sft)
        )
    ]
    kept = [i for i, c in enumerate(cases) if c.sft in kinds or not c.sft or not kinds]
    ordinary = [fine[i] for i in kept if cases[i].kind == "ordinary"]
    cells = [
        ", ".join(
            str(sum(getattr(of_dtype[i], field) for i in kept)) for of_dtype in verdicts.values()
        )
        for field in Verdict._fields
    ]
    places = []
    for sweep in SWEEPS:
        t = first_break(one.function, sweep, FLOAT32, lost) if sweep.level == one.level else None
        places += [sweep.region.format(two_digits(t))] if t else []
    covers = [" and ".join(kinds) or "neither"] if one.level == "logits" else []
    counts = [str(len(kept)), f"{sum(ordinary)} of {len(ordinary)}"]
    return [one.name, one.version, *covers, *counts, *cells, "; ".join(places) or "nowhere"]


def scores(chosen: list[Implementation], level: str) -> str:
    """The golden vectors. Three numbers are of float32, float64, bfloat16 inputs."""
    heads = [f"from {LEVELS[level]}", "version", *(["L_SFT over"] if level == "logits" else [])]
    heads += ["cases", "of ordinary ones", "values right", "gradients right"]
    heads += ["NaN or inf where finite", "first NaN or inf, float32"]
    cases = golden_cases()[level]
    return table(heads, [score(one, cases) for one in chosen if one.level == level])


def breaks(chosen: list[Implementation], level: str) -> str:
    """The places by bisection, for each dtype of the inputs."""

    def cell(one, dtype, sweep):
        found = {
            broken: first_break(one.function, sweep, dtype, broken) for broken in (wrong, lost)
        }
        words = [
            f"{word} {'throughout' if t == sweep.start else two_digits(t)}"
            for word, t in (("wrong", found[wrong]), ("NaN", found[lost]))
            if t is not None
        ]
        return ", ".join(words) or "never"

    sweeps = [s for s in SWEEPS if s.level == level]
    rows = [
        [one.name, str(dtype).split(".")[1], *(cell(one, dtype, s) for s in sweeps)]
        for one in chosen
        if one.level == level
        for dtype in RTOL
    ]
    return table(
        [f"t from {LEVELS[level]}", "inputs", *(s.region.format("t") for s in sweeps)], rows
    )


def quirks(chosen: list[Implementation]) -> str:
    """The questions of conformance/judge.py; the plain path's answers are ours."""
    chosen = [one for one in chosen if one.function is not ours_plain]
    names = list(dict.fromkeys(one.name for one in chosen))
    functions = {(one.name, one.level): one.function for one in chosen}
    functions |= {(one.name, "metric"): one.metric for one in chosen if one.metric}
    rows = []
    for q in QUIRKS:
        asked = [functions.get((name, q.level)) for name in names]
        if any(asked):
            numbers = [q.measure(None) if q.right is None else q.right]
            numbers += [q.measure(f) if f else None for f in asked]
            # + 0.0, or there would be a zero with a minus
            rows.append([q.question, *("" if x is None else f"{x + 0.0:.4g}" for x in numbers)])
    return table(["", "right", *names], rows)


RIGHT = """
Right is within 1e-4 (float32), 1e-10 (float64) or 1e-2 (bfloat16), of the number itself or, for the
gradient of logits, of the largest in its row: some thousand, million and two roundings. Three
numbers in a cell are for those three dtypes of the inputs. Ordinary cases are far from certainty;
the others (P = 1, logits that lead by 30 or 80 nats) ask whether the limits come out.
From logits an implementation is judged by the cases whose L_SFT covers the tokens that its own
covers (full: prompt and response), and by all of them if neither kind fits it.
"""
ENDS = """
The first t at which a number is wrong, and at which it is NaN, or infinite though the truth is
not; the other response has P = 1/2. The ways go from t = 0.5 to 1e-40, from 1 to 1e6, and from 1 to
1000 nats. "Throughout" under float64 is code that computes in float32 whatever it is given.
Log-probabilities in bfloat16 are asked of the function alone: Liger and LLaMA-Factory make them in
float32 from logits of any dtype. Logits in bfloat16 reach TRL from a model that was loaded so.
"""
CHOICES = """
From outside: the loss and its gradient alone are read. a = log P_w, b = log P_l; the inputs are
float64 where nothing else is said. The metric is the one whose name says log odds ratio: all of
them log the mean log sigmoid of it, ours too, under TRL's name.
"""


def report(chosen: list[Implementation]) -> str:
    """All tables, as Markdown."""
    levels = [level for level in LEVELS if any(one.level == level for one in chosen)]
    parts = ["## Golden vectors", RIGHT, *(scores(chosen, level) for level in levels)]
    parts += ["## Where the numbers end", ENDS, *(breaks(chosen, level) for level in levels)]
    parts += ["## Choices and slips", CHOICES, quirks(chosen)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


# ---------------------------------------------------------------------------------------------
# The figure of --plot: what becomes of the gradient at certainty.

GREY, OURS, TRL, LIGER = "#808080", "#2a9d5c", "#d1495b", "#3d7ebf"
CERTAIN = 1e-13  # where the axis shows P_w = 1


def at_doubt(doubt: float) -> Case:
    """P_w = 1 - doubt, P_l = 0.9."""
    logps = (torch.tensor([math.log1p(-p)], dtype=torch.float64) for p in (doubt, 0.1))
    return Case("edge", tuple(logps))


def curve(function: Callable | None, cases: list[Case], read: Callable[[Tensor], float]):
    """`read` of each case's gradient, in float32; of the truth where there is no function."""
    dtype = torch.float32
    grads = (computed(function, c, dtype)[1] if function else truth(c, dtype)[1] for c in cases)
    return [read(grad) for grad in grads]


def panel(ax, xs: list[float], cases: list[Case], functions, read) -> dict[str, float]:
    """The truth, ours, TRL and Liger. Returns from where on which of them is NaN."""
    ax.plot(xs, curve(None, cases, read), color=GREY, lw=7, alpha=0.4, label="truth")
    last, ends = len(xs) - 1, {}
    looks = (
        ("TRL", TRL, {"lw": 3}),
        ("Liger", LIGER, {"lw": 1.5, "ls": (0, (2, 2))}),
        ("ours", OURS, {"ls": "", "marker": "o", "ms": 3, "markevery": [*range(0, last, 4), last]}),
    )
    for (name, colour, look), function in zip(looks, functions, strict=True):
        ys = curve(function, cases, read)
        ax.plot(xs, ys, color=colour, label=name, **look)
        numbers = [i for i, y in enumerate(ys) if not math.isnan(y)]
        if numbers and numbers[-1] < last:
            ends[name] = xs[numbers[-1] + 1]
    return ends


def draw(file: Path):
    """Two panels: dL_OR/dlog P_w as 1 - P_w vanishes; the gradient of logits as leads grow."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    matplotlib.rcParams |= {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
        **{"axes.edgecolor": GREY, "grid.color": GREY, "grid.alpha": 0.25, "axes.grid": True},
        **{"svg.hashsalt": "orpo", "svg.fonttype": "none", "font.size": 10},
        **{"axes.spines.top": False, "axes.spines.right": False},
    }
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")

    doubts = [10 ** (-1 - i / 16) for i in range(16 * 11 + 1)]
    xs, cases = [*doubts, CERTAIN], [*map(at_doubt, doubts), at_doubt(0.0)]
    read = lambda grad: grad[0].item()  # noqa: E731 - the derivative by log P_w
    functions = (
        implementations.trl_pairs,
        implementations.liger_pairs,
        implementations.ours_pairs,
    )
    ends = panel(left, xs, cases, functions, read)
    left.set(xscale="log", xlim=(0.1, CERTAIN), ylim=(-11, 0), xlabel="1 - P_w,  P_l = 0.9")
    left.set_xticks([10.0**-k for k in range(1, 12, 2)] + [CERTAIN])
    left.set_xticklabels([f"1e-{k}" for k in range(1, 12, 2)] + ["0"])
    left.minorticks_off()
    left.set_title("dL_OR / dlog P_w, float32", fontsize=10, color=GREY)
    shade(left, ends, CERTAIN)
    left.legend(frameon=False, fontsize=9, loc="upper left")

    leads = [5 + i / 2 for i in range(191)]
    functions = (implementations.trl, implementations.liger, implementations.ours)
    for which in ("rejected", "chosen"):
        cases = [with_lead(lead, which) for lead in leads]
        rows = slice(0, 2) if which == "chosen" else slice(2, 4)
        read = lambda grad, rows=rows: grad[rows].norm().item()  # noqa: E731
        ends = panel(right, leads, cases, functions, read)
    right.set(
        yscale="log", xlim=(5, 100), ylim=(1e-40, 1e3), xlabel="lead of the target's logit, nats"
    )
    right.set_title("norm of the gradient by its logits, float32", fontsize=10, color=GREY)
    right.text(98, 4, "rejected leads", ha="right", color=GREY, fontsize=9)
    right.text(60, 1e-20, "chosen leads", color=GREY, fontsize=9)
    shade(right, ends, 100)
    plain = {"Date": None} if file.suffix == ".svg" else {}
    figure.savefig(file, transparent=True, dpi=120, metadata=plain)


def shade(ax, ends: dict[str, float], stop: float):
    """A band from where the first of them has ended to the edge, with their names; or nothing."""
    if ends:
        start = min(ends.values(), key=lambda x: abs(x - ax.get_xlim()[0]))
        ax.axvspan(start, stop, color=TRL, alpha=0.12, lw=0)
        text = f"{' and '.join(ends)}: NaN"
        ax.text(0.98, 0.72, text, transform=ax.transAxes, ha="right", color=TRL, fontsize=9)


# ---------------------------------------------------------------------------------------------
# The command.


def load(argument: str) -> list[Implementation]:
    """FILE.py:FUNCTION as a row, behind ours. Raises ValueError with one sentence."""
    path, _, name = argument.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(
            f"{argument}: FILE.py:FUNCTION is wanted, and {path or argument} is no file"
        )
    spec = importlib.util.spec_from_file_location("yours", path)
    if spec is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name)
        level = level_of(function)
        computed(function, golden_cases()[level][0], FLOAT32)
    except Exception as error:  # whatever somebody's file may do
        told = " ".join(str(error).split())
        raise ValueError(f"{argument}: {type(error).__name__}: {told:.300}") from error
    ours = [one for one in IMPLEMENTATIONS if (one.name, one.level) == ("ours", level)]
    return [*ours, Implementation(name, "yours", function, level, None)]


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--implementation", metavar="FILE.py:FUNCTION", help="yours, beside ours")
    parser.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=HERE / "results" / f"{datetime.date.today()}-conformance.md",
        help="write the tables there too (without a value: into conformance/results)",
    )
    parser.add_argument("--plot", type=Path, help="draw the figure, SVG or PNG, in place of tables")
    args = parser.parse_args()
    try:
        chosen = load(args.implementation) if args.implementation else IMPLEMENTATIONS
        missing = {one.name for one in chosen if one.version == "missing"}
        if missing and not args.implementation:
            raise ValueError(
                f"{' and '.join(sorted(missing))} missing; `make conformance` installs it"
            )
        if args.plot:
            draw(args.plot)
            print(f"wrote {args.plot}")
            return
        text = f"{head(torch.get_num_threads())}\n{report(chosen)}"
        print(text)
        if args.out:
            write(text, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
