"""Evaluation: before, after and in between, by itself, and answers that count as right."""

import json
import re
import shutil
from pathlib import Path

import pytest

import data
import train
from model import ModelConfig, Transformer
from run.answers import accepted
from tests.runs import evaluations, files, run


def test_evaluation_comes_before_the_first_update_and_after_the_last(whole):
    before, after = evaluations(whole.rows)
    assert (before["step"], after["step"]) == (0, 12)
    assert {"eval_accepted/sampled", "eval_accepted/greedy"} < set(before) == set(after)


def test_an_evaluation_is_told_at_once_and_beside_the_first_at_the_end(whole):
    lines = whole.printed.splitlines()
    rows = {row["step"]: row for row in evaluations(whole.rows)}
    for step, row in rows.items():
        accuracy, logps = row["eval_rewards/accuracies"], row["eval_logps/chosen"]
        text = f"step {step}: held out loss {row['eval_loss']:.3f}, accuracy {accuracy:.3f}, "
        text += f"logps {logps:.2f} / {row['eval_logps/rejected']:.2f}"
        assert text in lines
    for name in rows[0].keys() - {"step"}:
        assert f"{name:<28}{rows[0][name]:>10.4f}{rows[12][name]:>10.4f}" in lines


def test_evaluation_keeps_nothing_for_a_backward_pass(folder, monkeypatch):
    outputs, forward = [], train.forward

    def noted(*args):
        outputs.append(forward(*args))
        return outputs[-1]

    monkeypatch.setattr(train, "forward", noted)
    flags = ["--out", "o", "--micro-batch-tokens", "1", "--dtype", "float32"]
    config = train.parse([*files(folder), *flags])
    model, _, _, eval_pairs = train.load_inputs(config)
    train.evaluate(model, eval_pairs, config)
    assert len(outputs) > 1 and not any(output.loss.requires_grad for output in outputs)


def test_an_evaluation_is_the_same_however_it_is_cut(folder):
    flags = [*files(folder), "--out", "o", "--dtype", "float32"]
    config = train.parse([*flags, "--micro-batch-tokens", "1"])
    model, _, _, eval_pairs = train.load_inputs(config)
    cut = train.evaluate(model, eval_pairs, config)
    assert len(train.pack(eval_pairs, config)) == len(eval_pairs) > 1
    whole = train.evaluate(model, eval_pairs, train.parse(flags))
    assert cut == pytest.approx(whole, rel=1e-5)


def test_the_held_out_loss_goes_down(whole):
    before, after = evaluations(whole.rows)
    assert after["eval_loss"] < before["eval_loss"]


def test_eval_fraction_evaluates_on_a_part_of_the_rows_instead(folder, tmp_path, capsys):
    flags = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    flags += ["--out", str(tmp_path / "out"), "--max-steps", "1", "--device", "cpu"]
    rows = run(flags, "--eval-fraction", "0.25")
    assert [row["step"] for row in evaluations(rows)] == [0, 1]
    rows = data.load_preferences(folder / "train.jsonl")
    train_rows, held_out = data.hold_out(rows, 0.25, seed=42)
    printed = capsys.readouterr().out
    assert f"pairs of {len(train_rows)};" in printed and f"pairs of {len(held_out)};" in printed


def test_eval_only_prints_the_row_that_training_starts_with(arguments, whole, capsys):
    """And nothing else, but for what the row depends on."""
    train.main([*arguments, "--eval-only"])
    expected = whole.rows[0] | {"lam": 0.5, "sft_loss": "response"}
    assert json.loads(capsys.readouterr().out) == expected


def test_a_runs_config_evaluates_its_model_as_the_run_did(whole, capsys):
    """By its own lam, on its own rows."""
    flags = ["--config", str(whole.out / "run.json"), "--model", str(whole.out / "model")]
    train.main([*flags, "--eval-only"])
    expected = whole.rows[-1] | {"step": 0, "lam": 0.5, "sft_loss": "response"}
    row = json.loads(capsys.readouterr().out)
    # The seed of sampled answers goes with the step.
    assert row | {"eval_accepted/sampled": 0} == expected | {"eval_accepted/sampled": 0}


def evaluates(capsys, *flags: str) -> tuple[dict, str]:
    """What --eval-only prints on stdout and on stderr."""
    capsys.readouterr()
    train.main(["--eval-only", "--device", "cpu", *map(str, flags)])
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_a_model_in_a_run_is_evaluated_as_the_run_did(whole, capsys):
    """And a line says so, with the flags that do the same anywhere."""
    row, said = evaluates(capsys, "--model", whole.out / "model")
    expected = whole.rows[-1] | {"step": 0, "lam": 0.5, "sft_loss": "response"}
    assert row | {"eval_accepted/sampled": 0} == expected | {"eval_accepted/sampled": 0}
    (line,) = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert line.startswith(f"train.py: as the run in {whole.out}: --data ")
    flags = line.split(": ")[2].split()
    assert flags[flags.index("--lam") + 1] == "0.5"
    again, said = evaluates(capsys, *flags, "--model", whole.out / "model")
    assert again == row and "as the run in" not in said


