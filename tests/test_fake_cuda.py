"""Every line of the CUDA path on tensors without content: shapes, dtypes, devices, autograd.

FakeTensorMode runs an operation's shape rules and no kernel, and raises where the host would wait
for a number of the device. It needs a CUDA build of PyTorch that sees a device; a driver that
computes nothing will do. tests/test_cuda.py holds the numbers, on a real card.
"""

import os
import socket

import pytest
import torch
import torch.distributed as dist

import train
from train import TrainConfig

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this PyTorch sees no CUDA device, real or pretended"
)


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
    assert train.pick_device(config) == torch.device("cuda", 0)
    assert (config.device, config.dtype) == ("cuda:0", "bfloat16")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_given_stays(dtype):
    config = TrainConfig(dtype=dtype)
    train.pick_device(config)
    assert config.dtype == dtype


def test_the_cpu_can_be_asked_for_where_there_is_a_card():
    config = TrainConfig(device="cpu")
    assert train.pick_device(config) == torch.device("cpu")
    assert config.dtype == "float32"


@pytest.mark.parametrize("given", [None, "cuda"])
@pytest.mark.parametrize("shard", [False, True])
def test_a_process_of_torchrun_picks_its_own_card(torchrun, given, shard):
    config = TrainConfig(device=given, shard=shard)
    assert train.pick_device(config) == torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    assert dist.get_backend_config() == "cpu:gloo,cuda:nccl"


def test_a_process_of_torchrun_does_not_pick_another_ones_card(torchrun):
    with pytest.raises(ValueError, match="torchrun gives each process its own"):
        train.pick_device(TrainConfig(device="cuda:0"))


def test_a_card_that_is_not_there_is_refused(torchrun, monkeypatch):
    n = torch.cuda.device_count()
    monkeypatch.setenv("LOCAL_RANK", str(n))
    with pytest.raises(ValueError, match=rf"local rank {n}\): this machine shows {n} CUDA"):
        train.pick_device(TrainConfig())
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match=f"--device cuda:{n}: this machine shows {n} CUDA"):
        train.pick_device(TrainConfig(device=f"cuda:{n}"))
