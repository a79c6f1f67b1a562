"""Attention over packed segments: which queries see which keys, and the one function that asks.

    one pair            [ prompt p0..p9 | chosen c0..c5 | rejected r0..r3 ]      16 + 4 tokens
    segment 1           queries prompt + chosen    over keys prompt + chosen     16 over 16
    segment 2           queries rejected           over keys prompt + rejected    4 over 14

Both segments are causal and aligned at their ends: r0 sees the prompt and itself. The keys of the
prompt are gathered a second time for segment 2, and not computed again. A decoding step is a
segment with one query, and an ordinary sequence one with as many queries as keys.

On CUDA in bfloat16 (or float16) this is one call of Flash `varlen_attn` a layer, if the size of a
head is a multiple of 8 up to 256. The second half of this file is for everything else. It gives
what a loop over segments would, in fewer calls.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def to_device(x: Tensor, device) -> Tensor:
    """Copies to a GPU without making the host wait: from pinned memory, in the stream's order."""
    if device is None or torch.device(device).type != "cuda":
        return x
    return x.pin_memory().to(device, non_blocking=True)


class Segments(NamedTuple):
    """Which queries attend to which keys, causally and aligned at the end (bottom-right).

    Segment s has the queries cu_q[s]:cu_q[s+1] of the N tokens in a row, and the keys
    cu_k[s]:cu_k[s+1] of the M keys that key_index gathers from the N tokens. A prompt that has two
    responses is gathered twice, once for each: so we keep where the first copy of each token's key
    is, and where the last one is, for the backward pass of that gathering.
    """

    lengths: tuple[tuple[int, int], ...]  # queries and keys of each segment, on the host
    max_q: int  # the longest of each, for varlen_attn
    max_k: int
    cu_q: Tensor  # (S+1,) int32
    cu_k: Tensor  # (S+1,) int32
    key_index: Tensor | None = None  # (M,) int64; None: the keys as they are
    first_copy: Tensor | None = None  # (N,) int64: where among the M keys that of a token is ...
    last_copy: Tensor | None = None  # (N,) int64: ... and where it is again, or the same

    @classmethod
    def of(cls, q_lens, k_lens, key_index: Tensor | None = None, device=None) -> "Segments":
        """From the lengths of queries and keys; key_index (M,) is on `device` already."""
        lengths = tuple(zip(q_lens, k_lens, strict=True))
        starts = (np.cumsum([0, *lens], dtype=np.int32) for lens in (q_lens, k_lens))
        cu_q, cu_k = (to_device(torch.from_numpy(x), device) for x in starts)
        segments = cls(lengths, max(q_lens, default=0), max(k_lens, default=0), cu_q, cu_k)
        if key_index is None:
            return segments
        n, copies = sum(q_lens), torch.arange(len(key_index), device=key_index.device)
        first = copies.new_full((n,), len(copies)).scatter_reduce(0, key_index, copies, "amin")
        last = copies.new_zeros(n).scatter_reduce(0, key_index, copies, "amax")
        return segments._replace(key_index=key_index, first_copy=first, last_copy=last)

    def to(self, device) -> "Segments":
        return Segments(*(to_device(x, device) if torch.is_tensor(x) else x for x in self))


class Gather(torch.autograd.Function):
    """x[index] (N, heads, d) -> (M, heads, d), of which each row of x has one or two copies.

    The backward pass of index_select adds with atomics, one number at a time. This one gathers a
    row's gradient from its copies. last_copy None: each row has one, and the others are padding.
    """

    @staticmethod
    def forward(ctx, x, index, first_copy, last_copy):
        ctx.save_for_backward(first_copy, last_copy)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        first_copy, last_copy = ctx.saved_tensors
        first = grad.index_select(0, first_copy)
        if last_copy is None:
            return first, None, None, None
        twice, last = (first_copy != last_copy)[:, None, None], grad.index_select(0, last_copy)
        return torch.where(twice, first + last, first), None, None, None


# torch 2.12 wants to be told that several query heads share a key head; 2.11 has no such argument.
SHARED_HEADS = {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}
USE_VARLEN = True  # tests set it to False, to compare the two paths on one device


