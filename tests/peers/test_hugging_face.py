"""examples/hugging_face.py: the fast path on a model of transformers, beside the plain one."""

import copy
import subprocess
import sys

import pytest
import torch

from orpo import orpo_loss, response_logps
from tests.small import some_pairs

from . import tiny

pytest.importorskip("transformers")

from examples import hugging_face


def plain(model, pairs, lam: float) -> torch.Tensor:
    """By the model's own logits, a response at a time."""
    logps = {}
    for side in ("chosen", "rejected"):
        rows = []
        for pair in pairs:
            tokens = torch.tensor([[*pair.prompt, *getattr(pair, side)]])
            mask = torch.arange(1, tokens.shape[1])[None] >= len(pair.prompt)
            rows.append(response_logps(model(tokens).logits[:, :-1], tokens[:, 1:], mask))
        logps[side] = torch.cat(rows)
    return orpo_loss(logps["chosen"], logps["rejected"], lam)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_fast_path_equals_the_plain_one(tied):
    model = tiny.random_llama(tie_word_embeddings=tied)
    other = copy.deepcopy(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    pairs = some_pairs(7, seed=3, vocab_size=320)
    output = hugging_face.orpo(model, pairs, 0.5)
    wanted = plain(other, pairs, 0.5)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    output.loss.backward()
    wanted.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert b.grad.norm() > 0, name
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5 * b.grad.norm().item())


def test_the_page_runs(tmp_path):
    size = tiny.train_sentencepiece(tmp_path)
    tiny.random_llama(tmp_path, vocab_size=size)
    file = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.preference_rows(20))
    words = [sys.executable, "-m", "examples.hugging_face", str(tmp_path), str(file)]
    ran = subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in ran.stdout.splitlines()]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
