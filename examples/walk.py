"""One ORPO step, number by number: a pair of the built-in task through the base model and back.

    python -m examples.walk [--line N] [--lam 1.0]

Every number is worked out here from the paper's formulas and the plain logits, in float64, and the
last part holds it against what training runs (`orpo.fused_linear_orpo`).
"""

import argparse
import sys
from pathlib import Path

import torch

import data
import train
from model import Transformer

HERE = Path(__file__).resolve().parent

FACTS = HERE / "facts"
STEP_SIZE = 1e-4  # of the plain gradient step at the end


def read(line: int):
    """The base model in float64, and the pair of that line of train.jsonl. Raises ValueError."""
    rows = data.load_preferences(FACTS / "train.jsonl")
    if not 1 <= line <= len(rows):
        raise ValueError(f"--line must be from 1 to {len(rows)}, not {line}")
    tokenizer = data.load_tokenizer(FACTS / "base")
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float64)
    (pair,), _ = data.encode_pairs(tokenizer, rows[line - 1 : line], 96, 96)
    return model, tokenizer, pair


def token_logps(model: Transformer, prompt, response) -> torch.Tensor:
    """log p(y_t | x, y_<t) of each token of the response, (m,): no packing, no shared prefix."""
    tokens = torch.tensor([[*prompt, *response]])
    logps = torch.log_softmax(model(tokens)[0, len(prompt) - 1 : -1], dim=-1)  # (m, V)
    return logps.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)


def walk(line: int, lam: float):
    """Prints one pair's way from tokens to gradient, each number by our code and by the formula."""
    model, tokenizer, pair = read(line)
    p, m, r = pair.lengths
    print(data.show(pair, tokenizer, data.use_colour()))
    print(
        f"\npacked into {p + m + r} positions: the prompt once, 0 to {p - 1}; the chosen response"
    )
    print(f"from {p} to {p + m - 1}, the rejected one from {p} to {p + r - 1} again\n")

    means, odds = {}, {}
    for name, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        logps = token_logps(model, pair.prompt, ids)
        shown = "  ".join(
            f"{tokenizer.decode([i])} {x:.2f}" for i, x in zip(ids, logps, strict=True)
        )
        means[name] = logps.mean()
        odds[name] = means[name].exp() / (1 - means[name].exp())
        print(f"{name:<9} log p of each token: {shown}")
        print(
            f"          log P = {means[name]:.4f} (their mean)   P = {means[name].exp():.4f}   "
            f"odds = P/(1-P) = {odds[name]:.4f}"
        )

    s = (odds["chosen"] / odds["rejected"]).log()
    sft, l_or = -means["chosen"], -torch.sigmoid(s).log()
    loss = sft + lam * l_or
    print(f"\ns = log odds ratio = log({odds['chosen']:.4f} / {odds['rejected']:.4f}) = {s:.4f}")
    print(f"L_SFT = -log P(chosen) = {sft:.4f}   L_OR = -log sigmoid(s) = {l_or:.4f}")
    print(f"L = L_SFT + {lam} L_OR = {loss:.4f}")

    delta = 1 / (1 + s.exp())
    d_chosen = -1 - lam * delta / (1 - means["chosen"].exp())
    d_rejected = lam * delta / (1 - means["rejected"].exp())
    print(f"\ndelta = 1/(1 + odds ratio) = {delta:.4f}")
    print(f"dL/dlog P(chosen)   = -1 - {lam} delta/(1-P) = {d_chosen:.4f}")
    print(f"dL/dlog P(rejected) =      {lam} delta/(1-P) =  {d_rejected:.4f}")
    print(f"dL/dlog p of a token: {d_chosen / m:.4f} if chosen (a share of 1/{m}),", end=" ")
    print(f"{d_rejected / r:.4f} if rejected (1/{r})")

    (batch,) = data.micro_batches([pair], budget=10**6, sft_loss="response")
    output = train.forward(model, batch, lam)
    output.loss.backward()
    squared = sum((w.grad**2).sum() for w in model.parameters())
    with torch.no_grad():
        for w in model.parameters():
            w -= STEP_SIZE * w.grad
        after = {n: token_logps(model, pair.prompt, getattr(pair, n)).mean() for n in means}
        again = train.forward(model, batch, lam).loss
    print(f"\ntraining's packed, fused path: L = {output.loss.item():.4f}", end=" ")
    print(f"(apart by {(output.loss - loss).abs().item():.0e}), gradient norm {squared.sqrt():.3f}")
    print(
        f"a step of {STEP_SIZE} along it: L falls by {output.loss.item() - again.item():.4f}",
        end=" ",
    )
    print(f"(step times squared norm: {STEP_SIZE * squared:.4f})")
    print(f"log P(chosen) {means['chosen']:.4f} -> {after['chosen']:.4f}", end="   ")
    print(f"log P(rejected) {means['rejected']:.4f} -> {after['rejected']:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--line", type=int, default=85, help="of train.jsonl (85)")
    parser.add_argument("--lam", type=float, default=1.0, help="weight of L_OR (1.0)")
    arguments = parser.parse_args()
    try:
        walk(arguments.line, arguments.lam)
    except ValueError as error:
        print(f"walk.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
