"""A run that is killed, stopped, or short of disk is resumed to the bit."""

import contextlib
import datetime
import errno
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import data
import train
from formats.weights import write_safetensors
from run.flags import settings_of
from run.saving import digest
from tests.forked import Forked, call
from tests.runs import (
    ROOT,
    TWELVE_STEPS,
    Killed,
    evaluates_to,
    evaluations,
    fails,
    file_bytes,
    files,
    kill_at,
    run,
    steps,
    weights,
)
from tests.small import random_pairs

# Runs train.py, and at the n-th call of a function sends its own process a signal, as often.
DRIVER = """
import os, pkgutil, signal, sys
import torch.distributed.checkpoint, train
target, n, number, times, *arguments = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as under nohup
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
    # Under nohup the tests would hand on a hang-up that is ignored.
    default = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n{DRIVER}"
    process = Forked("-c", default, target, n, int(number), times, *arguments)
    out, error = process.communicate()
    return subprocess.CompletedProcess([], process.poll(), out, error)


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory) -> tuple[list[dict], Path]:
    """Rows and folder of a run of `arguments` that evaluates every four steps."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return run([*files(folder), "--out", str(out), *TWELVE_STEPS, "--eval-every", "4"]), out


def assert_the_same_run(rows: list[dict], out: Path, wanted: tuple[list[dict], Path]):
    """The same metrics at every step and evaluation, and the same models, to the bit."""
    assert steps(rows) == steps(wanted[0]) and evaluations(rows) == evaluations(wanted[0])
    for name in ("model", "best"):
        assert file_bytes(out / name) == file_bytes(wanted[1] / name)


@pytest.mark.parametrize(("save_every", "killed_at"), [(4, 10), (4, 3), (5, 6)])
def test_resume_is_bitwise(arguments, evaluated, tmp_path, monkeypatch, save_every, killed_at):
    """Killed after a checkpoint, before the first one, and right behind one."""
    arguments += ["--save-every", str(save_every), "--eval-every", "4"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, killed_at)
        run(arguments)
    with open(tmp_path / "out" / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "lo')  # a row half written
    assert_the_same_run(run(arguments, "--resume"), tmp_path / "out", evaluated)


def test_killed_three_times_it_ends_as_if_it_had_not_been(arguments, evaluated, tmp_path):
    """Before the first checkpoint, in the middle of saving the second, while an old one goes."""
    arguments += ["--save-every", "3", "--eval-every", "4"]
    folder, seen = tmp_path / "out" / "checkpoints", []
    for target, n in (
        ("run.log.write_row", 3),  # step 2's
        ("torch.distributed.checkpoint.FileSystemWriter.finish", 2),  # only the index is missing
        ("run.saving.shutil.rmtree", 6),  # step 3's, behind that of step 9
    ):
        killed = interrupted(target, n, signal.SIGKILL, [*arguments, "--resume"])
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        seen.append(sorted(f.name for f in folder.glob("*")))
    assert seen[0] == [] and seen[1] == ["step-00000003", "unfinished"]
    assert seen[2] == [f"step-0000000{k}" for k in (3, 6, 9)]
    assert_the_same_run(run(arguments, "--resume"), tmp_path / "out", evaluated)


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
    assert_the_same_run(run(arguments, "--resume"), tmp_path / "out", (whole, tmp_path / "whole"))


@pytest.mark.parametrize(
    ("later", "step"), [([3.0, 4.0, 2.0], 12), ([3.0, 4.0, 5.0], 6), ([3.1, 4.0, 3.05], 6)]
)
def test_the_best_model_is_the_best_across_a_resume(arguments, tmp_path, monkeypatch, later, step):
    """Killed behind step 6, the best one, whose row is cut, as the checkpoint is of step 5. It is
    evaluated again, and finds the same, or a little more where micro-batches are others now."""
    arguments += ["--save-every", "5", "--eval-every", "3"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8)
        evaluates_to(patch, 1.0, 5.0, 3.0)
        run(arguments)
    best = tmp_path / "out" / "best"
    before = file_bytes(best)
    evaluates_to(monkeypatch, *later)
    run(arguments, "--resume")
    after = file_bytes(best)
    assert json.loads(after["evaluation.json"])["step"] == step
    assert (before == after) == (step == 6)


def test_a_best_model_that_could_not_be_written_is_written_after_the_resume(
    arguments, tmp_path, monkeypatch
):
    """Killed while it is written, after the checkpoint of the same step."""
    arguments += ["--save-every", "6", "--eval-every", "6"]

    def kill(_, row):
        if row["step"]:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_best", kill)
        evaluates_to(patch, 5.0, 3.0)
        run(arguments)
    evaluates_to(monkeypatch, 3.0, 4.0)
    run(arguments, "--resume")
    best = json.loads((tmp_path / "out" / "best" / "evaluation.json").read_text())
    assert (best["step"], best["eval_loss"]) == (6, 3.0)


def test_the_best_model_of_a_run_that_starts_again_is_of_the_new_one(
    arguments, tmp_path, monkeypatch
):
    arguments += ["--eval-every", "3"]  # without a checkpoint
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8)
        evaluates_to(patch, 1.0, 5.0, 3.0)
        run(arguments)
    evaluates_to(monkeypatch, 1.0, 9.0, 8.0, 7.0, 6.0)
    run(arguments, "--resume")
    best = json.loads((tmp_path / "out" / "best" / "evaluation.json").read_text())
    assert (best["step"], best["eval_loss"]) == (12, 6.0)


