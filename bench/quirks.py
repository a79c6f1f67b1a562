"""Where implementations of ORPO differ by choice or by slip, not by rounding: one number each.

Every answer is got from outside, by calling the function and reading its loss and its gradient.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.golden import LN2, Case, computed, side, truth, with_logits
from bench.implementations import Batch

FLOAT32 = torch.float32


def hand_batch(lengths, lam: float) -> Batch:
    """(prompt, chosen, rejected) rows a pair, then two of padding or more. Every target is 0.

    Its probability is 1/8 in a prompt, 1/2 in a response, 3/4 in padding, as if that were learned.
    """
    n_rows = max(p + max(c, r) for p, c, r in lengths) + 2
    sides = []
    for which in (1, 2):
        roles = [[0] * n[0] + [1] * n[which] + [2] * (n_rows - n[0] - n[which]) for n in lengths]
        p = torch.tensor([0.125, 0.5, 0.75])[torch.tensor(roles)]
        logits = torch.stack([p, *[(1 - p) / 3] * 3], dim=-1).log()
        response = [[int(role == 1) for role in row] for row in roles]
        sides.append(side(logits.tolist(), [[0] * n_rows] * len(lengths), response))
    weight = sides[0].response / sides[0].response.sum(1, keepdim=True) / len(lengths)
    return Batch(*sides, lam, weight.double(), len(lengths))


def gradient(function, batch: Batch) -> Tensor:
    """Of the loss with respect to the chosen logits (B, T, V)."""
    inputs = [s.logits.clone().requires_grad_() for s in batch[:2]]
    loss = function(with_logits(batch, inputs))
    return torch.autograd.grad(loss, inputs[0], materialize_grads=True, allow_unused=True)[0]


ONE_PAIR = [(2, 3, 2)]  # chosen rows: 0 and 1 the prompt, 2 to 4 the response with EOS, 5 padding


def sft_weight(row: int) -> Callable:
    """What -log p of that chosen row weighs in L_SFT. d(-log p)/dz = -(1 - p) at the target."""

    def measure(function):
        batch = hand_batch(ONE_PAIR, lam=0.0)
        p = batch.chosen.logits[0, row].softmax(0)[0]
        return (-gradient(function, batch)[0, row, 0] / (1 - p)).item()

    return measure


def terms_of_the_mean(function) -> int:
    """The chosen rows that lam * L_OR moves."""
    with_or, without = (gradient(function, hand_batch(ONE_PAIR, lam)) for lam in (1.0, 0.0))
    return ((with_or - without).abs().amax(-1) > 1e-6).sum().item()


def change_by_cutting(function) -> float:
    """How far a step's gradient moves, relatively, if its two pairs are two micro-batches.

    Their losses are added or averaged, whichever comes nearer.
    """
    batch = hand_batch([(2, 3, 2), (6, 1, 4)], lam=0.1)
    whole = gradient(function, batch)
    parts = torch.cat([gradient(function, batch.pair(i)) for i in range(2)])
    return min(((parts / n - whole).norm() / whole.norm()).item() for n in (1, 2))


def loss_spacing(function) -> float:
    """Between 1 and the next number of the dtype in which the loss comes back."""
    batch = hand_batch(ONE_PAIR, lam=1.0)
    loss = function(with_logits(batch, [s.logits.float() for s in batch[:2]]))
    return torch.finfo(loss.dtype).eps


def at(chosen: float, rejected: float, what: int, dtype=torch.float64) -> Callable:
    """L_OR (what 0) or its derivatives (1, 2) at those log-probabilities."""
    case = Case("edge", tuple(torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected)))

    def measure(function):
        value, grad = computed(function, case, dtype) if function else truth(case, dtype)
        return (value, *grad.flatten().tolist())[what]

    return measure


class Quirk(NamedTuple):
    question: str
    level: str  # of the functions that are asked; "metric": what they log
    right: float | None  # None: the oracle's answer, which is that of `measure` to no function
    measure: Callable[[Callable | None], float]


def metric(function) -> float:
    return function(*torch.tensor([[0.75], [0.5]]).log()).item()


QUIRKS = [
    Quirk("weight of a prompt token in L_SFT (one response, m = 3)", "logits", 0, sft_weight(0)),
    Quirk("weight of its EOS in L_SFT", "logits", 1 / 3, sft_weight(4)),
    Quirk("weight of a padding position in L_SFT", "logits", 0, sft_weight(5)),
    Quirk("terms in the mean log P(y\\|x), m = 3", "logits", 3, terms_of_the_mean),
    Quirk("change of the gradient, 2 pairs cut in two", "logits", 0, change_by_cutting),
    Quirk("spacing of the loss at 1, float32 logits", "logits", 2.0**-23, loss_spacing),
    Quirk("dL_OR/da, a = -1e-8, b = ln 1/2, float32", "pairs", None, at(-1e-8, -LN2, 1, FLOAT32)),
    Quirk("dL_OR/da, a = -1e-17, b = ln 1/2", "pairs", None, at(-1e-17, -LN2, 1)),
    Quirk("dL_OR/db, a = ln 1/2, b = -1e-15", "pairs", None, at(-LN2, -1e-15, 2)),
    Quirk("L_OR, a = -800, b = ln 1/2", "pairs", None, at(-800.0, -LN2, 0)),
    Quirk("dL_OR/da there", "pairs", None, at(-800.0, -LN2, 1)),
    Quirk("metric named log odds ratio, P 3/4 and 1/2", "metric", math.log(3), metric),
]
