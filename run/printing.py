"""What is printed never ends a run: rows and checkpoints do not depend on who reads stdout.

Here and not in train.py, because it is about terminals and pipes, and not about training.
"""

import contextlib
import os
import sys


class Steady:
    """A stream whose reader may go away (`| head`, a closed terminal), or which cannot write every
    character. It then goes to nowhere, and the other stream gets one note."""

    def __init__(self, stream, name: str):
        self.stream, self.name, self.other = stream, name, None

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # an ASCII terminal
            return self.stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
        except OSError as error:
            self.give_up(error)
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError):
        # The file itself, and not only our object: Python writes what is left in the buffer when it
        # ends, and would fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        if self.other is not None:
            note = f"{self.name} cannot be written any more ({error.strerror}); the run continues\n"
            self.other.write(note)
            self.other.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def steady_streams():
    """Within it, stdout and stderr never raise; a closed one is as good as /dev/null."""
    before = sys.stdout, sys.stderr
    streams = []
    for stream, name in zip(before, ("stdout", "stderr"), strict=True):
        stream = stream or open(os.devnull, "w")  # noqa: SIM115
        streams.append(Steady(stream, name))
    streams[0].other, streams[1].other = streams[1], streams[0]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before
