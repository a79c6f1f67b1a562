"""Aligns a base model with ORPO.

    python train.py                                        the built-in job (minutes on a laptop)
    python train.py --model DIR --data FILE --eval-data FILE --out OUT
    python train.py ... --resume                           goes on after an interruption
    torchrun --nproc-per-node N train.py ...               the same steps over N processes
    python train.py --model DIR --eval-data FILE --eval-only

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
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# Large tensors on a CPU in huge pages: PyTorch looks for this when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

import data
from data import Batch, Pair
from model import Segments, Transformer, to_device, whole
from orpo import fused_linear_orpo, log_odds, pair_groups

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
BUILTIN = Path(__file__).parent / "examples" / "facts" / "train.json"
BUILTIN_OUT = Path("out") / "builtin"
TOKENIZER_FILES = (  # what else a model folder needs, handed on as it came
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)


# ---------------------------------------------------------------------------------------------
# Settings. A field is a flag; a JSON config holds the same names.


def flag(group: str, default, help: str, choices=None, least=None, below=math.inf):
    meta = {"group": group, "help": help, "choices": choices, "least": least, "below": below}
    return dataclasses.field(default=default, metadata=meta)


SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")
IO, OBJECTIVE, OPTIMIZER = "input and output", "objective", "optimizer"


@dataclass
class TrainConfig:
    model: str = flag(IO, None, "folder of a Hugging Face checkpoint")
    data: str = flag(IO, None, "preference pairs, JSON Lines")
    eval_data: str = flag(IO, None, "held-out pairs")
    eval_fraction: float = flag(IO, 0.0, "of --data's prompts held out instead", least=0, below=1)
    chat_template: str = flag(IO, None, "jinja file instead of the model's own")
    out: str = flag(IO, None, "folder for metrics, checkpoints and the model")
    lam: float = flag(OBJECTIVE, 0.1, "weight of L_OR (TRL's beta)", least=0)
    sft_loss: str = flag(OBJECTIVE, "response", "tokens under L_SFT", ("response", "full"))
    lr: float = flag(OPTIMIZER, 8e-6, "peak learning rate of AdamW", least=0)
    lr_schedule: str = flag(OPTIMIZER, "cosine", "after warm-up", SCHEDULES)
    warmup_steps: int = flag(OPTIMIZER, 10, "linear warm-up", least=0)
    weight_decay: float = flag(OPTIMIZER, 0.0, "of matrices", least=0)
    grad_clip: float = flag(OPTIMIZER, 1.0, "largest gradient norm; 0: off", least=0)
    adam_beta1: float = flag(OPTIMIZER, 0.9, "", least=0, below=1)
    adam_beta2: float = flag(OPTIMIZER, 0.999, "", least=0, below=1)
    epochs: int = flag("length", 1, "passes over the pairs", least=1)
    max_steps: int = flag("length", None, "updates; decides alone where given", least=1)
    batch_size: int = flag("length", 32, "pairs a step", least=1)
    micro_batch_tokens: int = flag("memory", 8192, "packed tokens at a time", least=1)
    shard: bool = flag("memory", False, "of all weights each process keeps a part (FSDP2)")
    activation_checkpointing: bool = flag("memory", False, "blocks computed twice, not kept")
    lora_rank: int = flag("memory", 0, "train adapters on a frozen model; 0: train it all", least=0)
    lora_alpha: float = flag("memory", 16.0, "adapters count alpha / rank", least=1e-3)
    max_length: int = flag("memory", 2048, "tokens of prompt + response", least=2)
    max_prompt_length: int = flag("memory", 1792, "longer prompts are dropped", least=1)
    seed: int = flag("run", 42, "of order and sampling", least=0, below=2**63)
    device: str = flag("run", None, "cpu, cuda, cuda:1 (default: cuda if there is one)")
    dtype: str = flag("run", None, "default: bfloat16 on cuda", ("float32", "bfloat16"))
    compile: bool = flag("run", False, "torch.compile the blocks: minutes at first, then faster")
    log_every: int = flag("run", 1, "steps between rows of metrics", least=1)
    eval_every: int = flag("run", 0, "steps; 0: first and last only", least=0)
    save_every: int = flag("run", 500, "steps between checkpoints; 0: none", least=0)
    keep: int = flag("run", 2, "newest checkpoints that stay", least=1)
    resume: bool = flag("run", False, "from the newest checkpoint in --out")
    eval_only: bool = flag("run", False, "evaluate --model on --eval-data")

    def check(self, source: str = ""):
        """Raises ValueError with the first flag whose value is of the wrong type or range."""
        for f in dataclasses.fields(self):
            value, name = getattr(self, f.name), source + "--" + f.name.replace("_", "-")
            if value is None:
                continue
            wanted = (int, float) if f.type is float else f.type
            if not isinstance(value, wanted) or (isinstance(value, bool) and f.type is not bool):
                raise ValueError(f"{name} must be {f.type.__name__}, not {value!r}")
            _, _, choices, least, below = f.metadata.values()
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {choices}, not {value!r}")
            if least is not None and not least <= value < below:
                limit = f" and below {below}" if below < math.inf else ""
                raise ValueError(f"{name} must be at least {least}{limit}, not {value}")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # without the dump of the usage
        raise ValueError(f"{message} (see python train.py --help)")


def parse(argv: list[str] | None) -> TrainConfig:
    """Flags over --config over defaults. Raises ValueError, FileNotFoundError."""
    parser = Parser(
        prog="train.py",
        description="Align a base model with ORPO. Without --model and --data: the built-in job.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
    )
    groups = {}
    for f in dataclasses.fields(TrainConfig):
        group = f.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group))
        shown = "" if f.default is None or f.default is False else f" (default: {f.default})"
        options = {"help": f.metadata["help"] + shown, "default": argparse.SUPPRESS}
        if f.type is bool:
            options["action"] = "store_true"
        else:
            options["type"] = f.type
            options["choices"] = choices = f.metadata["choices"]
            options["metavar"] = None if choices else f.type.__name__.upper()
        groups[group].add_argument("--" + f.name.replace("_", "-"), **options)
    groups["input and output"].add_argument(
        "--config", metavar="FILE", help="JSON of these names; its paths are relative to it"
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
    if config.shard and config.lora_rank:
        raise ValueError("--shard and --lora-rank do not go together: a frozen model is not cut up")
    needed = ("model", "eval_data") if config.eval_only else ("model", "data", "out")
    for name in needed:
        if getattr(config, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is needed (see python train.py --help)")
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
        raise ValueError(f"{file}: unknown: {found}; known: {known}")
    for name in ("model", "data", "eval_data", "out", "chat_template"):
        if isinstance(settings.get(name), str):
            settings[name] = os.path.relpath(file.parent / settings[name])
    TrainConfig(**settings).check(f"{file}: ")
    return settings


# ---------------------------------------------------------------------------------------------
# Processes: each takes its share of a step's pairs, and what they find adds up.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensors: list[torch.Tensor]):
    """Makes each tensor its sum over all processes, in place: no second copy of the gradients."""
    works = [dist.all_reduce(x, async_op=True) for x in tensors if world() > 1]
    for work in works:
        work.wait()


def barrier():
    """No process goes on before all have come here."""
    largest_anywhere(0)


def largest_anywhere(number: int) -> int:
    """The largest of the processes' numbers."""
    x = torch.tensor(number)  # on the CPU, by gloo: the GPU is not waited for
    if world() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return int(x)


