"""The CUDA path against float64 on the CPU. Skipped without a GPU; `bench/gpu.sh` runs it."""

import json

import pytest
import torch

from bench.gpu import VARIANTS, gradients
from model import ModelConfig, Segments, Transformer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(("name", "arguments", "bound"), VARIANTS, ids=[v[0] for v in VARIANTS])
def test_gradients_equal_float64_on_the_cpu(name, arguments, bound):
    if arguments[0] == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    loss, reference = gradients("cpu", torch.float64)
    value, grads = gradients(*arguments)
    assert abs(value / loss - 1) < bound
    assert (grads - reference).norm() / reference.norm() < bound


@needs_cuda
def test_a_micro_batch_does_not_make_the_host_wait():
    """Forward and backward queue work and never synchronise (moving inputs is pinned)."""
    import data
    from bench.gpu import SMALL, random_pairs
    from train import forward

    device = torch.device("cuda")
    model = Transformer(SMALL).to(device)
    model.compute_dtype = torch.bfloat16
    (batch,) = data.micro_batches(random_pairs(4, (9, 9, 9), 100, seed=3), 10**9, "response")
    forward(model, batch, 0.1, 4, device).loss.backward()  # the first call sets kernels up
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(model, batch, 0.1, 4, device).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_generation_equals_recomputing(dtype):
    torch.manual_seed(0)
    config = ModelConfig(100, 64, 2, 4, 96, n_kv_heads=2, max_seq_len=64)
    model = Transformer(config).to("cuda", dtype)
    tokens = torch.randint(0, 100, (3, 7), device="cuda")
    out = model.generate(tokens, 12)
    logits = model(out)[:, 6:-1].float()
    chosen = logits.gather(-1, out[:, 7:, None]).squeeze(-1)
    # bf16 rounds cached and recomputed states apart: the pick must be the best within rounding
    assert (logits.amax(-1) - chosen).max() < (1e-4 if dtype == torch.float32 else 5e-2)


@needs_cuda
def test_packed_equals_separate_with_varlen_attn():
    torch.manual_seed(0)
    config = ModelConfig(100, 128, 2, 4, 96, n_kv_heads=2, head_dim=32)
    model = Transformer(config).to("cuda", torch.bfloat16)
    p, c, r = (torch.randint(0, 100, (n,), device="cuda") for n in (5, 7, 4))
    at = torch.arange(12, device="cuda")
    packed = model.hidden_states(
        torch.cat((p, c, r)), torch.cat((at, at[5:9])), Segments.packed([(5, 7, 4)], "cuda")
    )
    for tokens, rows in ((torch.cat((p, c)), packed[:12]), (torch.cat((p, r)), packed[12:])):
        alone = Segments.plain(1, len(tokens), len(tokens), "cuda")
        states = model.hidden_states(tokens, at[: len(tokens)], alone)[-len(rows) :]
        assert (states - rows).abs().max() < 5e-2


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_built_in_job_starts_on_cuda_as_on_the_cpu(tmp_path, dtype):
    import train

    losses = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        train.main(["--device", device, "--dtype", dtype, "--max-steps", "3", "--out", str(out)])
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses[device] = [row["loss"] for row in rows if "loss" in row]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)
