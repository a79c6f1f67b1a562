"""
The transformer: packed against separate, cached against recomputed, against a few plain loops and
a real checkpoint. float64 where two paths must agree.
"""

import json
import random

import pytest
import torch

from attention import Gather, KVCache
from data import micro_batches
from formats.families import FAMILIES
from model import ApplyRotary, Transformer, sample
from orpo import fused_linear_orpo, odds_ratio_loss, orpo_loss, response_logps
from tests.small import V, kinds, packed, random_model, random_pairs


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
RANDOM_LENGTHS = [
    [tuple(rng.randint(1, 9) for _ in range(3)) for _ in range(rng.randint(1, 5))]
    for rng in map(random.Random, range(3))
]

# -----------------------------------------------------------------------------
# Packing


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
@pytest.mark.parametrize("lengths", [LENGTHS, *RANDOM_LENGTHS], ids=["edges", "r0", "r1", "r2"])
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


@pytest.mark.parametrize("head_dim", [6, 9])
def test_the_gradient_of_a_rotation_is_the_rotation_back(head_dim):
    """Of three pairs of dimensions, and of three more that stay; float64 differences."""
    angle = torch.rand(4, 1, 3, dtype=torch.float64) * 6
    x = torch.randn(4, 2, head_dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ApplyRotary.apply(x, angle.cos(), angle.sin()), x)
    turned = ApplyRotary.apply(x, angle.cos(), angle.sin()).detach()
    z = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones_like(angle), angle)
    wanted = torch.cat((z.real, z.imag, x[..., 6:]), -1).detach()
    torch.testing.assert_close(turned, wanted, rtol=0, atol=1e-12)


# -----------------------------------------------------------------------------
# What sees what


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


