"""
The objective and its gradient, against 120 decimal digits (oracle.py), the golden file, and itself
computed another way. Tolerances are relative; `worst` says what that means where the truth is 0,
subnormal, or infinite.
"""

import hashlib
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import orpo
from tests import oracle
from tests.small import groups_of

RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}
GOLDEN = Path(__file__).parent / "golden" / "orpo.json"
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def worst(got, truth, scale=None):
    """
    The largest |got - truth| / |scale| over a tensor (n,) and a list of true values; scale: truth.

    A truth beyond the dtype's range must come out as the infinity of its sign, and only such a
    truth may. A truth below the smallest normal number has no digits to be relative to: it must be
    met to 1/100 of that number.
    """
    assert got.dim() == 1 and got.numel() == len(truth)
    finfo, result = torch.finfo(got.dtype), 0.0
    for x, y, s in zip(got.tolist(), truth, truth if scale is None else scale, strict=True):
        if abs(y) > finfo.max:
            assert math.isinf(x) and (x > 0) == (y > 0), f"got {x}, truth {y}"
            continue
        assert math.isfinite(x), f"got {x}, truth {y}"
        if abs(s) < finfo.tiny:
            assert abs(x - y) <= finfo.tiny / 100, f"got {x}, truth {y}"
        else:
            result = max(result, float(abs(x - y) / abs(s)))
    return result


# -----------------------------------------------------------------------------
# The oracle itself


def test_oracle_by_hand():
    """
    P_w = 0.8, P_l = 0.5: odds 4 and 1, odds ratio 4; L_OR = -log(4/5) = log 1.25; delta = 1/5;
    dL_OR/dlog P_w = -(1/5)/0.2 = -1; dL_OR/dlog P_l = (1/5)/0.5 = 0.4.
    """
    mp = oracle.mp
    a, b = mp.log(mp.mpf(8) / 10), mp.log(mp.mpf(1) / 2)
    assert mp.almosteq(oracle.l_or(a, b), mp.log(mp.mpf(5) / 4), 1e-100)
    assert mp.almosteq(oracle.delta(a, b), mp.mpf(1) / 5, 1e-100)
    d_chosen, d_rejected = oracle.l_or_grad(a, b)
    assert mp.almosteq(d_chosen, -1, 1e-100) and mp.almosteq(d_rejected, mp.mpf(2) / 5, 1e-100)


@pytest.mark.parametrize("a", [-1e-30, -1e-3, -0.7, -20.0, -1e4])
@pytest.mark.parametrize("b", [-1e-30, -1e-3, -0.7, -20.0, -1e4])
def test_oracle_derivatives_are_those_of_its_loss(a, b):
    """delta and h, which the oracle takes from the paper, against differences of its loss."""
    mp = oracle.mp
    numeric = [
        mp.diff(lambda t: oracle.l_or(a * t, b), 1) / a,  # scaled, or steps would leave the domain
        mp.diff(lambda t: oracle.l_or(a, b * t), 1) / b,
    ]
    for closed, difference in zip(oracle.l_or_grad(a, b), numeric, strict=True):
        assert mp.almosteq(closed, difference, 1e-30)


def test_oracle_logit_gradient_is_that_of_its_loss():
    """Every logit of a pair with a prompt row, against differences of the oracle's own loss."""
    mp = oracle.mp
    chosen = [[[0.5, -1.0, 2.0], [1.0, 0.25, -0.5]], [0, 1], [0, 1]]
    rejected = [[[0.0, 1.5, -2.0], [3.0, 0.5, 0.0]], [1, 0], [1, 1]]
    weights = [[0.25, 0.75]]
    sides = {"chosen": chosen, "rejected": rejected}
    out = oracle.orpo_from_logits([chosen], [rejected], 0.5, weights, n_pairs=3)
    for name, (logits, _, _) in sides.items():
        for t, row in enumerate(logits):
            for v, z in enumerate(row):

                def loss(x, row=row, v=v):
                    row[v] = x
                    return oracle.orpo_from_logits([chosen], [rejected], 0.5, weights, 3)["loss"]

                assert mp.almosteq(mp.diff(loss, z), out[f"{name}_grad"][0][t][v], 1e-30)
                row[v] = z


# -----------------------------------------------------------------------------
# The objective over mean log-probabilities


def grid(dtype):
    """Every pair of values from -1e4 to 0, with what breaks naive forms: two tensors (900,)."""
    ln2 = torch.tensor(math.log(2), dtype=dtype)
    around_ln2 = [torch.nextafter(ln2, torch.tensor(x, dtype=dtype)).item() for x in (0.0, 1.0)]
    values = [0.0, -torch.finfo(dtype).tiny, -1e-30, -1e-20, -1e-12, -1e-8, -1e-7, -1e-5, -1e-3]
    values += [-0.03, -0.3, -0.5, -around_ln2[0], -ln2.item(), -around_ln2[1], -1.0, -3.0, -10.0]
    values += [-17.0, -20.0, -50.0, -87.0, -89.0, -104.0, -300.0, -708.0, -746.0, -1e3, -5e3, -1e4]
    values = torch.tensor(values, dtype=dtype)
    return values.repeat_interleave(len(values)), values.repeat(len(values))


