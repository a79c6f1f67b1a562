"""
The transformer: packed against separate, cached against recomputed, against a few plain loops and
a real checkpoint; then its files, whole and broken. float64 where two roads must agree.
"""

import json
import os
import random
import string

import pytest
import torch

from data import Pair, micro_batches
from model import (
    KVCache,
    ModelConfig,
    Segments,
    Transformer,
    read_safetensors,
    sample,
    write_safetensors,
)
from orpo import fused_linear_orpo, odds_ratio_loss, orpo_loss, response_logps

V = 31
KINDS = [{"n_kv_heads": k, "tie_embeddings": t} for k in (4, 2, 1) for t in (False, True)]
kinds = pytest.mark.parametrize(
    "kind", KINDS, ids=[f"kv{k['n_kv_heads']}{'-tied' * k['tie_embeddings']}" for k in KINDS]
)


def random_model(dtype=torch.float64, seed=0, **config) -> Transformer:
    """Weights large enough for logits of a few nats: near-uniform ones would hide mistakes."""
    shape = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "n_kv_heads": 2}
    model = Transformer(ModelConfig(**({"vocab_size": V, "max_seq_len": 64} | shape | config)))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.copy_(0.4 * noise if p.dim() == 2 else 1 + 0.3 * noise)
    return model.to(dtype).eval()


def random_pairs(lengths, seed=0) -> list[Pair]:
    rng = random.Random(seed)
    return [Pair(*([rng.randrange(V) for _ in range(n)] for n in pcr)) for pcr in lengths]


def packed_hidden(model, pairs):
    """The hidden states (N, D) of one micro-batch, and its Batch."""
    (batch,) = micro_batches(pairs, 10**9, "full")
    segments = Segments.packed(batch.lengths)
    return model.hidden_states(batch.tokens, batch.positions, segments), batch


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
    segments = Segments.packed([(2, 3, 2), (1, 1, 1)])
    assert segments.q_lens == [5, 2, 2, 1] and segments.k_lens == [5, 4, 2, 2]
    assert segments.cu_q.tolist() == [0, 5, 7, 9, 10]
    assert segments.cu_k.tolist() == [0, 5, 9, 11, 13]
    assert segments.cu_q.dtype == segments.cu_k.dtype == torch.int32  # as varlen_attn asks
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 7, 9]


@kinds
@pytest.mark.parametrize("lengths", [LENGTHS, *RANDOM_LENGTHS], ids=["edges", "r0", "r1", "r2"])
def test_packed_equals_separate(kind, lengths):
    """Logits at every position, and every parameter's gradient of a random function of them."""
    model, pairs = random_model(**kind), random_pairs(lengths)
    packed = model.logits(packed_hidden(model, pairs)[0])  # (N, V)
    separate = []
    for prompt, chosen, rejected in pairs:
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
        hidden = model.hidden_states(b.tokens, b.positions, Segments.packed(b.lengths))
        weighted = b.targets, b.response, b.nll_weight
        n_pairs, lm_head = len(pairs), model.lm_head_weight
        total += fused_linear_orpo(hidden[b.predict], lm_head, *weighted, lam, n_pairs).loss
    return total


def plain_step_loss(model, pairs, sft_loss, lam):
    """The same by definition: every sequence alone, autograd throughout."""
    means, nll, n_tokens = [], 0, 0
    for prompt, *responses in pairs:
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
    assert random_model().hidden_states(nothing, nothing, Segments.packed([])).shape == (0, 16)


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
    (before, batch), (after, _) = (packed_hidden(model, x) for x in (pairs, others))
    parts = (before == after).all(-1).split([n for lengths in batch.lengths for n in lengths])
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


def greedy_by_full_forward(model, tokens, n):
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("kind", KINDS[1:4], ids=["mha-tied", "gqa", "gqa-tied"])
def test_cached_generation_equals_recomputing(kind):
    model = random_model(**kind)
    tokens = torch.randint(V, (3, 4), generator=torch.Generator().manual_seed(0))
    got = model.generate(tokens, 30)
    assert torch.equal(got, greedy_by_full_forward(model, tokens, 30))
    assert len(set(got.flatten().tolist())) > 8, "too dull a text to tell anything"


