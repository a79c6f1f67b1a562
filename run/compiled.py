"""torch.compile for the blocks of a model, with or without activation checkpointing."""

import functools

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from attention import has_varlen
from model import Block, Transformer

# What a checkpointed block keeps when it is compiled: the results that are slow to form.
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # without and with a bias
KEPT = [*PRODUCTS, torch.ops.torch_attn._varlen_attn.default]


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


def _keep_products(block: Block, *inputs) -> torch.Tensor:
    # Not `block(...)`, which is compiled by itself: checkpoint must see the operations inside.
    contexts = functools.partial(create_selective_checkpoint_contexts, KEPT)
    return checkpoint(block.forward, *inputs, use_reentrant=False, context_fn=contexts)
