"""Every line of the CUDA path on tensors without content: shapes, dtypes, devices, autograd.

FakeTensorMode runs an operation's shape rules and no kernel, and raises where the host would wait
for a number of the device. It needs a CUDA build of PyTorch that sees a device; a driver that
computes nothing will do. tests/test_cuda.py holds the numbers, on a real card.
"""

import os
import socket
import subprocess
import sys

# Not expandable ones, which a pretended driver does not have. Before CUDA is first used.
os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as model_module
import orpo
import train
from formats.families import FAMILIES, GPT
from model import ModelConfig, Transformer
from run import processes
from run.compiled import compile_blocks, compile_kernels
from run.flags import TrainConfig
from run.log import n_updates
from run.lora import add_lora
from run.processes import pick_device, resharded, shard
from tests.small import random_pairs

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this PyTorch sees no CUDA device, real or pretended"
)


@pytest.fixture
def kernels(monkeypatch):
    """Rotation and softmax are as they were, afterwards."""
    monkeypatch.setattr(orpo, "softmax_kernel", None)
    monkeypatch.setattr(model_module, "rotation_kernel", None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of torchrun's only process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
    environment |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("given", [None, "cuda", "cuda:0"])
def test_one_process_picks_a_card_with_its_index(given):
    config = TrainConfig(device=given)
    assert pick_device(config) == torch.device("cuda", 0)
    assert (config.device, config.dtype) == ("cuda:0", "bfloat16")
    assert torch.cuda.current_device() == 0


def test_a_card_before_ampere_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    config = TrainConfig()
    pick_device(config)
    assert config.dtype == "float32"
    with pytest.raises(ValueError, match="bfloat16: cuda:0 is a GPU without it; use --dtype float"):
        pick_device(TrainConfig(dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_given_stays(dtype):
    config = TrainConfig(dtype=dtype)
    pick_device(config)
    assert config.dtype == dtype


def test_the_cpu_can_be_asked_for_where_there_is_a_card():
    config = TrainConfig(device="cpu")
    assert pick_device(config) == torch.device("cpu")
    assert config.dtype == "float32"


@pytest.mark.parametrize("given", [None, "cuda"])
@pytest.mark.parametrize("shard", [False, True])
def test_a_process_of_torchrun_picks_its_own_card(torchrun, given, shard):
    config = TrainConfig(device=given, shard=shard)
    assert pick_device(config) == torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    assert dist.get_backend_config() == "cpu:gloo,cuda:nccl"


def test_a_process_of_torchrun_does_not_pick_another_ones_card(torchrun):
    with pytest.raises(ValueError, match="torchrun gives each process its own"):
        pick_device(TrainConfig(device="cuda:0"))


def test_a_card_that_is_not_there_is_refused(torchrun, monkeypatch):
    n = torch.cuda.device_count()
    monkeypatch.setenv("LOCAL_RANK", str(n))
    with pytest.raises(ValueError, match=rf"local rank {n}\): this machine shows {n} CUDA"):
        pick_device(TrainConfig())
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match=f"--device cuda:{n}: this machine shows {n} CUDA"):
        pick_device(TrainConfig(device=f"cuda:{n}"))


# ---------------------------------------------------------------------------------------------
# A training step.

CUDA = torch.device("cuda", 0)
SMALL = ModelConfig(1000, 256, 3, 8, 512, n_kv_heads=2, head_dim=64, max_seq_len=512)
VARLEN, VARLEN_BACKWARD = "torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"


class Calls(TorchDispatchMode):
    """Counts the operations within it by name, and keeps the strides of products into a buffer."""

    def __init__(self):
        super().__init__()
        self.n, self.strides = {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.n[name] = self.n.get(name, 0) + 1
        if function is torch.ops.aten.mm.out:
            self.strides.append(kwargs["out"].stride())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake(monkeypatch):
    """FakeTensorMode. It has no pinned memory, so copies to the device are plain ones."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    return FakeTensorMode(allow_non_fake_inputs=True)


PAIRS = random_pairs([(20, 30, 25), (7, 40, 3), (33, 1, 60), (20, 30, 25), (5, 5, 5)])


def make_model(shape: ModelConfig, config: TrainConfig, device=CUDA) -> Transformer:
    frozen = torch.bfloat16 if config.lora_rank and config.dtype == "bfloat16" else torch.float32
    torch.set_default_dtype(frozen)
    try:
        with torch.device(device):
            model = Transformer(shape)
    finally:
        torch.set_default_dtype(torch.float32)
    if config.lora_rank:
        add_lora(model, config.lora_rank, 16.0)
    model.compute_dtype = getattr(torch, config.dtype)
    n = config.activation_checkpointing
    model.checkpointed_blocks = shape.n_layers if n is True else int(n)
    return model


def step(fake, shape: ModelConfig = SMALL, **settings) -> Calls:
    """A whole update on the device: what it called. It raises where the host waits for a number."""
    config = TrainConfig(**{"dtype": "bfloat16", "micro_batch_tokens": 150} | settings)
    batches = train.pack(PAIRS, config)
    assert len(batches) > 1
    with fake, Calls() as calls:
        model = make_model(shape, config)
        optimizer = train.make_optimizer(model, config)
        outputs, norm = train.training_step(model, optimizer, batches, config)
        metrics = train.metrics_of(outputs, config.lam, len(PAIRS)) | {"norm": norm}
        metrics["updates"] = n_updates(optimizer, model)
        assert {x.device for x in metrics.values()} == {CUDA}
        for state in optimizer.state.values():
            assert {x.device for x in state.values()} == {CUDA}
            assert state["exp_avg"].dtype == torch.float32
    calls.n_batches = len(batches)
    return calls


@pytest.mark.parametrize(
    "settings",
    [{}, {"sft_loss": "full"}, {"lora_rank": 4}, {"grad_clip": 0.0}, {"weight_decay": 0.1}],
    ids=str,
)
def test_a_bfloat16_step_runs_flash_attention_and_waits_for_nothing(fake, settings):
    calls = step(fake, **settings)
    assert calls.n[VARLEN] == calls.n[VARLEN_BACKWARD] == 3 * calls.n_batches


@pytest.mark.parametrize(("given", "twice"), [(True, 3), (1, 1), (2, 2)])
def test_checkpointed_blocks_run_twice(fake, given, twice):
    calls = step(fake, activation_checkpointing=given)
    assert calls.n[VARLEN] == (3 + twice) * calls.n_batches
    assert calls.n[VARLEN_BACKWARD] == 3 * calls.n_batches


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}, {"activation_checkpointing": True}])
def test_a_float32_step_goes_the_other_path(fake, settings, monkeypatch):
    """With as many heads of keys as of queries: the fast kernel for float32 has no others."""
    heads = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, v, **more):
        heads.append((q.shape[1], k.shape[1], v.shape[1]))
        return attend(q, k, v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    assert VARLEN not in step(fake, dtype="float32", **settings).n
    assert {*heads} == {(SMALL.n_heads,) * 3}


@pytest.mark.parametrize("head_dim", [12, 264])
def test_a_head_size_that_flash_attention_refuses_goes_the_other_path(fake, head_dim):
    shape = ModelConfig(1000, 64, 2, 4, 96, head_dim=head_dim)
    assert VARLEN not in step(fake, shape).n


def test_windows_and_norms_of_heads(fake):
    shape = ModelConfig(1000, 64, 2, 4, 96, windows=[16, None], qk_norm=True, qkv_bias=True)
    assert step(fake, shape).n[VARLEN] > 0


def test_norms_and_the_gathering_of_keys_are_the_cheap_kernels(fake):
    calls = step(fake)
    assert calls.n["aten::_fused_rms_norm"] == (2 * 3 + 1) * calls.n_batches
    assert "aten::rsqrt" not in calls.n
    # Adding with atomics: the embedding is a kernel of its own, what is left are the predictions.
    assert calls.n["aten::index_add"] == calls.n_batches


def test_gradients_of_lm_head_add_up_inside_the_product(fake, monkeypatch):
    """One group makes the sum, in float32, and each further one adds to it in one operation."""
    monkeypatch.setattr(data, "GROUP_ROWS", 40)
    calls = step(fake)
    name = "aten::addmm" if torch.__version__ >= (2, 12) else "aten::add_"
    assert calls.n[name] > 0


GPT = GPT | {"tie_embeddings": True, "rotary_fraction": 0, "position_offset": 0}
PHI = FAMILIES["phi"].values | {"family": "phi"}


@pytest.mark.parametrize(
    ("vocab_size", "values", "stride"), [(50257, GPT, 50264), (1001, PHI, 1008), (1000, {}, 1000)]
)
def test_the_rows_of_logits_are_aligned(fake, vocab_size, values, stride):
    """GPT-2's vocabulary, Phi's lm_head with a bias, and one that is aligned by itself."""
    calls = step(fake, ModelConfig(vocab_size, 64, 2, 4, 96, **values))
    assert set(calls.strides) == {(stride, 1)}


def test_waiting_for_a_number_would_be_seen(fake):
    """What the other tests rest on."""
    with fake, pytest.raises(DataDependentOutputException):
        torch.ones(3, device=CUDA).sum().item()


# ---------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("checkpointed", [0, 2])
def test_a_block_is_one_graph_and_is_compiled_once(fake, checkpointed):
    """Without a code generator, which would need a real card. All layers share the one graph."""
    config = TrainConfig(dtype="bfloat16", activation_checkpointing=checkpointed)
    compiler = CompileCounterWithBackend("aot_eager")
    steps = [random_pairs([(20 + i, 30, 25), (7, 40 + i, 3 * i + 3)]) for i in range(4)]
    batches = [train.pack(pairs, config)[0] for pairs in steps]
    torch._dynamo.reset()
    try:
        with fake:
            model = make_model(SMALL, config)
            for block in model.layers:
                block.compile(dynamic=True, fullgraph=True, backend=compiler)
            for i, batch in enumerate(batches):
                torch._dynamo.config.error_on_recompile = i > 0
                train.forward(model, batch, 0.1).loss.backward()
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()
    (graph,) = (
        g.graph for g in compiler.graphs if list(g.graph.nodes)
    )  # a retry leaves an empty one
    inputs = {n.name: n.meta["example_value"] for n in graph.nodes if n.op == "placeholder"}
    shapes = [x.shape for name, x in inputs.items() if name.endswith("_parameters_weight_")]
    assert len(shapes) == 9 and all(isinstance(n, int) for shape in shapes for n in shape)
    assert not isinstance(inputs["l_x_"].shape[0], int)  # of the tokens alone the number is open


def launches() -> bool:
    """Whether kernels can be launched, if only in pretence, so that code is generated for them. In
    a process of its own, which a driver without memory would take down."""
    if not torch.cuda.is_available():
        return False
    product = "import torch; x = torch.ones(8, 8, device='cuda').bfloat16(); x @ x"
    command = [sys.executable, "-c", product]
    return subprocess.run(command, capture_output=True).returncode == 0


needs_launches = pytest.mark.skipif(not launches(), reason="no kernel can be launched here")


@needs_launches
def test_a_compiled_block_that_runs_twice_keeps_its_products():
    """Down to machine code, of which one version serves all lengths. In bytes a token and block:
    the inputs, q, k, v and what attention gives, the sum of the first half, gate and up."""
    kept = {}
    pairs = [random_pairs([(193 + i, 289, 260 - i)] * 4, vocab_size=1000) for i in range(3)]
    for twice, compiled in ((0, False), (3, False), (3, True)):
        config = TrainConfig(dtype="bfloat16", device="cuda:0", activation_checkpointing=twice)
        torch._dynamo.reset()
        model = make_model(SMALL, config)
        if compiled:
            compile_blocks(model)
        try:
            for i, some in enumerate(pairs):
                torch._dynamo.config.error_on_recompile = i > 1
                (batch,) = train.pack(some, config)
                b, before = batch.to(CUDA), torch.cuda.memory_allocated()
                hidden = model.hidden_states(b.tokens, b.positions, b.segments)
                used = torch.cuda.memory_allocated() - before
                hidden.sum().backward()
                model.zero_grad()
        finally:
            torch._dynamo.config.error_on_recompile = False
            torch._dynamo.reset()
        kept[twice, compiled] = used / len(b.tokens)
    c = SMALL
    heads = 2 * c.n_heads + 2 * c.n_kv_heads
    products = 2 * (heads * c.head_dim + c.dim + 2 * c.hidden_dim)
    more = (kept[3, True] - kept[3, False]) / 3
    assert 0.9 * products < more < 1.1 * products
    assert kept[3, True] < 0.7 * kept[0, False]


@needs_launches
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rotation_and_softmax_are_compiled_once(kernels, dtype):
    """Down to machine code that serves all lengths, in the forward and the backward pass."""
    config, compiled = TrainConfig(dtype=dtype, device="cuda:0"), torch._dynamo.utils.counters
    compiled.clear()
    model = make_model(SMALL, config)
    orpo.softmax_kernel = compile_kernels(CUDA, orpo.plain_softmax, smallest=0)
    for i in range(3):
        pairs = random_pairs([(193 + i, 289, 260 - i)] * 4, vocab_size=1000)
        (batch,) = train.pack(pairs, config)
        train.forward(model, batch, 0.1).loss.backward()
    assert orpo.softmax_kernel.state == model_module.rotation_kernel.state == "compiled"
    # The rotation has one for queries and one for keys, as these have other numbers of heads.
    assert compiled["stats"]["unique_graphs"] == 2 + (SMALL.n_heads != SMALL.n_kv_heads)


# ---------------------------------------------------------------------------------------------
# What else runs on the device.


def test_one_of_eight_processes_keeps_a_part_of_every_weight(monkeypatch):
    """FSDP2 beside seven processes that are not there."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        config = TrainConfig(
            dtype="bfloat16", device="cuda:0", shard=True, activation_checkpointing=1
        )
        batches = train.pack(PAIRS * 8, config)
        mesh = processes.init_device_mesh("cuda", (8,))
        monkeypatch.setattr("run.processes.init_device_mesh", lambda *_: mesh)
        with FakeTensorMode(allow_non_fake_inputs=True), Calls() as calls:
            model = make_model(SMALL, config)
            shard(model, config)
            optimizer = train.make_optimizer(model, config)
            outputs, norm = train.training_step(model, optimizer, batches, config)
            train.metrics_of(outputs, config.lam, len(PAIRS))
            for p in model.parameters():
                assert p.to_local().numel() <= -(-p.shape[0] // 8) * p.numel() // p.shape[0]
            with torch.no_grad(), resharded(model):
                train.forward(model, batches[0], 0.1)
        assert norm.device == CUDA and calls.n[VARLEN] > 3 * len(batches)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_waits_once_at_its_end(fake, monkeypatch, dtype):
    class Copy:
        def __init__(self, numbers):
            self.numbers = numbers

        def read(self):
            return {name: x.device for name, x in self.numbers.items()}

    monkeypatch.setattr(train, "HostCopy", Copy)
    config = TrainConfig(dtype=dtype, micro_batch_tokens=150)
    batches = train.pack(PAIRS, config)  # these read numbers, so they are made before
    monkeypatch.setattr(train, "pack", lambda *_: batches)
    with fake:
        row = train.evaluate(make_model(SMALL, config), PAIRS, config)
    assert set(row.values()) == {CUDA} and "eval_logps/chosen" in row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9}], ids=str
)
def test_generation_over_a_ragged_cache(fake, dtype, sampling):
    """Of four lengths, one of which fills the context; the host waits for nothing."""
    with fake, Calls() as calls:
        model = make_model(SMALL, TrainConfig(dtype=dtype)).eval()
        tokens = [*model.stream([[1] * 7, [2], [3] * 512, [4] * 30], 7, eos_id=5, **sampling)]
        out = torch.stack(tokens, 1)
    assert out.shape == (4, 7) and out.device == CUDA
    assert calls.n.get(VARLEN, 0) == (21 if dtype == "bfloat16" else 0)


