"""Every family: its config.json, and its logits against a row that transformers computed.

tests/golden/families/*.json has the rows, and make_families.py beside it says where they come from.
"""

import json
from pathlib import Path

import pytest
import torch

import orpo
import train
from data import Pair, micro_batches
from formats.config import write_config
from formats.families import FAMILIES
from formats.weights import read_safetensors, write_safetensors
from model import ModelConfig, Norm, Transformer
from tests.golden.make_families import weights
from tests.small import complaint, random_model, with_config

GOLDEN = {
    file.stem: json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((Path(__file__).parent / "golden" / "families").glob("*.json"))
}


def write_family(name: str, folder: Path, **more: torch.Tensor) -> Path:
    """The model of a golden file as a checkpoint, with more tensors if there are any."""
    case = GOLDEN[name]
    tensors = {key: torch.from_numpy(weights(key, shape)) for key, shape in case["shapes"].items()}
    (folder / "config.json").write_text(json.dumps(case["config"]))
    write_safetensors(folder / "model.safetensors", tensors | more)
    return folder


def last_logits(folder: Path, name: str) -> torch.Tensor:
    model = Transformer.from_pretrained(folder, dtype=torch.float64)
    return model(torch.tensor([GOLDEN[name]["tokens"]]))[0, -1]


def golden_logits(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name]["logits"], dtype=torch.float64)


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_transformers(name, tmp_path):
    """Six digits are given; rotary angles and RMSNorm are float32 there, where Gemma's norms double
    what comes in: 1 + a weight near 1."""
    got = last_logits(write_family(name, tmp_path), name)
    atol = 1e-5 if name == "gemma" else 5e-6
    torch.testing.assert_close(got, golden_logits(name), rtol=0, atol=atol)


