"""A soak: a run that is killed again and again ends as one that nothing has disturbed.

    python -m tests.soak [--seed N]        (some ten minutes on two cores; Linux)

With 1, 2 and 3 processes. Ten times SIGKILL ends everything at a random moment: five times while a
checkpoint is written, and else within the start, the steps, or an evaluation; with several
processes it is sometimes one of them that is killed, and the others have to end by themselves.
Then each signal that stops a run in order ends it once. In the end rows, model/ and best/ have to
equal those of a run that nothing disturbed, to the bit. Exit status 1 where they do not.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run.processes import STOPS
from tests.runs import evaluations, file_bytes, files, launch, rows_of, start, steps, write_inputs

KILLS = ("save", "loop", "save", "one", "save", "start", "save", "loop", "save", "one")
PLACES = {"save": "steps", "loop": "steps", "one": "steps", "start": "start"}
FLAGS = ["--max-steps", "250", "--batch-size", "8", "--lr", "1e-4", "--warmup-steps", "2"]
FLAGS += ["--save-every", "7", "--eval-every", "10", "--keep", "3"]


class Soak:
    def __init__(self, n: int, inputs: Path, out: Path, rng: random.Random):
        self.n, self.out, self.rng = n, out, rng
        self.who = "1 process" if n == 1 else f"{n} processes"
        self.arguments = [*files(inputs), *FLAGS, "--out", str(out), "--resume"]
        self.in_a_save = self.killed = 0

    def begin(self) -> subprocess.Popen:
        self.begun = time.time_ns()
        return start(self.n, self.arguments)

    def is_saving(self) -> bool:
        """Whether this start is writing a checkpoint: an earlier one may have left its folder."""
        with contextlib.suppress(OSError):
            folder = self.out / "checkpoints" / "unfinished"
            return folder.stat().st_ctime_ns > self.begun
        return False

    def has_rows(self) -> bool:
        with contextlib.suppress(OSError):
            text = (self.out / "metrics.jsonl").stat()
            return text.st_mtime_ns > self.begun and text.st_size > 0
        return False

    def wait_for(self, process: subprocess.Popen, happened):
        while not happened():
            if process.poll() is not None:
                raise RuntimeError(f"it ended by itself:\n{process.communicate()}")
            time.sleep(0.0005)

    def wait_for_steps(self, process: subprocess.Popen):
        self.wait_for(process, self.has_rows)
        time.sleep(self.rng.uniform(0, 0.7))

    def kill(self, how: str):
        """One start, and its end at a random moment."""
        process = self.begin()
        if how == "save":
            for _ in range(self.rng.randint(1, 4)):
                self.wait_for(process, lambda: not self.is_saving())
                self.wait_for(process, self.is_saving)
            time.sleep(self.rng.uniform(0, 0.01))
        elif how == "start":
            time.sleep(self.rng.uniform(0.2, 4))
        else:
            self.wait_for_steps(process)
        os.kill(process.pid, signal.SIGSTOP)  # torchrun starts no process while we count them
        workers = children(process.pid)
        if how == "one" and workers:
            kill([self.rng.choice(workers)], signal.SIGKILL)
            kill([process.pid], signal.SIGCONT)  # it ends the others
        else:
            kill([process.pid, *workers], signal.SIGKILL)
        process.communicate(timeout=100)
        self.killed += 1
        self.in_a_save += self.is_saving()
        whom = "one process" if how == "one" and workers else "all"
        moment = "while a checkpoint was written" if self.is_saving() else f"in the {PLACES[how]}"
        self.say(f"SIGKILL {self.killed} of {whom} {moment}")

    def stop(self, name: str):
        """One start that a signal to one of its processes ends in order."""
        process = self.begin()
        self.wait_for_steps(process)
        number = signal.Signals[name]
        workers = children(process.pid) or [process.pid]
        kill([self.rng.choice(workers)], number)
        printed, errors = process.communicate(timeout=100)
        status = 128 + number if self.n == 1 else 1  # 1 is torchrun's own
        if process.returncode != status or f"{name}: stopped after step" not in printed:
            raise RuntimeError(f"{name}: status {process.returncode}\n{printed}\n{errors}")
        self.say(name)

    def say(self, what: str):
        saved = sorted(folder.name for folder in self.out.glob("checkpoints/*"))
        rows = steps(rows_of(self.out / "metrics.jsonl"))
        left = f"{len(rows)} rows; {' '.join(saved) or 'no checkpoint'}"
        print(f"{self.who}, {what}: {left}", flush=True)


def children(pid: int) -> list[int]:
    """The processes of torchrun: they are sessions of their own, so no group has them all."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(file.parent.name))
    return found


def kill(pids: list[int], number: int):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    rng = random.Random(parser.parse_args().seed)
    different, in_a_save = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        for n in (1, 2, 3):
            whole, out = folder / f"whole-{n}", folder / f"out-{n}"
            wanted, _ = launch(n, [*files(folder), *FLAGS, "--out", str(whole)])
            soak = Soak(n, folder, out, rng)
            for how in KILLS:
                soak.kill(how)
            for name in STOPS:
                soak.stop(name)
            rows, _ = launch(n, soak.arguments)
            in_a_save += soak.in_a_save
            same = {"steps": steps(rows) == steps(wanted)}
            same["evaluations"] = evaluations(rows) == evaluations(wanted)
            same |= {x: file_bytes(out / x) == file_bytes(whole / x) for x in ("model", "best")}
            print(f"{soak.who}, the end is the same: {same}", flush=True)
            different += [f"{what} of {soak.who}" for what, equal in same.items() if not equal]
    n = 3 * len(KILLS)
    print(f"{n} kills, {in_a_save} of them while a checkpoint was written, {3 * len(STOPS)} stops")
    print(f"different: {', '.join(different)}" if different else "all ends are equal, to the bit")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
