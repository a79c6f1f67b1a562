"""Every family against a row of logits that transformers computed, and the loss by its own logits.

tests/golden/families/*.json has the rows, and make_families.py beside it says where they come from.
"""

import json
from pathlib import Path

import pytest
import torch

import attention as attention_module
import orpo
import train
from attention import attention
from data import Pair, micro_batches
from formats.families import FAMILIES
from formats.weights import write_safetensors
from model import Transformer
from tests.golden.make_families import weights
from tests.small import plain

GOLDEN = {
    file.stem: json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((Path(__file__).parent / "golden" / "families").glob("*.json"))
}


def write_family(name: str, folder: Path, **more: torch.Tensor) -> Path:
    """The model of a golden file as a checkpoint, with more tensors if there are any."""
    case = GOLDEN[name]
    tensors = {key: torch.from_numpy(weights(key, shape)) for key, shape in case["shapes"].items()}
    (folder / "config.json").write_text(json.dumps(case["config"]))
    write_safetensors(folder / "model.safetensors", tensors | more)
    return folder


def last_logits(folder: Path, name: str) -> torch.Tensor:
    model = Transformer.from_pretrained(folder, dtype=torch.float64)
    return model(torch.tensor([GOLDEN[name]["tokens"]]))[0, -1]


def golden_logits(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name]["logits"], dtype=torch.float64)


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_transformers(name, tmp_path):
    """Six digits are given; rotary angles and RMSNorm are float32 there."""
    got = last_logits(write_family(name, tmp_path), name)
    torch.testing.assert_close(got, golden_logits(name), rtol=0, atol=5e-6)


def test_there_is_a_golden_row_of_every_family():
    assert {case["config"]["model_type"] for case in GOLDEN.values()} == set(FAMILIES)


def test_buffers_of_old_gpt2_checkpoints_are_passed_over(tmp_path):
    buffers = {}
    for i in range(2):
        buffers[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().to(torch.uint8)
        buffers[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    got = last_logits(write_family("gpt2", tmp_path, **buffers), "gpt2")
    torch.testing.assert_close(got, golden_logits("gpt2"), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_loss_of_packed_pairs_is_that_of_the_models_logits(name, tmp_path):
    """With windows, learned positions and a bias of lm_head; float32 weights of tokens."""
    model = Transformer.from_pretrained(write_family(name, tmp_path), dtype=torch.float64)
    tokens = GOLDEN[name]["tokens"]
    pairs = [Pair(tokens[:9], tokens[9:13], tokens[13:]), Pair(tokens[:2], [3], [5, 7, 2])]
    logps = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side in logps:
            ids = torch.tensor([[*pair.prompt, *getattr(pair, side)]])
            mask = torch.arange(1, ids.shape[1])[None] >= len(pair.prompt)
            logps[side].append(orpo.response_logps(model(ids)[:, :-1], ids[:, 1:], mask))
    wanted = orpo.orpo_loss(*(torch.cat(x) for x in logps.values()), lam=0.5)
    (batch,) = micro_batches(pairs, 10**9, "response")
    torch.testing.assert_close(train.forward(model, batch, 0.5).loss, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("window", range(1, 8))
def test_a_query_sees_so_many_keys_as_its_window(window):
    """In sequences of six: also where the window is as long, or by one shorter or longer."""
    q, k, v = torch.randn(3, 12, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    got = attention(q, k, v, plain(2, 6, 6), window)
    for row in range(12):
        first = max(row - row % 6, row - window + 1)
        scores = torch.einsum("hd,shd->hs", q[row], k[first : row + 1]) / 2
        wanted = torch.einsum("hs,shd->hd", scores.softmax(-1), v[first : row + 1])
        torch.testing.assert_close(got[row], wanted)


class OnCuda(torch.Tensor):
    """A tensor that says so, wherever it is."""

    is_cuda = True


def test_flash_attention_is_told_how_many_keys_lie_before_a_querys_own(monkeypatch):
    """A window of four keys is the query's own and three before it; -1 is no limit."""
    told = []
    monkeypatch.setattr(
        attention_module, "varlen_attn", lambda *args, window_size, **_: told.append(window_size)
    )
    q, k, v = torch.zeros(3, 12, 2, 8, dtype=torch.bfloat16).as_subclass(OnCuda)
    for window in (4, 6, 7, None):
        attention(q, k, v, plain(2, 6, 6), window)
    assert told == [(3, 0), (-1, 0), (-1, 0), (-1, 0)]
