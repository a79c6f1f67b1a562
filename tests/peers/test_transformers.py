"""Our transformer beside transformers' LlamaForCausalLM: logits, greedy ids, files, gradients.

    python -m pytest tests/peers/test_transformers.py

Random Llamas, written by transformers in every form we read; then ours, written by us.
"""

import json

import pytest
import torch

import model as ours
import orpo
from tests import small

from . import tiny

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(1))

CONFIGS = {
    "grouped_query": {},
    "multi_head": {"num_key_value_heads": 6},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim_beside_the_width": {"head_dim": 10},  # 6 heads of 10 in a width of 48
    "head_dim_2": {"head_dim": 2},
    "rope_theta_500000": {"rope_theta": 500000.0},
    "rope_theta_100": {"rope_theta": 100.0},
    "norm_eps_0.1": {"rms_norm_eps": 0.1},
    "one_layer_odd_vocabulary": {"num_hidden_layers": 1, "vocab_size": 323},
}


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_same_logits(a, b):
    """Within 1e-4, of logits that are worth it: they spread over some nats."""
    assert logits_of(a).std() > 0.5
    torch.testing.assert_close(logits_of(a), logits_of(b), atol=1e-4, rtol=0)


def with_old_config_keys(folder):
    """config.json as most checkpoints on the Hub have it, from before transformers 5."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["rope_scaling"] = None
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("keys", ["new_keys", "old_keys"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(tmp_path, config, keys):
    config = dict(config)
    if "rope_theta" in config:  # as transformers 5 wants it
        rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
        config["rope_parameters"] = rope
    theirs = tiny.random_llama(tmp_path, **config)
    assert (
        theirs.config.rope_parameters["rope_theta"]
        == (config.get("rope_parameters", {"rope_theta": 10000.0})["rope_theta"])
    )
    if keys == "old_keys":
        with_old_config_keys(tmp_path)
    assert_same_logits(theirs, ours.Transformer.from_pretrained(tmp_path))


def test_a_real_checkpoint_gives_the_same_logits():
    """stories260K, on noise and on its own greedy text."""
    folder = tiny.shared("stories260K")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model = ours.Transformer.from_pretrained(folder)
    assert_same_logits(theirs, model)
    story = theirs.generate(torch.tensor([[1, 403, 407]]), max_new_tokens=200, do_sample=False)
    torch.testing.assert_close(logits_of(theirs, story), logits_of(model, story), atol=1e-4, rtol=0)


def as_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def as_pickle(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_base_model(model, folder):
    """LlamaModel's own names, without the "model." in front."""
    model.model.save_pretrained(folder)


STORED = {
    "one_file": lambda model, folder: model.save_pretrained(folder),
    "shards": as_shards,
    "pytorch_model_bin": as_pickle,
    "without_base_prefix": as_base_model,
}


@pytest.mark.parametrize("store", STORED.values(), ids=STORED)
def test_every_form_of_storage_loads(tmp_path, store):
    theirs = tiny.random_llama(tie_word_embeddings=True)
    store(theirs, tmp_path)
    assert_same_logits(theirs, ours.Transformer.from_pretrained(tmp_path))


@pytest.mark.parametrize("store", ["one_file", "shards", "pytorch_model_bin"])
def test_untied_storage_loads(tmp_path, store):
    theirs = tiny.random_llama()
    STORED[store](theirs, tmp_path)
    assert_same_logits(theirs, ours.Transformer.from_pretrained(tmp_path))


@pytest.mark.parametrize("store", ["one_file", "pytorch_model_bin"])
def test_bfloat16_storage_is_kept_or_cast_as_asked(tmp_path, store):
    """dtype None keeps bf16; float32 computes with the stored values exactly, as theirs does."""
    STORED[store](tiny.random_llama().to(torch.bfloat16), tmp_path)
    assert ours.Transformer.from_pretrained(tmp_path).lm_head_weight.dtype == torch.bfloat16
    assert_same_logits(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(),
        ours.Transformer.from_pretrained(tmp_path, dtype=torch.float32),
    )


