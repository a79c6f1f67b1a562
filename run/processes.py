"""Processes and devices: torchrun's processes, what they add up, the CPU or GPU that each has.

Every process does the same with its own share of a step's pairs (data.micro_batches), and what they
find adds up: the sums of all processes are the sums of the step. Plain collectives, and FSDP2 for
--shard; no wrapper around the model hides anything.
"""

import contextlib
import ctypes
import math
import mmap
import os
import re
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from model import Transformer
from run.flags import TrainConfig


def rank() -> int:
    """The number of this process; 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """No process continues before all have come here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(()))  # on the CPU, by gloo: no GPU is waited for


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensors: list[torch.Tensor]):
    """Makes each tensor its sum over all processes, in place: no second copy of the gradients."""
    if world_size() > 1:
        for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
            work.wait()


def max_over_processes(number: int) -> int:
    x = torch.tensor(number)  # on the CPU, by gloo: the GPU is not waited for
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return int(x)


def gather(own) -> list:
    """What each process has, in their order, for all of them. Through the CPU, pickled."""
    everyones = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyones, own)
    return everyones


def is_sharded(model: Transformer) -> bool:
    return isinstance(model, fsdp.FSDPModule)


def shard(model: Transformer, config: TrainConfig):
    """FSDP2: each process keeps a part of every weight; a block is gathered when it is its turn.

    Blocks are gathered in --dtype, what is around them in float32, as the loss wants lm_head.
    Gradients are summed in float32, and not averaged: see `training_step`.
    """
    mesh = init_device_mesh(torch.device(config.device).type, (world_size(),))
    dtype = getattr(torch, config.dtype)
    dtypes = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=dtypes)
    fsdp.fully_shard(model, mesh=mesh)
    for module in (*model.layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    fsdp.register_fsdp_forward_method(model, "hidden_states")


@contextlib.contextmanager
def resharded(model: Transformer):
    """At its end, also where a signal ends it, embedding and lm_head go back to their parts: they
    are still gathered after a forward pass that no backward pass follows."""
    try:
        yield
    finally:
        if is_sharded(model):
            model.reshard()


def has_bfloat16(device: torch.device) -> bool:
    """GPUs before Ampere (8.0), such as the T4, only emulate it, and have no Flash attention."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def is_one_of_several() -> bool:
    """Whether this is a process of torchrun, or of a scheduler that sets the same variables; some
    set WORLD_SIZE=1 for a single process, and some no LOCAL_RANK. Raises ValueError."""
    n = os.environ.get("WORLD_SIZE")
    if n is None or (n == "1" and "LOCAL_RANK" not in os.environ):
        return False
    if lacking := [x for x in ("RANK", "MASTER_ADDR", "MASTER_PORT") if x not in os.environ]:
        raise ValueError(
            f"the environment has WORLD_SIZE={n}, but no {' and no '.join(lacking)}: start with "
            "torchrun, or unset WORLD_SIZE"
        )
    return True


def pick_device(config: TrainConfig) -> torch.device:
    """Sets config.device and config.dtype where they are left open; joins torchrun's processes.

    Raises ValueError.
    """
    wanted = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"--device {wanted}: unknown; use cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {wanted}: only cpu and cuda are supported")
    several = is_one_of_several()
    if config.eval_only and not several:  # which --config OUT/run.json may say
        config.shard = False
    if config.shard and not several:
        raise ValueError("--shard: there is one process; torchrun --nproc-per-node N starts more")
    if device.type == "cuda":
        if several and device.index is not None:
            raise ValueError(f"--device {wanted}: torchrun gives each process its own: use cuda")
        # With its index: a device without one means the current GPU, and set_device refuses it.
        index = int(os.environ.get("LOCAL_RANK", 0)) if several else device.index or 0
        n = torch.cuda.device_count()
        if several and n == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            index = 0  # of srun --gpus-per-task=1, which shows each process only its own
        if index >= n:
            which = f" (local rank {index})" if several else ""
            raise ValueError(f"--device {wanted}{which}: this machine shows {n} CUDA devices")
        device = torch.device("cuda", index)
    config.device = str(device)
    config.dtype = config.dtype or ("bfloat16" if has_bfloat16(device) else "float32")
    if config.dtype == "bfloat16" and device.type == "cuda" and not has_bfloat16(device):
        advice = "resume on another, or start a new run" if config.resume else "use --dtype float32"
        raise ValueError(f"--dtype bfloat16: {device} is a GPU without it; {advice}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what float32 is left goes through tf32
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if several and not dist.is_initialized():
        # Hours, as the others wait while process 0 writes a large model.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        except RuntimeError as error:  # of gloo, or of the store at MASTER_ADDR
            reason = str(error).partition("\n")[0]
            advice = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the machines' common network"
            problem = f"the processes do not find each other ({reason:.300})"
            advice = f"{advice} interface, and look at MASTER_ADDR and MASTER_PORT"
            raise ValueError(f"{problem}; {advice}") from None
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory():
    """On a CPU: no buffer goes back to the system, so that a step does not pay for its pages anew.

    glibc's malloc gives large buffers back at once, and getting them again, page by page, took up
    to half of a step. Where there is no glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


planned_peak = 0  # bytes that the largest micro-batch took, on a CPU


def remember_peak(n_bytes: float):
    global planned_peak
    planned_peak = n_bytes


def give_back_memory():
    """On a CPU, before a micro-batch: gives freed memory back where too much of it is kept.

    Micro-batches of ever new sizes leave gaps between buffers, which keep_freed_memory keeps too:
    a model of 135M grew from 15 GB to 24 GB within nine steps. It costs the time to get the pages
    anew, so we do it only where more is held than was planned, or where the machine has not enough
    left for another micro-batch.
    """
    if not planned_peak or sys.platform != "linux":
        return
    held = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    left = 1024 * int(found[1]) if found else math.inf
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None and (held > 1.25 * planned_peak or left < planned_peak):
        trim(0)


def is_of_peers(error: RuntimeError) -> bool:
    """Whether an error is one of the connection to other processes, as gloo and NCCL report it."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return dist.is_initialized() and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )


def about_peers(error: RuntimeError) -> str:
    """What to say of an error for which `is_of_peers` is true. With its first line and its last, as
    NCCL gives the reason in the last one, and that may lie in this process, too."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ... ".join(dict.fromkeys(f"{line:.200}" for line in (lines[:1] + lines[-1:])))
    return (
        "another process of this job has failed or was killed, or cannot be reached; what it "
        f"printed, or the system's log, may say why; this process got the error: {said}"
    )


# What ends a run in order: Ctrl-C, a closed terminal, what SLURM, SGE, systemd, torchrun send.
STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@contextlib.contextmanager
def stop_signals():
    """Yields a list that grows with each signal that asks the run to stop. Only a second Ctrl-C
    kills at once: schedulers send some signals twice, to torchrun and to its processes.

    Outside of the main thread no signal can be handled, and the list stays empty.
    """
    seen = []

    def note(number, frame):
        if not seen and rank() == 0:
            how = "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
            text = f"{signal.Signals(number).name}: finishing this step, then saving{how}\n"
            with contextlib.suppress(OSError):  # by the system: print may be interrupted by itself
                os.write(2, text.encode())
        seen.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in STOPS):
            # nohup has SIGHUP ignored, and means that the run outlives its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """A signal has asked the run to stop."""

    def __init__(self, number: int):
        self.number = number


def check_stopped(seen: list):
    """Raises Stopped where a signal has come, to this process or to another one; all processes call
    it together."""
    if number := max_over_processes(seen[-1] if seen else 0):
        raise Stopped(number)