def test_a_run_goes_on_with_smaller_micro_batches(arguments, whole, monkeypatch):
    """Whoever ran out of memory can."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8)
        run(arguments, "--save-every", "5")
    smaller = ["--micro-batch-tokens", "60", "--activation-checkpointing", "--save-every", "3"]
    resumed = steps(run(arguments, "--resume", *smaller))
    for row, wanted in zip(resumed, steps(whole.rows), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(
    arguments, whole, tmp_path, monkeypatch, capsys
):
    """SIGTERM is sent in test_distributed.py."""
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
    assert_the_same_run(run(arguments, "--resume"), tmp_path / "out", (whole.rows, whole.out))


def test_a_second_ctrl_c_stops_at_once(arguments, tmp_path):
    killed = interrupted("train.training_step", 3, signal.SIGINT, arguments, times=2)
    assert killed.returncode == -signal.SIGINT
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_what_schedulers_send_stops_in_order_also_when_it_comes_twice(
    name, arguments, whole, tmp_path
):
    number = signal.Signals[name]
    stopped = interrupted("train.training_step", 5, number, arguments, times=2)
    assert stopped.returncode == 128 + number, stopped.stderr
    assert f"{name}: stopped after step 5 of 12; continue with --resume" in stopped.stdout
    assert stopped.stderr.count(f"{name}: finishing this step, then saving") == 1
    if name == "SIGTERM":
        assert_the_same_run(run(arguments, "--resume"), tmp_path / "out", (whole.rows, whole.out))


def test_under_nohup_a_closed_terminal_ends_nothing(arguments, tmp_path):
    code = f"import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{DRIVER}"
    call("-c", code, "train.training_step", 3, int(signal.SIGHUP), 1, *arguments)
    assert (tmp_path / "out" / "model").is_dir()


@pytest.mark.parametrize("step", [0, 4, 12])
def test_a_stop_within_an_evaluation_does_not_wait_for_it(
    step, arguments, evaluated, tmp_path, monkeypatch, capsys
):
    """The checkpoint is there already, and the evaluation is made up for by --resume."""
    arguments += ["--eval-every", "4", "--save-every", "0"]
    evaluate, seen = train.evaluate, []

    def signalled(model, pairs, config, may_stop):
        seen.append(len(seen) * 4)
        if seen[-1] == step:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(model, pairs, config, may_stop)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "evaluate", signalled)
        run(arguments)
    assert stopped.value.code == 128 + signal.SIGTERM and seen[-1] == step
    how = "continue with --resume" if step else "start again, as there is no checkpoint"
    assert f"stopped after step {step} of 12; {how}" in capsys.readouterr().out
    left = sorted(folder.name for folder in (tmp_path / "out").glob("checkpoints/*"))
    assert left == ([f"step-{step:08d}"] if step else [])
    assert_the_same_run(run(arguments, "--resume"), tmp_path / "out", evaluated)


def test_outside_of_the_main_thread_a_run_runs(arguments, tmp_path):
    """As in a web server: there no signal can be handled."""
    thread = threading.Thread(target=train.main, args=[[*arguments, "--max-steps", "2"]])
    thread.start()
    thread.join()
    assert (tmp_path / "out" / "finished").exists()


@pytest.mark.parametrize("target", ["train.load_inputs", "run.saving.save_model"])
def test_ctrl_c_outside_of_the_loop_is_one_line(arguments, tmp_path, target):
    stopped = interrupted(target, 1, signal.SIGINT, [*arguments, "--max-steps", "1"])
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines()[-1] == "train.py: stopped by Ctrl-C"
    assert "Traceback" not in stopped.stderr


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[list[str], Path, list[dict]]:
    """Flags, folder and rows of a run that has ended, with checkpoints of steps 4 and 8."""
    flags = [*files(folder), "--max-steps", "8", "--batch-size", "8", "--save-every", "4"]
    out = tmp_path_factory.mktemp("finished") / "out"
    return flags, out, run(flags, "--out", str(out))


@pytest.fixture
def moved(finished, tmp_path) -> list[str]:
    """Flags by which the finished run is resumed in another folder."""
    flags, out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    return [*flags, "--out", str(tmp_path / "out"), "--resume"]


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Whoever loads a model or tokenises a row fails."""
    monkeypatch.delattr(train, "load_inputs")


