"""Flags do what they say: each of these could be ignored without any other test noticing."""

import dataclasses
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import train
from data import step_pairs
from run.folder import refuse_other_settings
from run.lora import lora_layers
from tests.runs import evaluations, files, run, steps


def test_epochs_are_so_many_passes(folder, tmp_path):
    """40 pairs by 16 are three steps an epoch."""
    flags = [*files(folder), "--out", str(tmp_path / "out"), "--batch-size", "16"]
    rows = steps(run(flags, "--epochs", "2"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["epoch"] == 2


def test_evaluation_comes_every_so_many_steps(arguments):
    rows = run(arguments, "--max-steps", "5", "--eval-every", "2")
    assert [row["step"] for row in evaluations(rows)] == [0, 2, 4, 5]


def test_the_schedule_reaches_every_parameter_group(arguments, monkeypatch):
    rates, training_step = [], train.training_step

    def noted(model, optimizer, *rest):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return training_step(model, optimizer, *rest)

    monkeypatch.setattr(train, "training_step", noted)
    written = [row["learning_rate"] for row in steps(run(arguments, "--max-steps", "4"))]
    assert len(set(written)) > 1
    assert rates == [[rate] * len(rates[0]) for rate in written] and len(rates[0]) == 2


def test_the_seed_decides_the_order():
    pairs = [data.Pair([i], [i], [i]) for i in range(40)]
    orders = {
        tuple(pair.prompt[0] for pair in step_pairs(pairs, 1, 32, seed)) for seed in (1, 2, 3)
    }
    assert len(orders) == 3


@pytest.fixture
def loaded(folder):
    """What load_model makes of flags, for a model of two blocks."""
    return lambda **flags: train.load_model(
        train.TrainConfig(str(folder / "model"), device="cpu", dtype="float32", **flags)
    )


@pytest.mark.parametrize(("given", "wanted"), [(False, 0), (True, 2), (1, 1)])
def test_so_many_blocks_are_checkpointed(given, wanted, loaded):
    assert loaded(activation_checkpointing=given).checkpointed_blocks == wanted


def test_adapters_count_alpha_over_rank(loaded):
    model = loaded(lora_rank=4, lora_alpha=6.0)
    scales = {layer.scale for layer in lora_layers(model).values()}
    assert scales == {1.5}


def test_the_seed_decides_the_adapters(loaded):
    a, b, c = (
        next(iter(lora_layers(loaded(lora_rank=2, seed=seed)).values())).lora_A
        for seed in (1, 1, 2)
    )
    assert a.equal(b) and not a.equal(c)


def test_responses_are_cut_to_the_models_context(folder, tmp_path, capsys):
    """Of 128 tokens, with the default --max-length of 2048, as the plan tells."""
    row = {"prompt": "one", "chosen": " two" * 200, "rejected": " three" * 200}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    flags = [*files(folder), "--data", str(tmp_path / "long.jsonl"), "--out", str(tmp_path / "out")]
    run(flags, "--max-steps", "1")
    means = re.search(r"prompt (\d+), chosen (\d+), rejected (\d+)", capsys.readouterr().out)
    prompt, chosen, rejected = map(int, means.groups())
    assert (prompt + chosen, prompt + rejected) == (128, 128)


def test_a_runs_settings_do_the_same_from_any_folder(folder, tmp_path, monkeypatch):
    """Paths that were relative where the run was started are whole in OUT/config.json."""
    monkeypatch.chdir(folder)
    flags = ["--model", "model", "--data", "train.jsonl", "--eval-data", "eval.jsonl"]
    run([*flags, "--device", "cpu", "--out", str(tmp_path / "out"), "--max-steps", "1"])
    monkeypatch.chdir(tmp_path)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for name, file in (("model", "model"), ("data", "train.jsonl"), ("eval_data", "eval.jsonl")):
        path = Path(written[name])
        assert path.is_absolute() and path.samefile(folder / file)


OTHERS = {
    "sft_loss": "full",
    "lr": 1e-3,
    "lr_schedule": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "grad_clip": 0.5,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "batch_size": 4,
    "max_steps": 9,
    "epochs": 7,
    "max_length": 77,
    "max_prompt_length": 55,
    "seed": 5,
    "dtype": "bfloat16",
    "lora_rank": 2,
    "lora_alpha": 3.0,
    "eval_fraction": 0.25,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_is_not_resumed_with_another(name):
    config = train.TrainConfig("/m", "/d", out="/o", device="cpu", dtype="float32")
    then = dataclasses.asdict(config)
    refuse_other_settings(config, then, Path("step-1"))
    other = dataclasses.replace(config, **{name: OTHERS[name]})
    with pytest.raises(ValueError, match=f"--resume: {name} was .* now {OTHERS[name]!r}"):
        refuse_other_settings(other, then, Path("step-1"))


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


def test_the_settings_of_a_run_serve_on_another_machine(whole, tmp_path, capsys):
    """Without its device; and a run that was sharded is evaluated by one process."""
    settings = json.loads((whole.out / "config.json").read_text())
    assert "device" not in settings and settings["dtype"] == "float32"
    (tmp_path / "sharded.json").write_text(json.dumps(settings | {"shard": True}))
    flags = ["--model", str(whole.out / "model"), "--eval-only", "--device", "cpu"]
    capsys.readouterr()
    train.main(["--config", str(tmp_path / "sharded.json"), *flags])
    row = json.loads(capsys.readouterr().out)
    assert row["eval_loss"] == pytest.approx(evaluations(whole.rows)[-1]["eval_loss"], rel=1e-6)
