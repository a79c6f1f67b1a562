"""How the files fit together: the top level is the method, and arrows only go down."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = sorted(ROOT.glob("*.py"))
FORMATS, RUN = sorted((ROOT / "formats").glob("*.py")), sorted((ROOT / "run").glob("*.py"))
LIBRARIES = {"torch", "numpy", "sentencepiece", "tqdm", "jinja2"}  # jinja2 comes with torch
# Who imports whom. formats/ knows nothing of the rest, and run/ may know the model and its data.
OURS = {
    "orpo": set(),
    "attention": set(),
    "model": {"attention", "formats"},
    "data": {"attention", "formats", "model"},  # model for the command alone: it asks for a context
    "train": {"attention", "data", "formats", "model", "orpo", "run"},
    "formats": {"formats"},
    "run": {"attention", "data", "formats", "model", "run"},
}


def imports(file: Path) -> set[str]:
    """The top-level names of what a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names


def test_the_top_level_is_five_files():
    assert [file.stem for file in TOP] == ["attention", "data", "model", "orpo", "train"]


@pytest.mark.parametrize(
    "file", [*TOP, *FORMATS, *RUN], ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_the_arrows_only_go_down(file):
    place = file.stem if file.parent == ROOT else file.parent.name
    assert imports(file) <= OURS[place] | LIBRARIES


def test_the_objective_can_be_copied_into_any_project():
    assert imports(ROOT / "orpo.py") == {"torch"}
