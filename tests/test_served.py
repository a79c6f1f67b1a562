"""What OUT/model says to whoever serves it: BOS, the tokens that end an answer, and no code; and
what --model may be. With transformers and others themselves: tests/peers/test_served.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from data import load_tokenizer
from formats.config import write_config
from formats.files import model_folder
from formats.weights import write_safetensors
from model import ModelConfig, Transformer
from run.saving import Run, stop_ids, write_model_files
from tests.runs import fails, file_bytes, run
from tests.small import complaint, random_model, state


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def write(file, value):
    file.write_text(json.dumps(value), encoding="utf-8")


def written(base, out, chat=False, plain=True):
    """The files beside the weights that a run from `base` writes."""
    out.mkdir()
    config = train.TrainConfig(model=str(base))
    model, tokenizer = Transformer.from_pretrained(base), load_tokenizer(base)
    a_run = Run(config, out, model, None, tokenizer, chat, plain, n_steps=1, digests={})
    write_model_files(out, a_run)
    return out


@pytest.fixture
def base(tiny_llama, tmp_path):
    """A copy of tiny_llama, which may be changed."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    "generation, config, wanted",
    [
        (None, None, 2),
        (None, 1, [2, 1]),
        ({"eos_token_id": 1}, None, [2, 1]),
        ({"eos_token_id": 2, "top_p": 0.9}, 1, 2),
        ({"eos_token_id": [7, 2, 1]}, None, [2, 7, 1]),
        ({"top_p": 0.9}, [5], [2, 5]),
    ],
)
def test_a_model_ends_its_answers_as_it_was_trained_and_as_its_base_did(
    generation, config, wanted, base, tmp_path
):
    if generation is not None:
        write(base / "generation_config.json", generation)
    write(base / "config.json", read(base / "config.json") | {"eos_token_id": config})
    out = written(base, tmp_path / "out")
    assert read(out / "generation_config.json")["eos_token_id"] == wanted
    assert read(out / "config.json")["eos_token_id"] == 2  # llama.cpp reads no list
    kept = {k: v for k, v in (generation or {}).items() if k != "eos_token_id"}
    assert kept.items() <= read(out / "generation_config.json").items()


def test_the_config_names_the_bos_that_was_trained(base, tmp_path):
    """Also where the base's does not: llama.cpp would take an id of its own."""
    config = {k: v for k, v in read(base / "config.json").items() if k != "bos_token_id"}
    for i, said in enumerate(({}, {"bos_token_id": 7})):
        write(base / "config.json", config | said)
        out = written(base, tmp_path / f"out{i}")
        assert read(out / "config.json")["bos_token_id"] == 1


def test_a_broken_generation_config_is_said_before_the_first_step(
    arguments, folder, tmp_path, capsys
):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in (folder / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text("{")
    message = fails(capsys, [*arguments, "--model", str(copy)])
    assert "generation_config.json: not JSON" in message
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("said", [True, False, None])
def test_bos_is_added_for_strings_whatever_the_base_says(said, base, tmp_path):
    config = read(base / "tokenizer_config.json") | {"add_eos_token": True}
    config |= {} if said is None else {"add_bos_token": said}
    write(base / "tokenizer_config.json", config)
    got = read(written(base, tmp_path / "out") / "tokenizer_config.json")
    assert got["add_bos_token"] is True and got["add_eos_token"] is False
    both = read(written(base, tmp_path / "both", chat=True, plain=True) / "tokenizer_config.json")
    assert both["add_bos_token"] is True  # a run on messages and on strings
    chats = read(written(base, tmp_path / "chat", chat=True, plain=False) / "tokenizer_config.json")
    assert chats == config  # a template writes BOS itself


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_that_is_trained_again_says_the_same_of_itself(chat, base, tmp_path):
    """BOS stays where it is, and so do the tokens that end an answer."""
    write(base / "generation_config.json", {"eos_token_id": [7, 2], "top_p": 0.9})
    write(base / "config.json", read(base / "config.json") | {"eos_token_id": 5})
    once = written(base, tmp_path / "once", chat, not chat)
    shutil.copy(base / "model.safetensors", once)
    again = written(once, tmp_path / "again", chat, not chat)
    shutil.copy(base / "model.safetensors", again)
    assert file_bytes(again) == file_bytes(once) != file_bytes(base)


def test_code_of_the_base_is_not_named(base, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        write(base / name, read(base / name) | {"auto_map": {"AutoConfig": "code.Config"}})
    out = written(base, tmp_path / "out", chat=True, plain=False)
    assert "auto_map" not in read(out / "config.json")
    assert "auto_map" not in read(out / "tokenizer_config.json")


# ---------------------------------------------------------------------------------------------
# Two keys for one fact.

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def config_of(tmp_path, **more) -> ModelConfig:
    write(tmp_path / "config.json", LLAMA | more)
    return ModelConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "more, words",
    [
        (
            {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta 10000.0 and the 500000.0 in rope_parameters differ",
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}},
            "differ in factor: remove the one that the model was not trained with",
        ),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "in rope_type"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": LINEAR},
            "differ in rope_type",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        (
            {"rope_parameters": {"full_attention": LINEAR}},
            "for each kind of layer is not supported",
        ),
        ({"rope_parameters": 3}, "rope_parameters 3 is not an object"),
    ],
)
def test_what_is_said_of_rope_in_two_ways_is_refused(more, words, tmp_path):
    write(tmp_path / "config.json", LLAMA | more)
    assert words in complaint(ModelConfig.from_json, tmp_path / "config.json")


