"""prepare.py, sample.py, plot.py and compare.py."""

import gzip
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import data
import orpo
import train

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
# compare.py

sys.path.insert(0, str(ROOT / "examples"))

import compare  # noqa: E402
import compare_measures as measures  # noqa: E402
import compare_report as report  # noqa: E402
import task as task_file  # noqa: E402

TINY = compare.Task(
    *(str(BASE), str(BASE.parent / "train.jsonl"), str(BASE.parent / "eval.jsonl")),
    *(True, list(compare.LOSSES), [1e-3], [1], 2, 4, 3, 8),
)


@pytest.fixture(scope="module")
def base_and_pairs():
    model, _, (pairs, _), _ = compare.load(TINY)
    return model, pairs[:4]


def test_dpo_loss_by_hand():
    """beta 0.1; log-ratios 4 - 2 = 2 and (-1) - (-3) = 2 apart by (-3 + 9) - (-5 + 7) = 4:
    -log sigmoid(0.4) = log(1 + e^-0.4) = 0.5130. And ln 2 where policy and reference agree."""

    def sums(chosen: float, rejected: float) -> compare.Logps:
        x = torch.tensor([chosen]), torch.tensor([rejected])
        return compare.Logps(*x, *x)

    policy, reference = sums(-3.0, -9.0), sums(-5.0, -7.0)
    assert compare.dpo_loss(policy, reference).item() == pytest.approx(0.5130153)
    assert compare.dpo_loss(policy, policy).item() == pytest.approx(math.log(2))


def test_ratio_loss_by_hand():
    """-0.5 chosen, -1.5 rejected: 0.5 + 0.5 * log(1 + e^-1) = 0.5 + 0.5 * 0.313262; and with
    beta 0.2, 0.5 + 0.5 * log(1 + e^-0.2) = 0.5 + 0.5 * 0.598139."""
    pair = torch.tensor([-0.5]), torch.tensor([-1.5])
    assert compare.ratio_loss(*pair, lam=0.5).item() == pytest.approx(0.656631, abs=1e-6)
    assert compare.ratio_loss(*pair, lam=0.5, beta=0.2).item() == pytest.approx(0.79907, abs=1e-5)


def test_orpo_is_train_pys_and_the_chosen_branch_alone_is_sfts(base_and_pairs):
    """Values and gradients, by the path of the comparison and by fused_linear_orpo."""
    model, pairs = base_and_pairs
    for method, lam in ((compare.ORPO[0.5], 0.5), (compare.SFT, 0.0)):
        batch = compare.pack(pairs, chosen_only=method == compare.SFT)
        ours = compare.LOSSES[method](compare.logps(model, batch), None)
        ours.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        theirs = train.forward(model, compare.pack(pairs, False), lam)
        theirs.loss.backward()
        torch.testing.assert_close(ours, theirs.loss, rtol=1e-5, atol=1e-6)
        for p, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5)
        model.zero_grad()


@torch.no_grad()
def test_logps_are_those_of_each_sequence_alone(base_and_pairs):
    """By the plain path: sums are the means of orpo.response_logps times the tokens."""
    model, pairs = base_and_pairs
    found = compare.logps(model, compare.pack(pairs, chosen_only=False))
    for side in ("chosen", "rejected"):
        for pair, total, mean in zip(
            pairs, getattr(found, f"{side}_sum"), getattr(found, side), strict=True
        ):
            response = getattr(pair, side)
            tokens = torch.tensor([[*pair.prompt, *response]])
            mask = torch.arange(1, tokens.shape[1])[None] >= len(pair.prompt)
            alone = orpo.response_logps(model(tokens[:, :-1]), tokens[:, 1:], mask)
            assert mean.item() == pytest.approx(alone.item(), abs=1e-5)
            assert total.item() == pytest.approx(alone.item() * len(response), abs=1e-4)


def test_forward_passes_are_counted_where_they_enter_the_model(base_and_pairs):
    model, pairs = base_and_pairs
    counts = measures.count_forward(model)
    for chosen_only in (True, False):
        compare.logps(model, compare.pack(pairs, chosen_only))
    del model.hidden_states  # the method again
    chosen = sum(len(p.prompt) + len(p.chosen) for p in pairs)
    assert counts == {"responses": 3 * 4, "tokens": chosen + sum(p.n_tokens for p in pairs)}


