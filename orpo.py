"""The ORPO objective (arXiv 2403.07691), its gradient in closed form, and a fast path to both.

For a prompt x, a chosen response y_w and a rejected one y_l, with m = |y|:

    log P(y|x) = (1/m) sum_t log p(y_t | x, y_<t)                   (Eq. 3, length-normalised)
    odds(y|x)  = P(y|x) / (1 - P(y|x))                              (Eq. 4)
    L_OR       = -log sigmoid(log odds(y_w|x) - log odds(y_l|x))    (Eq. 7)
    L_SFT      = -log P(y_w|x)                                      (Eq. 2, a mean over tokens)
    L_ORPO     = E[L_SFT + lam * L_OR]                              (Eq. 6)

Part 1 is the objective over mean log-probabilities, part 2 the plain path from logits to those,
part 3 a fast path from hidden states, which keeps the logits of a few rows at a time. Part 2 is
the definition; tests/test_orpo.py holds part 3 to it, and `make gradcheck` prints the comparison.

README.md ("Choices") lists where the paper, TRL and the authors' code differ, and what is done.
Two choices are visible in this file. The gradient is that of the loss, while Eq. 8-10 of the paper
print the ascent direction. At certainty (P = 1) loss and gradient are the limits. L_SFT covers the
tokens that have a weight in `nll_weight` (part 3); there is no flag for it here.

This file imports torch only: copy it into your project.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# 1. The objective. There are only B numbers here, so everything is computed in float64: that
#    costs nothing and a float32 caller gets every digit. (log P = -1e-8 is not 0.)


def result_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else (float32, bf16, fp16) comes back as float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, to full precision; -inf at 0. Differentiable for x < 0.

    Shape: any. A value a rounding error above 0 counts as 0.
    """
    y = x.double().clamp(max=0)
    near = y > -math.log(2)  # which form keeps its digits changes at 1 - e^x = 1/2
    # Each branch sees an input that is harmless to it: torch.where would choose the right value
    # but multiply the gradient of the other branch by 0, and 0 * inf is NaN.
    close = torch.log(-torch.expm1(torch.where(near, y, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, y)))
    return torch.where(near, close, far).to(result_dtype(x))


def log_odds(logps: Tensor) -> Tensor:
    """log P/(1-P) from log P (Eq. 4); +inf at P = 1. Differentiable for logps < 0. Shape: any."""
    y = logps.double().clamp(max=0)
    return (y - log1mexp(y)).to(result_dtype(logps))


def _complement(logps: Tensor) -> Tensor:
    """1 - P. Written 0 - expm1, because -expm1(0.) is -0.0, which turns +inf into -inf below."""
    return 0 - torch.expm1(logps)


def odds_ratio_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """L_OR of each pair (Eq. 7): -log sigmoid(log odds_w - log odds_l). Differentiable.

    chosen_logps, rejected_logps (B,): *mean* log-probabilities of the responses, <= 0.
    Returns (B,). Its backward pass is `odds_ratio_grad`, right below: exact at certainty too.
    """
    return _OddsRatioLoss.apply(chosen_logps, rejected_logps)


#   With a = log P_w, b = log P_l, u = 1 - P_w, v = 1 - P_l, and delta = 1 / (1 + odds_w/odds_l):
#
#       dL_OR/da = -delta / (1 - P_w)        dL_OR/db = +delta / (1 - P_l)
#
#   At P_w = 1 the first is 0 * inf although its limit is finite. Multiplied out and divided by P_l:
#
#       den = exp(a - b) * v + u             delta = u / den
#       dL_OR/da = -1 / den                  dL_OR/db = (u / den) / v
#
#       P_w = 1, P_l < 1:  loss 0; derivatives -P_l/(1 - P_l) and 0
#       P_l = 1, P_w < 1:  a true pole: loss and db are +inf, da = -1/(1 - P_w)
#       both 1:            there is no limit; the odds ratio is taken as 1: loss ln 2, delta 1/2,
#                          derivatives -inf and +inf


