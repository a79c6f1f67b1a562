"""Aligns a base model with ORPO.

    python train.py                                        the built-in job (a minute on a laptop)
    python train.py --model DIR --data FILE --eval-data FILE --out OUT
    python train.py ... --dry-run                          the plan, memory, disk and time only
    python train.py ... --resume                           goes on after an interruption
    torchrun --nproc-per-node N train.py ...               the same steps over N processes
    python train.py --model DIR --eval-data FILE --eval-only

The first quarter of this file is the method: settings, the parts of a step, and `train` with the
loop. The rest, behind a ruler, is engineering: processes, loading, the plan, the log, signals.

What runs in which dtype:

                                               --dtype float32    --dtype bfloat16
    trained weights, gradients, Adam's moments float32            float32
    frozen weights (--lora-rank)               float32            bfloat16
    residual stream, matrix products           float32 (tf32      bfloat16 (a weight is cast where
                                               on CUDA)           it is used)
    norms, rotary angles, log-softmax          float32            float32
    the loss's scalars, one a token or pair    float64            float64
    sum of lm_head's gradient over groups      float32            float32

There is no dropout, whatever the checkpoint's config says (TRL switches it off too).
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # while torch is imported; `main` sees what comes later
    signal.signal(
        signal.SIGINT, lambda *_: (os.write(2, b"train.py: stopped by Ctrl-C\n"), os._exit(130))
    )

# Both are read when memory is first allocated, so they are set before torch is imported. On a CPU
# large tensors then lie in huge pages; on a GPU blocks of memory can grow, so that micro-batches of
# ever new sizes leave no gaps behind.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

import checkpoint
import data
from checkpoint import (
    LOCK,
    barrier,
    checkpoints,
    full_tensor,
    load_state,
    locked,
    rank,
    save_state,
    whole_file,
)
from data import Batch, Pair, PairSet
from model import ModelConfig, Segments, Transformer, to_device
from orpo import ORPOOutput, fused_linear_orpo, log_odds, odds_ratio_grad

# ---------------------------------------------------------------------------------------------
# Settings. A field is a flag; a JSON config holds the same names.


def flag(group: str, default, help: str, choices=None, least=None, below=math.inf, **more):
    """A field of TrainConfig. bare=: its value where the flag is given without one. trl=: the
    default of TRL's ORPOTrainer, for --help, where another one matters."""
    limits = {"choices": choices, "least": least, "below": below, "bare": None, "trl": None}
    return dataclasses.field(
        default=default, metadata={"group": group, "help": help} | limits | more
    )


SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")
PATHS = ("model", "data", "eval_data", "chat_template", "out")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
IO, OBJECTIVE, OPTIMIZER = "input and output", "objective", "optimizer"
SFT_LOSS_HELP = "tokens under L_SFT: those of the chosen response, or of the prompt too"
BATCH_SIZE_HELP = "pairs in a step, over all processes together"
MICRO_BATCH_HELP = "tokens at a time in each process; the result does not depend on it"
RECOMPUTE_HELP = "blocks that each process computes twice, to save memory; without a number: all"
LENGTH_HELP = "tokens of prompt and response; longer responses are cut"
EVAL_EVERY_HELP = "steps between evaluations, for OUT/best too; 0: only before and after"
DTYPE_HELP = "dtype of matrix products (default: bfloat16 on cuda, float32 on cpu)"


@dataclass
class TrainConfig:
    model: str = flag(IO, None, "folder of the Hugging Face checkpoint to train or evaluate")
    data: str = flag(IO, None, "file of preference pairs to train on (JSON Lines)")
    eval_data: str = flag(IO, None, "file of held-out pairs for evaluation")
    eval_fraction: float = flag(IO, 0.0, "share of --data's prompts to hold out", least=0, below=1)
    chat_template: str = flag(IO, None, "Jinja file to use instead of the model's chat template")
    out: str = flag(IO, None, "folder for the metrics, the checkpoints and the trained model")
    lam: float = flag(OBJECTIVE, 0.1, "weight of L_OR; TRL calls it beta", least=0)
    sft_loss: str = flag(OBJECTIVE, "response", SFT_LOSS_HELP, ("response", "full"), trl="full")
    lr: float = flag(OPTIMIZER, 8e-6, "peak learning rate of AdamW", least=0, trl=1e-6)
    lr_schedule: str = flag(OPTIMIZER, "cosine", "shape after the warm-up", SCHEDULES, trl="linear")
    warmup_steps: int = flag(OPTIMIZER, 10, "steps up to the peak learning rate", least=0, trl=0)
    weight_decay: float = flag(OPTIMIZER, 0.0, "decay of matrices, not of other weights", least=0)
    grad_clip: float = flag(OPTIMIZER, 1.0, "largest gradient norm; 0 disables clipping", least=0)
    adam_beta1: float = flag(OPTIMIZER, 0.9, "decay of the first moment", least=0, below=1)
    adam_beta2: float = flag(OPTIMIZER, 0.999, "decay of the second moment", least=0, below=1)
    epochs: int = flag("length", 1, "passes over the training pairs", least=1, trl=3)
    max_steps: int = flag("length", None, "number of updates; replaces --epochs", least=1)
    batch_size: int = flag("length", 32, BATCH_SIZE_HELP, least=1, trl="8 in each process")
    micro_batch_tokens: int = flag("memory", 8192, MICRO_BATCH_HELP, least=1)
    shard: bool = flag("memory", False, "divide weights and optimizer state over all processes")
    activation_checkpointing: int = flag("memory", False, RECOMPUTE_HELP, least=0, bare=True)
    lora_rank: int = flag("memory", 0, "rank of LoRA adapters; 0 trains the whole model", least=0)
    lora_alpha: float = flag("memory", 16.0, "adapters are scaled by alpha / rank", least=1e-3)
    lora_adapters: bool = flag("memory", False, "also write OUT/adapters, which peft loads")
    max_length: int = flag("memory", 2048, LENGTH_HELP, least=2, trl=1024)
    max_prompt_length: int = flag("memory", 1792, "pairs with longer prompts are dropped", least=1)
    seed: int = flag("run", 42, "seed of the order of pairs and of sampling", least=0, below=2**63)
    device: str = flag("run", None, "cpu, cuda or cuda:N (default: cuda if there is one)")
    dtype: str = flag("run", None, DTYPE_HELP, ("float32", "bfloat16"))
    compile: bool = flag("run", False, "compile the blocks with torch.compile, which takes minutes")
    log_every: int = flag("run", 1, "steps between rows of OUT/metrics.jsonl", least=1)
    eval_every: int = flag("run", 0, EVAL_EVERY_HELP, least=0)
    save_every: int = flag("run", 500, "steps between checkpoints, the last too; 0: none", least=0)
    keep: int = flag("run", 2, "number of checkpoints that are kept, the newest", least=1)
    resume: bool = flag("run", False, "continue the run in --out from its newest checkpoint")
    eval_only: bool = flag("run", False, "evaluate --model and print one JSON object")
    dry_run: bool = flag("run", False, "print the plan, try the largest micro-batch, and stop")

    def check(self, source: str = ""):
        """Raises ValueError with the first flag whose value is of the wrong type or range."""
        for f in dataclasses.fields(self):
            value, name = getattr(self, f.name), source + "--" + f.name.replace("_", "-")
            if value is None:
                continue
            wanted = (int, float) if f.type is float else f.type
            a_flag = f.type is bool or f.metadata["bare"] is not None  # may be true or false
            if not isinstance(value, wanted) or (isinstance(value, bool) and not a_flag):
                raise ValueError(f"{name} must be {KINDS[f.type]}, not {value!r}")
            choices, least, below = (f.metadata[key] for key in ("choices", "least", "below"))
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
            if least is not None and not least <= value < below:
                limit = f" and below {below}" if below < math.inf else ""
                raise ValueError(f"{name} must be at least {least}{limit}, not {value}")
        if self.shard and self.lora_rank:
            raise ValueError(
                f"{source}--shard and --lora-rank do not go together: a frozen model is not sharded"
            )
        if self.lora_adapters and not self.lora_rank:
            raise ValueError(f"{source}--lora-adapters needs --lora-rank, which makes adapters")
        if self.dry_run and self.eval_only:
            raise ValueError(f"{source}--dry-run plans a training run, and --eval-only is none")


