"""One update: gradients of all micro-batches, clipping, and AdamW as its authors write it."""

import math

import pytest
import torch

import train
from model import trainable
from tests.small import some_pairs, tiny


def sharp(dtype: torch.dtype) -> torch.nn.Module:
    """`tiny` with norms and biases that are not all alike, and its parameters in dtype."""
    model = tiny(dtype, layer_norm=True, o_bias=True, mlp_bias=True, qkv_bias=True).to(dtype)
    with torch.no_grad():
        for p in trainable(model):
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def adamw(p, gradients, lr, beta1, beta2, eps, decay):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2: one update after another."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * decay * p - lr * m_hat / (v_hat.sqrt() + eps)
    return p


SETTINGS = [
    {},
    {"adam_beta1": 0.5},
    {"adam_beta2": 0.9},
    {"weight_decay": 0.1},
    {"grad_clip": 0.3},
    {"grad_clip": 0.0},  # off
    {"grad_clip": 1e-6},  # gradients near AdamW's eps of 1e-8
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_three_updates_are_clipped_adamw_by_the_formula(settings):
    """In float64. Matrices decay, and norms and biases do not."""
    model, pairs = sharp(torch.float64), some_pairs(6, seed=1)
    config = train.TrainConfig(lr=1e-2, lam=0.5, dtype="float32", micro_batch_tokens=60, **settings)
    optimizer = train.make_optimizer(model, config)
    start = [p.detach().clone() for p in model.parameters()]
    clipped = [[] for _ in start]
    for i in range(3):
        batches = train.pack(pairs[2 * i :][:2], config)
        sum(train.forward(model, batch, 0.5).loss for batch in batches).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        assert norm > 1  # so that it is clipped by default
        scale = min(1, (config.grad_clip or math.inf) / (norm + 1e-6))  # as PyTorch's
        for found, p in zip(clipped, model.parameters(), strict=True):
            found.append(scale * p.grad)
        model.zero_grad()
        _, grad_norm = train.training_step(model, optimizer, batches, config)
        assert float(grad_norm) == pytest.approx(norm, rel=1e-9)
    betas = settings.get("adam_beta1", 0.9), settings.get("adam_beta2", 0.999)
    for (name, p), first, gradients in zip(model.named_parameters(), start, clipped, strict=True):
        decay = settings.get("weight_decay", 0.0) if p.dim() == 2 else 0.0
        wanted = adamw(first, gradients, 1e-2, *betas, 1e-8, decay)
        torch.testing.assert_close(p, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_in_bfloat16_every_micro_batch_counts_once():
    """The gradient that an update took in, read from AdamW's first moment: cut or not, the same."""
    pairs, gradients = some_pairs(6, seed=5), []
    settings = {"dtype": "bfloat16", "sft_loss": "full", "grad_clip": 0.0}
    for budget in (10**9, 64):
        config = train.TrainConfig(micro_batch_tokens=budget, **settings)
        model, batches = tiny(torch.bfloat16), train.pack(pairs, config)
        optimizer = train.make_optimizer(model, config)
        train.training_step(model, optimizer, batches, config)
        moments = (optimizer.state[p]["exp_avg"] for p in model.parameters())
        gradients.append(torch.cat([10 * x.flatten() for x in moments]))  # m = (1 - beta1) g
    whole, cut = gradients
    assert len(batches) > 2
    assert (whole - cut).norm() < 0.03 * whole.norm()  # a micro-batch is a sixth or more
