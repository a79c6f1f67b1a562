"""
The objective in 120 decimal digits: what every other number in this repository is judged by.

Written from the paper's formulas in mpmath and sharing nothing with orpo.py, not even the order of
the operations: orpo.py multiplies the derivative out so that float32 survives, this file keeps the
paper's delta and h and lets the digits do the work. 120 of them leave 90 for 1 - exp(-1e-30), and
mpmath's exponents are unbounded, so exp(-1e4), or exp(1e30), is an ordinary number here.

    log P(y|x) = (1/m) sum_t log p(y_t | x, y_<t)                                      (Eq. 3)
    odds(y|x)  = P / (1 - P)                                                           (Eq. 4)
    L_OR       = -log sigmoid( log odds(y_w|x) - log odds(y_l|x) )                     (Eq. 7)
    L_ORPO     = E[ L_SFT + lam * L_OR ]                                               (Eq. 6)
    delta      = 1 / (1 + odds_w / odds_l)                                             (Eq. 9)
    h          = grad log P_w / (1 - P_w) - grad log P_l / (1 - P_l)                   (Eq. 10)
    grad L_OR  = -delta * h            the paper prints +: its h is the *ascent* direction (Eq. 8)

A mean log-probability of exactly 0 is certainty, P = 1. What is taken there, with the reason:

    P_w = 1, P_l < 1   the limit P_w -> 1, which exists: loss 0, derivatives -P_l/(1-P_l) and 0
    P_w < 1, P_l = 1   the limit P_l -> 1, a true pole: loss inf, derivatives -1/(1-P_w) and inf
    both 1             no limit. The odds ratio is taken as 1, as on the line P_w = P_l, all the way
                       up which the loss is ln 2, delta 1/2 and the derivatives -+ 1/(2(1-P)); the
                       derivatives are therefore -inf and inf

A value up to 1e-6 above 0 is a rounding error of somebody's log-softmax and counts as 0.
"""

import mpmath

DIGITS = 120
mp = mpmath.mp.clone()  # a context of our own: nobody else's precision is touched
mp.dps = DIGITS
mpf, inf = mp.mpf, mp.inf


# -----------------------------------------------------------------------------
# From mean log-probabilities


def as_logp(x):
    """A mean log-probability, exactly as given; up to +1e-6 is taken as 0."""
    x = mpf(x)
    if not x <= mpf("1e-6"):
        raise ValueError(f"not a log-probability: {x}")
    return min(x, mpf(0))


def one_minus_p(logp):
    """1 - P without cancellation."""
    return -mp.expm1(as_logp(logp))


def log1mexp(logp):
    """log(1 - P); -inf at P = 1."""
    logp = as_logp(logp)
    if logp == 0:
        return -inf
    # near P = 1 the small number is 1 - P, near P = 0 it is P: each goes through its own function
    return mp.log(-mp.expm1(logp)) if logp > -1 else mp.log1p(-mp.exp(logp))


def log_odds(logp):
    """log P/(1-P) (Eq. 4); inf at P = 1."""
    return as_logp(logp) - log1mexp(logp)


def log_odds_ratio(chosen, rejected):
    """log odds_w - log odds_l (Eq. 5); 0 where both are certain."""
    if as_logp(chosen) == as_logp(rejected):
        return mpf(0)
    return log_odds(chosen) - log_odds(rejected)


def l_or(chosen, rejected):
    """-log sigmoid(log odds ratio) (Eq. 7) = log(1 + odds_l / odds_w)."""
    ratio = log_odds_ratio(chosen, rejected)
    if mp.isinf(ratio):
        return mpf(0) if ratio > 0 else inf
    return mp.log1p(mp.exp(-ratio))


def delta(chosen, rejected):
    """1 / (1 + odds_w/odds_l) (Eq. 9), the inverse of the whole bracket."""
    ratio = log_odds_ratio(chosen, rejected)
    if mp.isinf(ratio):
        return mpf(0) if ratio > 0 else mpf(1)
    return 1 / (1 + mp.exp(ratio))


def h(chosen, rejected):
    """The factors of grad log P_w and grad log P_l in h (Eq. 10): 1/(1-P_w) and -1/(1-P_l)."""
    u, v = one_minus_p(chosen), one_minus_p(rejected)
    return (1 / u if u else inf), (-1 / v if v else -inf)