def shard(model: Transformer, config: TrainConfig, device):
    """FSDP2: each process keeps a part of every weight; a block is gathered when it is its turn.

    Blocks are gathered in --dtype, what is around them in float32, as the loss wants lm_head.
    Gradients are summed in float32, and not averaged: see `sum_over_processes`.
    """
    mesh = init_device_mesh(device.type, (world(),))
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
def weights_ready(model: Transformer):
    """Within it a plain model's weights are cast once. From a sharded one, at its end, embedding
    and lm_head go too, which stay gathered behind `hidden_states` until a backward pass."""
    if not isinstance(model, fsdp.FSDPModule):
        with model.cast_weights():
            yield
    else:
        yield
        model.reshard()


# ---------------------------------------------------------------------------------------------
# The parts of a step.


def lr_at(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (1 is the first): a function of the step alone."""
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - 1 - warmup) / max(1, total - warmup)  # 0 at the first step after warm-up
    if config.lr_schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    if config.lr_schedule == "inverse_sqrt":
        scale = warmup or 10_000  # as in transformers
        return config.lr * math.sqrt(scale / (scale + step - 1 - warmup))
    return config.lr * (1 - progress if config.lr_schedule == "linear" else 1)


def steps_in_epoch(pairs: list[Pair], config: TrainConfig) -> int:
    """The last step of an epoch may hold fewer pairs; none is dropped."""
    return math.ceil(len(pairs) / config.batch_size)


def step_pairs(pairs: list, step: int, config: TrainConfig) -> list:
    """The pairs, or their rows, of update `step`: by (seed, step), so resuming needs no state."""
    epoch, i = divmod(step - 1, steps_in_epoch(pairs, config))
    indices = data.order(len(pairs), config.seed, epoch)
    return [pairs[k] for k in indices[i * config.batch_size :][: config.batch_size]]


def micro_batches(pairs: list[Pair], config: TrainConfig, dealt: bool = True) -> list[Batch]:
    """This process's share of a step's pairs, or all of them where they are not dealt.

    In bfloat16 filled up to multiples of 64: a CPU builds a kernel for every new shape, and the
    tiles of a GPU have such sizes.
    """
    multiple = 64 if config.dtype == "bfloat16" else 1
    mine = (rank(), world()) if dealt else ()
    return data.micro_batches(pairs, config.micro_batch_tokens, config.sft_loss, multiple, *mine)


def forward(model: Transformer, batch: Batch, lam: float, n_pairs: int, device):
    """The loss of one micro-batch, as its share of a step of n_pairs."""
    groups = pair_groups(batch.response)  # here, while it is still on the host
    segments = Segments.packed(batch.lengths, device)
    b = Batch(batch.lengths, *(to_device(x, device) for x in batch[1:]))
    hidden = model.hidden_states(b.tokens, b.positions, segments)  # (N, D)
    hidden, lm_head = model.projection(hidden.index_select(0, b.predict))  # (P, D), (V, D)
    return fused_linear_orpo(
        hidden,
        lm_head,
        b.targets,
        b.response,
        b.nll_weight,
        lam,
        n_pairs,
        b.response_lengths,
        groups,
    )


def training_step(model: Transformer, optimizer, pairs: list[Pair], config: TrainConfig, device):
    """One update from these pairs: the outputs of its micro-batches, and the gradient's norm.

    Where the loss or the norm is not finite there is no update, then or later. `found_inf` is the
    flag by which PyTorch's GradScaler tells a fused AdamW to leave everything as it is; we set it,
    on the device, so the host waits for nothing. Adam counts the updates that it makes, so `train`
    can tell the step when it next looks.
    """
    outputs = []
    with weights_ready(model):
        for batch in micro_batches(pairs, config):
            output = forward(model, batch, config.lam, len(pairs), device)
            output.loss.backward()  # a plain sum: every normaliser is the whole step's
            outputs.append(output)
    loss = torch.stack([output.loss.detach() for output in outputs]).sum()
    # FSDP2 has summed its gradients itself, in each backward pass.
    sum_over_processes([loss] + ([] if config.shard else [p.grad for p in trainable(model)]))
    clip = config.grad_clip or math.inf
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(trainable(model), clip, foreach=True))
    optimizer.found_inf = optimizer.found_inf.maximum(~torch.isfinite(loss + grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outputs, grad_norm


def not_finite(model, pairs: list[Pair], rows: list, step: int, config: TrainConfig, device) -> str:
    """What in a step was not finite: its pairs one by one, on the weights that it had."""
    pairs, rows, found = step_pairs(pairs, step, config), step_pairs(rows, step, config), []
    for pair, row in zip(pairs, rows, strict=True):
        (batch,) = micro_batches([pair], config, dealt=False)
        with weights_ready(model):
            output = forward(model, batch, config.lam, len(pairs), device)
            output.loss.backward()
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in trainable(model)]))
        terms = {"L_SFT": output.nll_loss, "L_OR": config.lam * output.odds_ratio_loss.sum()}
        terms = [k for k, x in terms.items() if not torch.isfinite(x.to(output.loss.dtype))]
        terms += ["its gradient"] * (not terms and not torch.isfinite(norm))
        found += [f"{row.where} ({' and '.join(terms)})"] * bool(terms)
        model.zero_grad(set_to_none=True)
    where = f"{', '.join(found[:3])}{', ...' * (len(found) > 3)}" or "the sum over all of its rows"
    return f"step {step}: not finite: {where}; nothing was updated or saved"


def metrics_of(outputs: list, lam: float, n_pairs: int) -> dict[str, torch.Tensor]:
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


def to_host(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """One device-to-host copy for all of them: a CPU-GPU sync point, and a step has no other."""
    values = torch.stack([x.double() for x in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


@torch.no_grad()
def evaluate(model, pairs: list[Pair], config: TrainConfig, device) -> dict[str, float]:
    """The metrics over all of an evaluation set, normalised over all of it, as eval_*."""
    with weights_ready(model):
        batches = micro_batches(pairs, config)
        outputs = [forward(model, b, config.lam, len(pairs), device) for b in batches]
    metrics = to_host(metrics_of(outputs, config.lam, len(pairs)))
    return {f"eval_{name}": value for name, value in metrics.items()}


def answers(model, tokenizer, prompts: list[list[int]], max_new: int, device, **sampling):
    """The model's answer to each prompt, as text: prompts of one length go together."""
    texts, end = {}, data.turn_end(tokenizer)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for length, rows in itertools.groupby(by_length, key=lambda i: len(prompts[i])):
        rows = list(rows)
        tokens = torch.tensor([prompts[i] for i in rows], device=device)
        new = max(0, min(max_new, model.config.max_seq_len - length))
        if new == 0:  # a prompt that fills the context has no answer
            texts |= dict.fromkeys(rows, "")
            continue
        with weights_ready(model):
            tokens = model.generate(tokens, new, eos_id=tokenizer.eos_id, **sampling)
        for i, ids in zip(rows, tokens[:, length:].tolist(), strict=True):
            if tokenizer.eos_id in ids:
                ids = ids[: ids.index(tokenizer.eos_id)]
            texts[i] = tokenizer.decode(ids).strip().removesuffix(end).strip()
    return [texts[i] for i in range(len(prompts))]


def accepted(model, tokenizer, pairs, rows, seed: int, device) -> dict[str, float]:
    """Where rows list the answers that they accept: the share of the model's that is among them."""
    asked = [(p, r) for p, r in zip(pairs, rows, strict=True) if r.accept is not None]
    if not asked:
        return {}
    prompts = [pair.prompt for pair, _ in asked]
    longest = 2 * max(max(len(p.chosen), len(p.rejected)) for p, _ in asked)
    shares = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        generator = torch.Generator(device).manual_seed(seed)
        texts = answers(
            model, tokenizer, prompts, longest, device, temperature=temperature, generator=generator
        )
        good = [text in row.accept for text, (_, row) in zip(texts, asked, strict=True)]
        shares[f"eval_accepted/{name}"] = sum(good) / len(good)
    return shares


# ---------------------------------------------------------------------------------------------
# Checkpoints: a folder a step, written beside, then renamed; the newest complete one wins.

# torch.distributed.checkpoint says so of a single process, each time.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


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


def save_checkpoint(out: Path, step: int, model, optimizer, config: TrainConfig):
    """By all processes together. Raises OSError where it fails; older checkpoints stay then."""
    folder = out / "checkpoints"
    temporary, final = folder / "unfinished", folder / f"step-{step:08d}"
    try:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            settings = json.dumps(dataclasses.asdict(config))
            (temporary / "config.json").write_text(settings, encoding="utf-8")
        barrier()
        dcp.save(training_state(model, optimizer), checkpoint_id=temporary)  # ends everywhere
        if rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in sorted(folder.glob("step-*"))[: -config.keep]:
                shutil.rmtree(old)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        good = [old.name for old in sorted(folder.glob("step-*"))[-1:]]
        raise OSError(
            f"{final}: not written: {reason(error)}; the last good checkpoint is "
            f"{' '.join(good) or 'none'}; mend that, then go on with --resume"
        ) from None


def load_checkpoint(out: Path, model, optimizer, config: TrainConfig) -> int:
    """Restores the newest checkpoint that can be read and returns its step; 0 without any yet."""
    folders = sorted((out / "checkpoints").glob("step-*"), reverse=True)
    for folder in folders:
        try:
            then = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            refuse_other_settings(config, then, folder)
            state = training_state(model, optimizer)
            frozen = state["frozen"].clone() if "frozen" in state else None
            dcp.load(state, checkpoint_id=folder)
            if frozen is not None and not torch.isclose(frozen, state["frozen"], rtol=1e-9):
                raise ValueError(f"--resume: {config.model} is not the model that {folder} is of")
            return int(folder.name.removeprefix("step-"))
        except (OSError, json.JSONDecodeError, dcp.CheckpointException) as error:
            if rank() == 0:
                print(f"{folder}: an older one is tried: {reason(error)}", file=sys.stderr)
    if folders:
        raise ValueError(f"{out / 'checkpoints'}: none can be read; remove it to start again")
    print(f"--resume: no checkpoint yet in {out}: from the beginning")
    return 0


def refuse_other_settings(config: TrainConfig, then: dict, folder: Path):
    free = ("resume", "eval_only", "device", "out", "keep", "shard", "micro_batch_tokens")
    free += ("activation_checkpointing", "compile", "log_every", "save_every")
    for name, now in dataclasses.asdict(config).items():
        if name not in free and now != then.get(name, getattr(TrainConfig, name)):
            raise ValueError(f"--resume: {name} was {then.get(name)!r} in {folder}, now {now!r}")


def reason(error: BaseException) -> str:
    """What is behind an error of torch.distributed.checkpoint, or another: its first line."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def write_row(out: Path | None, row: dict):
    """One JSON object a line, flushed at once."""
    if out is not None and rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


def read_rows(out: Path) -> list[dict]:
    """The rows of metrics.jsonl, less a last one that was half written."""
    file, rows = out / "metrics.jsonl", []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def cut_metrics(out: Path, step: int):
    """Drops the rows past a checkpoint's step; all of them where there is no checkpoint."""
    kept = [row for row in read_rows(out) if row["step"] <= step and step > 0]
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "metrics.jsonl.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, out / "metrics.jsonl")


def write_settings(out: Path, config: TrainConfig):
    """What --config takes to do the same again from any folder."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("resume", "out")}
    for name in ("model", "data", "eval_data", "chat_template"):
        settings[name] = settings[name] and str(Path(settings[name]).resolve())
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# A run.


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
    if config.shard and not several:
        raise ValueError("--shard: there is one process; torchrun --nproc-per-node N starts more")
    if device.type == "cuda":
        if several and device.index is not None:
            raise ValueError(f"--device {wanted}: torchrun gives each process its own: use cuda")
        # With its index: a device without one means the current GPU, and set_device refuses it.
        device = torch.device(
            "cuda", int(os.environ["LOCAL_RANK"]) if several else device.index or 0
        )
        if device.index >= torch.cuda.device_count():
            n, which = torch.cuda.device_count(), f" (local rank {device.index})" if several else ""
            raise ValueError(f"--device {wanted}{which}: this machine shows {n} CUDA devices")
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


def keep_freed_memory():
    """On a CPU: no buffer goes back to the system, so that a step does not pay for its pages anew.

    glibc's malloc gives large buffers back at once, and getting them again, page by page, took up
    to half of a step. Where there is no glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, 2**31 - 1),
            (M_TOP_PAD, 2**26),
        ):
            mallopt(parameter, value)


