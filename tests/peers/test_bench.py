"""What bench/peers.py compares: all of its programs multiply in the dtype that the table names."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small import random_pairs, tokens

from . import tiny

peer = pytest.importorskip(f"{__package__}.trl_orpo")
transformers = pytest.importorskip("transformers")
pytest.importorskip("liger_kernel.chunked_loss")

from bench.peers import with_liger

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class Products(TorchDispatchMode):
    """The operations and dtypes of the matrix products within, both passes: {dtype: operations}."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            a, b = args[-2:]
            dtype, n = a.dtype, a.numel() * b.shape[-1]
            self.found[dtype] = self.found.get(dtype, 0) + n
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("Trainer", [peer.OnIds, with_liger(peer.OnIds)], ids=["TRL", "Liger"])
def test_products_are_in_the_dtype_that_is_named(Trainer, bf16, tmp_path):
    tiny.random_llama(tmp_path, vocab_size=tiny.train_sentencepiece(tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    pairs = [tokens(pair) for pair in random_pairs([(9, 7, 5)] * 4, vocab_size=100)]
    settings = {"out": tmp_path / "out", "trainer": Trainer, "bf16": bf16, "max_steps": 1}
    trainer = peer.make_trainer(model, pairs, per_device_train_batch_size=4, **settings)
    before = copy.deepcopy(model.state_dict())
    with Products() as products:
        trainer.train()
    assert any((before[name] != p).any() for name, p in model.state_dict().items())
    # Rotary angles are a product in float32 everywhere.
    named = products.found[torch.bfloat16 if bf16 else torch.float32]
    assert named > 0.99 * sum(products.found.values()) > 1e6
