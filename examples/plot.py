"""Draws a run from its metrics.jsonl: log-probabilities, log odds ratio, and the loss's terms.

python examples/plot.py OUT [OUT ...] [--save FILE.svg]     (needs matplotlib, requirements-dev.txt)
"""

import argparse
import json
import sys
from pathlib import Path

GREY = "#808080"  # readable on white and on black, as is no background at all
CHOSEN, REJECTED, OTHER = "#2a9d5c", "#d1495b", "#3d7ebf"


def read(out: Path) -> list[dict]:
    """The training rows of a run. Raises FileNotFoundError, ValueError."""
    file = out / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; train.py writes it into its --out")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    if not rows:
        raise ValueError(f"{file}: no training step in it")
    return rows


def smooth(values: list[float], width: int = 9) -> list[float]:
    """A moving mean over the last `width` steps (fewer at the start)."""
    parts = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def draw(runs: dict[str, list[dict]], file: Path):
    """Three panels, a colour a metric and a line style a run, as SVG or PNG by the file's name."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    matplotlib.rcParams |= {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
        **{"axes.edgecolor": GREY, "grid.color": GREY, "grid.alpha": 0.25, "axes.grid": True},
        **{"svg.hashsalt": "orpo", "font.size": 10, "axes.spines.top": False},
        **{"axes.spines.right": False},
    }
    import matplotlib.pyplot as plt

    panels = (
        (
            "mean log-probability of a token",
            (("logps/chosen", CHOSEN), ("logps/rejected", REJECTED)),
        ),
        ("log odds ratio", (("log_odds_chosen", OTHER),)),
        ("loss terms", (("nll_loss", CHOSEN), ("log_odds_ratio", OTHER))),
    )
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for ax, (title, curves) in zip(axes, panels, strict=True):
        for name, colour in curves:
            for style, (run, rows) in zip(("-", "--", ":", "-."), runs.items(), strict=False):
                steps, values = [r["step"] for r in rows], [r[name] for r in rows]
                label = name if len(runs) == 1 else f"{name}, {run}"
                if (
                    name == "log_odds_ratio"
                ):  # TRL's name for the mean log-sigmoid; L_OR is its minus
                    label, values = label.replace(name, "L_OR"), [-v for v in values]
                ax.plot(steps, values, color=colour, alpha=0.2, lw=0.8)
                ax.plot(steps, smooth(values), style, color=colour, label=label, lw=1.8)
        ax.set_title(title, fontsize=10, color=GREY)
        ax.set_xlabel("step")
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(file, transparent=True, metadata={"Date": None} if file.suffix == ".svg" else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="+", type=Path, help="folder of a run, at most four")
    parser.add_argument("--save", type=Path, help="SVG or PNG (default: OUT/curves.svg)")
    args = parser.parse_args()
    try:
        runs = {out.name: read(out) for out in args.out[:4]}
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
    file = args.save or args.out[0] / "curves.svg"
    draw(runs, file)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
