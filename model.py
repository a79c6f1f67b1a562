"""A GPT-style transformer over packed sequences, which reads and writes Hugging Face checkpoints.

Notable features:
- one architecture; a family (Llama, Mistral, Qwen2, Qwen3, Phi, GPT-2, OPT) is a row of FAMILIES:
  values of ModelConfig and names of parameters, never a subclass
- a packed micro-batch has no batch axis and no padding: N tokens in a row, and `Segments` says
  which queries see which keys. A shared prompt is computed once (the picture is in data.py)
- one attention function: Flash `varlen_attn` on CUDA, scaled_dot_product_attention elsewhere;
  a decoding step is the same call with one query, and so is a rejected branch over its prompt
- safetensors by hand, memory-mapped, every name, shape and offset checked

dtypes: parameters stay as loaded (float32 where they are trained). `compute_dtype` is that of the
residual stream and the matrix products, to which each weight is cast where it is used. Norms are
computed in float32 (float64 for float64), rotary angles in float32. There is no dropout.

Letters: B sequences, T positions, N packed tokens, M gathered keys, S segments, D model width,
H heads, K key/value heads, d head size, V vocabulary.
"""

import contextlib
import functools
import inspect
import json
import math
import mmap
import os
import re
import sys
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelConfig:
    vocab_size: int  # V
    dim: int  # D, width of the residual stream
    n_layers: int
    n_heads: int  # H
    hidden_dim: int  # width inside the MLP
    n_kv_heads: int = 0  # K, divides H: each serves H/K query heads; 0 means H
    head_dim: int = 0  # d; 0 means dim / n_heads
    norm_eps: float = 1e-6
    max_seq_len: int = 2048  # the context the model was made for
    tie_embeddings: bool = False  # lm_head is the embedding matrix
    dtype: str = "float32"  # how the checkpoint stores its weights
    rope_theta: float = 10000.0
    # What makes a family; the defaults are Llama's.
    family: str = "llama"
    layer_norm: bool = False  # LayerNorm with bias instead of RMSNorm
    qk_norm: bool = False  # RMSNorm of each head's queries and keys
    qkv_bias: bool = False
    bias: bool = False  # of every other projection in a block
    lm_head_bias: bool = False
    gated: bool = True  # MLP: down(act(gate) * up), not down(act(up))
    activation: str = "silu"  # Hugging Face's name
    parallel: bool = False  # attention and MLP side by side, behind one norm
    rotary_fraction: float = 1.0  # of each head's dimensions
    rope_scaling: dict = field(default_factory=dict)  # {"rope_type": "linear" or "llama3", ...}
    position_offset: int | None = None  # learned positions, with so many rows before position 0
    windows: list = field(default_factory=list)  # a layer sees so many tokens back; None: all
    source: dict = field(default_factory=dict, repr=False)  # config.json as it was read

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.windows = self.windows or [None] * self.n_layers
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads do not share {self.n_kv_heads} key/value heads")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary turns pairs of {self.head_dim}, not {self.rotary_dim}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_fraction)

    @classmethod
    def from_json(cls, path) -> "ModelConfig":
        """Reads a Hugging Face config.json, old keys or new. Raises ValueError with the path."""
        source = read_json(Path(path))
        try:
            return cls._from_keys(source)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error!s:.300}") from None

    @classmethod
    def _from_keys(cls, source: dict) -> "ModelConfig":
        family = FAMILIES.get(str(source.get("model_type")))
        if family is None:
            found, known = source.get("model_type"), ", ".join(FAMILIES)
            raise ValueError(f"model_type {found!r:.80} is not supported, only {known}")
        if quantised := source.get("quantization_config"):
            raise ValueError(f"quantised weights are not supported: {quantised!r:.80}")
        keys = LLAMA_KEYS | family.keys
        # transformers 5 renamed some keys; the old ones win, as most checkpoints have them
        rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling {rope!r:.80} is not an object")
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        c = {"torch_dtype": source.get("dtype"), "rope_type": rope_type, **rope}
        c |= {key: value for key, value in source.items() if value is not None}
        for key, supported in family.only.items():
            if key in c and c[key] not in supported:
                raise ValueError(f"{key} {c[key]!r} is not supported, only {supported}")
        activation = c.get(keys["activation"], family.fields.get("activation", "silu"))
        if str(activation) not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation {activation!r} is not supported, only {known}")
        if c.get("word_embed_proj_dim", c.get("hidden_size")) != c.get("hidden_size"):
            raise ValueError("OPT-350M projects its embeddings and is not supported")
        ours = {name: c[key] for name, key in keys.items() if c.get(key) is not None}
        if source["model_type"] == "gpt2" and "n_embd" in c:
            ours.setdefault("hidden_dim", 4 * c["n_embd"])
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"):
            if name not in ours:
                raise ValueError(f"key {keys[name]!r} is missing")
        for f in fields(cls):
            most = 1000 if f.name == "n_layers" else 2**63 if f.type is float else 2**31
            if f.name in ours and not _fits(ours[f.name], f.type, most):
                raise ValueError(f"{keys[f.name]} cannot be {ours[f.name]!r:.80}")
        for key in ROPE_NUMBERS.get(str(rope_type), ()):
            if not _fits(rope.get(key), float):
                raise ValueError(f"rope_scaling of type {rope_type} needs a number {key!r} above 0")
        ours["windows"] = _windows(c, ours["n_layers"]) if family.windows else []
        ours["rope_scaling"] = rope | {"rope_type": rope_type} if rope_type != "default" else {}
        return cls(**family.fields | ours, family=source["model_type"], source=source)

    def to_json(self) -> dict:
        """The config.json to save: what was read, and what we know under the family's keys."""
        family = FAMILIES[self.family]
        known = {key: getattr(self, name) for name, key in (LLAMA_KEYS | family.keys).items()}
        if self.position_offset is not None and self.source:
            # Less those that mean nothing where nothing is rotated.
            known = {key: known[key] for key in known if key in self.source or key == "torch_dtype"}
        kept = {key: value for key, value in self.source.items() if key != "dtype"}
        return kept | known | {"architectures": [family.architecture], "model_type": self.family}


