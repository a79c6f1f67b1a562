"""Does llama.cpp, given a model that train.py handed back, give the answers that we give?

    python convert_hf_to_gguf.py OUT/model --outtype f32 --outfile model.gguf  # llama.cpp's
    python -m tests.peers.llama_cpp OUT/model model.gguf EVAL.jsonl        # needs xllamacpp

Greedy answers of up to 24 tokens to the first 60 prompts, by our generate and by llama.cpp.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import data
from model import Transformer

N_PROMPTS, NEW = 60, 24


def ours(folder: Path, prompts: list[str]) -> list[str]:
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    tokenizer = data.load_tokenizer(folder)
    texts = []
    for prompt in prompts:
        ids = data.encode_prompt(tokenizer, prompt)
        (new,) = model.generate([ids], NEW, eos_id=tokenizer.eos_id)
        new = [token for token in new if token != tokenizer.eos_id]
        texts.append(tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :])
    return texts


def theirs(gguf: Path, prompts: list[str]) -> list[str]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(gguf), 2048, 1
    server = xllamacpp.Server(settings)
    texts = []
    for prompt in prompts:
        request = {"prompt": prompt, "max_tokens": NEW, "temperature": 0.0, "top_k": 1}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        texts.append(answer["choices"][0]["text"])
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "gguf", "rows"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    tokenizer, prompts = data.load_tokenizer(args.model), []
    for row in data.load_preferences(args.rows)[:N_PROMPTS]:
        prompt = row.prompt
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        prompts.append(prompt)
    pairs = list(zip(ours(args.model, prompts), theirs(args.gguf, prompts), strict=True))
    for a, b in pairs:
        if a != b:
            print(f"ours {a!r}, llama.cpp {b!r}")
    same = sum(a == b for a, b in pairs)
    print(f"{same} of {len(pairs)} greedy answers are the same")
    sys.exit(same != len(pairs))


if __name__ == "__main__":
    main()
