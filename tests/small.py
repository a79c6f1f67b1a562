"""Small things that many tests need: random models and pairs, segments by hand, one step."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from attention import Segments
from data import Pair, micro_batches
from model import ModelConfig, Transformer

# ---------------------------------------------------------------------------------------------
# Models.

V = 31  # the vocabulary of random_model
KINDS = [{"n_kv_heads": k, "tie_embeddings": t} for k in (4, 2, 1) for t in (False, True)]
kinds = pytest.mark.parametrize(
    "kind", KINDS, ids=[f"kv{k['n_kv_heads']}{'-tied' * k['tie_embeddings']}" for k in KINDS]
)


def random_model(dtype=torch.float64, seed=0, **config) -> Transformer:
    """Weights large enough for logits of a few nats: near-uniform ones would hide mistakes."""
    shape = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "n_kv_heads": 2}
    model = Transformer(ModelConfig(**({"vocab_size": V, "max_seq_len": 64} | shape | config)))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            if p.dim() == 2:
                p.copy_(0.4 * noise)
            else:
                p.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
    return model.to(dtype).eval()


TINY_V = 211  # the vocabulary of tiny


def tiny(dtype=torch.float32, **changes) -> Transformer:
    """As training begins: small weights in float32, products in dtype."""
    torch.manual_seed(0)
    sizes = {"vocab_size": TINY_V, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    model = Transformer(ModelConfig(**sizes | {"n_kv_heads": 2} | changes))
    model.compute_dtype = dtype
    return model


def complaint(function, path) -> str:
    """What the ValueError of function(path) says, in one line that begins with the path."""
    with pytest.raises(ValueError) as error:
        function(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 800
    return message.removeprefix(f"{path}: ")


def state(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def with_config(folder, **change):
    """Rewrites config.json; a key whose value is ... goes."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


# ---------------------------------------------------------------------------------------------
# Pairs.


def random_pairs(lengths, seed=0, vocab_size=V) -> list[Pair]:
    """A pair of random tokens for each (p, c, r) of lengths."""
    rng = np.random.default_rng(seed)
    return [Pair(*(rng.integers(0, vocab_size, n).tolist() for n in row)) for row in lengths]


def some_pairs(n: int, seed: int, longest: int = 19, vocab_size=TINY_V) -> list[Pair]:
    """n pairs whose lengths are random, too, each from 1 to longest."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, (n, 3))
    return random_pairs(lengths, seed, vocab_size)


def tokens(pair: Pair) -> list[list[int]]:
    """Prompt, chosen and rejected as lists, which compare as a whole."""
    return [list(map(int, ids)) for ids in pair[:3]]


# ---------------------------------------------------------------------------------------------
# Segments, and groups of rows.


def packed(lengths, device="cpu") -> Segments:
    """Of runs [prompt | chosen | rejected] with these (p, c, r) lengths, end to end."""
    if not lengths:
        return Segments.of([], [], torch.empty(0, dtype=torch.int64, device=device), device)
    (batch,) = micro_batches(random_pairs(lengths), 10**9, "full")
    return batch.segments.to(device)


def plain(n: int, q_len: int, k_len: int, device="cpu") -> Segments:
    """n sequences, each with its last q_len tokens as queries over all its k_len keys."""
    return Segments.of([q_len] * n, [k_len] * n, device=device)


def groups_of(response: torch.Tensor, n_rows: int) -> list[tuple[int, int]]:
    """Groups of at most n_rows rows, for fused_linear_orpo, that cut no pair; response as there,
    pair after pair, each with its prompt's rows in front."""
    rows = response.tolist()
    starts = [i for i, (a, b) in enumerate(pairwise(rows), 1) if a > 0 and a % 2 and a != b]
    ends = [0, *starts, len(rows)]
    spans = data._split_sizes([b - a for a, b in pairwise(ends)], n_rows)
    return [(ends[i], ends[j]) for i, j in spans]


# ---------------------------------------------------------------------------------------------
# A step, and the products of matrices in it.

MM = (torch.ops.aten.mm.default, torch.ops.aten.mm.out)


def one_step(model, pairs, **settings):
    """An update by train.training_step; the arguments are settings of train.TrainConfig."""
    config = train.TrainConfig(**{"lr": 1e-3, "sft_loss": "full", "dtype": "float32"} | settings)
    optimizer = train.make_optimizer(model, config)
    return train.training_step(model, optimizer, train.pack(pairs, config), config)


class Products(TorchDispatchMode):
    """The shapes (n, a, b) of all products of two matrices within it."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in MM:
            self.shapes.append((*args[0].shape, args[1].shape[1]))
        return function(*args, **(kwargs or {}))

    @property
    def operations(self) -> int:
        return sum(2 * n * a * b for n, a, b in self.shapes)


def keys_seen(pairs: list[Pair]) -> int:
    """How many keys all queries of these pairs see together: the prompt's own, and both branches'.

    Prompt and chosen are a triangle of p + c; a rejected token sees the prompt and a triangle of r.
    """
    lengths = (pair.lengths for pair in pairs)
    return sum((p + c) * (p + c + 1) // 2 + r * (r + 1) // 2 + r * p for p, c, r in lengths)
