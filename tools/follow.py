"""Sends the rows of a run to TensorBoard or W&B until the run has finished, or until Ctrl-C.

    python -m tools.follow OUT                  for: tensorboard --logdir OUT
    python -m tools.follow OUT --to wandb

Needs the package of that name. What --resume computes again is not sent again.
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from run.flags import read_settings
from run.folder import FINISHED, read_rows


def sender(to: str, out: Path):
    """A function of a step and its numbers by name, and one that sends what is still waiting."""
    if to == "wandb":
        import wandb

        run = wandb.init(name=out.name, dir=out, config=read_settings(out))
        return lambda step, numbers: run.log(numbers, step=step), run.finish
    from torch.utils.tensorboard import SummaryWriter

    for file in (out / "tensorboard").glob("events.out.tfevents.*"):  # all rows are sent anew
        file.unlink()
    writer = SummaryWriter(out / "tensorboard", flush_secs=5)

    def send(step, numbers):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def follow(out: Path, send):
    sent, finished = set(), False
    while not finished:
        finished = (out / FINISHED).exists()  # asked first: then no row comes later
        for row in read_rows(out):
            if (key := (row["step"], "eval_loss" in row)) not in sent:
                sent.add(key)
                send(row["step"], {k: v for k, v in row.items() if k != "step"})
        time.sleep(0 if finished else 5)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of a run")
    parser.add_argument("--to", choices=("tensorboard", "wandb"), default="tensorboard")
    args = parser.parse_args(argv)
    problem = None
    if find_spec(args.to) is None:
        problem = f"{args.to} is not installed: {sys.executable} -m pip install {args.to}"
    elif not args.out.is_dir():
        problem = f"{args.out}: no such folder; train.py makes it, its --out"
    if problem:
        print(f"follow.py: {problem}", file=sys.stderr)
        sys.exit(2)
    send, close = sender(args.to, args.out)
    try:
        follow(args.out, send)
    except KeyboardInterrupt:
        print("follow.py: stopped by Ctrl-C", file=sys.stderr)
    finally:
        close()


if __name__ == "__main__":
    main()
