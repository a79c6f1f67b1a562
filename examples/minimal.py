"""ORPO on one page: padded batches, autograd, one device, no options. Read this first.

    python -m examples.minimal

It trains the built-in job in the same steps as train.py, which is faster because it computes each
prompt once and pads nothing.
"""

import json
import math
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import data
from model import Transformer
from orpo import orpo_loss, response_logps
from run.answers import answers

HERE = Path(__file__).resolve().parent

FACTS = HERE / "facts"
WARMUP, SEED = 10, 42  # the defaults of run/flags.py; the other settings are in train.json


def logps(model: Transformer, pairs: list[data.Pair], side: str) -> torch.Tensor:
    """log P(y|x) of each pair's chosen or rejected response y: (B,), a mean over its tokens."""
    both = [(pair.prompt, getattr(pair, side)) for pair in pairs]
    sequences = [torch.tensor([*prompt, *response]) for prompt, response in both]
    tokens = pad_sequence(sequences, batch_first=True)  # (B, T); no response token sees the padding
    mask = torch.zeros_like(tokens, dtype=torch.bool)  # true at the tokens of the response
    for row, (prompt, response) in zip(mask, both, strict=True):
        row[len(prompt) : len(prompt) + len(response)] = True
    logits = model(tokens)[:, :-1]  # (B, T-1, V): the logits at a token predict the next one
    return response_logps(logits, tokens[:, 1:], mask[:, 1:])


def train(model: Transformer, pairs: list[data.Pair], settings: dict):
    """Makes one update after another, and yields the loss of each."""
    batch_size, lam, lr = settings["batch_size"], settings["lam"], settings["lr"]
    steps_an_epoch = math.ceil(len(pairs) / batch_size)
    n_steps = settings["epochs"] * steps_an_epoch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(n_steps):
        epoch, i = divmod(step, steps_an_epoch)
        order = data.epoch_permutation(len(pairs), SEED, epoch)
        batch = [pairs[k] for k in order[i * batch_size : (i + 1) * batch_size]]

        loss = orpo_loss(logps(model, batch, "chosen"), logps(model, batch, "rejected"), lam)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = max(0, step - WARMUP) / (n_steps - WARMUP)  # 0 until the warm-up is over
        warm = min(1, (step + 1) / WARMUP)
        optimizer.param_groups[0]["lr"] = lr * warm * (1 + math.cos(math.pi * done)) / 2
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def report(model: Transformer, tokenizer, pairs: list[data.Pair]):
    chosen, rejected = logps(model, pairs, "chosen"), logps(model, pairs, "rejected")
    print(f"held out: accuracy {(chosen > rejected).float().mean():.3f}, log P(chosen)", end=" ")
    print(f"{chosen.mean():.2f}, log P(rejected) {rejected.mean():.2f}")
    print(answers(model, tokenizer, [pairs[0].prompt], 24))


if __name__ == "__main__":
    settings = json.loads((FACTS / "train.json").read_text())
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(FACTS / "base")
    rows = [data.load_preferences(FACTS / name) for name in ("train.jsonl", "eval.jsonl")]
    pairs, held_out = (data.encode_pairs(tokenizer, r, 96, 96)[0] for r in rows)
    report(model, tokenizer, held_out)
    for step, loss in enumerate(train(model, pairs, settings), 1):
        print(f"step {step}: loss {loss:.4f}", flush=True)
    report(model, tokenizer, held_out)
