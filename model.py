"""A GPT-style transformer over packed sequences, which reads and writes Hugging Face checkpoints.

Notable features:
- one architecture; a family (Llama now) is a set of values of ModelConfig, never a subclass
- rotary positions, RMSNorm, grouped-query attention, SwiGLU, tied or untied embeddings
- a packed micro-batch has no batch axis and no padding: N tokens in a row, and `Segments` says
  which queries see which keys. A shared prompt is computed once (the picture is in data.py)
- one attention function: Flash `varlen_attn` on CUDA, scaled_dot_product_attention elsewhere;
  a decoding step is the same call with one query, and so is a rejected branch over its prompt
- parameters are named as in the checkpoint less its "model." prefix: no renaming table
- safetensors by hand, memory-mapped, every name, shape and offset checked

dtypes: parameters stay as loaded (float32 in training). `compute_dtype` is that of the residual
stream and the matrix products, to which each weight is cast where it is used. Norms are computed
in float32 (float64 for float64), rotary angles in float32.

Letters: B sequences, T positions, N packed tokens, M gathered keys, S segments, D model width,
H heads, K key/value heads, d head size, V vocabulary.
"""

import inspect
import itertools
import json
import math
import mmap
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn


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
    rope_theta: float = 10000.0
    max_seq_len: int = 2048  # the context the model was made for
    tie_embeddings: bool = False  # lm_head is the embedding matrix
    dtype: str = "float32"  # how the checkpoint stores its weights
    source: dict = field(default_factory=dict, repr=False)  # config.json as it was read

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads do not share {self.n_kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary turns pairs of dimensions")

    @classmethod
    def from_json(cls, path) -> "ModelConfig":
        """Reads a Hugging Face config.json, old keys or new. Raises ValueError with the path."""
        path = Path(path)
        source = read_json(path)
        if source.get("model_type") != "llama":
            raise ValueError(f"{path}: model_type {source.get('model_type')!r}; supported: 'llama'")
        rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: rope_scaling {rope!r} is not an object")
        # transformers 5 renamed two keys; the old ones go first, as most checkpoints have them.
        c = {"torch_dtype": source.get("dtype"), "rope_theta": rope.get("rope_theta")}
        c |= {"rope_type": rope.get("rope_type", rope.get("type"))}
        c |= {key: value for key, value in source.items() if value is not None}
        for key, supported in FIXED_KEYS.items():
            if (c.get(key) or supported) != supported:
                raise ValueError(f"{path}: {key} {c[key]!r} is not supported, only {supported!r}")
        for key in list(CONFIG_KEYS.values())[:5]:
            if c.get(key) is None:
                raise ValueError(f"{path}: key {key!r} is missing")
        ours = {name: c[key] for name, key in CONFIG_KEYS.items() if c.get(key) is not None}
        for f in fields(cls):
            value = ours.get(f.name)
            kinds = (int, float) if f.type is float else f.type
            if value is not None and (
                not isinstance(value, kinds) or (f.type is int and value < 1)
            ):
                raise ValueError(f"{path}: {CONFIG_KEYS[f.name]} cannot be {value!r}")
        try:
            return cls(**ours, source=source)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self) -> dict:
        """The config.json to save: what was read, under the keys that every reader knows."""
        kept = {k: v for k, v in self.source.items() if k not in ("rope_parameters", "dtype")}
        kept |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        return kept | {key: getattr(self, name) for name, key in CONFIG_KEYS.items()}


CONFIG_KEYS = {  # ours: Hugging Face's
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "dtype": "torch_dtype",
}
FIXED_KEYS = {  # what the architecture below does not vary
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_type": "default",
}


# ---------------------------------------------------------------------------------------------
# Parts, small to large.


class Linear(nn.Linear):
    """A projection whose weight is cast to the dtype of what comes in: see `compute_dtype`."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # x^2 needs the range
        y = F.rms_norm(x.to(dtype), self.weight.shape, eps=self.eps)
        return y.to(x.dtype) * self.weight.to(x.dtype)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (N, 1, d/2) float32, of the angle position * theta^(-2i/d)."""
    i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, None].float() * theta ** (-i / head_dim)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns dimension i with dimension i + d/2 of x (N, H, d): Hugging Face's halves."""
    x1, x2 = x.chunk(2, dim=-1)  # (N, H, d/2) each; the products are float32 through cos and sin
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


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


