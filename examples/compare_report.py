"""What `compare.py` found: verdicts on the paper's claims, tables, figures.

A verdict is a function of the measured figures alone and can come out either way. It asks for more
than chance: see `clear`. The paper's own numbers are of other models and other data, so what is
compared is which way a thing goes.
"""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from plot import CHOSEN, GREY, OTHER, REJECTED, style

SFT, DPO, RATIO = "SFT", "SFT then DPO", "ratio, lam 0.5"
ORPO = {lam: f"ORPO, lam {lam}" for lam in (0.1, 0.5, 1.0)}
ONCE = f"{DPO}, reference once"  # its log-probabilities computed before training, then let go


class Verdict(NamedTuple):
    claim: str
    reproduced: bool
    figures: str

    def __str__(self):
        return f"{'REPRODUCED' if self.reproduced else 'NOT REPRODUCED'}: {self.claim}"


def clear(differences: list[float]) -> bool:
    """Above 0 with every seed, and their mean by more than two standard errors."""
    n, mean = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else 0.0
    return min(differences) > 0 and mean > 2 * error


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def last(runs: list[dict], name: str) -> list[float]:
    """At the end of training, a value a seed."""
    return [run["curve"][-1][name] for run in runs]


def change(runs: list[dict], name: str) -> list[float]:
    return [run["curve"][-1][name] - run["curve"][0][name] for run in runs]


def less(a: list[float], b: list[float]) -> list[float]:
    """a - b, seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


def at_each_lr(results: dict, text) -> str:
    """text(lr) for every learning rate of the sweep, which has one seed."""
    return "; ".join(f"{lr}: {text(lr)}" for lr in results["sweep"][SFT])


def swept(results: dict, method: str, lr: str, name: str) -> float:
    return results["sweep"][method][lr]["curve"][-1][name]


def sft_raises_both(results: dict) -> Verdict:
    """Fig. 3: after SFT on the chosen alone, both are likelier than before."""
    runs = results["runs"][SFT]
    up = {name: change(runs, name) for name in ("chosen", "rejected", "near")}
    highest = [max(row["rejected"] - run["curve"][0]["rejected"] for row in run["curve"])
               for run in runs]  # fmt: skip
    start = runs[0]["curve"][0]["rejected"]
    tried = at_each_lr(results, lambda lr: f"{swept(results, SFT, lr, 'rejected') - start:+.3f}")
    return Verdict(
        "SFT raises the log-probabilities of chosen and of rejected (Fig. 3)",
        clear(up["chosen"]) and clear(up["rejected"]),
        f"Change of chosen {spread(up['chosen'])}, of rejected {spread(up['rejected'])} (at its "
        f"highest on the way {spread(highest)}; of rejected answers that begin as the chosen do "
        f"{spread(up['near'])}). Rejected at each learning rate of the sweep: {tried}",
    )


def orpo_separates(results: dict) -> Verdict:
    """Fig. 7, at the lam of 1.0 that it has: the rejected fall and the chosen do not."""
    runs, sft = results["runs"][ORPO[1.0]], results["runs"][SFT]
    chosen, rejected = change(runs, "chosen"), change(runs, "rejected")
    wider = less(last(runs, "margin"), last(sft, "margin"))
    others = "; ".join(
        f"lam {lam}: {spread(change(results['runs'][ORPO[lam]], 'chosen'))} and "
        f"{spread(change(results['runs'][ORPO[lam]], 'rejected'))}"
        for lam in (0.1, 0.5)
    )
    return Verdict(
        "ORPO separates them: chosen stay or rise, rejected fall, and further than by SFT (Fig. 7)",
        clear([-x for x in rejected]) and not clear([-x for x in chosen]) and clear(wider),
        f"Lam 1.0: change of chosen {spread(chosen)}, of rejected {spread(rejected)}; less SFT's, "
        f"rejected {spread(less(last(runs, 'rejected'), last(sft, 'rejected')))} and margin "
        f"{spread(wider)}. {others}",
    )


def ratio_over_suppresses(results: dict) -> Verdict:
    """Sec. 7.1, by more than a tenth of ORPO's margin: less is no over-suppression."""
    ratio, odds = (last(results["runs"][m], "rejected") for m in (RATIO, ORPO[0.5]))
    lower, margin = less(odds, ratio), statistics.mean(last(results["runs"][ORPO[0.5]], "margin"))

    def both(lr: str) -> str:
        return " and ".join(f"{swept(results, m, lr, 'rejected'):.3f}" for m in (RATIO, ORPO[0.5]))

    return Verdict(
        "the probability ratio pushes the rejected lower than the odds ratio does, by more than a "
        "tenth of the latter's margin (Sec. 7.1)",
        clear(lower) and statistics.mean(lower) > margin / 10,
        f"Rejected at the end {spread(ratio)} by ratio (beta {results['ratio_beta']:g}), "
        f"{spread(odds)} by odds, lower by {spread(lower)}. Both at equal learning rates: "
        + at_each_lr(results, both),
    )


