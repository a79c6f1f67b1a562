"""Who computes ORPO: ours and other implementations against the golden vectors.

    python -m conformance.run [--summary] [--implementation FILE.py:FUNCTION] [--out [FILE.md]]
    python -m conformance.run --plot FILE.svg

To check yours, write one function, and name it with --implementation or add it to
conformance/implementations.py. The number of its arguments says where it starts. It needs no
backward pass: autograd differentiates it.

    f(chosen_logps, rejected_logps)    mean log-probabilities, each (B,) -> L_OR (B,), or its sum
    f(batch)                           an implementations.Batch -> L_SFT + lam * mean L_OR, a scalar

The report has three parts: how many golden vectors come out right; how close to P = 1 and P = 0
the numbers hold, found by bisection; and the answers to the questions of conformance/judge.py.
--summary prints only the tables of docs/conformance.md, which takes a few seconds.
"""

import argparse
import datetime
import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from conformance import implementations
from conformance.implementations import IMPLEMENTATIONS, OURS, Implementation, Project, level_of
from conformance.judge import (
    FLOAT32,
    QUIRKS,
    RTOL,
    VERSION,
    Case,
    Verdict,
    computed,
    golden_cases,
    judge,
    near_certainty,
    truth,
    with_lead,
)
from tools.report import head, table, write

HERE = Path(__file__).resolve().parent
LEVELS = {"pairs": "log-probabilities", "logits": "logits"}


# ---------------------------------------------------------------------------------------------
# Where the numbers stop being right: from an ordinary point on, towards a limit.


class Sweep(NamedTuple):
    region: str  # {} is t, which goes from an ordinary value to an extreme one
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


def not_finite(verdict: Verdict) -> bool:
    return verdict.not_finite


def two_digits(t: float) -> str:
    return f"{float(f'{t:.2g}'):g}"


def first_break(function, sweep: Sweep, dtype, broken: Callable[[Verdict], bool]) -> float | None:
    """The t at which `broken` first holds, from sweep.start on; None if it never does."""

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


class Judged(NamedTuple):
    """What came out of one implementation, for inputs of one dtype."""

    sft: str  # "response" or "full", the kind of L_SFT that it was judged by; else "both"
    cases: list[Case]
    verdicts: list[Verdict]

    def counts(self, kind: str) -> tuple[int, int]:
        """Cases with value and gradient right, and all: of kind "ordinary", or of the others."""
        pairs = zip(self.cases, self.verdicts, strict=True)
        of_kind = [v for c, v in pairs if (c.kind == "ordinary") == (kind == "ordinary")]
        return sum(not wrong(v) for v in of_kind), len(of_kind)

    def sum_of(self, field: str) -> int:
        return sum(getattr(verdict, field) for verdict in self.verdicts)


@functools.cache
def cases_of(level: str) -> list[Case]:
    return golden_cases()[level]


@functools.cache
def fitting_sft(one: Implementation) -> str:
    """Which tokens L_SFT covers is an implementation's choice: it is judged by its own.

    "response" or "full": the kind whose ordinary cases it gets right, all of them. "both" where it
    is right for both (ours is told the weights) or for neither.
    """

    def fits(sft):
        ordinary = [c for c in cases_of(one.level) if (c.kind, c.sft) == ("ordinary", sft)]
        return not any(wrong(judge(one.function, case, FLOAT32)) for case in ordinary)

    kinds = [sft for sft in ("response", "full") if fits(sft)]
    return kinds[0] if len(kinds) == 1 else "both"


@functools.cache
def judged(one: Implementation, dtype: torch.dtype) -> Judged:
    sft = fitting_sft(one) if one.level == "logits" else "both"
    cases = [case for case in cases_of(one.level) if sft == "both" or case.sft == sft]
    return Judged(sft, cases, [judge(one.function, case, dtype) for case in cases])


def summary(chosen: list[Implementation]) -> str:
    """A row for each project, float32 inputs: the main table of docs/conformance.md."""
    heads = ["implementation", "version", "what it computes"]
    for level in LEVELS.values():
        heads += [f"from {level}: ordinary", "edge", "NaN or inf"]
    rows = []
    for project in dict.fromkeys(one.project for one in chosen):
        row = [project.name, project.version, project.computes]
        for level in LEVELS:
            cells = [""] * 3
            for one in chosen:
                if (one.project, one.level) == (project, level):
                    result = judged(one, FLOAT32)
                    counts = (result.counts(kind) for kind in ("ordinary", "edge"))
                    cells = [f"{n_right} of {n}" for n_right, n in counts]
                    cells.append(str(result.sum_of("not_finite")))
            row += cells
        rows.append(row)
    return table([heads, *rows])


