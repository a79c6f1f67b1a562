"""Draws runs from their metrics.jsonl: log-probabilities, margin, accuracy, and the loss's terms.

python -m tools.plot OUT [OUT ...] [--save FILE.svg]     (needs matplotlib)

One run has a colour for each metric; several have a colour for each run, and where their
evaluations asked questions, the share of accepted answers in place of the terms of the loss.
Faint lines are training steps, bold ones their moving mean, dots the held-out pairs, joined by a
line. A run that was evaluated at three steps or more has its bold lines through the dots.

A table has the last evaluation of each run, in numbers that do not contain lam: runs of different
lam have different losses, so the lowest eval_loss is not the best run.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from run.flags import read_settings
from run.folder import read_rows

GREY = "#808080"  # readable on white and on black, as is no background at all
CHOSEN, REJECTED, OTHER = "#2a9d5c", "#d1495b", "#3d7ebf"
RUNS = (OTHER, "#d17b1f", CHOSEN, "#a05fb4")
BOLD = 1.8  # width of a line; its dashes grow with it


def read(out: Path) -> list[dict]:
    """The rows of a run, also of one that is going or was killed. Raises FileNotFoundError,
    ValueError."""
    file = out / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; train.py writes it into its --out")
    rows = read_rows(out)
    if not any("loss" in row for row in rows):
        raise ValueError(f"{file}: no training step in it")
    return rows


def smooth(values: list[float], width: int = 9) -> list[float]:
    """A moving mean over the last `width` steps (fewer at the start)."""
    parts = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def style(backend: str):
    """matplotlib.pyplot, set to what reads well in a README in light and in dark mode."""
    import matplotlib

    matplotlib.use(backend)
    matplotlib.rcParams |= {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
        **{"axes.edgecolor": GREY, "grid.color": GREY, "grid.alpha": 0.25, "axes.grid": True},
        **{"svg.hashsalt": "orpo", "font.size": 10, "axes.spines.top": False},
        **{"axes.spines.right": False},
    }
    import matplotlib.pyplot as plt

    return plt


# Panels: a title, and curves of (label, how a training row gives it, line style, colour if alone).
# log_odds_ratio is TRL's name for the mean log-sigmoid: L_OR is its minus.
PANELS = (
    (
        "mean log-probability of a token",
        (
            ("chosen", lambda row: row["logps/chosen"], "-", CHOSEN),
            ("rejected", lambda row: row["logps/rejected"], "--", REJECTED),
        ),
    ),
    (
        "margin: chosen - rejected",
        (("margin", lambda row: row["logps/chosen"] - row["logps/rejected"], "-", OTHER),),
    ),
    ("reward accuracy", (("accuracy", lambda row: row["rewards/accuracies"], "-", OTHER),)),
    (
        "terms of the loss",
        (
            ("L_SFT", lambda row: row["nll_loss"], "-", CHOSEN),
            ("L_OR", lambda row: -row["log_odds_ratio"], "--", OTHER),
        ),
    ),
)


ANSWERED = "eval_accepted/greedy"
ACCEPTED = (
    "accepted answers, held out",
    (
        ("greedy", lambda row: row["accepted/greedy"], "-", CHOSEN),
        ("sampled", lambda row: row["accepted/sampled"], "--", OTHER),
    ),
)


def draw_curve(ax, value, line: str, colour: str, rows: list[dict], accepted: bool):
    """One curve of one run: its training steps, and its evaluations as dots."""
    held_out = [{k.removeprefix("eval_"): v for k, v in row.items()} for row in rows
                if "eval_loss" in row]  # fmt: skip
    through = accepted or len(held_out) >= 3
    if held_out:
        steps, values = [row["step"] for row in held_out], list(map(value, held_out))
        ax.plot(steps, values, line, marker="o", color=colour, ms=4, lw=BOLD if through else 0.9)
    if accepted:
        return  # training asks no questions
    training = [row for row in rows if "loss" in row]
    steps, values = [row["step"] for row in training], list(map(value, training))
    ax.plot(steps, values, color=colour, alpha=0.15, lw=0.8)
    if not through:
        ax.plot(steps, smooth(values), line, color=colour, lw=BOLD)


def draw(runs: dict[str, list[dict]], file: Path):
    """Four panels as SVG or PNG, by the file's name."""
    plt = style("svg" if file.suffix == ".svg" else "agg")
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 5.2), layout="constrained")
    evaluations = [row for rows in runs.values() for row in rows if "eval_loss" in row]
    asked = len(runs) > 1 and evaluations and all(ANSWERED in row for row in evaluations)
    for ax, (title, curves) in zip(
        axes.flat, (*PANELS[:3], ACCEPTED) if asked else PANELS, strict=True
    ):
        for rows, run_colour in zip(runs.values(), RUNS, strict=False):
            for _, value, line, alone in curves:
                colour = alone if len(runs) == 1 else run_colour
                draw_curve(ax, value, line, colour, rows, accepted=curves is ACCEPTED[1])
        for label, _, line, alone in curves if len(curves) > 1 else ():
            ax.plot([], [], line, color=alone if len(runs) == 1 else GREY, label=label, lw=BOLD)
        ax.set_title(title, fontsize=11, color=GREY)
        legend = {"frameon": False, "fontsize": 9, "handlelength": 3}  # long enough for two dashes
        if curves is ACCEPTED[1]:
            ax.set_ylim(0, 1.15)  # with room for the legend
            ax.legend(loc="upper left", ncols=2, **legend)
        elif len(curves) > 1:
            ax.legend(**legend)
    for ax in axes[1]:
        ax.set_xlabel("step")
    handles = [plt.Line2D([], [], color=c, label=run) for run, c in zip(runs, RUNS, strict=False)]
    handles = handles if len(runs) > 1 else []
    if any("eval_loss" in row for rows in runs.values() for row in rows):
        handles.append(plt.Line2D([], [], color=GREY, marker="o", ls="", label="held out"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, transparent=True, metadata={"Date": None} if file.suffix == ".svg" else {})


COLUMNS = {
    "accuracy": "rewards/accuracies",
    "log odds": "log_odds_chosen",
    "log P chosen": "logps/chosen",
    "rejected": "logps/rejected",
    "nll": "nll_loss",
    "greedy": "accepted/greedy",
    "sampled": "accepted/sampled",
}


def table(outs: dict[str, Path]) -> str:
    """The last evaluation of each run, beside its lam and what its nll covers; "" without any."""
    rows = [["held out", "lam", "SFT over", "step", *COLUMNS]]
    for name, out in outs.items():
        settings = read_settings(out) or {}
        held_out = [row for row in read_rows(out) if "eval_loss" in row]
        last = held_out[-1] if held_out else {}
        about = settings.get("lam", ""), settings.get("sft_loss", ""), last.get("step", "")
        numbers = [last.get(f"eval_{key}") for key in COLUMNS.values()]
        numbers = ["" if x is None else f"{x:.3f}" for x in numbers]
        rows.append([name, *map(str, about), *numbers])
    if not any(row[3] for row in rows[1:]):
        return ""
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in filled]
    lines = []
    for row in rows:
        cells = [f"{row[i]:>{n}}" for i, n in zip(filled, widths, strict=True)]
        cells[0] = f"{row[0]:<{widths[0]}}"
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--save", type=Path, help="SVG or PNG (default: OUT/curves.svg)")
    args = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        how = f"{sys.executable} -m pip install matplotlib"
        print(f"plot.py: matplotlib is not installed: {how}", file=sys.stderr)
        sys.exit(2)
    try:
        names = [out.name for out in args.out]
        same = len(set(names)) < len(names)  # a/run and b/run need their whole paths
        outs = {str(out) if same else out.name: out for out in args.out}
        runs = {name: read(out) for name, out in outs.items()}
        file = args.save or args.out[0] / "curves.svg"
        if file.suffix not in (".svg", ".png"):
            raise ValueError(f"--save {file}: must end in .svg or .png")
        if not file.parent.is_dir():
            raise FileNotFoundError(f"--save {file}: there is no folder {file.parent}")
        draw(dict([*runs.items()][: len(RUNS)]), file)
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
    if text := table(outs):
        print(text)
    left_out = f", with the first {len(RUNS)} runs" if len(runs) > len(RUNS) else ""
    print(f"wrote {file}{left_out}")


if __name__ == "__main__":
    main()