def l_or_grad(chosen, rejected):
    """dL_OR/dlog P_w, dL_OR/dlog P_l: -delta * h, and its limits at certainty (see the top)."""
    if as_logp(chosen) == 0 and as_logp(rejected) < 0:  # 0 * inf, whose limit is finite
        return -mp.exp(as_logp(rejected)) / one_minus_p(rejected), mpf(0)
    gate = delta(chosen, rejected)
    h_chosen, h_rejected = h(chosen, rejected)
    return -gate * h_chosen, -gate * h_rejected


def orpo(chosen, rejected, lam):
    """One pair, L_SFT = -log P_w: a dictionary of every term and both derivatives of each."""
    lam = mpf(lam)
    loss = l_or(chosen, rejected)
    d_chosen, d_rejected = l_or_grad(chosen, rejected)
    weighted = [mpf(0) if lam == 0 else lam * x for x in (loss, d_chosen, d_rejected)]  # 0*inf = 0
    nll = -as_logp(chosen)
    return {
        "nll": nll,
        "log_odds_chosen": log_odds_ratio(chosen, rejected),
        "l_or": loss,
        "loss": nll + weighted[0],
        "l_or_d_chosen": d_chosen,
        "l_or_d_rejected": d_rejected,
        "loss_d_chosen": -1 + weighted[1],
        "loss_d_rejected": weighted[2],
    }


# -----------------------------------------------------------------------------
# From logits and masks


def row(logits, target):
    """
    One position: log p(target), and its gradient with respect to the logits, e_target - p.
    With s = sum_{v != target} exp(z_v - z_target), log p = -log(1 + s) and 1 - p = s/(1 + s), so
    that a target which leads by 80 nats has its 1 - p to all digits.
    """
    z = [mpf(x) for x in logits]
    lead = [mp.exp(x - z[target]) for x in z]
    s = mp.fsum(x for v, x in enumerate(lead) if v != target)
    grad = [s / (1 + s) if v == target else -x / (1 + s) for v, x in enumerate(lead)]
    return -mp.log1p(s), grad


class Branch:
    """One response after its prompt: rows that each predict a target; mask is 1 on the response."""

    def __init__(self, logits, targets, mask):
        self.rows = [row(z, y) for z, y in zip(logits, targets, strict=True)]
        self.mask = mask
        self.length = sum(mask)
        logps = [logp for (logp, _), m in zip(self.rows, mask, strict=True) if m]
        self.logp = mp.fsum(logps) / self.length  # Eq. 3

    def grad(self, d_logp, nll_weight):
        """Of d_logp * log P - sum_t nll_weight[t] * log p_t, with respect to every logit."""
        grads = []
        for (_, d_row), m, w in zip(self.rows, self.mask, nll_weight, strict=True):
            coefficient = (d_logp / self.length if m else 0) - mpf(w)
            grads.append([coefficient * x if x else mpf(0) for x in d_row])
        return grads


def orpo_from_logits(chosen, rejected, lam, nll_weight=None, n_pairs=None):
    """
    chosen, rejected: a list of (logits (T, V), targets (T,), mask (T,)), one entry a pair; row t of
    the logits predicts targets[t], and mask[t] is 1 where that is a token of the response.
    nll_weight: for each pair the weight of -log p_t in L_SFT, over the chosen rows; None is the
    paper's, 1/(pairs * m) on each response token. n_pairs: what the sum over pairs is divided by.
    """
    n = mpf(n_pairs or len(chosen))
    lam = mpf(lam)
    chosen, rejected = ([Branch(*branch) for branch in side] for side in (chosen, rejected))
    if nll_weight is None:
        nll_weight = [[m / (n * b.length) for m in b.mask] for b in chosen]
    nll = -mp.fsum(
        mpf(weight) * lp
        for b, weights in zip(chosen, nll_weight, strict=True)
        for weight, (lp, _) in zip(weights, b.rows, strict=True)
    )
    terms = [orpo(b.logp, c.logp, lam) for b, c in zip(chosen, rejected, strict=True)]
    scale = lam / n
    return {
        "chosen_logps": [b.logp for b in chosen],
        "rejected_logps": [b.logp for b in rejected],
        "log_odds_chosen": [t["log_odds_chosen"] for t in terms],
        "l_or": [t["l_or"] for t in terms],
        "nll": nll,
        "loss": nll + scale * mp.fsum(t["l_or"] for t in terms),
        "chosen_grad": [
            b.grad(scale * t["l_or_d_chosen"], weights)
            for b, t, weights in zip(chosen, terms, nll_weight, strict=True)
        ],
        "rejected_grad": [
            b.grad(scale * t["l_or_d_rejected"], [0] * len(b.mask))
            for b, t in zip(rejected, terms, strict=True)
        ],
    }
