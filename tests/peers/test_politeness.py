"""tests/peers/politeness.py: what the split promises, and the comparison at tiny size."""

import json
import subprocess
import sys

import pytest

from . import tiny

SCRIPT = "tests.peers.politeness"


def run(*args):
    command = [sys.executable, "-m", SCRIPT, *args]
    done = subprocess.run(
        [str(arg) for arg in command], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_good_split(source, folder, n_train):
    """n_train rows and the rest, every row once, no prompt on both sides."""
    run("split", source, folder, "--n-train", n_train)
    lines = source.read_text(encoding="utf-8").splitlines()
    train, held_out = (
        (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("train", "eval")
    )
    assert len(train) == n_train
    assert sorted(train + held_out) == sorted(lines)
    sides = [{json.loads(line)["prompt"] for line in part} for part in (train, held_out)]
    assert not sides[0] & sides[1]


def test_a_prompt_stays_on_one_side(tmp_path):
    rows = tiny.preference_rows(40)
    for i in range(0, 40, 3):
        rows[i]["prompt"] = rows[0]["prompt"] if i < 20 else rows[21]["prompt"]
    source = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert_good_split(source, tmp_path / "a", 25)
    assert_good_split(source, tmp_path / "b", 25)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_real_pairs_split_into_900_and_200(tmp_path):
    assert_good_split(tiny.shared("politeness-pairs.jsonl"), tmp_path, 900)


def test_the_comparison_prints_both_sides(tmp_path):
    """Two epochs of 16 pairs. Before training both sides are the same model on the same pairs."""
    for package in ("transformers", "datasets", "trl"):
        pytest.importorskip(package)
    model = tmp_path / "model"
    tiny.random_llama(model, vocab_size=tiny.train_sentencepiece(model))
    pairs = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.preference_rows(24))
    out = tmp_path / "out"
    printed = run("compare", "--model", model, "--data", pairs, "--out", out, "--n-train", 16)
    assert "| optimizer steps | 4 | 4 | 4 |" in printed
    names = ("trl", "full", "response")
    first = [json.loads((out / n / "metrics.jsonl").read_text().splitlines()[0]) for n in names]
    for row in first:
        assert row["step"] == 0
        for key in ("eval_logps/chosen", "eval_log_odds_chosen", "eval_rewards/accuracies"):
            assert row[key] == pytest.approx(first[0][key], abs=1e-4)
