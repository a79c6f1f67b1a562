"""conformance/run.py: that it passes what is right, and that it is able to fail the rest."""

import re
import sys

import pytest
import torch

from conformance import implementations, judge, run

pytest.importorskip("trl.experimental.orpo.orpo_trainer")
pytest.importorskip("liger_kernel.chunked_loss")

CASES = judge.golden_cases()
ROWS = {(one.name, one.level): one for one in implementations.IMPLEMENTATIONS}


def row(name: str, level: str) -> dict[str, str]:
    """Its row of the table of golden vectors, by the heads of the columns."""
    text = run.scores([ROWS[name, level]], level)
    heads, _, cells = ([x.strip() for x in line.split(" | ")] for line in text.splitlines())
    return dict(zip((x.strip("| ") for x in heads), (x.strip("| ") for x in cells), strict=True))


@pytest.mark.parametrize(("level", "n"), [("pairs", "152"), ("logits", "30")])
def test_ours_is_right_everywhere(level, n):
    ours = row("ours", level)
    assert ours["cases"] == n
    assert ours["values right"] == ours["gradients right"] == f"{n}, {n}, {n}"
    assert ours["NaN or inf where finite"] == "0, 0, 0"
    assert ours["first NaN or inf, float32"] == "nowhere"


@pytest.mark.parametrize("level", ["pairs", "logits"])
@pytest.mark.parametrize("name", ["TRL", "Liger", "LLaMA-Factory"])
def test_a_peer_is_right_on_ordinary_cases_and_nan_at_certainty(name, level):
    """When this fails, a peer has become better or worse, and the committed table is old."""
    peer = row(name, level)
    of_ordinary = peer["of ordinary ones"].split(" of ")
    assert of_ordinary[0] == of_ordinary[1]
    assert int(peer["gradients right"].split(",")[0]) < int(peer["cases"])
    assert int(peer["NaN or inf where finite"].split(",")[0]) > 0
    place = peer["first NaN or inf, float32"]
    if level == "logits":
        assert place.startswith("chosen leads by 1")
    else:
        assert 2.4e-8 < float(re.match(r"log P_w > -([\d.e-]+)", place)[1]) < 3.1e-8


@pytest.mark.parametrize("name", ["authors, first", "authors, last"])
def test_the_authors_formula_is_right_and_what_they_put_into_it_is_not(name):
    assert row(name, "pairs")["of ordinary ones"] == "48 of 48"
    assert row(name, "pairs")["first NaN or inf, float32"].endswith("log P_w < -710")
    assert row(name, "logits")["L_SFT over"] == "neither"


def test_bisection_finds_where_float32_rounds_p_to_one():
    """exp(-t) is 1 in float32 for t up to half of the spacing below 1: 2^-25, 2.98e-8; a CPU whose
    vectorised exp is not rounded to the nearest says so a little before."""
    sweep = run.SWEEPS[0]
    trl = ROWS["TRL", "pairs"].function
    t = run.first_break(trl, sweep, torch.float32, run.lost)
    assert 0.8 * 2.0**-25 < t < 1.01 * 2.0**-25


ANSWERS = {
    "weight of a prompt token": {"ours": 0, "TRL": 1 / 5, "Liger": 1 / 5, "authors, last": 1 / 4},
    "weight of its EOS": {"ours": 1 / 3, "TRL": 1 / 5, "authors, last": 0},
    "weight of a padding": {"ours": 0, "TRL": 0, "authors, first": 1 / 7},
    "terms in the mean": {"ours": 3, "TRL": 3, "LLaMA-Factory": 3, "authors, last": 4},
    "spacing of the loss": {"ours": 2**-23, "TRL": 2**-23, "authors, last": 2**-7},
}


@pytest.mark.parametrize("question", ANSWERS)
def test_the_questions_find_what_is_known(question):
    """By hand: 2 prompt rows, 3 of the chosen response, 2 of padding."""
    [quirk] = [q for q in judge.QUIRKS if q.question.startswith(question)]
    for name, answer in ANSWERS[question].items():
        got = quirk.measure(ROWS[name, "logits"].function)
        assert got == pytest.approx(answer, rel=1e-5, abs=1e-6), name


def test_cutting_a_step_moves_the_gradient_of_a_token_mean_only():
    change = judge.change_by_cutting
    assert change(ROWS["ours", "logits"].function) < 1e-12
    assert change(ROWS["TRL", "logits"].function) > 0.05


# ---------------------------------------------------------------------------------------------
# Somebody's own.

YOURS = """
import torch
import torch.nn.functional as F

def probability_ratio(chosen_logps, rejected_logps):
    return -F.logsigmoid(chosen_logps - rejected_logps)

def sums(batch):
    total = 0
    for s, sign in zip(batch[:2], (-1, 1)):
        total = total + sign * (s.logits.log_softmax(-1)[..., 0] * s.response).sum()
    return total

def three(a, b, c):
    return a

def a_number(chosen_logps, rejected_logps):
    return 1.0
"""


@pytest.fixture
def yours(tmp_path):
    path = tmp_path / "yours.py"
    path.write_text(YOURS)
    return path


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, flags)])
    run.main()


def counts(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} | yours"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", ["probability_ratio", "sums"])
def test_a_wrong_implementation_of_your_own_is_caught(name, yours, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "N_STEPS", 12)  # the places are not looked at here
    out = tmp_path / "tables.md"
    run_main(monkeypatch, "--implementation", f"{yours}:{name}", "--out", out)
    text = out.read_text()
    assert text.strip() in capsys.readouterr().out
    n_right, n_ordinary = next(x for x in counts(text, name) if " of " in x).split(" of ")
    assert int(n_right) < int(n_ordinary)


BAD = [
    (["--implementation", "nowhere.py:f"], "no file"),
    (["--implementation", "{}"], "no file"),
    (["--implementation", "{}:missing"], "missing"),
    (["--implementation", "{}:three"], "3 arguments"),
    (["--implementation", "{}:a_number"], "a tensor is wanted"),
    (["--nonsense"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("flags", "says"), BAD)
def test_bad_arguments_are_one_sentence_and_status_2(flags, says, yours, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *(flag.format(yours) for flag in flags))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and says in err and len(err.splitlines()) == 1
