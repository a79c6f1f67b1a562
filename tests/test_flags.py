"""Flags: how they are read and refused, and that each does what it says."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import data
import train
from data import step_pairs
from run.flags import BUILTIN, ELSEWHERE, settings_of
from run.folder import refuse_other_settings
from run.lora import lora_layers
from run.processes import pick_device
from tests.runs import FACTS, ROOT, evaluations, files, run, steps


def test_epochs_are_so_many_passes(folder, tmp_path):
    """40 pairs by 16 are three steps an epoch."""
    flags = [*files(folder), "--out", str(tmp_path / "out"), "--batch-size", "16"]
    rows = steps(run(flags, "--epochs", "2"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["epoch"] == 2


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
    """Paths that were relative where the run was started are whole in OUT/run.json."""
    monkeypatch.chdir(folder)
    flags = ["--model", "model", "--data", "train.jsonl", "--eval-data", "eval.jsonl"]
    run([*flags, "--device", "cpu", "--out", str(tmp_path / "out"), "--max-steps", "1"])
    monkeypatch.chdir(tmp_path)
    written = json.loads((tmp_path / "out" / "run.json").read_text())
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


# May change when a run is resumed: they change no step, or what they give is compared otherwise.
FREE = {"data": "/x", "eval_data": "/x", "chat_template": "/x", "keep": 5, "shard": True}
FREE |= {"micro_batch_tokens": 99, "activation_checkpointing": True, "compile": True}
FREE |= {"log_every": 3, "eval_every": 3, "save_every": 3, "lora_adapters": True}
FREE |= {"out": "/x", "overwrite": True, "resume": True, "device": "cuda:1"}  # of this start
REFUSED_TOO = {"model", "lam", "date", "eval_only", "dry_run"}  # elsewhere, or not with --resume


def test_every_flag_is_free_or_refused_when_a_run_is_resumed():
    fields = {f.name for f in dataclasses.fields(train.TrainConfig)}
    assert FREE.keys() | OTHERS.keys() | REFUSED_TOO == fields
    assert not FREE.keys() & (OTHERS.keys() | REFUSED_TOO)


@pytest.mark.parametrize("name", FREE)
def test_a_run_is_resumed_with_another(name):
    config = train.TrainConfig("/m", "/d", out="/o", dtype="float32")
    other = dataclasses.replace(config, **{name: FREE[name]})
    assert getattr(other, name) != getattr(config, name)
    refuse_other_settings(other, settings_of(config), Path("step-1"))
    refuse_other_settings(config, settings_of(other), Path("step-1"))


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_a_version_without_a_flag_had_its_default(name):
    config = train.TrainConfig("/m", "/d", out="/o")
    then = settings_of(config)
    del then[name]
    refuse_other_settings(config, then, Path("step-1"))
    other = dataclasses.replace(config, **{name: OTHERS[name]})
    with pytest.raises(ValueError, match=f"--resume: {name} was {getattr(config, name)!r} in step"):
        refuse_other_settings(other, then, Path("step-1"))


OFF = "warmup-steps grad-clip weight-decay adam-beta1 adam-beta2 eval-every save-every lora-rank "
OFF += "activation-checkpointing eval-fraction lam"


def test_zero_switches_off(arguments, tmp_path):
    """Two steps at the peak rate, clipped by nothing; no checkpoint, no best model, no adapters."""
    zeros = [word for name in OFF.split() for word in (f"--{name}", "0")]
    rows = steps(run(arguments, *zeros, "--max-steps", "2", "--lr-schedule", "constant"))
    assert [row["learning_rate"] for row in rows] == [3e-3, 3e-3]
    for row in rows:
        assert row["loss"] == pytest.approx(row["nll_loss"]) and row["rewards/chosen"] == 0
    assert rows[0]["grad_norm"] > 0 and rows[1]["loss"] < rows[0]["loss"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"metrics.jsonl", "run.json", "model", "finished"}


def test_the_settings_of_a_run_serve_on_another_machine(whole, tmp_path, capsys):
    """Without its device; and a run that was sharded is evaluated by one process."""
    settings = json.loads((whole.out / "run.json").read_text())
    assert "device" not in settings and settings["dtype"] == "float32"
    (tmp_path / "sharded.json").write_text(json.dumps(settings | {"shard": True}))
    flags = ["--model", str(whole.out / "model"), "--eval-only", "--device", "cpu"]
    capsys.readouterr()
    train.main(["--config", str(tmp_path / "sharded.json"), *flags])
    row = json.loads(capsys.readouterr().out)
    assert row["eval_loss"] == pytest.approx(evaluations(whole.rows)[-1]["eval_loss"], rel=1e-6)


def test_flags_win_over_the_config_and_its_paths_are_relative_to_it(folder, tmp_path):
    file = folder / "settings.json"
    settings = {"model": "model", "data": "train.jsonl", "out": "o", "lam": 0.25, "lr": 1e-3}
    file.write_text(json.dumps(settings))
    config = train.parse(["--config", str(file), "--lr", "2e-3"])
    assert (config.lam, config.lr) == (0.25, 2e-3)
    assert Path(config.model).resolve() == (folder / "model").resolve()
    assert Path(config.out).resolve() == (folder / "o").resolve()


@pytest.mark.parametrize("name", ["model", "data", "eval_data", "chat_template", "out"])
def test_every_path_of_a_config_is_relative_to_it_and_written_whole(name, tmp_path):
    settings = {"model": "/m", "data": "/d", "out": "/o"} | {name: "mine"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    config = train.parse(["--config", str(tmp_path / "settings.json")])
    assert Path(getattr(config, name)).resolve() == tmp_path / "mine"
    assert settings_of(config).get(name) == (None if name == "out" else str(tmp_path / "mine"))


def test_a_model_of_a_config_may_be_a_name_on_the_hub(tmp_path, monkeypatch):
    """Where no such folder lies beside the file; one in the current folder is not meant."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs" / "mine.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"model": "ORG/NAME", "data": "d", "out": "o"}))
    parsed = [train.parse(["--config", str(file)]).model]
    (tmp_path / "ORG" / "NAME").mkdir(parents=True)
    parsed.append(train.parse(["--config", str(file)]).model)
    (file.parent / "ORG" / "NAME").mkdir(parents=True)
    parsed.append(train.parse(["--config", str(file)]).model)
    assert parsed == ["ORG/NAME", "configs/ORG/NAME", "configs/ORG/NAME"]


