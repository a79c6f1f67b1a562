"""What README and docs say to type works, what they quote is printed, what they name is there."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import orpo
import train
from model import ModelConfig, Transformer
from run.flags import ELSEWHERE
from tests.forked import call
from tests.runs import METRICS, ROOT

PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
README, FLAGS, LEARN = TEXTS["README.md"], TEXTS["flags.md"], TEXTS["learn.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text: str, *languages: str) -> list[str]:
    """The lines of its blocks, comments cut off, continued lines joined."""
    joined = "\n".join(b for language in languages for b in blocks(text, language))
    lines = joined.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.mark.parametrize(
    "line", [line for line in commands(README, "bash") if line.startswith("make")]
)
def test_every_make_target_exists(line):
    subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 350


def test_the_commands_run_in_their_order_at_tiny_size(tmp_path):
    """MODEL, PAIRS.jsonl, EVAL.jsonl and OUT are filled in; training gets two steps."""
    facts = ROOT / "examples" / "facts"
    filled = {"MODEL": facts / "base", "OUT": tmp_path / "out"}
    for name, file in (("PAIRS.jsonl", "train.jsonl"), ("EVAL.jsonl", "eval.jsonl")):
        rows = (facts / file).read_text(encoding="utf-8").splitlines(keepends=True)
        filled[name] = tmp_path / name
        filled[name].write_text("".join(rows[:8]), encoding="utf-8")
    lines = [line for line in commands(README, "bash") if line.startswith("python")]
    assert len(lines) >= 4
    for line in lines:
        for name, path in filled.items():
            line = re.sub(rf"\b{re.escape(name)}\b", str(path), line)
        words = shlex.split(line)[1:]
        if "train.py" in line and "--eval-only" not in line:
            words += ["--max-steps", "2", "--batch-size", "4"]
        call(*words)
    assert (tmp_path / "out" / "curves.svg").is_file()
    trained = Transformer.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    base = Transformer.from_pretrained(facts / "base", dtype=torch.float32)
    assert not torch.equal(trained.lm_head_weight, base.lm_head_weight)


def test_the_lines_for_ones_own_loop_compute_the_loss():
    """Two pairs of three tokens each after a prompt of two, by the block and by hand."""
    (code,) = (block for block in blocks(README, "python") if "orpo_loss" in block)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=11, dim=8, n_layers=1, n_heads=2, hidden_dim=16))
    ids = {side: torch.randint(11, (2, 5)) for side in ("chosen", "rejected")}
    mask = torch.arange(5).expand(2, 5) >= 2
    names = {"model": model, "chosen_ids": ids["chosen"], "rejected_ids": ids["rejected"]}
    exec(code, names | {"chosen_mask": mask, "rejected_mask": mask})
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    means = []
    for side in ids.values():
        logps = torch.log_softmax(model(side), -1)[:, 1:-1]  # predict tokens 2, 3 and 4
        means.append(logps.gather(-1, side[:, 2:, None]).mean((1, 2)))
    orpo.orpo_loss(*means, lam=0.1).backward()
    for p, grad in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(grad, p.grad)
    assert any(grad.abs().max() > 1e-3 for grad in found)


def test_the_lines_for_any_framework_let_ours_pass_and_find_a_wrong_sign(monkeypatch):
    """The block that needs numpy only: ours is right in all cases, a plain formula in the ordinary
    ones, and a changed sign or a missing lam in none."""
    (code,) = (b for b in blocks(TEXTS["conformance.md"], "python") if "def check_logits" in b)
    monkeypatch.chdir(ROOT / "tests" / "golden")
    exec(code, names := {})
    check_pairs, check_logits = names["check_pairs"], names["check_logits"]

    def pairs(l_or):
        def with_gradient(*logps):
            logps = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in logps]
            value = l_or(*logps)
            return value.detach(), *(x.numpy() for x in torch.autograd.grad(value, logps))

        return with_gradient

    def logits(wrong=1):
        def with_gradient(chosen, rejected, lam):
            sides = [{k: torch.tensor(v) for k, v in side.items()} for side in (chosen, rejected)]
            given = [side["logits"].requires_grad_() for side in sides]
            tokens = [
                torch.log_softmax(x, -1).gather(-1, side["targets"][..., None])[..., 0]
                for x, side in zip(given, sides, strict=True)
            ]
            masks = [side["response_mask"] for side in sides]
            means = [(t * m).sum(-1) / m.sum(-1) for t, m in zip(tokens, masks, strict=True)]
            nll = -(tokens[0] * sides[0]["nll_weight"]).sum()
            value = nll + wrong * lam * plain(*means).mean()
            return value.detach(), *(x.numpy() for x in torch.autograd.grad(value, given))

        return with_gradient

    def plain(chosen, rejected):
        log_odds = [x - torch.log1p(-x.exp()) for x in (chosen, rejected)]
        return -torch.nn.functional.logsigmoid(log_odds[0] - log_odds[1])

    def ours(chosen, rejected):
        return orpo.odds_ratio_loss(chosen[None], rejected[None])[0]

    check_pairs(pairs(ours), kinds=("ordinary", "edge"))
    check_pairs(pairs(plain))
    check_logits(logits())

    def only_the_value(f):
        return lambda *arguments: f(*arguments)[:1]

    for check, implementation in (
        (check_pairs, only_the_value(pairs(plain))),
        (check_logits, only_the_value(logits())),
        (lambda f: check_pairs(f, kinds=("edge",)), pairs(plain)),
        (check_pairs, pairs(lambda c, r: plain(r, c))),
        (check_logits, logits(wrong=-1)),
        (check_logits, logits(wrong=1.001)),
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(implementation)


TRAINING = [
    (name, line.partition("train.py")[2])
    for name, text in TEXTS.items()
    for line in commands(text, "sh", "bash")
    if "train.py" in line
]


@pytest.mark.parametrize(("page", "flags"), TRAINING)
def test_every_training_command_has_flags_that_exist(page, flags, tmp_path, monkeypatch):
    """Also where it cannot run here: each is read by train.py's own parser."""
    if "--eval-only" in flags:  # takes the rows from the run in which the model lies
        monkeypatch.chdir(tmp_path)
        (tmp_path / "OUT").mkdir()
        (tmp_path / "OUT" / "run.json").write_text('{"lam": 0.1, "eval_data": "EVAL.jsonl"}')
    assert isinstance(train.parse(shlex.split(flags)), train.TrainConfig)


