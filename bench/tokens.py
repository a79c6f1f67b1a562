"""How fast rows become tensors: tokenizing, and packing a step.

python bench/tokens.py tokenize TEXT FOLDER [FOLDER ...]   the tokenizers of these folders
python bench/tokens.py pack                                 one step's pairs
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from bench.gpu import LENGTHS, SHAPES, random_pairs
from model import Transformer
from train import TrainConfig, micro_batches, step_flops


def tokenize(text: str, folder: Path):
    """The first encoding of a text in pieces of a response's length, ours and the library's."""
    pieces = [text[i : i + 1200] for i in range(0, len(text), 1200)]
    sides = {"ours": data.load_tokenizer(folder).encode}
    if importlib.util.find_spec("tokenizers"):
        import tokenizers

        if (folder / "tokenizer.json").is_file():
            library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            sides["tokenizers"] = library.encode
        elif (folder / "merges.txt").is_file():
            files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
            sides["tokenizers"] = tokenizers.ByteLevelBPETokenizer(*files).encode
    for name, encode in sides.items():
        start = time.process_time()
        n = sum(len(encode(piece)) for piece in pieces)
        seconds = time.process_time() - start
        rate = len(text) / seconds / 1e6
        minutes = 60_000 * sum(LENGTHS) * len(text) / n / rate / 1e6 / 60
        print(
            f"{folder.name}, {name}: {rate:.1f} million characters a second of CPU; "
            f"60,000 pairs of UltraFeedback's lengths in {minutes:.1f} minutes"
        )


def pack():
    """A step of 32 pairs of UltraFeedback's lengths as tensors, made while another step runs."""
    config = TrainConfig(dtype="bfloat16")
    pairs, seconds = random_pairs(32, LENGTHS, 32000, seed=2), []
    for _ in range(20):
        start = time.perf_counter()
        micro_batches(pairs, config)
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
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.what == "pack":
        return pack()
    if len(args.paths) < 2:
        parser.error("tokenize needs a text and at least one folder")
    text = args.paths[0].read_text(encoding="utf-8", errors="replace")
    for folder in args.paths[1:]:
        tokenize(text, folder)


if __name__ == "__main__":
    main()