def test_generation_waits_for_every_eighth_token_only(fake):
    """Whether the sequences have ended is asked then, and pretended tokens have no answer."""
    with fake:
        model = make_model(SMALL, TrainConfig(dtype="bfloat16")).eval()
        tokens = model.stream([[1, 2], [3]], 20, eos_id=5)
        for _ in range(8):
            next(tokens)
        with pytest.raises(DataDependentOutputException):
            next(tokens)
        assert len([*model.stream([[1, 2], [3]], 20)]) == 20  # without an end: never


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_loading_and_saving(fake, tmp_path, monkeypatch, dtype):
    Transformer(SMALL).save_pretrained(tmp_path / "in", torch.float16)

    def raw_bytes(tensor):
        assert tensor.device.type == "cpu" and tensor.dtype == torch.float16
        return bytes(tensor.nbytes)

    monkeypatch.setattr("formats.weights._raw_bytes", raw_bytes)
    with fake:
        model = Transformer.from_pretrained(tmp_path / "in", CUDA, dtype)
        assert {p.device for p in model.parameters()} == {CUDA}
        assert {p.dtype for p in model.parameters()} == {dtype or torch.float16}
        model.save_pretrained(tmp_path / "out", torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("in", "out")]
    assert sizes[0] == sizes[1]
