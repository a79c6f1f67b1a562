"""A real language model, SmolLM2-135M-Instruct, in transformers and here.

SMOLLM2 in the environment names its folder (hf download HuggingFaceTB/SmolLM2-135M-Instruct);
without it these tests are skipped. They take minutes.
"""

import json
import os
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import data
import train
from model import Transformer

from . import tiny
from .test_tokenizer_structures import hard_texts

FOLDER = os.environ.get("SMOLLM2")
pytestmark = pytest.mark.skipif(not FOLDER, reason="SMOLLM2 names no folder")
QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rows = data.load_preferences(tiny.shared("alpaca-pairs") / "eval.jsonl")
    real = [m["content"] for row in rows for m in (*row.prompt, *row.chosen, *row.rejected)]
    return real + hard_texts(2000)


def test_ids_are_the_librarys(texts):
    ours = data.load_tokenizer(FOLDER)
    theirs = tokenizers.Tokenizer.from_file(str(Path(FOLDER) / "tokenizer.json"))
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_logits_are_theirs():
    tokens = torch.tensor([data.load_tokenizer(FOLDER).encode(" ".join(QUESTIONS))])
    ours = Transformer.from_pretrained(FOLDER, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-3  # of up to 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """OUT/model after two steps on real pairs."""
    folder = tmp_path_factory.mktemp("smollm2")
    lines = (tiny.shared("alpaca-pairs") / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "pairs.jsonl").write_text("\n".join(lines[:8]), encoding="utf-8")
    flags = ["--model", FOLDER, "--data", str(folder / "pairs.jsonl"), "--out", str(folder / "out")]
    flags += ["--max-steps", "2", "--batch-size", "2", "--max-length", "256", "--lr", "1e-5"]
    train.main([*flags, "--warmup-steps", "0", "--save-every", "0", "--device", "cpu"])
    return folder / "out" / "model"


def test_what_is_handed_back_answers_in_transformers_token_for_token(trained):
    """Greedy, by each side's own tokenizer and template, in float32."""
    ours = Transformer.from_pretrained(trained, dtype=torch.float32)
    tokenizer = data.load_tokenizer(trained)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    auto = transformers.AutoTokenizer.from_pretrained(trained)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = data.encode_prompt(tokenizer, text, chat=True)
        their_ids = auto.apply_chat_template(messages, add_generation_prompt=True)
        their_ids = their_ids["input_ids"] if hasattr(their_ids, "keys") else their_ids
        assert ids == list(their_ids)
        (new,) = ours.generate([ids], 40, eos_id=tokenizer.eos_id)
        got = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
        assert new == got[0, len(ids) :].tolist()


def test_transformers_reads_the_trained_folders_tokenizer_as_we_do(trained, texts):
    assert json.loads((trained / "tokenizer_config.json").read_text())["tokenizer_class"]
    ours, auto = data.load_tokenizer(trained), transformers.AutoTokenizer.from_pretrained(trained)
    for text in texts:
        assert ours.encode(text) == auto.encode(text, add_special_tokens=False), repr(text)
