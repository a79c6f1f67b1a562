"""The figure of bench/conformance.py --plot: what becomes of the gradient at certainty."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.golden import Case, computed, truth, with_lead
from bench.implementations import liger, liger_pairs, ours, ours_pairs, trl, trl_pairs

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
    ends = panel(left, xs, cases, (trl_pairs, liger_pairs, ours_pairs), read)
    left.set(xscale="log", xlim=(0.1, CERTAIN), ylim=(-11, 0), xlabel="1 - P_w,  P_l = 0.9")
    left.set_xticks([10.0**-k for k in range(1, 12, 2)] + [CERTAIN])
    left.set_xticklabels([f"1e-{k}" for k in range(1, 12, 2)] + ["0"])
    left.minorticks_off()
    left.set_title("dL_OR / dlog P_w, float32", fontsize=10, color=GREY)
    shade(left, ends, CERTAIN)
    left.legend(frameon=False, fontsize=9, loc="upper left")

    leads = [5 + i / 2 for i in range(191)]
    for which in ("rejected", "chosen"):
        cases = [with_lead(lead, which) for lead in leads]
        rows = slice(0, 2) if which == "chosen" else slice(2, 4)
        read = lambda grad, rows=rows: grad[rows].norm().item()  # noqa: E731
        ends = panel(right, leads, cases, (trl, liger, ours), read)
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
