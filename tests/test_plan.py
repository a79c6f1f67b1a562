"""The plan: steps, memory, disk, and the trial of the largest micro-batch."""

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import train
from data import Pair, step_pairs
from model import ModelConfig, Transformer, trainable
from run.lora import add_lora
from run.plan import (
    Plan,
    count_parameters,
    disk_line,
    disk_needed,
    fixed_memory,
    make_plan,
    out_of_memory_advice,
    peak_memory_gb,
    product_rate,
    step_flops,
    tell_model,
    tell_overlap,
    tell_peak,
    tell_problems,
    tell_slow_bfloat16,
    time_line,
    unlearnable,
)
from tests.forked import call
from tests.small import random_pairs, some_pairs, tiny


def test_plan_and_answers_are_printed(whole):
    for word in ("parameters", "40 pairs of 40", "12 of 8 pairs", "memory", "before:", "after:"):
        assert word in whole.printed


@pytest.mark.parametrize("out", [True, False])
def test_a_dry_run_prints_the_plan_and_writes_nothing(arguments, tmp_path, capsys, out):
    if not out:
        i = arguments.index("--out")
        del arguments[i : i + 2]
    train.main([*arguments, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert {"model", "train", "eval", "steps", "time", "memory", "disk"} <= {*words}
    assert "GB at the most in a step" in "\n".join(lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("budget", "expected"), [(100, True), (120, False)])
def test_the_plan_sees_a_step_of_several_micro_batches_where_another_leaves_processes_idle(
    budget, expected, monkeypatch, tiny_tokenizer
):
    """Ten pairs of 60 tokens by nine, over eight processes: one has two of them, later seven none,
    so there are fewer micro-batches than processes and steps."""
    monkeypatch.setattr("run.plan.world_size", lambda: 8)
    config = train.TrainConfig(
        model="m", out=".", batch_size=9, micro_batch_tokens=budget, dtype="float32"
    )
    model = Transformer(ModelConfig(10, 8, 1, 1, 8))
    model.compute_dtype = torch.float32
    pairs = random_pairs([(20, 20, 20)] * 10, vocab_size=10)
    tokenizer = data.load_tokenizer(tiny_tokenizer)
    plan = make_plan(model, tokenizer, pairs, config)
    expected = 2, 1 if expected else 2, expected
    assert (plan.n_steps, len(plan.largest), plan.several) == expected


def test_the_plan_has_the_micro_batch_with_most_logits_at_a_time_beside_the_largest(
    tiny_tokenizer,
):
    """Many short pairs are the most tokens, and go through lm_head in groups; one long pair has
    more logits, as its rows are there together."""
    config = train.TrainConfig(
        model="m", out=".", batch_size=1, micro_batch_tokens=5000, dtype="float32", max_steps=2
    )
    model = Transformer(ModelConfig(10, 8, 1, 1, 8))
    tokenizer = data.load_tokenizer(tiny_tokenizer)
    for long, expected in ((1300, 1300), (900, None)):
        pairs = random_pairs([(2500, 1000, 1000), (10, long, long)], vocab_size=10)
        plan = make_plan(model, tokenizer, pairs, config)
        assert [pair.lengths for pair in plan.largest] == [(2500, 1000, 1000)]
        wanted = [(10, expected, expected)] if expected else []
        assert [pair.lengths for pair in plan.widest] == wanted


def test_the_plan_tells_the_trained_parameters_from_the_models(capsys):
    model, config = tiny(), train.TrainConfig(model="m", out=".", dtype="float32")
    n_parameters = sum(p.numel() for p in model.parameters())
    add_lora(model, 4, 8.0)
    n_trained = sum(p.numel() for p in trainable(model))
    tell_model(model, config)
    printed = capsys.readouterr().out
    assert f"{n_parameters:,} parameters" in printed and f"{n_trained:,} trained" in printed


@pytest.mark.parametrize(
    ("device", "load", "said"), [("cpu", 10.4, True), ("cpu", 9, False), ("cuda", 99, False)]
)
def test_a_busy_machine_is_told(device, load, said, capsys, monkeypatch):
    """Where more is running than eight cores and this run account for."""
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    tell_model(tiny(), train.TrainConfig(model="m", device=device, dtype="float32"))
    told = [line for line in capsys.readouterr().out.splitlines() if "busy" in line]
    assert len(told) == said and all("(load 10 on 8 cores)" in line for line in told)


@pytest.mark.parametrize("several", [False, True])
def test_the_trial_before_the_first_step_leaves_nothing_behind(several, capsys, monkeypatch):
    """No update counted, no moment, no gradient, no changed weight; and the rate is set back.
    Gradients of a micro-batch before are there only where a step has several."""
    model, config = tiny(), train.TrainConfig(lr=1e-2, dtype="float32")
    optimizer, before = train.make_optimizer(model, config), [p.clone() for p in model.parameters()]
    plan = Plan(1, 1, some_pairs(3, seed=2), several, widest=some_pairs(1, seed=3))
    seen, forward = [], train.forward
    has_gradients = lambda: any(p.grad is not None for p in model.parameters())  # noqa: E731
    monkeypatch.setattr(
        train, "forward", lambda *args: seen.append(has_gradients()) or forward(*args)
    )
    train.try_largest(model, optimizer, plan, config)
    assert seen == [several, several]
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    states = [optimizer.state[p] for p in model.parameters()]
    assert all(not x.any() for state in states for x in state.values())
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    assert "GB at the most in a step" in capsys.readouterr().out


def test_the_fixed_memory_is_counted_from_the_parameters(monkeypatch):
    model, config = Transformer(ModelConfig(100, 16, 2, 2, 24)), train.TrainConfig(dtype="bfloat16")
    n = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (n, n)
    assert fixed_memory(n, n, config) == 16 * n  # weights, gradients, two moments: float32
    monkeypatch.setattr("run.plan.world_size", lambda: 4)
    assert fixed_memory(n, n, config) == 16 * n
    assert fixed_memory(n, n, train.TrainConfig(shard=True)) == 4 * n
    add_lora(model, 3, 16.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model) == (trained, n)
    config.lora_rank = 3
    assert fixed_memory(trained, n, config) == 2 * n + 16 * trained


@pytest.mark.parametrize("pairs", [[], [50, 40]])
def test_running_out_of_memory_says_what_was_needed_and_what_helps(pairs, folder, monkeypatch):
    """The micro-batch is named where one ran; else the model itself did not fit."""
    config = train.TrainConfig(str(folder / "model"), device="cuda:0")

    class Card:
        total_memory = 3 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    pairs = random_pairs([(10, n - 20, 10) for n in pairs])
    with pytest.raises(ValueError) as error, out_of_memory_advice(config, pairs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    n = 16 * sum(p.numel() for p in Transformer.from_pretrained(folder / "model").parameters())
    message = str(error.value)
    assert f"{n / 2**20:.0f} MB for weights, gradients and" in message and "3.00 GB" in message
    assert ("a micro-batch of 90 tokens" in message) == bool(pairs)
    for way in ("micro-batch-tokens", "max-length", "activation-checkpointing"):
        assert (f"--{way}" in message) == bool(pairs)  # without them it is not about these
    assert "--shard over more GPUs, --lora-rank 16" in message
    config.shard, config.activation_checkpointing = True, True
    with pytest.raises(ValueError) as error, out_of_memory_advice(config, pairs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    message = str(error.value)
    assert message.endswith("more GPUs") and "--activation" not in message
    assert "--lora-rank" not in message  # the two do not go together
    config.shard, config.lora_rank, config.dtype = False, 4, "bfloat16"
    with pytest.raises(ValueError) as error, out_of_memory_advice(config, pairs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    message = str(error.value)
    assert "--shard" not in message and "--lora-rank" not in message  # it has adapters already
    assert ("smaller model" in message) != bool(pairs)


def test_running_out_of_memory_on_a_cpu_says_the_same_and_other_errors_pass(folder):
    """The allocator's own error, for a tensor of 2^60 bytes."""
    config = train.TrainConfig(str(folder / "model"), device="cpu")
    said = pytest.raises(ValueError, match=r"out of memory: .* memory; what helps: --lora-rank 16$")
    with said, out_of_memory_advice(config):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size of tensor"), out_of_memory_advice(config):
        torch.ones(2) + torch.ones(3)


@pytest.mark.parametrize(
    ("n_steps", "save_every", "keep", "expected"),
    [(100, 0, 2, 0), (100, 500, 2, 1), (501, 500, 2, 2), (9000, 500, 2, 3), (9000, 500, 1, 2)],
)
def test_the_disk_that_the_plan_counts_is_what_a_run_writes(n_steps, save_every, keep, expected):
    """A model of float32, and checkpoints of it and two moments: one more than are kept."""
    model = Transformer(ModelConfig(100, 16, 2, 2, 24))
    n = 4 * sum(p.numel() for p in model.parameters())
    config = train.TrainConfig(save_every=save_every, keep=keep)
    wanted = n + 3 * n * expected, expected
    assert disk_needed(model, n_steps, config) == wanted


def test_the_disk_that_the_plan_asks_for_holds_the_best_model_and_adapters(tmp_path):
    model = Transformer(ModelConfig(100, 16, 2, 2, 24, dtype="bfloat16"))
    n = sum(p.numel() for p in model.parameters())
    config = train.TrainConfig(save_every=0)
    assert disk_needed(model, 9, config)[0] == 2 * n
    config.eval_every = 5
    assert disk_needed(model, 9, config)[0] == 4 * n
    add_lora(model, 4, 8.0)
    adapters = sum(p.numel() for p in trainable(model))
    config.lora_rank = 4
    assert disk_needed(model, 9, config)[0] == 4 * n
    config.lora_adapters = True
    assert disk_needed(model, 9, config)[0] == 4 * n + 4 * adapters


def test_the_files_of_a_run_are_as_large_as_the_plan_says(whole):
    model = Transformer.from_pretrained(whole.out / "model")
    needed, n_checkpoints = disk_needed(model, 12, train.TrainConfig())
    files = [*whole.out.glob("model/*.safetensors"), *whole.out.glob("checkpoints/*/*.distcp")]
    assert n_checkpoints == 1
    # Each tensor of a checkpoint has a header, which counts where tensors are tiny.
    assert sum(file.stat().st_size for file in files) == pytest.approx(needed, rel=0.15)


def test_the_memory_of_a_process_is_in_gigabytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    assert peak_memory_gb(torch.device("cpu")) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_a_mac_counts_memory_in_bytes(platform, unit, monkeypatch):
    monkeypatch.setattr("sys.platform", platform)
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    assert peak_memory_gb(torch.device("cpu")) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_products_is_in_operations_a_second(monkeypatch, dtype):
    """By a clock on which the fifth round takes a 64th of a second and the others a 32nd."""
    ticks, used = iter([0, 1 / 32] * 4 + [1, 1 + 1 / 64] + [0, 1 / 32] * 3), set()
    monkeypatch.setattr(
        "time.perf_counter", lambda: used.add(torch.get_num_threads()) or next(ticks)
    )
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert product_rate(dtype) == 3 * 2 * 256 * 512 * 512 * 64 * 3
        assert used == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize(("slow", "rounds"), [(0.75, 1), (0.25, 2), (0.01, 8)])
def test_the_rate_of_products_is_measured_forward_and_backward_in_little_time(
    monkeypatch, slow, rounds
):
    """A CPU without bfloat16 multiplies it 8 times slower forward and 100 times slower backward."""
    clock, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    grad = torch.autograd.grad

    def slowly(y, inputs, gradient):
        clock[0] += slow
        calls.append([tuple(g.shape) for g in grad(y, inputs, gradient)])

    monkeypatch.setattr("torch.autograd.grad", slowly)
    rate = 3 * 2 * 256 * 512 * 512 / slow * torch.get_num_threads()
    assert product_rate(torch.float32) == pytest.approx(rate)
    assert calls == [[(256, 512), (512, 512)]] * rounds


@pytest.mark.parametrize(
    ("device", "dtype", "rate", "words"),
    [
        ("cpu", "bfloat16", 1e10, "warning: products in bfloat16 take 5.0 times as long as in flo"),
        ("cpu", "bfloat16", 9e10, None),
        ("cpu", "float32", 1e10, None),
        ("cuda", "bfloat16", 1e10, None),
    ],
)
def test_slow_bfloat16_is_warned_of(monkeypatch, capsys, device, dtype, rate, words):
    rates = {torch.float32: 5e10, torch.bfloat16: rate}
    monkeypatch.setattr("run.plan.product_rate", rates.get)
    tell_slow_bfloat16(train.TrainConfig(device=device, dtype=dtype))
    printed = capsys.readouterr().out
    assert words in printed if words else not printed


def test_the_planned_time_has_a_third_more_where_all_blocks_are_computed_twice(monkeypatch):
    """1e12 operations at 0.05 TFLOP/s are 20 s, and 5 s over four processes."""
    monkeypatch.setattr("run.plan.product_rate", lambda dtype: 2e11)
    model, config = Transformer(ModelConfig(100, 16, 4, 2, 24)), train.TrainConfig(dtype="float32")
    for blocks, seconds in ((0, "0:01:00"), (2, "0:01:10"), (4, "0:01:20")):
        model.checkpointed_blocks = blocks
        assert f" {seconds} if each process does 0.05 TFLOP/s" in time_line(model, 3e12, config)
    config.lora_rank = 4  # a frozen weight has no gradient of its own, so the forward pass is half
    assert " 0:01:30 if each process does" in time_line(model, 3e12, config)
    monkeypatch.setattr("run.plan.world_size", lambda: 4)
    config.lora_rank, model.checkpointed_blocks = 0, 4
    assert " 0:00:20 if each process does" in time_line(model, 3e12, config)


def test_every_number_of_the_plan_by_hand(capsys, monkeypatch, tmp_path):
    """Five pairs of 10, 10, 10, 10 and 40 tokens by two, over two processes that take 25 tokens at
    a time. An epoch has two steps of two pairs, one on each process, and one of one."""
    monkeypatch.setattr("run.plan.world_size", lambda: 2)
    model = Transformer(ModelConfig(50, 16, 1, 2, 24))
    pairs = random_pairs([(4, 3, 3)] * 4 + [(20, 10, 10)], vocab_size=50)
    config = train.TrainConfig(out=str(tmp_path), device="cpu", dtype="float32", epochs=2, lam=0.5)
    config.batch_size, config.micro_batch_tokens, config.warmup_steps, config.lr = 2, 25, 3, 1e-4
    decode = SimpleNamespace(decode=lambda ids: "x")
    plan = make_plan(model, decode, pairs, config)
    assert plan == (6, 3, pairs[4:], False, ())
    printed = capsys.readouterr().out.splitlines()
    # 160 tokens and ten pairs, each a micro-batch of its own, in six steps.
    busiest = [max(p.n_tokens for p in step_pairs(pairs, step, 2, 42)) for step in range(1, 7)]
    ratio = 2 * sum(busiest) / 160
    assert printed[:3] == [
        "steps    6 of 2 pairs (3 an epoch), 27 tokens a step in 1.7 micro-batches, "
        "the largest of 40",
        f"         over 2 processes, the busiest with {ratio:.2f} of an equal share",
        "         lam 0.5, SFT over response, lr 0.0001 (cosine, 3 warm-up), seed 42",
    ]
    flops = 2 * step_flops(model, pairs, config)
    assert printed[3].startswith(f"time     {flops:.2g} operations: 0:00:00 if each process")
    n = sum(p.numel() for p in model.parameters())
    assert printed[4].startswith(f"memory   {16 * n / 2**20:.0f} MB for weights, gradients and")
    checkpoint = f"{16 * n / 2**20:.0f} MB for the model and 1 checkpoint, of "
    assert printed[5].startswith(f"disk     {checkpoint}")
    assert printed[5].endswith("B free")


@pytest.mark.parametrize("used", [0, 100])
def test_the_disk_counts_as_free_what_the_run_has_already(used, tmp_path, monkeypatch):
    """A model of 3 MB, saved once, on a disk with 1 MB left where the run's folder has 100 MB."""
    model = Transformer(ModelConfig(1000, 600, 1, 1, 100, tie_embeddings=True))
    config = train.TrainConfig(out=str(tmp_path), save_every=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    for name in ("checkpoints/step-00000001", "model", "best", "adapters"):
        (tmp_path / name).mkdir(parents=True)
        with open(tmp_path / name / "file", "wb") as f:
            f.truncate(used * 2**20 // 4)
    (tmp_path / "notes").write_bytes(bytes(2**20))  # not ours
    line = disk_line(model, 10, config)
    assert f"of {1 + used} MB free" in line
    assert ("NOT ENOUGH; lower --keep" in line) == (used == 0)


def test_the_planned_time_of_compiled_blocks_has_no_more(monkeypatch):
    """Where they keep their products; and a model of 100 million parameters is served faster."""
    monkeypatch.setattr("run.plan.product_rate", lambda dtype: 2e11)
    model = Transformer(ModelConfig(100, 16, 4, 2, 24))
    config, model.checkpointed_blocks = train.TrainConfig(dtype="float32", compile=True), 4
    assert " 0:01:20 if" in time_line(model, 3e12, config)
    monkeypatch.setattr("run.plan.keeps_products", lambda *_: True)
    assert " 0:01:00 if" in time_line(model, 3e12, config)
    with torch.device("meta"):
        model = Transformer(ModelConfig(32000, 768, 12, 12, 2048))
    line = time_line(model, 3e12, config)
    assert " 0:00:30 if each process does 0.1 TFLOP/s" in line


@pytest.mark.parametrize(
    ("size", "several", "hint"), [(20, True, False), (40, True, True), (40, False, False)]
)
def test_a_card_with_much_room_left_is_said_to_have_it(monkeypatch, capsys, size, several, hint):
    card = SimpleNamespace(total_memory=size * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 12 * 2**30)
    tell_peak(torch.device("cuda", 0), several)
    shown = capsys.readouterr().out
    assert f"12.00 GB at the most in a step, of {size}.00 GB" in shown
    assert ("a larger --micro-batch-tokens may be faster" in shown) == hint


def test_a_long_run_is_planned_from_its_first_epochs(capsys):
    """200,000 steps of 40 pairs: what is printed is that of two epochs, and of a thousand steps."""
    model = Transformer(ModelConfig(100, 16, 1, 2, 24))
    pairs = random_pairs([(3, 4, 5)] * 40, vocab_size=100)
    config = train.TrainConfig(max_steps=200_000, batch_size=8, device="cpu", dtype="float32")
    plan = make_plan(model, SimpleNamespace(decode=lambda ids: "x"), pairs, config)
    assert plan.n_steps == 200_000 and plan.steps_an_epoch == 5
    assert "200000 of 8 pairs (5 an epoch), 96 tokens a step" in capsys.readouterr().out


def test_a_warm_up_longer_than_the_run_is_said(capsys):
    model, pairs = Transformer(ModelConfig(100, 16, 1, 2, 24)), random_pairs([(3, 4, 5)] * 8)
    config = train.TrainConfig(max_steps=6, batch_size=4, device="cpu", warmup_steps=10)
    config.dtype = "float32"
    make_plan(model, SimpleNamespace(decode=lambda ids: "x"), pairs, config)
    assert "the run ends within the warm-up, at 60% of --lr" in capsys.readouterr().out


def test_prompts_that_are_trained_on_are_not_held_out(capsys):
    pairs = random_pairs([(3, 2, 2)] * 4)
    tell_overlap(pairs[:3], pairs[3:])
    assert capsys.readouterr().out == ""
    tell_overlap(pairs[:3], pairs[2:])
    assert "1 of 2 pairs have a prompt that is trained on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w, []),
        (lambda w: w[7].zero_(), ["'7'"]),
        (lambda w: w[9].copy_(w[50]), ["'9'"]),
        (lambda w: w[8].zero_(), []),  # only in the rejected
        (lambda w: w[60].zero_(), []),  # not a special one
    ],
)
def test_tokens_that_adapters_cannot_learn_to_write_are_named(change, named, capsys):
    """As of a chat template that the base model never saw."""
    model = Transformer(ModelConfig(100, 16, 1, 2, 24, tie_embeddings=False))
    ids = torch.arange(3, 90).numpy()
    pairs = [Pair(ids[:1], ids[[4, 6, 57]], ids[[5, 57]], "x:1")]
    tokenizer = SimpleNamespace(added_ids={7, 8, 9}, eos_id=2, decode=lambda ids: str(ids[0]))
    with torch.no_grad():
        change(model.lm_head.weight)
    assert unlearnable(model, tokenizer, pairs) == []  # all weights are trained
    add_lora(model, 2, 4.0)
    assert unlearnable(model, tokenizer, pairs) == named
    tell_problems(model, tokenizer, pairs, [])
    said = capsys.readouterr().out
    assert ("adapters do not change lm_head" in said) == bool(named)


HOLDING = """
import torch
from run.processes import give_back_memory, keep_freed_memory, remember_peak
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
keep_freed_memory()
kept = [torch.ones(2_000_000 + 999 * i) for i in range(60)]
kept = kept[::2]
before = held()
give_back_memory()  # nothing is known yet
unplanned = held()
remember_peak(2**40)
give_back_memory()  # less is held than was planned ... but the machine has less than that left
short = held()
kept += [torch.ones(2_100_000 + 777 * i) for i in range(30)]
del kept[::2]
again = held()
remember_peak(2**20)
give_back_memory()  # more is held than was planned
print(before, unplanned, short, again, held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_given_back_where_more_is_held_than_planned_or_left():
    """Gaps of some 8 MB between buffers that stay. SmolLM2 grew by them until it was killed."""
    before, unplanned, short, again, after = map(int, call("-c", HOLDING)[0].split())
    assert abs(unplanned - before) < 20
    assert before - short > 150 and again - after > 100
