"""
The gradient check, for a person to read: `make gradcheck`, or python -m tests.gradcheck.

What the code computes, at five levels from log-probabilities up to the weights of a transformer,
against paths that do not share its hand-written derivative:

    the loss        op by op: response_logps, then -log sigmoid(log odds_w - log odds_l) (Eq. 4-7)
    -delta * h      the paper's Eq. 8-10 as printed but for the sign: grad log P_w and grad log P_l
                    of each pair by autograd, then delta and h (and the SFT term's gradient)
    autograd        of that loss, op by op: no derivative in it is written by hand
    differences     float64 central differences of the loss that the code under test returns

The first row of a level is the loss, so that the last one differentiates the right thing. All in
float64 and at ordinary values: the edges are test_orpo.py's. The exit status is 1 when a row
fails, which test_gradcheck.py provokes with wrong formulas: every row is known to bite.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import orpo
from model import ModelConfig, Transformer
from tests.small import groups_of, packed

LAM = 2.0  # large, so that an error in the odds ratio term cannot hide behind the SFT term
STEP = 1e-5  # of the differences: truncation of order STEP^2, rounding of order 1e-16 / STEP
EXACT, DIFFERENCES = 1e-10, 1e-7  # relative tolerances; a wrong formula is off by 1e-3 and more


class Plain(NamedTuple):
    """Where the plain path ends and the formulas begin; autograd knows how each came about."""

    nll: Tensor  # (), the SFT term
    chosen_logps: Tensor  # (B,), means
    rejected_logps: Tensor  # (B,)


class Level(NamedTuple):
    name: str
    leaves: list[Tensor]  # what the gradient is taken of
    code: Callable[[], Tensor]  # the loss by the code under test
    plain: Callable[[], Plain]
    n_directions: int | None = None  # differences along random directions; None: every entry


class Row(NamedTuple):
    level: str
    against: str
    n: int  # numbers compared
    error: float  # the worst, over the leaves
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # not so for NaN


# -----------------------------------------------------------------------------
# What the code is compared with


def plain_loss(plain: Plain) -> Tensor:
    """E[L_SFT + lam * L_OR], op by op."""
    log_odds_ratio = orpo.log_odds(plain.chosen_logps) - orpo.log_odds(plain.rejected_logps)
    return plain.nll + LAM * -F.logsigmoid(log_odds_ratio).mean()


def paper_gradient(plain: Plain, leaves: list[Tensor]) -> list[Tensor]:
    """grad L_SFT + lam * E[-delta * h]: Eq. 8-10 print +delta * h, which is grad of -L_OR."""

    def grad(y):
        return torch.autograd.grad(
            y, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    total, n_pairs = list(grad(plain.nll)), len(plain.chosen_logps)
    for log_p_w, log_p_l in zip(plain.chosen_logps, plain.rejected_logps, strict=True):
        p_w, p_l = log_p_w.exp().item(), log_p_l.exp().item()
        odds_w, odds_l = p_w / (1 - p_w), p_l / (1 - p_l)
        delta = 1 / (1 + odds_w / odds_l)
        for i, (grad_w, grad_l) in enumerate(zip(grad(log_p_w), grad(log_p_l), strict=True)):
            h = grad_w / (1 - p_w) - grad_l / (1 - p_l)
            total[i] = total[i] + LAM / n_pairs * -delta * h
    return total


@torch.no_grad()
def central_differences(level: Level, directions: list[Tensor]) -> list[Tensor]:
    """(f(x + STEP d) - f(x - STEP d)) / (2 STEP), for each direction d of each leaf x."""

    def loss_at(leaf, x):
        leaf.copy_(x)
        return level.code()

    results = []
    for leaf, along in zip(level.leaves, directions, strict=True):
        x = leaf.clone()
        slopes = [
            (loss_at(leaf, x + STEP * d) - loss_at(leaf, x - STEP * d)) / (2 * STEP) for d in along
        ]
        leaf.copy_(x)
        results.append(torch.stack(slopes))
    return results


def directions_of(leaf: Tensor, n: int | None, seed: int) -> Tensor:
    """(n, *leaf.shape): n random ones of length 1, or every entry's own."""
    if n is None:
        d = torch.eye(leaf.numel(), dtype=leaf.dtype)
    else:
        d = F.normalize(random(n, leaf.numel(), seed=seed), dim=1)
    return d.view(-1, *leaf.shape)


