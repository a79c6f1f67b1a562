"""How fast rows become tensors: tokenizing, and packing a step.

python -m bench.tokens tokenize TEXT FOLDER [FOLDER ...]   a file of dialogues, cut out of a text,
                                                            by the tokenizers of these folders
python -m bench.tokens pack                                 one step's pairs
"""

import argparse
import functools
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch

import data
from bench.gpu import LENGTHS, SHAPES, random_pairs
from model import Transformer
from run.flags import TrainConfig
from run.plan import step_flops
from train import pack


def write_rows(file: Path, text: str, tokenizer, n: int):
    """n dialogues of UltraFeedback's mean lengths in tokens, cut out of the text at random."""
    sample = text[:200_000]
    characters = len(sample) / len(tokenizer.encode(sample))
    rng = random.Random(0)

    def message(role: str, n_tokens: int) -> dict:
        length = round(n_tokens * characters)
        start = rng.randrange(max(1, len(text) - length))
        return {"role": role, "content": text[start : start + length]}

    with open(file, "w", encoding="utf-8") as f:
        for _ in range(n):
            question = message("user", LENGTHS[0])
            chosen, rejected = (message("assistant", length) for length in LENGTHS[1:])
            row = {"prompt": question["content"]}
            row |= {"chosen": [question, chosen], "rejected": [question, rejected]}
            f.write(json.dumps(row) + "\n")


def library_of(folder: Path):
    """The tokenizers or sentencepiece library's encoding of a list of texts; None without any."""
    if (folder / "tokenizer.model").is_file():
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return functools.partial(model.encode, num_threads=1)
    if importlib.util.find_spec("tokenizers") is None:
        return None
    import tokenizers

    if (folder / "tokenizer.json").is_file():
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
        library = tokenizers.ByteLevelBPETokenizer(*files)
    return library.encode_batch


def tokenize(text: str, folder: Path, n: int):
    """Rows of a file to pairs, by everything that train.py does, with cold caches; and what the
    library alone needs to encode each of their texts once."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "rows.jsonl"
        write_rows(file, text, data.load_tokenizer(folder), n)
        tokenizer, start = data.load_tokenizer(folder), time.process_time()
        rows = data.load_preferences(file)
        loaded = time.process_time()
        pairs = data.encode_pairs(tokenizer, rows, 2048, 1792)[0]
        done = time.process_time()
    n_tokens = sum(pair.n_tokens for pair in pairs)
    n_bytes = sum(sys.getsizeof(ids) for pair in pairs for ids in pair[:3])
    print(
        f"{folder.name}: {n} rows, {n_tokens / n:.0f} tokens a pair; of 60,000 such rows reading "
        f"takes {(loaded - start) * 60_000 / n:.1f} s of CPU, making pairs "
        f"{(done - loaded) * 60_000 / n:.1f} s; {n_bytes / n_tokens:.1f} bytes a token"
    )
    if encode := library_of(folder):
        texts = [m["content"] for row in rows for part in row[:3] for m in part]
        start = time.process_time()
        encode(texts)
        seconds = (time.process_time() - start) * 60_000 / n
        print(f"{folder.name}: the library alone, each text once: {seconds:.1f} s")


def packing():
    """A step of 32 pairs of UltraFeedback's lengths as tensors, made while another step runs."""
    config = TrainConfig(dtype="bfloat16")
    pairs, seconds = random_pairs(32, LENGTHS, 32000, seed=2), []
    for _ in range(20):
        start = time.perf_counter()
        pack(pairs, config)
        seconds.append(time.perf_counter() - start)
    n = sum(pair.n_tokens for pair in pairs)
    with torch.device("meta"):
        flops = step_flops(Transformer(SHAPES["1.1B"][0]), pairs, config)
    milliseconds = 1000 * statistics.median(seconds)
    print(f"{milliseconds:.1f} ms for {len(pairs)} pairs of {n} tokens; the step itself, with")
    print(f"1.1 billion parameters: {flops / 1e12:.0f} TFLOP, {flops / 4e11:.0f} ms at 400 TFLOP/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tokenize", "pack"))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--rows", type=int, default=6000, help="dialogues (6000)")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.what == "pack":
        return packing()
    if len(args.paths) < 2:
        parser.error("tokenize needs a text and at least one folder")
    text = args.paths[0].read_text(encoding="utf-8", errors="replace")
    for folder in args.paths[1:]:
        tokenize(text, folder, args.rows)


if __name__ == "__main__":
    main()