def test_a_resumed_run_keeps_the_dtype_that_its_first_device_chose(tmp_path):
    """On a card of another kind the default may be another one, which nobody asked for."""
    (tmp_path / "run.json").write_text(json.dumps({"lam": 0.1, "dtype": "bfloat16"}))
    flags = ["--model", "m", "--data", "d", "--out", str(tmp_path)]
    assert train.parse(flags).dtype is None
    assert train.parse([*flags, "--resume"]).dtype == "bfloat16"
    assert train.parse([*flags, "--resume", "--dtype", "float32"]).dtype == "float32"


def test_no_flag_means_the_built_in_job():
    config = train.parse([])
    assert Path(config.model).resolve() == (FACTS / "base").resolve()
    assert Path(config.out).resolve() == ROOT / "out" / "builtin" and config.overwrite
    assert train.parse(["--config", str(BUILTIN)]) == config
    assert train.parse(["--seed", "7"]).seed == 7


def complaint(flags: list[str]) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train.parse(flags)
    return str(error.value)


GIVEN = ["--model", "m", "--data", "d", "--out", "o"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such"], "unrecognized arguments: --no-such (see python train.py --help)"),
        (["--max-step", "3"], "--max-step 3; did you mean --max-steps (number of updates"),
        (["--learning_rate=1"], "did you mean --lr (peak learning rate of AdamW)?"),
        (
            ["--beta", "1", "--bf16"],
            "did you mean --lam (weight of L_OR; TRL calls it beta) and",
        ),
        (["--eval-every", "2"], "--eval-every needs evaluation data: add --eval-data or --eval-fr"),
        (
            ["--eval-data", "e", "--eval-fraction", "0.1"],
            "--eval-fraction and --eval-data do not",
        ),
        (["--lr"], "argument --lr: expected one argument"),
        (["--lam", "much"], "argument --lam: invalid float value: 'much'"),
        (["--max-steps", "1.5"], "argument --max-steps: invalid int value: '1.5'"),
        (["--sft-loss", "half"], "argument --sft-loss: invalid choice: 'half'"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--lr", "nan"], "--lr must be at least 0, not nan"),
        (["--lr", "inf"], "--lr must be at least 0, not inf"),
        (["--lam", "-1"], "--lam must be at least 0, not -1.0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--adam-beta1", "1"], "--adam-beta1 must be at least 0 and below 1, not 1.0"),
        (["--adam-beta2", "1"], "--adam-beta2 must be at least 0 and below 1, not 1.0"),
        (["--seed", "-1"], "--seed must be at least 0 and below 9223372036854775808, not -1"),
        (["--seed", str(2**64)], "--seed must be at least 0 and below 9223372036854775808, not 18"),
        (["--lora-rank", "-1"], "--lora-rank must be at least 0, not -1"),
        (["--shard", "--lora-rank", "2"], "--shard and --lora-rank do not go together"),
        (["--lora-adapters"], "--lora-adapters needs --lora-rank"),
        (["--dry-run", "--eval-only"], "--dry-run plans a training run, and --eval-only is none"),
        (["--config", "nowhere.json"], "nowhere.json: no such file"),
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_named(flags, words):
    assert words in complaint([*GIVEN, *flags])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"lam": "0.1"}', "--lam must be a number, not '0.1'"),
        ('{"lr": NaN}', "--lr must be at least 0, not nan"),
        ('{"resume": 1}', "--resume must be true or false, not 1"),
        ('{"epochs": true}', "--epochs must be a whole number, not True"),
        ('{"sft_loss": "half"}', "--sft-loss must be one of response, full, not 'half'"),
        ('{"xyz": 1}', "unknown: xyz; known: model, data, "),
        ('{"num_train_epochs": 1}', "unknown: num_train_epochs; did you mean --epochs (passes"),
        ("[]", "a JSON object is expected, not list"),
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_config_names_its_file(tmp_path, text, words):
    file = tmp_path / "settings.json"
    file.write_text(text)
    assert complaint([*GIVEN, "--config", str(file)]).startswith(f"{file}: {words}")