def has_varlen(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether varlen_attn, a Flash kernel, takes such heads: see the head of this file."""
    on_gpu = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return USE_VARLEN and on_gpu and head_dim % 8 == 0 and head_dim <= 256


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window=None) -> Tensor:
    """Causal attention within each segment. q (N, H, d), k and v (N, K, d) -> (N, H, d).

    window: a query sees that many keys, its own the last of them; None: all up to its own.
    """
    if window is not None and window >= segments.max_k:
        window = None
    if has_varlen(q.device.type, q.dtype, q.shape[-1]):
        lengths = segments.cu_q, segments.cu_k, segments.max_q, segments.max_k
        back = -1 if window is None else window - 1
        if segments.key_index is not None:
            copies = segments.key_index, segments.first_copy, segments.last_copy
            k, v = Gather.apply(k, *copies), Gather.apply(v, *copies)  # (M, K, d)
        return varlen_attn(q, k, v, *lengths, window_size=(back, 0), **SHARED_HEADS)
    return attention_without_varlen(q, k, v, segments, window)


class KVCache:
    """Keys and values of sequences of any lengths, which grow while generating.

    Packed like everything else: each sequence has a run of rows, as many as the tokens that it may
    come to have, so nothing moves while it grows. Segments.key_index says which rows are whose.
    """

    def __init__(self, config, sizes, device, dtype):
        shape = (config.n_layers, 2, sum(sizes), config.n_kv_heads, config.head_dim)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.first_row = np.cumsum([0, *sizes])[:-1]  # of each sequence
        self.lengths = np.zeros_like(self.first_row)  # its tokens so far

    def grow(self, sequences, n_new) -> tuple[Tensor, Segments]:
        """n_new[i] tokens come to sequences[i]: their positions (N,), and what they see."""
        old, first, device = self.lengths[sequences], self.first_row[sequences], self.kv.device
        k_lens = self.lengths[sequences] = old + n_new
        runs = (first + old, n_new), (old, n_new), (first, k_lens)
        self.rows, positions, key_index = (to_device(_ranges(*run), device) for run in runs)
        segments = Segments.of(list(n_new), list(k_lens), device=device)
        return positions, segments._replace(key_index=key_index)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Stores the new tokens' k, v (N, K, d); returns all keys and values, (2, rows, K, d)."""
        return self.kv[layer].index_copy_(1, self.rows, torch.stack((k, v)))


def _ranges(starts, lengths) -> Tensor:
    """start, start + 1, ... of each run, end to end: int64."""
    runs = zip(starts, lengths, strict=True)
    return torch.from_numpy(np.concatenate([np.arange(start, start + n) for start, n in runs]))


@torch.compiler.disable  # its lengths are new in every micro-batch; around it a block compiles once
def attention_without_varlen(q: Tensor, k: Tensor, v: Tensor, segments, window) -> Tensor:
    """`attention`, with neighbouring segments padded so that they share a call of the kernel.

    A call costs about as much as 2^16 scores, so neighbouring segments share one, padded to the
    longest of them, while the padding costs no more than that.
    """
    if not segments.lengths:
        return q
    # On a CPU in bfloat16 attention written out takes half the time of the built-in function, and
    # as each new shape costs it a new kernel, lengths are padded to multiples of 32.
    write_out = q.dtype == torch.bfloat16 and not q.is_cuda
    write_out = write_out and segments.max_k <= 2048  # it keeps all scores
    padded = _pad_segments(segments.lengths, window, q.device, q.dtype, write_out)
    q = Gather.apply(q, padded.q_index, padded.q_rows, None)
    copies = padded.k_index, padded.k_rows, None
    if segments.key_index is not None:  # keys are gathered once, by both indices
        first, last = segments.first_copy, segments.last_copy
        rows = [None if x is None else padded.k_rows[x] for x in (first, last)]
        copies = segments.key_index[padded.k_index], *rows
    k, v = Gather.apply(k, *copies), Gather.apply(v, *copies)
    q_parts = q.split([n * n_q for n, n_q, _ in padded.shapes])
    k_parts, v_parts = (x.split([n * n_k for n, _, n_k in padded.shapes]) for x in (k, v))
    outs = []
    for (n, _, _), bias, *parts in zip(
        padded.shapes, padded.biases, q_parts, k_parts, v_parts, strict=True
    ):
        qs, ks, vs = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in parts)  # (n, heads, len, d)
        if write_out:
            out = _attention_written_out(qs, ks, vs, bias)
        else:
            causal = bias is None
            if qs.is_cuda:  # the fast kernel for float32 needs a head of keys for each query head
                n_groups = qs.shape[1] // ks.shape[1]
                ks, vs = (x.repeat_interleave(n_groups, 1) for x in (ks, vs))
            out = F.scaled_dot_product_attention(
                qs, ks, vs, attn_mask=bias, is_causal=causal, enable_gqa=True
            )
        outs.append(out.transpose(1, 2).flatten(0, 1))  # (n * n_q, H, d)
    return torch.cat(outs).index_select(0, padded.q_rows)