def _fits(value, kind, most=2**31) -> bool:
    """Is of this type; a number is between 0 and most, which NaN is not."""
    if kind not in (int, float):
        return isinstance(value, kind)
    right = isinstance(value, (int, float) if kind is float else int)
    return right and not isinstance(value, bool) and 0 < value < most


def _windows(c: dict, n_layers: int) -> list:
    """How far back each layer sees: Mistral everywhere, Qwen only in the layers switched on."""
    size = c.get("sliding_window")
    if not size or (c["model_type"] != "mistral" and not c.get("use_sliding_window")):
        return []
    if not _fits(size, int):
        raise ValueError(f"sliding_window cannot be {size!r:.80}")
    first = c.get("max_window_layers", 28) if c["model_type"] != "mistral" else 0
    types = ["sliding_attention" if i >= first else "full" for i in range(n_layers)]
    types = c.get("layer_types", types)
    if not isinstance(types, list) or len(types) != n_layers:
        raise ValueError(f"layer_types must list {n_layers} layers, not {types!r:.80}")
    return [size if t == "sliding_attention" else None for t in types]


class Family(NamedTuple):
    """What a Hugging Face architecture calls things, and which values make it what it is."""

    architecture: str
    keys: dict = {}  # ours: the key in config.json, where it is not Llama's  # noqa: RUF012
    fields: dict = {}  # values of ModelConfig that config.json need not say  # noqa: RUF012
    only: dict = {}  # keys of config.json whose other values are not built here  # noqa: RUF012
    names: dict = {}  # our parameters, without layer and leaf: the checkpoint's  # noqa: RUF012
    prefix: str = "model."  # of every name but lm_head's
    conv1d: bool = False  # a block's matrices are stored (in, out)
    windows: bool = False  # may have a sliding window


# fmt: off
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings", "activation": "hidden_act", "dtype": "torch_dtype",
}
ROPE_NUMBERS = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE = {"rope_type": tuple(ROPE_NUMBERS)}
GPT = {"layer_norm": True, "qkv_bias": True, "bias": True, "gated": False, "norm_eps": 1e-5}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", only={"attention_bias": (False,), "mlp_bias": (False,)} | ROPE,
    ),
    "mistral": Family("MistralForCausalLM", only=ROPE, windows=True),
    "qwen2": Family("Qwen2ForCausalLM", fields={"qkv_bias": True}, only=ROPE, windows=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", fields={"qk_norm": True, "head_dim": 128},
        only={"attention_bias": (False,)} | ROPE, windows=True,
    ),
    "phi": Family(
        "PhiForCausalLM",
        keys={"norm_eps": "layer_norm_eps", "rotary_fraction": "partial_rotary_factor"},
        fields=GPT | {
            "lm_head_bias": True, "parallel": True, "rotary_fraction": 0.5,
            "activation": "gelu_new",
        },
        only={"qk_layernorm": (False,)} | ROPE,
        names={
            "self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2", "norm": "final_layernorm",
        },
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        keys={
            "dim": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "hidden_dim": "n_inner",
            "max_seq_len": "n_positions", "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        fields=GPT | {
            "tie_embeddings": True, "rotary_fraction": 0, "position_offset": 0,
            "activation": "gelu_new", "max_seq_len": 1024,
        },
        only={
            "scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
        },
        names={
            "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "norm": "ln_f",
            "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
            "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn",
            "self_attn.v_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
        },
        prefix="transformer.", conv1d=True,
    ),
    "opt": Family(
        "OPTForCausalLM",
        keys={"hidden_dim": "ffn_dim", "activation": "activation_function"},
        fields=GPT | {
            "tie_embeddings": True, "rotary_fraction": 0, "position_offset": 2,
            "activation": "relu",
        },
        only={
            "do_layer_norm_before": (True,), "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,), "_remove_final_layer_norm": (False,),
        },
        names={
            "self_attn.o_proj": "self_attn.out_proj", "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm", "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2", "norm": "final_layer_norm",
        },
        prefix="model.decoder.",
    ),
}
# fmt: on


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}
ACTIVATIONS |= {"gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh}


# ---------------------------------------------------------------------------------------------
# Parts, small to large.


class Linear(nn.Linear):
    """A projection whose weight is cast to the dtype of what comes in: see `compute_dtype`."""

    cast = None  # the weight already cast, within Transformer.cast_weights

    def forward(self, x):
        weight = self.weight if self.cast is None else self.cast
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)


