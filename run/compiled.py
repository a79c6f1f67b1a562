"""torch.compile: two functions of small operations on a GPU, and with --compile whole blocks."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import model as model_module
from attention import has_varlen
from model import Block, Transformer

# What a checkpointed block keeps when it is compiled: the results that are slow to form.
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # without and with a bias
KEPT = [*PRODUCTS, torch.ops.torch_attn._varlen_attn.default]
LARGE = 2**23  # numbers in a tensor, from which on a kernel saves more time than its call takes


def compile_blocks(model: Transformer, sharded: bool = False):
    """Compiles each block, so that what lies between its products becomes a few kernels.

    On a GPU in bfloat16 a block that runs twice then keeps its products and its attention, and
    computes only the rest again, which is nearly free. At 7B that is 91 KiB a token and block;
    `Block.twice` keeps 8, and a block that runs once 131 to 153 and copies of its weights.
    On a CPU, in float32 and with --shard a block keeps its inputs only, as without compilation:
    attention is no part of the compiled function there, or weights are gathered around it.
    """
    selective = keeps_products(model, sharded)
    for i, block in enumerate(model.layers):
        block.compile(dynamic=True)
        if selective and i < model.checkpointed_blocks:
            block.twice = torch.compile(functools.partial(_keep_products, block), dynamic=True)


def keeps_products(model: Transformer, sharded: bool) -> bool:
    """Whether a compiled block that runs twice computes its products once."""
    on_gpu = has_varlen(model.device.type, model.compute_dtype, model.config.head_dim)
    return on_gpu and not sharded


def _keep_products(block: Block, *inputs) -> Tensor:
    # Not `block(...)`, which is compiled by itself: checkpoint must see the operations inside.
    contexts = functools.partial(create_selective_checkpoint_contexts, KEPT)
    return checkpoint(block.forward, *inputs, use_reentrant=False, context_fn=contexts)


def compile_kernels(device: torch.device, softmax: Callable, smallest=LARGE) -> "Kernel | None":
    """On a GPU: one kernel for the rotation of queries and keys, in all models of the process, and
    few for softmax, which is orpo.plain_softmax; returns these. PyTorch's own operations move three
    to five times the bytes. smallest: tensors of fewer numbers go the plain way.

    TORCH_COMPILE_DISABLE=1 leaves both as they are.
    """
    if device.type != "cuda" or torch._dynamo.config.disable:
        return None
    # PyTorch warns that it reads the logits one time more than is necessary.
    warnings.filterwarnings("ignore", r"\s*Online softmax is disabled")
    options = {"compile_threads": 1}  # else PyTorch starts a process for each of the CPU's cores
    compiled = functools.partial(torch.compile, dynamic=False, options=options)
    rotate = model_module._rotate
    model_module.rotation_kernel = Kernel("rotation", compiled(rotate), rotate, smallest)
    return Kernel("softmax", compiled(softmax), softmax, smallest)


class Kernel:
    """`compiled`, for large tensors on a GPU; otherwise `plain`, which computes the same.

    Where compilation fails, at the first call, it says so and stays plain: code for a GPU needs
    Triton, and that a C compiler.
    """

    def __init__(self, name: str, compiled: Callable, plain: Callable, smallest: int, on="cuda"):
        self.name, self.compiled, self.plain = name, compiled, plain
        self.smallest, self.on, self.state = smallest, on, "not used"

    def __call__(self, x: Tensor, *rest):
        # Within a compiled block the plain function becomes part of the block's own kernels.
        if torch.compiler.is_compiling() or self.state == "failed":
            return self.plain(x, *rest)
        if x.device.type != self.on or x.numel() < self.smallest:
            return self.plain(x, *rest)
        try:
            # Detached, as code is compiled for views, and for what has a gradient, by itself.
            given = [y.detach() for y in (x, *rest)]
            for y in given:  # only how many rows there are changes: a kernel that knows the other
                torch._dynamo.mark_dynamic(y, 0)  # sizes can move 16 bytes at a time
            out = self.compiled(*given)
        except Exception as error:
            if self.state == "compiled" or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().partition("\n")[0]
            print(f"kernels  the {self.name} is not compiled: {reason:.300}", flush=True)
            self.state = "failed"
            return self.plain(x, *rest)
        self.state = "compiled"
        return out
