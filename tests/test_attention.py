"""Attention and packing: what sees what, and that packed pairs equal separate sequences."""

import functools
import random

import pytest
import torch

import attention as attention_module
import train
from attention import Gather, attention
from data import micro_batches
from orpo import fused_linear_orpo, odds_ratio_loss, orpo_loss, response_logps
from run import compiled
from run.compiled import compile_blocks
from tests import varlen_cpu
from tests.small import V, kinds, packed, plain, random_model, random_pairs


def packed_hidden(model, pairs):
    """The hidden states (N, D) of one micro-batch, and its Batch."""
    (batch,) = micro_batches(pairs, 10**9, "full")
    return model.hidden_states(batch.tokens, batch.positions, batch.segments), batch


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same_gradients(got, wanted, model, rtol):
    """Each parameter's gradient, relative to its largest entry."""
    for (name, _), g, w in zip(model.named_parameters(), got, wanted, strict=True):
        assert w.abs().max() > 1e-6, f"{name} has no gradient, so it tests nothing"
        torch.testing.assert_close(
            g, w, rtol=0, atol=rtol * float(w.abs().max()), msg=lambda m, name=name: f"{name}: {m}"
        )


# A prompt of one token, responses of one token, and lengths at random.
LENGTHS = [(1, 1, 1), (5, 1, 4), (1, 6, 1), (3, 2, 7), (7, 3, 3)]
AS_LONG = [(3, 2, 5)]  # the rejected response is as long as prompt and chosen one together
RANDOM_LENGTHS = [
    [tuple(rng.randint(1, 9) for _ in range(3)) for _ in range(rng.randint(1, 5))]
    for rng in map(random.Random, range(3))
]


def test_segments_by_hand():
    """
    Runs (p, c, r) = (2, 3, 2) and (1, 1, 1) are tokens 0..6 and 7..9. Queries: p + c, then r.
    Keys: prompt + chosen are 0..4, prompt + rejected are 0 1 5 6; then 7 8, and 7 9.
    """
    segments = packed([(2, 3, 2), (1, 1, 1)])
    assert segments.lengths == ((5, 5), (2, 4), (2, 2), (1, 2))
    assert (segments.max_q, segments.max_k) == (5, 5)
    assert segments.cu_q.tolist() == [0, 5, 7, 9, 10]
    assert segments.cu_k.tolist() == [0, 5, 9, 11, 13]
    assert segments.cu_q.dtype == segments.cu_k.dtype == torch.int32  # as varlen_attn asks
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 7, 9]
    assert segments.first_copy.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 12]
    assert segments.last_copy.tolist() == [5, 6, 2, 3, 4, 7, 8, 11, 10, 12]


@kinds
@pytest.mark.parametrize(
    "lengths", [LENGTHS, AS_LONG, *RANDOM_LENGTHS], ids=["edges", "as long", "r0", "r1", "r2"]
)
def test_packed_equals_separate(kind, lengths):
    """Logits at every position, and every parameter's gradient of a random function of them."""
    model, pairs = random_model(**kind), random_pairs(lengths)
    packed = model.logits(packed_hidden(model, pairs)[0])  # (N, V)
    separate = []
    for prompt, chosen, rejected, *_ in pairs:
        whole, other = (model(torch.tensor([prompt + y]))[0] for y in (chosen, rejected))
        separate += [whole, other[len(prompt) :]]
        torch.testing.assert_close(other[: len(prompt)], whole[: len(prompt)], rtol=0, atol=1e-12)
    separate = torch.cat(separate)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-11)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1)).double()
    got, wanted = (
        gradients((logits.tanh() * weight).sum(), model) for logits in (packed, separate)
    )
    assert_same_gradients(got, wanted, model, rtol=1e-11)


def step_loss(model, pairs, sft_loss, lam, budget=10**9):
    """A step as training runs it: packed micro-batches through the fused linear, summed."""
    total = torch.zeros((), dtype=torch.float64)
    for b in micro_batches(pairs, budget, sft_loss):
        hidden = model.hidden_states(b.tokens, b.positions, b.segments)
        weighted = b.targets, b.response, b.nll_weight
        n_pairs, lm_head = len(pairs), model.lm_head_weight
        total += fused_linear_orpo(hidden[b.predict], lm_head, *weighted, lam, n_pairs).loss
    return total