class LoRALinear(Linear):
    """W x + (alpha / rank) B A x: W is frozen, A (rank, in) and B (out, rank) are trained.

    B is zero at the start, so that nothing changes yet (Hu et al., arXiv 2106.09685).
    """

    def __init__(self, base: Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        bound = base.in_features**-0.5
        a = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):
        thin = F.linear(x, self.lora_A.to(x.dtype))  # (N, rank)
        return super().forward(x) + self.scale * F.linear(thin, self.lora_B.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with its bias."""

    def __init__(self, dim: int, eps: float, layer_norm: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if layer_norm else None
        self.eps = eps

    def forward(self, x):
        y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)  # x^2: the range
        if self.bias is not None:
            y = F.layer_norm(
                y, self.weight.shape, self.weight.to(y.dtype), self.bias.to(y.dtype), self.eps
            )
            return y.to(x.dtype)
        y = F.rms_norm(y, self.weight.shape, eps=self.eps)
        return y.to(x.dtype) * self.weight.to(x.dtype)


def rotary(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each (N, 1, rotary_dim/2) float32, of the angle position * theta^(-2i/d)."""
    i = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-i / max(1, config.rotary_dim))
    scaling = config.rope_scaling
    if scaling.get("rope_type") == "linear":
        frequency = frequency / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        # Waves that fit the old context often stay; those that do not are stretched; in between
        # the one fades into the other.
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling["factor"])
    angles = positions[:, None, None].float() * frequency
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns dimension i with i + rotary_dim/2 of x (N, H, d): Hugging Face's halves."""
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)  # float32, through cos and sin
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)


class Segments(NamedTuple):
    """Which queries attend to which keys, causally and aligned at the end (bottom-right).

    Segment s has queries cu_q[s]:cu_q[s+1] of the N tokens in a row, and keys
    cu_k[s]:cu_k[s+1] of the M keys that key_index gathers from them (None: the keys as they are).
    """

    q_lens: list[int]  # on the host, for the road that goes a segment at a time
    k_lens: list[int]
    cu_q: Tensor  # (S+1,) int32, on the device, for varlen_attn
    cu_k: Tensor  # (S+1,) int32
    key_index: Tensor | None  # (M,) int64

    @classmethod
    def plain(cls, n: int, q_len: int, k_len: int, device=None) -> "Segments":
        """n sequences, each with its last q_len tokens as queries over all its k_len keys."""
        cu = torch.arange(n + 1, dtype=torch.int32, device=device)
        return cls([q_len] * n, [k_len] * n, cu * q_len, cu * k_len, None)

    @classmethod
    def packed(cls, lengths: list[tuple[int, int, int]], device=None) -> "Segments":
        """Runs of [prompt | chosen | rejected] with these (p, c, r) lengths, end to end.

        Two segments a run: prompt + chosen over itself, and rejected over prompt + rejected.
        """
        q_lens, k_lens, key_index, start = [], [], [], 0
        for p, c, r in lengths:
            q_lens += [p + c, r]
            k_lens += [p + c, p + r]
            prompt, rejected, stop = start + p, start + p + c, start + p + c + r
            key_index += [(start, rejected), (start, prompt), (rejected, stop)]
            start = stop
        index = np.concatenate([np.arange(*span) for span in key_index] or [np.empty(0, int)])
        cu_q, cu_k = (np.cumsum([0, *lens], dtype=np.int32) for lens in (q_lens, k_lens))
        on_device = (to_device(torch.from_numpy(x), device) for x in (cu_q, cu_k, index))
        return cls(q_lens, k_lens, *on_device)


