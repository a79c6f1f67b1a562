"""What makes a step cheap: operations, tensors and shapes are counted; no clock is read."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as model_module
import orpo
import train
from attention import _pad_segments
from run.compiled import Kernel, compile_kernels
from run.plan import step_flops
from tests.small import Products, keys_seen, one_step, packed, some_pairs, tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("sft_loss", ["response", "full"])
@pytest.mark.parametrize("budget", [10**9, 60])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("embed_dim", [32, 24])
def test_a_step_does_the_operations_that_the_formula_counts(
    sft_loss, budget, checkpointing, embed_dim
):
    model, pairs = tiny(embed_dim=embed_dim), some_pairs(7, seed=1)
    model.checkpointed_blocks = 2 * checkpointing
    settings = {"sft_loss": sft_loss, "micro_batch_tokens": budget}
    with Products() as products:
        one_step(model, pairs, **settings)
    attention = 12 * model.config.n_layers * model.config.dim * keys_seen(pairs)
    again = 0
    if checkpointing:  # the blocks' forward pass but for its last product, which nothing needs
        weights = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
        weights -= sum(block.mlp.down_proj.weight.numel() for block in model.layers)
        again = 2 * weights * sum(pair.n_tokens for pair in pairs)
    needed = step_flops(model, pairs, train.TrainConfig(**settings))
    assert products.operations == needed - attention + again


@pytest.mark.parametrize("head_dim", [8, 12])  # of four heads, in a model of width 32
def test_attention_counts_the_keys_that_a_query_sees(head_dim):
    pairs = some_pairs(5, seed=2)
    lengths = [pair.lengths for pair in pairs]
    for windows in ([None, None], [4, None], [4, 7]):
        model = tiny(windows=windows, head_dim=head_dim)
        segments = packed(lengths)
        keys = 0
        for window in windows:
            padded = _pad_segments(segments.lengths, window, CPU, torch.float32, True)
            seen = torch.cat([(bias == 0).sum(-1).flatten() for bias in padded.biases])
            keys += int(seen[padded.q_rows].sum())
        counted = model.training_flops(lengths, 0)
        weights = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
        assert counted - 6 * weights * sum(map(sum, lengths)) == 12 * 4 * head_dim * keys


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_each_prompt_is_computed_once(sft_loss):
    model, pairs = tiny(), some_pairs(6, seed=3)
    with Products() as products:
        one_step(model, pairs, sft_loss=sft_loss)
    rows = [n for n, a, b in products.shapes if b == 48 and a == 32 and n != 48]
    # In each layer gate and up forward, and down backward.
    assert rows == [sum(pair.n_tokens for pair in pairs)] * 6


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_lm_head_is_applied_only_where_a_prediction_counts(sft_loss):
    model, pairs = tiny(), some_pairs(6, seed=3)
    with Products() as products:
        one_step(model, pairs, sft_loss=sft_loss)
    (batch,) = data.micro_batches(pairs, 10**9, sft_loss)
    assert bool(((batch.nll_weight != 0) | (batch.response >= 0)).all())
    assert [n for n, _, b in products.shapes if b == 211] == [len(batch.predict)]


def test_no_tensor_of_tokens_by_vocabulary_outlives_the_forward_pass():
    model, pairs = tiny(vocab_size=5003), some_pairs(6, seed=4)
    (batch,) = data.micro_batches(pairs, 10**9, "full")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output = train.forward(model, batch, 0.1)
    alive = kept + [x for x in gc.get_objects() if type(x) is torch.Tensor]
    logits = len(batch.predict) * 5003
    assert len(batch.predict) > 32  # so that lm_head's own gradient is smaller
    assert max(x.numel() for x in alive) < logits
    assert max(x.numel() for x in kept) == 5003 * 32  # that gradient, ready since the forward pass
    output.loss.backward()


def test_bfloat16_logits_are_float32_a_few_rows_at_a_time():
    class Largest(TorchDispatchMode):
        n = dict.fromkeys((torch.float32, torch.bfloat16), 0)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype in self.n:
                self.n[out.dtype] = max(self.n[out.dtype], out.numel())
            return out

    vocab_size = 2**16
    model, pairs = tiny(torch.bfloat16, vocab_size=vocab_size), some_pairs(6, seed=4)
    (batch,) = data.micro_batches(pairs, 10**9, "full")
    with Largest() as largest:
        train.forward(model, batch, 0.1).loss.backward()
    logits = len(batch.predict) * vocab_size
    assert largest.n[torch.bfloat16] == logits
    assert largest.n[torch.float32] == 32 * vocab_size < logits  # lm_head's gradient


def test_in_bfloat16_the_shapes_of_products_are_few():
    seen = set()
    for seed in range(12):
        with Products() as products:
            one_step(tiny(torch.bfloat16), some_pairs(5, seed), dtype="bfloat16")
        seen |= set(products.shapes)
    rows = {n for n, a, b in seen if (a, b) == (32, 48)}
    assert rows <= {64, 128, 192, 256, 320}, rows
    assert len(seen) <= 12 * len(rows)  # by layer and not by step


def test_padding_to_a_multiple_changes_neither_loss_nor_gradients():
    model, pairs = tiny(torch.float64).double(), some_pairs(5, seed=0)
    results = []
    for multiple in (1, 64):
        model.zero_grad()
        (batch,) = data.micro_batches(pairs, 10**9, "full", multiple)
        output = train.forward(model, batch, 0.1)
        output.loss.backward()
        results.append((output.loss, *(p.grad for p in model.parameters())))
    assert len(batch.tokens) % 64 == 0 == len(batch.predict) % 64
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)


def test_bfloat16_gradients_of_micro_batches_add_up_in_float32():
    """Those of each micro-batch alone, rounded as bfloat16 rounds them, and their float32 sum."""
    model, config = tiny(torch.bfloat16), train.TrainConfig(dtype="bfloat16", micro_batch_tokens=64)
    batches = train.pack(some_pairs(6, 5), config)
    assert len(batches) > 2
    wanted = 0
    for batch in batches:
        train.forward(model, batch, 0.1).loss.backward()
        wanted = wanted + torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
    for batch in batches:
        train.forward(model, batch, 0.1).loss.backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert {p.dtype for p in model.parameters()} == {got.dtype} == {torch.float32}
    assert (got - wanted).norm() < 1e-6 * wanted.norm()  # in bfloat16: 2e-3
    assert (got.bfloat16() - wanted).norm() > 1e-4 * wanted.norm()


def test_lm_heads_gradient_has_the_digits_of_its_weight():
    """A float32 weight beside hidden states in bfloat16: the groups' products add up unrounded."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 16, generator=rng).bfloat16()
    weight = torch.randn(50, 16, generator=rng, requires_grad=True)
    targets, response = (
        torch.randint(50, (24,), generator=rng),
        torch.arange(4).repeat_interleave(6),
    )
    groups = [(0, 12), (12, 24)]
    orpo.fused_linear_orpo(
        hidden, weight, targets, response, torch.full((24,), 1 / 24), 0.1, 2, groups=groups
    ).loss.backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad.bfloat16() - weight.grad).norm() > 1e-4 * weight.grad.norm()


