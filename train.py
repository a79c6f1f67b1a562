"""Aligns a base model with ORPO.

  the built-in job, a minute on a laptop:
    python train.py
  one GPU, or the CPU; with --dry-run only the plan, with memory, disk and time:
    python train.py --model DIR --data FILE --eval-data FILE --out OUT
  the same run again after an interruption, on any number of GPUs:
    python train.py ... --resume
  the eight GPUs of one machine, each of which keeps an eighth of the model:
    torchrun --shutdown-timeout 600 --nproc-per-node 8 train.py ... --shard
  two machines of eight GPUs that share a file system; on both, HOST being the name of the first:
    torchrun --shutdown-timeout 600 --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \\
      --rdzv-endpoint HOST:29500 train.py ... --shard
  the evaluation of a finished run, with the run's settings, as one JSON object:
    python train.py --model OUT/model --eval-only
"""

import contextlib
import functools
import json
import math
import os
import signal
import sys
from datetime import date
from pathlib import Path

# Read when torch is imported or first allocates. On a CPU large tensors then lie in huge pages, and
# threads that wait for each other sleep after a moment (beside three busy loops on two cores, 12
# built-in steps took 27 s and not 42; alone, 60 took 11 s either way). On a GPU blocks of memory
# can grow, so that ever new sizes leave no gaps.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import orpo
from data import Batch, Pair, step_pairs
from formats.files import model_folder
from formats.weights import full_tensor
from model import ModelConfig, Transformer, trainable
from run.answers import accepted, answers
from run.compiled import compile_blocks, compile_kernels
from run.flags import ENDLESS, TrainConfig, parse
from run.folder import (
    begin_folder,
    checkpoints,
    claim_folder,
    date_of_run,
    holds_run,
    is_evaluated,
    is_finished,
    print_best,
    print_changes,
    way_on,
    write_row,
)
from run.log import HostCopy, Log, NotFinite, check_updates, due, n_updates
from run.lora import add_lora
from run.plan import (
    Plan,
    make_plan,
    out_of_memory_advice,
    tell,
    tell_model,
    tell_peak,
    tell_problems,
)
from run.printing import steady_streams
from run.processes import (
    Stopped,
    about_peers,
    check_stopped,
    give_back_memory,
    is_of_peers,
    pick_device,
    rank,
    resharded,
    shard,
    stop_signals,
    sum_over_processes,
    world_size,
)
from run.saving import Run, digest, finish, load_checkpoint, save_best, save_checkpoint, stop_ids

# What runs in which dtype:
#                                                --dtype float32    --dtype bfloat16
#     trained weights, gradients, Adam's moments float32            float32
#     frozen weights (--lora-rank)               float32            bfloat16
#     residual stream, matrix products           float32 (tf32      bfloat16 (a weight is cast where
#                                                on CUDA)           it is used)
#     norms, rotary angles, log-softmax          float32            float32
#     the loss's scalars, one a token or pair    float64            float64
#     sum of lm_head's gradient over groups      float32            float32
#
# There is no dropout, whatever the checkpoint's config says (TRL switches it off too).

# ---------------------------------------------------------------------------------------------
# The parts of a step.


