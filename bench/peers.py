"""The same optimizer steps by train.py, TRL's ORPOTrainer, and TRL with Liger's fused ORPO loss.

    python -m bench.peers [--only short|long] [--dtype float32|bfloat16] [--seconds N] [--out FILE]

Every variant is a process of its own with all the cores; they step in turn, one at a time, so that
whatever else the machine does hits all alike. All get the same weights, the same token ids, the
same objective (TRL's: the SFT term over prompt and chosen; lam 0.1), AdamW in float32, clipping
at 1.0. The loss of the first step must agree, or nothing is reported and the exit status is 1.
TRL takes a step as one micro-batch, as its gradient depends on the cut.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench import step
from bench.step import LAM, LR, PAIRS_A_STEP, Turns, make_pairs, memory_gb, positive
from tools.report import head, table, write

HERE = Path(__file__).resolve().parent

# glibc maps every large buffer anew and gives it back, so its pages are faulted in at each step.
# With these it keeps what it once had, in huge pages where the kernel offers them.
# train.py sees to the same by itself; importing it also sets THP_MEM_ALLOC_ENABLE, which a TRL as
# installed must not inherit.
AS_INSTALLED = {"THP_MEM_ALLOC_ENABLE": "0"}
TUNED = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**46),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Variant(NamedTuple):
    name: str
    program: list[str]
    environment: dict[str, str]
    about: str


VARIANTS = {
    "ours": Variant("ours", ["bench.step", "--serve"], {}, "train.py's step, as it is"),
    "trl": Variant(
        "TRL",
        ["bench.peers", "--serve", "trl"],
        AS_INSTALLED,
        "as installed: padded, and its default recomputation of activations",
    ),
    "plain": Variant(
        "TRL, no recomputation",
        ["bench.peers", "--serve", "plain"],
        AS_INSTALLED,
        "`gradient_checkpointing=False`, which its ORPOConfig turns on",
    ),
    "tuned": Variant(
        "TRL, tuned",
        ["bench.peers", "--serve", "plain"],
        TUNED,
        "no recomputation, and glibc told to keep its buffers: "
        + " ".join(f"{key}={value}" for key, value in TUNED.items()),
    ),
    "liger": Variant(
        "TRL + Liger, tuned",
        ["bench.peers", "--serve", "liger"],
        TUNED,
        "the same with Liger's LigerFusedLinearORPOLoss in place of logits and loss, not compiled",
    ),
    "compiled": Variant(
        "TRL, tuned and compiled",
        ["bench.peers", "--serve", "compiled"],
        TUNED,
        "TRL, tuned, with `torch_compile=True`: needs a C++ compiler and a minute to begin",
    ),
}
DEFAULT = ["ours", "trl", "tuned", "liger"]  # the others on request: ten minutes are soon over
LEAST_ROUNDS = 4
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


# ---------------------------------------------------------------------------------------------
# A peer's process.


def serve(args):
    turns = Turns()
    from transformers import AutoModelForCausalLM, TrainerCallback

    from tests.peers import trl_orpo

    Trainer = with_liger(trl_orpo.OnIds) if args.serve == "liger" else trl_orpo.OnIds
    turns.imported = memory_gb()

    class Recorded(Trainer):
        def compute_loss(self, *arguments, **keywords):
            loss = super().compute_loss(*arguments, **keywords)
            self.last_loss = loss.detach()
            return loss

    class InTurn(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.wait()

        def on_step_end(self, *_, **__):
            turns.done(trainer.last_loss)
            turns.wait()

    pairs = json.loads(args.pairs.read_text())
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        trainer = trl_orpo.make_trainer(
            model,
            pairs,
            out=out,
            trainer=Recorded,
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=args.serve == "trl",
            torch_compile=args.serve == "compiled",
            per_device_train_batch_size=args.batch_size,
            max_steps=len(pairs) // args.batch_size,
            learning_rate=LR,
            beta=LAM,
            lr_scheduler_type="constant",
            logging_steps=500,  # as installed
        )
        trainer.add_callback(InTurn())
        turns.ready()
        trainer.train()


def with_liger(Trainer):
    """TRL's trainer, its concatenated batch and metrics, but Liger's path from hidden states."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    class Fused(Trainer):
        fused = LigerFusedLinearORPOLoss(beta=LAM, compiled=False)  # which needs a C++ compiler

        def get_batch_loss_metrics(self, model, batch, train_eval="train"):
            both = self.concatenated_inputs(
                batch, padding_value=self.padding_value, device=self.accelerator.device
            )
            ids, mask = both["concatenated_input_ids"], both["concatenated_attention_mask"]
            # Trainer wraps the model's forward pass in autocast, and that is not called here.
            with self.accelerator.autocast():
                hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
                loss, (chosen, rejected, *_) = self.fused(
                    model.lm_head.weight,
                    hidden[:, :-1],
                    both["concatenated_labels"][:, 1:].contiguous(),
                    nll_target=ids.where(mask == 1, -100)[:, 1:].contiguous(),
                )
            return loss, {
                "logps/chosen": chosen.mean().item(),
                "logps/rejected": rejected.mean().item(),
            }

    return Fused


# ---------------------------------------------------------------------------------------------
# The alternation.