def contents(folder: Path) -> dict:
    return {p: (p.stat().st_mtime_ns, p.is_dir() or p.read_bytes()) for p in folder.rglob("*")}


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_finished_run_says_so_and_stays_as_it_is(
    moved, tmp_path, capsys, nothing_loaded, checkpoints
):
    """Also where it has moved, and where it has no checkpoint."""
    if not checkpoints:
        shutil.rmtree(tmp_path / "out" / "checkpoints")
    before = contents(tmp_path / "out")
    train.main(moved)
    assert "this run is finished, and nothing was changed" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_a_run_that_lacks_its_model_alone_writes_it(finished, moved, tmp_path):
    """Killed while it was written. No step is computed again, as the clocks' numbers tell."""
    (tmp_path / "out" / "finished").unlink()
    (tmp_path / "out" / "model" / "model.safetensors").unlink()
    assert run(moved) == finished[2]
    assert weights(tmp_path / "out") == weights(finished[1])
    assert (tmp_path / "out" / "finished").read_text() == "8\n"


@pytest.mark.parametrize("checkpoints", [True, False])
def test_resuming_with_other_settings_is_refused_by_name_before_anything_is_loaded(
    moved, tmp_path, capsys, nothing_loaded, checkpoints
):
    where = tmp_path / "out" / "checkpoints" / "step-00000008"
    if not checkpoints:
        shutil.rmtree(where.parent)
        where = tmp_path / "out"
    message = fails(capsys, [*moved, "--lam", "0.5"])
    assert f"lam was 0.1 in {where}, now 0.5" in message


def test_settings_that_do_not_change_the_steps_may_change(moved, capsys, nothing_loaded):
    more = ["--eval-every", "3", "--save-every", "5", "--keep", "1", "--micro-batch-tokens", "99"]
    train.main([*moved, *more])
    assert "finished" in capsys.readouterr().out


def test_a_path_may_be_spelled_in_another_way(
    folder, moved, tmp_path, capsys, monkeypatch, nothing_loaded
):
    """As OUT/run.json has it, and relative to the folder in which one is."""
    train.main(["--config", str(tmp_path / "out" / "run.json"), *moved[-3:]])
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    train.main([*moved, "--model", "model", "--data", str(tmp_path / "link" / "train.jsonl")])
    assert capsys.readouterr().out.count("finished") == 2


