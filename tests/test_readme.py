"""What the README says to type works, at tiny size, and its tables are complete."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orpo
import train
from model import Transformer
from tests.runs import METRICS

ROOT = Path(train.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("line", [line for line in BASH if line.startswith("make")])
def test_every_make_target_exists(line):
    subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_the_commands_run_in_their_order_at_tiny_size(tmp_path):
    """MODEL, PAIRS.jsonl, EVAL.jsonl and OUT are filled in; training gets two steps."""
    facts = ROOT / "examples" / "facts"
    filled = {"MODEL": facts / "base", "OUT": tmp_path / "out"}
    for name, file in (("PAIRS.jsonl", "train.jsonl"), ("EVAL.jsonl", "eval.jsonl")):
        rows = (facts / file).read_text(encoding="utf-8").splitlines(keepends=True)
        filled[name] = tmp_path / name
        filled[name].write_text("".join(rows[:8]), encoding="utf-8")
    commands = [line for line in BASH if line.startswith("python")]
    assert len(commands) >= 4
    for line in commands:
        for name, path in filled.items():
            line = re.sub(rf"\b{re.escape(name)}\b", str(path), line)
        words = [sys.executable, *shlex.split(line)[1:]]
        if "train.py" in line and "--eval-only" not in line:
            words += ["--max-steps", "2", "--batch-size", "4"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "out" / "curves.svg").is_file()
    trained = Transformer.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    base = Transformer.from_pretrained(facts / "base", dtype=torch.float32)
    assert not torch.equal(trained.lm_head_weight, base.lm_head_weight)


@pytest.mark.slow
def test_the_built_in_job_owns_its_folder_and_replaces_it(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--max-steps", "1", "--eval-data"]
    rows = (ROOT / "examples" / "facts" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:4]), encoding="utf-8")
    for _ in range(2):
        subprocess.run([*command, "few.jsonl"], cwd=tmp_path, check=True, capture_output=True)
        metrics = (tmp_path / "out" / "builtin" / "metrics.jsonl").read_text().splitlines()
        assert len(metrics) == 3  # evaluation, step 1, evaluation


def test_every_flag_and_its_default_is_in_the_table():
    table = README[README.index("### Flags") : README.index("### Metrics")]
    cells = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `--")]
    for f in dataclasses.fields(train.TrainConfig):
        name = f"`--{f.name.replace('_', '-')}`"
        (defaults,) = (cell[1].strip().split(", ") for cell in cells if name in cell[0])
        if f.default not in (None, False):
            same = [x == f.default or (x[0].isdigit() and float(x) == f.default) for x in defaults]
            assert any(same), name


def test_every_metric_is_defined():
    table = README[README.index("### Metrics") : README.index("### If you come")]
    assert all(f"`{name}`" in table for name in METRICS - {"step"})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_help_is_grouped_and_fits_two_screens():
    words = [sys.executable, str(ROOT / "train.py"), "--help"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert len(text.splitlines()) <= 80
    for group in ("input and output:", "objective:", "optimizer:", "length:", "memory:", "run:"):
        assert group in text


def test_every_test_function_and_file_that_it_names_is_there():
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    tests = re.findall(r"`(test_\w+)`", README)
    assert len(tests) > 12
    assert not [name for name in tests if f"def {name}(" not in code]
    for module in (orpo, train):
        for name in re.findall(rf"`{module.__name__}\.(\w+)`", README):
            assert hasattr(module, name) or name == "py", name
    for path in re.findall(
        r"(?:python |`|\()((?:bench|conformance|docs|examples|tests)/[\w/.-]+\.\w+)", README
    ):
        assert (ROOT / path).is_file() or (ROOT / "examples" / path).is_file(), path


def test_the_step_in_numbers_is_what_walk_py_prints():
    command = [sys.executable, str(ROOT / "examples" / "walk.py")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    printed = re.sub(r" \(apart by .*?\)", "", done.stdout).splitlines()
    quoted = README.partition("through the base model:\n")[2].partition("\nThe refusal")[0]
    quoted = [line.removeprefix("    ") for line in quoted.splitlines() if line]
    assert len(quoted) > 10
    assert not [line for line in quoted if line not in printed]
    (apart,) = re.findall(r"apart by (.*?)\)", done.stdout)
    assert float(apart) < 1e-7  # nll_weight is float32


def test_walk_py_refuses_a_line_that_is_not_there():
    command = [sys.executable, str(ROOT / "examples" / "walk.py"), "--line", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--line" in done.stderr and "Traceback" not in done.stderr
