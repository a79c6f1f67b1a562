"""One training step of a model from tests/models.py, and the products of matrices in it."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train

MM = (torch.ops.aten.mm.default, torch.ops.aten.mm.out)


def some_pairs(n: int, seed: int, longest: int = 20) -> list[data.Pair]:
    """n pairs of random lengths and tokens for `tiny`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, (n, 3))
    return [data.Pair(*(rng.integers(0, 211, k).tolist() for k in row)) for row in lengths]


def one_step(model, pairs, **settings):
    """An update by train.training_step; the arguments are settings of train.TrainConfig."""
    config = train.TrainConfig(**{"lr": 1e-3, "sft_loss": "full", "dtype": "float32"} | settings)
    optimizer = train.make_optimizer(model, config)
    return train.training_step(model, optimizer, train.micro_batches(pairs, config), config)


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


def keys_seen(pairs: list[data.Pair]) -> int:
    """How many keys all queries of these pairs see together: the prompt's own, and both branches'.

    Prompt and chosen are a triangle of p + c; a rejected token sees the prompt and a triangle of r.
    """
    lengths = (pair.lengths for pair in pairs)
    return sum((p + c) * (p + c + 1) // 2 + r * (r + 1) // 2 + r * p for p, c, r in lengths)