def test_a_longer_run_is_refused_where_the_schedule_ends(moved, capsys, nothing_loaded):
    message = fails(capsys, [*moved, "--max-steps", "16"])
    assert "max_steps was 8 in " in message and "cosine schedule ends with its last step" in message
    assert "as --model" in message


def test_a_finished_run_without_checkpoints_cannot_be_made_longer(
    arguments, tmp_path, capsys, nothing_loaded
):
    """Two files are all that is looked at."""
    arguments += [
        "--lr-schedule",
        "constant",
        "--max-length",
        "128",
        "--dtype",
        "float32",
        "--resume",
    ]
    (tmp_path / "out").mkdir()
    settings = json.dumps(settings_of(train.parse(arguments)))
    (tmp_path / "out" / "run.json").write_text(settings)
    (tmp_path / "out" / "finished").write_text("12\n")
    message = fails(capsys, [*arguments, "--max-steps", "13"])
    assert f"has no checkpoint; train longer by a new run with --model {tmp_path}/out" in message


def test_a_constant_schedule_goes_on_for_more_steps_as_if_it_had_been_planned(arguments, tmp_path):
    """The first steps are not computed again, as the clocks' numbers tell."""
    arguments += ["--lr-schedule", "constant"]
    longer = run(arguments, "--out", str(tmp_path / "longer"))
    begun = run(arguments, "--max-steps", "5")
    rows = run(arguments, "--resume")
    assert steps(rows) == steps(longer) and rows[: len(begun)] == begun
    assert weights(tmp_path / "out") == weights(tmp_path / "longer")


def test_a_run_is_not_cut_short_behind_its_last_checkpoint(arguments, tmp_path, capsys):
    arguments += ["--lr-schedule", "constant"]
    run(arguments, "--max-steps", "3")
    message = fails(capsys, [*arguments, "--resume", "--max-steps", "2"])
    assert "step-00000003 is after the last of 2 steps" in message


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_other_pairs_under_the_same_name_are_refused(arguments, folder, tmp_path, capsys, flag):
    rows = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(rows), encoding="utf-8")
    arguments += [flag, str(file), "--max-steps", "2"]
    run(arguments)
    (tmp_path / "out" / "finished").unlink()
    before = contents(tmp_path / "out")
    for changed in (rows[:-1], rows[::-1]):
        file.write_text("".join(changed), encoding="utf-8")
        message = fails(capsys, [*arguments, "--resume"])
        assert f"{file} does not give the pairs that {tmp_path}/out/checkpoints/step-0" in message
        assert "(40 pairs, " in message and f"now {len(changed)} pairs, " in message
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(("first", "words"), [(True, "had evaluation pairs: give"), (False, "no ")])
def test_evaluation_pairs_that_come_or_go_are_named(first, words, arguments, tmp_path, capsys):
    """And not the training file, which is the right one."""
    at = arguments.index("--eval-data")
    without = arguments[:at] + arguments[at + 2 :]
    commands = (arguments, without) if first else (without, arguments)
    run(commands[0], "--max-steps", "2")
    (tmp_path / "out" / "finished").unlink()
    message = fails(capsys, [*commands[1], "--max-steps", "2", "--resume"])
    assert words in message and "--eval-data" in message and "train.jsonl" not in message