def sources(chosen: list[Implementation]) -> str:
    """Where each was read, or which package was run."""
    projects = dict.fromkeys(one.project for one in chosen)
    heads = ["implementation", "version", "source"]
    return table([heads, *([p.name, p.version, p.source] for p in projects)])


def score(one: Implementation) -> list[str]:
    """A row of `scores`."""
    results = [judged(one, dtype) for dtype in RTOL]
    float32 = judged(one, FLOAT32)
    n_right, n_ordinary = float32.counts("ordinary")
    places = []
    for sweep in SWEEPS:
        if sweep.level == one.level:
            t = first_break(one.function, sweep, FLOAT32, not_finite)
            if t is not None:
                places.append(sweep.region.format(two_digits(t)))
    row = [one.name, one.project.version]
    if one.level == "logits":
        row.append(float32.sft)
    row += [str(len(float32.cases)), f"{n_right} of {n_ordinary}"]
    for field in Verdict._fields:
        row.append(", ".join(str(result.sum_of(field)) for result in results))
    return [*row, "; ".join(places) or "nowhere"]


def scores(chosen: list[Implementation], level: str) -> str:
    """The golden vectors. Three numbers are of float32, float64, bfloat16 inputs."""
    heads = [f"from {LEVELS[level]}", "version"]
    if level == "logits":
        heads.append("judged by L_SFT over")
    heads += ["cases", "of ordinary ones", "values right", "gradients right"]
    heads += ["NaN or inf where finite", "first NaN or inf, float32"]
    return table([heads, *(score(one) for one in chosen if one.level == level)])


def breaks(chosen: list[Implementation], level: str) -> str:
    """The places by bisection, for each dtype of the inputs."""

    def cell(one, dtype, sweep):
        words = []
        for word, broken in (("wrong", wrong), ("NaN", not_finite)):
            t = first_break(one.function, sweep, dtype, broken)
            if t is not None:
                words.append(f"{word} {'throughout' if t == sweep.start else two_digits(t)}")
        return ", ".join(words) or "never"

    sweeps = [s for s in SWEEPS if s.level == level]
    rows = [
        [one.name, str(dtype).split(".")[1], *(cell(one, dtype, s) for s in sweeps)]
        for one in chosen
        if one.level == level
        for dtype in RTOL
    ]
    heads = [f"t from {LEVELS[level]}", "inputs", *(s.region.format("t") for s in sweeps)]
    return table([heads, *rows])


def quirks(chosen: list[Implementation]) -> str:
    """The questions of conformance/judge.py, as a legend and a table with a row a project."""
    functions = {(one.name, one.level): one.function for one in chosen}
    functions |= {(one.name, "metric"): one.metric for one in chosen if one.metric}
    asked = [q for q in QUIRKS if any(level == q.level for _, level in functions)]

    def number(x: float) -> str:
        return f"{x + 0.0:.4g}"  # + 0.0 turns -0.0 into 0.0

    right = [number(q.measure(None) if q.right is None else q.right) for q in asked]
    rows = [["right", *right]]
    for name in dict.fromkeys(one.name for one in chosen):
        cells = []
        for q in asked:
            function = functions.get((name, q.level))
            cells.append(number(q.measure(function)) if function else "")
        rows.append([name, *cells])
    legend = [f"- **{q.name}**: {q.question}." for q in asked]
    return "\n".join(legend) + "\n\n" + table([["", *(q.name for q in asked)], *rows])


RIGHT = """
A number is right if it is within 1e-5 (float32), 1e-12 (float64) or 1e-2 (bfloat16) of the truth,
relative to the number itself or, for the gradient of logits, to the largest of its row. The first
two are the golden file's own. That is about a hundred roundings in float32, thousands in float64
and two in bfloat16. A cell with three numbers gives them for inputs of these three dtypes. Ordinary
cases are far from certainty; the others (P near 1, logits that lead by 30 or 80 nats) ask whether
the limits come out.
From logits, an implementation is judged by the cases whose L_SFT covers the tokens that its own
covers: the response, or prompt and response (full). "Both" stands for all cases: ours is given the
weights of the tokens, and the others with this word agree with neither kind.
"""
ENDS = """
The first t at which a number is wrong, and the first at which it is NaN, or infinite where the
truth is finite. The other response has P = 1/2. t goes from 0.5 to 1e-40 in the first two columns
of the first table, from 1 to 1e6 in the third, and from 1 to 1000 nats in the second table.
"Throughout" for float64 inputs means that the code computes in float32 whatever it is given.
Log-probabilities in bfloat16 are a question to the function alone: Liger and LLaMA-Factory compute
them in float32 from logits of any dtype. Logits in bfloat16 reach TRL from a model that was loaded
in bfloat16.
"""
CHOICES = """
Each answer is read from the loss and its gradient, by calling the function. a = log P_w and
b = log P_l. The inputs are float64 where nothing else is said. m is the number of tokens of the
chosen response; its prompt has two, and two rows of padding follow. "Metric" is the number whose
name says log odds ratio. Where it is -0.2877, the mean log sigmoid of the log odds ratio is logged
under that name, as TRL does; ours keeps TRL's name and meaning.
"""


