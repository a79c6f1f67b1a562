"""The log: rows of metrics.jsonl, and what is seen of them while a run is going.

The numbers of a step are copied to the host while the device computes the next step, and only then
read, so that neither the host nor the device waits.
"""

import contextlib
import time
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from data import Pair
from model import Transformer, trainable
from run.flags import TrainConfig
from run.folder import write_row
from run.plan import Plan, peak_flops, peak_memory_gb, step_flops
from run.processes import rank, world_size


class HostCopy:
    """Numbers on their way from the device to the host. Only `read` waits for them."""

    def __init__(self, numbers: dict[str, torch.Tensor]):
        self.names, values = list(numbers), torch.stack([x.double() for x in numbers.values()])
        self.values, self.arrived = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()  # waits for this copy, and not for the step after it
        return dict(zip(self.names, self.values.tolist(), strict=True))


class NotFinite(Exception):
    """Loss or gradient of this step was not finite, so there was no update."""

    def __init__(self, step: int):
        self.step = step


class Log:
    """Writes a row for each step and each evaluation, and shows a progress bar; where there is no
    terminal, a line every half minute."""

    def __init__(self, out: Path, model: Transformer, start: int, plan: Plan, config: TrainConfig):
        self.out, self.model, self.config = out, model, config
        self.start, self.n_steps, self.steps_an_epoch = start, plan.n_steps, plan.steps_an_epoch
        quiet = True if rank() else None  # None: where there is no terminal
        self.bar = tqdm(initial=start, total=self.n_steps, unit="step", disable=quiet)
        self.peak = peak_flops(model.device, config)
        self.begin = self.printed = self.clock = time.perf_counter()
        self.n_tokens, self.flops, self.waiting = 0, 0, None

    def wants(self, step: int) -> bool:
        """Whether this step gets a row."""
        return due(step, self.config.log_every) or step == self.n_steps

    def step(
        self, step: int, pairs: list[Pair], metrics: dict[str, torch.Tensor] | None, lr: float
    ):
        """Takes in a step that the device may still compute, and writes the row of the one before,
        so that the device always has work queued. metrics: None where the step gets no row."""
        self.complete()
        self.n_tokens += sum(pair.n_tokens for pair in pairs)
        self.flops += step_flops(self.model, pairs, self.config)
        if metrics is not None:
            self.waiting = step, HostCopy(metrics), lr, self.n_tokens, self.flops
            self.n_tokens, self.flops = 0, 0
        if self.model.device.type == "cpu":  # which has computed the step already
            self.complete()
        self.bar.update()

    def complete(self):
        """Writes the row that waits for its numbers. Raises NotFinite where there was no update."""
        if self.waiting is None:
            return
        (step, numbers, lr, n_tokens, flops), self.waiting = self.waiting, None
        row = numbers.read()
        if (updates := int(row.pop("updates"))) < step:
            raise NotFinite(updates + 1)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        row = {"step": step} | row | {"learning_rate": lr, "epoch": step / self.steps_an_epoch}
        row |= {"tokens_per_second": n_tokens / seconds, "tflops": flops / seconds / 1e12}
        if self.peak:
            row["mfu"] = flops / seconds / self.peak / world_size()
        row["peak_memory_gb"] = peak_memory_gb(self.model.device)
        write_row(self.out, row)
        text = "loss {loss:.3f} acc {rewards/accuracies:.2f} logps {logps/chosen:.2f} / "
        text = (text + "{logps/rejected:.2f} {tokens_per_second:.0f} tok/s").format(**row)
        if self.peak:
            text += f" MFU {row['mfu']:.0%}"
        self.bar.set_postfix_str(text)
        seconds = (now - self.begin) / (step - self.start) * (self.n_steps - step)
        left = timedelta(seconds=round(seconds))
        if self.bar.disable and now - self.printed > 30:
            self.printed = now
            print(f"step {step} of {self.n_steps}: {text}; {left} left", flush=True)
        elif step == self.start + 3 and step < self.n_steps:
            self.write(f"after 3 steps: about {left} left")

    def evaluation(self, row: dict):
        """Writes an evaluation's row, and the most telling of its numbers as a line."""
        write_row(self.out, row)
        self.write(
            "step {step}: held out loss {eval_loss:.3f}, accuracy {eval_rewards/accuracies:.3f}, "
            "logps {eval_logps/chosen:.2f} / {eval_logps/rejected:.2f}".format(**row)
        )

    @contextlib.contextmanager
    def paused(self):
        """Within it the clock stands still; before it, the device has caught up."""
        self.complete()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        yield
        pause = time.perf_counter() - begin
        self.clock, self.begin = self.clock + pause, self.begin + pause

    def write(self, text: str):
        """A line of its own, above the progress bar where there is one."""
        print(text, flush=True) if self.bar.disable else self.bar.write(text)

    def close(self):
        self.complete()
        self.bar.close()


def n_updates(optimizer, model: Transformer) -> torch.Tensor:
    """How many updates Adam has made, on the device: fewer than steps once one was not finite."""
    return optimizer.state[trainable(model)[0]]["step"]


def check_updates(optimizer, model: Transformer, step: int):
    """Raises NotFinite where Adam has made fewer updates than `step`. Waits for the device."""
    if (updates := int(n_updates(optimizer, model))) < step:
        raise NotFinite(updates + 1)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