def near_pairs(dtype):
    """Pairs one rounding apart, and pairs at random over all magnitudes: two tensors (200,)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (-(10 ** torch.empty(100).double().uniform_(-35, 4, generator=generator)) for _ in "ab")
    a, b = a.to(dtype), b.to(dtype)
    return torch.cat([a, a]), torch.cat([b, torch.nextafter(a, b)])


@both_dtypes
@pytest.mark.parametrize("inputs", [grid, near_pairs])
def test_loss_and_derivatives_are_exact_on_the_whole_domain(inputs, dtype):
    """Within 1e-5 in float32 and 1e-12 in float64, and finite wherever the truth is."""
    a, b = inputs(dtype)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    d_a, d_b = zip(*(oracle.l_or_grad(*pair) for pair in pairs), strict=True)
    got_a, got_b = orpo.odds_ratio_grad(a, b)
    loss = orpo.odds_ratio_loss(a, b)
    assert loss.dtype == got_a.dtype == got_b.dtype == dtype
    assert worst(loss, [oracle.l_or(*pair) for pair in pairs]) < RTOL[dtype]
    assert worst(got_a, d_a) < RTOL[dtype]
    assert worst(got_b, d_b) < RTOL[dtype]


@both_dtypes
def test_log_odds_and_log1mexp_are_exact(dtype):
    """log odds cross zero at P = 1/2, so there the error is relative to 1."""
    x = torch.cat([*grid(dtype), *near_pairs(dtype)]).unique()
    truth = [oracle.log1mexp(y) for y in x.tolist()]
    assert worst(orpo.log1mexp(x), truth) < RTOL[dtype]
    truth = [oracle.log_odds(y) for y in x.tolist()]
    assert worst(orpo.log_odds(x), truth, [max(abs(y), 1) for y in truth]) < RTOL[dtype]


@both_dtypes
def test_log_odds_and_log1mexp_differentiate(dtype):
    """d log(1 - P)/d log P = -P/(1-P) = -1/(e^-x - 1); d log odds / d log P = 1/(1-P)."""
    x = grid(dtype)[0].unique()
    x = x[x < 0].requires_grad_()
    (d_log1mexp,) = torch.autograd.grad(orpo.log1mexp(x).sum(), x)
    (d_log_odds,) = torch.autograd.grad(orpo.log_odds(x).sum(), x)
    mp, values = oracle.mp, x.tolist()
    assert worst(d_log1mexp, [-1 / mp.expm1(-mp.mpf(y)) for y in values]) < RTOL[dtype]
    assert worst(d_log_odds, [1 / oracle.one_minus_p(y) for y in values]) < RTOL[dtype]


@both_dtypes
def test_limits_at_certainty(dtype):
    """
    P_w = 1, P_l = 1/2: loss 0, derivatives -P_l/(1-P_l) = -1 and 0.
    P_w = 1/2, P_l = 1: a pole: loss inf, derivatives -1/(1-P_w) = -2 and inf.
    Both 1: the odds ratio is taken as 1, so the loss is ln 2, and the derivatives, like
    -+1/(2(1-P)) on the way there, -inf and inf.
    """
    half, inf = math.log(0.5), math.inf
    a = torch.tensor([0, half, 0], dtype=dtype)
    b = torch.tensor([half, 0, 0], dtype=dtype)

    def same(x, y):
        torch.testing.assert_close(x, torch.tensor(y, dtype=dtype), rtol=RTOL[dtype], atol=0)

    same(orpo.odds_ratio_loss(a, b), [0, inf, math.log(2)])
    same(orpo.odds_ratio_grad(a, b)[0], [-1, -2, -inf])
    same(orpo.odds_ratio_grad(a, b)[1], [0, inf, inf])


@both_dtypes
def test_a_rounding_above_zero_counts_as_zero(dtype):
    """Somebody's log-softmax may return +1e-6; it means 0, on either side and on both."""
    others = grid(dtype)[0].unique()
    zero = torch.zeros_like(others)
    for above in (1e-6, 1e-8, 1e-45 if dtype == torch.float32 else 1e-320):
        x = torch.full_like(others, above)
        assert (x > 0).all()
        for f in (orpo.odds_ratio_grad, lambda *pair: [orpo.odds_ratio_loss(*pair)]):
            for at_x, at_0 in [((x, others), (zero, others)), ((others, x), (others, zero))]:
                for got, expected in zip(f(*at_x), f(*at_0), strict=True):
                    assert torch.equal(got, expected) and not got.isnan().any()
            for got, expected in zip(f(x, x.flip(0)), f(zero, zero), strict=True):
                assert torch.equal(got, expected) and not got.isnan().any()
        assert torch.equal(orpo.log1mexp(x), orpo.log1mexp(zero))
        assert torch.equal(orpo.log_odds(x), orpo.log_odds(zero))


def test_bf16_and_fp16_are_upcast_before_anything_else():
    """The result is that of the same numbers in float32: 1 - exp(-1e-8) is 0 in bf16 arithmetic."""
    a, b = (x.bfloat16() for x in grid(torch.float32))
    sure = (a < 0) & (b < 0)
    for dtype in (torch.bfloat16, torch.float16):
        low = [x.to(dtype) for x in (a, b)]
        wide = [x.float() for x in low]
        got = [orpo.odds_ratio_loss(*low), *orpo.odds_ratio_grad(*low)]
        got += [orpo.log1mexp(low[0]), orpo.log_odds(low[0])]
        expected = [orpo.odds_ratio_loss(*wide), *orpo.odds_ratio_grad(*wide)]
        expected += [orpo.log1mexp(wide[0]), orpo.log_odds(wide[0])]
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x.float(), y) and not x.isnan().any()
            if dtype == torch.bfloat16:
                assert x[sure].isfinite().all()
    loss = orpo.orpo_loss(a[sure], b[sure])
    assert torch.equal(loss, orpo.orpo_loss(a[sure].float(), b[sure].float()))
    leaf = [x.clone().requires_grad_() for x in (a, b)]
    grads = torch.autograd.grad(orpo.odds_ratio_loss(*leaf)[sure].sum(), leaf)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads)


