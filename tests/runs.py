"""Runs of train.py, in this process or in several: what they write, and two of them compared."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from model import ModelConfig, Transformer
from run.log import HostCopy

ROOT = Path(train.__file__).resolve().parent
FACTS = ROOT / "examples" / "facts"
METRICS = {
    *("step", "loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "grad_norm", "epoch"),
    "pull_ratio",
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "learning_rate"),
    *("tokens_per_second", "tflops", "peak_memory_gb"),
}
CLOCKS = {"tokens_per_second", "tflops", "peak_memory_gb"}  # differ from run to run
TWELVE_STEPS = ["--max-steps", "12", "--batch-size", "8", "--warmup-steps", "2"]
TWELVE_STEPS += ["--lr", "3e-3", "--lam", "0.5"]
UNEVEN = ["--batch-size", "7", "--max-steps", "8", "--micro-batch-tokens", "100", "--lr", "1e-3"]


def write_inputs(folder: Path):
    """A random model of 60,000 parameters with a real tokenizer, and rows of real pairs."""
    torch.manual_seed(0)
    config = ModelConfig(1536, 32, 2, 4, 48, n_kv_heads=2, max_seq_len=128, tie_embeddings=True)
    Transformer(config).save_pretrained(folder / "model")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(FACTS / "base" / name, folder / "model" / name)
    rows = (FACTS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:40]), encoding="utf-8")
    # Of short answers: the model may answer with twice as many tokens, which takes its time.
    rows = (FACTS / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = sorted(rows[:60], key=len)[:6]
    (folder / "eval.jsonl").write_text("".join(rows), encoding="utf-8")


def files(folder: Path) -> list[str]:
    """The flags for what `write_inputs` wrote."""
    names = {"model": "model", "data": "train.jsonl", "eval-data": "eval.jsonl"}
    flags = [x for flag, name in names.items() for x in (f"--{flag}", str(folder / name))]
    return [*flags, "--device", "cpu"]


# ---------------------------------------------------------------------------------------------
# In this process.


def run(arguments: list[str], *more: str) -> list[dict]:
    """A whole run; the rows that it wrote."""
    arguments = [*arguments, *more]
    train.main(arguments)
    return rows_of(out_of(arguments) / "metrics.jsonl")


def fails(capsys, arguments: list[str], before: int = 0) -> str:
    """The complaint of a run that must end with status 2, in one line after `before` others."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    message = capsys.readouterr().err
    lines = message.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == before + 1 and lines[-1].startswith("train.py: "), message
    assert len(lines[-1]) < 2000
    return message


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


def kill_at(monkeypatch, step: int):
    """Training dies while `step`'s metrics are read, before its row is written."""

    class Dying(HostCopy):
        rows = 0

        def read(self):
            Dying.rows += "grad_norm" in self.names
            if Dying.rows == step:
                raise Killed
            return super().read()

    monkeypatch.setattr("run.log.HostCopy", Dying)


def evaluates_to(monkeypatch, *losses: float):
    """The evaluations to come find these eval_loss, one after the other."""
    evaluate, left = train.evaluate, iter(losses)
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluate(*a) | {"eval_loss": next(left)})


# ---------------------------------------------------------------------------------------------
# In processes of its own.


def start(
    n: int, arguments: list[str], script: Path = ROOT / "train.py", torchrun: list[str] = ()
) -> subprocess.Popen:
    """train.py on n processes; 1 is without torchrun, whose own flags may be given."""
    words = [sys.executable]
    if n > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        words += torchrun
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    environment = os.environ | environment
    words += [str(script), *arguments]
    return subprocess.Popen(
        words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def launch(n: int, arguments: list[str], *more: str) -> tuple[list[dict], str]:
    """The rows that a whole run wrote, and what it printed."""
    arguments = [*arguments, *more]
    process = start(n, arguments)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, printed + errors
    return rows_of(out_of(arguments) / "metrics.jsonl"), printed


# ---------------------------------------------------------------------------------------------
# What was written.


def out_of(arguments: list[str]) -> Path:
    """The last --out, which is the one that counts."""
    return Path(arguments[len(arguments) - arguments[::-1].index("--out")])


def rows_of(metrics: Path) -> list[dict]:
    """The rows of a metrics.jsonl, less a last one that is half written."""
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(rows: list[dict]) -> list[dict]:
    """The rows of training steps, without what the clock says."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows if "loss" in row]


def evaluations(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "eval_loss" in row]


def file_bytes(folder: Path) -> dict[str, bytes]:
    """What a folder holds; nothing where there is none."""
    return {file.name: file.read_bytes() for file in folder.glob("*")}


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def compare(one: list[dict], two: list[dict], rel: float):
    """The rows of two runs are the same but for roundings."""
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        a, b = ({k: v for k, v in row.items() if k not in CLOCKS} for row in (a, b))
        assert a == pytest.approx(b, rel=rel, abs=2e-6)


def compare_models(one: Path, two: Path, most: float):
    """The models of two runs are the same but for roundings."""
    models = [Transformer.from_pretrained(out / "model") for out in (one, two)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=most)
