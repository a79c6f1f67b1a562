"""Commands in processes of their own that need not import torch anew.

Importing it takes longer than most of what is tested in such a process. So these are forked off a
process that has imported it, and none of our modules. The start of Python itself is tested where a
command is started as users start it: test_bad_input.py, test_printing.py, and torchrun in
test_distributed.py.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.nn.attention.varlen"]
IMPORTED += ["sentencepiece", "jinja2.sandbox", "tqdm"]


def python(words: list[str], environment: dict[str, str], files: list[str]):
    """In the forked process: `python WORDS`, where stdout and stderr are these files."""
    for number, file in enumerate(files, 1):
        stream = os.open(file, os.O_WRONLY)
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Forked:
    """`python WORDS` in this repository; what is used of subprocess.Popen. With a pipe its stdout
    is one, which its reader may close."""

    def __init__(self, *words, pipe: bool = False):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [str(Path(self.folder.name) / name) for name in ("out", "error")]
        for file, is_pipe in zip(self.files, (pipe, False), strict=True):
            os.mkfifo(file) if is_pipe else Path(file).touch()
        SERVER.set_forkserver_preload(IMPORTED)
        arguments = [str(word) for word in words], dict(os.environ), self.files
        self.process = SERVER.Process(target=python, args=arguments)
        self.process.start()
        self.stdout = open(self.files[0]) if pipe else None  # noqa: SIM115

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 120) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise subprocess.TimeoutExpired("forked", timeout)
        return self.poll()

    def kill(self):
        self.process.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        files = self.files[self.stdout is not None :]
        *out, error = (Path(file).read_text(encoding="utf-8") for file in files)
        self.folder.cleanup()
        return "".join(out), error


def call(*words, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that must end with this status."""
    process = Forked(*words)
    out, error = process.communicate()
    assert process.poll() == code, out + error
    return out, error
