"""What is printed, and whether anybody reads it, ends no run."""

import os
import subprocess
import sys

import pytest

from tests.forked import Forked, call
from tests.runs import ROOT, rows_of

STEPS = ["--max-steps", "60", "--save-every", "20"]
TRAIN = str(ROOT / "train.py")


def is_whole(tmp_path) -> bool:
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    return rows[-1]["step"] == 60 and (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_a_reader_that_goes_away_is_noted_once_and_the_run_goes_on(arguments, tmp_path):
    """As `| head -2`."""
    process = Forked(TRAIN, *arguments, *STEPS, pipe=True)
    for _ in range(2):
        process.stdout.readline()
    process.stdout.close()
    _, said = process.communicate()
    assert process.poll() == 0 and is_whole(tmp_path)
    assert said.count("stdout cannot be written any more (Broken pipe); the run continues") == 1
    assert "Traceback" not in said and "Exception ignored" not in said


@pytest.mark.parametrize("redirect", [">&- 2>&-", ">/dev/full"])
def test_closed_and_full_streams(redirect, arguments, tmp_path):
    """Python itself starts with what the shell leaves of its streams."""
    words = ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, TRAIN]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, *arguments, *STEPS], env=environment, capture_output=True)
    assert done.returncode == 0 and is_whole(tmp_path)
    assert b"Traceback" not in done.stdout + done.stderr


RUN = "import sys; {}; import train; train.main(sys.argv[1:])"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_one_stream_is_closed(name, arguments, tmp_path):
    """Python then has None in its place."""
    code = RUN.format(f"import os; os.close(sys.{name}.fileno()); sys.{name} = None")
    out, error = call("-c", code, *arguments, *STEPS)
    assert is_whole(tmp_path) and "Traceback" not in out + error


def test_an_ascii_terminal(arguments, tmp_path):
    code = RUN.format("sys.stdout.reconfigure(encoding='ascii')")
    out, error = call("-c", code, *arguments, *STEPS)
    assert is_whole(tmp_path), error
    assert out.isascii() and "\\xb7" in out  # the middle dot between tokens