# Newer releases of torch want to be told of grouped-query attention, older ones know no such word.
_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
USE_VARLEN = True  # tests set it to False to compare the two roads on one device


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention within each segment. q (N, H, d), k and v (N, K, d) -> (N, H, d)."""
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    if USE_VARLEN and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        max_q, max_k = max(segments.q_lens), max(segments.k_lens)
        cu_q, cu_k = segments.cu_q, segments.cu_k
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), **_GQA)
    return _attention_by_segment(q, k, v, segments)


def _attention_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same by scaled_dot_product_attention, neighbours of equal lengths in one call."""
    runs = [
        (*lens, len(list(same)))
        for lens, same in itertools.groupby(zip(segments.q_lens, segments.k_lens, strict=True))
    ]
    # split and not slices: the backward pass of a slice writes a whole tensor of zeros
    q_runs = q.split([q_len * n for q_len, _, n in runs])
    k_runs, v_runs = (x.split([k_len * n for _, k_len, n in runs]) for x in (k, v))
    outs = []
    for (q_len, k_len, n), *qkv in zip(runs, q_runs, k_runs, v_runs, strict=True):
        qs, ks, vs = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in qkv)  # (n, heads, len, d)
        # One query sees every key. is_causal means top-left, right only where lengths agree.
        square, mask = q_len == k_len, None
        if not square and q_len > 1:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
        out = F.scaled_dot_product_attention(
            qs, ks, vs, attn_mask=mask, is_causal=square and q_len > 1, enable_gqa=True
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))  # (n * q_len, H, d)
    return torch.cat(outs) if outs else q


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
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = Linear(config.dim, config.n_heads * config.head_dim)
        self.k_proj = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.v_proj = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.o_proj = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(self, x, cos, sin, segments, cache=None):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.o_proj(attention(q, k, v, segments).flatten(1))  # (N, H, d) -> (N, D)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.dim, config.hidden_dim)
        self.up_proj = Linear(config.dim, config.hidden_dim)
        self.down_proj = Linear(config.hidden_dim, config.dim)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, segments, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, segments, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Transformer(nn.Module):
    """The model. `Transformer(config)` has random weights; `from_pretrained` reads a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = None  # None: that of the parameters
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the residual stream starts smaller, as in GPT-2
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)

    @property
    def lm_head_weight(self) -> Tensor:
        """The vocabulary projection (V, D)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(self, tokens, positions, segments: Segments, cache=None) -> Tensor:
        """tokens, positions (N,) int64, packed as segments say -> (N, D), after the last norm."""
        x = self.embed_tokens(tokens)  # (N, D)
        x = x.to(self.compute_dtype or x.dtype)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        for block in self.layers:
            x = block(x, cos, sin, segments, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return F.linear(hidden, self.lm_head_weight.to(hidden.dtype))

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

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues B prompts of one length. tokens (B, T) -> (B, T + new), prompt included.

        temperature 0 is greedy. With eos_id a finished row is filled with it, and all stops when
        every row is finished; without, exactly max_new_tokens come. Raises ValueError when the
        result would not fit the model's context.
        """
        n, length = tokens.shape
        self._check_length(length + max_new_tokens)
        device, dtype = tokens.device, self.compute_dtype or self.embed_tokens.weight.dtype
        cache = KVCache(self.config, n, length + max_new_tokens, device, dtype)
        finished = torch.zeros(n, dtype=torch.bool, device=device)
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
            if eos_id is not None:
                new = new.masked_fill(finished[:, None], eos_id)
                finished |= new[:, 0] == eos_id
            tokens = torch.cat((tokens, new), dim=1)
            if eos_id is not None and bool(finished.all()):
                break
        return tokens

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype: torch.dtype | None = None):
        """Loads a Hugging Face folder, tensor by tensor, onto device (default: the CPU).

        dtype None keeps the stored one. Reads model.safetensors, its shards by their index, or
        pytorch_model.bin. Every name and shape is checked: FileNotFoundError, ValueError.
        """
        folder = Path(folder)
        config = ModelConfig.from_json(folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        expected = dict(model.named_parameters())
        for file, name, tensor in checkpoint_tensors(folder):
            name = name.removeprefix("model.")
            if name.endswith("rotary_emb.inv_freq") or (
                name == "lm_head.weight" and config.tie_embeddings
            ):
                continue
            if name not in expected:
                raise ValueError(f"{file}: tensor {name!r} is unknown here, or is there twice")
            parameter = expected.pop(name)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                    f"config.json asks for shape {tuple(parameter.shape)}"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{file}: tensor {name!r} is stored as {tensor.dtype}")
            module, _, leaf = name.rpartition(".")
            tensor = tensor.to(device=device or "cpu", dtype=dtype, copy=True)
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
        if expected:
            raise ValueError(
                f"{folder}: {len(expected)} tensors are missing: {', '.join(expected)}"
            )
        return model.eval()

    def save_pretrained(self, folder, dtype: torch.dtype | None = None, shard_bytes=5 * 10**9):
        """Writes config.json and model.safetensors (shards with an index above shard_bytes).

        dtype None stores the parameters as they are. transformers, vLLM and others load it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, p in self.named_parameters():
            name = name if name.startswith("lm_head.") else f"model.{name}"
            tensors[name] = p.detach() if dtype is None else p.detach().to(dtype)
        stored = str(dtype or self.embed_tokens.weight.dtype).removeprefix("torch.")
        config = self.config.to_json() | {"torch_dtype": stored}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

        shards, size = [{}], 0
        for name, t in tensors.items():
            if shards[-1] and size + t.nbytes > shard_bytes:
                shards, size = [*shards, {}], 0
            shards[-1][name] = t
            size += t.nbytes
        # An older model's files in this folder would be loaded in place of these.
        for old in (
            *folder.glob("model*.safetensors"),
            *folder.glob("model.safetensors.index.json"),
        ):
            old.unlink()
        if len(shards) == 1:
            return write_safetensors(folder / "model.safetensors", tensors)
        where = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / file, shard)
            where |= dict.fromkeys(shard, file)
        total = sum(t.nbytes for t in tensors.values())
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
    """Yields (file, name, tensor) of a model folder; a tensor may be a view of the file."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        where = read_json(index).get("weight_map")
        names = set(where.values()) if isinstance(where, dict) else {None}
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index}: weight_map must map tensor names to files beside it")
        files = [folder / name for name in sorted(names)]
    elif (folder / "pytorch_model.bin").is_file():
        file = folder / "pytorch_model.bin"
        try:  # weights_only: a pickle may otherwise run any code
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: not a readable checkpoint of tensors: {reason}") from None
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()
        ):
            raise ValueError(f"{file}: not a dict of names and tensors")
        yield from ((file, name, tensor) for name, tensor in state.items())
        return
    else:
        raise FileNotFoundError(
            f"{folder}: no model.safetensors, index of shards, or pytorch_model.bin"
        )
    for file in files:
        for name, tensor in read_safetensors(file).items():
            yield file, name, tensor


def read_safetensors(path) -> dict[str, Tensor]:
    """All tensors of a file, as views of its memory map: read when used. Raises ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > min(size - 8, 100_000_000):
            raise ValueError(f"{path}: not a safetensors file, or cut short: header of {n} bytes")
        header = f.read(n)
        # ACCESS_COPY: torch wants writable memory; a write would stay in this process
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
        entries.pop("__metadata__", None)
        entries = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        tensors, end = {}, 0
        for name, entry in entries:
            dtype, shape, (begin, stop) = (
                DTYPES[entry["dtype"]],
                entry["shape"],
                entry["data_offsets"],
            )
            # before any product: ["ab", 10**18] would be a very long string
            if not all(type(x) is int and x >= 0 for x in (*shape, begin, stop)):
                raise ValueError(f"tensor {name!r} has a negative or broken shape or offset")
            n_bytes = math.prod(shape) * dtype.itemsize
            if math.prod(max(x, 1) for x in shape) >= 2**63:
                raise ValueError(f"tensor {name!r} has too large a shape")
            if begin != end or stop - begin != n_bytes or 8 + n + stop > size:
                raise ValueError(
                    f"tensor {name!r}: bytes {begin}:{stop} of {size - 8 - n}, {shape}"
                )
            end = stop
            tensors[name] = torch.empty(shape, dtype=dtype)
            if n_bytes:
                raw = torch.frombuffer(data, dtype=torch.uint8, count=n_bytes, offset=8 + n + begin)
                raw = raw.clone() if (8 + n + begin) % dtype.itemsize else raw  # must be aligned
                tensors[name] = raw.view(dtype).view(shape)
        if 8 + n + end != size:
            raise ValueError(f"{size - 8 - n - end} bytes belong to no tensor")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken safetensors file: {error}") from None
    return tensors


def _unique_keys(pairs):
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return keys


def write_safetensors(path, tensors: dict[str, Tensor]):
    """Writes beside, then renames. The bytes depend on the tensors alone, not on time or place."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        span = [offset, offset + t.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": span}
        offset += t.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that every tensor starts aligned
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    os.replace(temporary, path)