def check(level: Level) -> list[Row]:
    """Four rows: the loss, then its gradient against three others."""
    loss, plain = level.code(), level.plain()
    grads = torch.autograd.grad(loss, level.leaves)
    expected = plain_loss(plain)
    by_paper = paper_gradient(plain, level.leaves)
    by_autograd = torch.autograd.grad(expected, level.leaves)
    directions = [directions_of(x, level.n_directions, i) for i, x in enumerate(level.leaves)]
    slopes = [(g * d).flatten(1).sum(1) for g, d in zip(grads, directions, strict=True)]
    by_differences = central_differences(level, directions)

    def row(against, tolerance, got, truth):
        error = max(map(relative_error, got, truth))
        return Row(level.name, against, sum(y.numel() for y in truth), error, tolerance)

    return [
        row("the loss, op by op", EXACT, [loss.detach()], [expected.detach()]),
        row("the paper's -delta * h", EXACT, grads, by_paper),
        row("autograd through the plain path", EXACT, grads, by_autograd),
        row("float64 central differences", DIFFERENCES, slopes, by_differences),
    ]


def relative_error(x: Tensor, y: Tensor) -> float:
    """The largest difference over the largest entry; NaN, which max() would lose, is inf."""
    error = ((x - y).abs().max() / y.abs().max()).item()
    return error if error == error else float("inf")


# -----------------------------------------------------------------------------
# The five levels

# Pairs of (prompt, chosen, rejected) tokens. The SFT term covers prompt and chosen, so that there
# are rows with one term, with the other and with both; V and D are as odd as the lengths.
LENGTHS = [(3, 2, 4), (1, 1, 2), (2, 3, 1)]
VOCAB, DIM = 7, 5


