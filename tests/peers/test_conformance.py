"""conformance/: that it passes what is right, that it is able to fail the rest, and that what
docs/conformance.md says of each implementation is what comes out of it."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

from conformance import judge, run
from conformance.implementations import IMPLEMENTATIONS

pytest.importorskip("trl.experimental.orpo.orpo_trainer")
pytest.importorskip("liger_kernel.chunked_loss")

ROWS = {(one.name, one.level): one for one in IMPLEMENTATIONS}
HALF = math.log(1 / 2)


def row(name: str, level: str) -> dict[str, str]:
    """Its row of the table of golden vectors, by the heads of the columns."""
    text = run.scores([ROWS[name, level]], level)
    heads, _, cells = ([x.strip() for x in line.split(" | ")] for line in text.splitlines())
    return dict(zip((x.strip("| ") for x in heads), (x.strip("| ") for x in cells), strict=True))


# ---------------------------------------------------------------------------------------------
# The golden vectors.


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
    assert row(name, "logits")["of ordinary ones"] == "0 of 8"


RIGHT_FROM_LOGPS = [
    "tunix, after #1574",
    "mlx-lm-lora, after #88",
    "mlx-vlm",
    "unsloth, MLX",
    "RLHF book",
]


@pytest.mark.parametrize("name", RIGHT_FROM_LOGPS)
def test_these_formulas_are_right_away_from_certainty(name):
    assert run.judged(ROWS[name, "pairs"], judge.FLOAT32).counts("ordinary") == (48, 48)


def test_axolotl_is_right_away_from_certainty_but_for_its_last_digits():
    """The logarithm of a sigmoid is off by 1.5e-5 at log P of -1/16 and -4. The authors write so
    too, but in float64."""
    name, chosen, rejected = "axolotl, orpo_compute_loss", -1 / 16, -4.0
    for what in range(3):
        wanted = judge.at(chosen, rejected, what)(None)
        got = judge.at(chosen, rejected, what, judge.FLOAT32)(ROWS[name, "pairs"].function)
        assert got == pytest.approx(wanted, rel=1e-4)
    n_right, n = run.judged(ROWS[name, "pairs"], judge.FLOAT32).counts("ordinary")
    assert n - 2 <= n_right <= n


@pytest.mark.parametrize("name", ["unsloth, MLX", "RLHF book"])
def test_these_are_right_from_logits_too(name):
    assert run.judged(ROWS[name, "logits"], judge.FLOAT32).counts("ordinary") == (4, 4)


LIMITED = ["tunix, after #1574", "mlx-lm-lora, after #88", "unsloth, MLX", "RLHF book"]


@pytest.mark.parametrize("level", ["pairs", "logits"])
@pytest.mark.parametrize("name", LIMITED)
def test_a_limit_below_certainty_keeps_nan_away(name, level):
    result = run.judged(ROWS[name, level], judge.FLOAT32)
    assert result.sum_of("not_finite") == 0
    n_right, n = result.counts("edge")
    assert n_right < n  # but the limit is not what comes out


def test_bisection_finds_where_float32_rounds_p_to_one():
    """exp(-t) is 1 in float32 for t up to half of the spacing below 1: 2^-25, 2.98e-8; a CPU whose
    vectorised exp is not rounded to the nearest says so a little before."""
    sweep = run.SWEEPS[0]
    trl = ROWS["TRL", "pairs"].function
    t = run.first_break(trl, sweep, torch.float32, run.not_finite)
    assert 0.8 * 2.0**-25 < t < 1.01 * 2.0**-25


# ---------------------------------------------------------------------------------------------
# What each computes. By hand: 2 prompt rows, 3 of the chosen response, 2 of padding.

ANSWERS = {
    "prompt": {"ours": 0, "TRL": 1 / 5, "Liger": 1 / 5, "authors, last": 1 / 4, "tunix": 0},
    "EOS": {"ours": 1 / 3, "TRL": 1 / 5, "authors, last": 0, "mlx-lm-lora, after #88": 1 / 2},
    "padding": {
        "ours": 0,
        "TRL": 0,
        "authors, first": 1 / 7,
        "axolotl, orpo_compute_loss": 1 / 7,
        "ColossalAI": 1 / 7,
        "mlx-vlm": 1 / 6,
    },
    "terms": {
        "ours": 3,
        "TRL": 3,
        "LLaMA-Factory": 3,
        "authors, last": 4,
        "axolotl, orpo_compute_loss": 4,
        "mlx-lm-lora": 0,
        "mlx-lm-lora, after #88": 2,
        "mlx-vlm": 6,
    },
    # tunix: odds 1/7 of a product 1/8, odds 1/3 of a product 1/4; so L_OR = ln(1 + 7/3).
    "lengths": {
        "ours": math.log(2),
        "TRL": math.log(2),
        "RLHF book": math.log(2),
        "tunix": math.log(10 / 3),
        "tunix, after #1574": math.log(2),
    },
    # mlx-lm-lora without the first tokens: odds 1/9 and 3/7, so L_OR = ln(1 + 27/7).
    "spread": {
        "ours": math.log(2),
        "TRL": math.log(2),
        "mlx-lm-lora, after #88": math.log(34 / 7),
    },
    "spacing": {
        "ours": 2**-23,
        "TRL": 2**-23,
        "authors, last": 2**-7,
        "axolotl, orpo_compute_loss": 2**-7,
    },
}


@pytest.mark.parametrize("question", ANSWERS)
def test_the_questions_find_what_is_known(question):
    [quirk] = [q for q in judge.QUIRKS if q.name == question]
    for name, answer in ANSWERS[question].items():
        got = quirk.measure(ROWS[name, "logits"].function)
        assert got == pytest.approx(answer, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", ["ours", "RLHF book", "unsloth, MLX", "tunix, after #1574"])
def test_cutting_a_step_does_not_move_these_gradients(name):
    assert judge.change_by_cutting(ROWS[name, "logits"].function) < 1e-6


@pytest.mark.parametrize("name", ["TRL", "Liger", "authors, last", "ColossalAI"])
def test_cutting_a_step_moves_these_gradients(name):
    assert judge.change_by_cutting(ROWS[name, "logits"].function) > 0.05


def test_odds_of_a_product_are_the_product():
    """tunix at 51ad966. With 20 tokens of p = 1/2, 1 - P is 1 to six digits; L_OR becomes that of
    the ratio of the products, 1/2 for a response one token longer: ln(1 + 2)."""
    l_or = judge.l_or_of([0.5] * 20, [0.5] * 19)
    assert l_or(ROWS["tunix", "logits"].function) == pytest.approx(math.log(3), rel=1e-5)
    assert l_or(ROWS["ours", "logits"].function) == pytest.approx(math.log(2), rel=1e-5)


def test_a_mean_of_log_odds_is_not_the_log_odds_of_the_mean():
    """ColossalAI. p = 0.9 and 0.1 have log odds ln 9 and -ln 9, mean 0; 0.3 twice has ln 3/7; so
    L_OR = ln(1 + 3/7), in bfloat16."""
    got = judge.l_or_of([0.9, 0.1], [0.3, 0.3])(ROWS["ColossalAI", "logits"].function)
    assert got == pytest.approx(math.log(10 / 7), rel=5e-3)


def test_without_odds_it_is_the_ratio_of_the_probabilities():
    """mlx-lm-lora at a65a3f1. P = 3/4, 1/2: ratio 3/2, L_OR ln(1 + 2/3); odds ratio 3, ln 4/3."""
    logps = torch.tensor([[0.75], [0.5]], dtype=torch.float64).log()
    for name, l_or in (("mlx-lm-lora", math.log(5 / 3)), ("ours", math.log(4 / 3))):
        assert ROWS[name, "pairs"].function(*logps).item() == pytest.approx(l_or, rel=1e-9), name


@pytest.mark.parametrize(("name", "moves"), [("mlx-lm-lora", False), ("ours", True)])
def test_whether_the_gradient_reaches_the_logits(name, moves):
    gradient = judge.gradient(ROWS[name, "logits"].function, judge.one_pair(lam=1.0))
    assert bool(gradient.any()) == moves


# The largest log P, of powers of ten, at which dL_OR/da is still right; it is 0 at the next.
LIMITS = {"RLHF book": 1e-5, "tunix, after #1574": 1e-6, "mlx-lm-lora, after #88": 1e-6}


@pytest.mark.parametrize("name", LIMITS)
def test_the_gradient_of_l_or_vanishes_above_a_limit(name):
    """It is -P_l / (1 - P_l) = -1 at certainty, with P_l = 1/2."""
    function, t = ROWS[name, "pairs"].function, LIMITS[name]
    assert judge.at(-t, HALF, 1)(function) == pytest.approx(-1, rel=1e-4)
    assert judge.at(-t / 100, HALF, 1)(function) == pytest.approx(0, abs=1e-6)


def test_the_log_odds_ratio_is_logged_by_two():
    """All others log the mean log sigmoid of it under this name."""
    right = ROWS["RLHF book", "pairs"], ROWS["ColossalAI", "pairs"]
    for one in IMPLEMENTATIONS:
        if one.metric and one.level == "pairs":
            answer = math.log(3) if one in right else -math.log(4 / 3)
            assert judge.metric(one.metric) == pytest.approx(answer, abs=1e-3), one.name


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


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def counts(text: str, name: str) -> list[str]:
    return cells(next(line for line in text.splitlines() if line.startswith(f"| {name} | yours")))


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
    (["--summary", "--plot", "figure.svg"], "not allowed with"),
    (["--nonsense"], "unrecognized arguments"),
]


def assert_one_sentence_and_status_2(flags, says, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *flags)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("flags", "says"), BAD)
def test_bad_arguments_are_one_sentence_and_status_2(flags, says, yours, monkeypatch, capsys):
    flags = [flag.format(yours) for flag in flags]
    assert_one_sentence_and_status_2(flags, says, monkeypatch, capsys)


@pytest.mark.parametrize("flags", [["--summary"], ["--implementation", "{}:probability_ratio"]])
def test_golden_vectors_of_another_version_are_refused(flags, yours, tmp_path, monkeypatch, capsys):
    golden = json.loads(judge.GOLDEN.read_text(encoding="utf-8"))
    other = tmp_path / "orpo.json"
    other.write_text(json.dumps(golden | {"version": judge.VERSION + 1}), encoding="utf-8")
    monkeypatch.setattr(judge, "GOLDEN", other)
    run.cases_of.cache_clear()
    forget_verdicts()
    flags = [flag.format(yours) for flag in flags]
    says = f"version {judge.VERSION + 1}, and {judge.VERSION} is wanted"
    assert_one_sentence_and_status_2(flags, says, monkeypatch, capsys)


# ---------------------------------------------------------------------------------------------
# docs/conformance.md.

PAGE = (run.HERE.parent / "docs" / "conformance.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def block(word: str) -> str:
    [text] = [text for text in BLOCKS if word in text]
    return text


def rows_of_the_page(printed: str) -> list[tuple[list[str], list[str]]]:
    """Each row of a printed table beside the page's: the one with the same head and first cells."""
    heads, _, *lines = printed.strip().splitlines()
    page = PAGE[PAGE.index(heads) :].split("\n\n")[0].splitlines()[2:]
    assert len(page) == len(lines)
    return [(cells(a), cells(b)) for a, b in zip(page, lines, strict=True)]


