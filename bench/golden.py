"""The golden vectors as cases, what is true of them, and the judgement of a function's numbers.

A number is right within 1e-4 in float32, 1e-10 in float64 and 1e-2 in bfloat16, relative to itself
or, for the gradient of logits, to the largest of its row. That is a thousand roundings in float32,
a million in float64 and two in bfloat16: any sensible order of operations passes, a lost term does
not. Golden inputs are exact in float32; in bfloat16 they are rounded first, and the truth is
tests/oracle.py's for the rounded ones.
"""

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import oracle

from bench.implementations import Batch, Side

GOLDEN = Path(oracle.__file__).with_name("golden") / "orpo.json"
LN2 = math.log(2)
RTOL = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    kind: str  # "ordinary", "edge" or "convention", as in the golden file
    inputs: tuple[Tensor, Tensor]  # log-probabilities (1,), or logits (B, T, V); float64
    batch: Batch | None = None  # what is around the logits
    sft: str = ""  # "response" or "full"
    golden: tuple[float, Tensor] | None = None  # the value; the gradient as rows (n, V or 1)


def golden_cases() -> dict[str, list[Case]]:
    """tests/golden/orpo.json, by level. Its head says what the fields are."""
    file = json.loads(GOLDEN.read_text(encoding="utf-8"))

    def tensor(x):
        return torch.tensor(x, dtype=torch.float64)

    pairs = []
    for p in file["pairs"]:
        inputs = tensor([p["chosen_logp"]]), tensor([p["rejected_logp"]])
        rows = tensor([[float(p["l_or_d_chosen"])], [float(p["l_or_d_rejected"])]])
        pairs.append(Case(p["kind"], inputs, golden=(float(p["l_or"]), rows)))
    logits = []
    for c in file["logits"]:
        chosen, rejected = (
            side(s["logits"], s["targets"], s["response_mask"])
            for s in (c["chosen"], c["rejected"])
        )
        batch = Batch(chosen, rejected, c["lam"], tensor(c["chosen"]["nll_weight"]), len(c["l_or"]))
        rows = torch.cat([tensor(c[s]["grad"]).flatten(0, 1) for s in ("chosen", "rejected")])
        inputs = chosen.logits, rejected.logits
        logits.append(Case(c["kind"], inputs, batch, c["sft_loss"], (float(c["loss"]), rows)))
    return {"pairs": pairs, "logits": logits}


def side(logits, targets, response) -> Side:
    """From lists. What stands behind the last response row is padding."""
    response = torch.tensor(response)
    real = response.flip(1).cummax(1).values.flip(1)
    logits = torch.tensor(logits, dtype=torch.float64)
    return Side(logits, torch.tensor(targets), response.bool(), real.bool())


def with_logits(batch: Batch, inputs) -> Batch:
    chosen, rejected = (s._replace(logits=x) for s, x in zip(batch[:2], inputs, strict=True))
    return batch._replace(chosen=chosen, rejected=rejected)


@functools.cache  # a case is made once, and its tensors are hashed by identity
def truth(case: Case, dtype: torch.dtype) -> tuple[float, Tensor]:
    """The value, and the gradient as rows: the golden file's where it holds these very inputs."""
    rounded = [x.to(dtype).double() for x in case.inputs]
    if case.golden and all(map(torch.equal, rounded, case.inputs)):
        return case.golden
    if case.batch is None:
        w, l = (x.item() for x in rounded)
        rows = [[float(d)] for d in oracle.l_or_grad(w, l)]
        return float(oracle.l_or(w, l)), torch.tensor(rows, dtype=torch.float64)
    batch = with_logits(case.batch, rounded)
    branches = []
    for s in batch[:2]:
        fields = s.logits, s.targets, s.response.long()
        branches.append(list(zip(*(x.tolist() for x in fields), strict=True)))
    out = oracle.orpo_from_logits(*branches, batch.lam, batch.nll_weight.tolist())
    grads = [branch for name in ("chosen_grad", "rejected_grad") for branch in out[name]]
    rows = [[float(x) for x in row] for branch in grads for row in branch]
    return float(out["loss"]), torch.tensor(rows, dtype=torch.float64)


def computed(function: Callable, case: Case, dtype: torch.dtype) -> tuple[float, Tensor]:
    """The same two by an implementation."""
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs]
    value = function(*inputs) if case.batch is None else function(with_logits(case.batch, inputs))
    if not isinstance(value, Tensor):
        raise TypeError(f"a tensor is wanted, not {value!r:.60}")
    grads = torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)
    width = 1 if case.batch is None else inputs[0].shape[-1]
    return value.sum().item(), torch.cat([g.double().reshape(-1, width) for g in grads])


@functools.cache  # so that the truth of a case is worked out once
def near_certainty(t: float, which: str) -> Case:
    """log P is -t for one response and ln 1/2 for the other."""
    x, half = (torch.tensor([-y], dtype=torch.float64) for y in (t, LN2))
    return Case("edge", (x, half) if which == "chosen" else (half, x))


@functools.cache
def with_lead(t: float, which: str) -> Case:
    """One pair of two tokens each, lam 1; the targets of one response lead by t nats, or by -t."""
    leading = [[0.5 + t, -1.0, 0.0, 0.5], [0.0, 0.25 + t, -0.5, 0.25]]
    plain = [[1.0, -1.0, 0.0, 0.5], [0.0, 1.5, -0.5, 0.25]]
    logits = [leading if name == which else plain for name in ("chosen", "rejected")]
    w, l = (side([x], targets=[[0, 1]], response=[[1, 1]]) for x in logits)
    batch = Batch(w, l, 1.0, torch.full((1, 2), 0.5, dtype=torch.float64), 1)
    return Case("edge", (w.logits, l.logits), batch)


# ---------------------------------------------------------------------------------------------
# The comparison.


class Verdict(NamedTuple):
    value: bool
    gradient: bool
    lost: bool  # NaN or inf where the truth is finite


def agrees(got: Tensor, true: Tensor, dtype: torch.dtype) -> bool:
    """Rows (n, m) by the golden file's rule: within RTOL of the row's largest; inf where it is."""
    limit = torch.finfo(dtype)
    infinite = true.abs() > limit.max
    scale = true.abs().where(~infinite, 0).amax(1, keepdim=True)
    close = (got - true).abs() <= RTOL[dtype] * scale + limit.tiny
    return bool(torch.where(infinite, got.isinf() & (got.sign() == true.sign()), close).all())


def judge(function: Callable, case: Case, dtype: torch.dtype) -> Verdict:
    (value, grad), (true_value, true_grad) = computed(function, case, dtype), truth(case, dtype)
    value, true_value = (torch.tensor([[x]], dtype=torch.float64) for x in (value, true_value))
    got, true = (
        torch.cat([v.flatten(), g.flatten()]) for v, g in ((value, grad), (true_value, true_grad))
    )
    if case.kind == "convention":  # there is no limit; only NaN is wrong
        ok = bool(not value.isnan()), not grad.isnan().any().item()
        return Verdict(*ok, not all(ok))
    lost = (~got.isfinite() & (true.abs() <= torch.finfo(dtype).max)).any()
    right = agrees(value, true_value, dtype), agrees(grad, true_grad, dtype)
    return Verdict(*right, bool(lost))