def test_the_last_step_leaves_a_checkpoint(whole):
    assert [f.name for f in (whole.out / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("__0_0.distcp", truncate),
        ("__0_0.distcp", Path.unlink),
        (".metadata", truncate),
        (".metadata", lambda file: file.write_bytes(b"?" * 99)),
        ("run.json", truncate),
        ("run.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    finished, moved, tmp_path, capsys, name, damage
):
    _, whole, rows = finished
    (tmp_path / "out" / "finished").unlink()
    damage(tmp_path / "out" / "checkpoints" / "step-00000008" / name)
    assert_the_same_run(run(moved), tmp_path / "out", (rows, whole))
    assert "step-00000008: an older one is tried" in capsys.readouterr().err


def test_without_a_readable_checkpoint_nothing_is_made_up(moved, tmp_path, capsys):
    (tmp_path / "out" / "finished").unlink()
    for file in (tmp_path / "out" / "checkpoints").glob("*/__0_0.distcp"):
        truncate(file)
    assert "none can be read" in fails(capsys, moved, before=2)


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_checkpoints_are_kept(arguments, tmp_path, keep):
    run(arguments, "--save-every", "3", "--keep", str(keep))
    kept = sorted(f.name for f in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == [f"step-{k:08d}" for k in (3, 6, 9, 12)[-keep:]]


@contextlib.contextmanager
def full_disk(monkeypatch, function: str, n: int):
    """Within the n-th call of this function (module.name) no file may grow beyond 100 KB."""
    real, calls = pkgutil.resolve_name(function), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            return real(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(function, limited)
        yield


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(
    arguments, whole, tmp_path, monkeypatch, capsys
):
    arguments += ["--save-every", "4"]
    with full_disk(monkeypatch, "train.save_checkpoint", 2):
        message = fails(capsys, arguments)
    assert "File too large" in message and "step-00000008: not written" in message
    assert "step-00000004;" in message and "--resume" in message
    left = [f.name for f in (tmp_path / "out" / "checkpoints").iterdir()]
    assert left == ["step-00000004"]
    assert_the_same_run(run(arguments, "--resume"), tmp_path / "out", (whole.rows, whole.out))


def test_a_full_disk_leaves_the_best_model_as_it_was_and_says_so(
    arguments, tmp_path, monkeypatch, capsys
):
    arguments += ["--eval-every", "3"]
    write, written = write_safetensors, []

    def limited(path, *rest):
        written.append(path)
        write(path, *rest)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("formats.weights.write_safetensors", limited)
    evaluates_to(monkeypatch, 1.0, 5.0, 3.0)
    out = tmp_path / "out"
    reason = f"{out}/best: not written: No space left on device; fix this, then start again with --"
    assert reason in fails(capsys, arguments)
    assert json.loads((out / "best" / "evaluation.json").read_text())["step"] == 3
    assert sorted(file.name for file in out.iterdir()) == ["best", "metrics.jsonl", "run.json"]


def test_a_full_disk_while_the_model_is_written_loses_no_step(
    arguments, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with full_disk(monkeypatch, "run.saving.save_model", 1):
        message = fails(capsys, arguments)
    assert f"{out}/model: not written: File too large; " in message
    assert "step-00000012; make space, then continue with --resume" in message
    assert not [*out.rglob("*.tmp")] and not (out / "finished").exists()
    with monkeypatch.context() as patch:
        patch.delattr(train, "training_step")
        rows = run(arguments, "--resume")
    assert_the_same_run(rows, out, (whole.rows, whole.out))


def test_a_full_disk_for_the_last_checkpoint_alone_still_gives_the_model(
    arguments, whole, tmp_path, monkeypatch, capsys
):
    with full_disk(monkeypatch, "train.save_checkpoint", 1):
        rows = run(arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "step-00000012: not written: " in message and "--resume" not in message
    assert_the_same_run(rows, tmp_path / "out", (whole.rows, whole.out))
    assert (tmp_path / "out" / "finished").exists()


def test_a_full_disk_for_the_rows_names_their_file(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 0}\n' + " " * 100_000)
    with full_disk(monkeypatch, "run.log.write_row", 1), monkeypatch.context() as patch:
        patch.setattr(train, "begin_folder", lambda *args: None)
        message = fails(capsys, arguments)
    assert f"{tmp_path}/out/metrics.jsonl: not written: File too large; " in message


# ---------------------------------------------------------------------------------------------
# Days. A chat template may write the day on which it is used, as Llama 3.2's does.


def on(day: str, monkeypatch):
    class Day(datetime.date):
        today = classmethod(lambda cls: cls.fromisoformat(day))

    monkeypatch.setattr("run.folder.date", Day)


@pytest.fixture
def dated(folder, tmp_path) -> list[str]:
    """A run on messages whose template writes the day."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (tmp_path / "dated.jinja").write_text(template)
    with open(tmp_path / "rows.jsonl", "w", encoding="utf-8") as f:
        for i in range(8):
            sides = {
                "prompt": ("user", i),
                "chosen": ("assistant", 2 * i),
                "rejected": ("assistant", "x"),
            }
            row = {k: [{"role": role, "content": str(x)}] for k, (role, x) in sides.items()}
            f.write(json.dumps(row) + "\n")
    names = {"model": folder / "model", "data": tmp_path / "rows.jsonl", "out": tmp_path / "out"}
    names |= {"eval-data": tmp_path / "rows.jsonl", "chat-template": tmp_path / "dated.jinja"}
    flags = [x for name, path in names.items() for x in (f"--{name}", str(path))]
    return [*flags, "--device", "cpu", "--batch-size", "4", "--lr-schedule", "constant"]


def test_a_run_keeps_the_day_of_its_first_start(dated, tmp_path, monkeypatch, capsys):
    on("2024-02-28", monkeypatch)
    run(dated, "--max-steps", "4")
    assert "2024-02-28, by the chat template" in capsys.readouterr().out
    whole = run(dated, "--out", str(tmp_path / "whole"), "--max-steps", "6")
    on("2024-03-01", monkeypatch)
    resumed = run(dated, "--max-steps", "6", "--resume")
    assert steps(resumed) == steps(whole)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["date"] == "2024-02-28"
    again = [*dated, "--max-steps", "8", "--resume", "--date", "2024-03-01"]
    assert "date was '2024-02-28' in" in fails(capsys, again)


def test_an_evaluation_of_a_run_s_model_uses_its_day_and_says_so(
    dated, tmp_path, monkeypatch, capsys
):
    on("2024-02-28", monkeypatch)
    run(dated, "--max-steps", "2")
    on("2024-03-01", monkeypatch)
    evaluate = ["--eval-only", "--eval-data", str(tmp_path / "rows.jsonl"), "--device", "cpu"]
    for model, more, day in (
        (tmp_path / "out" / "model", [], "2024-02-28"),
        (tmp_path / "out" / "model", ["--date", "2024-03-02"], "2024-03-02"),
        (shutil.copytree(tmp_path / "out" / "model", tmp_path / "moved"), [], "2024-03-01"),
    ):
        capsys.readouterr()
        train.main([*evaluate, "--model", str(model), *more])
        captured = capsys.readouterr()
        assert json.loads(captured.out)["date"] == day and f"date     {day}, by" in captured.err


def test_a_day_that_is_none_is_refused(dated, capsys):
    for day in ("today", "2024-02-30", "29.2.2024"):
        assert f"--date must be YYYY-MM-DD, not '{day}'" in fails(capsys, [*dated, "--date", day])


# ---------------------------------------------------------------------------------------------
# Several runs in a row.


def test_a_finished_run_that_is_trained_longer_and_stopped_is_not_finished(arguments, tmp_path):
    """Finish at 2 steps, resume to 12, stop, resume again: it trains on."""
    arguments = [*arguments, "--lr-schedule", "constant", "--save-every", "2"]
    run(arguments, "--max-steps", "2")
    stopped = interrupted("train.training_step", 4, signal.SIGTERM, [*arguments, "--resume"])
    assert stopped.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / "finished").exists()
    assert [row["step"] for row in steps(run(arguments, "--resume"))] == list(range(1, 13))


def test_interrupted_then_changed_in_what_is_free_then_interrupted(arguments, evaluated, tmp_path):
    arguments = [*arguments, "--eval-every", "4"]
    changes = (["--save-every", "3"], ["--save-every", "5", "--keep", "1", "--log-every", "1"])
    for n, change in zip((4, 3), changes, strict=True):
        words = [*arguments, *change, "--resume"]
        assert interrupted("train.training_step", n, signal.SIGUSR1, words).returncode > 128
    assert_the_same_run(run(arguments, "--resume"), tmp_path / "out", evaluated)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_other_token_is_another_data_set(part):
    """Of the same lengths; also in the rejected answer."""
    pairs = random_pairs([(3, 2, 2), (2, 2, 3)])
    changed = [ids.copy() for ids in pairs[1][:3]]
    changed[part][-1] += 1
    assert digest(pairs) != digest([pairs[0], data.Pair(*changed)])