def load_inputs(config: TrainConfig, device):
    """Model, tokenizer, and the (pairs, rows) to train and to evaluate on; prints what was read."""
    cut = functools.partial(shard, config=config, device=device) if config.shard else None
    dtype = getattr(torch, config.dtype if config.lora_rank else "float32")
    model = Transformer.from_pretrained(config.model, device, dtype, cut)
    if config.lora_rank:
        model.add_lora(config.lora_rank, config.lora_alpha, config.seed)
    model.compute_dtype = getattr(torch, config.dtype)
    model.activation_checkpointing = config.activation_checkpointing
    for block in model.layers if config.compile else ():
        block.compile(dynamic=True)
    tokenizer = data.load_tokenizer(config.model)
    if config.chat_template:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{config.chat_template}: {error}") from None
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{config.model}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
            f"the embedding only {model.config.vocab_size} rows"
        )
    config.max_length = min(config.max_length, model.config.max_seq_len)
    trained = sum(p.numel() for p in trainable(model))
    n = sum(p.numel() for p in model.parameters()) - trained * bool(config.lora_rank)
    print(f"model    {config.model}: {n:,} parameters, stored as {model.config.dtype}")
    print(
        f"         {trained:,} trained, in float32, products in {config.dtype}, on {config.device}"
    )
    train_rows = data.load_preferences(config.data) if not config.eval_only else []
    eval_rows = data.load_preferences(config.eval_data) if config.eval_data else []
    if config.eval_fraction and not config.eval_data:
        train_rows, eval_rows = data.hold_out(train_rows, config.eval_fraction, config.seed)
        if not train_rows:
            raise ValueError(f"{config.data}: --eval-fraction leaves no pairs to train on")
    limits = config.max_length, config.max_prompt_length
    quiet = rank() > 0 or None  # None: where there is no terminal
    progress = functools.partial(tqdm, desc="tokenizing", unit="row", disable=quiet, leave=False)
    sets = []
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        file = rows[0].where.rpartition(":")[0] if rows else None
        if not rows:
            sets.append(([], []))
            continue
        try:
            pairs, kept, dropped = data.encode_rows(tokenizer, rows, *limits, progress)
        except ValueError as error:
            raise ValueError(error if str(error).startswith(file) else f"{file}: {error}") from None
        mean = [sum(pair.lengths[i] for pair in pairs) / len(pairs) for i in range(3)]
        forms = " and ".join(dict.fromkeys(row.form for row in rows))
        print(f"{name:<8} {file}: {forms}\n         {len(pairs)} pairs of {len(rows)}", end="; ")
        print(f"dropped: {data.describe(dropped)}")
        print("         mean tokens: prompt {:.0f}, chosen {:.0f}, rejected {:.0f}".format(*mean))
        sets.append((pairs, kept))
    if not config.eval_only:
        print("the first pair, as trained on:")
        print(data.show(sets[0][0][0], tokenizer, colour=data.use_colour()))
    return model, tokenizer, *sets