# ---------------------------------------------------------------------------------------------
# The parts of a step.


def lr_at(step: int, n_steps: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (1 is the first): a function of the step alone."""
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - 1 - warmup) / max(1, n_steps - warmup)  # 0 at the first step after warm-up
    if config.lr_schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    if config.lr_schedule == "inverse_sqrt":
        scale = warmup or 10_000  # as in transformers
        return config.lr * math.sqrt(scale / (scale + step - 1 - warmup))
    return config.lr * (1 - progress if config.lr_schedule == "linear" else 1)


def steps_in_epoch(pairs: list[Pair], config: TrainConfig) -> int:
    """The last step of an epoch may hold fewer pairs; none is dropped."""
    return math.ceil(len(pairs) / config.batch_size)


def step_pairs(pairs: list[Pair], step: int, config: TrainConfig) -> list[Pair]:
    """The pairs of update `step`: by (seed, step) alone, so resuming needs no state."""
    epoch, i = divmod(step - 1, steps_in_epoch(pairs, config))
    indices = data.epoch_permutation(len(pairs), config.seed, epoch)
    return [pairs[k] for k in indices[i * config.batch_size :][: config.batch_size]]


def micro_batches(pairs: list[Pair], config: TrainConfig, share: bool = True) -> list[Batch]:
    """A step's pairs, packed: this process's share of them, or all.

    In bfloat16 lengths are padded to multiples of 64: a CPU builds a kernel for every new shape,
    and the tiles of a GPU have such sizes.
    """
    multiple = 64 if config.dtype == "bfloat16" else 1
    mine = (rank(), world_size()) if share else (0, 1)
    return data.micro_batches(pairs, config.micro_batch_tokens, config.sft_loss, multiple, *mine)


def forward(model: Transformer, batch: Batch, lam: float) -> ORPOOutput:
    """The loss of one micro-batch, as its share of the step's."""
    device = model.device
    b = Batch(*(to_device(x, device) if torch.is_tensor(x) else x for x in batch))
    segments = Segments.of(b.q_lens, b.k_lens, b.key_index, device)
    hidden = model.hidden_states(b.tokens, b.positions, segments)  # (N, D)
    hidden, lm_head = model.projection(hidden.index_select(0, b.predict))  # (P, D), (V, D)
    return fused_linear_orpo(
        hidden,
        lm_head,
        b.targets,
        b.response,
        b.nll_weight,
        lam,
        b.n_pairs,
        b.response_lengths,
        b.groups,
    )


def training_step(model: Transformer, optimizer, batches: list[Batch], config: TrainConfig):
    """One update: the outputs of its micro-batches, and the gradient's norm before clipping.

    The host only queues work here; it never waits for a number of the device.
    """
    outputs = []
    for batch in batches:
        output = forward(model, batch, config.lam)
        output.loss.backward()  # gradients just add up: every normaliser is the whole step's
        outputs.append(output)
    loss = torch.stack([output.loss.detach() for output in outputs]).sum()
    # FSDP2 has summed the gradients of a sharded model itself, in each backward pass.
    gradients = [] if config.shard else [p.grad for p in trainable(model)]
    sum_over_processes([loss, *gradients])
    largest = config.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(trainable(model), largest, foreach=True)
    grad_norm = full_tensor(grad_norm)
    # Where loss or norm is not finite there is no update, then or later. found_inf is the flag by
    # which PyTorch's GradScaler tells a fused AdamW to leave everything as it is. Adam counts the
    # updates that it makes, so whoever reads the count can tell at which step it stopped.
    optimizer.found_inf = optimizer.found_inf.maximum(~torch.isfinite(loss + grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outputs, grad_norm


def metrics_of(outputs: list[ORPOOutput], lam: float, n_pairs: int) -> dict[str, torch.Tensor]:
    """A step's metrics, under the names that TRL's users know, still on the device.

    Each is a sum: over the pairs of this process, then over processes.
    """
    chosen = torch.cat([o.chosen_logps for o in outputs])
    rejected = torch.cat([o.rejected_logps for o in outputs])
    pair_losses = torch.cat([o.odds_ratio_loss for o in outputs])
    shares = {
        "loss": torch.stack([o.loss.detach().double() for o in outputs]).sum(),
        "nll_loss": torch.stack([o.nll_loss for o in outputs]).sum(),
        "log_odds_ratio": -pair_losses.sum() / n_pairs,  # TRL's name: mean log *sigmoid* of the ...
        "log_odds_chosen": (log_odds(chosen) - log_odds(rejected)).sum() / n_pairs,  # ... log odds
        # How hard L_OR pulls on a chosen token, L_SFT's pull being 1: lam * delta / (1 - P_w).
        "pull_ratio": -lam * odds_ratio_grad(chosen, rejected)[0].sum() / n_pairs,
        "rewards/chosen": lam * chosen.sum() / n_pairs,
        "rewards/rejected": lam * rejected.sum() / n_pairs,
        "rewards/accuracies": (chosen > rejected).double().sum() / n_pairs,
        "rewards/margins": lam * (chosen - rejected).sum() / n_pairs,
        "logps/chosen": chosen.sum() / n_pairs,  # mean over a response's tokens, then over pairs
        "logps/rejected": rejected.sum() / n_pairs,
    }
    sums = torch.stack(list(shares.values()))
    sum_over_processes([sums])
    return dict(zip(shares, sums, strict=True))


@torch.no_grad()
def evaluate(model: Transformer, pairs: list[Pair], config: TrainConfig) -> dict[str, float]:
    """The metrics over all of an evaluation set, normalised over all of it, as eval_*."""
    outputs = [forward(model, batch, config.lam) for batch in micro_batches(pairs, config)]
    reshard(model)
    metrics = HostCopy(metrics_of(outputs, config.lam, len(pairs))).read()
    return {f"eval_{name}": value for name, value in metrics.items()}


def evaluation(model: Transformer, tokenizer, pairs: list[Pair], step: int, config: TrainConfig):
    """The row of an evaluation after `step` updates."""
    row = {"step": step} | evaluate(model, pairs, config)
    return row | accepted(model, tokenizer, pairs, config.seed + step)


# ---------------------------------------------------------------------------------------------
# A run.


def train(config: TrainConfig, out: Path | None) -> int:
    """One run, from the plan that is printed to the model that is saved; its exit status."""
    model, tokenizer, train_set, eval_set = load_inputs(config)
    pairs, eval_pairs = train_set.pairs, eval_set.pairs

    plan = make_plan(model, tokenizer, train_set, eval_set, config)
    n_steps, optimizer = plan.n_steps, make_optimizer(model, config)
    try_largest(model, optimizer, plan, config)
    if config.dry_run:
        return 0
    shown = [pair.prompt for pair in (eval_pairs or pairs)[:3]]
    before = answers(model, tokenizer, shown, 64)
    start = load_checkpoint(out, model, optimizer, plan, config) if config.resume else 0
    begin_folder(out, start, config)
    log = Log(out, model, start, plan, config)

    upcoming = micro_batches(step_pairs(pairs, start + 1, config), config)
    with stop_signals() as stopped, blame_rows(model, pairs, config):
        for step in range(start, n_steps + 1):  # `step` updates have been made
            # Once in a while, with the clock stopped: evaluate, save, stop.
            here_before = start > 0 and step == start  # so many steps that a checkpoint was saved
            evaluates = eval_pairs and (step in (0, n_steps) or due(step, config.eval_every))
            saves = config.save_every and (step == n_steps or due(step, config.save_every))
            stop = max_over_processes(stopped[-1] if stopped else 0)
            if not here_before and (evaluates or saves or stop):
                with log.paused():
                    check_updates(optimizer, model, step)
                    if evaluates:
                        row = evaluation(model, tokenizer, eval_pairs, step, config)
                        log.evaluation(row)
                        save_best(row, model, tokenizer, pairs, config, out)
                    if step > 0 and (saves or stop):
                        save_checkpoint(out, step, model, optimizer, tokenizer, pairs, plan, config)
            if step == n_steps:
                break
            if stop:
                log.close()
                name = signal.Signals(stop).name
                print(f"{name}: stopped after step {step} of {n_steps}; continue with --resume")
                return 128 + stop  # as a shell counts

            # One step.
            lr = lr_at(step + 1, n_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            outputs, grad_norm = training_step(model, optimizer, upcoming, config)
            # While the device computes: pack the next step, and log the one before.
            upcoming = micro_batches(step_pairs(pairs, step + 2, config), config)
            log.step(
                step + 1, step_pairs(pairs, step + 1, config), outputs, grad_norm, lr, optimizer
            )
        log.close()

    finish(model, tokenizer, pairs, n_steps, config, out)
    print_changes(out, n_steps)
    after = answers(model, tokenizer, shown, 64)
    for prompt, *texts in zip(shown, before, after, strict=True):
        print("\n{}\n  before: {}\n  after:  {}".format(tokenizer.decode(prompt), *texts))
    print(f"\nwrote {out}/metrics.jsonl and {out}/model, a Hugging Face folder")
    print_best(out)
    if is_builtin(config):
        print(f"to compare with SFT alone: python train.py --lam 0 --out {out.parent / 'sft'}")
        print(f"then draw both: python examples/plot.py {out} {out.parent / 'sft'}")
    return 0


# =============================================================================================
# Nothing below is ORPO: processes, memory, loading, the plan, the log, checkpoints, flags.
# =============================================================================================


def trainable(model: Transformer) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, whose weight decay is of matrices and not of norms and biases."""
    groups = [
        {"params": [p for p in trainable(model) if p.dim() >= 2]},
        {"params": [p for p in trainable(model) if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas, decay = (config.adam_beta1, config.adam_beta2), config.weight_decay
    adamw = torch.optim.AdamW(groups, config.lr, betas, eps=1e-8, weight_decay=decay, fused=True)
    adamw.found_inf = torch.zeros((), device=model.device)  # see training_step
    return adamw


# ---------------------------------------------------------------------------------------------
# The model's own answers.


def answers(
    model, tokenizer, prompts, max_new: int, batch_tokens=8192, progress=iter, **sampling
) -> list[str]:
    """The model's answer to each prompt (token ids), as text, empty if that fills the context.

    Prompts of like lengths go together while they and their longest answers have batch_tokens
    tokens. Sampled answers depend on their neighbours: see Transformer.generate.
    """
    texts, end, context = [""] * len(prompts), tokenizer.turn_end(), model.config.max_seq_len
    batches, size = [], math.inf
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if len(prompts[i]) >= context:
            continue
        n_tokens = min(len(prompts[i]) + max_new, context)
        if size + n_tokens > batch_tokens:
            batches, size = [*batches, []], 0
        batches[-1].append(i)
        size += n_tokens
    for batch in progress(batches):
        rows = [prompts[i] for i in batch]
        new = model.generate(rows, max_new, eos_id=tokenizer.eos_id, **sampling)
        for i, ids in zip(batch, new, strict=True):
            ids = ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids
            texts[i] = tokenizer.decode(ids).strip().removesuffix(end).strip()
    reshard(model)
    return texts


def accepted(model: Transformer, tokenizer, pairs: list[Pair], seed: int) -> dict[str, float]:
    """Where rows list the answers that they accept: the share of the model's that is among them."""
    asked = [pair for pair in pairs if pair.accept is not None]
    if not asked:
        return {}
    prompts = [pair.prompt for pair in asked]
    longest = 2 * max(max(pair.lengths[1:]) for pair in asked)
    shares = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        generator = torch.Generator(model.device).manual_seed(seed)
        sampling = {"temperature": temperature, "generator": generator}
        texts = answers(model, tokenizer, prompts, longest, **sampling)
        good = [text in pair.accept for text, pair in zip(texts, asked, strict=True)]
        shares[f"eval_accepted/{name}"] = sum(good) / len(good)
    return shares


# ---------------------------------------------------------------------------------------------
# Processes: each takes its share of a step's pairs, and what they find adds up.


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


def reshard(model: Transformer):
    """Behind a forward pass without a backward pass embedding and lm_head are still gathered."""
    if isinstance(model, fsdp.FSDPModule):
        model.reshard()


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
    several = "WORLD_SIZE" in os.environ  # torchrun says so
    if config.eval_only and not several:  # how the run trained, as its config.json says
        config.shard = False
    if config.shard and not several:
        raise ValueError("--shard: there is one process; torchrun --nproc-per-node N starts more")
    if device.type == "cuda":
        if several and device.index is not None:
            raise ValueError(f"--device {wanted}: torchrun gives each process its own: use cuda")
        # With its index: a device without one means the current GPU, and set_device refuses it.
        index = int(os.environ["LOCAL_RANK"]) if several else device.index or 0
        n = torch.cuda.device_count()
        if index >= n:
            which = f" (local rank {index})" if several else ""
            raise ValueError(f"--device {wanted}{which}: this machine shows {n} CUDA devices")
        device = torch.device("cuda", index)
    config.device = str(device)
    config.dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what float32 is left goes through tf32
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if several and not dist.is_initialized():
        # Hours, as the others wait while process 0 writes a large model.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
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


# ---------------------------------------------------------------------------------------------
# Loading.


def load_inputs(config: TrainConfig):
    """(model, tokenizer, pairs to train on, pairs to evaluate on)."""
    model = load_model(config)
    tokenizer = data.load_tokenizer(config.model, config.chat_template)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{config.model}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
            f"the embedding only {model.config.vocab_size} rows"
        )
    trains = not config.eval_only
    train_rows = data.load_preferences(config.data) if trains or not config.eval_data else []
    eval_rows = data.load_preferences(config.eval_data) if config.eval_data else []
    if config.eval_fraction:
        train_rows, eval_rows = data.hold_out(train_rows, config.eval_fraction, config.seed)
        if not train_rows:
            raise ValueError(f"{config.data}: --eval-fraction leaves no pairs to train on")
    train_rows = train_rows if trains else []
    return model, tokenizer, *(encode(rows, tokenizer, config) for rows in (train_rows, eval_rows))


def load_model(config: TrainConfig) -> Transformer:
    """The model on its device, in the dtypes that training wants, sharded, with adapters."""
    dtype = getattr(torch, config.dtype if config.lora_rank else "float32")
    shard_it = functools.partial(shard, config=config) if config.shard else None
    with out_of_memory_advice(config):
        model = Transformer.from_pretrained(config.model, config.device, dtype, shard_it)
        if config.lora_rank:
            model.add_lora(config.lora_rank, config.lora_alpha, config.seed)
    model.compute_dtype = getattr(torch, config.dtype)
    n = config.activation_checkpointing
    model.checkpointed_blocks = model.config.n_layers if n is True else int(n)
    for block in model.layers if config.compile else ():
        block.compile(dynamic=True)
    return model


def encode(rows: list, tokenizer, config: TrainConfig) -> PairSet:
    quiet = True if rank() else None  # None: no progress bar where there is no terminal
    progress = functools.partial(tqdm, desc="tokenizing", unit="row", disable=quiet, leave=False)
    limits = config.max_length, config.max_prompt_length
    return data.make_pairs(rows, tokenizer, *limits, progress)


# ---------------------------------------------------------------------------------------------
# The plan: what the run will do and need, before it does it.


class Plan(NamedTuple):
    n_steps: int
    steps_an_epoch: int
    largest: list[Pair]  # the micro-batch of most tokens
    several: bool  # some step has several micro-batches in a process
    digests: dict[str, str]  # of the pairs of --data and --eval-data


def make_plan(model, tokenizer, train_set: PairSet, eval_set: PairSet, config: TrainConfig) -> Plan:
    """Goes through all steps without computing them, and prints what they will be."""
    c, pairs, n_processes = config, train_set.pairs, world_size()
    trained, n_parameters = count_parameters(model)
    an_epoch = steps_in_epoch(pairs, c)
    n_steps = c.max_steps or c.epochs * an_epoch
    steps = [step_pairs(pairs, step, c) for step in range(1, n_steps + 1)]
    shares = [share for step in steps for share in data.balance_over_ranks(step, n_processes)]
    splits = [data.split_by_tokens(share, c.micro_batch_tokens) for share in shares]
    parts = [part for split in splits for part in split]
    tokens = [sum(pair.n_tokens for pair in part) for part in parts]
    largest = parts[tokens.index(max(tokens))]
    several = max(map(len, splits)) > 1  # not by len(parts): a process may have no pair in a step

    print(f"model    {c.model}: {n_parameters:,} parameters, stored as {model.config.dtype}")
    print(f"         {trained:,} trained, in float32, products in {c.dtype}, on {c.device}")
    for name, pair_set in (("train", train_set), ("eval", eval_set)):
        if pair_set.pairs:
            print(f"{name:<8} {pair_set.about}")
    print(
        f"steps    {n_steps} of {c.batch_size} pairs ({an_epoch} an epoch), "
        f"{sum(tokens) / n_steps:.0f} tokens a step in {len(parts) / n_steps:.1f} micro-batches, "
        f"the largest of {max(tokens)}"
    )
    if n_processes > 1:
        loads = [sum(pair.n_tokens for pair in share) for share in shares]
        busiest = [max(loads[i : i + n_processes]) for i in range(0, len(loads), n_processes)]
        ratio = n_processes * sum(busiest) / sum(tokens)
        print(
            f"         over {n_processes} processes, the busiest with {ratio:.2f} of an equal share"
        )
    print(
        f"         lam {c.lam}, SFT over {c.sft_loss}, lr {c.lr} "
        f"({c.lr_schedule}, {c.warmup_steps} warm-up), seed {c.seed}"
    )
    n_flops = sum(step_flops(model, step, c) for step in steps)
    repeated = min(model.checkpointed_blocks, model.config.n_layers) / model.config.n_layers
    seconds = n_flops * (1 + repeated / 3) / (0.5 * product_rate(model) * n_processes)
    print(
        f"time     about {duration(seconds)}, if matrix products reach half of their speed alone; "
        "by the clock after 3 steps"
    )
    state = gigabytes(fixed_memory(trained, n_parameters, c))
    each = " in each process" if c.shard else ""
    print(
        f"memory   {state}{each} for weights, gradients and Adam's moments; the rest is tried next"
    )
    needed, n_checkpoints = disk_needed(model, n_steps, c)
    free = disk_free(Path(c.out or "."))
    warning = "" if needed < free else ": NOT ENOUGH; lower --keep, or name another --out"
    print(
        f"disk     {gigabytes(needed)} for the model{', the best one' if c.eval_every else ''} and "
        f"{n_checkpoints} checkpoint{'' if n_checkpoints == 1 else 's'}, "
        f"of {gigabytes(free)} free{warning}"
    )
    print("the first pair, as trained on:")
    print(data.show(pairs[0], tokenizer, colour=data.use_colour()), flush=True)
    sets = (("data", train_set), ("eval_data", eval_set))
    digests = {name: data.digest(pair_set.pairs) for name, pair_set in sets}
    return Plan(n_steps, an_epoch, largest, several, digests)


def count_parameters(model: Transformer) -> tuple[int, int]:
    """Those that are trained, and those of the model without adapters."""
    trained, n = (
        sum(p.numel() for p in trainable(model)),
        sum(p.numel() for p in model.parameters()),
    )
    return trained, n - trained if model.lora_layers() else n


def fixed_memory(trained: int, n_parameters: int, config: TrainConfig) -> int:
    """Bytes of a process that no micro-batch changes: in float32 weights, gradients and Adam's two
    moments, which --shard divides; or adapters in the same way, and frozen weights in --dtype."""
    if config.lora_rank:
        return 16 * trained + n_parameters * getattr(torch, config.dtype).itemsize
    return 16 * n_parameters // (world_size() if config.shard else 1)


def disk_needed(model: Transformer, n_steps: int, config: TrainConfig) -> tuple[int, int]:
    """Bytes of OUT/model, OUT/best, OUT/adapters and the checkpoints at the most, and how many
    checkpoints these are: one more than --keep, as an old one goes when a new one is complete, or
    all of a short run. (So it is with OUT/best, but before there is OUT/model.)"""
    trained, n_parameters = count_parameters(model)
    stored = n_parameters * getattr(torch, model.config.dtype).itemsize
    needed = stored * (2 if config.eval_every else 1)
    needed += 4 * trained if config.lora_adapters else 0
    written = math.ceil(n_steps / config.save_every) if config.save_every else 0
    n_checkpoints = min(config.keep + 1, written)
    return needed + 12 * trained * n_checkpoints, n_checkpoints


def disk_free(out: Path) -> int:
    """Bytes that a run may fill: those that are free, and those that its folder, which is resumed
    or replaced, has already."""
    names = ("checkpoints", "model", "best", "adapters")
    files = (file for name in names for file in (out / name).rglob("*"))
    own = sum(file.stat().st_size for file in files if file.is_file())
    return own + shutil.disk_usage(existing_parent(out)).free


def existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def product_rate(model: Transformer, seconds: float = 0.05) -> float:
    """Operations a second of square matrix products on the model's device, in its compute dtype."""
    cuda = model.device.type == "cuda"
    n = 4096 if cuda else 512
    a, b = torch.randn(2, n, n, device=model.device).to(model.compute_dtype)
    float((a @ b)[0, 0])  # the first one sets kernels up; float waits for the device
    n_products, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds:
        float((a @ b)[0, 0])
        n_products += 1
    return n_products * 2 * n**3 / taken


def duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MB"


def try_largest(model: Transformer, optimizer, plan: Plan, config: TrainConfig):
    """The largest micro-batch, forward and backward, with everything in memory that a step has:
    running out of it happens now, or not at all. Nothing changes by it."""
    pairs = plan.largest
    with out_of_memory_advice(config, pairs):
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:  # zero gradients at rate 0: moments are made, no more
            group["lr"] = 0.0
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = config.lr
        for state in optimizer.state.values():
            state["step"].zero_()
        if not plan.several:  # else those of other micro-batches are there while this one runs
            optimizer.zero_grad(set_to_none=True)
        for batch in micro_batches(pairs, config, share=False):
            forward(model, batch, config.lam).loss.backward()
    optimizer.zero_grad(set_to_none=True)
    text = f"{peak_memory_gb(model.device):.2f} GB at the most in a step"
    if model.device.type == "cuda":
        total = torch.cuda.get_device_properties(model.device).total_memory
        text += f", of {gigabytes(total)}"
    print(f"         {text}")
    kept, entrance = block_memory(model, pairs)
    print(
        f"         a block keeps about {gigabytes(kept)} for its backward pass, and one that "
        f"--activation-checkpointing computes twice {gigabytes(entrance)}",
        flush=True,
    )


def block_memory(model: Transformer, pairs: list[Pair]) -> tuple[int, int]:
    """Bytes that a block keeps of a micro-batch for its backward pass, and of them its input.

    Without torch.compile, and with fused norms and Flash attention, as on a GPU in bfloat16.
    """
    c, itemsize = model.config, (model.compute_dtype or torch.float32).itemsize
    n = sum(pair.n_tokens for pair in pairs)
    n_keys = n + sum(len(pair.prompt) for pair in pairs)  # a prompt's are gathered twice
    norms = 2 if c.parallel else 4  # what each of them reads and writes, in widths D
    wide = 4 if c.gated else 1 if c.activation == "relu" else 2  # in widths of the MLP
    # Attention keeps queries, keys, values and its output.
    per_token = norms * c.dim + 2 * c.n_heads * c.head_dim + wide * c.hidden_dim
    kept = n * per_token + 2 * n_keys * c.n_kv_heads * c.head_dim
    # The copies in compute_dtype to which weights are cast. What is frozen is stored in that dtype,
    # and FSDP2 casts as it gathers, and lets go of what it gathered behind the block.
    if not isinstance(model, fsdp.FSDPModule):
        weights = [p for p in model.layers[0].parameters() if p.dtype.itemsize != itemsize]
        kept += sum(p.numel() for p in weights if p.dim() == 2)
    return itemsize * kept, itemsize * n * c.dim


@contextlib.contextmanager
def out_of_memory_advice(config: TrainConfig, pairs: list[Pair] = ()):
    """An out-of-memory error within it becomes a ValueError that says what helps in this case."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(advice_on_memory(config, pairs)) from None


def advice_on_memory(config: TrainConfig, pairs: list[Pair] = ()) -> str:
    """What to change, where a micro-batch of these pairs, or the model alone, does not fit."""
    with torch.device("meta"):  # the model at hand may be half loaded
        model = Transformer(ModelConfig.from_json(Path(config.model) / "config.json"))
    if config.lora_rank:
        model.add_lora(config.lora_rank, config.lora_alpha)
    trained, n_parameters = count_parameters(model)
    fixed = fixed_memory(trained, n_parameters, config)
    total = torch.cuda.get_device_properties(config.device).total_memory
    state = f"{gigabytes(fixed)} for weights, gradients and Adam's moments"
    card = f"{gigabytes(total)} of {config.device}"
    shard = "--shard over more GPUs (torchrun --nproc-per-node N train.py ... --shard)"
    shard = "more GPUs" if config.shard else shard
    lora = "" if config.lora_rank or config.shard else " or --lora-rank 16"
    if fixed > 0.95 * total or not pairs:
        return (
            f"out of memory: {state} do not fit the {card}; smaller micro-batches and "
            f"--activation-checkpointing do not change that, {shard}{lora} would"
        )
    n, longest = (f(pair.n_tokens for pair in pairs) for f in (sum, max))
    ways = []
    if int(config.activation_checkpointing) == 0:
        ways.append("--activation-checkpointing")
    elif config.activation_checkpointing is not True:
        ways.append("--activation-checkpointing of more blocks")
    if n > longest:
        ways.append(f"--micro-batch-tokens below {config.micro_batch_tokens}")
    else:  # it is a single pair, which is never split
        ways.append(f"--max-length below {config.max_length}")
    ways.append(shard + lora)
    return (
        f"out of memory: beside {state} the largest micro-batch, {n} tokens, does not fit the "
        f"{card}; what helps: {', '.join(ways)}"
    )


# ---------------------------------------------------------------------------------------------
# The folder of a run: its settings, its rows, its checkpoints, its model.


@contextlib.contextmanager
def claim_folder(config: TrainConfig):
    """--out as a path, for this run alone: no file, no other run's folder, no other process in it.

    Raises ValueError.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file; a folder is needed")
    above = existing_parent(out)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out}: cannot be made, as {above} is not a folder to write to")
    for name in ("model", "best"):
        if (out / name).resolve() == Path(config.model).resolve():
            raise ValueError(f"--out {out}: its {name}/ would replace --model; name another folder")
    with locked(out) if rank() == 0 else contextlib.nullcontext():
        if holds_run(out) and not config.resume and not is_builtin(config):
            raise ValueError(f"--out {out}: holds a run; add --resume, or name another folder")
        yield out


def holds_run(out: Path) -> bool:
    return any("loss" in row for row in read_rows(out))


def is_builtin(config: TrainConfig) -> bool:
    """The built-in job owns its folder, and replaces what it left there."""
    base = BUILTIN.parent / "base"
    return Path(config.out) == BUILTIN_OUT and Path(config.model).resolve() == base.resolve()


def begin_folder(out: Path, start: int, config: TrainConfig):
    """Removes what a run of the built-in job left, and rows behind the step that a run goes on
    from; writes the settings, as --config takes them to do the same again from any folder."""
    barrier()  # every process has looked into it
    if rank() > 0:
        return
    if start == 0 and is_builtin(config) and not config.resume:
        for old in out.iterdir():
            if old.name != LOCK:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    for name in ("model", "best", "adapters"):
        checkpoint.tidy(out / name)
    if start == 0 and read_best(out):  # of an evaluation whose row is cut
        shutil.rmtree(out / "best")
    kept = [row for row in read_rows(out) if row["step"] <= start and start > 0]
    (out / FINISHED).unlink(missing_ok=True)
    rows = "".join(json.dumps(row) + "\n" for row in kept)
    settings = json.dumps(settings_of(config), indent=2) + "\n"
    for name, text in (("metrics.jsonl", rows), ("config.json", settings)):
        with whole_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def settings_of(config: TrainConfig) -> dict:
    """The flags as --config takes them from any folder, on any machine: less --out, --resume and
    --device."""
    settings = dataclasses.asdict(config) | {
        name: str(Path(path).resolve()) for name in PATHS if (path := getattr(config, name))
    }
    left_out = ("out", "resume", "device")
    return {name: value for name, value in settings.items() if name not in left_out}


def write_row(out: Path | None, row: dict):
    """One JSON object a line, flushed at once. Raises OSError."""
    if out is not None and rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "metrics.jsonl"
        try:
            with open(file, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(
                f"{file}: not written: {error.strerror}; fix this, then continue with --resume"
            ) from None


def read_rows(out: Path) -> list[dict]:
    """The rows of metrics.jsonl, less a last one that was half written."""
    file, rows = out / "metrics.jsonl", []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def training_state(model: Transformer, optimizer) -> dict[str, torch.Tensor]:
    """Weights, Adam's moments and its count, by name: the tensors themselves, to save or to fill.

    The order of pairs follows from the step. What is frozen is in --model: here only as one number,
    by which `load_checkpoint` knows it again.
    """
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state |= {name: p.detach()} | {f"{name}.{k}": x for k, x in optimizer.state[p].items()}
    if frozen := [p.detach() for p in model.parameters() if not p.requires_grad]:
        state["frozen"] = torch.stack([p.double().norm() for p in frozen]).sum()
    return state


def save_checkpoint(
    out: Path, step: int, model, optimizer, tokenizer, pairs, plan: Plan, config: TrainConfig
):
    """Raises OSError, but behind the last step it only says what is wrong: the model, which is
    smaller than a checkpoint, may still fit the disk."""

    def write_more(folder: Path):  # what checkpoint.py needs to make a model folder of it
        shapes = {name: p.shape for name, p in model.named_parameters()}
        checkpoint.describe_weights(folder, shapes, config.model)
        (folder / "model").mkdir()
        write_model_files(folder / "model", model, tokenizer, pairs, config)

    settings = settings_of(config) | {"pairs": plan.digests}
    try:
        save_state(out, step, training_state(model, optimizer), settings, config.keep, write_more)
    except OSError as error:
        if step < plan.n_steps:
            raise
        if rank() == 0:
            print(f"train.py: {str(error).rpartition('; ')[0]}", file=sys.stderr)


def load_checkpoint(
    out: Path, model: Transformer, optimizer, plan: Plan, config: TrainConfig
) -> int:
    """Restores the newest checkpoint that can be read and returns its step; 0 without any yet.

    Raises ValueError where it is of other flags, other pairs, another model, or a later step.
    """

    def check(settings: dict, folder: Path):
        refuse_other_settings(config, settings, folder)
        for name, digest in plan.digests.items():
            if digest != settings.get("pairs", plan.digests)[name]:
                file = getattr(config, name) or config.data
                then, now = settings["pairs"][name], digest
                raise ValueError(
                    f"--resume: {file} does not give the pairs that {folder} was trained with "
                    f"({then}; now {now}); restore the file and the tokenizer, or start a new run"
                )

    state = training_state(model, optimizer)
    frozen = state["frozen"].clone() if "frozen" in state else None
    folder = load_state(out, state, check)
    if folder is None:
        print(f"--resume: {out} has no checkpoint yet, so the run starts from its beginning")
        return 0
    if frozen is not None and not torch.isclose(frozen, state["frozen"], rtol=1e-9):
        raise ValueError(f"--resume: {folder} was trained on another model than {config.model}")
    step = int(folder.name.removeprefix("step-"))
    if step > plan.n_steps:
        raise ValueError(f"--resume: {folder} is behind the last of {plan.n_steps} steps")
    return step


FREE_ON_RESUME = (
    *("eval_only", "device", "keep", "shard", "micro_batch_tokens", "activation_checkpointing"),
    *("compile", "log_every", "eval_every", "save_every", "lora_adapters"),
)
LENGTHS = ("epochs", "max_steps")
ENDLESS = ("constant", "inverse_sqrt")  # schedules that do not depend on the number of steps


def refuse_other_settings(config: TrainConfig, then: dict, where: Path):
    """Raises ValueError with the first flag that is not what it was, and may not change."""
    endless = config.lr_schedule in ENDLESS
    for name, now in settings_of(config).items():
        before = then.get(name, getattr(TrainConfig, name))
        if name in PATHS and before:
            before = str(Path(before).resolve())
        if now == before or name in FREE_ON_RESUME or (name in LENGTHS and endless):
            continue
        advice = ""
        if name in LENGTHS:
            advice = (
                f"; the {config.lr_schedule} schedule ends with its last step, so train longer by "
                "a new run with this run's model folder as --model"
            )
        raise ValueError(f"--resume: {name} was {before!r} in {where}, now {now!r}{advice}")


FINISHED = "finished"  # a file with the last step, written when all else is


def settings_before(out: Path) -> tuple[dict, Path] | None:
    """The settings of a run's newest checkpoint, or of its folder, and where they were found."""
    begun = (out / FINISHED).exists() or holds_run(out)
    for folder in (*checkpoints(out), *([out] if begun else [])):
        with contextlib.suppress(OSError, ValueError):
            return json.loads((folder / "config.json").read_text(encoding="utf-8")), folder
    return None


def is_finished(out: Path, config: TrainConfig) -> bool:
    """Whether a run that is resumed has nothing left to do. Compares its flags, before anything is
    loaded. Raises ValueError."""
    found = settings_before(out)
    if found is None:
        return False
    then, where = found
    refuse_other_settings(config, then, where)
    restorable = bool(checkpoints(out))
    if not (out / FINISHED).exists() or (restorable and not (out / "model").is_dir()):
        return False
    if any(getattr(config, name) != then.get(name) for name in LENGTHS):
        if not restorable:
            raise ValueError(
                f"--resume: {out} is finished and has no checkpoint; train longer by a new run "
                f"with --model {out / 'model'}"
            )
        return False
    return True


TOKENIZER_FILES = (  # what else a model folder needs, handed on as it came
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)


def write_model_files(folder: Path, model: Transformer, tokenizer, pairs, config: TrainConfig):
    """What a model folder holds beside the weights."""
    checkpoint.write_config(folder, model.config, getattr(torch, model.config.dtype))
    for name in TOKENIZER_FILES:
        if (Path(config.model) / name).is_file():
            shutil.copyfile(Path(config.model) / name, folder / name)
    # Trained on messages: whoever chats needs the template, and BOS in front of it.
    if any(pair.chat for pair in pairs):
        tokenizer.save_chat_template(folder)
    if not (folder / "generation_config.json").exists():  # where to stop
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def finish(
    model: Transformer, tokenizer, pairs: list[Pair], n_steps: int, config: TrainConfig, out: Path
):
    """Writes OUT/model, OUT/adapters, and then that the run is finished. Raises OSError."""
    try:
        save_model(model, tokenizer, pairs, config, out / "model")
        if config.lora_adapters:
            save_adapters(model, config, out / "adapters")
        if rank() == 0:
            (out / FINISHED).write_text(f"{n_steps}\n", encoding="utf-8")
    except OSError as error:
        what = str(error) if str(out) in str(error) else f"{out / 'model'}: {error}"
        last = next((folder.name for folder in checkpoints(out)), "none")
        raise OSError(
            f"{what}; the last good checkpoint is {last}; make space, then continue with --resume"
        ) from None


def save_model(model, tokenizer, pairs, config: TrainConfig, folder: Path, row: dict | None = None):
    """The trained model as a Hugging Face folder, in the dtype that the checkpoint had; with row,
    its evaluation, which is how OUT/best is known."""
    if rank() > 0:
        if config.shard:  # takes part in gathering each tensor
            model.save_pretrained(None)
        return
    if config.lora_rank:
        model = model.merge_lora(Transformer.from_pretrained(config.model))
    with checkpoint.replaced(folder) as new:
        model.save_pretrained(new, dtype=getattr(torch, model.config.dtype))
        write_model_files(new, model, tokenizer, pairs, config)
        if row is not None:
            (new / "evaluation.json").write_text(json.dumps(row, indent=2) + "\n")


def save_best(row: dict, model, tokenizer, pairs, config: TrainConfig, out: Path):
    """With --eval-every: saves the model as OUT/best where row has this run's lowest eval_loss.

    It is compared with the row in OUT/best, which belongs to those weights whatever happens. Rows
    of metrics.jsonl may be cut by --resume, and be computed again with other roundings.
    """
    if row["step"] == 0 or not config.eval_every:  # step 0 is --model itself
        return
    is_best = rank() == 0 and row["eval_loss"] < read_best(out).get("eval_loss", math.inf)
    if max_over_processes(int(is_best)):  # process 0 decides for all
        try:
            save_model(model, tokenizer, pairs, config, out / "best", row)
        except OSError as error:
            raise OSError(f"{error}; fix this, then continue with --resume") from None


def read_best(out: Path) -> dict:
    """The evaluation of OUT/best; {} where there is none."""
    file = out / "best" / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def print_best(out: Path):
    if best := read_best(out):
        text = f"wrote {out}/best, the model of step {best['step']}: "
        text += f"the lowest eval_loss, {best['eval_loss']:.4f}"
        untrained = [row["eval_loss"] for row in read_rows(out) if row["step"] == 0]
        if untrained and untrained[0] <= best["eval_loss"]:
            text += f" (but {untrained[0]:.4f} before training)"
        print(text)


def save_adapters(model: Transformer, config: TrainConfig, folder: Path):
    """The adapters by themselves, as peft reads them."""
    if rank() == 0:
        adapters = {name: (m.lora_A, m.lora_B) for name, m in model.lora_layers().items()}
        family, numbers = model.config.family, (config.lora_rank, config.lora_alpha)
        with checkpoint.replaced(folder) as new:
            checkpoint.write_adapters(new, family, adapters, *numbers, config.model)


# ---------------------------------------------------------------------------------------------
# The log.


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
            self.arrived.synchronize()  # waits for this copy, and not for the step behind it
        return dict(zip(self.names, self.values.tolist(), strict=True))


class NotFinite(Exception):
    def __init__(self, step: int):
        self.step = step


class Log:
    """metrics.jsonl, and what is seen of it while a run goes on: a progress bar, or where there is
    no terminal a line every half minute."""

    def __init__(self, out: Path, model: Transformer, start: int, plan: Plan, config: TrainConfig):
        self.out, self.model, self.config = out, model, config
        self.start, self.n_steps, self.steps_an_epoch = start, plan.n_steps, plan.steps_an_epoch
        quiet = True if rank() else None  # None: where there is no terminal
        self.bar = tqdm(initial=start, total=self.n_steps, unit="step", disable=quiet)
        self.peak = peak_flops(model.device, config)
        self.begin = self.printed = self.clock = time.perf_counter()
        self.n_tokens, self.flops, self.waiting = 0, 0, None

    def step(self, step: int, pairs: list[Pair], outputs, grad_norm, lr: float, optimizer):
        """Takes in a step that the device may still compute, and writes the row of the one before,
        so that the device always has work queued."""
        self.complete()
        self.n_tokens += sum(pair.n_tokens for pair in pairs)
        self.flops += step_flops(self.model, pairs, self.config)
        if due(step, self.config.log_every) or step == self.n_steps:
            numbers = metrics_of(outputs, self.config.lam, len(pairs)) | {"grad_norm": grad_norm}
            numbers["updates"] = n_updates(optimizer, self.model)
            self.waiting = step, HostCopy(numbers), lr, self.n_tokens, self.flops
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
        left = duration((now - self.begin) / (step - self.start) * (self.n_steps - step))
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


# Dense bfloat16 operations a second by the makers' data sheets, in 1e12; the first name that fits.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}


def peak_flops(device, config: TrainConfig) -> float | None:
    """What MFU is a share of; None where the device or the dtype is not in the table."""
    if device.type != "cuda" or config.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def step_flops(model: Transformer, pairs: list[Pair], config: TrainConfig) -> int:
    lengths = [pair.lengths for pair in pairs]
    n_predicted = sum(c + r + (p - 1 if config.sft_loss == "full" else 0) for p, c, r in lengths)
    return model.training_flops(lengths, n_predicted)


def peak_memory_gb(device) -> float:
    """GB (2^30) at the most so far: of CUDA's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KB


def n_updates(optimizer, model: Transformer) -> torch.Tensor:
    """How many updates Adam has made, on the device: fewer than steps once one was not finite."""
    return optimizer.state[trainable(model)[0]]["step"]


def check_updates(optimizer, model: Transformer, step: int):
    """Raises NotFinite where Adam has made fewer updates than `step`. Waits for the device."""
    if (updates := int(n_updates(optimizer, model))) < step:
        raise NotFinite(updates + 1)


@contextlib.contextmanager
def blame_rows(model: Transformer, pairs: list[Pair], config: TrainConfig):
    """A step that was not finite becomes a ValueError that names its rows."""
    try:
        yield
    except NotFinite as error:
        raise ValueError(rows_not_finite(model, pairs, error.step, config)) from None


def rows_not_finite(model: Transformer, pairs: list[Pair], step: int, config: TrainConfig) -> str:
    """What in a step was not finite: its pairs one by one, on the weights that it had."""
    pairs, found = step_pairs(pairs, step, config), []
    for pair in pairs:
        (batch,) = micro_batches([pair], config, share=False)
        output = forward(model, batch._replace(n_pairs=len(pairs)), config.lam)
        output.loss.backward()
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in trainable(model)]))
        terms = {"L_SFT": output.nll_loss, "L_OR": config.lam * output.odds_ratio_loss.sum()}
        terms = [k for k, x in terms.items() if not torch.isfinite(x.to(output.loss.dtype))]
        if not terms and not torch.isfinite(norm):
            terms = ["its gradient"]
        if terms:
            found.append(f"{pair.where} ({' and '.join(terms)})")
        model.zero_grad(set_to_none=True)
    if not found:
        found = ["the sum over its rows, each of which is finite alone"]
    where = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f"step {step}: loss or gradient not finite at {where}; nothing was updated or saved"


def print_changes(out: Path, n_steps: int):
    """The evaluation before and after, side by side, from the rows that were written."""
    evaluations = {row["step"]: row for row in read_rows(out) if "eval_loss" in row}
    if 0 in evaluations and n_steps in evaluations:
        print(f"\n{'held out':<28}{'before':>10}{'after':>10}")
        for name in evaluations[0]:
            if name != "step":
                before, after = evaluations[0][name], evaluations[n_steps][name]
                print(f"{name:<28}{before:>10.4f}{after:>10.4f}")


@contextlib.contextmanager
def stop_signals():
    """Yields a list that grows when SIGTERM or Ctrl-C comes; the second of a kind kills at once."""
    seen = []

    def note(number, frame):
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------
# Flags.

BUILTIN = Path(__file__).parent / "examples" / "facts" / "train.json"
BUILTIN_OUT = Path("out") / "builtin"


COMMANDS = """commands:
  one GPU, or the CPU:
    python train.py --model DIR --data FILE --eval-data FILE --out OUT
  the same run again after an interruption, on any number of GPUs:
    python train.py ... --resume
  the eight GPUs of one machine, each of which keeps an eighth of the model:
    torchrun --nproc-per-node 8 train.py ... --shard
  two machines of eight GPUs that share a file system; on both, HOST being the name of the first:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      train.py ... --shard
  the evaluation of a finished run, as one JSON object:
    python train.py --config OUT/config.json --model OUT/model --eval-only"""

# Flags of TRL, transformers and the authors' repository, by ours that do the same.
ELSEWHERE = {
    "model": "model-name-or-path model-name",
    "data": "dataset-name dataset train-file",
    "eval-data": "eval-file validation-file",
    "out": "output-dir overwrite-output-dir",
    "lam": "beta alpha lambda",
    "lr": "learning-rate",
    "lr-schedule": "lr-scheduler-type",
    "warmup-steps": "warmup-ratio num-warmup-steps",
    "grad-clip": "max-grad-norm",
    "epochs": "num-train-epochs num-epochs",
    "batch-size": "per-device-train-batch-size train-batch-size",
    "micro-batch-tokens": "gradient-accumulation-steps per-device-eval-batch-size",
    "shard": "fsdp deepspeed",
    "activation-checkpointing": "gradient-checkpointing",
    "lora-rank": "lora-r use-peft",
    "max-length": "max-seq-length",
    "dtype": "bf16 fp16 torch-dtype",
    "compile": "torch-compile",
    "log-every": "logging-steps",
    "eval-every": "eval-steps eval-strategy",
    "save-every": "save-steps save-strategy",
    "keep": "save-total-limit",
    "resume": "resume-from-checkpoint",
    "eval-only": "do-eval",
}


def did_you_mean(names: list[str]) -> str:
    """For flags that are unknown here: those of ours that are meant, with their help, or ""."""
    ours = {f.name.replace("_", "-"): f.metadata["help"] for f in dataclasses.fields(TrainConfig)}
    elsewhere = {theirs: name for name in ELSEWHERE for theirs in ELSEWHERE[name].split()}
    meant = []
    for name in (name.strip("-").replace("_", "-") for name in names):
        close = get_close_matches(name, [*ours, *elsewhere], 1)
        meant += [elsewhere.get(name, name) for name in ([name] if name in elsewhere else close)]
    meant = [f"--{name} ({ours[name].split(' (')[0]})" for name in dict.fromkeys(meant)]
    return f"; did you mean {' and '.join(meant)}?" if meant else ""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # without the dump of the usage
        if message.startswith("unrecognized"):
            message += did_you_mean(re.findall(r"(?<!\S)--[\w-]+", message))
        raise ValueError(f"{message} (see python train.py --help)")


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)


def parse(argv: list[str] | None) -> TrainConfig:
    """Flags over --config over defaults. Raises ValueError, FileNotFoundError."""
    parser = Parser(
        prog="train.py",
        usage="python train.py [--model DIR --data FILE --out DIR] [--config FILE] [flags]",
        description="Align a base model with ORPO. Without --model and --data: the built-in job.",
        epilog=COMMANDS,
        formatter_class=Help,
        allow_abbrev=False,
    )
    groups = {}
    for f in dataclasses.fields(TrainConfig):
        group, choices, bare = (f.metadata[key] for key in ("group", "choices", "bare"))
        groups.setdefault(group, parser.add_argument_group(group))
        shown = "" if f.default is None or f.default is False else f" (default: {f.default})"
        if f.metadata["trl"] is not None:
            shown = shown.replace(")", f"; in TRL: {f.metadata['trl']})")
        options = {"help": f.metadata["help"] + shown, "default": argparse.SUPPRESS}
        if f.type is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": f.type, "choices": choices}
            kind = "PATH" if f.name in PATHS else f.type.__name__.upper()
            options["metavar"] = None if choices else kind
            if bare is not None:
                options |= {"nargs": "?", "const": bare}
        groups[group].add_argument("--" + f.name.replace("_", "-"), **options)
    groups["input and output"].add_argument(
        "--config", metavar="PATH", help="JSON file of flags; its paths are relative to its folder"
    )
    given = vars(parser.parse_args(argv))
    config_file = given.pop("config")
    if config_file is None and not {"model", "data"} & set(given):
        config_file = BUILTIN
    settings = {}
    if config_file is not None:
        file = Path(config_file)
        settings = read_config(file)
        if file.resolve() == BUILTIN.resolve():
            settings.setdefault("out", str(BUILTIN_OUT))
    config = TrainConfig(**(settings | given))
    config.check()
    evaluates = config.eval_data or config.eval_fraction
    needed = ["model", "data"]
    if config.eval_only:
        needed = ["model", "data" if config.eval_fraction else "eval_data"]
    elif not config.dry_run:
        needed.append("out")
    for name in needed:
        if getattr(config, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is needed (see python train.py --help)")
    if config.eval_fraction and config.eval_data:
        raise ValueError("--eval-fraction and --eval-data do not go together: give one of them")
    if config.eval_every and not evaluates:
        raise ValueError("--eval-every needs evaluation data: add --eval-data or --eval-fraction")
    return config


def read_config(file: Path) -> dict:
    """A JSON object of flag names, its paths made relative to the current folder."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --config takes a JSON file of flags")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    unknown = set(settings) - set(names) if isinstance(settings, dict) else {"(not an object)"}
    if unknown:
        found, known = ", ".join(sorted(unknown)), ", ".join(names)
        meant = did_you_mean(sorted(unknown))
        raise ValueError(f"{file}: unknown: {found}{meant or f'; known: {known}'}")
    for name in PATHS:
        if isinstance(settings.get(name), str):
            settings[name] = os.path.relpath(file.parent / settings[name])
    TrainConfig(**settings).check(f"{file}: ")
    return settings


def run(config: TrainConfig) -> int:
    """What the flags ask for: an evaluation, or a training run; its exit status."""
    pick_device(config)
    cap_max_length(config)
    if config.eval_only:
        return evaluate_only(config)
    if config.dry_run:
        return train(config, None)
    with claim_folder(config) as out:
        if config.resume and is_finished(out, config):
            way = f"start a new run with --model {out / 'model'}"
            if config.lr_schedule in ENDLESS and checkpoints(out):
                way = "give more --epochs or --max-steps"
            print(f"{out}: this run is finished, and nothing was changed; to train longer, {way}")
            return 0
        return train(config, out)


def cap_max_length(config: TrainConfig):
    """--max-length is at most the model's context."""
    context = ModelConfig.from_json(Path(config.model) / "config.json").max_seq_len
    config.max_length = min(config.max_length, context)


def evaluate_only(config: TrainConfig) -> int:
    """Prints the row of an evaluation, with what it depends on, as the only line on stdout."""
    with contextlib.redirect_stdout(sys.stderr if rank() == 0 else sys.stdout):
        model, tokenizer, _, eval_set = load_inputs(config)
        row = evaluation(model, tokenizer, eval_set.pairs, 0, config)
    print(json.dumps(row | {"lam": config.lam, "sft_loss": config.sft_loss}), flush=True)
    if config.out and not holds_run(Path(config.out)):  # whose rows stay as they are
        write_row(Path(config.out), row)
    return 0


def is_of_peers(error: RuntimeError) -> bool:
    """Whether another process of the job is to blame, as gloo and NCCL report it."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return dist.is_initialized() and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )


def main(argv=None):
    try:
        status = run(parse(argv))
    except KeyboardInterrupt:  # outside of the loop, which stops in order
        print("train.py: stopped by Ctrl-C", file=sys.stderr)
        status = 130
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        who = f"train.py, process {rank()}" if rank() else "train.py"
        print(f"{who}: {error}", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        if not is_of_peers(error):
            raise
        print(
            f"train.py, process {rank()}: another process of this job has failed or was killed; "
            "what it printed, or the system's log, says why; continue with --resume",
            file=sys.stderr,
        )
        status = 1
    if dist.is_initialized():
        # At once, past the interpreter's own clearing up: in it FSDP2 over gloo aborts now and
        # then, after all is done, and after an error NCCL would wait for the other processes.
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 0:
            dist.destroy_process_group()
        os._exit(status)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