def exp_is_rounded_to_nearest() -> bool:
    """At the log-probabilities of the golden vectors, float32. NaN begins where e^x becomes 1."""
    x = torch.cat([logp for case in run.cases_of("pairs") for logp in case.inputs])
    return torch.equal(x.float().exp(), x.exp().float())


def other_version(shown: list[str], printed: list[str]) -> bool:
    return shown[0] in ("TRL", "Liger") and shown[1] != printed[1]


def test_the_page_shows_where_each_was_read():
    for shown, printed in rows_of_the_page(run.sources(IMPLEMENTATIONS)):
        assert other_version(shown, printed) or shown == printed


@pytest.fixture
def summary_within(monkeypatch):
    """A function: the page's rows beside the printed ones, as they are with this tolerance."""

    def rows(rtol: float) -> list[tuple[list[str], list[str]]]:
        monkeypatch.setitem(judge.RTOL, judge.FLOAT32, rtol)
        forget_verdicts()
        return rows_of_the_page(run.summary(IMPLEMENTATIONS))

    yield rows
    forget_verdicts()


def forget_verdicts():
    for function in (run.fitting_sft, run.judged):
        function.cache_clear()


def test_the_page_shows_what_the_command_prints(summary_within):
    """`python -m conformance.run --summary` prints the new tables. CPUs differ in the last digit of
    log1p and sigmoid, so a case whose error is near the tolerance may be right on one CPU and wrong
    on another: a count lies between those of 0.97 and 1.03 times the tolerance; in axolotl's row,
    where a digit of the sigmoid is worth 1.5e-5, between those of half and of twice."""
    if not exp_is_rounded_to_nearest():
        pytest.skip("this CPU rounds e^x in another way; the counts of the page are not its own")
    rtol = judge.RTOL[judge.FLOAT32]
    half, less, more, twice = (summary_within(x * rtol) for x in (0.5, 0.97, 1.03, 2))
    for (shown, _), *printed in zip(half, half, less, more, twice, strict=True):
        all_four = [row for _, row in printed]
        low, high = all_four[::3] if "axolotl" in shown[0] else all_four[1:3]
        if not other_version(shown, low):
            assert shown[:3] == low[:3]
            for cell, least, most in zip(shown[3:], low[3:], high[3:], strict=True):
                (n, of), (n_low, of_low), (n_high, _) = map(counted, (cell, least, most))
                assert n_low <= n <= n_high and of == of_low