def larger_lam_widens(results: dict) -> Verdict:
    """App. E: the margin at lam 0.1, 0.5 and 1.0, each at its own best learning rate."""
    margins = {lam: last(results["runs"][name], "margin") for lam, name in ORPO.items()}
    gains = less(margins[0.5], margins[0.1]), less(margins[1.0], margins[0.5])

    def row(lr: str) -> str:
        return " < ".join(f"{swept(results, m, lr, 'margin'):.3f}" for m in ORPO.values())

    equal = [all(swept(results, ORPO[b], lr, "margin") > swept(results, ORPO[a], lr, "margin")
                 for a, b in ((0.1, 0.5), (0.5, 1.0))) for lr in results["sweep"][SFT]]  # fmt: skip
    return Verdict(
        "a larger lam widens the margin (App. E)",
        all(map(clear, gains)),
        "Margins: "
        + "; ".join(f"lam {lam} {spread(x)}" for lam, x in margins.items())
        + f". In this order at {sum(equal)} of {len(equal)} equal learning rates of the sweep: "
        + at_each_lr(results, row).replace(" < ", ", "),
    )


def cost_of(results: dict, name: str) -> dict:
    """Medians over all processes that measured it; times in ms, memory in MB (2^20)."""
    parts = results["cost"][name]
    seconds = [1000 * s for part in parts for s in part["seconds"]]
    low, middle, high = statistics.quantiles(seconds, n=4)
    cpu = statistics.median(1000 * s for part in parts for s in part["cpu_seconds"])
    found = {"ms": middle, "low": low, "high": high, "cpu": cpu}
    for key in ("responses", "tokens", "once"):
        found[key] = statistics.median(part[key] for part in parts)
    for key in ("tensor", "process", "weight"):
        found[key] = statistics.median(part[f"{key}_bytes"] for part in parts) / 2**20
    return found


def half_the_forward_passes(results: dict) -> Verdict:
    """Sec. 7.3: counted passes and tensors of a step, DPO's with its reference in every step."""
    orpo, sft, dpo, once = (cost_of(results, name) for name in (ORPO[0.5], SFT, DPO, ONCE))
    return Verdict(
        "without a reference model: half of DPO's forward passes, less memory (Sec. 7.3)",
        abs(dpo["responses"] / orpo["responses"] - 2) < 0.02 and orpo["tensor"] < dpo["tensor"],
        f"Forward passes a pair {orpo['responses']:.2f}, DPO's {dpo['responses']:.2f} (with SFT's "
        f"half of the run {(sft['responses'] + dpo['responses']) / 2:.2f}); tensors at "
        f"the peak {orpo['tensor']:.1f} and {dpo['tensor']:.1f} MB (the reference's weights are "
        f"{orpo['weight']:.1f}); CPU ms a step {orpo['cpu']:.0f} and {dpo['cpu']:.0f}, which "
        f"is {dpo['cpu'] / orpo['cpu']:.2f} times, as the backward pass is the same. With the "
        f"reference's log-probabilities computed once: {once['responses']:.2f} and "
        f"{once['once']:.2f} before training, {once['tensor']:.1f} MB, {once['cpu']:.0f} ms",
    )


def less_alike_across_inputs(results: dict) -> Verdict:
    """Tab. 4, both of its halves."""
    figures = {
        name: [[run[name] for run in results["runs"][m]] for m in (ORPO[0.5], DPO)]
        for name in ("AID", "PID", "AID raw", "PID raw")
    }
    text = "; ".join(f"{name} {spread(a)} and {spread(b)}" for name, (a, b) in figures.items())
    aid, pid = clear(less(*figures["AID"][::-1])), clear(less(*figures["PID"]))
    return Verdict(
        "ORPO's answers are less alike across inputs (AID) than DPO's, more for one (PID) (Tab. 4)",
        aid and pid,
        f"AID alone: {'yes' if aid else 'no'}; PID alone: {'yes' if pid else 'no'}. "
        f"ORPO (lam 0.5) and SFT then DPO: {text}. The chosen answers themselves: "
        + ", ".join(f"{name} {x:.3f}" for name, x in results["chosen answers"].items()),
    )


