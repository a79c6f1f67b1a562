"""What each idea is worth: one loss, five ways to compute it, forward and backward.

    python -m bench.ideas [--ratios 1:4 1:1 4:1 16:1] [--dtype float32|bfloat16] [--rounds N]

    a  padded          every response after its own copy of the prompt, padded to the longest
    b  packed          the same sequences end to end
    c  shared prefix   prompt, chosen, rejected end to end: each prompt once
    d  lm_head         only where a prediction carries weight
    e  fused linear    its gradient formed in the forward pass, a group of pairs at a time

a to d take log-probabilities from whole logits, by autograd. Each includes those before it. The
table's bound is the speed-up over (a) that counting operations allows; arXiv 2410.20305 measures
(b) and (c) so, for DPO. The SFT term covers the response (train.py's default): with
`--sft-loss full` nearly every row is predicted, and (d) is (c).
"""

import argparse
import ctypes
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import data
import train
from attention import Segments
from bench import peers, step
from bench.step import LAM, positive
from model import Transformer
from orpo import odds_ratio_loss
from run.processes import keep_freed_memory
from tools.report import head, table, write

NAMES = {
    "a": "padded, separate",
    "b": "packed, separate",
    "c": "packed, shared prefix",
    "d": "+ lm_head where needed",
    "e": "+ fused linear",
}
RESPONSE = 128  # mean tokens


def make_pairs(ratio: str, n: int, seed: int = 0) -> list[data.Pair]:
    """Responses of 64 to 192 tokens, prompts of ratio * 128, a quarter more or less."""
    prompt, response = (int(x) for x in ratio.split(":"))
    middle = np.array([prompt / response, 1, 1])
    low, high = middle * (0.75, 0.5, 0.5), middle * (1.25, 1.5, 1.5)
    rng = np.random.default_rng(seed)
    lengths = (RESPONSE * rng.uniform(low, high, (n, 3))).astype(int)
    vocab_size = step.SHAPE.vocab_size
    return [data.Pair(*(rng.integers(3, vocab_size, k).tolist() for k in row)) for row in lengths]


def layout(pairs: list[data.Pair], padded: bool):
    """Sequences apart: (tokens, positions, segments, row that predicts each response token)."""
    sequences = [pair.prompt + response for pair in pairs for response in pair[1:3]]
    lengths = [len(s) for s in sequences]
    if padded:  # on the right, where causal attention needs no mask
        longest = max(lengths)
        sequences = [s + [0] * (longest - len(s)) for s in sequences]
        lengths = [longest] * len(sequences)
    starts = itertools.accumulate(lengths, initial=0)
    prompts = [len(pair.prompt) for pair in pairs for _ in range(2)]
    responses = [n for pair in pairs for n in pair.lengths[1:]]
    first = [start + p - 1 for start, p in zip(starts, prompts, strict=False)]
    predict = [torch.arange(f, f + n) for f, n in zip(first, responses, strict=True)]
    tokens = torch.tensor([token for s in sequences for token in s])
    positions = torch.cat([torch.arange(n) for n in lengths])
    return tokens, positions, Segments.of(lengths, lengths), torch.cat(predict)


def autograd_loss(logps, batch: data.Batch, n_pairs: int):
    """ORPO from the log-probability of each response token (P,)."""
    nll = -(batch.nll_weight * logps).sum()
    sums = logps.new_zeros(2 * n_pairs).index_add(0, batch.response, logps)
    means = sums / batch.response_lengths
    return nll + LAM * odds_ratio_loss(means[0::2], means[1::2]).mean()


def compute(idea: str, model: Transformer, pairs: list[data.Pair]):
    (batch,) = data.micro_batches(pairs, 10**9, "response")
    if idea == "e":
        return train.forward(model, batch, LAM).loss
    if idea in "ab":
        tokens, positions, segments, predict = layout(pairs, padded=idea == "a")
    else:
        tokens, positions, predict = batch.tokens, batch.positions, batch.predict
        segments = batch.segments
    hidden = model.hidden_states(tokens, positions, segments)
    if idea == "d":
        hidden, predict = hidden.index_select(0, predict), torch.arange(len(predict))
    logps = model.logits(hidden).float().log_softmax(-1)  # two very big tensors
    return autograd_loss(logps[predict, batch.targets], batch, len(pairs))