def counted(cell: str) -> tuple[int, str]:
    n, _, of = (cell or "0").partition(" of ")
    return int(n), of


def test_the_page_shows_the_answers():
    """Within 2%: one answer, near 1e15, depends on how a CPU rounds e^x in float64."""
    legend, printed = run.quirks(IMPLEMENTATIONS).split("\n\n")
    assert legend in PAGE
    for shown, now in rows_of_the_page(printed):
        assert shown[0] == now[0]
        for a, b in zip(shown[1:], now[1:], strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=0.02)


def test_the_page_speaks_of_each_implementation():
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    names = [one.name for one in IMPLEMENTATIONS if "authors" not in one.name]
    assert set(headings) == {name for name in names if "ours" not in name} | {"The authors"}


def test_trl_reproduction_of_the_page(capsys):
    """When this fails, TRL may have been fixed: then the page and the README are old."""
    names = {}
    exec(block("The reproduction"), names)
    assert names["chosen"].grad.isnan().tolist() == [True, False]
    assert names["rejected"].grad.isnan().tolist() == [False, True]
    assert f"# {capsys.readouterr().out}" in block("The reproduction")


def test_the_fix_of_the_page_makes_trl_right_for_p_below_1(monkeypatch):
    names = {}
    exec(block("def log1mexp"), names)
    monkeypatch.setattr("trl.experimental.orpo.orpo_trainer.log1mexp", names["log1mexp"])
    trl = ROWS["TRL", "pairs"].function
    below_1 = [c for c in run.cases_of("pairs") if all(x.item() < 0 for x in c.inputs)]
    assert len(below_1) == 129
    assert not any(run.wrong(judge.judge(trl, case, judge.FLOAT32)) for case in below_1)


def test_the_example_of_the_page_runs_against_trl(tmp_path):
    """It passes on kind "ordinary"; the edges are known to fail, most of them."""
    (tmp_path / "test_golden.py").write_text(block("GOLDEN ="), encoding="utf-8")
    shutil.copy(judge.GOLDEN, tmp_path)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_golden.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    outcomes = re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])
    n = {word: int(number) for number, word in outcomes}
    assert n["passed"] == 48
    assert n["xfailed"] + n["xpassed"] == 103
    assert n["xfailed"] >= 46
