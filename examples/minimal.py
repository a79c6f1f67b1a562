"""ORPO on one page: padded batches, autograd, one device, no options. Read this first.

    python examples/minimal.py

It trains the built-in job as train.py does, step for step the same numbers, only slower: train.py
computes each prompt once and pads nothing, and knows what to do when something goes wrong.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
from model import Transformer  # noqa: E402
from orpo import orpo_loss, response_logps  # noqa: E402

FACTS = HERE / "facts"
WARMUP, CLIP, SEED = 10, 1.0, 42  # train.py's defaults; what differs from them is in train.json


def read(tokenizer, file: str, max_length: int) -> list[data.Pair]:
    """(prompt, chosen, rejected) token ids of each row."""
    rows = data.load_preferences(FACTS / file)
    pairs, _ = data.encode_rows(tokenizer, rows, max_length, max_length)
    return pairs


def logps(model: Transformer, pairs: list[data.Pair], side: str) -> torch.Tensor:
    """log P(y|x) of each pair's chosen or rejected response y: (B,), a mean over its tokens."""
    prompts, responses = [p.prompt for p in pairs], [getattr(p, side) for p in pairs]
    sequences = [torch.tensor([*x, *y]) for x, y in zip(prompts, responses, strict=True)]
    tokens = pad_sequence(sequences, batch_first=True)  # (B, T), padded where nobody looks
    mask = torch.zeros_like(tokens, dtype=torch.bool)  # true at the tokens of the response
    for row, (x, y) in zip(mask, zip(prompts, responses, strict=True), strict=True):
        row[len(x) : len(x) + len(y)] = True
    logits = model(tokens)[:, :-1]  # (B, T-1, V): the logits at a token predict the next one
    return response_logps(logits, tokens[:, 1:], mask[:, 1:])


def train(model: Transformer, pairs: list[data.Pair], settings: dict, max_steps=math.inf):
    """Yields the loss of each step, as measured before its update."""
    size, lam, lr = settings["batch_size"], settings["lam"], settings["lr"]
    steps_an_epoch = math.ceil(len(pairs) / size)
    n_steps = settings["epochs"] * steps_an_epoch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(min(n_steps, max_steps)):
        epoch, i = divmod(step, steps_an_epoch)
        order = data.epoch_permutation(len(pairs), SEED, epoch)
        batch = [pairs[k] for k in order[i * size : (i + 1) * size]]

        loss = orpo_loss(logps(model, batch, "chosen"), logps(model, batch, "rejected"), lam)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        done = max(0, step - WARMUP) / (n_steps - WARMUP)  # 0 until the warm-up is over
        warm = min(1, (step + 1) / WARMUP)
        optimizer.param_groups[0]["lr"] = lr * warm * (1 + math.cos(math.pi * done)) / 2
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def report(model: Transformer, tokenizer, pairs: list[data.Pair]):
    chosen, rejected = logps(model, pairs, "chosen"), logps(model, pairs, "rejected")
    accuracy = (chosen > rejected).float().mean()
    print(f"held out: reward accuracy {accuracy:.3f},", end=" ")
    print(f"log P chosen {chosen.mean():.2f}, rejected {rejected.mean():.2f}")
    (answer,) = model.generate([pairs[0].prompt], 24, eos_id=tokenizer.eos_id)
    print(tokenizer.decode([*pairs[0].prompt, *answer]))


def main():
    settings = json.loads((FACTS / "train.json").read_text())
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(FACTS / "base")
    pairs = read(tokenizer, "train.jsonl", settings["max_length"])
    held_out = read(tokenizer, "eval.jsonl", settings["max_length"])
    report(model, tokenizer, held_out)
    for step, loss in enumerate(train(model, pairs, settings), 1):
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)
    report(model, tokenizer, held_out)


if __name__ == "__main__":
    main()