@both_dtypes
def test_backward_is_odds_ratio_grad(dtype):
    """Each derivative times the gradient that arrives; a pair left out gets 0, pole or not."""
    a, b = grid(dtype)
    a, b = a.requires_grad_(), b.requires_grad_()
    weight = torch.linspace(-2, 2, len(a), dtype=dtype)
    weight[::7] = 0
    got = torch.autograd.grad((weight * orpo.odds_ratio_loss(a, b))[weight != 0].sum(), (a, b))
    for x, d in zip(got, orpo.odds_ratio_grad(a.detach(), b.detach()), strict=True):
        expected = torch.where(weight == 0, 0, weight * d)
        torch.testing.assert_close(x, expected, rtol=RTOL[dtype], atol=0)


@both_dtypes
def test_orpo_loss_by_hand(dtype):
    """
    Pairs (P_w, P_l) = (0.8, 0.5), (0.5, 0.5): L_SFT = (log 1.25 + log 2)/2; L_OR = log 1.25 and
    log 2, so with lam = 0.5 the loss is (1 + 0.5)(log 1.25 + log 2)/2 = 0.75 log 2.5. Derivatives:
    chosen (-1 + 0.5 * -1)/2 = -0.75 for both (the second: -(1/2)/(1/2) = -1); rejected
    0.5 * 0.4/2 = 0.1 and 0.5 * 1/2 = 0.25.
    """
    a = torch.tensor([0.8, 0.5], dtype=dtype).log().requires_grad_()
    b = torch.tensor([0.5, 0.5], dtype=dtype).log().requires_grad_()
    loss = orpo.orpo_loss(a, b, lam=0.5)
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(0.75 * math.log(2.5), rel=RTOL[dtype])
    loss.backward()
    assert a.grad.tolist() == pytest.approx([-0.75, -0.75], rel=RTOL[dtype])
    assert b.grad.tolist() == pytest.approx([0.1, 0.25], rel=RTOL[dtype])


def test_orpo_loss_defaults_to_lam_a_tenth():
    a, b = torch.tensor([-0.5]), torch.tensor([-1.0])
    assert torch.equal(orpo.orpo_loss(a, b), orpo.orpo_loss(a, b, lam=0.1))
    assert not torch.equal(orpo.orpo_loss(a, b), orpo.orpo_loss(a, b, lam=0.2))


def test_lam_zero_is_sft_even_where_the_odds_ratio_loss_is_infinite():
    """0 * inf would be NaN. P_w = 1/2, P_l = 1: L_OR = inf, loss = L_SFT = log 2."""
    a = torch.tensor([0.5]).log().requires_grad_()
    b = torch.tensor([0.0], requires_grad=True)
    assert orpo.odds_ratio_loss(a, b).item() == math.inf
    loss = orpo.orpo_loss(a, b, lam=0.0)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    loss.backward()
    assert a.grad.tolist() == [-1]
    assert b.grad is None or b.grad.tolist() == [0]


# -----------------------------------------------------------------------------
# The golden file


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def number(x):
    return {"inf": math.inf, "-inf": -math.inf}[x] if isinstance(x, str) else x


def test_golden_file_is_what_its_script_writes():
    """To the byte: nobody edited it, and it does not depend on the day or the machine."""
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN.with_name("make_golden.py"))
    make_golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_golden)
    assert make_golden.golden() == GOLDEN.read_text()
    assert GOLDEN.stat().st_size < 200_000


# SHA-256 of the cases of each version, as json.dumps writes them.
GOLDEN_CASES = {1: "3a68036887e28d08d3d2688a860a12a75c5acd5ac0faaacc9c70b7a84dd166d5"}


def test_golden_cases_change_only_with_the_version(golden):
    """A framework that keeps a copy goes by the version. So when this fails, raise VERSION in
    make_golden.py, and add the new digest here under it.
    """
    cases = json.dumps([golden["pairs"], golden["logits"]])
    assert hashlib.sha256(cases.encode()).hexdigest() == GOLDEN_CASES[golden["version"]]


def test_golden_inputs_are_float32_and_outputs_have_17_digits(golden):
    """So that float32 and float64 implementations read the same numbers, and none is cut short."""
    for case in golden["pairs"]:
        inputs = [case["chosen_logp"], case["rejected_logp"], case["lam"]]
        assert torch.tensor(inputs).double().tolist() == inputs
        loss = number(case["loss"])
        truth = oracle.orpo(*inputs)["loss"]
        assert loss == truth or abs(loss - truth) <= 2e-16 * abs(truth)
    for case in golden["logits"]:
        for side in ("chosen", "rejected"):
            logits = torch.tensor(case[side]["logits"], dtype=torch.float64)
            assert torch.equal(logits.float().double(), logits)


@both_dtypes
def test_golden_pairs(golden, dtype):
    cases = [c for c in golden["pairs"] if c["kind"] != "convention"]

    def column(key):
        return [number(c[key]) for c in cases]

    a = torch.tensor(column("chosen_logp"), dtype=dtype)
    b = torch.tensor(column("rejected_logp"), dtype=dtype)
    d_a, d_b = orpo.odds_ratio_grad(a, b)
    assert worst(orpo.odds_ratio_loss(a, b), column("l_or")) < RTOL[dtype]
    assert worst(d_a, column("l_or_d_chosen")) < RTOL[dtype]
    assert worst(d_b, column("l_or_d_rejected")) < RTOL[dtype]
    got, truth = orpo.log_odds(a) - orpo.log_odds(b), column("log_odds_chosen")
    assert worst(got, truth, [max(abs(x), 1) for x in truth]) < RTOL[dtype]
    rows = []
    for c in cases:  # one pair at a time, as lam is one number a call
        x = torch.tensor([c["chosen_logp"]], dtype=dtype, requires_grad=True)
        y = torch.tensor([c["rejected_logp"]], dtype=dtype, requires_grad=True)
        loss = orpo.orpo_loss(x, y, c["lam"])
        loss.backward()
        rows.append(
            torch.stack([loss.detach(), x.grad[0], 0 * x[0] if y.grad is None else y.grad[0]])
        )
    for got, key in zip(
        torch.stack(rows, 1), ("loss", "loss_d_chosen", "loss_d_rejected"), strict=True
    ):
        assert worst(got.detach(), column(key)) < RTOL[dtype]