@pytest.mark.parametrize("cuts", [[5, 1, 1, 1], [3, 4, 1], [1] * 8, [2, 6]], ids=str)
def test_cache_gives_the_full_forwards_logits(cuts):
    """However the tokens arrive: also several at once over a cache, which needs the mask."""
    model, tokens = random_model(), torch.randint(V, (2, 8), generator=torch.Generator())
    cache, outs = KVCache(model.config, 2, 8, None, torch.float64), []
    for new in tokens.split(cuts, dim=1):
        start, stop = cache.length, cache.length + new.shape[1]
        segments = Segments.plain(2, stop - start, stop)
        positions = torch.arange(start, stop).repeat(2)
        outs.append(model.hidden_states(new.flatten(), positions, segments, cache).view(2, -1, 16))
        cache.length = stop
    torch.testing.assert_close(model.logits(torch.cat(outs, 1)), model(tokens), rtol=0, atol=1e-12)


def test_batched_generation_equals_one_at_a_time():
    model, tokens = random_model(), torch.arange(12).view(3, 4)
    one_by_one = torch.cat([model.generate(row[None], 20) for row in tokens])
    assert torch.equal(model.generate(tokens, 20), one_by_one)


def test_eos_stops_and_fills():
    model, tokens = random_model(), torch.arange(12).view(3, 4)
    free = model.generate(tokens, 20)
    new = free[:, 4:].tolist()
    # an id that row 0 meets early, then another row later, and one that never comes
    eos_id = next(x for x in new[0] if all(x in row for row in new[1:]))
    stops = [row.index(eos_id) + 1 for row in new]
    assert len(set(stops)) > 1, "the rows should finish at different steps"
    got = model.generate(tokens, 20, eos_id=eos_id)
    assert got.shape == (3, 4 + max(stops))  # ends as soon as the last row does
    for row, text, stop in zip(got[:, 4:].tolist(), new, stops, strict=True):
        assert row == text[:stop] + [eos_id] * (max(stops) - stop)
    never = next(x for x in range(V) if not any(x in row for row in new))
    assert torch.equal(model.generate(tokens, 20, eos_id=never), free)


def test_an_eos_in_the_prompt_stops_nothing():
    model, tokens = random_model(), torch.arange(4)[None]
    first = model.generate(tokens, 1)[0, -1].item()
    eos_id = next(x for x in tokens[0].tolist() if x != first)
    assert model.generate(tokens, 1, eos_id=eos_id).tolist() == [[0, 1, 2, 3, first]]


def test_context_may_be_filled_and_not_exceeded():
    model, tokens = random_model(max_seq_len=8), torch.arange(5)[None]
    assert model.generate(tokens, 3).shape == (1, 8) and model(torch.arange(8)[None]).shape[1] == 8
    assert torch.equal(model.generate(tokens, 0), tokens)
    with pytest.raises(ValueError, match=r"9\b.*context.*8"):
        model.generate(tokens, 4)
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
    model, tokens = random_model(), torch.arange(8).view(2, 4)
    assert torch.equal(model.generate(tokens, 20, 1.0, **options), model.generate(tokens, 20))