def lr_at(step: int, n_steps: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (1 is the first): a function of the step."""
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


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


def pack(pairs: list[Pair], config: TrainConfig, share: bool = True) -> list[Batch]:
    """A step's pairs as micro-batches: this process's share of them, or all.

    In bfloat16 lengths are padded to multiples of 64: a CPU builds a kernel for every new shape,
    and the tiles of a GPU have such sizes.
    """
    multiple = 64 if config.dtype == "bfloat16" else 1
    mine = (rank(), world_size()) if share else (0, 1)
    return data.micro_batches(pairs, config.token_budget, config.sft_loss, multiple, *mine)


def forward(model: Transformer, batch: Batch, lam: float) -> orpo.ORPOOutput:
    """The loss of one micro-batch, as its share of the step's."""
    give_back_memory()
    b = batch.to(model.device)
    hidden = model.hidden_states(b.tokens, b.positions, b.segments)  # (N, D)
    hidden, lm_head = model.projection(hidden.index_select(0, b.predict))  # (P, D), (V, D)
    return orpo.fused_linear_orpo(
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
    # Where loss or norm is not finite there is no update, neither now nor later. found_inf is the
    # flag by which PyTorch's GradScaler tells a fused AdamW to leave everything as it is. Adam
    # counts the updates that it makes, so from the count we can tell at which step it stopped.
    optimizer.found_inf = optimizer.found_inf.maximum(~torch.isfinite(loss + grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outputs, grad_norm


def metrics_of(outputs: list[orpo.ORPOOutput], lam: float, n_pairs: int) -> dict[str, torch.Tensor]:
    """A step's metrics, under the names that TRL's users know, still on the device.

    Each is a sum: over the pairs of this process, then over processes.
    """
    chosen = torch.cat([o.chosen_logps for o in outputs])
    rejected = torch.cat([o.rejected_logps for o in outputs])
    pair_losses = torch.cat([o.odds_ratio_loss for o in outputs])
    shares = {
        "loss": torch.stack([o.loss.detach().double() for o in outputs]).sum(),
        "nll_loss": torch.stack([o.nll_loss for o in outputs]).sum(),
        # Two names of TRL that say something else: the mean of log sigmoid(log odds ratio), which
        # is -L_OR, and the mean log odds ratio.
        "log_odds_ratio": -pair_losses.sum() / n_pairs,
        "log_odds_chosen": (orpo.log_odds(chosen) - orpo.log_odds(rejected)).sum() / n_pairs,
        # How hard L_OR pulls on a chosen token, L_SFT's pull being 1: lam * delta / (1 - P_w).
        "pull_ratio": -lam * orpo.odds_ratio_grad(chosen, rejected)[0].sum() / n_pairs,
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
def evaluate(
    model: Transformer, pairs: list[Pair], config: TrainConfig, may_stop=lambda: None
) -> dict[str, float]:
    """The metrics over all of an evaluation set, normalised over all of it, as eval_*. may_stop is
    called after each micro-batch, by all processes together."""
    outputs = []
    with resharded(model):
        for batch in pack(pairs, config):
            outputs.append(forward(model, batch, config.lam))
            may_stop()
    metrics = HostCopy(metrics_of(outputs, config.lam, len(pairs))).read()
    return {f"eval_{name}": value for name, value in metrics.items()}


def evaluation(model: Transformer, tokenizer, pairs, step, config, may_stop=lambda: None) -> dict:
    """The row of an evaluation after `step` updates."""
    row = {"step": step} | evaluate(model, pairs, config, may_stop)
    return row | accepted(model, tokenizer, pairs, config.seed + step, may_stop)


# ---------------------------------------------------------------------------------------------
# A run.


def train(config: TrainConfig, out: Path | None) -> int:
    """One run, from the plan that is printed to the model that is saved; its exit status."""
    model, tokenizer, pairs, eval_pairs = load_inputs(config)
    plan = make_plan(model, tokenizer, pairs, config)
    optimizer = make_optimizer(model, config)
    try_largest(model, optimizer, plan, config)
    if config.dry_run:
        return 0
    shown = [pair.prompt for pair in (eval_pairs or pairs)[:3]]
    before = answers(model, tokenizer, shown, 64)
    digests = {"data": digest(pairs), "eval_data": digest(eval_pairs)}
    chat, plain = any(pair.chat for pair in pairs), not all(pair.chat for pair in pairs)
    run = Run(config, out, model, optimizer, tokenizer, chat, plain, plan.n_steps, digests)
    stop_ids(run)  # reads a file that saving needs: if it is broken, now is the time to say so
    start = load_checkpoint(run) if config.resume else 0
    begin_folder(out, start, config)
    log = Log(out, model, start, plan, config)

    with stop_signals() as stopped, blame_rows(model, pairs, config):
        stop = loop(run, log, pairs, eval_pairs, start, stopped)
    if stop:
        return 128 + stop  # as a shell counts

    finish(run)
    print_changes(out, plan.n_steps)
    after = answers(model, tokenizer, shown, 64)
    for prompt, *texts in zip(shown, before, after, strict=True):
        print("\n{}\n  before: {}\n  after:  {}".format(tokenizer.decode(prompt), *texts))
    print(f"\nwrote {out}/metrics.jsonl and {out}/model, a Hugging Face folder")
    print_best(out)
    return 0


def loop(
    run: Run, log: Log, pairs: list[Pair], eval_pairs: list[Pair], start: int, stopped: list
) -> int:
    """The updates after `start`. Returns the signal that stopped them early, or 0."""
    config, model, optimizer, n_steps = run.config, run.model, run.optimizer, run.n_steps

    def pairs_of(step: int) -> list[Pair]:
        return step_pairs(pairs, step, config.batch_size, config.seed)

    def evaluates(step: int) -> bool:
        return eval_pairs and (step in (0, n_steps) or due(step, config.eval_every))

    def evaluate_after(step: int):
        may_stop = functools.partial(check_stopped, stopped)
        row = evaluation(model, run.tokenizer, eval_pairs, step, config, may_stop)
        save_best(run, row)  # before its row, by which --resume knows that all of this was done
        log.evaluation(row)

    step, saved = start, True
    try:
        if evaluates(start) and not is_evaluated(run.out, start):  # a stop may have come in it
            with log.paused():
                evaluate_after(start)
        batches = pack(pairs_of(start + 1), config)
        for step in range(start + 1, n_steps + 1):
            saved, lr = False, lr_at(step, n_steps, config)
            set_lr(optimizer, lr)
            outputs, grad_norm = training_step(model, optimizer, batches, config)
            batches = pack(pairs_of(step + 1), config)  # while the device computes
            metrics = None
            if log.wants(step):
                metrics = metrics_of(outputs, config.lam, len(pairs_of(step)))
                metrics |= {"grad_norm": grad_norm, "updates": n_updates(optimizer, model)}
            log.step(step, pairs_of(step), metrics, lr)
            check_stopped(stopped)
            saves = config.save_every and (step == n_steps or due(step, config.save_every))
            if evaluates(step) or saves:
                with log.paused():
                    check_updates(optimizer, model, step)  # before anything is saved
                    if saves:  # first: an evaluation may be stopped
                        save_checkpoint(run, step)
                        saved = True
                    if evaluates(step):
                        evaluate_after(step)
    except Stopped as stop:
        if not saved:
            with log.paused():
                check_updates(optimizer, model, step)
                save_checkpoint(run, step)
        log.close()
        name = signal.Signals(stop.number).name
        print(f"{name}: stopped after step {step} of {n_steps}; {way_on(run.out)}")
        return stop.number
    log.close()
    return 0


# ---------------------------------------------------------------------------------------------
# Before the first step: loading, and the largest micro-batch.


def load_inputs(config: TrainConfig):
    """(model, tokenizer, pairs to train on, pairs to evaluate on); prints what they are."""
    model = load_model(config)
    tell_model(model, config)
    tokenizer = data.load_tokenizer(config.model, config.chat_template)
    tokenizer.date = date.fromisoformat(config.date) if config.date else None
    if tokenizer.writes_date:
        tell("date", f"{config.date or 'today'}, by the chat template; --date sets another one")
    if beyond := tokenizer.tokens_from(model.config.vocab_size):
        tell("tokens", f"{beyond}: beyond the embedding's {model.config.vocab_size} rows")
    trains = not config.eval_only
    train_rows = data.load_preferences(config.data) if trains or not config.eval_data else []
    eval_rows = data.load_preferences(config.eval_data) if config.eval_data else []
    if config.eval_fraction:
        train_rows, eval_rows = data.hold_out(train_rows, config.eval_fraction, config.seed)
        if not train_rows:
            raise ValueError(f"{config.data}: --eval-fraction leaves no pairs to train on")
    pairs = load_pairs("train", train_rows, tokenizer, config) if trains else []
    eval_pairs = load_pairs("eval", eval_rows, tokenizer, config)
    data.refuse_beyond(pairs + eval_pairs, tokenizer, model.config.vocab_size)
    tell_problems(model, tokenizer, pairs, eval_pairs)
    return model, tokenizer, pairs, eval_pairs


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
    if config.compile:
        compile_blocks(model, config.shard)
    orpo.softmax_kernel = compile_kernels(model.device, orpo.plain_softmax)
    return model


def load_pairs(name: str, rows: list, tokenizer, config: TrainConfig) -> list[Pair]:
    if not rows:
        return []
    quiet = True if rank() else None  # None: no progress bar where there is no terminal
    progress = functools.partial(tqdm, desc="tokenizing", unit="row", disable=quiet, leave=False)
    limits = config.max_length, config.max_prompt_length
    pairs, dropped = data.encode_pairs(tokenizer, rows, *limits, progress)
    tell(name, *data.summary(rows, pairs, dropped, config.max_length))
    return pairs


def try_largest(model: Transformer, optimizer, plan: Plan, config: TrainConfig):
    """The largest micro-batch, and the one with most logits at a time, forward and backward, with
    everything in memory that a step has: running out of it happens now. Nothing changes by it."""
    with out_of_memory_advice(config, plan.largest):
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        set_lr(optimizer, 0.0)  # a step of zero gradients makes Adam's moments, and changes nothing
        optimizer.step()
        set_lr(optimizer, config.lr)
        for state in optimizer.state.values():
            state["step"].zero_()
    for pairs in filter(None, (plan.largest, plan.widest)):
        if not plan.several:  # else those of other micro-batches are there while this one runs
            optimizer.zero_grad(set_to_none=True)
        with out_of_memory_advice(config, pairs):
            for batch in pack(pairs, config, share=False):
                forward(model, batch, config.lam).loss.backward()
    optimizer.zero_grad(set_to_none=True)
    tell_peak(model.device, plan.several)


# ---------------------------------------------------------------------------------------------
# A step that was not finite.


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
        (batch,) = pack([pair], config, share=False)
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
        found = ["the sum over its rows, each of which is finite by itself"]
    where = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f"step {step}: loss or gradient not finite at {where}; nothing was updated or saved"


# ---------------------------------------------------------------------------------------------
# The command.


def run_command(config: TrainConfig) -> int:
    """What the flags ask for: an evaluation, or a training run; its exit status."""
    pick_device(config)
    config.model = str(model_folder(config.model))
    context = ModelConfig.from_json(Path(config.model) / "config.json").max_seq_len
    config.max_length = min(config.max_length, context)
    config.date = date_of_run(config)
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


def evaluate_only(config: TrainConfig) -> int:
    """Prints the row of an evaluation, with what it depends on, as the only line on stdout."""
    with contextlib.redirect_stdout(sys.stderr if rank() == 0 else sys.stdout):
        model, tokenizer, _, eval_pairs = load_inputs(config)
        row = evaluation(model, tokenizer, eval_pairs, 0, config)
    settings = {"lam": config.lam, "sft_loss": config.sft_loss}
    settings |= {"date": config.date} if tokenizer.writes_date else {}
    print(json.dumps(row | settings), flush=True)
    if config.out and not holds_run(Path(config.out)):  # we add nothing to the rows of a run
        write_row(Path(config.out), row)
    return 0


def main(argv=None):
    """The command line: exit status 2 and one sentence where something is wrong."""
    with steady_streams():
        status = run_in_order(argv)
    if dist.is_initialized():
        # At once, past the interpreter's own clearing up: in it FSDP2 over gloo aborts now and
        # then, after all is done, and after an error NCCL would wait for the other processes.
        if status == 0:
            dist.destroy_process_group()
        os._exit(status)
    if status:
        sys.exit(status)


def run_in_order(argv) -> int:
    """The exit status, after one sentence where something is wrong."""
    try:
        return run_command(config := parse(argv, __doc__))
    except KeyboardInterrupt:  # outside of the loop, which stops in order
        print("train.py: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        who = f"train.py, process {rank()}" if rank() else "train.py"
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not is_of_peers(error):
            raise
        why = f"{about_peers(error)}; {way_on(config.out)}"
        print(f"train.py, process {rank()}: {why}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