def odds_ratio_grad(chosen_logps: Tensor, rejected_logps: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of L_OR with respect to the two mean log-probabilities, each (B,)."""
    a, b = chosen_logps.double().clamp(max=0), rejected_logps.double().clamp(max=0)
    u, v = _complement(a), _complement(b)
    den = torch.exp(a - b) * v + u
    delta = torch.where(den == 0, 0.5, u / den)
    dtype = result_dtype(chosen_logps)
    return (-1 / den).to(dtype), (delta / v).to(dtype)


def _odds_ratio_value(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """L_OR = log(1 + q), q = odds_l/odds_w = exp(b - a) * u/v; or log q + log(1 + 1/q) where q > 1.

    Formed so, and not as softplus of a difference of log odds, small losses keep their digits.
    """
    a, b = chosen_logps.double().clamp(max=0), rejected_logps.double().clamp(max=0)
    u, v = _complement(a), _complement(b)
    smaller = torch.exp(-(a - b).abs()) * torch.where(a > b, u / v, v / u)  # min(q, 1/q)
    log_q = (b - a) + (u.log() - v.log())
    loss = torch.log1p(smaller) + torch.where(a > b, 0.0, log_q)
    return torch.where(a == b, math.log(2), loss).to(result_dtype(chosen_logps))


class _OddsRatioLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen_logps, rejected_logps):
        ctx.save_for_backward(chosen_logps, rejected_logps)
        return _odds_ratio_value(chosen_logps, rejected_logps)

    @staticmethod
    def backward(ctx, grad):
        # A pair that the caller left out has grad 0, and 0 * inf would be NaN.
        pair = ctx.saved_tensors
        grads = (torch.where(grad == 0, 0, grad * d) for d in odds_ratio_grad(*pair))
        return tuple(g.to(x.dtype) for g, x in zip(grads, pair, strict=True))


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, lam: float = 0.1) -> Tensor:
    """E[L_SFT + lam * L_OR] (Eq. 6), a scalar, from mean log-probabilities, each (B,).

    lam is `beta` in TRL and `alpha` in the authors' code.
    """
    sft = -chosen_logps.to(result_dtype(chosen_logps)).mean()
    if lam == 0:  # 0 * inf is NaN
        return sft
    return sft + lam * odds_ratio_loss(chosen_logps, rejected_logps).mean()


# ---------------------------------------------------------------------------------------------
# 2. The plain path: logits -> mean log-probabilities, by autograd.


def response_logps(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean log-probability of each response, log P(y|x) of Eq. 3.

    logits (B, T, V): row t predicts targets[:, t], so the caller has already shifted them.
    targets (B, T): int64. mask (B, T): true at the tokens of the response, of which the mean is.
    Returns (B,). Raises ValueError where a response has no token: a mean over nothing.
    """
    mask = mask.bool()
    if not bool(mask.any(-1).all()):
        raise ValueError("response_logps: a row of mask is empty, so its mean is undefined")
    logps = torch.log_softmax(logits.to(result_dtype(logits)), dim=-1)  # (B, T, V)
    logps = logps.gather(-1, targets[..., None]).squeeze(-1)  # -> (B, T)
    return torch.where(mask, logps, 0).sum(-1) / mask.sum(-1)  # -> (B,)


# ---------------------------------------------------------------------------------------------
# 3. The fast path: hidden states -> loss, with the gradient formed in the forward pass.
#
#    The derivative of the loss with respect to each token's log-probability is a known number as
#    soon as its pair's two mean log-probabilities are. So a group of pairs at a time: logits,
#    log-probabilities, one coefficient a token, and the logits become their own gradient in
#    place. Three matrix products; nothing of size (tokens x vocabulary) outlives its group. A pair
#    of very long responses goes through lm_head in slices, whose logits are formed a second time
#    when the coefficients are known: four products, and memory that its length does not change.

MAX_ROWS = 4096  # of logits at a time; two responses of --max-length 2048 have no more


class ORPOOutput(NamedTuple):
    """Only `loss` carries a gradient. The rest is float64."""

    loss: Tensor  # (), this micro-batch's share of the step's E[L_SFT + lam * L_OR]
    nll_loss: Tensor  # (), its share of the L_SFT term
    odds_ratio_loss: Tensor  # (B,), L_OR of each pair
    chosen_logps: Tensor  # (B,), means over each response's tokens
    rejected_logps: Tensor  # (B,)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (n, D) @ weight (V, D) transposed -> (n, V), a very big tensor.

    Its rows lie a multiple of 8 numbers apart: GPU kernels read 16 bytes at a time only where rows
    are aligned so, which those of a vocabulary of 50,257 (GPT-2) are not by themselves.
    """
    vocab_size = weight.shape[0]
    out = hidden.new_empty(hidden.shape[0], -(-vocab_size // 8) * 8)
    out[:, vocab_size:] = 0  # a CPU's bfloat16 kernel reads the gap, times 0: it must not be NaN
    return torch.mm(hidden, weight.t(), out=out[:, :vocab_size])


def _softmax_of_others(logits: Tensor, targets: Tensor) -> Tensor:
    """Turns logits (n, V), in place, into the softmax of the *other* logits, the target's into -1.

    Returns the log odds of each target token, log p_t - log(1 - p_t), (n,) float64. With r the
    logsumexp of the other logits they are z_t - r, and log p = log sigmoid(z_t - r) and
    1 - p = sigmoid(r - z_t) keep their digits where a log-softmax would have rounded to 0.
    """
    return (softmax_kernel or plain_softmax)(logits, targets)


def plain_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """`_softmax_of_others` by PyTorch's own operations."""
    if torch.compiler.is_compiling():  # which keeps no float32 copy
        return _softmax_of_rows(logits, targets)
    # A few rows at a time, so that the float32 copy of bfloat16 logits is small and stays in a
    # cache.
    n_rows = max(1, 2 ** (24 if logits.is_cuda else 20) // logits.shape[1])
    parts = zip(logits.split(n_rows), targets.split(n_rows), strict=True)
    return torch.cat([_softmax_of_rows(*part) for part in parts])


def _softmax_of_rows(logits: Tensor, targets: Tensor) -> Tensor:
    target = targets[:, None]
    others = logits.to(result_dtype(logits))  # the logits themselves where they are float32
    target_logit = others.gather(1, target)
    others = _put(others, target, -torch.inf)
    largest = others.amax(1, keepdim=True)
    others = others.sub_(largest).exp_()
    total = others.sum(1, keepdim=True)
    lead = target_logit.double() - largest.double()  # exact, however large both are
    logits.copy_(_put(others.div_(total), target, -1.0))
    return (lead - total.double().log()).squeeze(1)  # z_t - r


def _put(x: Tensor, target: Tensor, value: float) -> Tensor:
    """x (n, V) with a value at each row's target (n, 1): x itself, except where it is compiled."""
    if torch.compiler.is_compiling():  # a comparison becomes part of a kernel, a scatter does not
        return torch.where(torch.arange(x.shape[1], device=x.device) == target, value, x)
    return x.scatter_(1, target, value)


softmax_kernel = None  # on a GPU: `plain_softmax` as run/compiled.py compiled it


def _token_log_odds(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log odds of each target (rows,), and what `_softmax_of_others` made of the logits: all of
    them, or the last of several slices."""
    token_log_odds, logits = [], None
    for h, target in zip(hidden.split(MAX_ROWS), targets.split(MAX_ROWS), strict=True):
        logits = None  # let the last ones go before making new ones
        logits = _logits(h, weight)  # (n, V)
        token_log_odds.append(_softmax_of_others(logits, target))
    return torch.cat(token_log_odds), logits


def _mean_logps(sums: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(2B,) sums -> (B,) chosen and (B,) rejected means, held a hair below certainty.

    Where the target leads by more than 700 nats even 1 - P underflows. With this floor every ratio
    stays finite.
    """
    means = (sums / lengths).clamp(max=-torch.finfo(sums.dtype).tiny)
    return means[0::2], means[1::2]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, added in place, in float32 or float64; on a GPU, where the product of two
    bfloat16 matrices is summed in float32, without rounding that sum or storing it."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        if torch.__version__ >= (2, 12):  # 2.11 has the operation, but no right rule of its shapes
            return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return total.add_(torch.mm(a, b, out_dtype=torch.float32))
    product = (a @ b).to(result_dtype(a))
    return product if total is None else total.add_(product)


def _join_cut_groups(groups: list[tuple[int, int]], response: Tensor) -> list[tuple[int, int]]:
    """The groups, as few joined as are needed for each pair's rows to lie in one of them: no
    token's coefficient is known before all tokens of its pair have been seen."""
    pairs = response.div(2, rounding_mode="floor").tolist()  # -1 for a prompt token
    last = {pair: row for row, pair in enumerate(pairs) if pair >= 0}
    joined, reach = [], 0
    for start, stop in groups:
        begin = joined.pop()[0] if start < reach else start
        joined.append((begin, stop))
        reach = max([reach, *(last[pair] + 1 for pair in pairs[start:stop] if pair >= 0)])
    return joined


class _FusedLinearORPO(torch.autograd.Function):
    """What fused_linear_orpo computes, of hidden (N, D) and lm_head (V, D). Forward forms both
    gradients too, group by group while the logits are there; backward only multiplies them."""

    @staticmethod
    def forward(ctx, hidden, lm_head, needs_grad, data):
        targets, response, nll_weight, lam, n_pairs, lengths, groups = data
        weight = lm_head.to(hidden.dtype)  # (V, D)
        nll_weight, lengths = nll_weight.double(), lengths.double()
        in_response = response >= 0
        response_index = response.clamp(min=0)  # prompt tokens are masked by in_response
        nll = hidden.new_zeros((), dtype=torch.float64)
        sums = hidden.new_zeros(lengths.shape, dtype=torch.float64)  # sum_t log p_t, (2B,)
        if needs_grad:
            grad_hidden, grad_lm_head = torch.empty_like(hidden), None

        for start, stop in groups:
            logits, rows = None, slice(start, stop)  # let the last logits go before making new ones
            h, target, index = hidden[rows], targets[rows], response_index[rows]

            # Step 1: the log-probability of each token, and its sum over each response.
            token_log_odds, logits = _token_log_odds(h, weight, target)  # (rows,), (n, V)
            logps = F.logsigmoid(token_log_odds)
            nll -= (nll_weight[rows] * logps).sum()
            sums.index_add_(0, index, torch.where(in_response[rows], logps, 0))
            if not needs_grad:
                continue

            # Step 2: one coefficient a token: dLoss/d log p_t times 1 - p_t. We multiply by 1 - p_t
            # before anything else, because a derivative of L_OR can be as large as 1/(1 - P) and
            # overflow, while (1 - p_t)/(1 - P) is at most m. The means below are of all pairs so
            # far; a pair is whole within its group, so those of this group are final.
            one_minus_p = torch.sigmoid(-token_log_odds)
            d_chosen, d_rejected = odds_ratio_grad(*_mean_logps(sums, lengths))  # each (B,)
            d_mean = torch.stack((d_chosen, d_rejected), 1).flatten()  # (2B,), as `response` counts
            d_token = d_mean[index] * one_minus_p / lengths[index]
            d_token = torch.where(in_response[rows], d_token, 0)
            coefficient = lam / n_pairs * d_token - nll_weight[rows] * one_minus_p
            scales = -coefficient[:, None].to(result_dtype(hidden))  # (rows, 1)

            # Step 3: d log p_t / dz = onehot - softmax, which is 1 - p_t times minus what the
            # logits now hold. A row's coefficient is multiplied in on the narrow side of each
            # product.
            slices = (x.split(MAX_ROWS) for x in (h, target, scales, grad_hidden[rows]))
            for h, target, scale, out in zip(*slices, strict=True):
                if stop - start > MAX_ROWS:
                    logits = None
                    _, logits = _token_log_odds(h, weight, target)
                out.copy_((logits @ weight) * scale)  # (n, D)
                if lm_head.requires_grad:
                    scaled = (h * scale).to(h.dtype)
                    grad_lm_head = _add_product(grad_lm_head, logits.t(), scaled)  # (V, D)

        chosen, rejected = _mean_logps(sums, lengths)
        pair_losses = _odds_ratio_value(chosen, rejected)
        loss = nll + lam / n_pairs * pair_losses.sum()  # no 0 * inf, by _mean_logps
        if needs_grad:
            if grad_lm_head is None and lm_head.requires_grad:  # a micro-batch without predictions
                grad_lm_head = torch.zeros_like(lm_head)
            ctx.save_for_backward(grad_hidden, grad_lm_head)
            ctx.lm_head_dtype = lm_head.dtype
        outputs = nll, pair_losses, chosen, rejected
        ctx.mark_non_differentiable(*outputs)
        return loss.to(result_dtype(hidden)), *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable  # the stored gradients are constants
    def backward(ctx, grad, *_):
        grad_hidden, grad_lm_head = ctx.saved_tensors
        # In place, as they are large: so a second backward pass is an error, not a wrong number.
        if grad_lm_head is not None:
            grad_lm_head = grad_lm_head.mul_(grad).to(ctx.lm_head_dtype)
        return grad_hidden.mul_(grad), grad_lm_head, None, None


def _apply(hidden: Tensor, lm_head: Tensor, needs_grad: bool, data: tuple) -> ORPOOutput:
    """Under torch.autocast hidden is cast, as F.linear would cast it, and autocast is switched off
    inside, because it would round the sum of lm_head's gradient after each group."""
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return _apply(hidden, lm_head, needs_grad, data)
    if needs_grad and hidden.dtype == torch.float16:
        raise ValueError(
            "float16 is not supported: the gradient is formed before a loss could be scaled, and "
            "its small numbers would become 0; use bfloat16 or float32"
        )
    return ORPOOutput(*_FusedLinearORPO.apply(hidden, lm_head, needs_grad, data))


def fused_linear_orpo(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    response: Tensor,
    nll_weight: Tensor,
    lam: float,
    n_pairs: int,
    lengths: Tensor | None = None,
    groups: list[tuple[int, int]] | None = None,
) -> ORPOOutput:
    """ORPO from hidden states: sum_t nll_weight_t * -log p_t + lam/n_pairs * sum_pairs L_OR.

    hidden (P, D): gathered so that row t predicts targets[t]. The last prompt token predicts the
        first token of both responses, so its hidden state is there twice. Its dtype is that of
        the matrix products; log-probabilities and sums are float32 or float64 in any case.
    lm_head (V, D): the vocabulary projection, V >= 2; its gradient is added up in float32.
    targets (P,): int64.
    response (P,): int64, 2*pair for a chosen token, 2*pair+1 for a rejected one, -1 for a prompt
        token (which only the SFT term can cover). Pairs are numbered from 0 in this micro-batch.
    nll_weight (P,): weight of each token in L_SFT, e.g. 1/(n_pairs * m) on chosen tokens.
    n_pairs: the pairs of the whole optimizer step, so that micro-batches simply add up.
    lengths (2B,): m of each response; counted in `response` where not given, for which the host
        waits for a GPU.
    groups: rows, start to stop, whose logits are kept until the gradient is known, one group after
        the other, together all rows; by default one group. Up to MAX_ROWS rows cost three matrix
        products, more rows four. Groups that cut a pair are joined, except where `lengths` is
        given: then the host reads nothing, and a cut pair gets a wrong gradient.

    Differentiable with respect to hidden and lm_head, once; without gradients it costs one matrix
    product instead of three, with a frozen lm_head two. Exact at certainty, from the logits up.
    Under torch.autocast hidden is cast. Raises ValueError for float16 and shapes that do not fit.
    """
    for name, x in (("targets", targets), ("response", response), ("nll_weight", nll_weight)):
        if x.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, hidden {tuple(hidden.shape)}")
    if lm_head.dim() != 2 or lm_head.shape[1:] != hidden.shape[1:]:
        raise ValueError(f"shape of lm_head {tuple(lm_head.shape)}, hidden {tuple(hidden.shape)}")
    lengths_given = lengths is not None
    if not lengths_given:
        lengths = torch.bincount(response + 1, minlength=1)[1:]
        if len(lengths) % 2 or not bool(lengths.all()):
            raise ValueError(
                f"response: every pair needs both its responses, got {lengths.tolist()}"
            )
    if groups is None:
        groups = [(0, len(response))] if len(response) else []
    elif [0, *(stop for _, stop in groups)] != [*(start for start, _ in groups), len(response)]:
        raise ValueError(f"groups must cover rows 0 to {len(response)} in order, got {groups}")
    elif not lengths_given:
        groups = _join_cut_groups(groups, response)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or lm_head.requires_grad)
    data = (targets, response, nll_weight, lam, n_pairs, lengths, groups)
    return _apply(hidden, lm_head, needs_grad, data)
