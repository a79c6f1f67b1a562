"""What we hand back, converted by llama.cpp: its ids and its greedy answers are ours.

    LLAMA_CPP=FOLDER python -m pytest tests/peers/test_llama_cpp.py        # needs xllamacpp

FOLDER has llama.cpp's convert_hf_to_gguf.py, with what lies beside it.
"""

import json
import os
import sys

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

import data

from . import tiny
from .llama_cpp import NEW, LlamaCpp, differences
from .test_served import (
    FLAGS,
    base_of,
    gpt2,
    llama2,
    llama3,
    prompts_of,
    qwen,
    trained,
    vocab_and_merges,
    yi,
)


@pytest.fixture
def convert(monkeypatch):
    """convert(folder, gguf): llama.cpp's own converter. It knows byte-level tokenizers by a hash of
    what they make of a text, and none of those that are made here: it is told."""
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP does not name a folder of llama.cpp")
    monkeypatch.syspath_prepend(os.environ["LLAMA_CPP"])
    import conversion.base
    import convert_hf_to_gguf

    def run(folder, gguf):
        known = conversion.base.TextModel
        monkeypatch.setattr(known, "get_vocab_base_pre", lambda self, tokenizer: "gpt-2")
        flags = ["--outtype", "f32", "--outfile", str(gguf)]
        monkeypatch.setattr(sys, "argv", ["convert_hf_to_gguf.py", str(folder), *flags])
        convert_hf_to_gguf.main()
        return gguf

    return run


def turns(folder):
    """As Llama 2's, with an end of its own, which is not the base's."""
    tiny.train_sentencepiece(folder, user_defined_symbols=["<|turn|>"])
    file = folder / "tokenizer_config.json"
    more = {"eos_token": "<|turn|>", "added_tokens_decoder": {3: FLAGS | {"content": "<|turn|>"}}}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


@pytest.mark.parametrize("form", ["strings", "messages"])
@pytest.mark.parametrize(
    "kind, family",
    [
        (gpt2, "gpt2"),
        (vocab_and_merges, "gpt2"),
        (llama2, "llama"),
        (yi, "llama"),
        (turns, "llama"),
        (llama3, "llama"),
        (qwen, "qwen2"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_llama_cpp_reads_and_answers_as_we_do(kind, family, form, convert, tmp_path):
    out, _ = trained(base_of(kind, family, tmp_path / "base"), form, tmp_path)
    if form == "messages" and kind in (llama2, yi, turns):
        # llama.cpp writes a space behind every special token of sentencepiece's. This is the
        # converter's way to `--override-kv tokenizer.ggml.add_space_prefix=bool:false`.
        file = out / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"add_prefix_space": False}))
    gguf = convert(out, tmp_path / "model.gguf")
    assert differences(out, gguf, prompts_of(form)) == []
    answer = LlamaCpp(gguf, 256).answer(prompts_of(form)[0])
    assert len(answer) < NEW and answer[-1] == data.load_tokenizer(out).eos_id