class Worker:
    def __init__(self, variant: Variant, arguments: list[str]):
        self.variant, self.seconds = variant, []
        script, *flags = variant.program
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", script, *flags, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | variant.environment,
        )

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.variant.name} ended early:\n{self.log.read()[-2000:]}")
        return json.loads(line)

    def ask(self, question) -> dict:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self.hear()

    def stop(self):
        self.process.stdin.close()  # at which it ends by itself, and tidies up
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def alternate(names, pair_set, dtype, rounds, seconds, warmup, threads) -> str:
    """One table: the workers in turn, until the rounds or the seconds after warm-up are over."""
    size = PAIRS_A_STEP[pair_set]
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        pairs_file, model = Path(folder, "pairs.json"), Path(folder, "model")
        pairs = make_pairs(pair_set, rounds + warmup)
        pairs_file.write_text(json.dumps([[x.tolist() for x in pair[:3]] for pair in pairs]))
        step.save_random_model(model)
        arguments = ["--model", model, "--pairs", pairs_file, "--batch-size", size]
        arguments = [str(x) for x in (*arguments, "--dtype", dtype, "--threads", threads)]
        try:
            workers += [Worker(VARIANTS[name], arguments) for name in names]
            ready = [worker.hear() for worker in workers]
            rates = []
            for i in range(warmup + rounds):
                if i == warmup:
                    begin, before = time.perf_counter(), cpu_seconds(workers)
                if i >= warmup + LEAST_ROUNDS and time.perf_counter() - begin > seconds:
                    break
                answers = [worker.ask("step") for worker in workers]
                rates.append(workers[0].ask({"rate": dtype})["rate"])
                if i == 0:
                    losses = [answer["loss"] for answer in answers]
                    check(names, losses, TOLERANCE[dtype])
                for worker, answer in zip(workers, answers, strict=True):
                    worker.seconds.append(answer["seconds"])
            machine, own = (b - a for a, b in zip(before, cpu_seconds(workers), strict=True))
            others = (machine - own) / (time.perf_counter() - begin) / os.cpu_count()
            memory = [worker.ask("memory") for worker in workers]
        finally:
            for worker in workers:
                worker.stop()
    flops, padded = (ready[0][key][warmup : len(rates)] for key in ("flops", "padded"))
    rates = rates[warmup:]
    rows = []
    for worker, loss, used in zip(workers, losses, memory, strict=True):
        times = worker.seconds[warmup:]
        ratios = [a / b for a, b in zip(times, workers[0].seconds[warmup:], strict=True)]
        shares = [f / s / r for f, s, r in zip(flops, times, rates, strict=True)]
        rows.append(
            [
                worker.variant.name,
                spread([1000 * s for s in times], ".0f"),
                "1" if worker is workers[0] else spread(ratios, ".2f"),
                f"{statistics.median(shares):.0%}",
                f"{used['peak']:.2f}",
                f"{used['imported']:.2f}",
                f"{loss:.5f}",
            ]
        )
    title = (
        f"### {pair_set} pairs ({size} a step), {dtype}\n\n{len(rates)} rounds; a step needs "
        f"{statistics.mean(flops) / 1e9:.0f} GFLOP, padded and with each prompt twice "
        f"{sum(padded) / sum(flops):.2f} times that; matrix products run at "
        f"{statistics.median(rates) / 1e9:.0f} GFLOP/s; others took {others:.0%} of the cores\n\n"
    )
    heads = ["", "ms a step (quartiles)", "times ours (quartiles)", "share of product rate"]
    return title + table([[*heads, "peak GB", "after imports", "first loss"], *rows])


def cpu_seconds(workers: list[Worker]) -> tuple[float, float]:
    """CPU time so far: the machine's, with what its host took away, and the workers'."""
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, _io, *rest = Path("/proc/stat").read_text().split()[1:9]
    machine = sum(int(x) for x in (user, nice, system, *rest))
    own = 0
    for worker in workers:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")")[-1].split()
        own += int(fields[11]) + int(fields[12])
    return machine / ticks, own / ticks


def check(names, losses, tolerance: float):
    worst = max(abs(loss / losses[0] - 1) for loss in losses)
    if not worst <= tolerance:  # also where it is NaN
        told = ", ".join(f"{name} {loss:.6f}" for name, loss in zip(names, losses, strict=True))
        raise RuntimeError(f"the losses of the first step differ: {told}")


def spread(values: list[float], form: str) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:{form}} ({low:{form}} to {high:{form}})"


def results_file(name: str = "cpu", suffix: str = "md") -> Path:
    return HERE / "results" / f"{datetime.date.today()}-{name}.{suffix}"


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=PAIRS_A_STEP, help="one set of pairs (default: both)")
    parser.add_argument("--dtype", choices=TOLERANCE, help="one dtype (default: both)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT)
    parser.add_argument("--rounds", type=positive, default=30, help="at most")
    parser.add_argument("--seconds", type=positive, default=60, help="a table, after warm-up")
    parser.add_argument("--warmup", type=positive, default=4, help="rounds that do not count")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=results_file(), help="file to write")
    parser.add_argument("--append", action="store_true", help="to it, without a head")
    parser.add_argument(
        "--serve", choices=("trl", "plain", "liger", "compiled"), help=argparse.SUPPRESS
    )
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=positive, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        return serve(args)
    if args.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds: quartiles need at least {LEAST_ROUNDS}")
    for package in ("trl", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed; `make bench` installs it, in .venv-peers")
    names = ["ours", *(name for name in VARIANTS if name in args.variants and name != "ours")]
    text = "" if args.append else head(args.threads) + "\n"
    text += "".join(f"- {VARIANTS[name].name}: {VARIANTS[name].about}\n" for name in names)
    try:
        print(text)
        write(text, args.out, args.append)
        for pair_set in [args.only] if args.only else PAIRS_A_STEP:
            for dtype in [args.dtype] if args.dtype else TOLERANCE:
                text = alternate(
                    names, pair_set, dtype, args.rounds, args.seconds, args.warmup, args.threads
                )
                print(text, flush=True)
                write("\n" + text, args.out, append=True)
    except (OSError, RuntimeError) as error:
        print(f"peers.py: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