def report(chosen: list[Implementation]) -> str:
    """All tables, as Markdown."""
    levels = [level for level in LEVELS if any(one.level == level for one in chosen)]
    parts = [f"## Golden vectors, version {VERSION}", RIGHT]
    parts += [scores(chosen, level) for level in levels]
    parts += ["## Where the numbers end", ENDS, *(breaks(chosen, level) for level in levels)]
    parts += ["## Choices and differences", CHOICES, quirks(chosen)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


# ---------------------------------------------------------------------------------------------
# The figure of --plot: the gradient as a response becomes certain.

GREY, GREEN, RED, BLUE = "#808080", "#2a9d5c", "#d1495b", "#3d7ebf"
CERTAIN = 1e-13  # where the axis shows P_w = 1


def at_distance(distance: float) -> Case:
    """P_w = 1 - distance, P_l = 0.9."""
    logps = (torch.tensor([math.log1p(-p)], dtype=torch.float64) for p in (distance, 0.1))
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
    marked = [*range(0, last, 4), last]
    looks = (
        ("TRL", RED, {"lw": 3}),
        ("Liger", BLUE, {"lw": 1.5, "ls": (0, (2, 2))}),
        ("ours", GREEN, {"ls": "", "marker": "o", "ms": 3, "markevery": marked}),
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

    distances = [10 ** (-1 - i / 16) for i in range(16 * 11 + 1)]
    xs, cases = [*distances, CERTAIN], [*map(at_distance, distances), at_distance(0.0)]
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
        ax.axvspan(start, stop, color=RED, alpha=0.12, lw=0)
        text = f"{' and '.join(ends)}: NaN"
        ax.text(0.98, 0.72, text, transform=ax.transAxes, ha="right", color=RED, fontsize=9)


# ---------------------------------------------------------------------------------------------
# The command.


def load(argument: str) -> list[Implementation]:
    """FILE.py:FUNCTION as a row, after ours. Raises ValueError with one sentence."""
    path, _, name = argument.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(
            f"{argument}: FILE.py:FUNCTION is wanted, and {path or argument} is no file"
        )
    first = {level: cases_of(level)[0] for level in LEVELS}
    spec = importlib.util.spec_from_file_location("yours", path)
    if spec is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name)
        level = level_of(function)
        computed(function, first[level], FLOAT32)
    except Exception as error:  # whatever somebody's file may do
        told = " ".join(str(error).split())
        raise ValueError(f"{argument}: {type(error).__name__}: {told:.300}") from error
    ours = [one for one in IMPLEMENTATIONS if (one.project, one.level) == (OURS, level)]
    return [*ours, Implementation(Project(name, "yours", path, ""), function, level, None)]


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n\n")[0])
    parser.add_argument("--implementation", metavar="FILE.py:FUNCTION", help="yours, beside ours")
    parser.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=HERE / "results" / f"{datetime.date.today()}-conformance.md",
        help="write the tables there too (without a value: into conformance/results)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--summary", action="store_true", help="only the tables of the page")
    instead.add_argument("--plot", type=Path, help="only the figure, SVG or PNG, into this file")
    args = parser.parse_args()
    try:
        chosen = load(args.implementation) if args.implementation else IMPLEMENTATIONS
        missing = {one.name for one in chosen if one.project.version == "missing"}
        if missing and not args.implementation:
            raise ValueError(
                f"{' and '.join(sorted(missing))} missing; `make conformance` installs it"
            )
        if args.plot:
            draw(args.plot)
            print(f"wrote {args.plot}")
            return
        if args.summary:
            tables = "\n".join([summary(chosen), sources(chosen), quirks(chosen)])
        else:
            tables = report(chosen)
        text = f"{head(torch.get_num_threads())}\n{tables}"
        print(text)
        if args.out:
            write(text, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