def better_than_sft(results: dict) -> Verdict:
    """Where answers can be checked by the share accepted, else by reward accuracy."""
    checked = "sampled" in results["runs"][SFT][0]

    def share(method: str) -> list[float]:
        runs = results["runs"][method]
        return accepted(runs, "sampled") if checked else last(runs, "accuracy")

    gain = less(share(ORPO[0.5]), share(SFT))
    others = "; ".join(f"{m} {spread(share(m))}" for m in results["sweep"])
    return Verdict(
        "ORPO does better than SFT (Tab. 1 to 3, by judges)",
        clear(gain),
        (
            "sampled answers accepted: "
            if checked
            else "reward accuracy, as nobody can check answers: "
        )
        + f"{others}; lam 0.5 over SFT {spread(gain)}",
    )


VERDICTS = (sft_raises_both, orpo_separates, ratio_over_suppresses, larger_lam_widens,
            half_the_forward_passes, less_alike_across_inputs, better_than_sft)  # fmt: skip


def win_rate(a: list[list[bool]], b: list[list[bool]]) -> float:
    """Of a over b: an accepted answer beats one that is not; else each gets 1/2."""
    pairs = [p for x, y in zip(a, b, strict=True) for p in zip(x, y, strict=True)]
    return statistics.mean(0.5 + (x - y) / 2 for x, y in pairs)


def accepted(runs: list[dict], name: str) -> list[float]:
    return [statistics.mean(hit for question in run[name] for hit in question) for run in runs]


