"""
`make gradcheck` as a test, and the proof that it bites: wrong formulas, such as are in print (the
sign of Eq. 8, the inverse in delta that write-ups drop or misplace) or are one thought away (the
probability ratio of Eq. 16 in place of the odds ratio), take the place of the right one in orpo.py.
Every row that can see the mistake must fail, at every level, and no other.
"""

import pytest
import torch
import torch.nn.functional as F

import orpo
from tests import gradcheck

LOSS, PAPER, AUTOGRAD, DIFFERENCES = (
    "the loss, op by op",
    "the paper's -delta * h",
    "autograd through the plain path",
    "float64 central differences",
)


def right(a, b):
    """The gradient as it should be, in the paper's form: what the mutants start from."""
    p_w, p_l = a.exp(), b.exp()
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    delta = 1 / (1 + odds_ratio)
    return -delta / (1 - p_w), delta / (1 - p_l)


def sign_flipped(a, b):
    """Eq. 8-10 as printed: the gradient of +log sigmoid, which training would climb."""
    d_a, d_b = right(a, b)
    return -d_a, -d_b


def inverse_dropped(a, b):
    """delta = 1 + odds_w/odds_l in place of its inverse."""
    p_w, p_l = a.exp(), b.exp()
    delta = 1 + (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return -delta / (1 - p_w), delta / (1 - p_l)


def inverse_misplaced(a, b):
    """delta = 1 + (odds_w/odds_l)^-1, the inverse on the fraction instead of the bracket."""
    p_w, p_l = a.exp(), b.exp()
    delta = 1 + (p_l / (1 - p_l)) / (p_w / (1 - p_w))
    return -delta / (1 - p_w), delta / (1 - p_l)


def probability_ratio(a, b):
    """The gradient of -log sigmoid(log P_w - log P_l): no odds, hence no 1/(1 - P)."""
    delta = 1 / (1 + (a - b).exp())
    return -delta, delta


def probability_ratio_loss(a, b):
    return -F.logsigmoid(a - b)


def factors_dropped(a, b):
    """delta right, but without the 1/(1 - P) of h."""
    d_a, d_b = right(a, b)
    return d_a * (1 - a.exp()), d_b * (1 - b.exp())


# the replaced functions of orpo, and which rows must fail
GRADIENT_ROWS = {PAPER, AUTOGRAD, DIFFERENCES}
MUTANTS = {
    "sign flipped": ({"odds_ratio_grad": sign_flipped}, GRADIENT_ROWS),
    "inverse dropped": ({"odds_ratio_grad": inverse_dropped}, GRADIENT_ROWS),
    "inverse misplaced": ({"odds_ratio_grad": inverse_misplaced}, GRADIENT_ROWS),
    "1/(1 - P) dropped": ({"odds_ratio_grad": factors_dropped}, GRADIENT_ROWS),
    "probability ratio": ({"odds_ratio_grad": probability_ratio}, GRADIENT_ROWS),
    # Loss and gradient wrong together: they agree with each other, so differences see nothing.
    "probability ratio, loss and all": (
        {"odds_ratio_grad": probability_ratio, "_odds_ratio_value": probability_ratio_loss},
        {LOSS, PAPER, AUTOGRAD},
    ),
    "probability ratio, loss only": (
        {"_odds_ratio_value": probability_ratio_loss},
        {LOSS, DIFFERENCES},
    ),
}


def apply(monkeypatch, mutant):
    functions, must_fail = MUTANTS[mutant]
    for name, function in functions.items():
        assert callable(getattr(orpo, name))
        monkeypatch.setattr(orpo, name, function)
    return must_fail


@pytest.mark.parametrize("level", gradcheck.LEVELS, ids=lambda level: level.__name__)
def test_gradient(level):
    for row in gradcheck.check(level()):
        assert row.ok, row


@pytest.mark.parametrize("level", gradcheck.LEVELS, ids=lambda level: level.__name__)
def test_gradient_check_passes_the_right_formula_in_another_form(level, monkeypatch):
    """The mutants' starting point is right, so what fails them is the mutation."""
    monkeypatch.setattr(orpo, "odds_ratio_grad", right)
    assert all(row.ok for row in gradcheck.check(level()))


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("level", gradcheck.LEVELS, ids=lambda level: level.__name__)
def test_gradient_check_bites(level, mutant, monkeypatch):
    """The rows that must fail do so by far, the others hold."""
    must_fail = apply(monkeypatch, mutant)
    level = level()
    if level.n_directions:
        level = level._replace(n_directions=1)  # quicker, and sharp enough
    rows = gradcheck.check(level)
    assert {row.against for row in rows} == {LOSS, PAPER, AUTOGRAD, DIFFERENCES}
    for row in rows:
        assert row.error > 1e-3 if row.against in must_fail else row.ok, row


def test_one_wrong_parameter_of_the_transformer_is_enough():
    """The worst of all parameters decides: embedding, two projections, a norm, lm_head."""
    level = gradcheck.transformer()._replace(n_directions=1)
    for i in (0, 3, 8, -2, -1):
        leaf = level.leaves[i]
        wrong = level._replace(code=lambda leaf=leaf: level.code() + Silent.apply(leaf))
        assert {row.against for row in gradcheck.check(wrong) if not row.ok} == GRADIENT_ROWS


class Silent(torch.autograd.Function):
    """0, with a gradient: what a backward pass that does not match its forward looks like."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return grad * gradcheck.random(*ctx.shape, seed=9)


def test_exit_status_tells_the_verdict(monkeypatch, capsys):
    """0 and 20 rows ok; with a wrong formula 1, and FAIL after the rows that saw it."""
    assert gradcheck.main() == 0
    printed = capsys.readouterr().out
    assert "20 of 20 rows agree" in printed and "FAIL" not in printed
    apply(monkeypatch, "sign flipped")
    assert gradcheck.main() == 1
    printed = capsys.readouterr().out
    assert "5 of 20 rows agree" in printed and printed.count("FAIL") == 15
    assert max(map(len, printed.splitlines())) <= 100