def random(*shape, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def log_probabilities() -> Level:
    """40 pairs of mean log-probabilities between -3 and -0.05, P from 0.05 to 0.95."""
    leaves = [x.requires_grad_() for x in random(2, 40, seed=0).sigmoid() * -2.95 - 0.05]
    return Level(
        "log-probabilities",
        leaves,
        code=lambda: orpo.orpo_loss(*leaves, LAM),
        plain=lambda: Plain(-leaves[0].mean(), *leaves),
    )


def predicted_rows() -> tuple[Tensor, Tensor, Tensor]:
    """response, nll_weight and targets of the step's P predicted tokens, pair after pair."""
    response = []
    for pair, (p, c, r) in enumerate(LENGTHS):
        response += [-1] * (p - 1) + [2 * pair] * c + [2 * pair + 1] * r
    response = torch.tensor(response)
    in_sft = (response < 0) | (response % 2 == 0)
    return response, in_sft / in_sft.sum().double(), torch.arange(len(response)) * 5 % VOCAB


def fused(hidden, lm_head, response, nll_weight, targets) -> Tensor:
    """The code under test, in several groups."""
    rest = (targets, response, nll_weight, LAM, len(LENGTHS))
    return orpo.fused_linear_orpo(hidden, lm_head, *rest, groups=groups_of(response, 5)).loss


def vocabulary_projection(name: str, hidden: Tensor, lm_head: Tensor, leaf: Tensor) -> Level:
    """From hidden (P, D) and lm_head (V, D); the gradient is of one of the two."""
    response, nll_weight, targets = predicted_rows()
    leaf.requires_grad_()

    def plain():
        n = 2 * len(LENGTHS)
        logits = (hidden @ lm_head.t()).expand(n, -1, -1)  # (2B, P, V): all rows, a mask for each
        mask = response == torch.arange(n)[:, None]  # (2B, P)
        logps = orpo.response_logps(logits, targets.expand(n, -1), mask)  # (2B,)
        nll = F.cross_entropy(logits[0], targets, reduction="none") @ nll_weight
        return Plain(nll, logps[0::2], logps[1::2])

    return Level(name, [leaf], lambda: fused(hidden, lm_head, response, nll_weight, targets), plain)


def logits() -> Level:
    """With the identity for lm_head, the hidden states are the logits."""
    z = random(len(predicted_rows()[0]), VOCAB, seed=1)
    return vocabulary_projection("logits", z, torch.eye(VOCAB, dtype=torch.float64), z)


def hidden_states() -> Level:
    hidden, lm_head = random(len(predicted_rows()[0]), DIM, seed=2), random(VOCAB, DIM, seed=3)
    return vocabulary_projection("hidden states", hidden, lm_head, hidden)


def lm_head() -> Level:
    hidden, lm_head = random(len(predicted_rows()[0]), DIM, seed=2), random(VOCAB, DIM, seed=3)
    return vocabulary_projection("lm_head", hidden, lm_head, lm_head)


def transformer() -> Level:
    """Every parameter. The code packs the pairs; the plain path runs each sequence by itself."""
    config = ModelConfig(
        vocab_size=VOCAB, dim=8, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=12
    )
    model = Transformer(config).double()
    for seed, p in enumerate(model.parameters()):  # so large that attention is far from uniform
        p.data = random(*p.shape, seed=seed) * 0.5 + (p.dim() == 1)

    sequences = []  # (prompt, chosen, rejected) tokens
    tokens, positions, rows, targets = [], [], [], []
    for pair, (p, c, r) in enumerate(LENGTHS):
        run = [(3 * i + pair) * 5 % VOCAB for i in range(p + c + r)]
        start = len(tokens)
        sequences.append((run[:p], run[p : p + c], run[p + c :]))
        tokens += run
        positions += [*range(p + c), *range(p, p + r)]
        # row t predicts the token after it; the prompt's last predicts both first tokens
        rows += [*range(start, start + p + c - 1), start + p - 1]
        rows += range(start + p + c, start + p + c + r - 1)
        targets += run[1:]
    tokens, positions, rows, targets = map(torch.tensor, (tokens, positions, rows, targets))
    segments = packed(LENGTHS)
    response, nll_weight, _ = predicted_rows()

    def code():
        hidden = model.hidden_states(tokens, positions, segments)[rows]
        return fused(hidden, model.lm_head_weight, response, nll_weight, targets)

    def plain():
        nll, logps = 0, []
        for prompt, *responses in sequences:
            for side, branch in enumerate(responses):
                sequence = torch.tensor([prompt + branch])
                z, target = model(sequence)[:, :-1], sequence[:, 1:]
                mask = torch.arange(len(prompt + branch) - 1)[None] >= len(prompt) - 1
                logps.append(orpo.response_logps(z, target, mask))
                if side == 0:
                    nll = nll + F.cross_entropy(z[0], target[0], reduction="sum")
        nll = nll / (nll_weight > 0).sum()
        return Plain(nll, torch.cat(logps[0::2]), torch.cat(logps[1::2]))

    return Level("transformer", list(model.parameters()), code, plain, n_directions=2)


LEVELS = [log_probabilities, logits, hidden_states, lm_head, transformer]


# -----------------------------------------------------------------------------


def main() -> int:
    """Prints the table; 1 when a row fails."""
    line = "{:<19}{:<33}{:>8}{:>13}{:>11}  {}".format
    print(line("gradient of", "against", "numbers", "worst error", "tolerance", "verdict"))
    rows = []
    for level in LEVELS:
        print("-" * 94)
        for row in check(level()):
            verdict = "ok" if row.ok else "FAIL"
            name = row.level if row.against.startswith("the loss") else ""
            error, tolerance = f"{row.error:.1e}", f"{row.tolerance:.0e}"
            print(line(name, row.against, row.n, error, tolerance, verdict))
            rows.append(row)
    n_failed = sum(not row.ok for row in rows)
    print("-" * 94)
    print(f"{len(rows) - n_failed} of {len(rows)} rows agree (float64, errors relative)")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