def test_similarity_and_diversity_of_known_vectors():
    """Two questions of two answers: (1,0), (0,1) are at 0; (1,1), (2,2) at 1. First answers (1,0)
    and (1,1): 1/sqrt 2. Of three, (1,0), (0,1), (1,1): (0 + 2/sqrt 2)/3."""
    x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 2]])
    pid, aid = measures.diversity(x, k=2)
    assert (pid, aid) == pytest.approx((0.5, 2**-0.5))
    assert measures.similarity(x[:3]) == pytest.approx(2**0.5 / 3)


def test_an_answer_is_embedded_as_it_would_be_alone(base_and_pairs):
    model, _ = base_and_pairs
    tokenizer = data.load_tokenizer(BASE)
    texts = ["The capital of Peru is Lima.", "", "Lima."]
    for text, x in zip(texts, measures.embed(model, tokenizer, texts), strict=True):
        (alone,) = measures.embed(model, tokenizer, [text])
        torch.testing.assert_close(x, alone, rtol=1e-4, atol=1e-5)


def test_win_rate_counts_ties_as_half():
    """Four samples of a against b: won, lost, both accepted, neither; then one more won."""
    a, b = [[True, False], [True, False]], [[False, True], [True, False]]
    assert report.win_rate(a, b) == 0.5
    assert report.win_rate([*a, [True]], [*b, [False]]) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 1.1, 0.9], True),
        ([0.1, 0.1, 3.0], False),  # mean 1.07, standard error 0.97
        ([1.0, 1.0, 1.0, 1.0, -0.01], False),  # mean 0.80, standard error 0.20
        ([2.0], True),
    ],
)
def test_a_difference_is_clear_with_every_seed_and_beyond_its_error(differences, expected):
    assert report.clear(differences) is expected


def made_up_results(chosen: float, rejected: float, of: dict) -> dict:
    """Three seeds; every method ends at (chosen, rejected) from (-1, -1), or where `of` says."""

    def one(method: str, jitter: float) -> dict:
        end = of.get(method, {})
        w, l = end.get("chosen", chosen) + jitter, end.get("rejected", rejected) - jitter
        first = {"step": 0, "chosen": -1.0, "rejected": -1.0, "near": -1.0, "margin": 0.0}
        curve = [first | {"accuracy": 0.5}]
        curve.append({"step": 2, "chosen": w, "rejected": l, "near": l, "margin": w - l})
        curve[1]["accuracy"] = 1.0
        sampled = [[True] * end.get("right", 3) + [False] * (5 - end.get("right", 3))]
        figures = {"curve": curve, "score": 0.5, "sampled": sampled, "greedy": [[True]]}
        for name in ("PID", "AID", "PID raw", "AID raw"):
            figures[name] = end.get(name, 0.5) + jitter
        return figures

    methods = list(compare.LOSSES)
    part = {
        "seconds": [0.1, 0.2],
        "cpu_seconds": [0.1, 0.1],
        "tokens": 9.0,
        "once": 0.0,
        "process_bytes": 0,
    }
    part |= {"tensor_bytes": 2**20, "weight_bytes": 2**20, "responses": 2.0}
    costs = {m: [part] for m in (*methods, report.ONCE)}
    costs[report.DPO] = [part | of.get("cost", {})]
    return {
        "task": TINY._asdict() | {"seeds": [1, 2, 3]},
        **{"dpo_beta": 0.1, "ratio_beta": 1.0, "k": 5, "lr": dict.fromkeys(methods, 1e-3)},
        "sweep": {m: {"0.001": one(m, 0.0)} for m in methods},
        "runs": {m: [one(m, j) for j in (0.0, 0.01, 0.02)] for m in ("base model", *methods)},
        "cost": costs,
        "chosen answers": {"AID": 0.5, "AID raw": 0.5},
        "seconds": {"by the clock": 1.0, "all runs, added up": 1.0},
        "machine": dict.fromkeys(("cpu", "cores", "torch", "python", "date", "command"), "x"),
    }