def to_device(x: Tensor, device) -> Tensor:
    """Copies to a GPU without making the host wait: from pinned memory, in the stream's order."""
    if device is None or torch.device(device).type != "cuda":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def whole(x: Tensor) -> Tensor:
    """A tensor of which each process has a part, put together by all of them; another as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# Newer releases of torch want to be told of grouped-query attention, older ones know no such word.
_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
USE_VARLEN = True  # tests set it to False to compare the two roads on one device


@torch.compiler.disable  # its lengths are new in every micro-batch; around it a block compiles once
def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window=None) -> Tensor:
    """Causal attention within each segment. q (N, H, d), k and v (N, K, d) -> (N, H, d).

    window: a query sees that many keys, its own the last of them; None: all up to its own.
    """
    if window is not None and window >= max(segments.k_lens, default=0):
        window = None
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    if USE_VARLEN and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        max_q, max_k = max(segments.q_lens), max(segments.k_lens)
        cu_q, cu_k = segments.cu_q, segments.cu_k
        back = -1 if window is None else window - 1
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(back, 0), **_GQA)
    return _attention_by_segment(q, k, v, segments, window)


def _attention_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window) -> Tensor:
    """The same where there is no Flash kernel: a few calls, each for some neighbouring segments."""
    # On a CPU in bfloat16 the parts, written out, take half the time of the whole; and as every new
    # shape costs a new kernel there, lengths are filled up.
    in_parts = q.dtype == torch.bfloat16 and 1 < max(segments.k_lens, default=0) <= 2048
    lens = tuple(zip(segments.q_lens, segments.k_lens, strict=True))
    tiles = _tiles(lens, window, q.device, q.dtype, 64 if in_parts else 1)
    # split and not slices: the backward pass of a slice writes a whole tensor of zeros
    q_tiles = q.split([t.n * t.q_len for t in tiles])
    k_tiles, v_tiles = (x.split([t.n * t.k_len for t in tiles]) for x in (k, v))
    outs = []
    for t, *qkv in zip(tiles, q_tiles, k_tiles, v_tiles, strict=True):
        qs, ks, vs = (x.unflatten(0, (t.n, -1)).transpose(1, 2) for x in qkv)  # (n, heads, len, d)
        if in_parts:
            out = _attention_in_parts(qs, ks, vs, t.bias)[:, :, : t.q_len]
        else:
            bias = None if t.causal else t.bias
            out = F.scaled_dot_product_attention(
                qs, ks, vs, attn_mask=bias, is_causal=t.causal, enable_gqa=True
            )
        outs.append(out.transpose(1, 2).flatten(0, 1))  # (n * q_len, H, d)
    return torch.cat(outs) if outs else q


def _attention_in_parts(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Product, softmax, product. q (n, H, q_len, d), k and v (n, K, k_len, d), as long as the bias
    (rows, keys) or shorter -> (n, H, rows, d)."""
    (n, n_heads, _, d), (rows, keys) = q.shape, bias.shape
    q, k, v = (
        F.pad(x, (0, 0, 0, length - x.shape[2])).reshape(n * k.shape[1], -1, d)  # a head of k each
        for x, length in ((q, rows), (k, keys), (v, keys))
    )
    bias = bias.repeat(q.shape[1] // rows, 1)  # the query heads of a key head, one below another
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5)
    return (scores.softmax(-1) @ v).view(n, n_heads, rows, d)


class Tile(NamedTuple):
    """What one attention call takes on: n sequences of equal lengths, or some segments, joined."""

    n: int
    q_len: int
    k_len: int
    bias: Tensor  # (q_len, k_len) or filled up: 0 where a query sees a key, -inf where not
    causal: bool  # the bias is the plain triangle, which has faster kernels


@functools.lru_cache(maxsize=8)  # asked for in every layer
def _tiles(
    lens: tuple[tuple[int, int], ...], window, device, dtype, multiple: int, joined: int = 128
) -> list[Tile]:
    """Sequences of equal lengths together; of other segments, neighbours up to `joined` queries:
    a call costs more than the products of the segments with each other, which the bias drops."""
    if len(set(lens)) == 1:
        groups, n = [lens[:1]], len(lens)
    else:
        groups, n = [], 1
        for q_len, k_len in lens:
            if not groups or sum(q for q, _ in groups[-1]) + q_len > joined:
                groups.append([])
            groups[-1].append((q_len, k_len))
    tiles = []
    for group in groups:
        segment_q, segment_k = (np.repeat(range(len(group)), x) for x in zip(*group, strict=True))
        position_q = np.concatenate([np.arange(k - q, k) for q, k in group])  # aligned at the end
        position_k = np.concatenate([np.arange(k) for _, k in group])
        back = position_q[:, None] - position_k  # how far a key lies behind a query
        sees = (segment_q[:, None] == segment_k) & (back >= 0) & (back < (window or np.inf))
        causal = len(group) == 1 and group[0][0] == group[0][1] and window is None
        rows, keys = (-length % multiple for length in sees.shape)
        filled = np.pad(sees, ((0, rows), (0, keys)))
        filled[len(sees) :] = True  # a query that sees nothing would be NaN
        bias = torch.zeros(filled.shape, dtype=dtype).masked_fill_(
            torch.from_numpy(~filled), -torch.inf
        )
        tiles.append(Tile(n, *sees.shape, bias.to(device), causal))
    return tiles


