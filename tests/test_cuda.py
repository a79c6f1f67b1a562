"""The CUDA path against float64 on the CPU. Skipped without a GPU; `bench/gpu.sh` runs it."""

import json

import pytest
import torch

import model as model_module
import orpo
from bench.gpu import COMPARED, gradients
from model import ModelConfig, Transformer
from run.compiled import compile_kernels
from tests.small import packed, plain

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Rotation and softmax are plain, unless a test compiles them, and are so again afterwards."""
    monkeypatch.setattr(orpo, "softmax_kernel", None)
    monkeypatch.setattr(model_module, "rotation_kernel", None)


@pytest.mark.parametrize(("name", "arguments", "bound"), COMPARED, ids=[v[0] for v in COMPARED])
def test_gradients_equal_float64_on_the_cpu(name, arguments, bound):
    if arguments[0] == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    loss, reference = gradients("cpu", torch.float64)
    value, grads = gradients(*arguments)
    assert abs(value / loss - 1) < bound
    assert (grads - reference).norm() / reference.norm() < bound


@needs_cuda
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_does_not_make_the_host_wait(checkpointing):
    """A whole update, of several micro-batches, queues its work and never synchronises."""
    from bench.gpu import SMALL, random_pairs
    from train import TrainConfig, make_optimizer, pack, training_step

    device, config = torch.device("cuda"), TrainConfig(dtype="bfloat16", micro_batch_tokens=64)
    model = Transformer(SMALL).to(device)
    model.compute_dtype, model.checkpointed_blocks = torch.bfloat16, 3 * checkpointing
    optimizer = make_optimizer(model, config)
    pairs = random_pairs(6, (9, 9, 9), 100, seed=3)
    batches = pack(pairs, config)
    training_step(model, optimizer, batches, config)  # the first call sets kernels up
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(model, optimizer, batches, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_compiled_blocks_compute_the_same_and_are_compiled_once():
    from bench.gpu import SMALL, random_pairs
    from train import TrainConfig, forward, pack

    device, config = torch.device("cuda"), TrainConfig(dtype="bfloat16")
    torch.manual_seed(0)
    model = Transformer(SMALL).to(device)
    model.compute_dtype = torch.bfloat16

    def gradients_of(seed):
        model.zero_grad()
        pairs = random_pairs(6, (20, 30, 25), SMALL.vocab_size, seed)
        for batch in pack(pairs, config):
            forward(model, batch, 0.5).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = [gradients_of(seed) for seed in range(5)]
    for block in model.layers:
        block.compile(dynamic=True)
    gradients_of(0), gradients_of(1)
    try:
        torch._dynamo.config.error_on_recompile = True
        for seed in (2, 3, 4):
            wanted = expected[seed]
            assert (gradients_of(seed) - wanted).norm() / wanted.norm() < 3e-2
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_rotation_and_softmax_compute_the_same(dtype):
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    orpo.softmax_kernel = compile_kernels(device, orpo.plain_softmax, smallest=0)

    def random(*shape):
        return torch.randn(shape, device=device, generator=generator)

    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    for n, vocab_size, n_heads in ((700, 1000, 8), (33, 1003, 2)):
        wanted = (30 * random(n, vocab_size)).to(dtype)
        got, targets = wanted.clone(), (random(n).abs() * vocab_size / 9).long()
        expected = orpo._softmax_of_rows(wanted, targets)
        log_odds = orpo.softmax_kernel(got, targets)
        torch.testing.assert_close(log_odds, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, wanted, **tolerance)
        x, cos, sin = random(n, n_heads, 64).to(dtype), random(n, 1, 32), random(n, 1, 32)
        turned = model_module.rotation_kernel(x, cos, sin)
        torch.testing.assert_close(turned, model_module._rotate(x, cos, sin), **tolerance)
    assert orpo.softmax_kernel.state == model_module.rotation_kernel.state == "compiled"


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_generation_equals_recomputing(dtype):
    torch.manual_seed(0)
    config = ModelConfig(100, 64, 2, 4, 96, n_kv_heads=2, max_seq_len=64)
    model = Transformer(config).to("cuda", dtype)
    prompts = [torch.randint(0, 100, (n,)).tolist() for n in (7, 1, 16)]
    for prompt, new in zip(prompts, model.generate(prompts, 12), strict=True):
        logits = model(torch.tensor([prompt + new], device="cuda"))[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(-1, torch.tensor(new, device="cuda")[:, None]).squeeze(-1)
        # bf16 rounds cached and recomputed states apart: the pick must be the best within rounding
        assert (logits.amax(-1) - chosen).max() < (1e-4 if dtype == torch.float32 else 5e-2)


@needs_cuda
def test_an_answer_ends_behind_eos_as_on_the_cpu():
    """Although the host looks only after every eighth token: nothing behind EOS is returned."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(20, 64, 2, 4, 96, max_seq_len=64))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() == 2 else 1)  # no two logits are nearly equal
    prompts = [torch.randint(0, 20, (n,)).tolist() for n in (7, 1, 16, 3)]
    lengths = set()
    for eos_id in range(20):
        wanted = model.to("cpu").generate(prompts, 30, eos_id=eos_id)
        assert model.to("cuda").generate(prompts, 30, eos_id=eos_id) == wanted
        lengths |= {len(row) for row in wanted}
    assert any(n % 8 for n in lengths - {30}), "no answer ends between two looks"


@needs_cuda
def test_packed_equals_separate_with_varlen_attn():
    torch.manual_seed(0)
    config = ModelConfig(100, 128, 2, 4, 96, n_kv_heads=2, head_dim=32)
    model = Transformer(config).to("cuda", torch.bfloat16)
    p, c, r = (torch.randint(0, 100, (n,), device="cuda") for n in (5, 7, 4))
    at = torch.arange(12, device="cuda")
    together = model.hidden_states(
        torch.cat((p, c, r)), torch.cat((at, at[5:9])), packed([(5, 7, 4)], "cuda")
    )
    for tokens, rows in ((torch.cat((p, c)), together[:12]), (torch.cat((p, r)), together[12:])):
        alone = plain(1, len(tokens), len(tokens), "cuda")
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