def test_logits_equal_plain_loops():
    """One head and one query at a time, rotary as a product of complex numbers."""
    model = random_model(n_kv_heads=2, rope_theta=100.0, norm_eps=0.1)
    w, c = dict(model.named_parameters()), model.config
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    half = c.head_dim // 2

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]

    def turned(x, position):  # (d,): dimensions i and i + d/2 are one complex number
        angles = position * c.rope_theta ** (-torch.arange(half).double() / half)
        z = torch.complex(x[:half], x[half:]) * torch.exp(1j * angles)
        return torch.cat((z.real, z.imag))

    x = w["embed_tokens.weight"][tokens]
    for i in range(c.n_layers):
        at = f"layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (h @ w[f"{at}.self_attn.{n}_proj.weight"].T).split(c.head_dim, dim=-1) for n in "qkv"
        )
        rows = []
        for t in range(len(tokens)):
            row = []
            for head in range(c.n_heads):
                shared = head // (c.n_heads // c.n_kv_heads)
                keys = torch.stack([turned(k[shared][s], s) for s in range(t + 1)])
                scores = keys @ turned(q[head][t], t) / c.head_dim**0.5
                row.append(scores.softmax(0) @ v[shared][: t + 1])
            rows.append(torch.cat(row))
        x = x + torch.stack(rows) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (h @ w[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{at}.mlp.down_proj.weight"].T
    wanted = norm(x, "norm") @ w["lm_head.weight"].T
    # rotary angles are float32 also in a float64 model, hence not 1e-12
    torch.testing.assert_close(model(tokens[None])[0], wanted, rtol=0, atol=2e-6)


# -----------------------------------------------------------------------------
# Generation


def greedy_by_full_forward(model, prompt, n):
    tokens = torch.tensor([prompt])
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens[0, len(prompt) :].tolist()


def random_prompts(*lengths, seed=0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(n)] for n in lengths]


PHI, OPT = FAMILIES["phi"].values, FAMILIES["opt"].values
SHAPES = {
    "mha, tied": {"n_kv_heads": 4, "tie_embeddings": True},
    "gqa": {},
    "one kv head, tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "window": {"windows": [5, 5]},
    "window in one layer": {"windows": [None, 3]},
    "partial rotary, parallel": PHI,
    "learned positions": OPT | {"tie_embeddings": False, "position_offset": 0},
    "learned positions with an offset": OPT | {"tie_embeddings": False},
    "projected embeddings, norms behind": OPT | {"embed_dim": 8, "norm_first": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_prompts_generate_what_each_generates_by_recomputing(shape):
    """float32, token by token. One prompt has one token; of one the answer fills the context."""
    model, seen = random_model(torch.float32, seed=2, **SHAPES[shape]), set()
    for seed in range(3):
        lengths = random.Random(seed).choices(range(1, 40), k=4)
        prompts = random_prompts(1, 52, *lengths, seed=seed)
        for prompt, new in zip(prompts, model.generate(prompts, 12), strict=True):
            assert new == greedy_by_full_forward(model, prompt, 12)
            assert [new] == model.generate([prompt], 12)
            seen |= set(new)
    assert len(seen) > 4, "too dull a text to tell anything"


@pytest.mark.parametrize("cuts", [[5, 1, 1, 1], [3, 4, 1], [1] * 8, [2, 6]], ids=str)
def test_cache_gives_the_full_forwards_logits(cuts):
    """However the tokens arrive: also several at once over a cache, which needs the mask."""
    model, tokens = random_model(), torch.randint(V, (2, 8), generator=torch.Generator())
    cache, outs = KVCache(model.config, [8, 8], None, torch.float64), []
    for new in tokens.split(cuts, dim=1):
        positions, segments = cache.grow([0, 1], [new.shape[1]] * 2)
        outs.append(model.hidden_states(new.flatten(), positions, segments, cache).view(2, -1, 16))
    torch.testing.assert_close(model.logits(torch.cat(outs, 1)), model(tokens), rtol=0, atol=1e-12)


def test_a_cache_grows_sequence_by_sequence():
    """Sequences of 5, 3 and 2 rows: prompts of 2, 1 and 2 tokens, then one more for two of them."""
    cache = KVCache(random_model().config, [5, 3, 2], None, torch.float64)
    positions, segments = cache.grow([0, 1, 2], [2, 1, 2])
    assert positions.tolist() == [0, 1, 0, 0, 1]
    assert cache.rows.tolist() == segments.key_index.tolist() == [0, 1, 5, 8, 9]
    assert segments.lengths == ((2, 2), (1, 1), (2, 2))
    positions, segments = cache.grow([0, 1], [1, 1])
    assert positions.tolist() == [2, 1] and cache.rows.tolist() == [2, 6]
    assert segments.key_index.tolist() == [0, 1, 2, 5, 6]
    assert segments.lengths == ((1, 3), (1, 2))


def test_a_sequence_ends_behind_eos_and_leaves_the_batch(monkeypatch):
    model, prompts = random_model(), random_prompts(4, 2, 7)
    free = model.generate(prompts, 20)
    # an id that row 0 meets early, then another row later, and one that never comes
    eos_id = next(x for x in free[0] if all(x in row for row in free[1:]))
    stops = [row.index(eos_id) + 1 for row in free]
    assert len(set(stops)) > 1, "the rows should finish at different steps"
    sizes, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: sizes.append(len(hidden)) or logits(hidden))
    got = model.generate(prompts, 20, eos_id=eos_id)
    assert got == [row[:stop] for row, stop in zip(free, stops, strict=True)]
    assert sizes == [sum(stop > t for stop in stops) for t in range(max(stops))]
    never = next(x for x in range(V) if not any(x in row for row in free))
    assert model.generate(prompts, 20, eos_id=never) == free


def test_an_eos_in_the_prompt_stops_nothing():
    model, prompt = random_model(), [0, 1, 2, 3]
    (first,) = model.generate([prompt], 1)
    eos_id = next(x for x in prompt if x != first[0])
    assert model.generate([prompt], 1, eos_id=eos_id) == [first]


def test_context_may_be_filled_and_not_exceeded():
    model = random_model(max_seq_len=8)
    prompts = [[1] * 5, [1] * 8, [1]]
    assert [len(new) for new in model.generate(prompts, 4)] == [3, 0, 4]
    assert model.generate(prompts, 0) == [[], [], []] and model.generate([], 4) == []
    for wrong in ([1] * 9, []):
        with pytest.raises(ValueError, match=rf"{len(wrong)} tokens.*context is 1 to 8"):
            model.generate([[1], wrong], 4)
    with pytest.raises(ValueError, match=r"9\b.*context.*8"):
        model(torch.arange(9)[None])


PROBS = torch.tensor([0.15, 0.5, 0.05, 0.3])  # not sorted, so that ranks are not indices


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.0}, [1]),  # the smallest set that is not empty
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of the two left, 0.5/0.8 > 0.6
        ({"top_k": 3, "top_p": 0.999}, [0, 1, 3]),
    ],
    ids=str,
)
def test_sampling_draws_the_softmax_of_what_is_kept(options, kept):
    wanted = torch.zeros(4)
    wanted[kept] = PROBS[kept] / PROBS[kept].sum()
    assert_frequencies(1.0, options, wanted)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_temperature(temperature):
    """At 1/2 the probabilities are squared and normalised: 45, 500, 5, 180 of 730."""
    assert_frequencies(0.5, {}, torch.tensor([45, 500, 5, 180]) / 730)
    wanted = PROBS ** (1 / temperature)
    assert_frequencies(temperature, {}, wanted / wanted.sum())


