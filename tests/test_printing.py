"""What is printed, and whether anybody reads it, ends no run."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT, rows_of

STEPS = ["--max-steps", "60", "--save-every", "20"]


def start(arguments, redirect: str = "", **environment) -> subprocess.Popen:
    """train.py by a shell, with its streams redirected."""
    words = [sys.executable, str(ROOT / "train.py"), *arguments, *STEPS]
    line = f'exec "$@" {redirect}'
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(["bash", "-c", line, "bash", *words], env=environment, **pipes)


def is_whole(tmp_path) -> bool:
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    return rows[-1]["step"] == 60 and (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_a_reader_that_goes_away_is_noted_once_and_the_run_goes_on(arguments, tmp_path):
    """As `| head -2`."""
    process = start(arguments)
    for _ in range(2):
        process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 0 and is_whole(tmp_path)
    assert said.count("stdout cannot be written any more (Broken pipe); the run continues") == 1
    assert "Traceback" not in said and "Exception ignored" not in said


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", ">/dev/full"])
def test_closed_and_full_streams(redirect, arguments, tmp_path):
    process = start(arguments, redirect)
    out, error = process.communicate()
    assert process.returncode == 0 and is_whole(tmp_path)
    assert b"Traceback" not in out + error


def test_an_ascii_terminal(arguments, tmp_path):
    process = start(arguments, PYTHONIOENCODING="ascii")
    out, error = process.communicate()
    assert process.returncode == 0 and is_whole(tmp_path), error
    assert "\\xb7" in out.decode("ascii")  # the middle dot between tokens