@pytest.mark.parametrize(
    "more",
    [
        {"rope_theta": 5e5, "rope_scaling": LINEAR},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": LINEAR | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": LINEAR},
        {
            "rope_theta": 5e5,
            "rope_scaling": LINEAR,
            "rope_parameters": LINEAR | {"rope_theta": 5e5},
        },
    ],
)
def test_rope_is_read_alike_in_all_its_places_and_written_for_old_and_new_readers(more, tmp_path):
    config = config_of(tmp_path, **more)
    assert (config.rope_theta, config.rope_scaling) == (5e5, LINEAR)
    write_config(tmp_path, config, torch.float32)
    written = read(tmp_path / "config.json")
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"].get("factor") == 2.0
    again = ModelConfig.from_json(tmp_path / "config.json")
    assert (again.rope_theta, again.rope_scaling) == (5e5, LINEAR)


def test_a_head_that_should_be_the_embedding_and_is_not_is_refused(tmp_path):
    model = random_model(torch.float32, tie_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": p
        for name, p in state(model).items()
    }
    embedding = tensors["model.embed_tokens.weight"]
    write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": embedding})
    Transformer.from_pretrained(tmp_path)
    for other in (embedding + 1e-3, embedding[:-1].clone(), embedding.half()):
        write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": other})
        message = complaint(Transformer.from_pretrained, tmp_path)
        assert 'set "tie_word_embeddings": false' in message
    config = read(tmp_path / "config.json") | {"tie_word_embeddings": False}
    write(tmp_path / "config.json", config)
    write_safetensors(tmp_path / "model.safetensors", tensors | {"lm_head.weight": embedding + 1})
    assert torch.equal(Transformer.from_pretrained(tmp_path).lm_head_weight, embedding + 1)


def test_gpt2_s_context_has_the_name_that_llama_cpp_reads(tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    write(tmp_path / "config.json", config | {"n_positions": 32})
    write_config(tmp_path, ModelConfig.from_json(tmp_path / "config.json"), torch.float32)
    assert read(tmp_path / "config.json")["n_ctx"] == 32


# ---------------------------------------------------------------------------------------------
# What --model may be.


def test_an_adapter_is_not_a_model_and_is_not_passed_over(base, tmp_path, arguments, capsys):
    write(base / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    message = fails(capsys, [*arguments, "--model", str(base)])
    assert "holds an adapter beside the model (adapter_config.json, for org/base)" in message
    (base / "config.json").unlink()
    message = fails(capsys, [*arguments, "--model", str(base)])
    assert "holds an adapter, and no model" in message and "merge_and_unload" in message


def test_a_name_of_the_hub_is_read_from_its_cache_or_told_how_to_be_downloaded(
    base, tmp_path, monkeypatch, arguments, capsys
):
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    message = fails(capsys, [*arguments, "--model", "Org/Tiny-1B"])
    assert "Org/Tiny-1B: no such folder, and no such model in the hub's cache" in message
    assert "hf download Org/Tiny-1B --local-dir Tiny-1B" in message
    for variable, place in (
        ("HOME", ".cache/huggingface/hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HF_HOME", "hub"),
        ("HF_HUB_CACHE", ""),
    ):
        home = tmp_path / variable
        snapshot = home / place / "models--Org--Tiny-1B" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for file in base.iterdir():  # links, as in the hub's cache
            (snapshot / file.name).symlink_to(file)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        monkeypatch.setenv(variable, str(home))
        assert model_folder("Org/Tiny-1B") == snapshot
    rows = run([*arguments, "--model", "Org/Tiny-1B", "--max-steps", "1"])
    assert rows[-1]["step"] == 1
    snapshot.parents[1].rename(snapshot.parents[2] / "models--gpt2")  # a name without ORG
    snapshot = snapshot.parents[2] / "models--gpt2" / "snapshots" / "abc"
    assert model_folder("gpt2") == snapshot and model_folder("gpt3") == Path("gpt3")
    assert model_folder("gpt2", weights=False) == snapshot
    for file in snapshot.glob("*.safetensors"):  # somebody has downloaded the tokenizer only
        file.unlink()
    snapshot.parents[1].rename(snapshot.parents[2] / "models--Org--Tiny-1B")
    assert model_folder("Org/Tiny-1B", weights=False).name == "abc"  # all that data.py needs
    message = fails(capsys, [*arguments, "--model", "Org/Tiny-1B"])
    assert "hf download Org/Tiny-1B --local-dir Tiny-1B" in message


def test_a_token_beyond_the_embedding_is_named_and_refused_only_where_a_row_has_it(
    base, tmp_path, arguments, capsys
):
    """As Llama-2's mirrors that added <pad>."""
    n = ModelConfig.from_json(base / "config.json").vocab_size
    write(base / "added_tokens.json", {"<pad>": n})
    rows = tmp_path / "rows.jsonl"
    write(rows, {"prompt": "q", "chosen": "a", "rejected": "b"})
    flags = [*arguments, "--model", str(base), "--data", str(rows), "--eval-data", str(rows)]
    run(flags, "--max-steps", "1")
    assert f"'<pad>' {n}: beyond the embedding's {n} rows" in capsys.readouterr().out
    named = f"rows.jsonl:1: has the token '<pad>', {n}, and the embedding ends with {n - 1}"
    for answers, more in (("a", "b<pad>"), []), (("a<pad>", "b"), ["--lora-rank", "2"]):
        write(rows, {"prompt": "q"} | dict(zip(("chosen", "rejected"), answers, strict=True)))
        assert named in fails(capsys, [*flags, "--overwrite", *more])


def test_the_stops_are_whole_numbers(base):
    write(base / "generation_config.json", {"eos_token_id": ["</s>", 3, None]})
    a_run = Run(train.TrainConfig(model=str(base)), base, random_model(), None,
                load_tokenizer(base), False, True, 1, {})  # fmt: skip
    assert stop_ids(a_run) == [2, 3]
