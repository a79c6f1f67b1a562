"""Shared by the comparisons: runs that are kept, intervals, verdicts, tables."""

import concurrent.futures
import json
import multiprocessing
import os
from pathlib import Path

import torch
from torch import Tensor

from tools.report import table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "evidence.md"
PUBLISHED = ROOT / "docs" / "evidence"  # figures, tables and numbers of the page


def pool(n: int):
    """n processes, each for one run after another; a thread each is fastest at these sizes."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(n, mp_context=context)


def kept(file: Path, key, make, *arguments) -> dict:
    """make(*arguments), from the file where an earlier call with the same key has left it."""
    key = json.loads(json.dumps(key))
    if file.is_file() and (old := json.loads(file.read_text())).pop("key") == key:
        return old
    result = make(*arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(result | {"key": key}))
    os.replace(temporary, file)
    return result


# ---------------------------------------------------------------------------------------------
# Intervals and verdicts.

YES, NO, OPEN = "yes", "no", "not shown"


def resampled(values: Tensor, n: int = 2000, seed: int = 0) -> Tensor:
    """(n, ...): means over the first axis, of `values` (questions, ...), by bootstrap.

    Row 0 is the mean itself. What is compared is resampled together, which makes it paired.
    """
    size, generator = len(values), torch.Generator().manual_seed(seed)
    drawn = torch.randint(size, (n, size), generator=generator)
    counts = torch.zeros(n, size, dtype=torch.double)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))
    counts[0] = 1
    return (counts @ values.double().reshape(size, -1) / size).reshape(n, *values.shape[1:])


def verdict(differences: list[Tensor]) -> str:
    """Of differences that should all be above 0, each (resamples, seeds) with the measured first.

    yes: every interval is above 0 and so is every seed's own value; no: some interval is below 0.
    """
    ends = [interval(x) for x in differences]
    if any(high < 0 for _, high in ends):
        return NO
    each_seed = all(bool((x[0] > 0).all()) for x in differences)
    return YES if each_seed and all(low > 0 for low, _ in ends) else OPEN


def interval(x: Tensor) -> tuple[float, float]:
    """The 95% interval of the mean over seeds, from (resamples, seeds)."""
    low, high = x.mean(1).quantile(torch.tensor([0.025, 0.975], dtype=x.dtype)).tolist()
    return low, high


def text(x: Tensor, digits: int = 3, sign: str = "+") -> str:
    """Mean over seeds [interval] of (resamples, seeds)."""
    low, high = interval(x)
    return (
        f"{x[0].mean().item():{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    )


def claims_table(claims: dict, judged: dict) -> str:
    """Of {claim: (what is claimed, yes if, no if)} and {claim: (verdict, figures)}."""
    rows = [["claim", "yes if", "no if", "came out", "figures"]]
    for key, words in claims.items():
        came_out, figures = judged[key]
        rows.append([*words, f"**{came_out}**", figures])
    return table(rows)


def write_into(page: Path, name: str, content: str):
    """Replaces what stands between <!-- name --> and <!-- /name --> on a page."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{page}: the marks {start.strip()} and {end} are missing")
    page.write_text(before + start + content + end + after, encoding="utf-8")
