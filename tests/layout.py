"""Segments for tests that lay tokens out by hand."""

import numpy as np
import torch

from attention import Segments
from data import Batch, Pair, micro_batches


def segments_of(batch: Batch) -> Segments:
    return Segments.of(batch.q_lens, batch.k_lens, batch.key_index)


def packed(lengths, device="cpu") -> Segments:
    """Of runs [prompt | chosen | rejected] with these (p, c, r) lengths, end to end."""
    if not lengths:
        return Segments.of([], [], torch.empty(0, dtype=torch.int64, device=device), device)
    pairs = [Pair(*(np.zeros(n, int) for n in row)) for row in lengths]
    (batch,) = micro_batches(pairs, 10**9, "full")
    return Segments.of(batch.q_lens, batch.k_lens, batch.key_index.to(device), device)


def plain(n: int, q_len: int, k_len: int, device="cpu") -> Segments:
    """n sequences, each with its last q_len tokens as queries over all its k_len keys."""
    return Segments.of([q_len] * n, [k_len] * n, device=device)


def tokens(pair: Pair) -> list[list[int]]:
    """Prompt, chosen and rejected as lists, which compare as a whole."""
    return [list(map(int, ids)) for ids in pair[:3]]