def test_golden_logits_by_the_plain_road(golden):
    """
    float64 autograd through response_logps and odds_ratio_loss. Ordinary cases within 1e-12; at a
    lead of 30 and more a log-softmax has lost 1 - p even in float64, which is what part 3 is for.
    """
    n = 0
    for case in golden["logits"]:
        if case["kind"] != "ordinary":
            continue
        n += 1
        leaves, logps = {}, {}
        for side in ("chosen", "rejected"):
            c = case[side]
            leaves[side] = torch.tensor(c["logits"], dtype=torch.float64, requires_grad=True)
            targets, mask = torch.tensor(c["targets"]), torch.tensor(c["response_mask"])
            logps[side] = orpo.response_logps(leaves[side], targets, mask)
            assert worst(logps[side].detach(), c["logps"]) < 1e-12
        l_or = orpo.odds_ratio_loss(logps["chosen"], logps["rejected"])
        if case["sft_loss"] == "response":
            loss = orpo.orpo_loss(logps["chosen"], logps["rejected"], case["lam"])
        else:
            per_token = torch.log_softmax(leaves["chosen"], -1)
            per_token = per_token.gather(-1, torch.tensor(case["chosen"]["targets"])[..., None])
            weight = torch.tensor(case["chosen"]["nll_weight"], dtype=torch.float64)
            loss = case["lam"] * l_or.mean() - (weight * per_token.squeeze(-1)).sum()
        assert worst(l_or.detach(), case["l_or"]) < 1e-12
        assert worst(loss.detach()[None], [case["loss"]]) < 1e-12
        loss.backward()
        for side, logits in leaves.items():
            grad = torch.zeros_like(logits) if logits.grad is None else logits.grad
            assert (
                worst_row(grad.flatten(0, 1), [row for rows in case[side]["grad"] for row in rows])
                < 1e-12
            )
    assert n == 8


@both_dtypes
def test_golden_logits_by_the_fused_road(golden, dtype):
    """All cases, leads of 80 nats included. With lm_head the identity, hidden is the logits."""
    for case in golden["logits"]:
        sides = [case["chosen"], case["rejected"]]
        rows, grads = [], []
        for side, c in enumerate(sides):
            weights = c.get("nll_weight") or [[0] * len(m) for m in c["response_mask"]]
            for pair, mask in enumerate(c["response_mask"]):
                for t, in_response in enumerate(mask):
                    weight = weights[pair][t]
                    if in_response or weight:  # any other row is padding or the rejected's prompt
                        response = 2 * pair + side if in_response else -1
                        rows.append((c["logits"][pair][t], c["targets"][pair][t], response, weight))
                        grads.append(c["grad"][pair][t])
        logits, targets, response, weights = zip(*rows, strict=True)
        out, grad, _ = fused(
            torch.tensor(logits, dtype=dtype),
            torch.eye(len(logits[0]), dtype=dtype),
            *(torch.tensor(targets), torch.tensor(response), torch.tensor(weights, dtype=dtype)),
            *(case["lam"], len(sides[0]["logps"])),
        )
        name, rtol = case["name"], RTOL[dtype]
        assert worst(out.chosen_logps, sides[0]["logps"]) < rtol, name
        assert worst(out.rejected_logps, sides[1]["logps"]) < rtol, name
        assert worst(out.odds_ratio_loss, case["l_or"]) < rtol, name
        assert worst(out.nll_loss[None], [case["nll"]]) < rtol, name
        assert worst(out.loss[None], [case["loss"]]) < rtol, name
        assert worst_row(grad, grads) < rtol, name


# -----------------------------------------------------------------------------
# The fused linear


def worst_row(got, truth):
    """`worst` of a gradient (rows, V), relative to the largest entry of the same row."""
    scale = [max(map(abs, row)) for row in truth for _ in row]
    return worst(got.flatten(), [x for row in truth for x in row], scale)


def fused(hidden, lm_head, *rest, upstream=1, **kwargs):
    """fused_linear_orpo, detached, and its two gradients."""
    hidden, lm_head = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
    out = orpo.fused_linear_orpo(hidden, lm_head, *rest, **kwargs)
    (out.loss * upstream).backward()
    return orpo.ORPOOutput(*(x.detach() for x in out)), hidden.grad, lm_head.grad


def plain(hidden, lm_head, targets, response, nll_weight, lam, n_pairs):
    """The same by parts 1 and 2: all logits, a mask for each response, autograd."""
    hidden, lm_head = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
    n_responses = int(response.max()) + 1
    logits = hidden @ lm_head.t()
    mask = response == torch.arange(n_responses)[:, None]
    one_row_each = (logits[:, None], targets[:, None], torch.ones(len(targets), 1))
    nll = -(nll_weight * orpo.response_logps(*one_row_each)).sum()
    logps = orpo.response_logps(
        logits.expand(n_responses, -1, -1), targets.expand(n_responses, -1), mask
    )
    l_or = orpo.odds_ratio_loss(logps[0::2], logps[1::2])
    loss = nll + lam / n_pairs * l_or.sum()
    loss.backward()
    out = orpo.ORPOOutput(loss, nll, l_or, logps[0::2], logps[1::2])
    return orpo.ORPOOutput(*(x.detach() for x in out)), hidden.grad, lm_head.grad


