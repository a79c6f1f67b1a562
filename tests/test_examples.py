"""prepare.py, sample.py, plot.py and task.py."""

import gzip
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import data

ROOT = Path(data.__file__).resolve().parent
BASE = ROOT / "examples" / "facts" / "base"
PERU = "Question: What is the capital of Peru?\nAnswer:"


def run(script: str, *arguments, code: int = 0) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, input="\n")
    assert done.returncode == code, done.stderr
    return done


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: See you.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Whatever.",
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz"])
def test_prepare_turns_hh_rlhf_into_dialogues_and_counts_what_it_drops(tmp_path, kind):
    rows = [
        HH,
        {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"},
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "Human: a"},
        HH | {"rejected": "\n\nHuman: Hello\n\nAssistant: No."},
        {"prompt": "p", "score": 3},
        {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 9.5},
    ]
    text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    file, out = tmp_path / f"rows.{kind}", tmp_path / "out.jsonl"
    file.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    printed = run("prepare.py", file, "--out", out).stdout
    assert "2 rows" in printed
    for reason in ("turns", "part before", "end with a question", "without chosen"):
        assert f"1 {reason}" in printed or reason in printed
    dialogue, strings = data.load_preferences(out)
    assert [m["content"] for m in dialogue.prompt] == ["Hi", "Hello.", "Bye"]
    assert dialogue.chosen == [{"role": "assistant", "content": "See you."}]
    assert (strings.prompt, strings.chosen, strings.rejected) == ("p", "c", "r")


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b"{"), ("a.json", b"[1,"), ("a.jsonl.gz", b"x")]
)
def test_prepare_names_a_broken_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    error = run("prepare.py", tmp_path / name, "--out", tmp_path / "out", code=2).stderr
    assert name in error and len(error.splitlines()) == 1


@pytest.mark.skipif(find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_prepare_asks_for_pyarrow_where_parquet_needs_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    error = run("prepare.py", tmp_path / "a.parquet", "--out", tmp_path / "out", code=2).stderr
    assert "a.parquet: parquet needs pyarrow" in error


def test_prepare_keeps_the_file_it_was_to_write_when_all_fails(tmp_path):
    out = tmp_path / "pairs.jsonl"
    out.write_text(json.dumps(HH) + "\n")
    run("prepare.py", tmp_path / "nowhere.jsonl", "--out", out, code=2)
    assert out.read_text() == json.dumps(HH) + "\n"
    run("prepare.py", out, "--out", out)  # onto itself
    assert len(data.load_preferences(out)[0].prompt) == 3


def test_sample_streams_one_answer(tmp_path):
    said = run("sample.py", BASE, PERU, "--max-new-tokens", "20").stdout
    assert said.strip()


def test_sample_writes_alpacaeval_and_mt_bench_files(tmp_path):
    """The same question as AlpacaEval's set and as the first turn of MT-Bench's."""
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": PERU}, {"instruction": "Hi"}])
    )
    (tmp_path / "mt.jsonl").write_text(json.dumps({"question_id": 81, "turns": [PERU, "And?"]}))
    options = ("--max-new-tokens", "20", "--name", "tiny", "--out")
    run("sample.py", BASE, "--file", tmp_path / "alpaca.json", *options, tmp_path / "a.json")
    run("sample.py", BASE, "--file", tmp_path / "mt.jsonl", *options, tmp_path / "m.jsonl")
    alpaca = json.loads((tmp_path / "a.json").read_text())
    assert [set(row) for row in alpaca] == [{"instruction", "output", "generator"}] * 2
    assert alpaca[0]["instruction"] == PERU and alpaca[0]["generator"] == "tiny"
    (judged,) = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert (judged["question_id"], judged["model_id"]) == (81, "tiny")
    turns = judged["choices"][0]["turns"]
    assert len(turns) == 2 and turns[0] == alpaca[0]["output"]


def test_sample_says_what_is_wrong_with_its_input(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"text": "?"}')
    error = run(
        "sample.py", BASE, "--file", tmp_path / "q.jsonl", "--out", tmp_path / "a", code=2
    ).stderr
    assert "q.jsonl: row 1" in error
    assert "no such file" in run("sample.py", tmp_path / "nowhere", "?", code=2).stderr


# ---------------------------------------------------------------------------------------------
# task.py

sys.path.insert(0, str(ROOT / "examples"))

import task as task_file  # noqa: E402


def test_the_chosen_answer_is_the_better_of_two_manners():
    rng = task_file.random.Random(1)
    facts, trained_on, held_out = task_file.split(rng)
    by_good = {task_file.state(fact): fact for fact in trained_on}
    rows = task_file.pairs(trained_on, 2, trained_on, rng)
    assert len(rows) == 2 * len(trained_on)
    n_good = 0
    for row in rows:
        fact = by_good[row["accept"][0]]
        said = [row[side][0]["content"] for side in ("chosen", "rejected")]
        better, worse = (task_file.manner_of(text, fact, facts) for text in said)
        better, worse = (m.split(",")[0] for m in (better, worse))
        assert task_file.RANKS.index(better) < task_file.RANKS.index(worse), row
        n_good += said[0] in row["accept"]
    assert 0.2 < n_good / len(rows) < 0.45  # the chosen answer is seldom good
    assert not {row["accept"][0] for row in rows} & {task_file.state(fact) for fact in held_out}


@pytest.mark.parametrize("manner", task_file.ANSWERS)
def test_the_manner_of_an_answer_is_found_in_its_text(manner):
    rng = task_file.random.Random(0)
    facts, *_ = task_file.split(rng)
    for fact in rng.sample(facts, 60):
        text = task_file.answer(fact, manner, facts, rng)
        assert task_file.manner_of(text, fact, facts).split(",")[0] == manner, text
    assert task_file.manner_of("Lima? " + text, fact, facts) == "other"


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot_draws_one_run_and_several(tmp_path):
    names = ("logps/chosen", "logps/rejected", "rewards/accuracies", "nll_loss", "log_odds_ratio")
    row = dict.fromkeys(names, -0.25)
    held_out = {f"eval_{name}": x for name, x in row.items()} | {"step": 0, "eval_loss": 1.0}
    for run_name in ("one", "two", "three"):
        (tmp_path / run_name).mkdir()
        rows = [held_out, *({"step": i, "loss": 1.0, **row} for i in (1, 2))]
        text = "".join(json.dumps(x) + "\n" for x in rows)
        (tmp_path / run_name / "metrics.jsonl").write_text(text)
    run("plot.py", tmp_path / "one")
    assert "<svg" in (tmp_path / "one" / "curves.svg").read_text()
    outs = (tmp_path / "one", tmp_path / "two", tmp_path / "three")
    run("plot.py", *outs, "--save", tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
