"""The transformer against a few plain loops and a real checkpoint; what runs in which dtype."""

import json

import pytest
import torch

from model import ApplyRotary, ModelConfig, Transformer
from tests.small import random_model

# -----------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("head_dim", [6, 9])
def test_the_gradient_of_a_rotation_is_the_rotation_back(head_dim):
    """Of three pairs of dimensions, and of three more that stay; float64 differences."""
    angle = torch.rand(4, 1, 3, dtype=torch.float64) * 6
    x = torch.randn(4, 2, head_dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ApplyRotary.apply(x, angle.cos(), angle.sin()), x)
    turned = ApplyRotary.apply(x, angle.cos(), angle.sin()).detach()
    z = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones_like(angle), angle)
    wanted = torch.cat((z.real, z.imag, x[..., 6:]), -1).detach()
    torch.testing.assert_close(turned, wanted, rtol=0, atol=1e-12)


# -----------------------------------------------------------------------------
# How a new model begins


def test_new_weights_have_gpt_2_s_scale():
    """0.02, and what adds to the residual stream of n layers 0.02 / sqrt(2 n)."""
    torch.manual_seed(0)
    sizes = {"n_heads": 2, "hidden_dim": 96, "qkv_bias": True, "mlp_bias": True}
    model = Transformer(ModelConfig(400, 64, 8, layer_norm=True, **sizes))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.005 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(p.mean().item()) < 0.1 * std
        elif "norm" in name:
            assert (p == name.endswith("weight")).all(), name


# -----------------------------------------------------------------------------
# What sees what


def test_logits_equal_plain_loops():
    """One head and one query at a time, rotary as a product of complex numbers."""
    model = random_model(n_kv_heads=2, rope_theta=100.0, norm_eps=0.1)
    w, c = dict(model.named_parameters()), model.config
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    half = c.head_dim // 2

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]

    def turned(x, position):  # (d,): dimensions i and i + d/2 are one complex number
        angles = position * c.rope_theta ** (-torch.arange(half).double() / half)
        z = torch.complex(x[:half], x[half:]) * torch.exp(1j * angles)
        return torch.cat((z.real, z.imag))

    x = w["embed_tokens.weight"][tokens]
    for i in range(c.n_layers):
        at = f"layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (h @ w[f"{at}.self_attn.{n}_proj.weight"].T).split(c.head_dim, dim=-1) for n in "qkv"
        )
        rows = []
        for t in range(len(tokens)):
            row = []
            for head in range(c.n_heads):
                shared = head // (c.n_heads // c.n_kv_heads)
                keys = torch.stack([turned(k[shared][s], s) for s in range(t + 1)])
                scores = keys @ turned(q[head][t], t) / c.head_dim**0.5
                row.append(scores.softmax(0) @ v[shared][: t + 1])
            rows.append(torch.cat(row))
        x = x + torch.stack(rows) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (h @ w[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{at}.mlp.down_proj.weight"].T
    wanted = norm(x, "norm") @ w["lm_head.weight"].T
    # rotary angles are float32 also in a float64 model, hence not 1e-12
    torch.testing.assert_close(model(tokens[None])[0], wanted, rtol=0, atol=2e-6)


# -----------------------------------------------------------------------------
# A real checkpoint


@pytest.fixture(scope="module")
def stories(shared):
    """What transformers gives in float32, and our tokens and the logits that predict the new."""
    expected = json.loads((shared / "stories260K" / "expected.json").read_text())
    model = Transformer.from_pretrained(shared / "stories260K")
    assert not model.training and model.config.max_seq_len == 512
    prompt = expected["prompt_ids"]
    (new,) = model.generate([prompt], len(expected["greedy_ids"]))
    with torch.no_grad():
        return expected, new, model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]


def test_stories260k_gives_the_expected_text(stories):
    """The best two logits are 0.07 apart or more."""
    expected, new, _ = stories
    assert new == expected["greedy_ids"]


def test_stories260k_gives_the_expected_logits(stories):
    expected, _, logits = stories
    top = logits[0].topk(5)
    assert top.indices.tolist() == expected["first_top5"]["ids"]
    wanted = torch.tensor(expected["first_top5"]["logits"])
    torch.testing.assert_close(top.values, wanted, rtol=0, atol=1e-4)  # four digits are given


def test_stories260k_gives_the_expected_log_probabilities(stories):
    expected, _, logits = stories
    new = torch.tensor(expected["greedy_ids"])[:, None]
    logps = logits.log_softmax(-1).gather(-1, new).squeeze(1)
    wanted = torch.tensor(expected["greedy_logps"])
    torch.testing.assert_close(logps, wanted, rtol=0, atol=3e-5)  # five digits are given


# -----------------------------------------------------------------------------
# dtypes


def test_bfloat16_compute_leaves_the_parameters_in_float32(in_bfloat16):
    assert in_bfloat16(torch.arange(5)[None]).dtype == torch.bfloat16
    assert {p.dtype for p in in_bfloat16.parameters()} == {torch.float32}


def test_norms_are_float32_inside():
    """3e5 squared is beyond float16's range and 1e-5 squared below it."""
    norm = random_model().norm
    with torch.no_grad():
        norm.weight.fill_(1)
    for size in (3e4, 1.0):
        got = norm(torch.full((1, 16), size, dtype=torch.float16))
        assert torch.equal(got, torch.ones(1, 16, dtype=torch.float16))
