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
from formats.families import FAMILIES
from formats.weights import write_safetensors
from model import ModelConfig, Transformer
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
    """Six digits are given; rotary angles and RMSNorm are float32 there."""
    got = last_logits(write_family(name, tmp_path), name)
    torch.testing.assert_close(got, golden_logits(name), rtol=0, atol=5e-6)


def test_there_is_a_golden_row_of_every_family():
    assert {case["config"]["model_type"] for case in GOLDEN.values()} == set(FAMILIES)


def test_buffers_of_old_gpt2_checkpoints_are_passed_over(tmp_path):
    buffers = {}
    for i in range(2):
        buffers[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().to(torch.uint8)
        buffers[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    got = last_logits(write_family("gpt2", tmp_path, **buffers), "gpt2")
    torch.testing.assert_close(got, golden_logits("gpt2"), rtol=0, atol=5e-6)


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


SUPPORTED = "llama, mistral, qwen2, qwen3, phi3, phi, gpt2, opt"
OPT = {"model_type": "opt", "ffn_dim": 24}


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
        ({"hidden_act": "swish7"}, "activation 'swish7' is not supported, only silu, relu"),
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
