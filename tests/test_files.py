"""How the files fit together: who imports whom, and that the method comes before engineering."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {
    "orpo": set(),
    "tokenizer": set(),
    "checkpoint": set(),
    "data": {"tokenizer", "model"},  # model for the command alone, which asks for the context
    "model": {"checkpoint"},
    "train": {"data", "model", "orpo", "checkpoint"},
}
LIBRARIES = {
    "orpo": {"torch"},
    "tokenizer": {"jinja2", "sentencepiece"},
    "checkpoint": {"torch"},
    "data": {"numpy", "torch"},
    "model": {"numpy", "torch"},
    "train": {"torch", "tqdm"},
}


def imports(file: Path) -> set[str]:
    """The top-level names of what a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", OURS)
def test_the_arrows_go_one_way(name):
    found = imports(ROOT / f"{name}.py")
    assert found & OURS.keys() == OURS[name]
    assert found - OURS.keys() - sys.stdlib_module_names == LIBRARIES[name]


def test_a_reader_of_train_py_meets_the_loop_before_the_engineering():
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    (ruler,) = (i for i, line in enumerate(lines) if line.startswith("# Nothing below is ORPO"))
    functions = {
        line[4:].partition("(")[0]: i for i, line in enumerate(lines) if line[:4] == "def "
    }
    method = "lr_at", "step_pairs", "micro_batches", "forward", "training_step", "metrics_of"
    assert all(functions[name] < functions["train"] < ruler for name in method)
    assert all(functions[name] > ruler for name in ("pick_device", "parse", "main"))
    assert ruler < 380


def test_the_method_can_be_read_in_1650_lines():
    """orpo.py, and of data.py, model.py and train.py what is above the ruler."""
    n_lines = len((ROOT / "orpo.py").read_text(encoding="utf-8").splitlines())
    for name in ("data.py", "model.py", "train.py"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        (ruler,) = (i for i, line in enumerate(lines) if "# Nothing below " in line)
        n_lines += ruler
    assert n_lines <= 1650
