"""Whatever is wrong with a model folder, a tokenizer, data, a flag or --out: one clear sentence.

A row of CASES breaks a sound set of inputs in one way, says what flags to add, and which words the
complaint must have. `train.main` must then stop with status 2, in at most 15 lines, without a
traceback, and leave every file as it was, --out not even made.
"""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import train
from checkpoint import write_safetensors
from model import ModelConfig, Transformer
from tests.test_checkpoint import read_safetensors

ROWS = [
    {"prompt": f"The farmer {i}", "chosen": " likes a violin.", "rejected": " repairs 10 clocks."}
    for i in range(4)
]
MESSAGES = {
    "prompt": [{"role": "user", "content": "Who?"}],
    "chosen": [{"role": "assistant", "content": "The farmer."}],
    "rejected": [{"role": "assistant", "content": "Nobody."}],
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 123\n"
LIKE_PARQUET = b"PAR1\x15\x04\x15\xa8\xff" + bytes(99) + b"PAR1"


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def sound(tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "rows.jsonl").write_text(jsonl(*ROWS))
    return folder


@pytest.fixture
def work(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "work")


def arguments(work: Path) -> list[str]:
    flags = {"model": "model", "data": "rows.jsonl", "out": "out"}
    paths = [x for name, file in flags.items() for x in (f"--{name}", str(work / file))]
    return [*paths, "--max-steps", "1", "--batch-size", "2", "--device", "cpu"]


def snapshot(work: Path) -> dict:
    """Every file's bytes; a folder's are None."""
    return {p: None if p.is_dir() else p.read_bytes() for p in work.rglob("*")}


def fails(capsys, flags: list[str]) -> str:
    """The complaint of a run that stops as it should."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("train.py: ") and "Traceback" not in message
    assert len(message.splitlines()) <= 15 and len(message) < 2000, message
    return message


# ---------------------------------------------------------------------------------------------
# Ways to break what is in a folder. Each takes the folder `work`; flags may be returned.


def writes(name: str, content):
    """content: bytes, text, what json.dumps takes, or ... for a folder in place of a file."""

    def change(work):
        file = work / name
        if content is ...:
            file.unlink(missing_ok=True)
            file.mkdir()
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            file.write_text(text, encoding="utf-8")

    return change


def removes(*names: str):
    def change(work):
        for name in names:
            (work / name).unlink()

    return change


def config(**changes):
    """Changes keys of config.json; ... removes one."""

    def change(work):
        file = work / "model" / "config.json"
        settings = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))

    return change


def tensors(**changes):
    """Changes tensors by name, given with _ for a dot; None removes one."""

    def change(work):
        file = work / "model" / "model.safetensors"
        given = {name.replace("__", "."): t for name, t in changes.items()}
        kept = {name: t.clone() for name, t in read_safetensors(file).items()} | given
        write_safetensors(file, {name: t for name, t in kept.items() if t is not None})

    return change


def weights(edit):
    """Changes the bytes of model.safetensors."""

    def change(work):
        file = work / "model" / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return change


def header(edit):
    """Changes the header of model.safetensors, a dict, and leaves the data."""

    def change(raw):
        n = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + n])
        edit(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + n :]

    return weights(change)


def set_entry(key, value, name="model.norm.weight"):
    return header(lambda entries: entries[name].update({key: value}))


class Code:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled(make):
    """pytorch_model.bin in place of model.safetensors."""

    def change(work):
        (work / "model" / "model.safetensors").unlink()
        value, file = make(work), work / "model" / "pytorch_model.bin"
        if isinstance(value, bytes):
            file.write_bytes(value)
        else:
            torch.save(value, file)

    return change


def sharded(where: dict):
    """Only an index, and the shard that it should name."""

    def change(work):
        file = work / "model" / "model.safetensors"
        file.rename(file.with_name("shard.safetensors"))
        (work / "model" / "model.safetensors.index.json").write_text(json.dumps(where))

    return change


def tokenizer(spec):
    """tokenizer.json in place of tokenizer.model; a change of a sound one, or what it holds."""

    def change(work):
        for file in (work / "model").glob("tokenizer*"):
            file.unlink()
        writes("model/tokenizer.json", spec)(work)

    return change


def small_embedding(work):
    torch.manual_seed(0)
    Transformer(ModelConfig(100, 16, 1, 2, 16)).save_pretrained(work / "model")


def holds_a_run(work):
    (work / "out").mkdir()
    (work / "out" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')


def row(**change):
    """The first row is sound, the second changed: its complaint names line 2."""
    changed = {k: v for k, v in (ROWS[1] | change).items() if v is not ...}
    return writes("rows.jsonl", jsonl(ROWS[0], changed))


def message_row(**change):
    return writes("rows.jsonl", jsonl(MESSAGES, MESSAGES | change))


def nothing(work):
    pass


ANSWER = [{"role": "assistant", "content": "Yes."}]
CONFIG, WEIGHTS = "config.json: ", "model.safetensors: "
CASES = {  # what: (how it is broken, flags more, words of the complaint)
    # --- the model folder
    "model missing": (nothing, ["--model", "nowhere"], ["nowhere/config.json: no such file"]),
    "model a file": (nothing, ["--model", __file__], [__file__, "is a file"]),
    "model a gguf file": (writes("m.gguf", b"GGUF\3\0\0\0"), ["--model", "m.gguf"], ["m.gguf"]),
    "model folder empty": (removes("model/config.json"), [], [CONFIG, "no such file"]),
    "config a folder": (writes("model/config.json", ...), [], [CONFIG]),
    "config empty": (writes("model/config.json", b""), [], [CONFIG, "not JSON"]),
    "config broken": (writes("model/config.json", b'{"a": '), [], [CONFIG, "not JSON"]),
    "config a list": (writes("model/config.json", b"[]"), [], [CONFIG, "list"]),
    "config deep": (writes("model/config.json", b"[" * 10**5), [], [CONFIG, "not JSON"]),
    "config UTF-16": (writes("model/config.json", "{}".encode("utf-16")), [], [CONFIG, "utf-8"]),
    "config a pointer": (writes("model/config.json", LFS), [], [CONFIG, "not JSON"]),
    "unknown architecture": (config(model_type="mamba"), [], [CONFIG, "'mamba'", "llama, mistral"]),
    "no architecture": (config(model_type=...), [], [CONFIG, "model_type None"]),
    "architecture a list": (config(model_type=["llama"]), [], [CONFIG, "model_type"]),
    "multimodal": (
        config(model_type="llava", text_config={"model_type": "llama"}), [], [CONFIG, "'llava'"],
    ),
    "GPTQ": (config(quantization_config={"quant_method": "gptq"}), [], [CONFIG, "gptq", "quantis"]),
    "AWQ": (config(quantization_config={"quant_method": "awq"}), [], [CONFIG, "awq", "quantis"]),
    "quantised, unnamed": (config(quantization_config=3), [], [CONFIG, "quantis"]),
    "NaN": (config(rms_norm_eps=float("nan")), [], [CONFIG, "rms_norm_eps", "nan"]),
    "Infinity": (config(rope_theta=float("inf")), [], [CONFIG, "rope_theta", "inf"]),
    "Infinity for an integer": (config(hidden_size=float("inf")), [], [CONFIG, "hidden_size"]),
    "beyond float": (config(rope_theta=10**400), [], [CONFIG, "rope_theta"]),
    "true for a number": (config(num_hidden_layers=True), [], [CONFIG, "num_hidden_layers"]),
    "text for a number": (config(vocab_size="400"), [], [CONFIG, "vocab_size", "'400'"]),
    "negative": (config(num_attention_heads=-4), [], [CONFIG, "num_attention_heads", "-4"]),
    "key missing": (config(hidden_size=...), [], [CONFIG, "'hidden_size' is missing"]),
    "a billion layers": (config(num_hidden_layers=10**9), [], [CONFIG, "num_hidden_layers"]),
    "too wide": (config(hidden_size=2**40, intermediate_size=2**40), [], [CONFIG]),
    "too wide together": (
        config(hidden_size=2**30, num_attention_heads=2**30), [], [CONFIG, "size"],
    ),
    "activation a list": (config(hidden_act=["silu"]), [], [CONFIG, "hidden_act"]),
    "heads do not divide": (config(num_key_value_heads=3), [], [CONFIG, "3 key/value heads"]),
    "factor NaN": (
        config(rope_scaling={"type": "linear", "factor": float("nan")}), [], [CONFIG, "factor"],
    ),
    "factor 0": (config(rope_scaling={"type": "linear", "factor": 0}), [], [CONFIG, "factor"]),
    "rope a list": (config(rope_scaling={"type": ["yarn"]}), [], [CONFIG, "rope_type"]),
    "window text": (
        config(model_type="mistral", sliding_window="wide"), [], [CONFIG, "sliding_window"],
    ),
    "window negative": (
        config(model_type="mistral", sliding_window=-1), [], [CONFIG, "sliding_window"],
    ),
    "layer_types short": (
        config(model_type="mistral", sliding_window=8, layer_types=["full"]),
        [], [CONFIG, "layer_types"],
    ),
    "layer_types a number": (
        config(model_type="mistral", sliding_window=8, layer_types=2), [], [CONFIG, "layer_types"],
    ),
    "turns more than there is": (
        config(model_type="phi", partial_rotary_factor=1.5), [], [CONFIG, "rotary"],
    ),
    # --- the weights
    "no weights": (removes("model/model.safetensors"), [], ["no model.safetensors or pytorch"]),
    "only a gguf": (
        lambda w: (w / "model/model.safetensors").rename(w / "model/model.gguf"),
        [], ["no model.safetensors or pytorch", "GGUF"],
    ),
    "weights a folder": (writes("model/model.safetensors", ...), [], ["no model.safetensors or"]),
    "weights empty": (weights(lambda raw: b""), [], [WEIGHTS, "cut short"]),
    "weights truncated": (weights(lambda raw: raw[:-1]), [], [WEIGHTS, "bytes"]),
    "header truncated": (weights(lambda raw: raw[:99]), [], [WEIGHTS, "cut short"]),
    "random bytes": (weights(lambda raw: bytes(range(256)) * 9), [], [WEIGHTS, "not a safetens"]),
    "header of 2^63": (
        weights(lambda raw: struct.pack("<Q", 2**63) + raw[8:]), [], [WEIGHTS, str(2**63)],
    ),
    "a pointer": (weights(lambda raw: LFS), [], [WEIGHTS, "git lfs pull"]),
    "offsets outside": (set_entry("data_offsets", [0, 10**12]), [], [WEIGHTS, "norm.weight"]),
    "offsets overlap": (set_entry("data_offsets", [0, 64]), [], [WEIGHTS, "bytes"]),
    "offsets negative": (set_entry("data_offsets", [-64, 0]), [], [WEIGHTS, "negative"]),
    "no offsets": (
        header(lambda e: e["model.norm.weight"].pop("data_offsets")), [], [WEIGHTS, "data_offsets"],
    ),
    "no shape": (header(lambda e: e["model.norm.weight"].pop("shape")), [], [WEIGHTS, "shape"]),
    "float8": (set_entry("dtype", "F8_E4M3"), [], [WEIGHTS, "F8_E4M3", "BF16"]),
    "a million axes": (set_entry("shape", [1] * 10**6), [], [WEIGHTS, "norm.weight"]),
    "missing tensor": (tensors(model__norm__weight=None), [], ["1 tensors are missing: norm.wei"]),
    "no lm_head": (tensors(lm_head__weight=None), [], ["missing: lm_head.weight"]),
    "all missing": (header(lambda e: e.clear()), [], [WEIGHTS, "belong to no tensor"]),
    "too few layers": (config(num_hidden_layers=64), [], ["558 tensors are missing", "..."]),
    "surplus tensor": (tensors(vision__weight=torch.ones(2)), [], [WEIGHTS, "'vision.weight'"]),
    "wrong shape": (
        tensors(model__norm__weight=torch.ones(8)), [], [WEIGHTS, "shape (8,)", "shape (16,)"],
    ),
    "integers": (tensors(model__norm__weight=torch.ones(16).long()), [], [WEIGHTS, "int64"]),
    "embedding larger": (config(vocab_size=300), [], [WEIGHTS, "(400, 16)", "(300, 16)"]),
    "embedding smaller": (config(vocab_size=500), [], [WEIGHTS, "(400, 16)", "(500, 16)"]),
    "index broken": (
        lambda w: (sharded({})(w), writes("model/model.safetensors.index.json", "{")(w)),
        [], ["index.json: not JSON"],
    ),
    "index without map": (sharded({}), [], ["index.json: weight_map"]),
    "index names a folder above": (
        sharded({"weight_map": {"a": "../model.safetensors"}}), [], ["index.json: weight_map"],
    ),
    "index names /etc/passwd": (
        sharded({"weight_map": {"a": "/etc/passwd"}}), [], ["index.json: weight_map"],
    ),
    "index names nothing": (sharded({"weight_map": {"a": ""}}), [], ["index.json: weight_map"]),
    "index names ..": (sharded({"weight_map": {"a": ".."}}), [], ["no such file"]),
    "shard missing": (
        sharded({"weight_map": {"a": "b.safetensors"}}), [], ["b.safetensors: no such file"],
    ),
    "pickle runs code": (pickled(lambda w: Code(w / "ran")), [], ["pytorch_model.bin: Unpickling"]),
    "pickle random": (pickled(lambda w: bytes(range(256))), [], ["pytorch_model.bin: "]),
    "pickle empty": (pickled(lambda w: b""), [], ["pytorch_model.bin: "]),
    "pickle a pointer": (pickled(lambda w: LFS), [], ["pytorch_model.bin: ", "git lfs pull"]),
    "pickle a list": (pickled(lambda w: [1]), [], ["pytorch_model.bin: not a dict"]),
    "pickle in float8": (
        pickled(lambda w: {"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}),
        [], ["pytorch_model.bin: ", "float8"],
    ),
    # --- the tokenizer
    "no tokenizer": (removes("model/tokenizer.model"), [], ["needs tokenizer.json, vocab.json"]),
    "tokenizer empty": (writes("model/tokenizer.model", b""), [], ["not a sentencepiece model"]),
    "tokenizer random": (
        writes("model/tokenizer.model", bytes(range(256))), [], ["not a sentencepiece model"],
    ),
    "tokenizer a pointer": (writes("model/tokenizer.model", LFS), [], ["not a sentencepiece"]),
    "tokenizer.json empty": (tokenizer(b""), [], ["tokenizer.json: not JSON"]),
    "tokenizer.json a list": (tokenizer([]), [], ["tokenizer.json", "object"]),
    "tokenizer.json deep": (tokenizer("[" * 10**5), [], ["broken tokenizer", "Recursion"]),
    "tokenizer.json without model": (tokenizer({}), [], ["broken tokenizer", "model"]),
    "WordPiece": (tokenizer({"model": {"type": "WordPiece"}}), [], ["WordPiece", "supported"]),
    "special id infinite": (
        writes("model/added_tokens.json", '{"<a>": Infinity}'), [], ["broken tokenizer"],
    ),
    "special id negative": (
        writes("model/added_tokens.json", {"<a>": -1}), [], ["broken tokenizer", "<a>", "-1"],
    ),
    "tokenizer_config broken": (
        writes("model/tokenizer_config.json", "{"), [], ["tokenizer_config.json: not JSON"],
    ),
    "tokenizer_config UTF-16": (
        writes("model/tokenizer_config.json", "{}".encode("utf-16")),
        [], ["tokenizer_config.json: not JSON"],
    ),
    "tokenizer larger": (small_embedding, [], ["ids up to 399", "100 rows"]),
    "template UTF-16": (
        writes("model/chat_template.jinja", "é".encode("utf-16")), [], ["model: broken tokenizer"],
    ),
    "template broken": (
        lambda w: (writes("model/chat_template.jinja", "{% if %}")(w), message_row()(w)),
        [], ["rows.jsonl:1: the chat template fails"],
    ),
    "--chat-template missing": (nothing, ["--chat-template", "no.jinja"], ["no.jinja"]),
    "--chat-template a folder": (nothing, ["--chat-template", "model"], ["model"]),
    "--chat-template no text": (
        writes("t.jinja", b"\xff\xfe"), ["--chat-template", "t.jinja"], ["t.jinja", "utf-8"],
    ),
    # --- the rows
    "data missing": (nothing, ["--data", "no.jsonl"], ["no.jsonl: no such file"]),
    "data a folder": (nothing, ["--data", "model"], ["model: ", "a file"]),
    "data empty": (writes("rows.jsonl", b""), [], ["rows.jsonl: ", "no rows"]),
    "data parquet": (writes("rows.jsonl", LIKE_PARQUET), [], ["rows.jsonl", "prepare.py"]),
    "data gzip": (
        writes("rows.jsonl", gzip.compress(jsonl(*ROWS).encode())),
        [], ["rows.jsonl", "prepare.py"],
    ),
    "data UTF-16": (
        writes("rows.jsonl", jsonl(*ROWS).encode("utf-16")), [], ["rows.jsonl:1: ", "UTF-8"],
    ),
    "data Latin-1": (
        writes("rows.jsonl", jsonl(ROWS[0]).encode() + b'{"prompt": "caf\xe9"}'),
        [], ["rows.jsonl:2: ", "UTF-8"],
    ),
    "data a pointer": (writes("rows.jsonl", LFS), [], ["rows.jsonl:1: "]),
    "data an array": (
        writes("rows.jsonl", json.dumps(ROWS, indent=1)), [], ["rows.jsonl:1: ", "prepare.py"],
    ),
    "data an array on a line": (writes("rows.jsonl", ROWS), [], ["rows.jsonl:1: ", "prepare.py"]),
    "data one object, many lines": (
        writes("rows.jsonl", json.dumps(ROWS[0], indent=1)), [], ["rows.jsonl:1: "],
    ),
    "data CSV": (writes("rows.jsonl", "prompt,chosen,rejected\na,b,c\n"), [], ["rows.jsonl:1: "]),
    "JSON broken": (writes("rows.jsonl", jsonl(*ROWS) + '{"a": '), [], ["rows.jsonl:5: "]),
    "data deep": (writes("rows.jsonl", "[" * 10**5), [], ["rows.jsonl:1: "]),
    "key missing in a row": (row(chosen=...), [], ["rows.jsonl:2: key 'chosen' is missing"]),
    "many keys": (
        row(chosen=..., **{f"column {i}": 0 for i in range(999)}), [], ["rows.jsonl:2: key"],
    ),
    "wrong type in a row": (row(rejected=3), [], ["rows.jsonl:2: rejected must be text"]),
    "messages and text": (row(chosen=ANSWER), [], ["rows.jsonl:2: rejected"]),
    "message without role": (message_row(chosen=[{"text": "a"}]), [], ["rows.jsonl:2: chosen[0]"]),
    "ShareGPT's names": (
        message_row(prompt=[{"from": "human", "value": "a"}]), [], ["rows.jsonl:2: prompt[0]"],
    ),
    "long dialogue": (message_row(chosen=ANSWER * 999), [], ["rows.jsonl:2: chosen must be"]),
    "half a character": (
        writes("rows.jsonl", r'{"prompt": "\ud800", "chosen": "a", "rejected": "b"}'),
        [], ["rows.jsonl:1: "],
    ),
    "every pair dropped": (
        writes("rows.jsonl", jsonl(*(ROWS[0] | {"rejected": ROWS[0]["chosen"]} for _ in "abc"))),
        [], ["rows.jsonl: no pairs left of 3 rows: 3 identical responses"],
    ),
    "every prompt too long": (nothing, ["--max-prompt-length", "1"], ["4 prompt over 1 tokens"]),
    "eval data missing": (nothing, ["--eval-data", "no.jsonl"], ["no.jsonl: no such file"]),
    "all held out": (
        writes("rows.jsonl", jsonl(ROWS[0])), ["--eval-fraction", "0.5"], ["--eval-fraction"],
    ),
    # --- flags
    "unknown flag": (nothing, ["--lrr", "1"], ["--lrr"]),
    "flag without value": (nothing, ["--lr"], ["--lr"]),
    "not a number": (nothing, ["--lr", "small"], ["--lr", "small"]),
    "lr NaN": (nothing, ["--lr", "nan"], ["--lr must be", "nan"]),
    "lr infinite": (nothing, ["--lr", "inf"], ["--lr must be", "inf"]),
    "lam negative": (nothing, ["--lam", "-0.1"], ["--lam must be at least 0"]),
    "batch size 0": (nothing, ["--batch-size", "0"], ["--batch-size must be at least 1"]),
    "beta 1": (nothing, ["--adam-beta1", "1"], ["--adam-beta1 must be at least 0 and below 1"]),
    "seed negative": (nothing, ["--seed", "-1"], ["--seed must be at least 0"]),
    "seed too large": (nothing, ["--seed", str(2**64)], ["--seed must be", "below"]),
    "a step and a half": (nothing, ["--max-steps", "1.5"], ["--max-steps", "1.5"]),
    "choice": (nothing, ["--sft-loss", "both"], ["--sft-loss", "both"]),
    "no such device": (nothing, ["--device", "tpu"], ["--device tpu"]),
    "a device not for this": (nothing, ["--device", "meta"], ["--device meta", "cpu and cuda"]),
    "no such card": (nothing, ["--device", "cuda:77"], ["--device cuda:77", "CUDA devices"]),
    "float16": (nothing, ["--dtype", "float16"], ["--dtype", "float16"]),
    "settings missing": (nothing, ["--config", "no.json"], ["no.json: no such file"]),
    "settings broken": (writes("c.json", "{"), ["--config", "c.json"], ["c.json: not JSON"]),
    "settings deep": (writes("c.json", "[" * 10**5), ["--config", "c.json"], ["c.json: not JSON"]),
    "settings NaN": (writes("c.json", '{"lr": NaN}'), ["--config", "c.json"], ["c.json: --lr"]),
    "settings unknown": (writes("c.json", {"lrr": 1}), ["--config", "c.json"], ["c.json", "lrr"]),
    "settings a list": (writes("c.json", []), ["--config", "c.json"], ["c.json", "object"]),
    "settings true for 1": (
        writes("c.json", {"epochs": True}), ["--config", "c.json"], ["c.json: --epochs must be"],
    ),
    "adapters in parts": (nothing, ["--shard", "--lora-rank", "2"], ["--shard and --lora-rank"]),
    "rank negative": (nothing, ["--lora-rank", "-1"], ["--lora-rank must be at least 0"]),
    # --- the output folder
    "out a file": (writes("out", "text"), [], ["out: is a file"]),
    "out in a file": (writes("f", "text"), ["--out", "f/out"], ["f/out", "cannot be made"]),
    "out holds a run": (holds_a_run, [], ["out: holds a run; add --resume"]),
    "out holds the base model": (nothing, ["--out", "."], ["--out .", "would replace --model"]),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_one_clear_sentence(what, work, capsys, monkeypatch):
    change, flags, words = CASES[what]
    change(work)
    monkeypatch.chdir(work)
    before = snapshot(work)
    message = fails(capsys, [*arguments(work), *flags])
    for word in words:
        assert word in message
    assert snapshot(work) == before


@pytest.mark.skipif(os.getuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("name", ["model/config.json", "model/model.safetensors", "rows.jsonl"])
def test_a_file_that_may_not_be_read_is_named(name, work, capsys):
    (work / name).chmod(0)
    assert str(work / name) in fails(capsys, arguments(work))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read and write everything")
def test_a_folder_that_may_not_be_written_to_is_named(work, capsys):
    work.chmod(0o500)
    assert f"{work} is not a folder to write to" in fails(capsys, arguments(work))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(work, capsys):
    message = fails(capsys, [*arguments(work), "--device", "cuda"])
    assert "--device cuda: this machine shows 0 CUDA devices" in message


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"\xef\xbb\xbf" + text],
    ids=["CRLF", "BOM"],
)
def test_what_windows_writes_is_read(change, work):
    file = work / "rows.jsonl"
    wanted = [row[:4] for row in data.load_preferences(file)]
    file.write_bytes(change(file.read_bytes()))
    assert [row[:4] for row in data.load_preferences(file)] == wanted


def test_a_folder_with_another_programs_metrics_is_no_run(work):
    (work / "out").mkdir()
    (work / "out" / "metrics.jsonl").write_bytes(b'3\n[1]\n"loss"\n{"loss": 1}\n\xff\n')
    assert train.read_rows(work / "out") == []


def test_the_built_in_jobs_older_run_stays_until_a_new_one_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    holds_a_run(tmp_path)
    (tmp_path / "out").rename(tmp_path / "builtin")
    (tmp_path / "out").mkdir()
    (tmp_path / "builtin").rename(tmp_path / train.BUILTIN_OUT)
    before = snapshot(tmp_path)
    fails(capsys, ["--max-prompt-length", "1", "--device", "cpu"])
    assert snapshot(tmp_path) == before


def test_as_a_command(work):
    (work / "rows.jsonl").write_bytes(LIKE_PARQUET)
    words = [sys.executable, train.__file__, *arguments(work)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("train.py: ") and "parquet" in done.stderr
    assert not (work / "out").exists()