COMPILED = [pytest.param("blocks", marks=pytest.mark.slow), "checkpointed blocks", "rotation"]


@pytest.mark.parametrize("what", COMPILED)
def test_what_is_compiled_is_compiled_once_for_all_lengths(what, monkeypatch):
    model, config = tiny(), train.TrainConfig(dtype="float32", sft_loss="full")
    model.checkpointed_blocks = 2 * (what == "checkpointed blocks")

    def gradients(pairs):
        model.zero_grad()
        for batch in train.pack(pairs, config):
            train.forward(model, batch, 0.1).loss.backward()
        return [p.grad for p in model.parameters()]

    steps = [some_pairs(4, seed) for seed in range(6)]
    expected = [gradients(pairs) for pairs in steps]
    torch._dynamo.reset()
    rotate = torch.compile(model_module._rotate, dynamic=False, backend="aot_eager")
    # A token of generation has fewer numbers than 50.
    kernel = Kernel("rotation", rotate, model_module._rotate, smallest=50, on="cpu")
    monkeypatch.setattr(model_module, "rotation_kernel", kernel)
    if what != "rotation":  # blocks take the plain rotation in
        for block in model.layers:
            block.compile(dynamic=True, backend="aot_eager")
    gradients(steps[0]), gradients(steps[1])
    try:
        torch._dynamo.config.error_on_recompile = True
        for pairs, wanted in zip(steps[2:], expected[2:], strict=True):
            torch.testing.assert_close(gradients(pairs), wanted)
        assert kernel.state == ("compiled" if what == "rotation" else "not used")
        assert len(model.generate([[1, 2, 3]], 4)[0]) == 4
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(orpo, "softmax_kernel", None)
    monkeypatch.setattr(model_module, "rotation_kernel", None)


