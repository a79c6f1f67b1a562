"""How the files fit together: the top level is the method, and arrows only go down."""

import ast
import subprocess
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
    "data": {"attention", "formats", "model"},  # model only for the command: its context
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


def test_nothing_is_committed_that_is_not_of_the_project():
    """Eighteen downloaded wheels, 38 MB, once were."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [Path(name) for name in names if name]
    top = {file.name for file in files if len(file.parts) == 1 and file.suffix != ".py"}
    assert top <= {
        *(".gitignore", "CITATION.cff", "LICENSE", "Makefile", "README.md", "pyproject.toml"),
        *("requirements.txt", "requirements-dev.txt", "requirements-peers.txt"),
    }
    sizes = {file: (ROOT / file).stat().st_size for file in files if (ROOT / file).is_file()}
    assert {file for file, size in sizes.items() if size > 2**20} == {
        Path("examples/facts/base/model.safetensors")
    }


@pytest.mark.parametrize(
    "file", [*TOP, *FORMATS, *RUN], ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_the_arrows_only_go_down(file):
    place = file.stem if file.parent == ROOT else file.parent.name
    assert imports(file) <= OURS[place] | LIBRARIES


def test_the_objective_can_be_copied_into_any_project():
    assert imports(ROOT / "orpo.py") == {"torch"}


def test_no_import_runs_in_a_circle():
    """Among the modules of the top level, formats/ and run/, at the time of import."""
    modules = {module_of(file): file for file in (*TOP, *FORMATS, *RUN)}
    left = {
        name: {found for found in names_at_import(file) if found in modules}
        for name, file in modules.items()
    }
    while left:
        ready = [name for name, needs in left.items() if not needs & left.keys()]
        assert ready, f"in a circle, or above one: {sorted(left)}"
        for name in ready:
            del left[name]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def names_at_import(file: Path) -> set[str]:
    """The modules that a file imports before anything in it is called."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("file", TOP, ids=lambda file: file.name)
def test_a_file_of_the_lesson_is_read_whole(file):
    """It is short, and nothing in it says that the rest need not be read."""
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 520
    assert "====" not in text and "othing below" not in text


PRODUCT = [*TOP, *FORMATS, *RUN, *sorted((ROOT / "tools").glob("*.py"))]


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_function_fits_a_screen(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert not {name: n for name, n in sizes.items() if n > 60}
