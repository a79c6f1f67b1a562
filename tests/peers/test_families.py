"""Every family against transformers: logits, a step's gradients, generation, and the way back."""

import json

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import data
import orpo
import train
from model import ModelConfig, Transformer
from tests.golden import make_families
from tests.small import packed, plain

COMMON = {"vocab_size": 97, "num_hidden_layers": 3, "max_position_embeddings": 64}
SIZES = COMMON | {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = SIZES | {"num_key_value_heads": 2}
OPT = COMMON | {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 4.0],
    "long_factor": [1.0, 3.0, 16.0],
    "rope_theta": 100.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
FAMILIES = {
    "llama": ("Llama", GROUPED),
    "llama, odd head size": ("Llama", GROUPED | {"head_dim": 6, "tie_word_embeddings": True}),
    "llama, biases": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("Llama", GROUPED | {"rope_parameters": LLAMA3}),
    "linear rope": ("Llama", GROUPED | {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "mistral, window": ("Mistral", GROUPED | {"sliding_window": 7}),
    "qwen2": ("Qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen2, window in upper layers": (
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16}),
    "qwen3, biases": ("Qwen3", GROUPED | {"head_dim": 16, "attention_bias": True}),
    "phi3": ("Phi3", GROUPED),
    "phi3, window, tied, partial rotary": (
        "Phi3",
        GROUPED | {"sliding_window": 7, "tie_word_embeddings": True, "partial_rotary_factor": 0.5},
    ),
    "phi3, longrope": (
        "Phi3",
        GROUPED
        | {"rope_parameters": LONGROPE, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}
        | {"max_position_embeddings": 160, "original_max_position_embeddings": 40},
    ),
    "gemma": ("Gemma", GROUPED | {"head_dim": 16}),
    "gemma, one kv head, untied": (
        "Gemma",
        SIZES | {"num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": False},
    ),
    "olmo2": ("Olmo2", GROUPED),
    "olmo2, tied, llama3 rope": (
        "Olmo2",
        SIZES | {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "attention_bias": True},
    ),
    "smollm3": ("SmolLM3", GROUPED | {"no_rope_layer_interval": 2}),
    "smollm3, window, untied, biases": (
        "SmolLM3",
        GROUPED
        | {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 5}
        | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm3, window in other layers": (
        "SmolLM3",
        GROUPED
        | {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "phi": ("Phi", SIZES | {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"}),
    "gpt2": (
        "GPT2",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "opt": ("OPT", OPT | {"word_embed_proj_dim": 32}),
    "opt-350m": ("OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt, projected, norms first": ("OPT", OPT | {"word_embed_proj_dim": 16}),
}
SUFFIX = {"GPT2": "LMHeadModel"}


def theirs(name: str):
    """A random model of transformers whose biases and norms are not the trivial ones."""
    family, settings = FAMILIES[name]
    torch.manual_seed(0)
    # eos and pad outside: nothing stops early, no embedding row is zero
    config = getattr(transformers, f"{family}Config")(
        **settings, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, family + SUFFIX.get(family, "ForCausalLM"))(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.1))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(their model, its folder)"""
    folder = tmp_path_factory.mktemp("family")
    model = theirs(request.param)
    model.save_pretrained(folder)
    return model, folder


TOKENS = torch.arange(60).reshape(2, 30) % 97


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


def same(a, b, tolerance=1e-4):
    assert (a - b).abs().max() < tolerance


def test_logits_equal_theirs(pair):
    model, folder = pair
    same(Transformer.from_pretrained(folder)(TOKENS), logits_of(model))


def test_a_training_steps_gradients_equal_theirs(pair, tmp_path):
    """train.forward's, packed and fused, against autograd through their logits. Exported under
    their names, each relative to its largest entry."""
    model, folder = pair
    prompt, chosen, rejected = [*range(9)], [*range(9, 20)], [*range(30, 43)]
    logps = []
    for response in (chosen, rejected):
        tokens = torch.tensor([prompt + response])
        is_response = torch.arange(1, tokens.shape[1])[None] >= len(prompt)
        logits = model(tokens).logits[:, :-1]
        logps.append(orpo.response_logps(logits, tokens[:, 1:], is_response))
    model.zero_grad()
    loss = orpo.orpo_loss(*logps, 0.5)
    loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}

    ours = Transformer.from_pretrained(folder)
    (batch,) = data.micro_batches([data.Pair(prompt, chosen, rejected)], 100, "response")
    output = train.forward(ours, batch, 0.5)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    output.loss.backward()
    for p in ours.parameters():
        p.data = p.grad
    ours.save_pretrained(tmp_path)
    got = safetensors.load_file(tmp_path / "model.safetensors")
    assert wanted.keys() == got.keys()
    for name, grad in got.items():
        largest = wanted[name].abs().max()
        if name.endswith("k_proj.bias"):  # without rotary a softmax does not see it
            largest = largest.clamp(min=1e-3)
        same(grad / largest, wanted[name] / largest)


@pytest.mark.parametrize("name", make_families.CASES)
def test_the_golden_rows_of_make_test_are_theirs(name):
    golden = json.loads((make_families.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    made = make_families.case(name)
    assert made["logits"] == pytest.approx(golden["logits"], abs=2e-6)
    assert all(made[key] == golden[key] for key in ("shapes", "tokens"))


def test_greedy_generation_equals_theirs(pair):
    model, folder = pair
    expected = model.generate(TOKENS[:, :9], max_new_tokens=24, do_sample=False)
    ours = Transformer.from_pretrained(folder)
    assert ours.generate(TOKENS[:, :9], 24) == expected[:, 9:].tolist()


def test_packed_branches_equal_separate_sequences(pair):
    """Windows, learned positions and partial rotary hold for the rejected branch too."""
    _, folder = pair
    model = Transformer.from_pretrained(folder, dtype=torch.float64)
    p, c, r = TOKENS[0, :9], TOKENS[0, 9:20], TOKENS[1, :13]
    positions = torch.cat((torch.arange(20), torch.arange(9, 22)))
    states = model.hidden_states(torch.cat((p, c, r)), positions, packed([(9, 11, 13)]))
    for branch, rows in ((c, states[:20]), (r, states[20:])):
        n = 9 + len(branch)
        alone = model.hidden_states(torch.cat((p, branch)), torch.arange(n), plain(1, n, n))
        same(alone[-len(rows) :], rows, 1e-12)


def test_shards_and_pickles_load_too(pair, tmp_path):
    model, folder = pair
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    for variant in (tmp_path / "shards", pickled):
        same(Transformer.from_pretrained(variant)(TOKENS), logits_of(model))


def test_names_without_the_base_prefix_load_too(pair, tmp_path):
    """As a base model is saved, with lm_head beside it where it is not tied."""
    model, folder = pair
    state = {
        key.removeprefix("transformer.").removeprefix("model."): value
        for key, value in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(state, tmp_path / "pytorch_model.bin")
    same(Transformer.from_pretrained(tmp_path)(TOKENS), logits_of(model))


def test_bfloat16_storage(pair, tmp_path):
    _, folder = pair
    ours = Transformer.from_pretrained(folder)
    ours.save_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = Transformer.from_pretrained(tmp_path)
    assert stored.lm_head_weight.dtype == torch.bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    same(
        Transformer.from_pretrained(tmp_path, dtype=torch.float32)(TOKENS), logits_of(theirs.eval())
    )


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
def test_a_saved_model_loads_there_with_equal_logits(pair, tmp_path, shard_bytes):
    model, folder = pair
    Transformer.from_pretrained(folder).save_pretrained(tmp_path, shard_bytes=shard_bytes)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(back) is type(model)
    same(logits_of(back.eval()), logits_of(model), 1e-6)


def test_published_configs_with_old_keys_mean_the_same(pair, tmp_path):
    """rope_theta, rope_scaling and torch_dtype at the top, as most of the Hub has them."""
    model, folder = pair
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters", None) or {}
    config["torch_dtype"] = config.pop("dtype", "float32")
    if "no_rope_layers" not in config:  # SmolLM3 has always had both lists
        config.pop("layer_types", None)
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    same(Transformer.from_pretrained(tmp_path)(TOKENS), logits_of(model))


@pytest.mark.parametrize("name", ["phi", "gpt2", "opt", "opt-350m"])
def test_keys_that_a_config_leaves_out_mean_what_they_mean_there(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    left_out = ["activation_function", "hidden_act", "dtype"]
    for key in left_out + ["word_embed_proj_dim"] * (name == "opt"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(Transformer.from_pretrained(tmp_path)(TOKENS), logits_of(model))


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Olmo2", "SmolLM3"]
)
@pytest.mark.parametrize("more", [{}, {"use_sliding_window": True, "sliding_window": 7}])
def test_every_default_of_a_config_is_theirs(family, more, tmp_path):
    """A config.json with only the sizes that must be there, and Qwen's switch of its windows."""
    sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    sizes |= {"num_hidden_layers": 30, "num_attention_heads": 32, "hidden_size": 128} | more
    theirs = getattr(transformers, f"{family}Config")(**sizes)
    about = json.dumps(sizes | {"model_type": theirs.model_type})
    (tmp_path / "config.json").write_text(about)
    ours = ModelConfig.from_json(tmp_path / "config.json")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.n_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (ours.norm_eps, ours.activation) == (theirs.rms_norm_eps, theirs.hidden_act)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope_layers == getattr(theirs, "no_rope_layers", None) or [1] * 30
    windows = family in ("Mistral", "Qwen2", "Qwen3", "Phi3", "SmolLM3")
    size = theirs.sliding_window if windows else None
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 30
    assert ours.windows == [size if kind == "sliding_attention" else None for kind in kinds]
    assert ours.qkv_bias == (family == "Qwen2") and not ours.mlp_bias


def test_gemma_in_bfloat16_is_theirs(tmp_path):
    """Its embeddings and its norms to the last bit. sqrt(32) is rounded in bfloat16."""
    model = theirs("gemma").bfloat16()
    model.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    seen = []
    ours.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        ours(TOKENS)
        assert torch.equal(seen[0], model.model.embed_tokens(TOKENS).flatten(0, 1))
        x = seen[0]
        assert torch.equal(ours.norm(x), model.model.norm(x))


@pytest.mark.parametrize("other", ["GPTNeoX", "Gemma2", "Mixtral"])
def test_other_architectures_are_refused_with_what_is_supported(tmp_path, other):
    getattr(transformers, f"{other}Config")().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not supported, only llama, mistral, qwen2, .*opt"):
        Transformer.from_pretrained(tmp_path)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "name", ["qwen2", "gpt2", "phi", "phi3", "opt", "opt-350m", "gemma", "olmo2", "smollm3"]
)
def test_a_trained_model_is_handed_back_whole(name, tmp_path):
    """train.py from a folder of transformers to a folder of transformers, over messages: the
    prompt's ids, and the greedy answer with its end, are the same there and here."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant What is the colour of grass? Green."], trainer)
    base, out = tmp_path / "base", tmp_path / "out"
    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(
        **settings | {"vocab_size": 304, "max_position_embeddings": 64, "pad_token_id": None}
    )
    torch.manual_seed(0)
    getattr(transformers, family + SUFFIX.get(family, "ForCausalLM"))(config).save_pretrained(base)
    (base / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(base / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": None,
        "chat_template": CHATML,
    }
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    question = [{"role": "user", "content": "What is the colour of grass?"}]
    row = {"prompt": question}
    row |= {side: [{"role": "assistant", "content": text}] for side, text in
            (("chosen", "Green."), ("rejected", "What?"))}  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    flags = ["--max-steps", "40", "--batch-size", "1", "--lr", "1e-2", "--device", "cpu"]
    train.main(["--model", str(base), "--data", str(rows), "--out", str(out), *flags])

    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    ids = their_tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    tokenizer = data.load_tokenizer(out / "model")
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert data.encode_prompt(tokenizer, text) == list(ids)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0]
    ours = Transformer.from_pretrained(out / "model")
    assert ours.generate([ids], 12, eos_id=tokenizer.eos_id) == [answer[len(ids) :].tolist()]
    said = their_tokenizer.decode(answer[len(ids) :])
    assert said == tokenizer.decode(answer[len(ids) :].tolist()) == "Green.<|im_end|>"
