"""Several processes, over gloo on the CPU, take the very steps that one takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from model import ModelConfig, Transformer
from tests.test_train import CLOCKS

ROOT = Path(train.__file__).resolve().parent


def launch(n: int, arguments: list[str], *more: str, check: bool = True):
    """train.py on n processes (1: without torchrun); its rows and what it printed."""
    words = [sys.executable]
    if n > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    words += [str(ROOT / "train.py"), *arguments, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    if not check:
        return done
    assert done.returncode == 0, done.stdout + done.stderr
    out = Path(words[len(words) - words[::-1].index("--out")])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], done


def random_pairs(n: int, seed: int) -> list[data.Pair]:
    rng = np.random.default_rng(seed)
    return [data.Pair(*([1] * k for k in row)) for row in rng.integers(2, 90, (n, 3)).tolist()]


def test_every_pair_is_dealt_once_and_the_shares_are_even_in_tokens():
    for n in (1, 2, 3, 5, 17, 64):
        for world in (1, 2, 3, 8):
            pairs = random_pairs(n, seed=n)
            shares = data.deal(pairs, world)
            assert len(shares) == world
            dealt = sorted(id(pair) for share in shares for pair in share)
            assert dealt == sorted(map(id, pairs))
            tokens = [sum(pair.n_tokens for pair in share) for share in shares]
            # Whoever has the most got his last, smallest pair when he had the least.
            assert max(tokens) - min(tokens) <= max(pair.n_tokens for pair in pairs)
            assert n < 64 or max(tokens) < 1.02 * sum(tokens) / world
    assert data.deal(pairs, 1) == [pairs]  # in their order


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_the_shares_hold_the_weights_of_the_whole_step_in_equal_numbers_of_micro_batches(sft_loss):
    pairs = random_pairs(7, seed=0)
    for world in (2, 3, 9):  # with 9, two have no pair
        shares = [data.micro_batches(pairs, 300, sft_loss, 1, k, world) for k in range(world)]
        assert len({len(batches) for batches in shares}) == 1
        total = sum(batch.nll_weight.sum() for batches in shares for batch in batches)
        assert float(total) == pytest.approx(1)
        assert all(len(batch.tokens) for batches in shares for batch in batches)


def test_an_empty_micro_batch_adds_zeros():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(100, 16, 2, 2, 24, tie_embeddings=True))
    batches = data.micro_batches(random_pairs(1, seed=1), 300, "full", 1, 1, 2)
    output = train.forward(model, batches[0], 0.5, 1, torch.device("cpu"))
    output.loss.backward()
    assert output.loss == 0 and len(output.chosen_logps) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


UNEVEN = ["--batch-size", "7", "--max-steps", "8", "--micro-batch-tokens", "100", "--lr", "1e-3"]


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_two_processes_equal_one(arguments, tmp_path, sft_loss):
    """40 pairs by 7: the sixth step has 5. A learning rate at which roundings do not grow."""
    flags = [*UNEVEN, "--sft-loss", sft_loss]
    one, _ = launch(1, arguments, *flags, "--out", str(tmp_path / "one"))
    two, done = launch(2, arguments, *flags, "--out", str(tmp_path / "two"))
    compare(one, two, rel=2e-5)
    assert done.stdout.count("parameters, stored as") == 1  # process 0 alone speaks
    assert "over 2 processes, the busiest with 1." in done.stdout


def compare(one: list[dict], two: list[dict], rel: float):
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        a, b = ({k: v for k, v in row.items() if k not in CLOCKS} for row in (a, b))
        assert a == pytest.approx(b, rel=rel, abs=2e-6)
