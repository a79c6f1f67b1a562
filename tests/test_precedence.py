"""Where two sources disagree: which one counts. A row for each pair of them.

Elsewhere: rope_theta and its rivals and the tokens that end an answer (test_served.py), BOS and EOS
of two files and the chat template (test_tokenizer.py), safetensors and pickles (test_weights.py),
the hub's caches (test_served.py), --date (test_resume.py), flags, --config and defaults
(test_flags.py), the user's own column (test_forms.py).
"""

import json
from itertools import combinations

import pytest
import torch

from data import load_tokenizer
from formats.files import model_folder
from formats.messages import messages_of
from formats.rows import preference
from formats.weights import write_safetensors
from model import ModelConfig, Transformer
from run.folder import read_settings, settings_before
from tests.small import random_model, state, with_config
from tests.tokenizer_json import byte_level, metaspace
from tools.forms import convert

LLAMA = {"model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 24}
LLAMA |= {"num_hidden_layers": 3, "num_attention_heads": 4}
QWEN = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4, "sliding_window": 7}
QWEN |= {"use_sliding_window": True, "max_window_layers": 1}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "sliding_window": 7, "use_sliding_window": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 4}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 4}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
PHI3 = LLAMA | {"model_type": "phi3", "original_max_position_embeddings": 16}
PHI3 |= {"max_position_embeddings": 64}
S, F = "sliding_attention", "full_attention"
KEYS = {  # what: (config.json, our field, its value)
    "torch_dtype before dtype": (
        LLAMA | {"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype", "bfloat16",
    ),
    "dtype where torch_dtype is null": (
        LLAMA | {"dtype": "float16", "torch_dtype": None}, "dtype", "float16",
    ),
    "n_inner before 4 n_embd": (GPT2 | {"n_inner": 24}, "hidden_dim", 24),
    "4 n_embd where n_inner is null": (GPT2 | {"n_inner": None}, "hidden_dim", 64),
    "head_dim before hidden_size / heads": (LLAMA | {"head_dim": 8}, "head_dim", 8),
    "hidden_size / heads where head_dim is null": (LLAMA | {"head_dim": None}, "head_dim", 4),
    "max_window_layers": (QWEN, "windows", [None, 7, 7]),
    "max_window_layers, also 0, before its default": (
        QWEN | {"max_window_layers": 0}, "windows", [7, 7, 7],
    ),
    "layer_types before max_window_layers": (
        QWEN | {"layer_types": [S, F, F]}, "windows", [7, None, None],
    ),
    "use_sliding_window before layer_types": (
        QWEN | {"layer_types": [S, F, F], "use_sliding_window": False}, "windows", [None] * 3,
    ),
    "layer_types before no_rope_layers": (
        SMOLLM3 | {"no_rope_layers": [1, 0, 1], "layer_types": [S, F, F]}, "windows",
        [7, None, None],
    ),
    "no_rope_layers before their interval": (
        SMOLLM3 | {"no_rope_layers": [0, 0, 1], "no_rope_layer_interval": 3}, "rope_layers",
        [0, 0, 1],
    ),
    "Mistral's own window where nothing is said": (MISTRAL, "windows", [4096] * 3),
    "null before Mistral's own window": (
        MISTRAL | {"sliding_window": None}, "windows", [None] * 3,
    ),
    "rope_type before type": (
        LLAMA | {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
        "rope_scaling", {},
    ),
    "short_factor's context before the whole": (
        PHI3 | {"rope_scaling": LONGROPE}, "max_seq_len", 16,
    ),
    "a smaller context before short_factor's": (
        PHI3 | {"rope_scaling": LONGROPE, "max_position_embeddings": 8}, "max_seq_len", 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", KEYS)
def test_two_keys_of_a_config(what, tmp_path):
    config, name, wanted = KEYS[what]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert getattr(ModelConfig.from_json(tmp_path / "config.json"), name) == wanted


def test_a_whole_file_of_weights_counts_more_than_its_shards(tmp_path):
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path, shard_bytes=1)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    prefixes = {"lm_head.weight": ""}
    tensors = {prefixes.get(name, "model.") + name: p + 1 for name, p in state(model).items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    found = Transformer.from_pretrained(tmp_path)
    assert torch.equal(found.norm.weight, model.norm.weight + 1)


def test_the_weights_own_dtype_counts_more_than_the_configs(tmp_path):
    random_model(torch.float32).save_pretrained(tmp_path, dtype=torch.bfloat16)
    with_config(tmp_path, torch_dtype="float16", dtype="float32")
    assert Transformer.from_pretrained(tmp_path).config.dtype == "bfloat16"


# ---------------------------------------------------------------------------------------------
# Tokenizers. In tokenizer.json <a> has the id 256.

JSON = {"tokenizer.json": byte_level(added=[{"content": "<a>"}])}
DECODER = {"added_tokens_decoder": {"300": {"content": "<a>"}}}
ELSEWHERE = {"added_tokens.json": {"<a>": 301}}
VOCAB = {"vocab.json": byte_level()["model"]["vocab"], "merges.txt": "#version: 0.2\n"}
IDS = {  # what: (files beside tokenizer.model, tokenizer_config.json, a text, its ids)
    "tokenizer.json before added_tokens.json": (JSON | ELSEWHERE, {}, "<a>", [256]),
    "tokenizer_config.json before tokenizer.json": (JSON, DECODER, "<a>", [300]),
    "tokenizer_config.json before added_tokens.json": (ELSEWHERE, DECODER, "<a>", [300]),
    "tokenizer.model's own <s> before added_tokens.json": (
        {"added_tokens.json": {"<s>": 401}}, {}, "<s>", [1],
    ),
    "an added token of tokenizer.json before its vocabulary": (
        {"tokenizer.json": byte_level(added=[{"content": "a", "id": 300}])}, {}, "a", [300],
    ),
    "prepend_scheme before add_prefix_space": (
        {"tokenizer.json": metaspace(prepend_scheme="never", add_prefix_space=True)}, {}, "the",
        [260, 264],
    ),
    "tokenizer.json before vocab.json": (JSON | VOCAB, {}, "<a>", [256]),
    "tokenizer.model before vocab.json": (VOCAB, {}, "<s>", [1]),
}  # fmt: skip


@pytest.mark.parametrize("what", IDS)
def test_two_files_of_a_tokenizer(what, make_tokenizer):
    files, config, text, ids = IDS[what]
    assert make_tokenizer(files, **config).encode(text) == ids


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_the_tokenizers_config_counts_more_than_the_models(name, make_tokenizer):
    """Of sentencepiece's own ids, and of those in config.json; a null is no token."""
    for files in ({}, JSON | {"config.json": {f"{name}_token_id": 256}}):
        own = 256 if files else {"bos": 1, "eos": 2}[name]
        text = "a" if files else "<unk>"
        for config, wanted in (({}, own), ({f"{name}_token": text}, 97 if files else 0),
                               ({f"{name}_token": None}, None)):  # fmt: skip
            assert getattr(make_tokenizer(files, **config), f"{name}_id") == wanted


def test_a_template_of_ones_own_counts_more_than_the_folders(make_tokenizer, tmp_path):
    make_tokenizer({"chat_template.jinja": "folder"}, chat_template="config")
    (tmp_path / "own.jinja").write_text("own")
    tokenizer = load_tokenizer(tmp_path / "made", tmp_path / "own.jinja")
    assert tokenizer.apply_chat_template([]) == "own"


# ---------------------------------------------------------------------------------------------
# Rows.


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


ANSWERS = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
PROMPTS = ("prompt", "instruction", "question", "messages", "conversations")


@pytest.mark.parametrize(("first", "second"), [*combinations(PROMPTS, 2)])
def test_two_columns_that_ask(first, second):
    """train.py's order, also where the row has it the other way round."""
    found = preference(ANSWERS | {second: user("2"), first: user("1")}, "FILE:1")
    assert found.prompt == user("1") and found.ignored == (second,)
    found = preference(ANSWERS | {second: user("2"), first: []}, "FILE:1")
    assert found.prompt == user("2")


ASKS = ("prompt", "instruction", "question", "query", "messages", "conversation", "context")


@pytest.mark.parametrize(("first", "second"), [*combinations(ASKS, 2)])
def test_two_columns_that_ask_prepare(first, second):
    """tools/prepare.py's order."""
    row = ANSWERS | {second: user("2"), first: user("1")}
    assert convert(row, "FILE:1")[0].prompt == user("1")


MESSAGES = [  # a message with two spellings of one thing, its role and content
    ({"role": "user", "from": "gpt", "content": "a", "value": "b"}, ("user", "a")),
    ({"role": None, "from": "gpt", "content": "a", "value": "b"}, ("assistant", "a")),
    ({"role": "user", "content": "", "value": "b"}, ("user", "b")),
    ({"role": "user", "content": None, "value": "b"}, ("user", "b")),
]


@pytest.mark.parametrize(("message", "wanted"), MESSAGES)
def test_two_keys_of_a_message(message, wanted):
    (found,) = messages_of([message])
    assert (found["role"], found["content"]) == wanted


def test_two_keys_of_a_dialogue():
    assert messages_of({"conversations": user("2"), "messages": user("1")}) == user("1")
    assert messages_of({"conversations": user("2"), "messages": []}) == user("2")


def test_chosen_and_rejected_count_more_than_another_form():
    more = {"messages": user("q"), "rejected_response": "x", "chosen_response": "y"}
    found, _ = convert(ANSWERS | more, "FILE:1")
    assert (found.chosen, found.rejected) == (ANSWERS["chosen"], ANSWERS["rejected"])


# ---------------------------------------------------------------------------------------------
# Runs.


def test_the_newest_checkpoints_settings_count_more_than_the_folders(tmp_path):
    places = [tmp_path / "checkpoints" / "step-00000002", tmp_path]
    places.insert(1, tmp_path / "checkpoints" / "step-00000001")
    for lam, place in enumerate(places):
        place.mkdir(parents=True, exist_ok=True)
        (place / "run.json").write_text(json.dumps({"lam": lam}))
    (tmp_path / "finished").touch()
    for lam, place in enumerate(places):
        assert settings_before(tmp_path) == ({"lam": lam}, place)
        (place / "run.json").unlink()
    assert settings_before(tmp_path) is None


def test_run_json_counts_more_than_its_older_name(tmp_path):
    for name, lam in (("config.json", 1), ("run.json", 2)):
        (tmp_path / name).write_text(json.dumps({"lam": lam}))
        assert read_settings(tmp_path) == {"lam": lam}


def test_a_folder_counts_more_than_the_hubs_name(tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--Org--Tiny" / "snapshots" / "none"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    (cached / "model.safetensors").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert model_folder("Org/Tiny") == cached
    (tmp_path / "Org" / "Tiny").mkdir(parents=True)
    assert model_folder("Org/Tiny").resolve() == tmp_path / "Org" / "Tiny"