class KVCache:
    """Keys and values of n sequences of one length, which grow together while generating."""

    def __init__(self, config: ModelConfig, n: int, max_len: int, device, dtype):
        shape = (config.n_layers, 2, n, max_len, config.n_kv_heads, config.head_dim)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens of each sequence that every layer has seen

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' k, v (n * T, K, d); returns all so far, (n * length, K, d)."""
        n = self.kv.shape[2]
        stop = self.length + k.shape[0] // n
        for i, x in enumerate((k, v)):
            self.kv[layer, i, :, self.length : stop] = x.unflatten(0, (n, -1))
        return self.kv[layer, 0, :, :stop].flatten(0, 1), self.kv[layer, 1, :, :stop].flatten(0, 1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.layer, self.window = config, layer, config.windows[layer]
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.dim, c.n_heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.dim, c.n_kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.dim, c.n_kv_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.dim, c.bias)
        self.q_norm = Norm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x, cos, sin, segments, cache=None):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos.shape[-1]:
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        x = attention(q, k, v, segments, self.window)
        return self.o_proj(x.flatten(1))  # (N, H, d) -> (N, D)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.activation = ACTIVATIONS[c.activation]
        self.gate_proj = Linear(c.dim, c.hidden_dim, c.bias) if c.gated else None
        self.up_proj = Linear(c.dim, c.hidden_dim, c.bias)
        self.down_proj = Linear(c.hidden_dim, c.dim, c.bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = functools.partial(Norm, config.dim, config.norm_eps, config.layer_norm)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = None if config.parallel else norm()
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, segments, cache=None):
        y = self.input_layernorm(x)
        if self.post_attention_layernorm is None:
            return x + self.self_attn(y, cos, sin, segments, cache) + self.mlp(y)
        x = x + self.self_attn(y, cos, sin, segments, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def _hand_on_gradient(weight: Tensor, cast: Tensor):
    if weight.grad is None:
        weight.grad = cast.grad.to(weight.dtype)
    else:
        weight.grad.add_(cast.grad)
    cast.grad = None


class Transformer(nn.Module):
    """The model. `Transformer(config)` has random weights; `from_pretrained` reads a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.compute_dtype = None  # None: that of the parameters
        self.activation_checkpointing = False  # keep a block's input alone, compute the rest twice
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.embed_positions = None
        if c.position_offset is not None:
            self.embed_positions = nn.Embedding(c.max_seq_len + c.position_offset, c.dim)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm = Norm(c.dim, c.norm_eps, c.layer_norm)
        self.lm_head = None if c.tie_embeddings else Linear(c.dim, c.vocab_size, c.lm_head_bias)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the residual stream starts smaller, as in GPT-2
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layers) if residual else 0.02)

    def add_lora(self, rank: int, alpha: float, seed: int = 0):
        """Freezes all, and gives each projection in the blocks a change of this rank to train."""
        if self.lora_layers():
            raise ValueError("the model has adapters already")
        generator = torch.Generator().manual_seed(seed)
        self.requires_grad_(False)
        for part in [part for block in self.layers for part in (block.self_attn, block.mlp)]:
            for name, module in [*part.named_children()]:
                if isinstance(module, Linear):
                    setattr(part, name, LoRALinear(module, rank, alpha, generator))

    def lora_layers(self) -> dict[str, LoRALinear]:
        return {name: m for name, m in self.named_modules() if isinstance(m, LoRALinear)}

    @torch.no_grad()
    def merge_lora(self, base: "Transformer") -> "Transformer":
        """Adds the changes to the weights of base, the model as it was stored: our own frozen ones
        may have been rounded. In float32, and rounded once, to base's dtype. Returns base."""
        for name, m in self.lora_layers().items():
            weight = base.get_submodule(name).weight
            change = m.scale * (m.lora_B @ m.lora_A)  # (out, in)
            weight.copy_(weight.float() + change.to(weight.device))
        return base

    @contextlib.contextmanager
    def cast_weights(self):
        """Within it the blocks' weights are cast to compute_dtype once, not in every micro-batch.

        A cast is a leaf, whose gradient is added to its weight's, in the weight's dtype, as soon as
        it is there: through the cast itself autograd would go last, holding all of them until then.
        """
        dtype = self.compute_dtype
        linears = [m for m in self.layers.modules() if isinstance(m, Linear)]
        linears = [m for m in linears if dtype not in (None, m.weight.dtype)]
        try:
            for linear in linears:
                linear.cast = linear.weight.detach().to(dtype)
                if linear.weight.requires_grad:
                    hand_on = functools.partial(_hand_on_gradient, linear.weight)
                    linear.cast.requires_grad_().register_post_accumulate_grad_hook(hand_on)
            yield
        finally:
            for linear in linears:
                linear.cast = None

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def lm_head_weight(self) -> Tensor:
        """The vocabulary projection (V, D)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(self, tokens, positions, segments: Segments, cache=None) -> Tensor:
        """tokens, positions (N,) int64, packed as segments say -> (N, D), after the last norm."""
        x = self.embed_tokens(tokens)  # (N, D)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + self.config.position_offset)
        x = x.to(self.compute_dtype or x.dtype)
        cos, sin = rotary(positions, self.config)
        for block in self.layers:
            if cache is not None:  # never the compiled block: the lengths change at every token
                x = block._call_impl(x, cos, sin, segments, cache)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                inputs = x, cos, sin, segments
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, segments)
        return self.norm(x)

    def projection(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(P, D) hidden states and the (V, D) matrix whose product is the logits.

        Where lm_head has a bias (Phi) both are made wider: by a one and the bias, and by zeros,
        as matrix products want multiples of 8.
        """
        weight = self.lm_head_weight
        if self.lm_head is None or self.lm_head.bias is None:
            return hidden, weight
        ones = F.pad(torch.ones_like(hidden[:, :1]), (0, 7))
        bias = F.pad(self.lm_head.bias[:, None], (0, 7))
        return torch.cat((hidden, ones), 1), torch.cat((weight, bias), 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V). Raises ValueError beyond the model's context."""
        n, length = tokens.shape
        self._check_length(length)
        positions = torch.arange(length, device=tokens.device).repeat(n)  # (B * T,)
        segments = Segments.plain(n, length, length, tokens.device)
        return self.logits(self.hidden_states(tokens.flatten(), positions, segments)).unflatten(
            0, (n, length)
        )

    def _check_length(self, length: int):
        if length > self.config.max_seq_len:
            raise ValueError(f"{length} tokens, but the context is {self.config.max_seq_len}")

    def training_flops(self, lengths: list[tuple[int, int, int]], n_predicted: int) -> int:
        """Operations that a training step on packed pairs of these (p, c, r) lengths needs.

        A product of (n, a) and (a, b) matrices is 2nab operations, and the backward pass twice the
        forward's. So 6 a weight a token in the blocks, 6VD a prediction for the vocabulary
        projection (4 where the weight is frozen and has no gradient), and 12Hd a layer for each key
        that a query sees. Elementwise work and what is computed twice
        (--activation-checkpointing) do not count: MFU is of the needed operations.
        """
        c = self.config
        weights = [p for p in self.layers.parameters() if p.dim() == 2]
        total = sum((4 + 2 * p.requires_grad) * p.numel() for p in weights) * sum(map(sum, lengths))
        frozen = not self.lm_head_weight.requires_grad
        total += (4 if frozen else 6) * n_predicted * c.vocab_size * c.dim
        runs = [(0, p + m) for p, m, _ in lengths] + [(p, p + r) for p, _, r in lengths]
        seen = np.concatenate([1 + np.arange(*run) for run in runs])  # by the query at a position
        for window in c.windows:
            total += 12 * c.n_heads * c.head_dim * int(np.minimum(seen, window or np.inf).sum())
        return total

    @torch.no_grad()
    def stream(
        self, tokens, max_new_tokens: int, temperature=0.0, top_k=None, top_p=None, generator=None
    ):
        """Yields the next token of each of B prompts of one length, (B,), max_new_tokens times."""
        n, length = tokens.shape
        self._check_length(length + max_new_tokens)
        device, dtype = tokens.device, self.compute_dtype or self.embed_tokens.weight.dtype
        cache = KVCache(self.config, n, length + max_new_tokens, device, dtype)
        new = tokens
        for _ in range(max_new_tokens):
            # The prompts first, then one token a sequence: the same call.
            start, stop = cache.length, cache.length + new.shape[1]
            positions = torch.arange(start, stop, device=device).repeat(n)
            segments = Segments.plain(n, stop - start, stop, device)
            hidden = self.hidden_states(new.flatten(), positions, segments, cache)
            cache.length = stop
            logits = self.logits(hidden.unflatten(0, (n, -1))[:, -1]).float()  # (B, V)
            new = sample(logits, temperature, top_k, top_p, generator)[:, None]  # (B, 1)
            yield new[:, 0]

    def generate(
        self, tokens, max_new_tokens: int, temperature=0.0, top_k=None, top_p=None, eos_id=None,
        generator=None,
    ) -> Tensor:  # fmt: skip
        """Continues B prompts of one length. tokens (B, T) -> (B, T + new), prompt included.

        temperature 0 is greedy. With eos_id a finished row is filled with it, and all stops when
        every row is finished; without, exactly max_new_tokens come. Raises ValueError when the
        result would not fit the model's context.
        """
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        new = self.stream(tokens, max_new_tokens, temperature, top_k, top_p, generator)
        for token in new:
            if eos_id is not None:
                token = token.masked_fill(finished, eos_id)
                finished |= token == eos_id
            tokens = torch.cat((tokens, token[:, None]), dim=1)
            if eos_id is not None and bool(finished.all()):
                break
        return tokens

    def _checkpoint_names(self) -> dict[str, list[tuple[str, Tensor]]]:
        """The checkpoint's names, without prefix: our parameters, of which GPT-2 stacks q, k, v."""
        names = FAMILIES[self.config.family].names
        found = {}
        for ours, parameter in self.named_parameters():
            *layer, module, leaf = re.fullmatch(r"(?:(layers)\.(\d+)\.)?(.+)\.(\w+)", ours).groups()
            theirs = f"{names.get(module, module)}.{leaf}"
            if layer[0]:
                theirs = f"{names.get('layers', 'layers')}.{layer[1]}.{theirs}"
            found.setdefault(theirs, []).append((ours, parameter))
        return found

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype: torch.dtype | None = None, shard=None):
        """Loads a Hugging Face folder, tensor by tensor, onto device (default: the CPU).

        dtype None keeps the stored one. Reads model.safetensors, its shards by their index, or
        pytorch_model.bin. Every name and shape is checked: FileNotFoundError, ValueError.
        shard, a function of the model while it is empty, may make its parameters DTensors, of
        which each process then keeps its own part.
        """
        folder = Path(folder)
        config = ModelConfig.from_json(folder / "config.json")
        family = FAMILIES[config.family]
        try:
            with torch.device("meta"):
                model = cls(config)
        except RuntimeError as error:  # beyond 2^63 bytes
            raise ValueError(f"{folder / 'config.json'}: {error!s:.300}") from None
        expected = model._checkpoint_names()
        if shard is not None:
            shard(model)
            model.to_empty(device=device or "cpu")
        for file, name, tensor in checkpoint_tensors(folder):
            name = re.sub(r"^(model\.|transformer\.)?(decoder\.)?", "", name)
            tied = name == "lm_head.weight" and config.tie_embeddings
            if tied or name.endswith((".inv_freq", ".attn.bias", ".attn.masked_bias")):
                continue
            if name not in expected:
                raise ValueError(f"{file}: tensor {name!r} is unknown here, or is there twice")
            ours = expected.pop(name)
            if family.conv1d and name.startswith("h.") and tensor.dim() == 2:
                tensor = tensor.t()
            if not tensor.is_floating_point() or tensor.dtype not in DTYPE_NAMES:
                raise ValueError(f"{file}: tensor {name!r} is stored as {tensor.dtype}")
            if ours[0][0] == "embed_tokens.weight":  # config.json may not say, or say "auto"
                config.dtype = str(tensor.dtype).removeprefix("torch.")
            rows = [parameter.shape[0] for _, parameter in ours]
            wanted = (sum(rows), *ours[0][1].shape[1:])
            if tensor.shape != wanted:
                raise ValueError(
                    f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                    f"config.json asks for shape {wanted}"
                )
            for (ours_name, _), part in zip(ours, tensor.split(rows), strict=True):
                part = part.to(device=device or "cpu", dtype=dtype, copy=True).contiguous()
                p = model.get_parameter(ours_name)
                if isinstance(p, DTensor):  # every process reads the tensor: nobody sends it
                    own = distribute_tensor(part, p.device_mesh, p.placements, src_data_rank=None)
                    p.detach().copy_(own)
                    continue
                module, _, leaf = ours_name.rpartition(".")
                setattr(model.get_submodule(module), leaf, nn.Parameter(part))
        if expected:
            some = ", ".join([*expected][:5]) + ", ..." * (len(expected) > 5)
            raise ValueError(f"{folder}: {len(expected)} tensors are missing: {some}")
        return model.eval()

    def save_pretrained(self, folder, dtype: torch.dtype | None = None, shard_bytes=5 * 10**9):
        """Writes config.json and model.safetensors (shards with an index above shard_bytes).

        dtype None stores the parameters as they are. transformers and others load it. Of a sharded
        model each tensor is put together as it is written, by all processes: one has the folder,
        the others give None. Raises ValueError where there are adapters, which nobody would find
        in it: see merge_lora.
        """
        if self.lora_layers():
            raise ValueError(f"{folder}: not written: adapters are merged first, by merge_lora")
        family, tensors = FAMILIES[self.config.family], {}
        for name, ours in self._checkpoint_names().items():
            tensor = (
                torch.cat([p.detach() for _, p in ours]) if len(ours) > 1 else ours[0][1].detach()
            )
            if family.conv1d and name.startswith("h.") and tensor.dim() == 2:
                tensor = tensor.t()
            tensors[name if name.startswith("lm_head.") else family.prefix + name] = tensor
        if folder is None:
            for tensor in tensors.values():
                whole(tensor)
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = dtype or self.embed_tokens.weight.dtype
        config = self.config.to_json() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

        shards, size, total = [{}], 0, 0
        for name, t in tensors.items():
            n_bytes = t.numel() * dtype.itemsize
            if shards[-1] and size + n_bytes > shard_bytes:
                shards, size = [*shards, {}], 0
            shards[-1][name] = t
            size, total = size + n_bytes, total + n_bytes
        # An older model's files in this folder would be loaded in place of these.
        for old in (*folder.glob("model*.safetensors"), *folder.glob("model*.index.json")):
            old.unlink()
        if len(shards) == 1:
            return write_safetensors(folder / "model.safetensors", tensors, dtype)
        where = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / file, shard, dtype)
            where |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def sample(logits: Tensor, temperature: float, top_k=None, top_p=None, generator=None) -> Tensor:
    """One token a row from logits (B, V) -> (B,). top_p keeps the smallest set of that mass."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        sorted_logits, order = logits.sort(descending=True, dim=-1)
        probs = sorted_logits.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # by the mass before a token
        outside[:, 0] = False  # the likeliest always stays
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


# ---------------------------------------------------------------------------------------------
# Files. A safetensors file is: 8 bytes, the header's length n, little-endian; n bytes of JSON,
# {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {...}}; the tensors' bytes.

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises FileNotFoundError or ValueError with the path."""
    if path.parent.is_file():
        raise ValueError(f"{path.parent}: is a file; the folder of a Hugging Face model is wanted")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face model folder has one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def checkpoint_tensors(folder: Path):
    """Yields (file, name, tensor) of a model folder, safetensors before pickles, by their index
    where they are sharded. A tensor is a view of its file: copy it before taking the next."""
    for kind, read in (("model.safetensors", safetensors_of), ("pytorch_model.bin", pickled_of)):
        index = folder / f"{kind}.index.json"
        if (folder / kind).is_file():
            files = [folder / kind]
        elif index.is_file():
            where = read_json(index).get("weight_map")
            names = set(where.values()) if isinstance(where, dict) else {None}
            if not all(isinstance(x, str) and x and Path(x).name == x for x in names):
                raise ValueError(f"{index}: weight_map must map tensor names to files beside it")
            files = [folder / name for name in sorted(names)]
        else:
            continue
        for file in files:
            yield from ((file, name, tensor) for name, tensor in read(file))
        return
    known = "no model.safetensors or pytorch_model.bin, nor their index"
    raise FileNotFoundError(f"{folder}: {known} (GGUF and other formats are not read)")