def test_every_script_of_a_command_is_there():
    for name, text in TEXTS.items():
        for line in commands(text, "sh", "bash"):
            for script in re.findall(r"(?:^|\s)((?:[\w-]+/)*[\w-]+\.(?:py|sh))\b", line):
                is_a_placeholder = Path(script).stem.isupper()
                assert (ROOT / script).is_file() or is_a_placeholder, f"{name}: {line}"


@pytest.mark.slow
def test_the_built_in_job_owns_its_folder_and_replaces_it(tmp_path):
    """Without --out: out/builtin in the repository, of which this is a copy."""
    for name in ("formats", "run", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    rows = (ROOT / "examples" / "facts" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:4]), encoding="utf-8")
    command = [sys.executable, "train.py", "--max-steps", "1", "--eval-data", "few.jsonl"]
    for _ in range(2):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        metrics = (tmp_path / "out" / "builtin" / "metrics.jsonl").read_text().splitlines()
        assert len(metrics) == 3  # evaluation, step 1, evaluation


def test_every_flag_and_its_default_is_in_the_table():
    table = FLAGS[FLAGS.index("## Flags") : FLAGS.index("## Metrics")]
    cells = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `--")]
    for f in dataclasses.fields(train.TrainConfig):
        name = f"`--{f.name.replace('_', '-')}`"
        (defaults,) = (cell[1].strip().split(", ") for cell in cells if name in cell[0])
        if f.default not in (None, False):
            same = [x == f.default or (x[0].isdigit() and float(x) == f.default) for x in defaults]
            assert any(same), name


def test_the_names_that_train_py_recognises_are_those_of_the_page():
    """The table of docs/trl.md is ELSEWHERE of run/flags.py."""
    for ours, theirs in ELSEWHERE.items():
        names = ", ".join(f"`{name.replace('-', '_')}`" for name in theirs.split())
        assert f"| `--{ours}` | {names} |\n" in TEXTS["trl.md"]
    assert all(hasattr(train.TrainConfig, ours.replace("-", "_")) for ours in ELSEWHERE)


def test_every_metric_is_defined():
    table = FLAGS[FLAGS.index("## Metrics") :]
    assert all(f"`{name}`" in table for name in METRICS - {"step"})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        file = PAGES[page].parent / target if target else PAGES[page]
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            made = {"#" + re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in made, anchor


def test_help_is_grouped_and_fits_two_screens():
    text, _ = call("train.py", "--help")
    assert len(text.splitlines()) <= 100
    for group in ("input and output:", "objective:", "optimizer:", "length:", "memory:", "run:"):
        assert group in text


@pytest.mark.parametrize("page", PAGES)
def test_every_test_function_and_file_that_it_names_is_there(page):
    text = TEXTS[page]
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    tests = re.findall(r"`(test_\w+)`", text)
    assert not [name for name in tests if f"def {name}(" not in code]
    for module in (orpo, train, data):
        for name in re.findall(rf"`{module.__name__}\.(\w+)`", text):
            assert hasattr(module, name) or name == "py", name
    folders = "bench|conformance|docs|examples|experiments|formats|run|tests|tools"
    for path in re.findall(rf"(?:python |`|\()((?:{folders})/[\w/.-]+\.\w+)", text):
        made_by_hand = {"tests/golden/orpo.json"}
        assert (ROOT / path).is_file() or path in made_by_hand, path


def test_the_page_on_orpo_names_its_tests():
    assert len(re.findall(r"`(test_\w+)`", LEARN)) > 12


def test_the_step_in_numbers_is_what_walk_py_prints():
    out, _ = call("-m", "examples.walk")
    printed = re.sub(r" \(apart by .*?\)", "", out).splitlines()
    quoted = LEARN.partition("through the base model and back:\n")[2]
    quoted = [line.removeprefix("    ") for line in quoted.splitlines() if line.startswith("    ")]
    quoted = quoted[: next(i for i, line in enumerate(quoted) if "log P(rejected)" in line) + 1]
    assert len(quoted) > 10
    assert not [line for line in quoted if line not in printed]
    (apart,) = re.findall(r"apart by (.*?)\)", out)
    assert float(apart) < 1e-7  # nll_weight is float32


def test_walk_py_refuses_a_line_that_is_not_there():
    _, error = call("-m", "examples.walk", "--line", "0", code=2)
    assert "--line" in error and "Traceback" not in error
