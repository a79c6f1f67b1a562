"""TRL's ORPOTrainer on the pairs of bench/gpu.py's speed table: as installed, and at its best.

    python bench/gpu_trl.py [--steps N] [--shapes 0.1B 1.1B 6.7B]       needs requirements-peers.txt

As installed it pads a batch of 8 pairs to its longest, in the order in which they come, and
computes activations twice. At its best the pairs are sorted by length, activations are kept, and
Liger's kernels serve where liger-kernel is there. Both: float32 weights under bfloat16 autocast,
its default, the same random Llama, AdamW, clipping at 1.0. Pairs a second stand beside ours in
bench/gpu.py.
"""

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "peers")]

from bench.gpu import SHAPES, random_pairs  # noqa: E402

BATCH = 8  # pairs at a time; a step accumulates over several
WAYS = {  # name: (sorted by length, settings of ORPOConfig)
    "as installed": (False, {}),
    "at its best": (True, {"gradient_checkpointing": False}),
    "with Liger": (True, {"gradient_checkpointing": False, "use_liger_kernel": True}),
}


def hf_model(config, device):
    """transformers' Llama of the same shape, with random weights in float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig.from_dict(config.to_json()))


def measure(config, n_pairs: int, way: str, n_steps: int, device) -> tuple[float, float]:
    """(median seconds a step after two to warm up, peak GB)."""
    import trl_orpo
    from transformers import TrainerCallback
    from trl.experimental.orpo import ORPOConfig

    cuda = device.type == "cuda"
    by_length, settings = WAYS[way]
    pairs = random_pairs(n_pairs, (193, 289, 260), config.vocab_size, seed=2)
    if by_length:
        pairs = sorted(pairs, key=lambda pair: max(pair.lengths[1:]) + pair.lengths[0])
    moments = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out:
        batch = min(BATCH, n_pairs)
        args = ORPOConfig(
            out,
            **{"per_device_train_batch_size": batch, "max_steps": n_steps, "learning_rate": 1e-5},
            **{"gradient_accumulation_steps": n_pairs // batch, "use_cpu": not cuda},
            **{
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "logging_steps": 10**6,
            },
            **settings,
        )
        trainer = trl_orpo.OnIds(
            hf_model(config, device),
            args,
            train_dataset=trl_orpo.dataset(pairs),
            processing_class=trl_orpo.padding_only(),
        )
        trainer.add_callback(Clock())
        trainer.train()
    steps = [b - a for a, b in itertools.pairwise(moments)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return statistics.median(steps[1:]), peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="3 or more; two are to warm up")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    missing = [name for name in ("trl", "transformers", "datasets") if find_spec(name) is None]
    if missing:
        print(f"gpu_trl.py: not installed: {', '.join(missing)}; TRL is not measured")
        return
    if args.steps < 3:
        parser.error("--steps must be 3 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\n{'shape':<6} {'TRL':<13} {'pairs':>6} {'ms a step':>10} {'pairs/s':>8} {'GB':>6}")
    for name in args.shapes:
        config, n_pairs, _ = SHAPES[name]
        for way in WAYS:
            if way == "with Liger" and find_spec("liger_kernel") is None:
                continue
            try:
                seconds, peak = measure(config, n_pairs, way, args.steps, device)
            except (torch.OutOfMemoryError, ImportError) as error:
                print(f"{name:<6} {way:<13} {type(error).__name__}: {error}"[:100], flush=True)
                continue
            finally:
                gc.collect()  # the trainer is in a cycle with its callbacks
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            numbers = f"{1000 * seconds:>10.1f} {n_pairs / seconds:>8.1f} {peak:>6.1f}"
            print(f"{name:<6} {way:<13} {n_pairs:>6} {numbers}", flush=True)


if __name__ == "__main__":
    main()
