"""The golden vectors as cases, what is true of them, and what a function is asked besides.

A number is right within 1e-5 in float32 and 1e-12 in float64, as the golden file says, and within
1e-2 in bfloat16, relative to itself or, for the gradient of logits, to the largest of its row. That
is a hundred roundings in float32, thousands in float64 and two in bfloat16: away from certainty any
sensible order of operations passes, and a lost term does not. Golden inputs are exact in float32;
in bfloat16 they are rounded first, and the truth is tests/oracle.py's for the rounded ones.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from conformance.implementations import Batch, Side
from tests import oracle

VERSION = 1  # of the golden vectors, for which this file was written
GOLDEN = Path(oracle.__file__).with_name("golden") / "orpo.json"
LN2 = math.log(2)
FLOAT32 = torch.float32
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    kind: str  # "ordinary", "edge" or "convention", as in the golden file
    inputs: tuple[Tensor, Tensor]  # log-probabilities (1,), or logits (B, T, V); float64
    batch: Batch | None = None  # what is around the logits
    sft: str = ""  # "response" or "full"
    golden: tuple[float, Tensor] | None = None  # the value; the gradient as rows (n, V or 1)


def golden_cases() -> dict[str, list[Case]]:
    """tests/golden/orpo.json, by level. Its head says what the fields are.

    Raises ValueError where the file is of another version.
    """
    file = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if file.get("version") != VERSION:
        raise ValueError(f"{GOLDEN}: version {file.get('version')}, and {VERSION} is wanted")

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
        weights, n_tokens = tensor(c["chosen"]["nll_weight"]), int(chosen.real.sum())
        batch = Batch(chosen, rejected, c["lam"], weights, len(c["l_or"]), n_tokens)
        rows = torch.cat([tensor(c[s]["grad"]).flatten(0, 1) for s in ("chosen", "rejected")])
        inputs = chosen.logits, rejected.logits
        logits.append(Case(c["kind"], inputs, batch, c["sft_loss"], (float(c["loss"]), rows)))
    return {"pairs": pairs, "logits": logits}


def side(logits, targets, response) -> Side:
    """From lists. What comes after the last response row is padding."""
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


def gradients(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a scalar. A value that does not depend on an input has the gradient 0."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


def computed(function: Callable, case: Case, dtype: torch.dtype) -> tuple[float, Tensor]:
    """The same two by an implementation. Raises TypeError where it returns no tensor."""
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs]
    value = function(*inputs) if case.batch is None else function(with_logits(case.batch, inputs))
    if not isinstance(value, Tensor):
        raise TypeError(f"a tensor is wanted, not {value!r:.60}")
    grads = gradients(value.sum(), inputs)
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
    batch = Batch(w, l, 1.0, torch.full((1, 2), 0.5, dtype=torch.float64), n_pairs=1, n_tokens=2)
    return Case("edge", (w.logits, l.logits), batch)


# ---------------------------------------------------------------------------------------------
# The comparison.


class Verdict(NamedTuple):
    value: bool
    gradient: bool
    not_finite: bool  # NaN or inf where the truth is finite


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
    not_finite = (~got.isfinite() & (true.abs() <= torch.finfo(dtype).max)).any()
    right = agrees(value, true_value, dtype), agrees(grad, true_grad, dtype)
    return Verdict(*right, bool(not_finite))


# ---------------------------------------------------------------------------------------------
# Where implementations differ by choice or by mistake, not by rounding: one number each. Every
# answer is got from outside, by calling the function and reading its loss and its gradient.

P_PROMPT, P_PADDING = 0.125, 0.75  # of the target; as if the padding had been learned
N_PADDING = 2  # rows of it after the longest response


def side_of(prompts: list[int], responses: list[list[float]], n_rows: int) -> Side:
    """Rows of four logits whose target, 0, has a known probability; the other three share the rest.

    A pair is this many prompt rows, then a row for each probability in its response, then padding.
    """
    rows, masks = [], []
    for n_prompt, response in zip(prompts, responses, strict=True):
        n_padding = n_rows - n_prompt - len(response)
        rows.append([P_PROMPT] * n_prompt + response + [P_PADDING] * n_padding)
        masks.append([0] * n_prompt + [1] * len(response) + [0] * n_padding)
    p = torch.tensor(rows)
    logits = torch.stack([p, *[(1 - p) / 3] * 3], dim=-1).log()
    return side(logits.tolist(), [[0] * n_rows] * len(prompts), masks)


def batch_of(prompts, chosen: list[list[float]], rejected: list[list[float]], lam: float) -> Batch:
    """From the number of prompt rows and the probabilities of the response tokens of each pair."""
    longest = max(
        n + max(len(c), len(r)) for n, c, r in zip(prompts, chosen, rejected, strict=True)
    )
    w, l = (side_of(prompts, x, longest + N_PADDING) for x in (chosen, rejected))
    weight = w.response / w.response.sum(1, keepdim=True) / len(prompts)
    return Batch(w, l, lam, weight.double(), len(prompts), int(w.real.sum()))


def one_pair(lam: float) -> Batch:
    """Chosen rows: 0 and 1 the prompt, 2 to 4 the response with EOS, 5 and 6 padding."""
    return batch_of([2], [[0.5] * 3], [[0.5] * 2], lam)


def gradient(function, batch: Batch) -> Tensor:
    """Of the loss with respect to the chosen logits (B, T, V)."""
    inputs = [s.logits.clone().requires_grad_() for s in batch[:2]]
    return gradients(function(with_logits(batch, inputs)), inputs)[0]


def sft_weight(row: int) -> Callable:
    """What -log p of that chosen row weighs in L_SFT. d(-log p)/dz = -(1 - p) at the target."""

    def measure(function):
        batch = one_pair(lam=0.0)
        p = batch.chosen.logits[0, row].softmax(0)[0]
        return (-gradient(function, batch)[0, row, 0] / (1 - p)).item()

    return measure


def terms_of_the_mean(function) -> int:
    """The chosen rows that lam * L_OR moves."""
    with_or, without = (gradient(function, one_pair(lam)) for lam in (1.0, 0.0))
    return ((with_or - without).abs().amax(-1) > 1e-6).sum().item()


def l_or_of(chosen: list[float], rejected: list[float]) -> Callable:
    """L_OR of two responses with these token probabilities: the loss at lam 1 without that at 0."""

    def measure(function):
        with_or, without = (
            function(batch_of([2], [chosen], [rejected], lam)).item() for lam in (1.0, 0.0)
        )
        return with_or - without

    return measure


def change_by_cutting(function) -> float:
    """How far a step's gradient moves, relatively, if its two pairs are two micro-batches.

    Their losses are added or averaged, whichever comes nearer.
    """
    batch = batch_of([2, 6], [[0.5] * 3, [0.5]], [[0.5] * 2, [0.5] * 4], lam=0.1)
    whole = gradient(function, batch)
    if not whole.any():
        return 0.0
    parts = torch.cat([gradient(function, batch.pair(i)) for i in range(2)])
    return min(((parts / n - whole).norm() / whole.norm()).item() for n in (1, 2))


def loss_spacing(function) -> float:
    """Between 1 and the next number of the dtype in which the loss comes back."""
    batch = one_pair(lam=1.0)
    batch = batch._replace(nll_weight=batch.nll_weight.float())
    loss = function(with_logits(batch, [s.logits.float() for s in batch[:2]]))
    return torch.finfo(loss.dtype).eps


def at(chosen: float, rejected: float, what: int, dtype=torch.float64) -> Callable:
    """L_OR (what 0) or its derivatives (1, 2) at those log-probabilities."""
    case = Case("edge", tuple(torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected)))

    def measure(function):
        value, grad = computed(function, case, dtype) if function else truth(case, dtype)
        return (value, *grad.flatten().tolist())[what]

    return measure


def metric(function) -> float:
    return function(*torch.tensor([[0.75], [0.5]]).log()).item()


class Quirk(NamedTuple):
    name: str  # the head of a column
    question: str
    level: str  # of the functions that are asked; "metric": what they log
    right: float | None  # None: the oracle's answer, which is that of `measure` to no function
    measure: Callable[[Callable | None], float]


QUIRKS = [
    Quirk("prompt", "weight of a prompt token in L_SFT, m = 3", "logits", 0, sft_weight(0)),
    Quirk("EOS", "weight of EOS in L_SFT, m = 3", "logits", 1 / 3, sft_weight(4)),
    Quirk("padding", "weight of a padding row in L_SFT", "logits", 0, sft_weight(5)),
    Quirk("terms", "terms in the mean log P, m = 3", "logits", 3, terms_of_the_mean),
    Quirk(
        "lengths",
        "L_OR of responses of 3 and 2 tokens, each with p = 1/2: equal odds, ln 2",
        "logits",
        LN2,
        l_or_of([0.5] * 3, [0.5] * 2),
    ),
    Quirk(
        "spread",
        "L_OR of responses with p = 0.9, 0.1 and 0.3, 0.3: equal geometric means, ln 2",
        "logits",
        LN2,
        l_or_of([0.9, 0.1], [0.3, 0.3]),
    ),
    Quirk("cut", "change of the gradient, 2 pairs cut in two", "logits", 0, change_by_cutting),
    Quirk("spacing", "of the loss at 1, float32 logits", "logits", 2.0**-23, loss_spacing),
    Quirk(
        "a = -1e-8",
        "dL_OR/da, b = ln 1/2, float32",
        "pairs",
        None,
        at(-1e-8, -LN2, 1, FLOAT32),
    ),
    Quirk("a = -1e-17", "dL_OR/da, b = ln 1/2", "pairs", None, at(-1e-17, -LN2, 1)),
    Quirk("b = -1e-15", "dL_OR/db, a = ln 1/2", "pairs", None, at(-LN2, -1e-15, 2)),
    Quirk("a = -800", "L_OR, b = ln 1/2", "pairs", None, at(-800.0, -LN2, 0)),
    Quirk("its slope", "dL_OR/da at a = -800", "pairs", None, at(-800.0, -LN2, 1)),
    Quirk(
        "metric",
        "what is logged as log odds ratio at P = 3/4 and 1/2",
        "metric",
        math.log(3),
        metric,
    ),
]