ORPO = compare.ORPO
YES_AND_NO = {  # figures on which a claim holds, and on which it does not
    report.sft_raises_both: ((-0.5, -0.7, {}), (-0.5, -1.3, {})),
    report.orpo_separates: (
        (-0.5, -2.0, {report.SFT: {"rejected": -1.0}}),
        (-1.5, -2.0, {report.SFT: {"rejected": -1.0}}),
    ),
    report.ratio_over_suppresses: (
        (-0.5, -2.0, {report.RATIO: {"rejected": -4.0}}),
        (-0.5, -2.0, {report.RATIO: {"rejected": -2.0}}),
    ),
    report.larger_lam_widens: (
        (-0.5, -2.0, {ORPO[0.1]: {"rejected": -1.0}, ORPO[1.0]: {"rejected": -3.0}}),
        (-0.5, -2.0, {ORPO[0.1]: {"rejected": -1.0}, ORPO[1.0]: {"rejected": -1.5}}),
    ),
    report.half_the_forward_passes: (
        (-0.5, -2.0, {"cost": {"responses": 4.0, "tensor_bytes": 2**21}}),
        (-0.5, -2.0, {"cost": {"responses": 3.0, "tensor_bytes": 2**21}}),
    ),
    report.less_alike_across_inputs: (
        (-0.5, -2.0, {report.DPO: {"AID": 0.7, "PID": 0.2}}),
        (-0.5, -2.0, {report.DPO: {"AID": 0.7, "PID": 0.5}}),
    ),
    report.better_than_sft: (
        (-0.5, -2.0, {ORPO[0.5]: {"right": 4}}),
        (-0.5, -2.0, {report.SFT: {"right": 4}}),
    ),
}


@pytest.mark.parametrize("judge", report.VERDICTS)
def test_a_verdict_can_come_out_either_way(judge):
    yes, no = (judge(made_up_results(*figures)) for figures in YES_AND_NO[judge])
    assert yes.reproduced and str(yes).startswith("REPRODUCED: ")
    assert not no.reproduced and str(no).startswith("NOT REPRODUCED: ")


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_report_is_written_with_its_figures(tmp_path):
    report.write_report(made_up_results(-0.5, -2.0, {}), tmp_path)
    text = (tmp_path / "README.md").read_text()
    for verdict in json.loads((tmp_path / "results.json").read_text())["verdicts"]:
        assert verdict["claim"] in text and verdict["figures"] in text
    for name in ("logps.svg", "margin.svg"):
        assert name in text and "<svg" in (tmp_path / name).read_text()


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


@pytest.mark.parametrize("method", [compare.DPO, compare.ORPO[0.5]])
def test_a_run_trains_measures_and_is_not_repeated(tmp_path, method):
    job = compare.Job(method, 1e-3, 1e-3, 1, sweep=False)
    done = compare.kept(tmp_path / "run.json", job, compare.run, job, TINY)
    assert [row["step"] for row in done["curve"]] == [0, 2]
    assert done["curve"][1]["chosen"] > done["curve"][0]["chosen"]
    assert [len(answers) for answers in done["sampled"]] == [5, 5, 5]
    assert compare.kept(tmp_path / "run.json", job, None) == done


def test_the_sweep_holds_answers_out_and_not_only_prompts():
    *_, (pairs, rows), _ = compare.load(TINY)
    (_, kept), (_, apart) = compare.without(pairs, rows)
    assert len(kept) + len(apart) == len(rows) and len(apart) > len(rows) / 10
    assert not {row.accept[0] for row in kept} & {row.accept[0] for row in apart}


def test_what_a_step_costs_is_counted():
    found = {m: compare.cost(m, TINY, 1) for m in (ORPO[0.5], report.DPO, report.ONCE)}
    passes = [(x["responses"], x["once"]) for x in found.values()]
    assert passes == [(2, 0), (4, 0), (2, 2)]
    orpo, dpo, once = (x["tensor_bytes"] for x in found.values())
    assert dpo > orpo and once == pytest.approx(orpo, rel=0.02)


@pytest.mark.slow
def test_the_whole_comparison_at_tiny_size(tmp_path):
    results = compare.compare(TINY, tmp_path, rounds=1)
    report.write_report(results, tmp_path / "report")
    assert (tmp_path / "report" / "README.md").is_file()
    assert results["cost"][report.DPO][0]["responses"] == 4


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
