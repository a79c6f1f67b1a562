"""Fixtures: random models, tokenizers made here, a whole run of train.py, real files if any."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

# The models here are tiny: a second thread only waits, and where the cores are busy, for long.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

import pytest
import sentencepiece
import torch

import train
from formats.tokenizer import load_tokenizer
from model import ModelConfig, Transformer
from run.answers import answers

pytest.register_assert_rewrite("tests.runs")

from tests.runs import TWELVE_STEPS, files, run, write_inputs
from tests.small import random_model

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints, tokenizers and pairs that may lie beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data (real checkpoints and pairs) is not beside this repository")
    return SHARED


CORPUS = [
    f"{who} {does} {what}, and {does} it {how}."
    for who in ("The teacher", "A farmer", "My sister", "Nobody")
    for does in ("likes", "paints", "repairs", "understands")
    for what in ("the old bridge", "a violin", "10 clocks")
    for how in ("slowly", "with care", "every day")
]


def train_sentencepiece(**options) -> bytes:
    """Of CORPUS; without options as `sentencepiece_model` describes it."""
    model = io.BytesIO()
    sizes = {"vocab_size": 400, "hard_vocab_limit": False}
    kind = {"model_type": "bpe", "byte_fallback": True, "num_threads": 1, "minloglevel": 2}
    normalizer = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **sizes | kind | normalizer | options
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A byte-fallback BPE like Llama's: 0 <unk>, 1 <s>, 2 </s>, then bytes, then 141 pieces."""
    return train_sentencepiece()


@pytest.fixture(scope="session")
def tiny_tokenizer(sentencepiece_model, tmp_path_factory) -> Path:
    """A folder with tokenizer.model and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def make_tokenizer(sentencepiece_model, tmp_path):
    """Loads a folder with tokenizer.model and these files: name -> bytes, text, or JSON's value."""

    def make(files=None, **config):
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        contents = {"tokenizer.model": sentencepiece_model, "tokenizer_config.json": config}
        for name, value in (contents | (files or {})).items():
            text = value if isinstance(value, str | bytes) else json.dumps(value)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_tokenizer(folder)

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with a random Llama of 20 thousand parameters and tiny_tokenizer's files."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=400, dim=16, n_layers=2, n_heads=4, hidden_dim=24, n_kv_heads=2, max_seq_len=256
    )
    Transformer(config).save_pretrained(folder)
    for file in tiny_tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A random model of 60,000 parameters with a real tokenizer, and rows of real pairs."""
    folder = tmp_path_factory.mktemp("tiny")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """The answers that a run shows before and after training have 64 tokens, which took a third of
    the time of most runs here. Eight will do; the run of `whole` shows them all."""

    def short(model, tokenizer, prompts, max_new):
        return answers(model, tokenizer, prompts, min(max_new, 8))

    monkeypatch.setattr(train, "answers", short)


@pytest.fixture
def arguments(folder, tmp_path) -> list[str]:
    """12 steps of 8 pairs, in two and a half epochs."""
    return [*files(folder), "--out", str(tmp_path / "out"), *TWELVE_STEPS]


class Whole(NamedTuple):
    rows: list[dict]
    out: Path
    printed: str


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory) -> Whole:
    """The run of `arguments`, which nothing interrupts. To be read only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rows = run([*files(folder), "--out", str(out), *TWELVE_STEPS])
    return Whole(rows, out, printed.getvalue())


@pytest.fixture
def in_bfloat16():
    model = random_model(torch.float32)
    model.compute_dtype = torch.bfloat16
    return model