@pytest.mark.parametrize("n_rows", [100, 7])
def test_under_autocast_products_have_its_dtype_and_sums_stay_as_they_are(n_rows):
    """As of hidden states that are cast before: lm_head's gradient is no sum of rounded parts."""
    hidden, lm_head, *rest = a_step(torch.float32)
    more = {"groups": groups_of(rest[1], n_rows)}
    low = hidden.bfloat16().requires_grad_()
    weight = lm_head.clone().requires_grad_()
    wanted = orpo.fused_linear_orpo(low, weight, *rest, **more)
    wanted.loss.backward()
    hidden, lm_head = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = orpo.fused_linear_orpo(hidden, lm_head, *rest, **more)
    got.loss.backward()
    assert torch.equal(got.loss, wanted.loss) and torch.equal(lm_head.grad, weight.grad)
    assert lm_head.grad.dtype == hidden.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, low.grad.float())
    rounded = torch.equal(lm_head.grad, lm_head.grad.bfloat16().float())
    assert rounded == (n_rows == 100)  # a CPU rounds a product, of which one group has one


def test_float16_is_refused():
    hidden, lm_head, *rest = a_step(torch.float32)
    hidden, lm_head = hidden.half().requires_grad_(), lm_head.half()
    with pytest.raises(ValueError, match="float16 is not supported: the gradient is formed before"):
        orpo.fused_linear_orpo(hidden, lm_head, *rest)
    with torch.no_grad():
        assert torch.isfinite(orpo.fused_linear_orpo(hidden, lm_head, *rest).loss)


def a_step(dtype, sft_loss="response", seed=0, vocab=13, dim=6):
    """Five pairs of odd lengths (a response of one token, a prompt of none), in packed order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [
        (0, 1, 1),
        (3, 4, 2),
        (2, 1, 7),
        (5, 3, 3),
        (1, 6, 1),
    ]  # prompt rows, chosen, rejected
    response, weight = [], []
    for pair, (p, c, r) in enumerate(lengths):
        rows_of_chosen = sum(p + c for p, c, _ in lengths)
        response += [-1] * p + [2 * pair] * c + [2 * pair + 1] * r
        if sft_loss == "response":
            weight += [0] * p + [1 / (len(lengths) * c)] * c + [0] * r
        else:
            weight += [1 / rows_of_chosen] * (p + c) + [0] * r
    n = len(response)
    hidden = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    lm_head = torch.randn(vocab, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (n,), generator=generator)
    tensors = (hidden.to(dtype), lm_head.to(dtype), targets, torch.tensor(response))
    return *tensors, torch.tensor(weight, dtype=torch.float64), 0.5, len(lengths)


def error(x, y):
    """Of a tensor as a whole: the largest difference over the largest entry."""
    return ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()


@pytest.mark.parametrize("sft_loss", ["response", "full"])
@both_dtypes
def test_fused_equals_plain(sft_loss, dtype):
    """Loss, every output, and the gradients of hidden states and lm_head."""
    step = a_step(dtype, sft_loss)
    (out, *grads), (plain_out, *plain_grads) = fused(*step), plain(*a_step(torch.float64, sft_loss))
    for name, x, y in zip(out._fields, out, plain_out, strict=True):
        assert x.shape == y.shape and x.dtype == (dtype if name == "loss" else torch.float64)
        assert error(x, y) < RTOL[dtype], name
    for x, y, like in zip(grads, plain_grads, step[:2], strict=True):
        assert x.dtype == dtype and x.shape == like.shape
        assert error(x, y) < RTOL[dtype]


def test_fused_response_weights_are_orpo_loss():
    """1/(pairs * m) on the chosen tokens makes the sum of weights the E[L_SFT] of orpo_loss."""
    out, _, _ = fused(*a_step(torch.float64))
    expected = orpo.orpo_loss(out.chosen_logps, out.rejected_logps, lam=0.5)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_fused_in_bf16_equals_plain_to_bf16(sft_loss):
    """
    bf16 keeps 8 bits, 0.4 %: the logits are rounded so, and later their gradient. What is computed
    from the logits is not: loss and log-probabilities are the plain path's of the same logits.
    """
    hidden, lm_head, *rest = a_step(torch.bfloat16, sft_loss)
    out, *grads = fused(hidden, lm_head, *rest)
    logits, identity = (hidden @ lm_head.t()).double(), torch.eye(len(lm_head)).double()
    for name, x, y in zip(out._fields, out, plain(logits, identity, *rest)[0], strict=True):
        assert x.dtype == (torch.float32 if name == "loss" else torch.float64)
        assert error(x, y) < 1e-6, name
    for x, y in zip(grads, plain(hidden.double(), lm_head.double(), *rest)[1:], strict=True):
        assert x.dtype == torch.bfloat16
        assert error(x, y) < 2e-2


def test_gradient_of_a_bf16_lm_head_is_summed_in_float32():
    """
    512 copies of one pair, each a group of its own that adds 1/512 of the gradient. A sum in bf16
    would stop growing at 256 of them, where a summand is half a unit in its last place.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, generator=generator).bfloat16()
    lm_head = torch.randn(5, 4, generator=generator).bfloat16()
    targets, weight = torch.tensor([1, 2]), torch.tensor([1.0, 0.0])
    _, _, expected = fused(hidden, lm_head, targets, torch.tensor([0, 1]), weight, 0.5, 1)
    n = 512
    many = (hidden.repeat(n, 1), lm_head, targets.repeat(n), torch.arange(2 * n))
    groups = [(2 * i, 2 * i + 2) for i in range(n)]
    _, _, got = fused(*many, weight.repeat(n) / n, 0.5, n, groups=groups)
    assert error(got, expected) < 1e-2