def test_bfloat16_logits_are_as_close_to_float32_as_theirs(tmp_path):
    """Computing in bf16 rounds on both sides, not alike; neither may be much worse."""
    exact = logits_of(tiny.random_llama(tmp_path))
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = (logits_of(half.eval()).float() - exact).pow(2).mean().sqrt()
    mine = logits_of(ours.Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert (mine.float() - exact).pow(2).mean().sqrt() < 1.3 * theirs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_transformers_loads_what_we_save(tmp_path, tied, dtype, shard_bytes):
    """With no key missing or unexpected, in the dtype it was stored in, and the same logits."""
    model = ours.Transformer(
        ours.ModelConfig(
            vocab_size=320,
            dim=48,
            n_layers=2,
            n_heads=6,
            n_kv_heads=3,
            hidden_dim=112,
            head_dim=12,
            norm_eps=1e-6,
            rope_theta=50000.0,
            max_seq_len=128,
            tie_embeddings=tied,
        )
    ).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in name else p.data.normal_(std=0.15)
    model.to(dtype).save_pretrained(tmp_path, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)

    auto = transformers.AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == dtype
    assert_same_logits(model.float(), loaded.float().eval())


def test_a_transformers_checkpoint_survives_our_load_and_save(tmp_path):
    """Weights bit for bit, and what config.json holds beyond our fields."""
    theirs = tiny.random_llama(tmp_path / "theirs", bos_token_id=5, eos_token_id=[6, 7])
    ours.Transformer.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs_state, back_state = theirs.state_dict(), back.state_dict()
    assert theirs_state.keys() == back_state.keys()
    assert all(torch.equal(theirs_state[k], back_state[k]) for k in theirs_state)
    before, after = theirs.config.to_dict(), back.config.to_dict()
    ignored = ("_name_or_path", "transformers_version", "use_cache")
    for key in ignored:
        before.pop(key, None), after.pop(key, None)
    assert after == before


@pytest.mark.parametrize("eos_id", [None, "frequent"])
def test_greedy_generation_equals_transformers(tmp_path, eos_id):
    """60 tokens for three prompts at once; with an end token a row ends after it."""
    theirs = tiny.random_llama(tmp_path)
    model = ours.Transformer.from_pretrained(tmp_path)
    prompts = TOKENS[:, :7]
    settings = {"max_new_tokens": 60, "do_sample": False}
    theirs.generation_config.eos_token_id = None
    free = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    assert model.generate(prompts, 60) == free[:, 7:].tolist()
    if eos_id is None:
        return
    eos_id = int(free[0, 20])  # row 0 meets it after 14 tokens at the latest
    ended = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        **settings,
    )
    assert not torch.equal(ended, free)
    rows = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in ended[:, 7:].tolist()]
    assert model.generate(prompts, 60, eos_id=eos_id) == rows


@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9, 1.0])
def test_sampling_draws_from_the_distribution_transformers_does(monkeypatch, top_k, top_p):
    """Temperature, then top_k, then top_p, as transformers applies them; only the draw is ours."""
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    expected = transformers.TemperatureLogitsWarper(0.7)(None, logits)
    if top_k is not None:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    seen = []
    multinomial = torch.multinomial

    def keep(probs, *args, **kwargs):
        seen.append(probs)
        return multinomial(probs, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", keep)
    ours.sample(logits, 0.7, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(seen[0], expected.softmax(-1))


def packed(pairs):
    """[(prompt, chosen, rejected) ids] -> what `fused_linear_orpo` and `hidden_states` take.

    Written out here by hand, apart from data.py, so that this file checks the two alone.
    """
    tokens, positions, lengths, rows, targets, response, weight = [], [], [], [], [], [], []
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        p, c, r, start = len(prompt), len(chosen), len(rejected), len(tokens)
        tokens += prompt + chosen + rejected
        positions += [*range(p + c), *range(p, p + r)]
        lengths.append((p, c, r))
        last = start + p - 1  # predicts the first token of both responses
        rows += [last, *range(start + p, start + p + c - 1)]
        rows += [last, *range(start + p + c, start + p + c + r - 1)]
        targets += chosen + rejected
        response += [2 * i] * c + [2 * i + 1] * r
        weight += [1 / (len(pairs) * c)] * c + [0.0] * r
    ids = [torch.tensor(x) for x in (tokens, positions, rows, targets, response)]
    return (*ids, torch.tensor(weight), lengths)


def test_objective_and_gradients_equal_the_plain_objective_on_transformers_logits(tmp_path):
    """L_ORPO of five pairs, three ways, with every parameter's gradient:

    transformers' logits, one sequence at a time, through the plain road and autograd; our logits,
    the same way; our packed hidden states through the fused road.
    """
    theirs = tiny.random_llama(tmp_path)
    plain, fused = (ours.Transformer.from_pretrained(tmp_path) for _ in range(2))
    rng = torch.Generator().manual_seed(3)
    sizes = [(1, 1, 1), (5, 9, 2), (12, 3, 8), (20, 20, 20), (2, 1, 14)]
    pairs = [
        tuple(torch.randint(3, 320, (n,), generator=rng).tolist() for n in lengths)
        for lengths in sizes
    ]

    def mean_logp(logits_of_tokens, prompt, response):
        ids = torch.tensor([prompt + response])
        mask = torch.arange(1, ids.shape[1])[None] >= len(prompt)
        return orpo.response_logps(logits_of_tokens(ids)[:, :-1], ids[:, 1:], mask)

    losses = []
    for logits in (lambda ids: theirs(ids).logits, plain):
        chosen = torch.cat([mean_logp(logits, x, y) for x, y, _ in pairs])
        rejected = torch.cat([mean_logp(logits, x, y) for x, _, y in pairs])
        losses.append(orpo.orpo_loss(chosen, rejected, lam=0.5))

    tokens, positions, rows, targets, response, weight, lengths = packed(pairs)
    segments = small.packed(lengths)
    hidden = fused.hidden_states(tokens, positions, segments)
    out = orpo.fused_linear_orpo(
        hidden[rows], fused.lm_head_weight, targets, response, weight, 0.5, len(pairs)
    )
    losses.append(out.loss)
    for loss in losses:
        loss.backward()
        assert loss.item() == pytest.approx(losses[0].item(), rel=1e-5)
    for name, p in theirs.named_parameters():
        name = name.removeprefix("model.")
        for model in (plain, fused):
            mine = model.get_parameter(name).grad
            assert (mine - p.grad).norm() < 1e-4 * p.grad.norm(), name