@pytest.mark.parametrize("name", GOLDEN)
def test_there_is_no_dropout_whatever_config_json_says(name, tmp_path):
    write_family(name, tmp_path)
    keys = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout")
    keys += ("hidden_dropout", "activation_dropout", "layerdrop")
    with_config(tmp_path, **dict.fromkeys(keys, 0.5))
    model = Transformer.from_pretrained(tmp_path, dtype=torch.float64).train()
    got = model(torch.tensor([GOLDEN[name]["tokens"]]))[0, -1]
    torch.testing.assert_close(got, last_logits(write_family(name, tmp_path), name), rtol=0, atol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_saved_tensor_has_the_name_and_shape_that_transformers_gives_it(name, tmp_path):
    """Our own reader takes names without their prefix too, and so cannot tell."""
    model = Transformer.from_pretrained(write_family(name, tmp_path))
    model.save_pretrained(tmp_path / "again")
    saved = read_safetensors(tmp_path / "again" / "model.safetensors")
    assert {key: [*tensor.shape] for key, tensor in saved} == GOLDEN[name]["shapes"]


def test_there_is_a_golden_row_of_every_family():
    assert {case["config"]["model_type"] for case in GOLDEN.values()} == set(FAMILIES)


def test_buffers_of_old_gpt2_checkpoints_are_passed_over(tmp_path):
    buffers = {}
    for i in range(2):
        buffers[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().to(torch.uint8)
        buffers[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    got = last_logits(write_family("gpt2", tmp_path, **buffers), "gpt2")
    torch.testing.assert_close(got, golden_logits("gpt2"), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "name", sorted(GOLDEN.keys() - {"phi"})
)  # whose head has a bias, and is not tied
def test_a_head_that_config_json_ties_and_that_is_another_is_refused(name, tmp_path):
    """Whatever the family calls its embedding."""
    (tmp_path / "as it is").mkdir()
    (tmp_path / "tied").mkdir()
    model = Transformer.from_pretrained(write_family(name, tmp_path / "as it is"))
    head = torch.randn(model.lm_head_weight.shape)  # some of these models have one already
    more = {"lm_head.weight": head} if model.config.tie_embeddings else {}
    folder = write_family(name, tmp_path / "tied", **more)
    with_config(folder, tie_word_embeddings=True)
    message = complaint(Transformer.from_pretrained, folder)
    assert message.startswith("config.json ties lm_head to the embedding, and the weights hold an")


@pytest.mark.parametrize("name", GOLDEN)
def test_the_loss_of_packed_pairs_is_that_of_the_models_logits(name, tmp_path):
    """With windows, learned positions and a bias of lm_head; float32 weights of tokens."""
    model = Transformer.from_pretrained(write_family(name, tmp_path), dtype=torch.float64)
    tokens = GOLDEN[name]["tokens"]
    pairs = [Pair(tokens[:9], tokens[9:13], tokens[13:]), Pair(tokens[:2], [3], [5, 7, 2])]
    logps = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side in logps:
            ids = torch.tensor([[*pair.prompt, *getattr(pair, side)]])
            mask = torch.arange(1, ids.shape[1])[None] >= len(pair.prompt)
            logps[side].append(orpo.response_logps(model(ids)[:, :-1], ids[:, 1:], mask))
    wanted = orpo.orpo_loss(*(torch.cat(x) for x in logps.values()), lam=0.5)
    (batch,) = micro_batches(pairs, 10**9, "response")
    torch.testing.assert_close(train.forward(model, batch, 0.5).loss, wanted, rtol=1e-6, atol=0)


def rope(**scaling):
    return {"rope_scaling": scaling}


SUPPORTED = "llama, mistral, qwen2, qwen3, gemma, olmo2, smollm3, phi3, phi, gpt2, opt"
OPT = {"model_type": "opt", "ffn_dim": 24}
SMOLLM3 = {"model_type": "smollm3"}
LONGROPE = {"model_type": "phi3", "original_max_position_embeddings": 16}
LONGROPE |= rope(type="longrope", short_factor=[1.0, 2.0], long_factor=[4.0, 8.0])


def longrope(**scaling):
    return LONGROPE | rope(**LONGROPE["rope_scaling"] | scaling)


def window(size, **more):
    return {"model_type": "mistral", "sliding_window": size} | more


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mamba"}, f"'mamba' is not supported, only {SUPPORTED}"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "model_type 'llava'"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"model_type": ...}, "model_type None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights are not"),
        ({"quantization_config": 3}, "quantised weights"),
        (rope(type="yarn", factor=2.0), "rope_type 'yarn' is not supported, only ('default', 'li"),
        (rope(rope_type="longrope", factor=8.0), "rope_type 'longrope'"),
        (rope(type="su", factor=8.0), "rope_type 'su'"),
        (longrope(short_factor=None), "longrope needs 2 numbers as its short_factor, not []"),
        (longrope(long_factor=None), "longrope needs 2 numbers as its long_factor, not []"),
        (rope(rope_type="yarn", factor=4.0) | {"rope_type": "default"}, "rope_type 'yarn'"),
        ({"is_causal": False}, "is_causal False is not supported"),
        (longrope(short_factor=[1.0]), "longrope needs 2 numbers as its short_factor, not [1.0]"),
        (longrope(short_factor=[1.0, "2"]), "longrope needs 2 numbers"),
        (longrope(short_factor=[1.0, 0]), "longrope needs 2 numbers"),
        (longrope(attention_factor=-1.0), "longrope needs 2 numbers"),
        (LONGROPE | {"original_max_position_embeddings": 0.5}, "embeddings cannot be 0.5"),
        ({"rope_parameters": {"rope_type": "dynamic"}, "rope_scaling": None}, "'dynamic'"),
        (rope(type=["yarn"]), "rope_type ['yarn']"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        (rope(type="linear"), "rope_scaling of type linear needs a number 'factor' above 0"),
        (rope(type="linear", factor=float("nan")), "'factor'"),
        (rope(type="linear", factor=0), "'factor'"),
        ({"attention_bias": 1}, "attention_bias cannot be 1"),
        ({"mlp_bias": "no"}, "mlp_bias cannot be 'no'"),
        (OPT | {"do_layer_norm_before": 0}, "do_layer_norm_before cannot be 0"),
        (OPT | {"word_embed_proj_dim": -8}, "word_embed_proj_dim cannot be -8"),
        ({"hidden_act": "swish7"}, "activation 'swish7' is not supported, only silu, swish, relu"),
        ({"hidden_act": ["silu"]}, "hidden_act cannot be ['silu']"),
        ({"vocab_size": ...}, "key 'vocab_size' is missing"),
        ({"hidden_size": ...}, "key 'hidden_size' is missing"),
        ({"intermediate_size": None}, "key 'intermediate_size' is missing"),
        ({"num_key_value_heads": 3}, "4 heads do not share 3 key/value heads"),
        ({"head_dim": 3}, "rotary turns pairs of 3, not 3"),
        ({"model_type": "phi", "partial_rotary_factor": 1.5}, "rotary turns pairs of 4, not 6"),
        ({"vocab_size": "31"}, "vocab_size cannot be '31'"),
        ({"vocab_size": -31}, "vocab_size cannot be -31"),
        ({"hidden_size": 16.5}, "hidden_size cannot be 16.5"),
        ({"hidden_size": float("inf")}, "hidden_size cannot be inf"),
        ({"hidden_size": 2**40}, "hidden_size cannot be 1099511627776"),
        ({"num_attention_heads": 0}, "num_attention_heads cannot be 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers cannot be True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers cannot be 1000000000"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps cannot be 'small'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps cannot be nan"),
        ({"rope_theta": float("inf")}, "rope_theta cannot be inf"),
        ({"rope_theta": 10**400}, "rope_theta cannot be 1000"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings cannot be 'no'"),
        (window("wide"), "sliding_window cannot be 'wide'"),
        (window(-1), "sliding_window cannot be -1"),
        (window(8, layer_types=["full"]), "layer_types must list 2 layers, not ['full']"),
        (window(8, layer_types=2), "layer_types must list 2 layers, not 2"),
        (SMOLLM3 | {"no_rope_layers": [1]}, "no_rope_layers must be 0 or 1 for 2 layers: [1]"),
        (SMOLLM3 | {"no_rope_layers": [1, 2]}, "no_rope_layers must be 0 or 1 for 2 layers"),
        (SMOLLM3 | {"no_rope_layers": 2}, "no_rope_layers cannot be 2"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval cannot be 0"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "attention True is not sup"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_out_of_reach_is_refused_in_one_sentence(change, words, tmp_path):
    random_model().save_pretrained(tmp_path)
    with_config(tmp_path, **change)
    assert words in complaint(ModelConfig.from_json, tmp_path / "config.json")


def test_a_tensor_beyond_all_memory_is_the_configs_fault(tmp_path):
    """Each number is possible alone: 2^30 by 2^30 floats have no size in 64 bits."""
    random_model().save_pretrained(tmp_path)
    with_config(tmp_path, hidden_size=2**30, num_attention_heads=2**30)
    with pytest.raises(ValueError, match=r"config\.json: .*size") as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe{}", "not JSON: 'utf-8'"),
        (b"[]", "a JSON object is expected, not list"),
        (b"3", "a JSON object is expected, not int"),
        (b"null", "a JSON object is expected, not NoneType"),
    ],
    ids=lambda x: repr(x)[:9],
)
def test_a_config_that_is_no_object_names_its_file(text, words, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    assert words in complaint(ModelConfig.from_json, tmp_path / "config.json")


def test_a_missing_config_is_named(tmp_path):
    """A folder of that name is no file."""
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
            Transformer.from_pretrained(tmp_path)
        (tmp_path / "config.json").mkdir(exist_ok=True)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "is a file; the folder" in complaint(Transformer.from_pretrained, tmp_path / "m.gguf")


@pytest.fixture
def new_keys(tmp_path):
    """A model, and its folder with the keys that transformers 5 writes: rope_parameters, dtype."""
    model = random_model(torch.float32, rope_theta=500.0)
    model.save_pretrained(tmp_path)
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "dtype": "float32"}
    with_config(tmp_path, **new, rope_theta=..., torch_dtype=..., bos_token_id=1)
    return model, tmp_path


def test_new_config_keys_are_read(new_keys):
    model, folder = new_keys
    loaded = Transformer.from_pretrained(folder)
    assert loaded.config.rope_theta == 500.0 and loaded.config.dtype == "float32"
    assert torch.equal(loaded(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_a_config_with_new_keys_is_saved_with_old_ones_and_all_others(new_keys, tmp_path):
    model, folder = new_keys
    Transformer.from_pretrained(folder).save_pretrained(tmp_path / "again")
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


# ---------------------------------------------------------------------------------------------
# What only one family has.

SMALLEST = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24}
SMALLEST |= {"num_hidden_layers": 5, "num_attention_heads": 4}


def config_of(folder: Path, model_type: str, **keys) -> ModelConfig:
    """From a config.json with the keys that must be there, and with these."""
    (folder / "config.json").write_text(json.dumps(SMALLEST | {"model_type": model_type} | keys))
    return ModelConfig.from_json(folder / "config.json")


@pytest.mark.parametrize(
    "family, n_kv_heads, head_dim, norm_eps, rope_theta, max_seq_len, tied",
    [
        ("gemma", 16, 256, 1e-6, 1e4, 8192, True),
        ("olmo2", 32, 2, 1e-5, 1e4, 2048, False),
        ("smollm3", 4, 2, 1e-6, 2e6, 32768, True),
    ],
)
def test_absent_keys_are_the_defaults_of_that_family_in_transformers(
    family, n_kv_heads, head_dim, norm_eps, rope_theta, max_seq_len, tied, tmp_path
):
    c = config_of(tmp_path, family, hidden_size=64, num_attention_heads=32)
    assert (c.n_kv_heads, c.head_dim, c.norm_eps) == (n_kv_heads, head_dim, norm_eps)
    assert (c.rope_theta, c.max_seq_len, c.tie_embeddings) == (rope_theta, max_seq_len, tied)


def test_gemmas_gelu_is_its_approximation(tmp_path):
    """Its first files say gelu, as transformers knows; and hidden_activation, which it ignores."""

    def activation(family, **keys):
        return config_of(tmp_path, family, num_key_value_heads=1, **keys).activation

    for keys in ({}, {"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": "relu"}):
        assert activation("gemma", **keys) == "gelu_pytorch_tanh"
    assert activation("gemma", hidden_act="relu") == "relu"
    assert activation("llama", hidden_act="gelu") == "gelu"


def test_the_root_that_gemma_multiplies_by_has_the_weights_dtype():
    """The root of 24, 4.899, is 4.90625 in bfloat16: with a product in float32 it is another."""
    for dtype, root in ((torch.bfloat16, 4.90625), (torch.float32, 24**0.5)):
        model, seen = random_model(dtype, dim=24, scale_embeddings=True), []
        model.layers[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs))
        model(torch.arange(9)[None])
        wanted = model.embed_tokens.weight[:9].double() * torch.tensor(root, dtype=dtype).double()
        assert torch.equal(seen[0][0], wanted.to(dtype))


def test_a_norm_that_adds_one_rounds_once():
    """To within half a unit of bfloat16's last place, at most 2^-8 of the value."""
    x, weight = (torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    norm = Norm(64, ModelConfig(23, 64, 1, 1, 8, norm_adds_one=True)).bfloat16()
    norm.weight.data.copy_(0.1 * weight)
    x = x.bfloat16()
    exact = x.double() / (x.double().square().mean() + 1e-6).sqrt() * (1 + norm.weight.double())
    torch.testing.assert_close(norm(x).double(), exact, rtol=1.001 * 2**-8, atol=0)


def test_a_new_model_with_norms_that_add_one_starts_at_one():
    assert not Transformer(ModelConfig(23, 16, 1, 4, 24, norm_adds_one=True)).norm.weight.any()


def test_without_a_list_every_fourth_layer_of_smollm3_has_no_rotary(tmp_path):
    assert config_of(tmp_path, "smollm3").rope_layers == [1, 1, 1, 0, 1]
    config = config_of(tmp_path, "smollm3", no_rope_layer_interval=2)
    assert config.rope_layers == [1, 0, 1, 0, 1]
    config = config_of(tmp_path, "smollm3", no_rope_layers=[0, 1, 1, 1, 1, 0])
    assert config.rope_layers == [0, 1, 1, 1, 1]


def test_windows_of_smollm3_are_where_no_rotary_is(tmp_path):
    keys = {"sliding_window": 7, "no_rope_layer_interval": 2}
    assert config_of(tmp_path, "smollm3", **keys).windows == [None] * 5
    config = config_of(tmp_path, "smollm3", **keys, use_sliding_window=True)
    assert config.windows == [None, 7, None, 7, None]


def test_a_null_is_as_many_key_value_heads_as_heads(tmp_path):
    """Which the absence of the key is not: SmolLM3's default is 4."""
    for keys, n in (({}, 4), ({"num_key_value_heads": None}, 8)):
        config = config_of(tmp_path, "smollm3", num_attention_heads=8, **keys)
        assert config.n_kv_heads == n


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_a_tied_head_may_be_all_that_is_stored_of_the_embedding(name, tmp_path):
    """Of two names for one tensor safetensors' save_model keeps the first by the alphabet."""
    write_family(name, tmp_path)
    tensors = dict(read_safetensors(tmp_path / "model.safetensors"))
    (embedding,) = (key for key in tensors if key.endswith(("wte.weight", "embed_tokens.weight")))
    tensors["lm_head.weight"] = tensors.pop(embedding).clone()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    wanted = golden_logits(name)
    torch.testing.assert_close(last_logits(tmp_path, name), wanted, rtol=0, atol=1e-5)
    del tensors["lm_head.weight"]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="1 tensors are missing: "):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("alias", ["gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"])
def test_an_activation_has_several_names(alias, tmp_path):
    """GPT-2 by Megatron's converters says gelu_fast; all are gelu_new's formula."""
    write_family("gpt2", tmp_path)
    with_config(tmp_path, activation_function=alias)
    got = last_logits(tmp_path, "gpt2")
    torch.testing.assert_close(got, golden_logits("gpt2"), rtol=0, atol=5e-6)


def test_a_number_of_longrope_stays_with_both_readers(tmp_path):
    """transformers 5 takes rope_scaling before rope_parameters."""
    source = GOLDEN["phi3-longrope"]["config"]
    rope = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]}
    given = {k: v for k, v in source.items() if k != "rope_scaling"}
    given["rope_parameters"] = rope | {"attention_factor": 1.0, "rope_theta": 100.0}
    (tmp_path / "config.json").write_text(json.dumps(given))
    config = ModelConfig.from_json(tmp_path / "config.json")
    write_config(tmp_path, config, torch.float32)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"]["attention_factor"] == 1.0
    assert ModelConfig.from_json(tmp_path / "config.json").rope_scaling == config.rope_scaling


def test_the_context_of_longrope_ends_with_its_short_factor(tmp_path):
    """cos and sin are multiplied by sqrt(1 + ln(96/24) / ln 24) = 1.19842. It follows from the
    context in the file, which a saved model must therefore keep."""
    model = Transformer.from_pretrained(write_family("phi3-longrope", tmp_path))
    assert model.config.max_seq_len == 24
    assert model.config.rope_scaling["attention_factor"] == pytest.approx(1.19842, abs=1e-5)
    with pytest.raises(ValueError, match="25 tokens, but the context is 24"):
        model(torch.zeros(1, 25, dtype=torch.int64))
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 96
    again = Transformer.from_pretrained(tmp_path / "again")
    assert again.config.rope_scaling == model.config.rope_scaling


def test_longrope_has_an_older_name_and_may_give_its_numbers(tmp_path):
    scaling = LONGROPE["rope_scaling"]
    given = {"type": "su", "attention_factor": 1.5}
    for change, wanted in (({"type": "su", "factor": 4.0}, 1.5**0.5), (given, 1.5), ({}, 1.0)):
        keys = {"max_position_embeddings": 16, "original_max_position_embeddings": 16}
        config = config_of(tmp_path, "phi3", **keys, rope_scaling=scaling | change)
        assert config.rope_scaling["attention_factor"] == pytest.approx(wanted)
        assert config.rope_scaling["short_factor"] == [1.0, 2.0] and config.max_seq_len == 16


def test_phi_4_is_a_phi_3(tmp_path):
    """14.7e9 parameters, from the values of its config.json."""
    keys = {"vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 17920}
    keys |= {"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10}
    keys |= {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384}
    keys |= {"rope_theta": 250000, "rope_scaling": None, "sliding_window": None}
    config = config_of(tmp_path, "phi3", **keys, rms_norm_eps=1e-5, tie_word_embeddings=False)
    assert (config.rope_theta, config.head_dim, config.max_seq_len) == (250000, 128, 16384)
    with torch.device("meta"):
        n = sum(p.numel() for p in Transformer(config).parameters())
    assert n == pytest.approx(14.66e9, rel=1e-3)


# What each family's class in transformers reads, and a parameter that is there where it is true.
BOOLEANS = [
    (key, family, parameter)
    for key, parameter, families in (
        ("tie_word_embeddings", None, " ".join(f for f in FAMILIES if f != "phi")),
        ("attention_bias", "layers.0.self_attn.k_proj.bias", "llama qwen3 gemma olmo2 smollm3"),
        ("mlp_bias", "layers.0.mlp.down_proj.bias", "llama smollm3"),
        ("do_layer_norm_before", "norm.bias", "opt"),
    )
    for family in families.split()
]
# What is built for one value alone.
FIXED = {
    "gemma": {"use_bidirectional_attention": False},
    "phi": {"qk_layernorm": False, "tie_word_embeddings": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}
    | {"add_cross_attention": False},
    "opt": {"enable_bias": True, "layer_norm_elementwise_affine": True}
    | {"_remove_final_layer_norm": False},
}
FIXED = [(family, key, value) for family, keys in FIXED.items() for key, value in keys.items()]
OTHER_NAMES = {"n_embd": 16, "n_layer": 2, "n_head": 4, "ffn_dim": 24, "num_key_value_heads": 4}


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(("key", "family", "parameter"), BOOLEANS)
def test_a_boolean_is_what_the_file_says_whatever_the_familys_default(
    key, family, parameter, value, tmp_path
):
    """Also when it is written and read again."""
    config = config_of(tmp_path, family, **OTHER_NAMES, **{key: value})
    write_config(tmp_path, config, torch.float32)
    for found in (config, ModelConfig.from_json(tmp_path / "config.json")):
        with torch.device("meta"):
            names = {name for name, _ in Transformer(found).named_parameters()}
        is_there = "lm_head.weight" not in names if parameter is None else parameter in names
        assert is_there == value


@pytest.mark.parametrize(("family", "key", "value"), FIXED)
def test_a_boolean_that_is_built_for_one_value_alone_may_say_it(family, key, value, tmp_path):
    config_of(tmp_path, family, **OTHER_NAMES, **{key: value})
    with pytest.raises(ValueError, match=f"{key} {not value} is not supported, only"):
        config_of(tmp_path, family, **OTHER_NAMES, **{key: not value})


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3"])
def test_windows_that_are_switched_off_are_none(model_type, tmp_path):
    keys = {"sliding_window": 7, "max_window_layers": 0, "num_key_value_heads": 4}
    assert config_of(tmp_path, model_type, **keys, use_sliding_window=False).windows == [None] * 5


def test_the_dtype_has_one_name_in_what_is_written(tmp_path):
    """A config.json of transformers 5 says dtype, and the model is stored in another one."""
    config = config_of(tmp_path, "llama", dtype="float32")
    write_config(tmp_path, config, torch.bfloat16)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["torch_dtype"] == "bfloat16" and saved.get("dtype", "bfloat16") == "bfloat16"