def needed_flops(idea: str, model: Transformer, pairs: list[data.Pair]) -> int:
    """Of a step computed this way: tokens in the blocks, queries by keys, rows under lm_head."""
    lengths = [pair.lengths for pair in pairs]
    rows = sum(c + r for _, c, r in lengths)
    if idea in "ab":
        apart = [p + n for p, *both in lengths for n in both]
        if idea == "a":
            apart = [max(apart)] * len(apart)
        lengths = [(n, 0, 0) for n in apart]
    if idea in "abc":
        rows = sum(sum(x) for x in lengths)
    return model.training_flops(lengths, rows)


def measure(idea: str, model: Transformer, pairs: list[data.Pair]):
    """(seconds, peak GB above what was held before, loss, norm of the gradient)"""
    model.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, begin = step.memory_gb("VmRSS"), time.perf_counter()
    loss = compute(idea, model, pairs)
    loss.backward()
    seconds = time.perf_counter() - begin
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return seconds, step.memory_gb() - held, loss.item(), norm.item()


def memory_pass(model: Transformer, pairs: list[data.Pair], dtype: str) -> dict[str, float]:
    """Peak GB of each idea, and the check that all compute the same loss and gradient."""
    found = {}
    for idea in NAMES:
        ctypes.CDLL(None).malloc_trim(0)  # what the last idea freed would count as held already
        found[idea] = measure(idea, model, pairs)
    for what in (2, 3):
        peers.check(list(NAMES), [row[what] for row in found.values()], peers.TOLERANCE[dtype])
    return {idea: row[1] for idea, row in found.items()}


def one_table(model: Transformer, ratio: str, pairs, memory: dict, rounds: int) -> str:
    found = {idea: [] for idea in NAMES}
    for _ in range(1 + rounds):
        for idea in NAMES:
            found[idea].append(measure(idea, model, pairs))
    flops = {idea: needed_flops(idea, model, pairs) for idea in NAMES}
    times = {idea: [row[0] for row in found[idea][1:]] for idea in NAMES}
    rows = []
    for idea, name in NAMES.items():
        ratios = [a / x for a, x in zip(times["a"], times[idea], strict=True)]
        rows.append(
            [
                f"{idea}  {name}",
                f"{1000 * statistics.median(times[idea]):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{flops['a'] / flops[idea]:.2f}",
                f"{flops[idea] / 1e9:.0f}",
                f"{memory[idea]:.2f}",
            ]
        )
    lengths = ", ".join(f"{p} + {c} | {r}" for p, c, r in (pair.lengths for pair in pairs))
    heads = ["", "ms", "speed-up", "its bound", "GFLOP", "peak GB above the model"]
    return f"prompt to response {ratio} ({lengths} tokens)\n\n{table([heads, *rows])}"


def ratio(text: str) -> str:
    left, _, right = text.partition(":")
    positive(left), positive(right)
    return text


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=ratio, nargs="+", default=["1:4", "1:1", "4:1", "16:1"])
    parser.add_argument("--dtype", choices=peers.TOLERANCE, default="float32")
    parser.add_argument("--rounds", type=positive, default=3, help="after one to warm up")
    parser.add_argument("--pairs", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=peers.results_file("ideas"))
    parser.add_argument("--append", action="store_true", help="to it, without a head")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Transformer(step.SHAPE)
    model.compute_dtype = getattr(torch, args.dtype)
    text = "" if args.append else head(args.threads)
    text += f"\n### Each idea alone: forward and backward, {args.pairs} pairs, {args.dtype}\n"
    try:
        print(text)
        write(text, args.out, args.append)
        pairs = {mix: make_pairs(mix, args.pairs) for mix in args.ratios}
        memory = {mix: memory_pass(model, pairs[mix], args.dtype) for mix in args.ratios}
        keep_freed_memory()  # as in training; a peak would be hidden by what was kept
        for mix in args.ratios:
            text = one_table(model, mix, pairs[mix], memory[mix], args.rounds)
            print(text, flush=True)
            write("\n" + text, args.out, append=True)
    except (OSError, RuntimeError) as error:
        print(f"ideas.py: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
