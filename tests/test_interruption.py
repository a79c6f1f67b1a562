"""A run that is killed, stopped, or short of disk goes on to the bit; one that breaks, stops."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import train
from model import ModelConfig, Transformer
from tests.test_train import fails, run, steps

ROOT = Path(train.__file__).resolve().parent
# Runs train.py, and at the n-th call of a function sends its own process a signal, as often.
DRIVER = """
import os, pkgutil, signal, sys
import torch.distributed.checkpoint, train
target, n, number, times, *arguments = sys.argv[1:]
owner, _, name = target.rpartition(".")
owner, left = pkgutil.resolve_name(owner), [int(n)]
function = getattr(owner, name)
def dying(*args, **kwargs):
    left[0] -= 1
    for _ in range(int(times) if left[0] == 0 else 0):
        os.kill(os.getpid(), int(number))
    return function(*args, **kwargs)
setattr(owner, name, dying)
train.main(arguments)
"""


def interrupted(target: str, n: int, number: int, arguments: list[str], times: int = 1):
    words = [sys.executable, "-c", DRIVER, target, str(n), str(int(number)), str(times)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def evaluations(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "eval_loss" in row]


def test_killed_three_times_it_ends_as_if_it_had_not_been(arguments, tmp_path):
    """Before the first checkpoint, in the middle of saving the second, while an old one goes."""
    arguments += ["--save-every", "3", "--eval-every", "4"]
    whole = run(arguments, "--out", str(tmp_path / "whole"))
    folder, seen = tmp_path / "out" / "checkpoints", []
    for target, n in (
        ("train.write_row", 3),  # step 2's
        ("torch.distributed.checkpoint.FileSystemWriter.finish", 2),  # only the index is missing
        ("train.shutil.rmtree", 5),  # step 3's, behind that of step 9
    ):
        killed = interrupted(target, n, signal.SIGKILL, [*arguments, "--resume"])
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        seen.append(sorted(f.name for f in folder.glob("*")))
    assert seen[0] == [] and seen[1] == ["step-00000003", "unfinished"]
    assert seen[2] == [f"step-0000000{k}" for k in (3, 6, 9)]
    rows = run(arguments, "--resume")
    assert steps(rows) == steps(whole) and evaluations(rows) == evaluations(whole)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_as_if_it_had_not_been(arguments, tmp_path):
    moments = random.Random(os.environ.get("SEED", "5"))
    arguments += ["--max-steps", "600", "--save-every", "7", "--eval-every", "100", "--lr", "1e-4"]
    whole = run(arguments, "--out", str(tmp_path / "whole"))
    words = [sys.executable, str(ROOT / "train.py"), *arguments, "--resume"]
    metrics = tmp_path / "out" / "metrics.jsonl"
    killed = 0
    for _ in range(20):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        written = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while process.poll() is None and not (
            metrics.exists() and metrics.stat().st_mtime_ns > written
        ):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed > 10
    rows = run(arguments, "--resume")
    assert steps(rows) == steps(whole) and evaluations(rows) == evaluations(whole)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(arguments, tmp_path, monkeypatch, capsys):
    """SIGTERM is sent in test_distributed.py."""
    whole = run(arguments, "--out", str(tmp_path / "whole"))
    training_step, taken = train.training_step, []

    def signalled(*args):
        taken.append(1)
        if len(taken) == 5:
            signal.raise_signal(signal.SIGINT)
        return training_step(*args)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "training_step", signalled)
        run(arguments)
    assert stopped.value.code == 130 and len(taken) == 5
    assert signal.getsignal(signal.SIGINT) == before
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "after step 5 of 12" in printed and "--resume" in printed
    assert not (tmp_path / "out" / "model").exists()
    rows = run(arguments, "--resume")
    assert steps(rows) == steps(whole)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(arguments, tmp_path):
    killed = interrupted("train.training_step", 3, signal.SIGINT, arguments, times=2)
    assert killed.returncode == -signal.SIGINT
    assert not (tmp_path / "out" / "checkpoints").exists()


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[list[str], Path, list[dict]]:
    """Flags, folder and rows of a run that has ended, with checkpoints of steps 3 and 6."""
    flags = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    flags += ["--max-steps", "8", "--batch-size", "8", "--save-every", "3", "--device", "cpu"]
    out = tmp_path_factory.mktemp("finished") / "out"
    return flags, out, run(flags, "--out", str(out))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("__0_0.distcp", truncate),
        ("__0_0.distcp", Path.unlink),
        (".metadata", truncate),
        (".metadata", lambda file: file.write_bytes(b"?" * 99)),
        ("config.json", truncate),
        ("config.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    finished, tmp_path, capsys, name, damage
):
    flags, whole, rows = finished
    shutil.copytree(whole, tmp_path / "out")
    damage(tmp_path / "out" / "checkpoints" / "step-00000006" / name)
    assert steps(run(flags, "--out", str(tmp_path / "out"), "--resume")) == steps(rows)
    assert "step-00000006: an older one is tried" in capsys.readouterr().err
    assert weights(tmp_path / "out") == weights(whole)


def test_without_a_readable_checkpoint_nothing_is_made_up(finished, tmp_path, capsys):
    flags, whole, _ = finished
    shutil.copytree(whole, tmp_path / "out")
    for file in (tmp_path / "out" / "checkpoints").glob("*/__0_0.distcp"):
        truncate(file)
    assert "none can be read" in fails(
        capsys, [*flags, "--out", str(tmp_path / "out"), "--resume"], 5
    )


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_checkpoints_are_kept(arguments, tmp_path, keep):
    run(arguments, "--save-every", "3", "--keep", str(keep))
    kept = sorted(f.name for f in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == [f"step-{k:08d}" for k in (3, 6, 9, 12)[-keep:]]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(
    arguments, tmp_path, monkeypatch, capsys
):
    """No file may grow beyond 100 KB once the first checkpoint is written; then it may again."""
    arguments += ["--save-every", "4"]
    whole = run(arguments, "--out", str(tmp_path / "whole"))
    save, saved = train.save_checkpoint, []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args):
        saved.append(1)
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", limited)
        try:
            message = fails(capsys, arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in message and "step-00000008: not written" in message
    assert "step-00000004;" in message and "--resume" in message
    left = [f.name for f in (tmp_path / "out" / "checkpoints").iterdir()]
    assert left == ["step-00000004"]
    assert steps(run(arguments, "--resume")) == steps(whole)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------
# What is not finite.


@pytest.fixture
def poisoned(folder, arguments, tmp_path):
    """A model with a token whose embedding is NaN, and 40 rows of which line 7 has it."""

    torch.manual_seed(0)
    model = Transformer(ModelConfig(1536, 32, 2, 4, 48, n_kv_heads=2, max_seq_len=128))
    tokenizer = data.load_tokenizer(folder / "model")
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.encode("Q", continuation=True)[-1]] = torch.nan
    shutil.copytree(folder / "model", tmp_path / "poisoned")
    model.save_pretrained(tmp_path / "poisoned")
    numbers = [*map(str, range(40))]
    numbers[6] += "Q"
    rows = [{"prompt": "n", "chosen": f" is {k}.", "rejected": " is not."} for k in numbers]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--model", str(tmp_path / "poisoned"), "--data", str(file)]
    return [*arguments, *files], file


def test_what_is_not_finite_stops_the_run_with_step_row_and_term(poisoned, tmp_path, capsys):
    """Also where nobody looks at every step: the rows are those of the step that broke."""
    arguments, file = poisoned
    config = train.parse(arguments)
    rows = data.load_preferences(file)
    bad = next(k for k in range(1, 6) if rows[6] in train.step_pairs(rows, k, config))
    assert bad > 1  # so that there is a checkpoint
    arguments += ["--save-every", str(bad - 1), "--micro-batch-tokens", "30"]
    for log_every in ("1", "50"):
        out = tmp_path / log_every
        message = fails(capsys, [*arguments, "--log-every", log_every, "--out", str(out)])
        assert f"step {bad}: not finite: {file}:7 (L_SFT and L_OR); nothing was" in message
        written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        logged = range(1, bad) if log_every == "1" else []
        assert [row["step"] for row in steps(written)] == list(logged)
        left = [f.name for f in (out / "checkpoints").iterdir()]
        assert left == [f"step-{bad - 1:08d}"] and not (out / "model").exists()


@pytest.mark.parametrize(("lam", "term"), [("1e39", "(L_OR)"), ("1e37", "(its gradient)")])
def test_the_term_that_is_not_finite_is_named(arguments, capsys, lam, term):
    """The first is beyond float32, of the second only the squares that a norm sums."""
    message = fails(capsys, [*arguments, "--lam", lam])
    assert "step 1: not finite: " in message and message.count(term) == 3, message


def test_no_update_is_made_from_a_gradient_that_is_not_finite_nor_after_it():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(50, 16, 2, 2, 24))
    with torch.no_grad():
        model.embed_tokens.weight[49] = torch.inf
    config = train.TrainConfig(lr=1e-2, dtype="float32", weight_decay=0.1)
    optimizer = train.make_optimizer(model, config)
    good, bad = [data.Pair([1], [2, 3], [4])], [data.Pair([1], [2, 49, 3], [4])]

    def changed(pairs) -> bool:
        before = [x.clone() for x in train.training_state(model, optimizer).values()]
        train.training_step(model, optimizer, train.micro_batches(pairs, config), config)
        after = train.training_state(model, optimizer).values()
        return not all(map(torch.equal, before, after))

    changed(good)
    assert [changed(pairs) for pairs in (good, bad, good)] == [True, False, False]
