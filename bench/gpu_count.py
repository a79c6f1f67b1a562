"""What a training step computes and moves, counted without a card, and the time that it would take.

    python -m bench.gpu_count          needs a CUDA build of PyTorch; a driver may be pretended

Counted on tensors without content, at an H200's rates below: in eager mode, with rotation and
softmax compiled ("eager") and without ("plain"). What comes out is a prediction: `python -m
bench.gpu profile` measures it.
"""

import dataclasses
import os

os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"  # a pretended driver has no others

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import orpo
import train
from bench.gpu import KINDS, LENGTHS, SHAPES, Variant, kind_of, random_pairs
from model import Transformer
from run.compiled import LARGE
from run.flags import TrainConfig
from run.plan import step_flops

COUNTED = [
    Variant("6.7B", "plain, all recomputed", 8192, twice=32, kernels=False),
    Variant("6.7B", "eager, all recomputed", 8192, twice=32),
    Variant("6.7B", "plain, none recomputed", 4096, kernels=False),
    Variant("6.7B", "eager, none recomputed", 4096),
    Variant("1.1B", "plain", 16384, kernels=False),
    Variant("1.1B", "eager", 16384),
]

# A second, assumed: of an H200's data sheet 80%, 35% and 90%.
PRODUCTS, ATTENTION, BYTES = 790e12, 350e12, 4.3e12


class Traffic(TorchDispatchMode):
    """What the operations within it compute and move, by kind: each reads its tensors, and writes
    what it returns. A view costs nothing, and what fits a cache is counted as if it did not."""

    def __init__(self):
        super().__init__()
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.gigabytes = dict.fromkeys(self.seconds, 0.0)
        self.operations = {}  # name: calls, gigabytes
        self.in_kernel = False  # what happens within one is not counted by itself

    def kernel(self, function, n_bytes):
        """`function` as what torch.compile makes of it, which moves n_bytes(result, *arguments)."""

        def call(*args):
            if args[0].numel() < LARGE:
                return function(*args)
            self.in_kernel = True
            out = function(*args)
            self.in_kernel = False
            moved = n_bytes(out, *args)
            self.add("elementwise", function.__name__, moved / BYTES, moved)
            return out

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.in_kernel:
            return out
        name, is_view = function._schema.name, function.is_view
        inputs = [x for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)]
        outputs = [x for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)]
        made = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::detach")
        if is_view or not inputs or name in made or name.startswith("prim::"):
            return out
        kind = kind_of(name.removeprefix("aten::").removeprefix("torch_attn::"))
        written = outputs or inputs  # without a result it is in place
        n_bytes = sum(x.nbytes for x in (*inputs, *written))
        if name in ("aten::index_select", "aten::embedding"):  # reads the rows that it takes
            n_bytes = 2 * sum(x.nbytes for x in outputs)
        seconds = n_bytes / BYTES
        if name in ("aten::mm", "aten::addmm"):
            a, b = [x for x in inputs if x.dim() == 2][-2:]
            seconds = max(seconds, 2 * a.shape[0] * a.shape[1] * b.shape[1] / PRODUCTS)
        self.add(kind, name.removeprefix("aten::"), seconds, n_bytes)
        return out

    def add(self, kind: str, name: str, seconds: float, n_bytes: int):
        self.seconds[kind] += seconds
        self.gigabytes[kind] += n_bytes / 1e9
        operation = self.operations.setdefault(name, [0, 0.0])
        operation[0] += 1
        operation[1] += n_bytes / 1e9


def count_step(variant: Variant):
    """Prints what a step computes and moves, and the time that it takes at the rates above."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("cuda")
    torch.Tensor.pin_memory = lambda x: x  # tensors without content cannot be pinned
    shape, n_pairs = SHAPES[variant.shape]
    shape = dataclasses.replace(shape)  # a copy, which is changed below
    config = TrainConfig(dtype="bfloat16", micro_batch_tokens=variant.tokens)
    pairs = random_pairs(n_pairs, LENGTHS, shape.vocab_size, seed=2)
    batches = train.pack(pairs, config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            model = Transformer(shape)
        model.compute_dtype, model.checkpointed_blocks = torch.bfloat16, variant.twice
        optimizer = train.make_optimizer(model, config)
        train.training_step(model, optimizer, batches[:1], config)  # makes Adam's moments
        traffic = Traffic()
        orpo.softmax_kernel = model_module.rotation_kernel = None
        if variant.kernels:
            model_module.rotation_kernel = traffic.kernel(
                model_module._rotate, lambda out, *inputs: sum(x.nbytes for x in (out, *inputs))
            )
            # Read for the largest, for the sum and for the result, which takes their place.
            orpo.softmax_kernel = traffic.kernel(
                orpo.plain_softmax, lambda _, logits, __: 4 * logits.nbytes
            )
        with traffic:
            train.training_step(model, optimizer, batches, config)
        needed = step_flops(model, pairs, config)
        model.config.head_dim = 0  # what is left of the operations is without attention
        attention = needed - step_flops(model, pairs, config)
    # Of attention's three parts the forward pass is one. Where blocks run twice it comes again, and
    # the backward pass of a Flash kernel computes the scores again, half a forward pass.
    attention *= 3.5 / 3 + variant.twice / shape.n_layers / 3
    traffic.seconds["attention"] = attention / ATTENTION
    total = sum(traffic.seconds.values())
    print(f"{variant.shape}, {variant.name}, micro-batches of {variant.tokens}: counted")
    for kind, seconds in traffic.seconds.items():
        moved = traffic.gigabytes[kind]
        print(f"{kind:<12} {moved:>9.0f} GB {1000 * seconds:>9.1f} ms {seconds / total:>6.1%}")
    print("the ten operations that move the most:")
    for name, (n, moved) in sorted(traffic.operations.items(), key=lambda x: -x[1][1])[:10]:
        print(f"{name:<32} {n:>6} times {moved:>9.0f} GB {1000 * moved * 1e9 / BYTES:>9.1f} ms")
    mfu = needed / total / 989e12
    print(f"{'together':<12} {'':>12} {1000 * total:>9.1f} ms, MFU at most {mfu:.1%}")


if __name__ == "__main__":
    for counted in COUNTED:
        count_step(counted)
