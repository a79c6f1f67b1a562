"""The log: a row a step, what its numbers count, and what stands still meanwhile."""

import time
from types import SimpleNamespace

import pytest
import torch

import data
import train
from data import step_pairs
from run.folder import read_rows
from run.log import Log
from run.plan import Plan, step_flops
from tests.runs import CLOCKS, METRICS, run, steps
from tests.small import random_model, random_pairs


def test_every_step_has_one_row_with_every_metric(whole):
    trained = [row for row in whole.rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 13))
    assert all(set(row) == METRICS for row in trained)


def test_epochs_are_counted_in_parts(whole):
    """40 pairs by 8 are 5 steps an epoch."""
    assert [row["epoch"] for row in steps(whole.rows)] == [step / 5 for step in range(1, 13)]


def test_log_every_thins_the_rows_and_changes_none(arguments, whole):
    thin = steps(run(arguments, "--log-every", "5"))
    assert thin == [row for row in steps(whole.rows) if row["step"] in (5, 10, 12)]


def test_another_programs_metrics_are_no_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'3\n[1]\n"loss"\n{"loss": 1}\n\xff\n')
    assert read_rows(tmp_path) == []


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The log's clock, which moves two seconds a step, a thousand an evaluation, and not else."""
    seconds = [0.0]

    def takes(name: str, n: float):
        function = getattr(train, name)

        def taking(*args, **kwargs):
            seconds[0] += n
            return function(*args, **kwargs)

        monkeypatch.setattr(train, name, taking)

    takes("training_step", 2.0)
    takes("evaluate", 1000.0)

    clock = SimpleNamespace(**vars(time) | {"perf_counter": lambda: seconds[0]})
    monkeypatch.setattr("run.log.time", clock)
    return seconds


def test_tokens_per_second_are_of_all_steps_since_the_row_before_and_of_no_evaluation(
    arguments, clock
):
    arguments += ["--max-steps", "6", "--log-every", "2", "--eval-every", "3"]
    rows = [row for row in run(arguments) if "loss" in row]
    config = train.parse(arguments)
    tokenizer, preferences = data.load_tokenizer(config.model), data.load_preferences(config.data)
    pairs, _ = data.encode_pairs(tokenizer, preferences, 128, 128)
    for row in rows:
        two = [
            step_pairs(pairs, k, config.batch_size, config.seed)
            for k in (row["step"] - 1, row["step"])
        ]
        n_tokens = sum(sum(pair.lengths) for step in two for pair in step)
        assert row["tokens_per_second"] == pytest.approx(n_tokens / 4)
    assert [row["step"] for row in rows] == [2, 4, 6] and clock[0] == 3012


ROW = dict.fromkeys(METRICS - {"step"} - CLOCKS, torch.zeros(()))


@pytest.fixture
def log_at(monkeypatch, tmp_path):
    """A log of a run that goes on after a step, and a list whose number is its clock."""
    seconds = [0.0]
    clock = SimpleNamespace(**vars(time) | {"perf_counter": lambda: seconds[0]})
    monkeypatch.setattr("run.log.time", clock)
    model = random_model(torch.float32)
    return lambda start, n_steps, **flags: (
        Log(tmp_path, model, start, Plan(n_steps, 10, [], False), train.TrainConfig(**flags)),
        seconds,
    )


def take(log: Log, step: int, pairs):
    metrics = ROW | {"updates": torch.tensor(step)}
    log.step(step, pairs, metrics if log.wants(step) else None, 0.1)


def test_the_time_left_is_that_of_this_start(log_at, capsys):
    """Resumed after step 100 of 200, two seconds a step: after 3 steps 194 s are left, however long
    an evaluation among them took."""
    log, seconds = log_at(100, 200)
    for step in (101, 102, 103):
        seconds[0] += 2
        take(log, step, random_pairs([(3, 2, 2)]))
        with log.paused():
            seconds[0] += 9
    assert "after 3 steps: about 0:03:14 left" in capsys.readouterr().out
    log.close()


def test_where_there_is_no_terminal_a_line_comes_every_half_minute(log_at, capsys):
    log, seconds = log_at(100, 200)
    log.bar.disable = True
    for step in range(101, 105):
        seconds[0] += 11
        take(log, step, random_pairs([(3, 2, 2)]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 1 and lines[0].startswith("step 103 of 200: loss 0.000 acc 0.00 logps")
    assert lines[0].endswith("; 0:17:47 left")  # 97 steps of 11 s
    log.close()


def test_rates_are_of_all_processes_and_mfu_of_one(log_at, monkeypatch, tmp_path):
    """Two steps of 3 s between rows, over 4 processes that can each do 1e6 operations a second."""
    monkeypatch.setattr("run.log.world_size", lambda: 4)
    monkeypatch.setattr("run.log.peak_flops", lambda *_: 1e6)
    log, seconds = log_at(0, 20, log_every=2)
    steps_of = [random_pairs(lengths) for lengths in ([(3, 2, 2)], [(5, 4, 6), (2, 2, 2)])]
    for step, pairs in enumerate(steps_of * 2, 1):
        seconds[0] += 3
        take(log, step, pairs)
    flops = sum(step_flops(log.model, pairs, log.config) for pairs in steps_of)
    rows = read_rows(tmp_path)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(28 / 6)
        assert row["tflops"] == pytest.approx(flops / 6 / 1e12)
        assert row["mfu"] == pytest.approx(flops / 6 / 1e6 / 4)
    assert [(row["step"], row["epoch"]) for row in rows] == [(2, 0.2), (4, 0.4)]
    log.close()