def test_what_is_missing_is_asked_for():
    assert "--out is needed" in complaint(["--model", "m", "--data", "d"])
    assert "--eval-data is needed" in complaint(["--model", "m", "--eval-only"])
    held_out = ["--model", "m", "--eval-only", "--eval-fraction", "0.1"]
    assert "--data is needed" in complaint(held_out)


def test_the_flags_of_other_programs_lead_to_ours():
    ours = {f.name.replace("_", "-") for f in dataclasses.fields(train.TrainConfig)}
    theirs = " ".join(ELSEWHERE.values()).split()
    assert set(ELSEWHERE) <= ours and not set(theirs) & ours
    assert len(set(theirs)) == len(theirs)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu", "--device tpu: unknown; use cpu, cuda or cuda:1"),
        ("meta", "--device meta: only cpu and cuda are supported"),
        ("cuda:77", "--device cuda:77: this machine shows {} CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, words):
    with pytest.raises(ValueError) as error:
        pick_device(train.TrainConfig(device=device))
    assert str(error.value) == words.format(torch.cuda.device_count())


@pytest.mark.parametrize(("by_torchrun", "index"), [(True, None), (False, 0)])
def test_of_srun_each_process_may_see_only_its_own_card(by_torchrun, index, monkeypatch):
    monkeypatch.setattr("run.processes.is_one_of_several", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("run.processes.has_bfloat16", lambda device: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        with pytest.raises(ValueError, match="local rank 3"):
            pick_device(train.TrainConfig(device="cuda"))
    else:
        assert pick_device(train.TrainConfig(device="cuda")) == torch.device("cuda", index)


def test_processes_that_do_not_find_each_other_are_told_what_to_set(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed with ...\nmore")

    monkeypatch.setattr("run.processes.is_one_of_several", lambda: True)
    monkeypatch.setattr("torch.distributed.init_process_group", fails)
    with pytest.raises(ValueError, match=r"find each other \(Gloo .* \.\.\.\); set GLOO_SO"):
        pick_device(train.TrainConfig(device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused():
    with pytest.raises(ValueError, match="--device cuda: this machine shows 0 CUDA devices"):
        pick_device(train.TrainConfig(device="cuda"))


def test_a_configs_overwrite_is_about_the_folder_that_it_names_itself():
    """So that whoever names another --out loses nothing there."""
    assert train.parse(["--config", str(BUILTIN)]).overwrite
    assert not train.parse(["--config", str(BUILTIN), "--out", "mine"]).overwrite
    assert train.parse(["--config", str(BUILTIN), "--out", "mine", "--overwrite"]).overwrite


@pytest.mark.parametrize(
    ("device", "given", "tokens"),
    [("cpu", None, 2048), (None, None, 2048), ("cuda:1", None, 8192), ("cuda:1", 64, 64)],
)
def test_a_cpu_takes_fewer_tokens_at_a_time_than_a_gpu(device, given, tokens):
    config = train.TrainConfig(device=device, micro_batch_tokens=given)
    config.check()
    assert config.token_budget == tokens


@pytest.mark.parametrize(
    ("file", "by_hand", "name", "value"),
    [
        ({"max_steps": 5}, ["--epochs", "2"], "max_steps", None),
        ({"max_steps": 5}, ["--epochs", "2", "--max-steps", "3"], "max_steps", 3),
        ({"eval_fraction": 0.5}, ["--eval-data", "e"], "eval_fraction", 0.0),
        ({"eval_data": "e"}, ["--eval-fraction", "0.5"], "eval_data", None),
        ({"compile": True}, ["--no-compile"], "compile", False),
    ],
    ids=str,
)
def test_a_flag_by_hand_wins_over_what_the_file_says_in_other_words(
    file, by_hand, name, value, tmp_path
):
    (tmp_path / "c.json").write_text(json.dumps({"model": "m", "data": "d", "out": "o"} | file))
    config = train.parse(["--config", str(tmp_path / "c.json"), *by_hand])
    assert getattr(config, name) == value


def test_a_run_to_resume_needs_its_folder():
    with pytest.raises(ValueError, match="--resume needs --out"):
        train.parse(["--model", "m", "--data", "d", "--dry-run", "--resume"])


@pytest.mark.parametrize("template", [5, ["a"], None, "gone.jinja"])
def test_a_template_that_a_runs_settings_do_not_name_well_is_left_out(template, tmp_path, capsys):
    settings = {"lam": 0.5, "eval_data": "e", "chat_template": template}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    config = train.parse(["--eval-only", "--model", str(tmp_path / "model")])
    assert (config.lam, config.chat_template) == (0.5, None)
    assert "--lam 0.5" in capsys.readouterr().err
