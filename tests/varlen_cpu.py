"""A CPU kernel for PyTorch's Flash attention over packed segments: slow, and plain to read.

`varlen_attn` has none, so the branch of `attention` that a GPU takes could not be held to numbers
elsewhere. Importing this file gives it one, for any dtype.
"""

import torch

aten = torch.library.Library("aten", "IMPL")  # the kernels stay as long as this object does
calls = {"forward": 0, "backward": 0}


def weights_of(q, k, window):
    """Of one segment, causal and aligned at the end: (H, n, m)."""
    n, m = len(q), len(k)
    before = torch.arange(n)[:, None] + m - n - torch.arange(m)  # how far a key lies before a query
    seen = (before >= 0) & ((before <= window) | (window < 0))
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[2] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def shared(x, n_heads):
    """(m, K, d) in float64, each key head as often as query heads share it: (m, H, d)."""
    return x.double().repeat_interleave(n_heads // x.shape[1], 1)


def spans(starts):
    return [*zip(starts.tolist(), starts.tolist()[1:], strict=False)]


def check(q, k, cu_q, cu_k, max_q, max_k, right):
    """What the real kernel relies on without asking."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and q.stride(-1) == k.stride(-1) == 1
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max()) and right == 0


def forward(q, k, v, cu_q, cu_k, max_q, max_k, *_, window_size_left, window_size_right, **__):
    calls["forward"] += 1
    check(q, k, cu_q, cu_k, max_q, max_k, window_size_right)
    out = torch.empty_like(q)
    for (a, b), (c, d) in zip(spans(cu_q), spans(cu_k), strict=True):
        keys, values = (shared(x[c:d], q.shape[1]) for x in (k, v))
        weights = weights_of(q[a:b].double(), keys, window_size_left)
        out[a:b] = torch.einsum("hnm,mhd->nhd", weights, values)
    seed = torch.zeros(2, dtype=torch.uint64)  # of dropout, which there is none of
    return out, q.new_zeros(q.shape[1], len(q)).float(), seed, torch.zeros(()), torch.zeros(())


def backward(grad, q, k, v, out, logsumexp, cu_q, cu_k, max_q, max_k, *_, **windows):
    calls["backward"] += 1
    check(q, k, cu_q, cu_k, max_q, max_k, windows["window_size_right"])
    n_heads, scale = q.shape[1], q.shape[2] ** -0.5
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    for (a, b), (c, d) in zip(spans(cu_q), spans(cu_k), strict=True):
        queries, g = q[a:b].double(), grad[a:b].double()
        keys, values = (shared(x[c:d], n_heads) for x in (k, v))
        weights = weights_of(queries, keys, windows["window_size_left"])
        d_weights = torch.einsum("nhd,mhd->hnm", g, values)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
        grads[0][a:b] = torch.einsum("hnm,mhd->nhd", d_scores, keys)
        d_keys = torch.einsum("hnm,nhd->mhd", d_scores, queries)
        d_values = torch.einsum("hnm,nhd->mhd", weights, g)
        for total, part in zip(grads[1:], (d_keys, d_values), strict=True):
            total[c:d] += part.unflatten(1, (k.shape[1], -1)).sum(2)
    return tuple(x.to(q.dtype) for x in grads)


aten.impl("_flash_attention_forward", forward, "CPU")
aten.impl("_flash_attention_backward", backward, "CPU")