def test_a_generator_decides_the_sample():
    model, tokens = random_model(), torch.arange(8).view(2, 4)
    texts = [
        model.generate(tokens, 20, 1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


# -----------------------------------------------------------------------------
# A real checkpoint


def test_stories260k_gives_the_expected_text(shared):
    """What transformers gives in float32; the best two logits are 0.07 apart or more."""
    expected = json.loads((shared / "stories260K" / "expected.json").read_text())
    model = Transformer.from_pretrained(shared / "stories260K")
    assert not model.training and model.config.max_seq_len == 512
    prompt, new = expected["prompt_ids"], expected["greedy_ids"]
    tokens = model.generate(torch.tensor([prompt]), len(new))
    assert tokens[0].tolist() == prompt + new
    with torch.no_grad():
        logits = model(tokens)[0]
    top = logits[len(prompt) - 1].topk(5)
    assert top.indices.tolist() == expected["first_top5"]["ids"]
    wanted = torch.tensor(expected["first_top5"]["logits"])
    torch.testing.assert_close(top.values, wanted, rtol=0, atol=1e-4)  # four digits are given
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(new)[:, None])
    wanted = torch.tensor(expected["greedy_logps"])
    torch.testing.assert_close(logps.squeeze(1), wanted, rtol=0, atol=3e-5)  # five digits


def test_stories260k_is_saved_as_it_came(shared, tmp_path):
    model = Transformer.from_pretrained(shared / "stories260K")
    model.save_pretrained(tmp_path)
    original = read_safetensors(shared / "stories260K" / "model.safetensors")
    saved = read_safetensors(tmp_path / "model.safetensors")
    original.pop("lm_head.weight", None)  # tied
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    before = json.loads((shared / "stories260K" / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == before


# -----------------------------------------------------------------------------
# dtypes


def test_bfloat16_compute_has_float32_parameters_and_gradients():
    model, pairs = random_model(torch.float32), random_pairs(LENGTHS)
    wanted = gradients(step_loss(model, pairs, "response", 0.7), model)
    model.compute_dtype = torch.bfloat16
    hidden, _ = packed_hidden(model, pairs)
    assert hidden.dtype == torch.bfloat16 and model(torch.arange(5)[None]).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    got = gradients(step_loss(model, pairs, "response", 0.7), model)
    assert {g.dtype for g in got} == {torch.float32}
    flat = (torch.cat([g.flatten() for g in x]) for x in (got, wanted))
    assert torch.cosine_similarity(*flat, dim=0) > 0.99
    tokens = torch.arange(8).view(2, 4)
    assert torch.equal(model.generate(tokens, 9)[:, :5], greedy_by_full_forward(model, tokens, 1))


def test_norms_are_float32_inside():
    """3e5 squared is beyond float16's range and 1e-5 squared below it."""
    norm = random_model().norm
    with torch.no_grad():
        norm.weight.fill_(1)
    for size in (3e4, 1.0):
        got = norm(torch.full((1, 16), size, dtype=torch.float16))
        assert torch.equal(got, torch.ones(1, 16, dtype=torch.float16))


# -----------------------------------------------------------------------------
# Checkpoint folders


def state(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_weights(model, wanted: dict):
    got = state(model)
    assert got.keys() == wanted.keys()
    for name, p in got.items():
        assert p.dtype == wanted[name].dtype and torch.equal(p, wanted[name]), name


def file_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@kinds
def test_saved_and_loaded_is_bitwise_the_same(kind, tmp_path):
    model = random_model(torch.float32, **kind)
    for folder in ("a", "b/c"):
        model.save_pretrained(tmp_path / folder)
    assert sorted(file_bytes(tmp_path / "a")) == ["config.json", "model.safetensors"]  # and no .tmp
    loaded = Transformer.from_pretrained(tmp_path / "a")
    assert_same_weights(loaded, state(model))
    assert not loaded.training and loaded.config.tie_embeddings == kind["tie_embeddings"]
    tokens = torch.arange(9)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    # The bytes depend on the weights alone: not on the folder, the time, or a trip through a file.
    loaded.save_pretrained(tmp_path / "d")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b/c") == file_bytes(tmp_path / "d")


def test_saving_over_the_folder_it_was_loaded_from(tmp_path):
    random_model(torch.float32).save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    before = file_bytes(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_storage_dtype_and_dtype_argument(stored, tmp_path):
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path, dtype=stored)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(stored).removeprefix("torch.")
    rounded = {name: p.to(stored) for name, p in state(model).items()}
    loaded = Transformer.from_pretrained(tmp_path)
    assert_same_weights(loaded, rounded)  # dtype None: as stored
    assert loaded(torch.arange(5)[None]).dtype == stored
    loaded = Transformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    assert_same_weights(loaded, {name: p.float() for name, p in rounded.items()})


def test_shards_have_an_index_and_load(tmp_path):
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    for file in files:
        tensors = read_safetensors(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 4000
    assert_same_weights(Transformer.from_pretrained(tmp_path), state(model))
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=files[1].name):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("first, second", [(10**9, 4000), (4000, 10**9), (2500, 4000)])
def test_saving_over_an_older_model_leaves_only_the_newer(first, second, tmp_path):
    random_model(torch.float32, seed=1).save_pretrained(tmp_path, shard_bytes=first)
    random_model(torch.float32, seed=2).save_pretrained(tmp_path, shard_bytes=second)
    random_model(torch.float32, seed=2).save_pretrained(tmp_path / "new", shard_bytes=second)
    wanted = state(random_model(torch.float32, seed=2))
    assert_same_weights(Transformer.from_pretrained(tmp_path), wanted)
    assert {f.name for f in tmp_path.iterdir()} - {"new"} == set(file_bytes(tmp_path / "new"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hosts", 3, None], ids=str)
def test_an_index_cannot_point_outside_its_folder(name, tmp_path):
    random_model().save_pretrained(tmp_path / "inner")
    (tmp_path / "inner" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "inner" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map"):
        Transformer.from_pretrained(tmp_path / "inner")


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("kind", KINDS[2:4], ids=["untied", "tied"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_names_with_and_without_the_base_prefix(prefix, kind, form, tmp_path):
    """And beside them what old checkpoints carry along: a tied lm_head, the rotary frequencies."""
    model = random_model(torch.float32, **kind)
    model.save_pretrained(tmp_path)
    tensors = {
        name if name.startswith("lm_head") else prefix + name: p for name, p in state(model).items()
    }
    tensors |= {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    tensors.setdefault("lm_head.weight", tensors[f"{prefix}embed_tokens.weight"])
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same_weights(Transformer.from_pretrained(tmp_path), state(model))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model.norm.weight": None}, ["norm.weight", "missing"]),
        ({"lm_head.weight": None}, ["lm_head.weight", "missing"]),
        ({"model.layers.0.mlp.gate_proj.bias": torch.ones(24)}, ["mlp.gate_proj.bias"]),
        ({"model.layers.2.mlp.gate_proj.weight": torch.ones(24, 16)}, ["layers.2.mlp.gate_proj"]),
        ({"norm.weight": torch.ones(16)}, ["norm.weight", "twice"]),
        ({"model.norm.weight": torch.ones(8)}, ["norm.weight", "shape", "(8,)", "(16,)"]),
        ({"lm_head.weight": torch.ones(16, V)}, ["lm_head", "shape", "(16, 31)", "(31, 16)"]),
        ({"model.norm.weight": torch.ones(16).long()}, ["norm.weight", "int64"]),
    ],
    ids=["missing", "no-head", "bias", "a-layer-more", "twice", "shape", "transposed", "integers"],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_wrong_tensor_is_named(change, words, form, tmp_path):
    random_model(torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: t.clone() for name, t in read_safetensors(file).items()} | change
    tensors = {name: t for name, t in tensors.items() if t is not None}
    write_safetensors(file, tensors)
    if form == "bin":
        file.unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


class Pickled:
    """Runs a command when it is unpickled, as any pickle may."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "value", [[1, 2], {"model.norm.weight": 3}, {3: torch.ones(2)}, "code", "bytes"], ids=str
)
def test_a_bin_that_holds_no_tensors_is_refused_and_not_run(value, tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    if value == "bytes":
        file.write_bytes(b"not a pickle")
    else:
        torch.save(Pickled(tmp_path / "ran") if value == "code" else value, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: ") as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def with_config(folder, **change):
    """Rewrites config.json; a key whose value is ... goes."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": ...}, "model_type"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic"}, "rope_scaling": None}, "dynamic"),
        ({"rope_scaling": "linear"}, "linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "swish7"}, "swish7"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"num_key_value_heads": 3}, "3"),
        ({"head_dim": 3}, "3"),
        ({"vocab_size": "31"}, "31"),
        ({"hidden_size": 16.5}, "16.5"),
        ({"vocab_size": -31}, "-31"),
        ({"num_attention_heads": 0}, "0"),
        ({"rms_norm_eps": "small"}, "small"),
        ({"tie_word_embeddings": "no"}, "no"),
    ],
    ids=str,
)
def test_a_config_out_of_reach_is_refused_in_one_sentence(change, word, tmp_path):
    random_model().save_pretrained(tmp_path)
    with_config(tmp_path, **change)
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in message
    assert word in message.removeprefix(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, b"\xff\xfe{}"], ids=lambda x: repr(x)[:9]
)
def test_a_config_that_is_no_object_names_its_file(text, tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json: "):
        Transformer.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Transformer.from_pretrained(tmp_path)
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*pytorch_model\.bin"):
        Transformer.from_pretrained(tmp_path)


def test_config_keys_old_and_new(tmp_path):
    """transformers 5 writes rope_parameters and dtype, older ones rope_theta and torch_dtype."""
    model = random_model(torch.float32, rope_theta=500.0)
    model.save_pretrained(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    new = {"rope_parameters": rope, "dtype": "float32", "rope_theta": ..., "torch_dtype": ...}
    with_config(tmp_path, **new, bos_token_id=1)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config.rope_theta == 500.0 and loaded.config.dtype == "float32"
    assert torch.equal(loaded(torch.arange(9)[None]), model(torch.arange(9)[None]))
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["rope_theta"] == 500.0 and saved["torch_dtype"] == "float32"
    assert saved["bos_token_id"] == 1, "a key that we do not use is lost"
    again = Transformer.from_pretrained(tmp_path / "again")
    assert torch.equal(again(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_absent_config_keys_mean_what_transformers_means(tmp_path):
    """Defaults of LlamaConfig: as many key/value heads as heads, eps 1e-6, theta 1e4, untied."""
    random_model(n_kv_heads=4).save_pretrained(tmp_path)
    keys = "num_key_value_heads head_dim rms_norm_eps rope_theta max_position_embeddings "
    keys += "tie_word_embeddings torch_dtype hidden_act"
    with_config(tmp_path, **dict.fromkeys(keys.split(), ...))
    c = Transformer.from_pretrained(tmp_path).config
    assert (c.n_kv_heads, c.head_dim, c.norm_eps, c.rope_theta) == (4, 4, 1e-6, 1e4)
    assert (c.max_seq_len, c.tie_embeddings) == (2048, False)


# -----------------------------------------------------------------------------
# safetensors


def raw_file(folder, header, body=b"", length=None):
    """A file put together by hand. header: bytes, or what json.dumps takes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    (folder / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + body)
    return folder / "x.safetensors"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_by_hand(tmp_path):
    """
    Names in any order, a text in __metadata__, a scalar, an empty tensor, padding of the header:
    all allowed. -2.0 in float32 is 0xC0000000; 1.0 in bfloat16 is 0x3F80.
    """
    header = {
        "b": entry("F32", [], [4, 8]),
        "__metadata__": {"format": "pt"},
        "a": entry("BF16", [1, 2], [0, 4]),
        "empty": entry("I64", [0, 3], [8, 8]),
    }
    body = bytes.fromhex("803f 803f 000000c0")
    got = read_safetensors(raw_file(tmp_path, json.dumps(header).encode() + b"   ", body))
    assert got["a"].tolist() == [[1, 1]] and got["a"].dtype == torch.bfloat16
    assert got["b"].shape == () and got["b"].item() == -2
    assert got["empty"].shape == (0, 3) and got["empty"].dtype == torch.int64
    assert len(got) == 3


@pytest.mark.parametrize("shift", range(8))
def test_tensors_may_start_at_any_byte(shift, tmp_path):
    """The format asks writers to align the data, and readers meet files that do not."""
    values = torch.arange(3, dtype=torch.float64)
    header = json.dumps({"a": entry("F64", [3], [0, 24])}).encode() + b" " * shift
    file = raw_file(tmp_path, header, values.numpy().tobytes())
    got = read_safetensors(file)["a"]
    assert torch.equal(got, values)
    assert got.data_ptr() % 8 == 0  # torch takes it for granted, vector instructions need it


def test_every_dtype_comes_back(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.tensor([[0, 1, 5]]).to(dtype) for dtype in dtypes}
    tensors |= {"transposed": torch.randn(3, 5).t(), "scalar": torch.tensor(2.5)}
    tensors |= {"none": torch.empty(0, 4), "é": torch.ones(2, requires_grad=True)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]  # no .tmp
    got = read_safetensors(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    for name, t in tensors.items():
        assert got[name].dtype == t.dtype and torch.equal(got[name], t), name
    raw = (tmp_path / "x.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + n])["__metadata__"] == {"format": "pt"}  # transformers asks so
    assert n % 8 == 0, "tensors should start aligned"


def test_what_was_read_outlives_a_newer_file(tmp_path):
    """Views of a memory map: writing beside and renaming leaves them their old file."""
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": torch.zeros(1000)})
    old = read_safetensors(file)["a"]
    write_safetensors(file, {"a": torch.ones(1000)})
    assert old.sum() == 0 and read_safetensors(file)["a"].sum() == 1000
    old += 1  # and a write into a view stays in this process
    assert torch.equal(read_safetensors(file)["a"], torch.ones(1000))


A, B = entry(), entry(offsets=[8, 16])
BROKEN = {  # header, body, header length written (None: the true one)
    "no body": ({"a": A}, b"", None),
    "body cut short": ({"a": A}, bytes(7), None),
    "bytes that no tensor has": ({"a": A}, bytes(9), None),
    "length past the end": (b"{}", b"", 3),
    "length 2^63": (b"{}", b"", 2**63),
    "length 2^64 - 1": (b"{}", b"", 2**64 - 1),
    "length 0": ({"a": A}, bytes(8), 0),
    "not UTF-8": (b'{"\xff": 1}', b"", None),
    "not JSON": (b"{'a': 1}", b"", None),
    "deeply nested": (b"[" * 100_000, b"", None),
    "digits without end": (b'{"a":' + b"9" * 10_000 + b"}", b"", None),
    "an array": ([A], bytes(8), None),
    "an empty array": ([], b"", None),
    "a number": (3, b"", None),
    "null": (None, b"", None),
    "a string": ("a", b"", None),
    "entry an array": ({"a": [1]}, bytes(8), None),
    "entry null": ({"a": None}, bytes(8), None),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), None),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None),
    "unknown dtype": ({"a": entry("F33")}, bytes(8), None),
    "torch's dtype name": ({"a": entry("float32")}, bytes(8), None),
    "dtype an array": ({"a": entry(["F32"])}, bytes(8), None),
    "dtype null": ({"a": entry(None)}, bytes(8), None),
    "negative shape": ({"a": entry(shape=[-2])}, bytes(8), None),
    "two negatives": ({"a": entry(shape=[-1, -2])}, bytes(8), None),
    "float shape": ({"a": entry(shape=[2.0])}, bytes(8), None),
    "bool shape": ({"a": entry(shape=[True, 2])}, bytes(8), None),
    "shape a number": ({"a": entry(shape=2)}, bytes(8), None),
    "shape a string": ({"a": entry(shape="2")}, bytes(8), None),
    "shape an object": ({"a": entry(shape={}, offsets=[0, 4])}, bytes(4), None),
    "shape null": ({"a": entry(shape=None)}, bytes(8), None),
    "a string times a number": ({"a": entry(shape=["ab", 10**18])}, bytes(8), None),
    "a list times a number": ({"a": entry(shape=[[1], 10**18])}, bytes(8), None),
    "beyond float": ({"a": entry(shape=[10**400, 1.5])}, bytes(8), None),
    "infinite": ({"a": entry(shape=[float("inf")])}, bytes(8), None),
    "nothing times too much": ({"a": entry(shape=[0, 2**70], offsets=[0, 0])}, b"", None),
    "product overflows": ({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b"", None),
    "product wraps to 2": ({"a": entry(shape=[2**63 + 1, 2])}, bytes(8), None),
    "fewer bytes than the shape": ({"a": entry(shape=[3])}, bytes(8), None),
    "more bytes than the shape": ({"a": entry(shape=[1])}, bytes(8), None),
    "offsets past the end": ({"a": entry(shape=[4], offsets=[0, 16])}, bytes(8), None),
    "negative offsets": ({"a": entry(offsets=[-8, 0])}, bytes(8), None),
    "offsets reversed": ({"a": entry(offsets=[8, 0])}, bytes(8), None),
    "one offset": ({"a": entry(offsets=[8])}, bytes(8), None),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, bytes(8), None),
    "float offsets": ({"a": entry(offsets=[0.0, 8.0])}, bytes(8), None),
    "bool offset": ({"a": entry(offsets=[False, 8])}, bytes(8), None),
    "string offsets": ({"a": entry(offsets=["0", "8"])}, bytes(8), None),
    "offsets null": ({"a": entry(offsets=None), "b": B}, bytes(16), None),
    "first not at 0": ({"b": B}, bytes(16), None),
    "overlapping": ({"a": A, "b": entry(offsets=[4, 12])}, bytes(12), None),
    "the same bytes twice": ({"a": A, "b": A}, bytes(8), None),
    "a hole": ({"a": A, "b": entry(offsets=[12, 20])}, bytes(20), None),
    "mixed offsets": ({"a": A, "b": entry(offsets=["8", 16])}, bytes(16), None),
    "a name twice": (
        b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(B).encode() + b"}",
        bytes(16),
        None,
    ),
    "a key twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"",
        None,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_safetensors_are_refused(what, tmp_path):
    file = raw_file(tmp_path, *BROKEN[what])
    with pytest.raises(ValueError) as error:
        read_safetensors(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_damaged_safetensors_raise_only_value_errors(tmp_path):
    """Cuts at every byte, flipped bits, replaced header characters, noise. Seeded."""
    rng, file = random.Random(0), tmp_path / "x.safetensors"
    write_safetensors(file, {"model.a": torch.randn(3, 4), "b": torch.ones(5).half()})
    good = file.read_bytes()
    n_header = 8 + int.from_bytes(good[:8], "little")
    cuts = [good[:n] for n in range(len(good))]
    damaged = []
    for _ in range(300):
        flipped, replaced = bytearray(good), bytearray(good)
        flipped[rng.randrange(n_header)] ^= 1 << rng.randrange(8)
        for _ in range(rng.randint(1, 3)):
            replaced[rng.randrange(8, n_header)] = ord(rng.choice('0123456789-.eE,:[]{}" \\tn'))
        damaged += [bytes(flipped), bytes(replaced), rng.randbytes(rng.randrange(60))]
    accepted = []
    for content in cuts + damaged:
        file.write_bytes(content)
        try:
            tensors = read_safetensors(file)
        except ValueError:
            continue
        accepted.append(content)  # a name may have changed; every byte must be there to be read
        assert sum(t.clone().nbytes for t in tensors.values()) <= len(content)
    assert 0 < len(accepted) < len(damaged) / 2
    assert not set(cuts) & set(accepted), "a file that was cut short is accepted"


def test_names_are_free_text(tmp_path):
    names = [string.printable, "", "ключ", "a" * 1000, "__metadata"]
    tensors = {name: torch.tensor([i]) for i, name in enumerate(names)}
    write_safetensors(tmp_path / "x", tensors)
    assert {k: v.item() for k, v in read_safetensors(tmp_path / "x").items()} == {
        name: i for i, name in enumerate(names)
    }
