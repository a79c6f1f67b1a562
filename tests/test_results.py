"""What the README promises of whole runs: heavy, so `make test-slow` runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.peers.politeness import write_split

ROOT = Path(train.__file__).resolve().parent
FACTS = ROOT / "examples" / "facts"


def evaluations(out: Path, *flags: str) -> tuple[dict, dict]:
    """Runs train.py as a person does; its evaluation before the first and after the last step."""
    words = [sys.executable, str(ROOT / "train.py"), "--out", str(out), "--device", "cpu", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    first, *_, last = (row for row in rows if "eval_loss" in row)
    return first, last


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 43, 44])
def test_the_built_in_job_shows_what_orpo_is_for(tmp_path, seed):
    """Beside fine-tuning on the chosen answers alone: the paper's Figures 3 and 7."""
    base, orpo = evaluations(tmp_path / "orpo", "--seed", str(seed))
    _, sft = evaluations(tmp_path / "sft", "--seed", str(seed), "--lam", "0")
    assert base["eval_accepted/greedy"] <= 0.1
    assert orpo["eval_accepted/greedy"] >= sft["eval_accepted/greedy"] + 0.3
    assert orpo["eval_rewards/accuracies"] >= sft["eval_rewards/accuracies"] + 0.08
    for side in ("eval_logps/chosen", "eval_logps/rejected"):  # SFT makes both likelier
        assert sft[side] > base[side] + 0.1
    assert orpo["eval_logps/rejected"] < sft["eval_logps/rejected"] - 0.25
    assert orpo["eval_logps/rejected"] < base["eval_logps/rejected"]


@pytest.mark.slow
@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_a_real_checkpoint_learns_real_preferences(tmp_path, shared, sft_loss):
    """From about 0.54 to at least 0.83 in two epochs, which is what TRL reaches."""
    training, held_out = write_split(shared / "politeness-pairs.jsonl", tmp_path, 900)
    files = ["--model", str(shared / "stories260K"), "--data", str(training)]
    settings = ["--lr", "3e-3", "--lam", "1.0", "--epochs", "2", "--batch-size", "8"]
    settings += ["--eval-data", str(held_out), "--sft-loss", sft_loss]
    before, after = evaluations(tmp_path / "out", *files, *settings)
    assert 0.5 < before["eval_rewards/accuracies"] < 0.6
    assert after["eval_rewards/accuracies"] >= 0.83


def test_held_out_questions_are_about_facts_that_no_pair_shows():
    """No question and no good answer of the held-out rows stands in a training pair."""
    pairs = (FACTS / "train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (FACTS / "eval.jsonl").read_text("utf-8").splitlines()]
    assert len({row["accept"][0] for row in rows}) >= 200
    for row in rows:
        assert json.dumps(row["prompt"]) not in pairs
        assert not any(answer in pairs for answer in row["accept"]), row