def pickled_of(file: Path):
    """Yields (name, tensor) of a file of torch.save. weights_only: other pickles may run code."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:  # only the zip format, new since torch 1.6, can be mapped
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        _refuse_pointer(file)
        problem = f"{type(error).__name__}: not a checkpoint of tensors and nothing but tensors"
        raise ValueError(f"{file}: {problem}") from None
    items = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in items):
        raise ValueError(f"{file}: not a dict of names and tensors")
    yield from items


def _refuse_pointer(path: Path):
    with open(path, "rb") as f:
        if f.read(12) == b"version http":
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself: git lfs pull")


def read_safetensors(path) -> dict[str, Tensor]:
    """All tensors of a file, as views of its memory map: read when used. Raises ValueError."""
    return dict(safetensors_of(Path(path)))


def safetensors_of(path: Path):
    """Yields (name, tensor), a view of the mapped file whose pages are let go at the next one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > min(size - 8, 100_000_000):
            _refuse_pointer(path)
            raise ValueError(f"{path}: not a safetensors file, or cut short: header of {n} bytes")
        try:
            entries = _safetensors_header(f.read(n), size - 8 - n)
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            problem = "lacks the key " * isinstance(error, KeyError) + str(error)
            raise ValueError(f"{path}: broken safetensors file: {problem:.300}") from None
        # ACCESS_COPY: torch wants writable memory; a write would stay in this process
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, dtype, shape, begin, n_bytes in entries:
        tensor, begin = torch.empty(shape, dtype=dtype), 8 + n + begin
        if n_bytes:
            raw = torch.frombuffer(data, dtype=torch.uint8, count=n_bytes, offset=begin)
            raw = raw.clone() if begin % dtype.itemsize else raw  # must be aligned
            tensor = raw.view(dtype).view(shape)
        yield name, tensor
        page = begin - begin % mmap.PAGESIZE
        if n_bytes and sys.platform == "linux":  # which alone knows the advice
            data.madvise(mmap.MADV_DONTNEED, page, begin + n_bytes - page)


