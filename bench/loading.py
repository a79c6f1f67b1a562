"""What loading costs: memory of a 1.1-billion-parameter checkpoint, speed of tokenizers, packing.

    python bench/loading.py memory FOLDER            writes 2 GB of random weights there, loads and
                                                     saves them: alone, and cut up over 2 processes
    python bench/loading.py tokens TEXT DIR [DIR ...]    characters a second, beside the libraries'
    python bench/loading.py packing                  how long a step waits for its tensors

TEXT is any text file. Each figure of memory is from a process of its own (its peak resident size).
"""

import argparse
import functools
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from bench.gpu import random_pairs
from model import ModelConfig, Segments, Transformer
from train import TrainConfig, micro_batches, pick_device, rank, shard, step_flops, world

SHAPE = ModelConfig(32000, 2048, 22, 32, 5632, n_kv_heads=4)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(folder: Path, dtype: str | None):
    """Without dtype: writes the checkpoint and starts a process a dtype. With: loads and saves."""
    if dtype is None:
        with torch.device("meta"):
            model = Transformer(SHAPE)
        model.to(torch.bfloat16).to_empty(device="cpu").save_pretrained(folder / "in")
        for dtype in ("bfloat16", "float32"):
            subprocess.run(
                [sys.executable, __file__, "memory", folder, "--dtype", dtype], check=True
            )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command = [*torchrun, __file__, "memory", folder, "--dtype", "float32"]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return
    if "WORLD_SIZE" in os.environ:
        return memory_cut_up(folder)
    before = peak_gb()
    model = Transformer.from_pretrained(folder / "in", dtype=getattr(torch, dtype))
    size, loaded = sum(p.nbytes for p in model.parameters()) / 2**30, peak_gb()
    model.save_pretrained(folder / "out", dtype=torch.bfloat16)
    print(
        f"{dtype}: model {size:.2f} GB; peak {before:.2f} GB before, {loaded:.2f} GB loaded, "
        f"{peak_gb():.2f} GB saved as bfloat16"
    )


def memory_cut_up(folder: Path):
    """One of torchrun's processes, of which each keeps a part of every weight, in float32."""
    config = TrainConfig(dtype="bfloat16", device="cpu", shard=True)
    device = pick_device(config)
    before = peak_gb()
    cut = functools.partial(shard, config=config, device=device)
    model = Transformer.from_pretrained(folder / "in", device, torch.float32, cut)
    size = sum(p.to_local().nbytes for p in model.parameters()) / 2**30
    loaded = peak_gb()
    model.save_pretrained(folder / "out" if rank() == 0 else None, dtype=torch.bfloat16)
    found = [None] * world()
    dist.all_gather_object(found, (size, before, loaded, peak_gb()))
    for i, (size, before, loaded, saved) in enumerate(found):
        print(
            f"process {i} of {world()}: its part {size:.2f} GB; peak {before:.2f} GB before, "
            f"{loaded:.2f} GB loaded, {saved:.2f} GB saved as bfloat16"
        )
    sys.stdout.flush()
    dist.destroy_process_group()
    os._exit(0)  # as train.py does, and for its reason


def tokens(text: str, folder: Path):
    """The first encoding of a text in pieces of a response's length, ours and the library's."""
    pieces = [text[i : i + 1200] for i in range(0, len(text), 1200)]
    sides = {"ours": data.load_tokenizer(folder).encode}
    if (folder / "tokenizer.json").is_file() and importlib.util.find_spec("tokenizers"):
        import tokenizers

        sides["tokenizers"] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    elif (folder / "merges.txt").is_file() and importlib.util.find_spec("tokenizers"):
        import tokenizers

        files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
        sides["tokenizers"] = tokenizers.ByteLevelBPETokenizer(*files).encode
    for name, encode in sides.items():
        start = time.process_time()
        n = sum(len(encode(piece)) for piece in pieces)
        seconds = time.process_time() - start
        rate = len(text) / seconds / 1e6
        minutes = 60_000 * (193 + 289 + 260) * len(text) / n / rate / 1e6 / 60
        print(
            f"{folder.name}, {name}: {rate:.1f} million characters a second of CPU; "
            f"60,000 pairs of UltraFeedback's lengths in {minutes:.1f} minutes"
        )


def packing():
    """A step of 32 pairs of UltraFeedback's lengths as tensors; all that a step waits for."""
    config = TrainConfig(dtype="bfloat16")
    pairs = random_pairs(32, (193, 289, 260), 32000, seed=2)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        for batch in micro_batches(pairs, config):
            Segments.packed(batch.lengths)
        seconds.append(time.perf_counter() - start)
    n = sum(pair.n_tokens for pair in pairs)
    with torch.device("meta"):
        flops = step_flops(Transformer(SHAPE), pairs, config)
    milliseconds = 1000 * statistics.median(seconds)
    print(f"{milliseconds:.1f} ms for {len(pairs)} pairs of {n} tokens; the step itself, with")
    print(f"1.1 billion parameters: {flops / 1e12:.0f} TFLOP, {flops / 4e11:.0f} ms at 400 TFLOP/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "tokens", "packing"))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.what == "packing":
        packing()
    elif not args.paths:
        parser.error(f"{args.what} needs its paths, see above")
    elif args.what == "memory":
        memory(args.paths[0], args.dtype)
    else:
        text = args.paths[0].read_text(encoding="utf-8", errors="replace")
        for folder in args.paths[1:]:
            tokens(text, folder)


if __name__ == "__main__":
    main()