def trainable(model: Transformer) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def estimate_memory(
    model: Transformer, pairs: list[Pair], several: bool, sft_loss="full", shards=1
) -> int:
    """Bytes of weights, gradients, moments and activations where a step needs the most.

    pairs: the largest micro-batch. several: a step has other micro-batches too, whose gradients
    are there while this one's activations are. shards: of how many a process keeps one.
    Held against PyTorch's count of live tensors by tests/test_train.py and bench/memory.py.
    """
    c, lengths = model.config, [pair.lengths for pair in pairs]
    size = torch.finfo(model.compute_dtype).bits // 8
    weights = sum(p.nbytes for p in model.parameters())
    gradients = 4 * sum(p.numel() for p in trainable(model))
    n = sum(map(sum, lengths))  # packed tokens
    keys = n + sum(p for p, _, _ in lengths)  # those of a prompt are gathered twice
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    # What a block keeps for its backward pass, in values of the compute dtype: two norms (what
    # they normalise in float32, what they scale, what comes out); queries before and after
    # rotary, keys before it, keys and values gathered; attention's output; the MLP's wide tensors.
    norms = (2 if c.parallel is False else 1) * (2 + 4 // size) * c.dim
    turned = heads + kv if c.rotary_dim else 0
    wide = c.hidden_dim * (4 if c.gated else 1 if c.activation == "relu" else 2)
    block = n * (norms + 2 * heads + turned + wide) + 2 * keys * kv
    if size == 2 and model.device.type == "cpu":  # attention in parts keeps its weights
        block += c.n_heads * sum((p + m) ** 2 + r * (p + r) for p, m, r in lengths)
    block *= size
    # The blocks' weights in the compute dtype; cut up, only of those two blocks that are at work.
    cast = size * sum(p.numel() for p in model.layers.parameters() if p.element_size() > size)
    a_block = sum(p.nbytes for p in model.layers[0].parameters())
    around = weights - a_block * c.n_layers  # embedding and lm_head
    if shards > 1:
        cast = around + 2 * a_block * size // 4
    # lm_head: cast; its gradient and one group's share of it; the group's logits, and those
    # of a few rows in float32 (orpo._others_softmax)
    n_predicted = sum(m + r + (p if sft_loss == "full" else 0) for p, m, r in lengths)
    group = min(n_predicted, 2048) * c.vocab_size  # orpo.pair_groups
    head = c.vocab_size * c.dim * model.lm_head_weight.requires_grad  # frozen: no gradient
    lm_head = head * (8 + size % 4) + group * size
    lm_head += 4 * min(group, 2**20) * (size == 2)
    kept = c.n_layers * (size * n * c.dim if model.activation_checkpointing else block)
    # The most is needed in front of the backward pass, by the loss; or, with checkpointing, in its
    # first block; or at its end, when all gradients are there (and of tied embeddings both parts,
    # and their sum).
    one = block + 4 * head if model.activation_checkpointing else 0
    last = max(block + 4 * head, 12 * head) if c.tie_embeddings else max(block, 4 * head)
    first, last = kept + max(lm_head, one), last + (a_block + around) * (shards > 1)
    weights, moments, gradients = (x // shards for x in (weights, 2 * gradients, gradients))
    return weights + moments + cast + max(first + gradients * several, last + gradients)


def claim_folder(config: TrainConfig, replace=False) -> Path | None:
    """--out as a path, checked: no file, and no other run's folder. Raises ValueError.

    replace: the built-in job's own older run goes, once nothing else is in the way of a new one.
    """
    if config.out is None:
        return None
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; a folder is needed")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out}: cannot be made, as {above} is not a folder to write to")
    if (out / "model").resolve() == Path(config.model).resolve() and not config.eval_only:
        raise ValueError(f"--out {out}: its model/ would replace --model; name another folder")
    holds_run = any("loss" in row for row in read_rows(out))
    if config.eval_only and holds_run:
        return None  # printed only: that run's rows stay as they are
    if holds_run and not config.resume:
        own = Path(config.model).resolve() == (BUILTIN.parent / "base").resolve()
        if out != BUILTIN_OUT or not own:
            raise ValueError(f"--out {out}: holds a run; add --resume, or name another folder")
        if replace:
            shutil.rmtree(out)
    return out


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in trainable(model) if p.dim() >= 2]},
        {"params": [p for p in trainable(model) if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas, decay = (config.adam_beta1, config.adam_beta2), config.weight_decay
    adamw = torch.optim.AdamW(groups, config.lr, betas, eps=1e-8, weight_decay=decay, fused=True)
    adamw.found_inf = torch.zeros((), device=model.device)  # see training_step
    return adamw


def plan(model: Transformer, pairs: list[Pair], config: TrainConfig) -> tuple[int, list, bool]:
    """Prints what the run will do; returns its number of steps, its largest micro-batch, and
    whether some step has several."""
    an_epoch = steps_in_epoch(pairs, config)
    total = config.max_steps or config.epochs * an_epoch
    steps = [data.deal(step_pairs(pairs, k, config), world()) for k in range(1, total + 1)]
    loads = [[sum(pair.n_tokens for pair in share) for share in shares] for shares in steps]
    budget = config.micro_batch_tokens
    cuts = [data.cut(share, budget) for shares in steps for share in shares]
    parts = [part for cut in cuts for part in cut]
    tokens = [sum(pair.n_tokens for pair in part) for part in parts]
    largest = parts[tokens.index(max(tokens))]
    several = max(map(len, cuts)) > 1  # not by len(parts): a process may have no pair in a step
    shards = world() if config.shard else 1
    memory = estimate_memory(model, largest, several, config.sft_loss, shards)
    print(
        f"steps    {total} of {config.batch_size} pairs ({an_epoch} an epoch), "
        f"{sum(tokens) / total:.0f} tokens a step in {len(parts) / total:.1f} micro-batches, "
        f"the largest of {max(tokens)}"
    )
    if world() > 1:
        busiest = world() * sum(map(max, loads)) / sum(tokens)
        print(
            f"         over {world()} processes, the busiest with {busiest:.2f} of an equal share"
        )
    print(
        f"         lam {config.lam}, SFT over {config.sft_loss}, lr {config.lr} "
        f"({config.lr_schedule}, {config.warmup_steps} warm-up), seed {config.seed}\n"
        f"memory   about {gigabytes(memory)} at the most: weights, gradients, moments, activations",
        flush=True,
    )
    return total, largest, several


def try_micro_batch(model, optimizer, pairs: list[Pair], several: bool, config, device):
    """A step without effect, after which Adam has its moments: out of memory comes now or never.

    several: a step has other micro-batches too, whose gradients are there while this one runs.
    """
    n = sum(pair.n_tokens for pair in pairs)
    try:
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        optimizer.found_inf.fill_(1)
        optimizer.step()
        if not several:
            optimizer.zero_grad(set_to_none=True)
        with weights_ready(model):
            for batch in micro_batches(pairs, config, dealt=False):
                forward(model, batch, config.lam, len(pairs), device).loss.backward()
    except torch.OutOfMemoryError:
        raise ValueError(
            f"the largest micro-batch, {n} tokens, does not fit {config.device}; "
            f"lower --micro-batch-tokens ({config.micro_batch_tokens}) or --max-length"
        ) from None
    optimizer.found_inf.fill_(0)
    optimizer.zero_grad(set_to_none=True)


def train(config: TrainConfig) -> int:
    """One run, from the plan that is printed to the model that is saved; its exit status."""
    device = pick_device(config)
    out = claim_folder(config)
    model, tokenizer, (pairs, rows), (eval_pairs, eval_rows) = load_inputs(config, device)

    def evaluation(step: int) -> dict[str, float]:
        row = {"step": step} | evaluate(model, eval_pairs, config, device)
        row |= accepted(model, tokenizer, eval_pairs, eval_rows, config.seed + step, device)
        write_row(out, row)
        return row

    if config.eval_only:
        print(json.dumps(evaluation(0)))
        return 0

    total, largest, several = plan(model, pairs, config)
    optimizer = make_optimizer(model, config)
    try_micro_batch(model, optimizer, largest, several, config, device)
    shown = [pair.prompt for pair in (eval_pairs or pairs)[:3]]
    answers_before = answers(model, tokenizer, shown, 64, device)
    barrier()  # every process has looked into --out
    if rank() == 0:
        claim_folder(config, replace=True)
    first = 1 + (load_checkpoint(out, model, optimizer, config) if config.resume else 0)
    if rank() == 0:
        cut_metrics(out, first - 1)
        write_settings(out, config)
    if eval_pairs and first == 1:
        evaluation(0)

    steps, quiet = range(first, total + 1), rank() > 0 or None  # None: where there is no terminal
    bar = tqdm(steps, initial=first - 1, total=total, unit="step", disable=quiet)
    clock, n_tokens, flops, peak = time.perf_counter(), 0, 0, peak_flops(config, device)
    with stop_signals() as stopped:
        for step in bar:
            lr = lr_at(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            members = step_pairs(pairs, step, config)
            outputs, grad_norm = training_step(model, optimizer, members, config, device)
            n_tokens += sum(pair.n_tokens for pair in members)
            flops += step_flops(model, members, config)
            logs = due(step, config.log_every) or step == total
            evaluates = bool(eval_pairs) and (due(step, config.eval_every) or step == total)
            saves = due(step, config.save_every)
            stop = largest_anywhere(stopped[-1] if stopped else 0)
            if not (logs or evaluates or saves or stop):
                continue

            row = metrics_of(outputs, config.lam, len(members)) | {"grad_norm": grad_norm}
            row = to_host(row | {"updates": optimizer.state[trainable(model)[0]]["step"]})
            updates = int(row.pop("updates"))
            if updates < step:  # none since the first that was not finite
                raise ValueError(not_finite(model, pairs, rows, updates + 1, config, device))
            if logs:
                row |= {"learning_rate": lr, "epoch": step / steps_in_epoch(pairs, config)}
                seconds = time.perf_counter() - clock
                row |= {"tokens_per_second": n_tokens / seconds, "tflops": flops / seconds / 1e12}
                if peak:
                    row["mfu"] = flops / seconds / peak / world()
                row["peak_memory_gb"] = peak_memory_gb(device)
                write_row(out, {"step": step} | row)
                bar.set_postfix_str(
                    "loss {loss:.3f} acc {rewards/accuracies:.2f} logps {logps/chosen:.2f} / "
                    "{logps/rejected:.2f} {tokens_per_second:.0f} tok/s".format(**row)
                    + (f" MFU {row['mfu']:.0%}" if peak else "")
                )
                clock, n_tokens, flops = time.perf_counter(), 0, 0

            # Once in a while, with the clock stopped.
            pause = time.perf_counter()
            if evaluates:
                evaluation(step)
            if saves or stop:
                save_checkpoint(out, step, model, optimizer, config)
            if stop and step < total:
                bar.close()
                name = signal.Signals(stop).name
                print(f"{name}: stopped after step {step} of {total}; --resume goes on from there")
                return 128 + stop  # as a shell counts
            clock += time.perf_counter() - pause

    if rank() == 0:
        save_model(model, tokenizer, rows, config, out / "model")
        print_changes(out, total)
    elif config.shard:
        model.save_pretrained(None)
    answers_after = answers(model, tokenizer, shown, 64, device)
    for prompt, before, after in zip(shown, answers_before, answers_after, strict=True):
        print(f"\n{tokenizer.decode(prompt)}\n  before: {before}\n  after:  {after}")
    print(f"\nwrote {out}/metrics.jsonl and {out}/model, a Hugging Face folder")
    return 0


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MB"


# Dense bfloat16 operations a second by the makers' data sheets, in 1e12; the first name that fits.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}


def peak_flops(config: TrainConfig, device) -> float | None:
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


def save_model(model: Transformer, tokenizer, rows, config: TrainConfig, folder: Path):
    """The trained model as a Hugging Face folder, in the dtype that the checkpoint had."""
    if config.lora_rank:
        model = model.merge_lora(Transformer.from_pretrained(config.model))
    model.save_pretrained(folder, dtype=getattr(torch, model.config.dtype))
    for name in TOKENIZER_FILES:
        if (Path(config.model) / name).is_file():
            shutil.copyfile(Path(config.model) / name, folder / name)
    # Trained on messages by a template that did not come along: whoever chats needs it too.
    foreign = config.chat_template or tokenizer.chat_template == data.AUTHORS_CHAT_TEMPLATE
    if foreign and isinstance(rows[0].prompt, list):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    if not (folder / "generation_config.json").exists():  # where to stop
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def print_changes(out: Path, total: int):
    """The evaluation before and after, side by side, from the rows that were written."""
    evaluations = {row["step"]: row for row in read_rows(out) if "eval_loss" in row}
    if 0 in evaluations and total in evaluations:
        print(f"\n{'held out':<28}{'before':>10}{'after':>10}")
        for name in evaluations[0]:
            if name != "step":
                before, after = evaluations[0][name], evaluations[total][name]
                print(f"{name:<28}{before:>10.4f}{after:>10.4f}")


def main(argv=None):
    try:
        status = train(parse(argv))
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        who = f"train.py, process {rank()}" if rank() else "train.py"
        print(f"{who}: {error}", file=sys.stderr)
        status = 2
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
    main()