def test_fused_keeps_a_float32_gradient_for_a_float32_lm_head():
    """bf16 products over a float32 master weight: its gradient is not rounded to bf16."""
    hidden, lm_head, *rest = a_step(torch.float32)
    _, grad_hidden, grad_lm_head = fused(hidden.bfloat16(), lm_head, *rest)
    assert grad_hidden.dtype == torch.bfloat16 and grad_lm_head.dtype == torch.float32
    _, expected_hidden, expected_lm_head = plain(*a_step(torch.float64))
    assert error(grad_lm_head, expected_lm_head) < 2e-2
    assert error(grad_hidden, expected_hidden) < 2e-2


@pytest.mark.parametrize("group_tokens", [1, 4, 10, 1000])
def test_groups_change_nothing(group_tokens):
    step = a_step(torch.float64, "full")
    groups = groups_of(step[3], group_tokens)
    assert len(groups) > 1 or group_tokens == 1000
    (out, *grads), (whole, *whole_grads) = fused(*step, groups=groups), fused(*step)
    for x, y in zip((*out, *grads), (*whole, *whole_grads), strict=True):
        assert error(x, y) < 1e-12


@both_dtypes
@pytest.mark.parametrize("max_rows", [1, 3, 8])
@pytest.mark.parametrize("group_tokens", [4, 1000])
def test_a_long_group_goes_in_slices(monkeypatch, dtype, max_rows, group_tokens):
    """Its logits are formed twice, and values and gradients stay."""
    step = a_step(dtype, "full")
    expected, *expected_grads = fused(*step)
    monkeypatch.setattr(orpo, "MAX_ROWS", max_rows)
    rows, logits_of = [], orpo._logits
    monkeypatch.setattr(orpo, "_logits", lambda h, w: rows.append(len(h)) or logits_of(h, w))
    out, *grads = fused(*step, groups=groups_of(step[3], group_tokens))
    assert max(rows) <= max_rows and sum(rows) > len(step[0])
    for x, y in zip((*out, *grads), (*expected, *expected_grads), strict=True):
        assert error(x, y) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_the_softmax_that_is_compiled_is_the_same():
    """Of logits whose rows lie apart, as `_logits` makes them; without a code generator."""
    generator, targets = torch.Generator().manual_seed(0), torch.tensor([0, 4, 2])
    logits = (9 * torch.randn(3, 8, generator=generator))[:, :5]
    wanted, got = logits.clone(), logits  # a view, which has to be changed in place
    expected = orpo._softmax_of_rows(wanted, targets)
    torch._dynamo.reset()
    compiled = torch.compile(orpo._softmax_of_rows, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(got, targets), expected)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    assert got[torch.arange(3), targets].tolist() == [-1.0] * 3
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_groups_may_cut_pairs(rows):
    """Also where the rows of a pair do not lie together: here chosen ones first, then rejected."""
    hidden, lm_head, targets, response, weight, *rest = a_step(torch.float64, "full")
    n = len(response)
    groups = [(i, min(i + rows, n)) for i in range(0, n, rows)]
    for order in (torch.arange(n), (response % 2).sort(stable=True).indices):
        step = hidden[order], lm_head, targets[order], response[order], weight[order], *rest
        (out, *grads), (whole, *whole_grads) = fused(*step, groups=groups), fused(*step)
        for x, y in zip((*out, *grads), (*whole, *whole_grads), strict=True):
            assert error(x, y) < 1e-12


@pytest.mark.parametrize("groups", [[], [(0, 3)], [(3, 7)], [(0, 3), (4, 7)], [(0, 8)]])
def test_groups_that_leave_out_rows_are_refused(groups):
    """Their rows of the gradient would be whatever the memory held."""
    hidden, lm_head = torch.randn(7, 4), torch.randn(5, 4)
    response, weight = torch.tensor([0, 0, 1, 2, 2, 3, 3]), torch.ones(7)
    with pytest.raises(ValueError, match="groups must cover rows 0 to 7 in order"):
        fused(hidden, lm_head, torch.zeros(7).long(), response, weight, 0.5, 2, groups=groups)


def test_micro_batches_add_up():
    """The pairs of one step in two calls, with the normalisers of the step: a plain sum."""
    hidden, lm_head, targets, response, weight, lam, n_pairs = a_step(torch.float64, "full")
    whole, grad_hidden, grad_lm_head = fused(*a_step(torch.float64, "full"))
    cut = int((response >= 4).nonzero()[0]) - 2  # before the prompt rows of pair 2
    parts = []
    for rows, first in ((slice(0, cut), 0), (slice(cut, None), 2)):
        local = torch.where(response[rows] >= 0, response[rows] - 2 * first, -1)
        parts.append(fused(hidden[rows], lm_head, targets[rows], local, weight[rows], lam, n_pairs))
    (one, one_hidden, one_lm_head), (two, two_hidden, two_lm_head) = parts
    assert error(one.loss + two.loss, whole.loss) < 1e-12
    assert error(one.nll_loss + two.nll_loss, whole.nll_loss) < 1e-12
    assert error(torch.cat([one.chosen_logps, two.chosen_logps]), whole.chosen_logps) < 1e-12
    assert error(torch.cat([one_hidden, two_hidden]), grad_hidden) < 1e-12
    assert error(one_lm_head + two_lm_head, grad_lm_head) < 1e-12