def plain_step_loss(model, pairs, sft_loss, lam):
    """The same by definition: every sequence alone, autograd throughout."""
    means, nll, n_tokens = [], 0, 0
    for prompt, *responses in (pair[:3] for pair in pairs):
        for response in responses:
            tokens = torch.tensor([prompt + response])
            logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
            is_response = torch.arange(1, tokens.shape[1])[None] >= len(prompt)
            means.append(response_logps(logits, targets, is_response))
            if response is responses[0]:
                nll -= response_logps(logits, targets, torch.ones_like(is_response)) * len(
                    targets[0]
                )
                n_tokens += len(targets[0])
    chosen, rejected = torch.cat(means[0::2]), torch.cat(means[1::2])
    if sft_loss == "response":
        return orpo_loss(chosen, rejected, lam)
    return nll.squeeze() / n_tokens + lam * odds_ratio_loss(chosen, rejected).mean()


@kinds
@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_step_equals_separate_forwards_by_autograd(kind, sft_loss):
    """rtol 1e-6 and not 1e-11 as nll_weight is float32: 6e-8 relative in each weight."""
    model, pairs = random_model(**kind), random_pairs(LENGTHS)
    got, wanted = (f(model, pairs, sft_loss, 0.7) for f in (step_loss, plain_step_loss))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    got, wanted = gradients(got, model), gradients(wanted, model)
    assert_same_gradients(got, wanted, model, rtol=1e-6)


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_gradient_ignores_micro_batching(sft_loss):
    model, pairs = random_model(), random_pairs(LENGTHS)
    steps = {}
    for budget in (10**9, 24, 1):
        steps[len(micro_batches(pairs, budget, sft_loss))] = gradients(
            step_loss(model, pairs, sft_loss, 0.7, budget), model
        )
    one, some, each = (steps[n] for n in sorted(steps))  # three different cuts, or this fails
    assert_same_gradients(some, one, model, rtol=1e-11)
    assert_same_gradients(each, one, model, rtol=1e-11)


def test_no_pairs_give_no_hidden_states():
    nothing = torch.empty(0, dtype=torch.int64)
    assert random_model().hidden_states(nothing, nothing, packed([])).shape == (0, 16)


def test_a_gathered_key_hands_its_gradient_to_its_token():
    """Prompt keys, which are gathered twice, get both gradients; float64 differences."""
    segments = packed([(2, 3, 2), (1, 1, 1)])
    copies = segments.key_index, segments.first_copy, segments.last_copy
    x = torch.randn(10, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Gather.apply(x, *copies), x)
    once = segments.key_index[:5], torch.arange(5), None
    assert torch.autograd.gradcheck(
        lambda x: Gather.apply(x, *once), x[:5].detach().requires_grad_()
    )


@pytest.mark.parametrize("t", [0, 3, 6])
def test_a_token_changes_its_own_and_later_logits_only(t):
    model, tokens = random_model(), torch.arange(14).view(2, 7)
    changed = tokens.clone()
    changed[0, t] += 14
    same = (model(tokens) == model(changed)).all(-1)
    assert same[0].tolist() == [True] * t + [False] * (7 - t)
    assert same[1].all(), "the other sequence of the batch moved"


