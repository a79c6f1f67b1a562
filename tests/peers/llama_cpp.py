"""Does llama.cpp, given a model that train.py handed back, read and answer as we do?

    python LLAMA.CPP/convert_hf_to_gguf.py OUT/model --outtype f32 --outfile model.gguf
    python -m tests.peers.llama_cpp OUT/model model.gguf EVAL.jsonl        # needs xllamacpp

The ids of the first 60 prompts, strings or messages, and greedy answers of up to 24 tokens, by our
generate and by llama.cpp's server. test_llama_cpp.py does the same with models made there.

Two kinds of export are converted from a copy, because of what llama.cpp does with their tokenizer:

- Trained on strings, over bytes, where the base's own tokenizer puts no BOS (GPT-2, SmolLM2): the
  converter recognises such a tokenizer by the ids of a text, without BOS. The copy has the base's
  tokenizer.json, if it has one, and "add_bos_token": false in tokenizer_config.json. Afterwards
  `gguf-set-metadata --force model.gguf tokenizer.ggml.add_bos_token 1` switches BOS on.
- Trained on messages, with sentencepiece (Llama 2, Mistral): llama.cpp puts a space behind every
  special token. The copy has "add_prefix_space": false in tokenizer_config.json.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path

import torch

import data
from model import Transformer

N_PROMPTS, NEW = 60, 24


class LlamaCpp:
    """llama.cpp's server for one model; a prompt is a text or messages."""

    def __init__(self, gguf: Path, n_context=2048):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(gguf), n_context, 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.warmup, settings.verbosity = False, -1
        self.server = xllamacpp.Server(settings)

    def ask(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, prompt) -> list[int]:
        if not isinstance(prompt, str):
            prompt = self.ask("/apply-template", messages=prompt)["prompt"]
        found = self.ask("/tokenize", content=prompt, add_special=True, parse_special=True)
        return found["tokens"]

    def answer(self, prompt, n_new=NEW) -> list[int]:
        """The new ids, with the one that ended the answer."""
        how = {"temperature": 0.0, "top_k": 1, "return_tokens": True, "verbose": True}
        if isinstance(prompt, str):
            return self.ask("/completion", prompt=prompt, n_predict=n_new, **how)["tokens"]
        said = self.ask("/v1/chat/completions", messages=prompt, max_tokens=n_new, **how)
        return said["__verbose"]["tokens"]


def differences(folder: Path, gguf: Path, prompts: list) -> list[str]:
    """A line for each prompt whose ids or answer differ."""
    model, tokenizer = (
        Transformer.from_pretrained(folder, dtype=torch.float32),
        data.load_tokenizer(folder),
    )
    theirs, lines = LlamaCpp(gguf, min(2048, model.config.max_seq_len)), []
    for prompt in prompts:
        chat = not isinstance(prompt, str)
        text = tokenizer.apply_chat_template(prompt, True) if chat else prompt
        ids, found = data.encode_prompt(tokenizer, text, chat), theirs.ids(prompt)
        if ids != found:
            lines.append(f"{prompt!r:.60}: ours {ids}, llama.cpp {found}")
            continue
        (new,) = model.generate([ids], NEW, eos_id=tokenizer.eos_id)
        if new != (answer := theirs.answer(prompt)):
            texts = tokenizer.decode(new), tokenizer.decode(answer)
            lines.append(f"{prompt!r:.60}: ours {texts[0]!r}, llama.cpp {texts[1]!r}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "gguf", "rows"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    prompts = [row.prompt for row in data.load_preferences(args.rows)[:N_PROMPTS]]
    lines = differences(args.model, args.gguf, prompts)
    print(*lines, sep="\n", end="\n" * bool(lines))
    same = len(prompts) - len(lines)
    print(f"{same} of {len(prompts)} prompts have the same ids and the same greedy answer")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
