"""SFT, DPO, ORPO and ORPO by probability ratio, on one code path: what the comparisons train with.

Every method has the same packed forward pass, a loss of a few lines, the same pairs in the same
order and the same AdamW. DPO and the ratio are here to stand beside ORPO, and nowhere else.
"""

import itertools
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import train
from attention import Segments
from data import Batch, Pair, step_pairs
from model import Transformer
from orpo import orpo_loss

RATIO_BETA = 1.0


class Logps(NamedTuple):
    """Log-probabilities of B pairs, each (B,): sums over a response's tokens, and means."""

    chosen_sum: Tensor
    rejected_sum: Tensor
    chosen: Tensor
    rejected: Tensor  # NaN where only the chosen branch ran


def dpo_loss(policy: Logps, reference: Logps, beta: float) -> Tensor:
    """-log sigmoid(beta ((log p_w - log p_l) - (the same of the reference))), of sums. A scalar."""
    margin = policy.chosen_sum - policy.rejected_sum
    margin = margin - (reference.chosen_sum - reference.rejected_sum)
    return -F.logsigmoid(beta * margin).mean()


def ratio_loss(chosen: Tensor, rejected: Tensor, lam: float, beta: float = RATIO_BETA) -> Tensor:
    """L_SFT - lam log sigmoid(beta (log P_w - log P_l)): ORPO without the 1 - P in the odds."""
    return -chosen.mean() - lam * F.logsigmoid(beta * (chosen - rejected)).mean()


class Method(NamedTuple):
    kind: str  # SFT, ORPO, ratio or DPO
    weight: float = 0.0  # lam of ORPO and of the ratio, beta of DPO

    def __str__(self) -> str:
        name = "beta" if self.kind == "DPO" else "lam"
        return f"{self.kind}, {name} {self.weight:g}" if self.weight else self.kind

    def loss(self, policy: Logps, reference: Logps | None) -> Tensor:
        """The mean loss of a batch, a scalar. Only DPO reads the reference's log-probabilities."""
        if self.kind == "SFT":
            return -policy.chosen.mean()
        if self.kind == "ORPO":
            return orpo_loss(policy.chosen, policy.rejected, self.weight)
        if self.kind == "ratio":
            return ratio_loss(policy.chosen, policy.rejected, self.weight)
        return dpo_loss(policy, reference, self.weight)


def pack(pairs: list[Pair], chosen_only: bool = False) -> Batch:
    """The pairs as one micro-batch; chosen_only leaves the rejected branch out, as SFT does."""
    (batch,) = data.micro_batches(pairs, sys.maxsize, "response")
    if not chosen_only:
        return batch
    runs = [[True] * (p + c) + [False] * r for p, c, r in (pair.lengths for pair in pairs)]
    token = torch.tensor(list(itertools.chain(*runs)))
    row = batch.response % 2 == 0
    lengths = [n for n, _ in batch.segments.lengths[0::2]]  # queries and keys are the same tokens
    return batch._replace(
        segments=Segments.of(lengths, lengths),
        tokens=batch.tokens[token],
        positions=batch.positions[token],
        predict=(token.cumsum(0) - 1)[batch.predict[row]],
        targets=batch.targets[row],
        response=batch.response[row],
    )


def logps(model: Transformer, batch: Batch) -> Logps:
    """The log-probabilities of a micro-batch's responses, by the plain path of autograd."""
    hidden = model.hidden_states(batch.tokens, batch.positions, batch.segments)  # (N, D)
    hidden, lm_head = model.projection(hidden.index_select(0, batch.predict))  # (P, D), (V, D)
    tokens = torch.log_softmax(hidden @ lm_head.t(), -1).gather(1, batch.targets[:, None])  # (P, 1)
    sums = torch.zeros(len(batch.response_lengths)).index_add(0, batch.response, tokens.squeeze(1))
    lengths = torch.bincount(batch.response, minlength=len(sums))
    means = sums / lengths
    return Logps(sums[0::2], sums[1::2], means[0::2], means[1::2])


@torch.no_grad()
def logps_of(model: Transformer, pairs: list[Pair], at_a_time: int = 128) -> Logps:
    """The same of many pairs, without gradients, a few at a time."""
    parts = [logps(model, pack(pairs[i : i + at_a_time])) for i in range(0, len(pairs), at_a_time)]
    return Logps(*map(torch.cat, zip(*parts, strict=True)))


def update(method: Method, model, reference: Transformer | None, optimizer, pairs: list[Pair]):
    """One AdamW step on these pairs. Only DPO reads the reference, a model that stays as it is."""
    batch, frozen = pack(pairs, chosen_only=method.kind == "SFT"), None
    if method.kind == "DPO":
        with torch.no_grad():
            frozen = logps(reference, batch)
    method.loss(logps(model, batch), frozen).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def fit(method: Method, model, reference, pairs: list[Pair], n_steps: int, config, watch):
    """Trains the model in place, as train.py does, and calls watch(step) after each update.

    config, a train.TrainConfig, gives the learning rate, the batch size and the seed of the order.
    """
    optimizer = train.make_optimizer(model, config)
    for step in range(1, n_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(step, n_steps, config)
        update(
            method,
            model,
            reference,
            optimizer,
            step_pairs(pairs, step, config.batch_size, config.seed),
        )
        watch(step)