def failing(*_):
    raise RuntimeError("Failed to find C compiler.\nSet CC.")


def test_what_cannot_be_compiled_runs_as_it_is(capsys):
    kernel = Kernel("softmax", failing, orpo.plain_softmax, smallest=8, on="cpu")
    logits, targets = torch.randn(4, 8), torch.arange(4)
    wanted, others = logits.clone(), logits.clone()
    expected = orpo.plain_softmax(wanted, targets)
    for x in (logits, others):
        assert torch.equal(kernel(x, targets), expected) and torch.equal(x, wanted)
    said = "kernels  the softmax is not compiled: Failed to find C compiler.\n"
    assert capsys.readouterr().out == said  # once


def test_an_error_of_something_that_ran_before_is_an_error(capsys):
    outcomes = [torch.ones(3), RuntimeError("a fault of the card")]
    kernel = Kernel("rotation", lambda *_: give(outcomes.pop(0)), failing, smallest=1, on="cpu")
    assert kernel(torch.zeros(3)).sum() == 3
    with pytest.raises(RuntimeError, match="a fault of the card"):
        kernel(torch.zeros(3))
    kernel = Kernel("rotation", lambda *_: give(torch.OutOfMemoryError()), failing, 1, "cpu")
    with pytest.raises(torch.OutOfMemoryError):  # there is advice for it, and it is no fallback's
        kernel(torch.zeros(3))
    assert capsys.readouterr().out == ""


def give(outcome):
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def test_only_large_tensors_on_a_gpu_are_for_what_is_compiled(no_kernels, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: function.__name__)
    orpo.softmax_kernel = compile_kernels(torch.device("cuda"), orpo.plain_softmax, smallest=32)
    with FakeTensorMode():
        x = torch.zeros(4, 8, device="cuda")
        assert orpo._softmax_of_others(x, x) == "plain_softmax"
        assert model_module.rotation_kernel(x, x, x) == "_rotate"
    one = torch.ones(2, 4, 1, 4)
    assert model_module.rotation_kernel(torch.ones(4, 1, 8), *one).sum() == 32
    monkeypatch.setattr(orpo.softmax_kernel, "on", "cpu")
    assert orpo._softmax_of_others(torch.ones(4, 7), torch.zeros(4, dtype=int)).shape == (4,)


@pytest.mark.parametrize(("device", "off"), [("cuda", True), ("cpu", False)])
def test_a_cpu_and_compilation_that_is_off_keep_the_plain_operations(no_kernels, device, off):
    """Off by TORCH_COMPILE_DISABLE."""
    with torch._dynamo.config.patch(disable=off):
        assert compile_kernels(torch.device(device), orpo.plain_softmax) is None
    assert model_module.rotation_kernel is None