def _safetensors_header(header: bytes, n_data: int) -> list[tuple]:
    """[(name, dtype, shape, begin, bytes)] in the file's order, checked to cover it exactly."""
    entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    entries.pop("__metadata__", None)
    tensors, end = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"dtype {entry['dtype']!r} is not supported, only {', '.join(DTYPES)}")
        dtype, shape, (begin, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sizes = shape if isinstance(shape, list) else [-1]
        if not all(type(x) is int and x >= 0 for x in (*sizes, begin, stop)):
            raise ValueError(f"tensor {name!r} has a negative or broken shape or offset")
        if math.prod(max(x, 1) for x in shape) >= 2**63:
            raise ValueError(f"tensor {name!r} has too large a shape")
        n_bytes = math.prod(shape) * dtype.itemsize
        if begin != end or stop - begin != n_bytes or stop > n_data:
            raise ValueError(f"tensor {name!r}, shape {shape}: bytes {begin}:{stop} of {n_data}")
        end = stop
        tensors.append((name, dtype, shape, begin, n_bytes))
    if end != n_data:
        raise ValueError(f"{n_data - end} bytes belong to no tensor")
    return tensors


def _unique_keys(pairs):
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return keys


def write_safetensors(path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None):
    """Writes beside, then renames. The bytes depend on the tensors alone, not on time or place.

    dtype: cast to it on the way, one tensor at a time.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        stored, begin = dtype or t.dtype, offset
        offset += t.numel() * stored.itemsize
        header[name] = {"dtype": DTYPE_NAMES[stored], "shape": list(t.shape)}
        header[name]["data_offsets"] = [begin, offset]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that every tensor starts aligned
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        for t in tensors.values():
            t = whole(t.detach()).to("cpu", dtype).contiguous()
            f.write(t.flatten().view(torch.uint8).numpy().data)
    os.replace(temporary, path)