@both_dtypes
def test_evaluation_gives_the_same_numbers(dtype):
    """Under no_grad, and with nothing that requires a gradient."""
    step = a_step(dtype)
    expected, _, _ = fused(*step)
    leaf = step[0].clone().requires_grad_()
    with torch.no_grad():
        results = [orpo.fused_linear_orpo(leaf, *step[1:])]
    results.append(orpo.fused_linear_orpo(*step))
    for out in results:
        assert not out.loss.requires_grad
        assert all(map(torch.equal, out, expected))


def test_few_logits_are_copied_to_float32_at_a_time():
    """2^20 of them on a CPU, or a row that has more."""
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16:
                copied.append(tuple(out.shape))
            return out

    for vocab_size, n_rows in ((2**18, 4), (2**20 + 8, 1)):
        logits = torch.zeros(6, vocab_size, dtype=torch.bfloat16)
        with Copies():
            orpo._softmax_of_others(logits, torch.zeros(6, dtype=torch.int64))
        rest = [6 % n_rows] if 6 % n_rows else []
        assert [n for n, v in copied if v == vocab_size] == [n_rows] * (6 // n_rows) + rest


def test_evaluation_forms_no_gradient(monkeypatch):
    """It would cost two more matrix products: the derivative must not even be asked for."""
    monkeypatch.setattr(orpo, "odds_ratio_grad", None)
    hidden, *rest = a_step(torch.float32)
    with torch.no_grad():
        orpo.fused_linear_orpo(hidden.requires_grad_(), *rest)
    with pytest.raises(TypeError):
        orpo.fused_linear_orpo(hidden, *rest)


def test_upstream_gradient_scales():
    """(loss * 3).backward() is three times loss.backward()."""
    step = a_step(torch.float64)
    (_, *once), (_, *thrice) = fused(*step), fused(*step, upstream=3)
    assert all(error(y, 3 * x) < 1e-15 for x, y in zip(once, thrice, strict=True))


def test_frozen_inputs_get_no_gradient_and_the_other_its_own():
    hidden, lm_head, *rest = a_step(torch.float64)
    _, grad_hidden, grad_lm_head = fused(hidden, lm_head, *rest)
    hidden.requires_grad_()
    orpo.fused_linear_orpo(hidden, lm_head, *rest).loss.backward()
    assert torch.equal(hidden.grad, grad_hidden) and lm_head.grad is None
    hidden = hidden.detach()
    lm_head.requires_grad_()
    orpo.fused_linear_orpo(hidden, lm_head, *rest).loss.backward()
    assert torch.equal(lm_head.grad, grad_lm_head) and hidden.grad is None


def test_only_the_loss_carries_a_gradient():
    hidden, *rest = a_step(torch.float64)
    out = orpo.fused_linear_orpo(hidden.requires_grad_(), *rest)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]


@both_dtypes
def test_lam_zero_is_sft_in_the_fused_road_too(dtype):
    """At a rejected response that is certain beyond float64, where L_OR is huge; logits [z, 0]."""
    for lead in (80.0, 1e4, 1e30):
        logits = torch.tensor([[0.0, 1.0], [lead, 0.0]], dtype=dtype)
        rest = (torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
        out, grad, _ = fused(logits, torch.eye(2, dtype=dtype), *rest, 0.0, 1)
        assert out.loss.item() == pytest.approx(math.log(1 + math.e), rel=1e-6)
        p = 1 / (1 + math.e)  # of the chosen token: d(-log p)/dz = (p - 1, 1 - p)
        assert grad[0].tolist() == pytest.approx([p - 1, 1 - p], rel=1e-6)
        assert grad[1].tolist() == [0, 0]


def test_wrong_shapes_are_refused_by_name():
    hidden, lm_head, targets, response, weight, lam, n_pairs = a_step(torch.float32)
    good = (hidden, lm_head, targets, response, weight, lam, n_pairs)
    for position, name in ((2, "targets"), (3, "response"), (4, "nll_weight")):
        bad = list(good)
        bad[position] = bad[position][:-1]
        with pytest.raises(ValueError, match=rf"{name}.*shape.*\(39,\).*\(40, 6\)"):
            orpo.fused_linear_orpo(*bad)
    with pytest.raises(ValueError, match=r"shape.*\(13, 5\).*\(40, 6\)"):
        orpo.fused_linear_orpo(hidden, lm_head[:, :-1], *good[2:])
    with pytest.raises(ValueError, match="both its responses"):  # the last rejected is missing
        orpo.fused_linear_orpo(*(x[:-1] if i in (0, 2, 3, 4) else x for i, x in enumerate(good)))


def test_response_logps_is_a_mean_over_the_mask():
    """
    Uniform logits over 4: every token has log-probability -log 4, so has their mean. A row outside
    the mask may hold anything, a target of probability 0 included, and gets no gradient.
    """
    logits = torch.zeros(2, 3, 4)
    logits[0, 2], logits[1, 0, 3], logits[1, 2, 0] = 7 * torch.arange(4.0), -math.inf, 5
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    targets = torch.tensor([[0, 1, 2], [3, 2, 1]])
    logits.requires_grad_()
    logps = orpo.response_logps(logits, targets, mask)
    assert logps.tolist() == pytest.approx([-math.log(4)] * 2, rel=1e-6)
    logps.sum().backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask.bool())
    with pytest.raises(ValueError, match="empty"):
        orpo.response_logps(logits, targets, mask * torch.tensor([[1], [0]]))


def test_response_logps_upcasts_bf16_logits():
    """The log-softmax and the mean of bf16 logits are those of the same numbers in float32."""
    logits = a_pair([None] * 4, [None] * 4, torch.float32)[0].unflatten(0, (2, 4)).bfloat16()
    targets, mask = torch.tensor([[0, 1, 2, 3]] * 2), torch.tensor([[0, 1, 1, 1]] * 2)
    logps = orpo.response_logps(logits, targets, mask)
    assert logps.dtype == torch.float32
    assert torch.equal(logps, orpo.response_logps(logits.float(), targets, mask))


