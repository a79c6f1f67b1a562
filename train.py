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

import contextlib
import functools
import json
import math
import os
import signal
import sys
from pathlib import Path

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
from tqdm import tqdm

import data
from attention import Segments, to_device
from data import Batch, Pair, PairSet, step_pairs
from formats.weights import full_tensor
from model import ModelConfig, Transformer, trainable
from orpo import ORPOOutput, fused_linear_orpo, log_odds, odds_ratio_grad
from run.answers import accepted, answers
from run.flags import ENDLESS, TrainConfig, is_builtin, parse
from run.folder import (
    begin_folder,
    checkpoints,
    claim_folder,
    holds_run,
    is_finished,
    print_best,
    print_changes,
    write_row,
)
from run.log import HostCopy, Log, NotFinite, check_updates, due, n_updates
from run.lora import add_lora
from run.plan import Plan, block_memory, gigabytes, make_plan, out_of_memory_advice, peak_memory_gb
from run.processes import (
    is_of_peers,
    max_over_processes,
    pick_device,
    rank,
    reshard,
    shard,
    stop_signals,
    sum_over_processes,
    world_size,
)
from run.saving import finish, load_checkpoint, save_best, save_checkpoint

# ---------------------------------------------------------------------------------------------
# Settings. A field is a flag; a JSON config holds the same names.


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

    order = config.batch_size, config.seed
    upcoming = micro_batches(step_pairs(pairs, start + 1, *order), config)
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
            upcoming = micro_batches(
                step_pairs(pairs, step + 2, config.batch_size, config.seed), config
            )
            now = step_pairs(pairs, step + 1, config.batch_size, config.seed)
            metrics = None
            if log.wants(step + 1):
                metrics = metrics_of(outputs, config.lam, len(now)) | {"grad_norm": grad_norm}
                metrics["updates"] = n_updates(optimizer, model)
            log.step(step + 1, now, metrics, lr)
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
        print(f"then draw both: python -m tools.plot {out} {out.parent / 'sft'}")
    return 0


# =============================================================================================
# Nothing below is ORPO: processes, memory, loading, the plan, the log, checkpoints, flags.
# =============================================================================================


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


# ---------------------------------------------------------------------------------------------
# Processes: each takes its share of a step's pairs, and what they find adds up.


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
            add_lora(model, config.lora_rank, config.lora_alpha, config.seed)
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


# ---------------------------------------------------------------------------------------------
# The folder of a run: its settings, its rows, its checkpoints, its model.


# ---------------------------------------------------------------------------------------------
# The log.


@contextlib.contextmanager
def blame_rows(model: Transformer, pairs: list[Pair], config: TrainConfig):
    """A step that was not finite becomes a ValueError that names its rows."""
    try:
        yield
    except NotFinite as error:
        raise ValueError(rows_not_finite(model, pairs, error.step, config)) from None


def rows_not_finite(model: Transformer, pairs: list[Pair], step: int, config: TrainConfig) -> str:
    """What in a step was not finite: its pairs one by one, on the weights that it had."""
    pairs, found = step_pairs(pairs, step, config.batch_size, config.seed), []
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


# ---------------------------------------------------------------------------------------------
# Flags.


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
