"""The command line says what is wrong with its input in one clear sentence, and changes nothing.

A row of CASES breaks a sound set of inputs in one way, says what flags to add, and which words the
complaint must have. `train.main` must then stop with status 2 and one line, without a traceback,
and leave every file as it was, --out not even made. There is one case for each kind of complaint:
all ways in which a file can be broken are in test_weights.py, test_tokenizer.py, test_data.py,
and the flags in test_train.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from formats.weights import read_safetensors, write_safetensors
from model import ModelConfig, Transformer
from tests.runs import fails

ROWS = [
    {"prompt": f"The farmer {i}", "chosen": " likes a violin.", "rejected": " repairs 10 clocks."}
    for i in range(4)
]
MESSAGES = {
    "prompt": [{"role": "user", "content": "Who?"}],
    "chosen": [{"role": "assistant", "content": "The farmer."}],
    "rejected": [{"role": "assistant", "content": "Nobody."}],
}


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


# ---------------------------------------------------------------------------------------------
# Ways to break what is in the folder `work`.


def writes(name: str, content: str | bytes):
    def change(work):
        (work / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def removes(name: str):
    return lambda work: (work / name).unlink()


def mamba(work):
    file = work / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "mamba"}))


def truncated(work):
    file = work / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def short_norm(work):
    file = work / "model" / "model.safetensors"
    tensors = {name: t.clone() for name, t in read_safetensors(file)}
    write_safetensors(file, tensors | {"model.norm.weight": torch.ones(8)})


def index_without_map(work):
    (work / "model" / "model.safetensors").unlink()
    (work / "model" / "model.safetensors.index.json").write_text("{}")


class Code:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled_code(work):
    (work / "model" / "model.safetensors").unlink()
    torch.save(Code(work / "ran"), work / "model" / "pytorch_model.bin")


def word_piece(work):
    (work / "model" / "tokenizer.model").unlink()
    (work / "model" / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')


def small_embedding(work):
    torch.manual_seed(0)
    Transformer(ModelConfig(100, 16, 1, 2, 16)).save_pretrained(work / "model")


def broken_template(work):
    (work / "model" / "chat_template.jinja").write_text("{% if %}")
    (work / "rows.jsonl").write_text(jsonl(MESSAGES))


def holds_a_run(work):
    (work / "out").mkdir()
    (work / "out" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')


def nothing(work):
    pass


NO_CHOSEN = jsonl(ROWS[0], {"prompt": "q", "rejected": "b"})
SAME = ROWS[0] | {"rejected": ROWS[0]["chosen"]}
CONFIG, WEIGHTS = "config.json: ", "model.safetensors: "
CASES = {  # what: (how it is broken, flags more, words of the complaint)
    # --- the model folder
    "model missing": (nothing, ["--model", "nowhere"], ["nowhere/config.json: no such file"]),
    "model a file": (nothing, ["--model", __file__], [__file__, "is a file"]),
    "config broken": (writes("model/config.json", '{"a": '), [], [CONFIG, "not JSON"]),
    "unknown architecture": (mamba, [], [CONFIG, "'mamba'", "llama, mistral"]),
    # --- the weights
    "no weights": (removes("model/model.safetensors"), [], ["no model.safetensors or pytorch"]),
    "weights truncated": (truncated, [], [WEIGHTS, "bytes"]),
    "wrong shape": (short_norm, [], [WEIGHTS, "shape (8,)", "shape (16,)"]),
    "index without map": (index_without_map, [], ["index.json: weight_map"]),
    "pickle runs code": (pickled_code, [], ["pytorch_model.bin: Unpickling"]),
    # --- the tokenizer
    "no tokenizer": (removes("model/tokenizer.model"), [], ["needs tokenizer.json, vocab.json"]),
    "tokenizer empty": (writes("model/tokenizer.model", ""), [], ["not a sentencepiece model"]),
    "WordPiece": (word_piece, [], ["tokenizer.json: a model of type", "WordPiece", "supported"]),
    "tokenizer larger": (small_embedding, [], ["rows.jsonl:1: has the token", "ends with 99"]),
    "template broken": (broken_template, [], ["rows.jsonl:1", "the chat template fails"]),
    "--chat-template missing": (nothing, ["--chat-template", "no.jinja"], ["no.jinja"]),
    "--chat-template a folder": (nothing, ["--chat-template", "model"], ["model"]),
    "--chat-template no text": (
        writes("t.jinja", b"\xff\xfe"), ["--chat-template", "t.jinja"], ["t.jinja", "utf-8"],
    ),
    # --- the rows
    "data missing": (nothing, ["--data", "no.jsonl"], ["no.jsonl: no such file"]),
    "key missing in a row": (
        writes("rows.jsonl", NO_CHOSEN), [], ["rows.jsonl:2: key 'chosen' is missing"],
    ),
    "every pair dropped": (
        writes("rows.jsonl", jsonl(SAME, SAME, SAME)),
        [], ["rows.jsonl: no pairs left of 3 rows: 3 identical responses"],
    ),
    "every prompt too long": (nothing, ["--max-prompt-length", "1"], ["4 prompt over 1 tokens"]),
    "eval data missing": (nothing, ["--eval-data", "no.jsonl"], ["no.jsonl: no such file"]),
    "all held out": (
        writes("rows.jsonl", jsonl(ROWS[0])), ["--eval-fraction", "0.5"], ["--eval-fraction"],
    ),
    # --- flags
    "unknown flag": (nothing, ["--lrr", "1"], ["--lrr", "see python train.py --help"]),
    "a flag of TRL's": (nothing, ["--learning-rate", "1"], ["did you mean --lr (peak"]),
    "flags that contradict": (nothing, ["--eval-every", "1"], ["--eval-every needs evaluation"]),
    "lr NaN": (nothing, ["--lr", "nan"], ["--lr must be", "nan"]),
    "no such device": (nothing, ["--device", "tpu"], ["--device tpu"]),
    "settings missing": (nothing, ["--config", "no.json"], ["no.json: no such file"]),
    "settings broken": (writes("c.json", "{"), ["--config", "c.json"], ["c.json: not JSON"]),
    # --- the output folder
    "out a file": (writes("out", "text"), [], ["out: this is a file"]),
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


def test_a_run_that_is_to_be_replaced_stays_until_the_new_one_starts(tmp_path, capsys):
    holds_a_run(tmp_path)
    before = snapshot(tmp_path)
    out = ["--out", str(tmp_path / "out"), "--overwrite"]
    fails(capsys, [*out, "--max-prompt-length", "1", "--device", "cpu"])
    assert snapshot(tmp_path) == before


def test_as_a_command(work):
    (work / "rows.jsonl").write_bytes(b"PAR1\x15\x04\x15\xa8\xff" + bytes(99) + b"PAR1")
    words = [sys.executable, train.__file__, *arguments(work)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("train.py: ") and "parquet" in done.stderr
    assert not (work / "out").exists()