@pytest.mark.parametrize(
    "changed, moved",
    [("prompt", "prompt chosen rejected"), ("chosen", "chosen"), ("rejected", "rejected")],
)
def test_branches_do_not_see_each_other(changed, moved):
    """A change in the first token of one part of pair 1 moves whole parts, and only of pair 1."""
    model = random_model()
    pairs = random_pairs([(2, 2, 3), (3, 4, 2), (1, 2, 2)])
    part = getattr(pairs[1], changed)
    others = [pairs[0], pairs[1]._replace(**{changed: [(part[0] + 1) % V, *part[1:]]}), pairs[2]]
    (before, _), (after, _) = (packed_hidden(model, x) for x in (pairs, others))
    parts = (before == after).all(-1).split([n for pair in pairs for n in pair.lengths])
    for name, same in zip(["prompt", "chosen", "rejected"] * 3, range(9), strict=True):
        is_moved = same // 3 == 1 and name in moved.split()
        assert parts[same].tolist() == [not is_moved] * len(parts[same]), (same // 3, name)


@pytest.mark.parametrize("window", range(1, 8))
def test_a_query_sees_so_many_keys_as_its_window(window):
    """In sequences of six: also where the window is as long, or by one shorter or longer."""
    q, k, v = torch.randn(3, 12, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    got = attention(q, k, v, plain(2, 6, 6), window)
    for row in range(12):
        first = max(row - row % 6, row - window + 1)
        scores = torch.einsum("hd,shd->hs", q[row], k[first : row + 1]) / 2
        wanted = torch.einsum("hs,shd->hd", scores.softmax(-1), v[first : row + 1])
        torch.testing.assert_close(got[row], wanted)


@pytest.fixture
def varlen(monkeypatch):
    """Attention goes to varlen_attn, on this CPU and in any dtype; its calls by name."""
    for module in (attention_module, compiled):
        monkeypatch.setattr(module, "has_varlen", lambda *_: True)
    varlen_cpu.calls.update(forward=0, backward=0)
    return varlen_cpu.calls


@pytest.mark.parametrize("window", [1, 3, 4, 6, 7, None])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_flash_attention_is_asked_for_the_same(monkeypatch, request, window, n_kv_heads):
    """The two branches of `attention` on packed pairs, by numbers: values and gradients."""
    rng, segments = torch.Generator().manual_seed(0), packed(LENGTHS)
    n = sum(map(sum, LENGTHS))
    inputs = [
        torch.randn(n, heads, 8, generator=rng, dtype=torch.float64, requires_grad=True)
        for heads in (4, n_kv_heads, n_kv_heads)
    ]
    weight, found = torch.randn(n, 4, 8, generator=rng, dtype=torch.float64), []
    for branch in ("by segment", "varlen"):
        if branch == "varlen":
            calls = request.getfixturevalue("varlen")
        out = attention(*inputs, segments, window)
        found.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    assert calls == {"forward": 1, "backward": 1}
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [{}, {"n_kv_heads": 1, "windows": [4, None]}], ids=str)
def test_a_step_by_flash_attention_has_the_same_gradients(request, kind):
    """With the padding of a bfloat16 micro-batch, as on a GPU. In bfloat16 both branches round, and
    neither lies much farther from the truth than the other."""
    (batch,) = micro_batches(random_pairs(LENGTHS), 10**9, "full", multiple=64)
    found = {}
    for branch in ("by segment", "varlen"):
        if branch == "varlen":
            calls = request.getfixturevalue("varlen")
        for dtype in (torch.float64, torch.bfloat16):
            exact = dtype == torch.float64
            model = random_model(torch.float64 if exact else torch.float32, **kind)
            model.compute_dtype = dtype
            grads = gradients(train.forward(model, batch, 0.7).loss, model)
            found[branch, dtype] = torch.cat([g.flatten().double() for g in grads])
    assert calls == {"forward": 4, "backward": 4}
    truth = found["by segment", torch.float64]
    distances = {key: ((x - truth).norm() / truth.norm()).item() for key, x in found.items()}
    assert distances["varlen", torch.float64] < 1e-14
    assert distances["varlen", torch.bfloat16] < 1.5 * distances["by segment", torch.bfloat16]


def test_a_compiled_block_that_runs_twice_keeps_its_products(monkeypatch, varlen):
    """So attention runs once in it, and the gradients stay. The second block is not checkpointed,
    and the products of q, k and v have biases."""
    model, pairs = random_model(qkv_bias=True), random_pairs(LENGTHS)
    model.checkpointed_blocks = 1
    wanted = gradients(step_loss(model, pairs, "full", 0.7), model)
    assert varlen == {"forward": 3, "backward": 2}
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    try:
        compile_blocks(model)
        varlen.update(forward=0, backward=0)
        got = gradients(step_loss(model, pairs, "full", 0.7), model)
        assert varlen == {"forward": 2, "backward": 2}
        with torch.no_grad():  # as in an evaluation: nothing to keep
            step_loss(model, pairs, "full", 0.7)
    finally:
        torch._dynamo.reset()
    assert_same_gradients(got, wanted, model, 1e-13)


@pytest.mark.parametrize(("n", "written"), [(2048, True), (2049, False)])
def test_attention_is_written_out_where_its_scores_are_few(n, written, monkeypatch):
    """In bfloat16 on a CPU. It keeps all of them: 4 million for each head of 2048 tokens."""
    seen, function = [], attention_module._attention_written_out

    def noted(*args):
        seen.append(args)
        return function(*args)

    monkeypatch.setattr(attention_module, "_attention_written_out", noted)
    x = torch.randn(n, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = attention(x, x, x, plain(1, n, n))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *[x.float().transpose(0, 1)[None]] * 3, is_causal=True
    )[0].transpose(0, 1)
    assert len(seen) == written and (out.float() - wanted).abs().max() < 5e-2


def test_gradients_by_bfloat16_compute_are_float32_and_point_the_right_way(in_bfloat16):
    exact, pairs = random_model(torch.float32), random_pairs(LENGTHS)
    got, wanted = (
        gradients(step_loss(model, pairs, "response", 0.7), model) for model in (in_bfloat16, exact)
    )
    assert {g.dtype for g in got} == {torch.float32}
    flat = (torch.cat([g.flatten() for g in x]) for x in (got, wanted))
    assert torch.cosine_similarity(*flat, dim=0) > 0.99
