"""TRL's ORPOTrainer as one function: weights and token ids in, a dict of metrics a step out.

Used by tests/peers/test_trl.py and tests/peers/politeness.py. TRL's own code computes everything
but two things, which `OnIds` replaces so that both sides see the same data: the token ids (TRL
tokenises prompt and response as one string, so that its last prompt token may differ from ours)
and the order of the rows (ours depends on seed and epoch alone, TRL's on its sampler).
"""

import os
import tempfile
import time

# Before the imports: no telemetry, no look-up of a model card on the Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

disable_progress_bar()

# What both sides log, and mean the same by.
SHARED_METRICS = (
    "loss",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
)


class OnIds(ORPOTrainer):
    """ORPOTrainer on rows that already are token ids, in the order given where that is wanted."""

    in_given_order = True

    def tokenize_row(self, row, model=None):
        out = {"prompt_input_ids": row["prompt_ids"]}
        out["prompt_attention_mask"] = [1] * len(row["prompt_ids"])
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            out[f"{side}_input_ids"] = ids
            out[f"{side}_attention_mask"] = [1] * len(ids)
            out[f"{side}_labels"] = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
        return out

    def _get_train_sampler(self, train_dataset=None):
        if self.in_given_order:
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)


def dataset(pairs):
    """[(prompt_ids, chosen_ids, rejected_ids)] -> the rows the trainer maps over.

    Its three text columns must be there and are not read.
    """
    text = {"prompt": "", "chosen": "", "rejected": ""}
    return Dataset.from_list(
        [
            text | {"prompt_ids": list(p), "chosen_ids": list(c), "rejected_ids": list(r)}
            for p, c, r in pairs
        ]
    )


def padding_only():
    """The least a trainer asks of a tokenizer. The id only fills positions that are masked."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
    )


def make_trainer(model, pairs, eval_pairs=None, *, out, trainer=OnIds, tokenizer=None, **settings):
    """An ORPOTrainer; `settings` are ORPOConfig's. Where none are given, it computes in float32 on
    the CPU without recomputation, and not as TRL's defaults have it."""
    defaults = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    defaults |= {"weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    on_ids = issubclass(trainer, OnIds)
    made = trainer(
        model=model,
        args=ORPOConfig(output_dir=out, **(defaults | quiet | settings)),
        train_dataset=dataset(pairs) if on_ids else pairs,
        eval_dataset=dataset(eval_pairs) if eval_pairs else None,
        processing_class=tokenizer or padding_only(),
    )
    made.remove_callback(PrinterCallback)
    return made


def run_trl(
    model_dir,
    pairs,
    eval_pairs=None,
    *,
    batch_size=8,
    micro_batch_size=None,
    max_steps=-1,
    epochs=1,
    lr=1e-3,
    lam=0.1,
    lr_schedule="constant",
    warmup_steps=0,
    seed=42,
    in_given_order=True,
):
    """Train a model folder on `pairs`, a step being `batch_size` of them in one micro-batch.

    Returns (rows, model, seconds): one dict an update with TRL's names and "step" 1 the first,
    and, where there are `eval_pairs`, one before the first (step 0) and one after the last;
    `seconds` is the training alone.
    """
    micro_batch_size = micro_batch_size or batch_size
    if lr_schedule == "constant" and warmup_steps:  # transformers' "constant" has no warm-up
        lr_schedule = "constant_with_warmup"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(
            model,
            pairs,
            eval_pairs,
            out=out,
            per_device_train_batch_size=micro_batch_size,
            # One batch: TRL logs the mean of batch means, which a short last batch would bend.
            per_device_eval_batch_size=len(eval_pairs) if eval_pairs else 1,
            gradient_accumulation_steps=batch_size // micro_batch_size,
            max_steps=max_steps,
            num_train_epochs=epochs,
            learning_rate=lr,
            beta=lam,
            lr_scheduler_type=lr_schedule,
            warmup_steps=warmup_steps,
            seed=seed,
        )
        trainer.in_given_order = in_given_order
        before = [trainer.evaluate() | {"step": 0}] if eval_pairs else []
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        if eval_pairs:
            trainer.evaluate()
    # train() empties the history, so the evaluation before it was kept apart.
    rows = [r for r in trainer.state.log_history if "loss" in r or "eval_loss" in r]
    return before + rows, model, seconds
