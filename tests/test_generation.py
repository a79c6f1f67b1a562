"""Generation: ragged prompts over a cache, where sequences end, sampling, and answers as text."""

import random

import pytest
import torch

import data
from attention import KVCache
from formats.families import FAMILIES
from model import LOOK_EVERY, Transformer, sample
from run.answers import answers
from tests.runs import FACTS
from tests.small import V, random_model


def greedy_by_full_forward(model, prompt, new):
    """The likeliest token after each part of prompt and answer, of which a forward pass without a
    cache has all at once: they are the answer itself where it is the greedy one."""
    return model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def random_prompts(*lengths, seed=0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(n)] for n in lengths]


PHI, OPT = FAMILIES["phi"].values, FAMILIES["opt"].values
GEMMA, OLMO2 = FAMILIES["gemma"].values, FAMILIES["olmo2"].values
SHAPES = {
    "mha, tied": {"n_kv_heads": 4, "tie_embeddings": True},
    "gqa": {},
    "one kv head, tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "window": {"windows": [5, 5]},
    "window in one layer": {"windows": [None, 3]},
    "partial rotary, parallel": PHI,
    "norms that add one, scaled embeddings": GEMMA | {"n_kv_heads": 1, "max_seq_len": 64},
    "norms of outputs": OLMO2,
    "a layer without rotary": {"rope_layers": [1, 0], "windows": [None, 3]},
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
            assert new == greedy_by_full_forward(model, prompt, new)
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


def test_a_cache_has_room_for_what_may_come_and_no_more(monkeypatch):
    sizes = []

    class Noted(KVCache):
        def __init__(self, config, rows, device, dtype):
            sizes.append(list(rows))
            super().__init__(config, rows, device, dtype)

    monkeypatch.setattr("model.KVCache", Noted)
    random_model().generate(random_prompts(4, 60, 64), 10)  # of a context of 64
    assert sizes == [[14, 64, 64]]


@pytest.mark.parametrize("every", [1, 3, 8])
def test_a_sequence_ends_behind_eos_and_leaves_the_batch(every, monkeypatch):
    """Also where the host looks only now and then whether one has ended, as on a GPU."""
    monkeypatch.setitem(LOOK_EVERY, "cpu", every)
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
    last = [min(20, -(-stop // every) * every) for stop in stops]  # when it is seen
    assert sizes == [sum(stop > t for stop in last) for t in range(max(last))]
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


def test_top_p_counts_the_mass_at_the_temperature():
    """At 1/2 the likeliest has 0.68, at 1 it has 0.5, so 0.65 asks for one token or for two."""
    assert_frequencies(0.5, {"top_p": 0.65}, torch.tensor([0.0, 1, 0, 0]))
    assert_frequencies(1.0, {"top_p": 0.65}, torch.tensor([0, 0.5, 0, 0.3]) / 0.8)


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


def test_an_answer_is_without_the_end_that_its_template_writes(folder, monkeypatch):
    """A base model whose EOS is another token writes <|im_end|> as text before it stops."""
    model = Transformer.from_pretrained(folder / "model")
    tokenizer = data.load_tokenizer(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "Lima.<|im_end|>\n")
    assert tokenizer.around_answer() == ("", "<|im_end|>")
    assert answers(model, tokenizer, [[1, 5]], 3) == ["Lima."]


def test_an_answer_ends_with_any_of_the_tokens_that_end_one(folder, monkeypatch):
    """An instruct model as published may write only the token of its template, and never EOS."""
    model = Transformer.from_pretrained(folder / "model")
    tokenizer = data.load_tokenizer(folder / "model")
    written = answers(model, tokenizer, [[1, 5]], 8)[0]
    ids = model.generate([[1, 5]], 8)[0]
    monkeypatch.setattr(tokenizer, "end_ids", lambda: [tokenizer.eos_id, ids[3]])
    n = ids.index(ids[3])
    assert model.generate([[1, 5]], 8, eos_id=[ids[3], 0]) == [ids[: n + 1]]
    cut = answers(model, tokenizer, [[1, 5]], 8)[0]
    assert cut == tokenizer.decode(ids[:n]).strip() != written


def test_a_prompt_that_fills_the_context_has_no_answer(folder):
    model = Transformer.from_pretrained(folder / "model")
    tokenizer = data.load_tokenizer(folder / "model")
    full = [1] * model.config.max_seq_len
    assert answers(model, tokenizer, [full, [1, 5]], 3)[0] == ""


@pytest.mark.parametrize("batch_tokens", [1, 200, 10**6])
def test_answers_do_not_depend_on_their_neighbours(batch_tokens):
    """Greedy ones of prompts of 1 to 60 tokens: in one batch, in some, one by one."""
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(FACTS / "base")
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 200) for _ in range(rng.randint(1, 60))] for _ in range(9)]
    batches = []
    together = answers(
        model, tokenizer, prompts, 24, batch_tokens, lambda b: batches.extend(b) or b
    )
    assert len(batches) in {1: [9], 200: range(3, 9), 10**6: [1]}[batch_tokens]
    assert together == [answers(model, tokenizer, [p], 24)[0] for p in prompts]
    assert len(set(together)) > 4


def test_sampled_answers_are_those_of_the_generator():
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(FACTS / "base")
    prompts = [[5], [6, 7, 8], [9] * 20]
    first, again, other = (
        answers(
            model, tokenizer, prompts, 24, temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    )  # fmt: skip
    assert first == again != other


def test_generation_by_bfloat16_compute_begins_as_by_recomputing(in_bfloat16):
    prompts = random_prompts(4, 6)
    got = in_bfloat16.generate(prompts, 9)
    for prompt, new in zip(prompts, got, strict=True):
        assert new[:1] == greedy_by_full_forward(in_bfloat16, prompt, new[:1])