def _attention_written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q (n, H, n_q, d), k and v (n, K, n_k, d), bias (n, 1, n_q, n_k) -> (n, H, n_q, d)."""
    n, n_heads, n_q, d = q.shape
    # The query heads that share a key head, one below another: (n * K, H/K * n_q, d).
    q, k, v = (x.reshape(n * k.shape[1], -1, d) for x in (q, k, v))
    bias = bias.expand(n, n_heads, n_q, -1).reshape(len(q), q.shape[1], -1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5)
    return (scores.softmax(-1) @ v).view(n, n_heads, n_q, d)


class PaddedSegments(NamedTuple):
    """Segments in rectangles of n segments with n_q queries and n_k keys each."""

    shapes: list[tuple[int, int, int]]  # (n, n_q, n_k) of each rectangle
    # (n, 1, n_q, n_k): 0 where a query sees a key, else -inf. None for an ordinary triangle, for
    # which is_causal has a faster kernel.
    biases: list[Tensor | None]
    q_index: Tensor  # which row of q fills each row of the rectangles; padding repeats a row
    k_index: Tensor  # of k likewise
    q_rows: Tensor  # (N,), at which row of the rectangles each row of q is now
    k_rows: Tensor  # of k likewise


@functools.lru_cache(maxsize=8)  # every layer asks for the same
def _pad_segments(lengths, window, device, dtype, write_out: bool) -> PaddedSegments:
    groups, multiple = _neighbours(lengths), 32 if write_out else 1
    shapes, biases, q_parts, k_parts = [], [], [], []
    for group in groups:
        q_lens, k_lens = (np.array(lens) for lens in zip(*group, strict=True))
        n_q, n_k = (-(-int(lens.max()) // multiple) * multiple for lens in (q_lens, k_lens))
        shapes.append((len(group), n_q, n_k))
        q_parts.append((q_lens, n_q))
        k_parts.append((k_lens, n_k))
        triangle = len(set(group)) == 1 and group[0][0] == group[0][1] and window is None
        if triangle and not write_out:
            biases.append(None)
        else:
            bias = _bias(q_lens, k_lens, n_q, n_k, window, dtype)
            biases.append(to_device(bias, device))
    arrays = (*_padded_rows(q_parts), *_padded_rows(k_parts))
    q_index, q_rows, k_index, k_rows = (to_device(torch.from_numpy(x), device) for x in arrays)
    return PaddedSegments(shapes, biases, q_index, k_index, q_rows, k_rows)


def _neighbours(lengths) -> list[list[tuple[int, int]]]:
    """Segments that share a rectangle, while padding costs less than a call of the kernel."""
    groups, n_q, n_k, scores = [], 0, 0, 0
    for q_len, k_len in lengths:
        n_q, n_k, scores = max(n_q, q_len), max(n_k, k_len), scores + q_len * k_len
        if groups and (len(groups[-1]) + 1) * n_q * n_k - scores <= 2**16:
            groups[-1].append((q_len, k_len))
        else:
            groups.append([(q_len, k_len)])
            n_q, n_k, scores = q_len, k_len, q_len * k_len
    return groups


def _padded_rows(parts) -> tuple[np.ndarray, np.ndarray]:
    """parts: for each rectangle, the lengths of its runs and the length that they are padded to.

    Returns which source row fills each row of the rectangles, and where each source row now is.
    """
    index, rows, start, n_filled = [], [], 0, 0
    for lens, size in parts:
        place, ends = np.arange(size), start + np.cumsum(lens)
        first = (ends - lens)[:, None]
        index.append((first + np.minimum(place, lens[:, None] - 1)).ravel())
        rows.append(n_filled + np.flatnonzero(place < lens[:, None]))
        start, n_filled = int(ends[-1]), n_filled + len(lens) * size
    return np.concatenate(index), np.concatenate(rows)


def _bias(q_lens, k_lens, n_q: int, n_k: int, window, dtype) -> Tensor:
    """(n, 1, n_q, n_k) of segments that are aligned at their ends."""
    # We let a row of padding see what the last query sees: a row that sees nothing would be NaN,
    # and so would its gradient.
    q_lens, k_lens = q_lens[:, None], k_lens[:, None]
    own_key = np.minimum(k_lens - q_lens + np.arange(n_q), k_lens - 1)  # (n, n_q)
    back = own_key[:, :, None] - np.arange(n_k)  # (n, n_q, n_k), how far back a key lies
    unseen = torch.from_numpy((back < 0) | (back >= (window or np.inf)))
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)[:, None]
