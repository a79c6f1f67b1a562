"""A GPT-style transformer over packed sequences.

Notable features:
- One architecture. A family (Llama, Gemma, GPT-2, ...: formats/families.py has them all) is a set
  of values of ModelConfig, never a subclass. formats/ knows Hugging Face's names and files.
- A packed micro-batch has no batch axis and no padding: N tokens in a row, and `Segments` says
  which queries see which keys (attention.py). So a shared prompt is computed once.
- A decoding step is the same attention call with one query, and so is a rejected response over its
  prompt.

dtypes: parameters stay as they were loaded, which is float32 where they are trained. The residual
stream and the matrix products are in `compute_dtype`, to which a weight is cast where it is used.
Norms compute in float32 inside (float64 for float64), rotary angles in float32. No dropout.

Letters: B sequences, T positions, N packed tokens, M gathered keys, S segments, D model width,
E width of embeddings (D except in OPT-350M), H heads, K key/value heads, d head size, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from attention import KVCache, Segments, attention, to_device
from formats.config import config_values, write_config
from formats.files import read_json
from formats.weights import read_weights, write_weights

GELU_TANH = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu}
ACTIVATIONS |= {f"gelu_{x}": GELU_TANH for x in ("new", "fast", "accurate", "pytorch_tanh")}
rotation_kernel = None  # on a GPU: `_rotate` as run/compiled.py compiled it
LOOK_EVERY = {"cuda": 8}  # tokens between two looks for EOS, as the host then waits; else 1


@dataclass
class ModelConfig:
    vocab_size: int  # V
    dim: int  # D, width of the residual stream
    n_layers: int
    n_heads: int  # H
    hidden_dim: int  # width inside the MLP
    n_kv_heads: int = 0  # K, divides H: each serves H/K query heads; 0 means H
    head_dim: int = 0  # d; 0 means dim / n_heads
    embed_dim: int = 0  # E, width of embeddings, projected to dim and back; 0 means dim
    norm_eps: float = 1e-6
    max_seq_len: int = 2048  # the context the model was made for
    tie_embeddings: bool = False  # lm_head is the embedding matrix
    dtype: str = "float32"  # how the checkpoint stores its weights
    rope_theta: float = 10000.0
    # What makes a family; the defaults are Llama's.
    family: str = "llama"
    layer_norm: bool = False  # LayerNorm with bias instead of RMSNorm
    norm_adds_one: bool = False  # RMSNorm multiplies by 1 + weight
    qk_norm: bool = False  # a norm of each head's queries, and one of its keys
    qk_norm_joint: bool = False  # qk_norm is over all heads at once
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    gated: bool = True  # MLP: down(act(gate) * up), not down(act(up))
    activation: str = "silu"  # Hugging Face's name
    norm_first: bool = True  # else each norm follows an addition, and none is at the end
    norm_outputs: bool = False  # norms of what attention and MLP add, and not of what they read
    parallel: bool = False  # attention and MLP side by side, after one norm
    scale_embeddings: bool = False  # by the root of dim
    rotary_fraction: float = 1.0  # of each head's dimensions
    rope_layers: list = field(default_factory=list)  # 1 for a layer with rotary, 0 for one without
    rope_scaling: dict = field(default_factory=dict)  # {"rope_type": "linear" or another, ...}
    position_offset: int | None = None  # the row of position 0 in a table that is learned
    windows: list = field(default_factory=list)  # keys that a query of each layer sees; None: all
    source: dict = field(default_factory=dict, repr=False)  # config.json as it was read

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.embed_dim = self.embed_dim or self.dim
        self.windows = self.windows or [None] * self.n_layers
        self.rope_layers = self.rope_layers or [1] * self.n_layers
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation {self.activation!r} is not supported, only {known}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads do not share {self.n_kv_heads} key/value heads")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary turns pairs of {self.head_dim}, not {self.rotary_dim}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_fraction)

    @classmethod
    def from_json(cls, path) -> "ModelConfig":
        """Reads a Hugging Face config.json. Raises FileNotFoundError, ValueError with the path."""
        source = read_json(Path(path))
        try:
            return cls(**config_values(source, {f.name: f.type for f in fields(cls)}))
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error!s:.300}") from None


# ---------------------------------------------------------------------------------------------
# Parts, small to large.


class Linear(nn.Linear):
    """A projection whose weight is cast to the dtype of its input, where it is used.

    Cast here, in every micro-batch, and not once a step: the gradient then leaves autograd in the
    weight's own float32 and adds up there over micro-batches, and nobody keeps a second copy of
    the weights. It reads and writes 6 bytes a weight: little beside thousands of tokens.
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with its bias. One kernel, which computes in float32 inside."""

    def __init__(self, dim: int, config: ModelConfig):
        super().__init__()
        self.eps, self.adds_one = config.norm_eps, config.norm_adds_one
        self.weight = nn.Parameter(torch.zeros(dim) if self.adds_one else torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if config.layer_norm else None

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        if self.adds_one:  # in float32: a small weight would lose its digits in a bfloat16 1 + w
            wide = torch.promote_types(x.dtype, torch.float32)
            weight = 1 + self.weight.to(wide)
            return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)
        weight = self.weight.to(x.dtype)  # mixed dtypes would run as five kernels instead of one
        if self.bias is not None:
            return F.layer_norm(x, weight.shape, weight, self.bias.to(x.dtype), self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


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
    if scaling.get("rope_type") == "longrope":  # the short one: see formats/families.py
        frequency = frequency / to_device(torch.tensor(scaling["short_factor"]), positions.device)
    angles = positions[:, None, None].float() * frequency
    factor = scaling.get("attention_factor", 1.0)  # longrope's
    return factor * angles.cos(), factor * angles.sin()


class ApplyRotary(torch.autograd.Function):
    """Turns dimension i with i + rotary_dim/2 of x (N, H, d) by cos and sin: Hugging Face's halves.

    Its gradient, the rotation back, is written by hand: autograd would keep float32 copies.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (rotation_kernel or _rotate)(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return (rotation_kernel or _rotate)(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    sizes = cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    x1, x2, rest = x.split(sizes, dim=-1)
    if torch.compiler.is_compiling():  # which makes one kernel of it
        rotated = x1 * cos - x2 * sin, x2 * cos + x1 * sin  # float32, as cos and sin are
        return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)
    out = torch.empty_like(x)
    out1, out2, out_rest = out.split(sizes, dim=-1)
    torch.addcmul(x1 * cos, x2, sin, value=-1, out=out1)  # rounded to x's dtype as it is written
    torch.addcmul(x2 * cos, x1, sin, out=out2)
    out_rest.copy_(rest)
    return out


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.layer, self.window = config, layer, config.windows[layer]
        self.head_dim, self.qk_norm_joint = c.head_dim, c.qk_norm_joint
        self.has_rotary = c.rope_layers[layer] and c.rotary_dim > 0
        self.q_proj = Linear(c.dim, c.n_heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.dim, c.n_kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.dim, c.n_kv_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.dim, c.o_bias)
        n_q, n_k = (c.n_heads, c.n_kv_heads) if c.qk_norm_joint else (1, 1)  # heads in one norm
        self.q_norm = Norm(n_q * c.head_dim, c) if c.qk_norm else None
        self.k_norm = Norm(n_k * c.head_dim, c) if c.qk_norm else None

    def forward(self, x, cos, sin, segments: Segments, cache=None):  # x (N, D) -> (N, D)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (N, H * d), (N, K * d) twice
        if self.qk_norm_joint:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))  # (N, H, d), (N, K, d)
        if self.q_norm is not None and not self.qk_norm_joint:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.has_rotary:
            q, k = ApplyRotary.apply(q, cos, sin), ApplyRotary.apply(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        x = attention(q, k, v, segments, self.window)  # (N, H, d)
        return self.o_proj(x.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.activation = ACTIVATIONS[c.activation]
        self.gate_proj = Linear(c.dim, c.hidden_dim, c.mlp_bias) if c.gated else None
        self.up_proj = Linear(c.dim, c.hidden_dim, c.mlp_bias)
        self.down_proj = Linear(c.hidden_dim, c.dim, c.mlp_bias)

    def forward(self, x):  # (N, D) -> (N, D)
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_first, self.norm_outputs = config.norm_first, config.norm_outputs
        self.input_layernorm = Norm(config.dim, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = None if config.parallel else Norm(config.dim, config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, segments: Segments, cache=None):  # x (N, D) -> (N, D)
        if not self.norm_first:
            x = self.input_layernorm(x + self.self_attn(x, cos, sin, segments, cache))
            return self.post_attention_layernorm(x + self.mlp(x))
        if self.norm_outputs:
            x = x + self.input_layernorm(self.self_attn(x, cos, sin, segments, cache))
            return x + self.post_attention_layernorm(self.mlp(x))
        y = self.input_layernorm(x)
        if self.post_attention_layernorm is None:
            return x + self.self_attn(y, cos, sin, segments, cache) + self.mlp(y)
        x = x + self.self_attn(y, cos, sin, segments, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def twice(self, *inputs):
        """As forward, but keeps only its inputs, and runs again in the backward pass."""
        return checkpoint(self, *inputs, use_reentrant=False, preserve_rng_state=False)


# ---------------------------------------------------------------------------------------------
# The model.


class Transformer(nn.Module):
    """`Transformer(config)` has random weights; `from_pretrained` reads a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.compute_dtype = None  # None: that of the parameters
        self.checkpointed_blocks = 0  # the first blocks, which keep only their input and run twice
        self.embed_tokens = nn.Embedding(c.vocab_size, c.embed_dim)
        self.project_in = self.project_out = None
        if c.embed_dim != c.dim:
            self.project_in = Linear(c.embed_dim, c.dim, bias=False)
            self.project_out = Linear(c.dim, c.embed_dim, bias=False)
        self.embed_positions = None
        if c.position_offset is not None:
            self.embed_positions = nn.Embedding(c.max_seq_len + c.position_offset, c.dim)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm = Norm(c.dim, c) if c.norm_first else None
        lm_head = functools.partial(Linear, c.embed_dim, c.vocab_size, c.lm_head_bias)
        self.lm_head = None if c.tie_embeddings else lm_head()
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the residual stream starts smaller, as in GPT-2
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layers) if adds else 0.02)

    def hidden_states(self, tokens, positions, segments: Segments, cache=None) -> Tensor:
        """tokens, positions (N,) int64, packed as segments say -> (N, E), what lm_head takes."""
        x = self.embed_tokens(tokens)  # (N, E)
        if self.config.scale_embeddings:  # the root too in the weights' dtype, as in transformers
            x = x * x.new_full((), self.config.dim**0.5)
        if self.project_in is not None:
            x = self.project_in(x.to(self.compute_dtype or x.dtype))  # (N, D)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + self.config.position_offset)
        x = x.to(self.compute_dtype or x.dtype)
        cos, sin = rotary(positions, self.config)
        for i, block in enumerate(self.layers):
            if cache is not None:  # never the compiled block: the lengths change at every token
                x = block._call_impl(x, cos, sin, segments, cache)
            elif i < self.checkpointed_blocks and torch.is_grad_enabled():
                x = block.twice(x, cos, sin, segments)
            else:
                x = block(x, cos, sin, segments)
        x = x if self.norm is None else self.norm(x)
        return x if self.project_out is None else self.project_out(x)  # (N, E)

    def projection(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(P, E) hidden states and the (V, E) matrix whose product is the logits.

        A bias (Phi) becomes one more column, times a column of ones; seven columns of zeros keep
        the width a multiple of 8, which matrix products want.
        """
        weight = self.lm_head_weight
        if self.lm_head is None or self.lm_head.bias is None:
            return hidden, weight
        ones = F.pad(torch.ones_like(hidden[:, :1]), (0, 7))
        bias = F.pad(self.lm_head.bias[:, None], (0, 7))
        return torch.cat((hidden, ones), 1), torch.cat((weight, bias), 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V)"""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V). Raises ValueError beyond the model's context."""
        n, length = tokens.shape
        if length > self.config.max_seq_len:
            raise ValueError(f"{length} tokens, but the context is {self.config.max_seq_len}")
        positions = torch.arange(length, device=tokens.device).repeat(n)  # (B * T,)
        segments = Segments.of([length] * n, [length] * n, device=tokens.device)
        hidden = self.hidden_states(tokens.flatten(), positions, segments)  # (B * T, D)
        return self.logits(hidden).unflatten(0, (n, length))

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def lm_head_weight(self) -> Tensor:
        """The vocabulary projection (V, E)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    # Loading, saving, counting.

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype: torch.dtype | None = None, shard=None):
        """Loads a Hugging Face folder, tensor by tensor, onto device (default: the CPU).

        dtype None keeps the stored one. Reads model.safetensors, its shards by their index, or
        pytorch_model.bin. Every name and shape is checked: FileNotFoundError, ValueError.
        shard, a function of the model while it is empty, may make its parameters DTensors, of
        which each process then keeps its own part.
        """
        folder, device = Path(folder), device or "cpu"
        config = ModelConfig.from_json(folder / "config.json")
        try:
            with torch.device("meta"):
                model = cls(config)
        except RuntimeError as error:  # a tensor of more than 2^63 bytes
            raise ValueError(f"{folder / 'config.json'}: {error!s:.300}") from None
        if shard is not None:
            shard(model)
            model.to_empty(device=device)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for name, stored in read_weights(folder, config.family, shapes):
            if name == "embed_tokens.weight":  # config.json may not say, or say "auto"
                config.dtype = str(stored.dtype).removeprefix("torch.")
            tensor = stored.to(device=device, dtype=dtype, copy=True).contiguous()
            p = model.get_parameter(name)
            if isinstance(p, DTensor):  # every process reads the tensor, so that nobody sends it
                own = distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
                p.detach().copy_(own)
            else:
                module, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
        return model.eval()

    def save_pretrained(self, folder, dtype: torch.dtype | None = None, shard_bytes=5 * 10**9):
        """Writes config.json and model.safetensors (shards with an index above shard_bytes).

        dtype None stores the parameters as they are. transformers and others load it. All processes
        of a sharded model call it, one of them with the folder and the others with None.
        Raises ValueError where something was added to the model, as LoRA's adapters are.
        """
        parameters = dict(self.named_parameters())
        with torch.device("meta"):
            own = dict(Transformer(self.config).named_parameters())
        for name in parameters.keys() - own.keys():
            problem = f"{name} is not of this architecture; merge adapters first, by merge_lora"
            raise ValueError(f"{folder}: not written: {problem}")
        dtype = dtype or self.embed_tokens.weight.dtype
        if folder is not None:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, self.config, dtype)
        write_weights(folder, self.config.family, parameters, dtype, shard_bytes)

    def training_flops(self, lengths: list[tuple[int, int, int]], n_predicted: int) -> int:
        """Operations that a training step on packed pairs of these (p, c, r) lengths needs.

        A product of an (n, a) and an (a, b) matrix is 2nab operations; the backward pass has two
        products for each of the forward pass. So it is 6 for each weight and token in the blocks,
        6VE for each prediction of the vocabulary projection (4 where the weight is frozen), and
        12Hd for each layer and key that a query sees. What is computed again does not count.
        """
        c = self.config
        parts = [m for m in (self.layers, self.project_in, self.project_out) if m is not None]
        weights = [p for part in parts for p in part.parameters() if p.dim() == 2]
        total = sum((4 + 2 * p.requires_grad) * p.numel() for p in weights) * sum(map(sum, lengths))
        lm_head = (4 + 2 * self.lm_head_weight.requires_grad) * c.vocab_size * c.embed_dim
        total += n_predicted * lm_head
        prompt, chosen, rejected = np.array(lengths, int).reshape(-1, 3).T
        for window in c.windows:
            keys = keys_seen(prompt + chosen, window)
            keys += keys_seen(prompt + rejected, window) - keys_seen(prompt, window)
            total += 12 * c.n_heads * c.head_dim * int(keys.sum())
        return total

    # Generation.

    @torch.no_grad()
    def stream(
        self, prompts, max_new_tokens: int, temperature=0.0, top_k=None, top_p=None, eos_id=None,
        generator=None,
    ):  # fmt: skip
        """As `generate`, but yields the next token of each of B prompts, (B,) int64, as it comes.

        It is -1 where a sequence has ended. On a GPU the host waits for every eighth token only.
        """
        lengths, context = np.array([len(p) for p in prompts], int), self.config.max_seq_len
        for n in lengths:
            if not 0 < n <= context:
                raise ValueError(f"a prompt has {n} tokens, but the context is 1 to {context}")
        device, dtype = self.device, self.compute_dtype or self.embed_tokens.weight.dtype
        room = np.minimum(max_new_tokens, context - lengths)  # tokens that may still come
        cache = KVCache(self.config, lengths + room, device, dtype)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        ends = None if eos_id is None else torch.tensor(eos_id, device=device)
        rows = np.flatnonzero(room > 0)  # of the n prompts that are not at their end, on the host
        index = to_device(torch.from_numpy(rows), device)
        new = [torch.as_tensor(prompts[i], dtype=torch.int64) for i in rows]
        new = torch.cat(new or [index]).to(device)  # (N,): the prompts, later a token of each
        n_new, n_steps = lengths[rows], 0
        while len(rows):
            positions, segments = cache.grow(rows, n_new)
            hidden = self.hidden_states(new, positions, segments, cache)  # (N, E)
            logits = self.logits(hidden.index_select(0, segments.cu_q[1:] - 1))  # (n, V)
            new = sample(logits.float(), temperature, top_k, top_p, generator)  # (n,)
            tokens = torch.full_like(ended, -1, dtype=torch.int64).index_copy(0, index, new)
            tokens = tokens.masked_fill(ended, -1)  # (B,)
            yield tokens
            n_new, n_steps = np.ones_like(rows), n_steps + 1
            room[rows] -= 1
            if ends is not None:
                ended = ended | torch.isin(tokens, ends)
                if n_steps % LOOK_EVERY.get(device.type, 1) == 0:  # the host waits for a GPU here
                    room[ended.tolist()] = 0
            stays = room[rows] > 0
            if not stays.all():  # who has ended leaves the batch
                kept = to_device(torch.from_numpy(np.flatnonzero(stays)), device)
                rows, n_new, index, new = rows[stays], n_new[stays], index[kept], new[kept]

    def generate(
        self, prompts, max_new_tokens: int, temperature=0.0, top_k=None, top_p=None, eos_id=None,
        generator=None,
    ) -> list[list[int]]:  # fmt: skip
        """The new tokens of each prompt: lists of ids of any lengths, or a tensor (B, T).

        A sequence ends with eos_id (a token or several; the one that came is returned), after
        max_new_tokens, or where the context is full. temperature 0 is greedy: a prompt's tokens
        then do not depend on the other prompts. Sampling draws for all sequences at once, so the
        same tokens come only of the same prompts together with the same state of the generator.
        Raises ValueError where a prompt is empty or longer than the context.
        """
        sampling = temperature, top_k, top_p, eos_id, generator
        tokens = [*self.stream(prompts, max_new_tokens, *sampling)]
        rows = torch.stack(tokens, 1).tolist() if tokens else [[] for _ in prompts]
        return [[token for token in row if token >= 0] for row in rows]


def keys_seen(n, window: int | None):
    """How many keys the first n queries of a sequence see together: 1 + 2 + ..., at most window
    each. n may be an array."""
    growing = n if window is None else np.minimum(n, window)
    return growing * (growing + 1) // 2 + (n - growing) * (window or 0)


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


def trainable(model: Transformer) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