def assert_frequencies(temperature, options, wanted):
    """20,000 draws: a frequency's standard deviation is at most 0.0036, so 0.018 is five."""
    logits = (PROBS.log() + 7).expand(20_000, 4)
    drawn = sample(logits, temperature, generator=torch.Generator().manual_seed(0), **options)
    frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.equal(frequencies > 0, wanted > 0)
    torch.testing.assert_close(frequencies, wanted, rtol=0, atol=0.018)


def test_each_row_is_filtered_by_its_own_logits():
    logits = torch.tensor([[4.0, 1, 2, 3], [1, 4, 3, 2], [3, 2, 1, 4]])
    for options in ({"top_k": 1}, {"top_p": 0.3}):
        assert sample(logits, 1.0, **options).tolist() == [0, 1, 3]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_sampling_from_one_token_is_greedy(options):
    model, prompts = random_model(), random_prompts(4, 6)
    assert model.generate(prompts, 20, 1.0, **options) == model.generate(prompts, 20)


def test_a_generator_decides_the_sample():
    model, prompts = random_model(), random_prompts(4, 6)
    texts = [
        model.generate(prompts, 20, 1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


# -----------------------------------------------------------------------------
# A real checkpoint


@pytest.fixture(scope="module")
def stories(shared):
    """What transformers gives in float32, and our tokens and the logits that predict the new."""
    expected = json.loads((shared / "stories260K" / "expected.json").read_text())
    model = Transformer.from_pretrained(shared / "stories260K")
    assert not model.training and model.config.max_seq_len == 512
    prompt = expected["prompt_ids"]
    (new,) = model.generate([prompt], len(expected["greedy_ids"]))
    with torch.no_grad():
        return expected, new, model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]


def test_stories260k_gives_the_expected_text(stories):
    """The best two logits are 0.07 apart or more."""
    expected, new, _ = stories
    assert new == expected["greedy_ids"]


def test_stories260k_gives_the_expected_logits(stories):
    expected, _, logits = stories
    top = logits[0].topk(5)
    assert top.indices.tolist() == expected["first_top5"]["ids"]
    wanted = torch.tensor(expected["first_top5"]["logits"])
    torch.testing.assert_close(top.values, wanted, rtol=0, atol=1e-4)  # four digits are given


def test_stories260k_gives_the_expected_log_probabilities(stories):
    expected, _, logits = stories
    new = torch.tensor(expected["greedy_ids"])[:, None]
    logps = logits.log_softmax(-1).gather(-1, new).squeeze(1)
    wanted = torch.tensor(expected["greedy_logps"])
    torch.testing.assert_close(logps, wanted, rtol=0, atol=3e-5)  # five digits are given


# -----------------------------------------------------------------------------
# dtypes


@pytest.fixture
def in_bfloat16():
    model = random_model(torch.float32)
    model.compute_dtype = torch.bfloat16
    return model


def test_bfloat16_compute_leaves_the_parameters_in_float32(in_bfloat16):
    hidden, _ = packed_hidden(in_bfloat16, random_pairs(LENGTHS))
    assert hidden.dtype == in_bfloat16(torch.arange(5)[None]).dtype == torch.bfloat16
    assert {p.dtype for p in in_bfloat16.parameters()} == {torch.float32}


def test_gradients_by_bfloat16_compute_are_float32_and_point_the_right_way(in_bfloat16):
    exact, pairs = random_model(torch.float32), random_pairs(LENGTHS)
    got, wanted = (
        gradients(step_loss(model, pairs, "response", 0.7), model) for model in (in_bfloat16, exact)
    )
    assert {g.dtype for g in got} == {torch.float32}
    flat = (torch.cat([g.flatten() for g in x]) for x in (got, wanted))
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


def test_generation_by_bfloat16_compute_begins_as_by_recomputing(in_bfloat16):
    prompts = random_prompts(4, 6)
    got = in_bfloat16.generate(prompts, 9)
    firsts = [greedy_by_full_forward(in_bfloat16, prompt, 1) for prompt in prompts]
    assert [new[:1] for new in got] == firsts


def test_norms_are_float32_inside():
    """3e5 squared is beyond float16's range and 1e-5 squared below it."""
    norm = random_model().norm
    with torch.no_grad():
        norm.weight.fill_(1)
    for size in (3e4, 1.0):
        got = norm(torch.full((1, 16), size, dtype=torch.float16))
        assert torch.equal(got, torch.ones(1, 16, dtype=torch.float16))