def table(rows: list[list]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def as_markdown(results: dict, verdicts: list[Verdict]) -> str:
    """The README.md of a comparison, top to bottom: what ran, the tables, the verdicts."""
    task, machine, runs = results["task"], results["machine"], results["runs"]
    seconds, checked, lrs = results["seconds"], task["checked"], results["lr"]
    text = [
        "# SFT, DPO, ORPO, and the probability ratio\n",
        f"Base model `{task['model']}`, pairs `{task['train']}`, {task['steps']} updates of "
        f"{task['batch_size']} pairs for every method ({DPO}: half of them for each phase, "
        f"beta {results['dpo_beta']:g}; the ratio's beta {results['ratio_beta']:g}). Means and "
        f"standard deviations over the seeds {', '.join(map(str, task['seeds']))}, at the best of "
        f"{len(task['lrs'])} learning rates (the same for all, one seed, chosen by "
        + ("answers to" if checked else "each method's own loss on")
        + " training pairs held out for that). `examples/compare.py` wrote this file.\n",
        f"`{machine['command']}`, {machine['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"Python {machine['python']}, torch {machine['torch']}. It took "
        f"{seconds['by the clock']:.0f} s by the clock; the runs, two at a time, add up to "
        f"{seconds['all runs, added up']:.0f} s.\n",
        "## The paper's claims\n",
        "Reproduced means: the same sign with every seed, and by more than two standard errors.\n",
        *(f"{i}. **{verdict}.** {verdict.figures}.\n" for i, verdict in enumerate(verdicts, 1)),
        "## Held out, after training\n",
    ]
    shares = ["accepted, sampled", "accepted, greedy"] if checked else []
    names = ["chosen", "rejected", "margin"]
    similar = ["PID", "AID", "PID raw", "AID raw"]
    rows = [["method", "lr", *shares, "reward accuracy", *names, *similar]]
    for method, found in runs.items():
        row = [method, f"{lrs[method]:g}" if method in lrs else ""]
        row += [spread(accepted(found, name)) for name in ("sampled", "greedy")[: len(shares)]]
        row += [spread(last(found, name)) for name in ("accuracy", *names)]
        rows.append(row + [spread([run[name] for run in found]) for name in similar])
    text += [
        table(rows),
        "Log-probabilities are means over a response's tokens, for every method; reward accuracy "
        "is the share of pairs whose chosen one is the higher. PID and AID (Eq. 12 to 15, lower is "
        f"more diverse): mean pairwise cosine of the {results['k']} answers to a question, and of "
        "one answer each to all questions. The paper embeds answers by Gemini; here an embedding "
        "is the base model's last hidden state, a mean over the answer's tokens, which is more of "
        "wording and subject than of meaning. In PID and AID the mean embedding of the held-out "
        "pairs' own answers, the same for all, is taken off first: raw, all cosines are high.\n",
    ]
    if checked:
        rows = [["win rate of ... over", *task["methods"]]]
        for a in task["methods"]:
            row = [a]
            for b in task["methods"]:
                both = zip(runs[a], runs[b], strict=True)
                row.append(
                    ""
                    if a == b
                    else spread([100 * win_rate(x["sampled"], y["sampled"]) for x, y in both], 1)
                )
            rows.append(row)  # fmt: skip
        text += ["Win rates in %, sampled answers, by the checker (ties 1/2):\n", table(rows)]
    rows = [["method", "ms a step (quartiles)", "CPU ms", "forward passes a pair", "tokens a pair",
             "tensors at the peak, MB", "process grows by, MB"]]  # fmt: skip
    for name in results["cost"]:
        c = cost_of(results, name)
        passes = f"{c['responses']:.2f}" + (f" + {c['once']:.2f} once" if name == ONCE else "")
        numbers = (f"{c[key]:.1f}" for key in ("tokens", "tensor", "process"))
        time = f"{c['ms']:.0f} ({c['low']:.0f} to {c['high']:.0f})"
        rows.append([name, time, f"{c['cpu']:.0f}", passes, *numbers])
    ends = task["lrs"][0], task["lrs"][-1]
    edge = [m for m, lr in lrs.items() if lr in ends and len(task["lrs"]) > 1]
    text += [
        "## What a step costs\n",
        table(rows),
        f"Each in three processes of its own, alone, one thread; of {DPO} the second phase (the "
        "first is SFT's). A forward pass is one response with its prompt, counted where it enters "
        "the model; the packed layout computes a prompt once for both of its responses, so tokens "
        "say more about time. Tensors: the peak of one step by torch's MemTracker, with weights, "
        "gradients and Adam's moments. Process: how far its largest resident size came above that "
        "with model and pairs loaded; PyTorch's own buffers are a part of it.\n",
        "## The sweep\n",
        table([["score at lr", *results["sweep"][SFT]]]
              + [[m, *(f"**{x['score']:.3f}**" if float(lr) == lrs[m] else f"{x['score']:.3f}"
                       for lr, x in by_lr.items())] for m, by_lr in results["sweep"].items()]),
        ("Share of accepted answers, sampled once" if checked else "Minus the method's own loss")
        + " (the best in bold; of equals the smallest rate). "
        + (f"Best at an end of the grid, perhaps beyond: {', '.join(edge)}.\n" if edge else "\n"),
        "![log-probabilities of chosen and rejected through training](logps.svg)\n",
        "![margin for lam 0.1, 0.5 and 1.0 through training](margin.svg)",
    ]  # fmt: skip
    return "\n".join(text) + "\n"


def draw(results: dict, folder: Path):
    """logps.svg: a panel a method, a line a seed. margin.svg: ORPO's lam."""
    plt = style("svg")
    panels = {SFT: "SFT", DPO: "SFT, then DPO", ORPO[0.5]: "ORPO, lam 0.5",
              RATIO: "probability ratio, lam 0.5"}  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(8.4, 2.7), sharey=True, layout="constrained")
    for ax, (method, title) in zip(axes, panels.items(), strict=True):
        for name, colour, line in (("chosen", CHOSEN, "-"), ("rejected", REJECTED, "--")):
            for run in results["runs"][method]:
                steps = [row["step"] for row in run["curve"]]
                ax.plot(steps, [row[name] for row in run["curve"]], line, color=colour, lw=1.1)
            ax.plot([], [], line, color=colour, label=name)
        if method == DPO:
            ax.axvline(results["task"]["steps"] // 2, color=GREY, lw=0.8, ls=":")
        ax.set_title(title, fontsize=10, color=GREY)
        ax.set_xlabel("step")
    axes[0].set_ylabel("log-probability of a token")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(folder / "logps.svg", transparent=True, metadata={"Date": None})

    figure, ax = plt.subplots(figsize=(5, 3.1), layout="constrained")
    for (lam, method), colour in zip(ORPO.items(), (OTHER, CHOSEN, REJECTED), strict=True):
        for run in results["runs"][method]:
            steps = [row["step"] for row in run["curve"]]
            ax.plot(steps, [row["margin"] for row in run["curve"]], color=colour, lw=1.1)
        ax.plot([], [], color=colour, label=f"lam {lam}, lr {results['lr'][method]:g}")
    ax.set_title("log P(chosen) - log P(rejected), held out", fontsize=10, color=GREY)
    ax.set_xlabel("step")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(folder / "margin.svg", transparent=True, metadata={"Date": None})


def write_report(results: dict, folder: Path):
    """README.md, results.json with the verdicts, and two figures; prints the verdicts."""
    verdicts = [judge(results) for judge in VERDICTS]
    folder.mkdir(parents=True, exist_ok=True)
    for verdict in verdicts:
        print(f"{verdict}\n    {verdict.figures}")
    results |= {"verdicts": [verdict._asdict() for verdict in verdicts]}
    (folder / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(as_markdown(results, verdicts), encoding="utf-8")
    draw(results, folder)
    print(f"wrote {folder}/README.md, results.json, logps.svg, margin.svg")