# -----------------------------------------------------------------------------
# Certainty, from the logits up


def a_pair(chosen_leads, rejected_leads, dtype, seed=0, vocab=5):
    """One pair of logits; a target leads the best other logit by so much (None: at random)."""
    generator = torch.Generator().manual_seed(seed)
    leads = [*chosen_leads, *rejected_leads]
    logits = torch.randn(len(leads), vocab, generator=generator).to(dtype)
    targets = torch.randint(vocab, (len(leads),), generator=generator)
    for row, target, lead in zip(logits, targets.tolist(), leads, strict=True):
        if lead is not None:
            row[target] = -torch.inf
            row[target] = row.max() + lead
    m_w, m_l = len(chosen_leads), len(rejected_leads)
    response = torch.tensor([0] * m_w + [1] * m_l)
    return logits, targets, response, torch.tensor([1 / m_w] * m_w + [0.0] * m_l, dtype=dtype)


LEADS = [None, -80, -40, -18, 18, 40, 80]


@both_dtypes
@pytest.mark.parametrize("rejected_lead", LEADS)
@pytest.mark.parametrize("chosen_lead", LEADS)
@pytest.mark.parametrize("one_doubt", [False, True], ids=["all tokens", "one token in doubt"])
def test_gradient_is_exact_at_leads_up_to_80_nats(chosen_lead, rejected_lead, one_doubt, dtype):
    """
    float32's log-softmax is exactly 0 from a lead of 18 on, float64's from 37 on; the true gradient
    of the logits is bounded all the same: (1 - p_t)/(1 - P) is at most m. Three chosen and two
    rejected tokens; in doubt, the last one of each leads by 5 nats less than the others.
    """

    def leads(lead, m):
        return [lead] * (m - 1) + [lead - 5 if lead is not None and one_doubt else lead]

    logits, *rest = a_pair(leads(chosen_lead, 3), leads(rejected_lead, 2), dtype)
    out, grad, _ = fused(logits, torch.eye(5, dtype=dtype), *rest, 1.0, 1)
    rows = list(zip(logits.tolist(), rest[0].tolist(), strict=True))
    sides = [[(*zip(*side, strict=True), [1] * len(side))] for side in (rows[:3], rows[3:])]
    truth = oracle.orpo_from_logits(*sides, 1.0)
    assert worst(out.loss[None], [truth["loss"]]) < RTOL[dtype]
    assert worst(out.odds_ratio_loss, truth["l_or"]) < RTOL[dtype]
    assert worst_row(grad, truth["chosen_grad"][0] + truth["rejected_grad"][0]) < RTOL[dtype]


@pytest.mark.parametrize("offset", [-4096.0, 128.0, 4096.0])
def test_only_differences_of_logits_matter(offset):
    """exp overflows at 89 in float32: the largest logit comes off first. Multiples of 1/16 add
    exactly, so the numbers are the same to the last bit."""
    logits, *rest = a_pair([None, 18, 40], [None, 80], torch.float32)
    logits = (logits * 16).round() / 16
    expected, expected_grad, _ = fused(logits, torch.eye(5), *rest, 1.0, 1)
    out, grad, _ = fused(logits + offset, torch.eye(5), *rest, 1.0, 1)
    assert all(map(torch.equal, (*out, grad), (*expected, expected_grad)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [95.0, 104.0, 200.0, 746.0, 1000.0, 1e4, 1e30])
def test_loss_and_gradient_are_finite_at_any_lead(lead, dtype):
    """Leading or trailing, either side or both, one token or all; and |gradient| <= 1/m + lam."""
    for chosen in ([None] * 3, [lead] * 3, [-lead] * 3, [lead, None, -lead], [lead, lead, 30.0]):
        for rejected in ([None] * 2, [lead] * 2, [-lead] * 2, [lead, None], [lead, 30.0]):
            logits, *rest = a_pair(chosen, rejected, dtype)
            out, grad, grad_lm_head = fused(logits, torch.eye(5, dtype=dtype), *rest, 1.0, 1)
            assert all(x.isfinite().all() for x in (*out, grad)), (chosen, rejected)
            assert grad.abs().max() <= 1.01 * (1 / 3 + 1), (chosen, rejected)
            if lead < 1e30:  # the product of a gradient and a logit of 1e30 may leave the range
                assert grad_lm_head.isfinite().all(), (chosen, rejected)


def test_a_process_without_pairs_has_gradients_too():
    """Zeros, to which the other processes' are added; lm_head may be a weight of its own."""
    empty = torch.zeros(0, dtype=torch.int64)
    hidden, lm_head = torch.zeros(0, 4).requires_grad_(), torch.ones(7, 4).requires_grad_()
    out = orpo.fused_linear_orpo(hidden, lm_head, empty, empty, torch.zeros(0), 0.5, 3, empty, [])
    out.loss.backward()
    assert out.loss == 0 and hidden.grad.shape == (0, 4)
    assert torch.equal(lm_head.grad, torch.zeros(7, 4))


@pytest.mark.parametrize("response", [[0, 0, 3], [1, 1, 1], [0, 1, 2], [0, 0, 2, 3]])
def test_a_pair_that_lacks_a_response_is_refused(response):
    """Its mean would be 0/0."""
    n, response = len(response), torch.tensor(response)
    rest = torch.zeros(n, dtype=torch.int64), response, torch.ones(n), 0.5, 2
    with pytest.raises(ValueError, match="every pair needs both its responses"):
        orpo.fused_linear_orpo(torch.ones(n, 4), torch.ones(7, 4), *rest)