def test_a_flag_wins_over_the_run_in_which_a_model_lies(folder, tmp_path, capsys):
    """Rows count as one: with other --eval-data nothing of the run's data is left."""
    flags = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    flags += ["--eval-fraction", "0.25", "--lam", "0", "--sft-loss", "full", "--device", "cpu"]
    run(flags, "--out", str(tmp_path / "out"), "--max-steps", "1", "--max-length", "40")
    model = ["--model", tmp_path / "out" / "model"]
    row, _ = evaluates(capsys, *model)
    assert (row["lam"], row["sft_loss"]) == (0, "full")
    assert row["eval_loss"] == pytest.approx(row["eval_nll_loss"])
    more = ["--lam", "2", "--max-length", "64", "--eval-data", folder / "eval.jsonl"]
    row, said = evaluates(capsys, *model, *more)
    assert (row["lam"], row["sft_loss"]) == (2, "full")
    taken = re.findall(r"--([\w-]+)", said.splitlines()[0])
    assert taken == ["sft-loss", "date", "max-prompt-length", "seed", "dtype"]


def test_a_copy_of_a_model_is_evaluated_as_any_other(whole, folder, tmp_path, capsys):
    model = shutil.copytree(whole.out / "model", tmp_path / "copy")
    row, said = evaluates(capsys, "--model", model, "--eval-data", folder / "eval.jsonl")
    assert row["lam"] == 0.1 and "as the run in" not in said


def test_the_template_of_a_run_is_that_in_its_model(whole, tmp_path, capsys):
    """The file of --chat-template may have gone; where the model has none it is still used."""
    out = shutil.copytree(whole.out, tmp_path / "out")
    (out / "model" / "chat_template.jinja").unlink()
    settings = json.loads((out / "run.json").read_text())
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    (out / "run.json").write_text(json.dumps(settings | {"chat_template": str(template)}))
    flags = ["--model", out / "model"]
    assert f"--chat-template {template}" in evaluates(capsys, *flags)[1]
    shutil.copyfile(template, out / "model" / "chat_template.jinja")
    assert "--chat-template" not in evaluates(capsys, *flags)[1]
    (out / "model" / "chat_template.jinja").unlink()
    template.unlink()
    assert "--chat-template" not in evaluates(capsys, *flags)[1]


def test_eval_only_evaluates_on_what_was_held_out(folder, tmp_path, capsys):
    flags = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    flags += ["--eval-fraction", "0.25", "--device", "cpu"]
    before, _ = evaluations(run(flags, "--out", str(tmp_path / "out"), "--max-steps", "1"))
    capsys.readouterr()
    train.main([*flags, "--eval-only"])
    row = json.loads(capsys.readouterr().out)
    assert {name: row[name] for name in before} == before


def test_what_eval_only_leaves_is_no_run_to_protect(arguments):
    train.main([*arguments, "--eval-only"])
    assert len(run(arguments, "--max-steps", "1")) == 3


def test_eval_only_leaves_the_rows_of_a_run_alone(arguments, whole, tmp_path):
    (tmp_path / "out").mkdir()
    metrics = Path(shutil.copy(whole.out / "metrics.jsonl", tmp_path / "out"))
    before = metrics.read_bytes()
    train.main([*arguments, "--eval-only"])
    assert metrics.read_bytes() == before


@pytest.mark.parametrize("said", ["y", "y z", "Y", ""], ids=repr)
def test_only_an_exact_answer_is_accepted(said, monkeypatch):
    """Two of three rows list what they accept. The sampled answers are both right, and of the
    greedy ones half is: the first, "x", but not another text than "z" or "yz"."""
    monkeypatch.setattr(
        "run.answers.answers",
        lambda *args, temperature, **_: ["x", "yz"] if temperature else ["x", said],
    )
    pair = data.Pair([1, 5], [6, 2], [7, 2])
    pairs = [pair._replace(accept=accept) for accept in ([" x\n"], None, ["z", "yz"])]
    shares = accepted(Transformer(ModelConfig(10, 8, 1, 1, 8)), None, pairs, 0)
    assert shares == {"eval_accepted/sampled": 1.0, "eval_accepted/greedy": 0.5}


def test_evaluation_comes_every_so_many_steps(arguments):
    rows = run(arguments, "--max-steps", "5", "--eval-every", "2")
    assert [row["step"] for row in evaluations(rows)] == [0, 2, 4, 5]
