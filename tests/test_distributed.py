"""Several processes, over gloo on the CPU, take the very steps that one takes."""

import json
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import data
import train
from formats.families import FAMILIES
from model import ModelConfig, Transformer
from run import processes
from run.answers import answers
from tests.forked import Forked, call
from tests.runs import (
    FACTS,
    UNEVEN,
    compare,
    compare_models,
    fails,
    file_bytes,
    files,
    launch,
    rows_of,
    run,
    start,
)
from tests.small import some_pairs

pytestmark = pytest.mark.xdist_group("distributed")  # the runs below are made in one worker


def shares_of_steps():
    """Steps of 1 to 64 pairs, and their shares for 1 to 8 processes."""
    for n in (1, 2, 3, 5, 17, 64):
        for world in (1, 2, 3, 8):
            pairs = some_pairs(n, seed=n, longest=90)
            shares = data.balance_over_ranks(pairs, world)
            assert len(shares) == world
            yield pairs, shares


def test_every_pair_has_one_rank():
    for pairs, shares in shares_of_steps():
        assert sorted(id(pair) for share in shares for pair in share) == sorted(map(id, pairs))
        assert len(shares) > 1 or shares == [pairs]  # in their order


def test_the_shares_are_even_in_tokens():
    for pairs, shares in shares_of_steps():
        tokens = [sum(pair.n_tokens for pair in share) for share in shares]
        # Whoever has the most got his last, smallest pair when he had the least.
        assert max(tokens) - min(tokens) <= max(pair.n_tokens for pair in pairs)
        assert len(pairs) < 64 or max(tokens) < 1.02 * sum(tokens) / len(shares)


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_the_shares_hold_the_weights_of_the_whole_step_in_equal_numbers_of_micro_batches(sft_loss):
    pairs = some_pairs(7, seed=0, longest=90)
    for world in (2, 3, 9):  # with 9, two have no pair
        shares = [data.micro_batches(pairs, 300, sft_loss, 1, k, world) for k in range(world)]
        assert len({len(batches) for batches in shares}) == 1
        total = sum(batch.nll_weight.sum() for batches in shares for batch in batches)
        assert float(total) == pytest.approx(1)
        assert all(len(batch.tokens) for batches in shares for batch in batches)


def test_an_empty_micro_batch_adds_zeros():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(100, 16, 2, 2, 24, tie_embeddings=True))
    batches = data.micro_batches(
        some_pairs(1, seed=1, longest=90, vocab_size=100), 300, "full", 1, 1, 2
    )
    output = train.forward(model, batches[0], 0.5)
    output.loss.backward()
    assert output.loss == 0 and len(output.chosen_logps) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


SHARD = ("--shard", "--activation-checkpointing")
SAVED = [*UNEVEN, "--eval-every", "8", "--save-every", "8"]


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory):
    """rows(*flags): those of the run on one process, computed once; and its folder."""
    runs = {}

    def rows(*flags: str):
        if flags not in runs:
            out = tmp_path_factory.mktemp("one") / "out"
            runs[flags] = run([*files(folder), *flags], "--out", str(out)), out
        return runs[flags]

    return rows


# What the tied Llama of `folder` has not: untied, fewer key/value heads, a window in one layer,
# biases of q, k and v; and LayerNorm, biases everywhere, one of lm_head too.
OTHER_MODELS = {
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5}
    | {"max_window_layers": 1},
    "phi": {"num_key_value_heads": 2},
}


WITH_OTHERS = [("qwen2", SHARD), ("phi", ()), ("phi", SHARD)]


def trains(folder, model) -> list[str]:
    """Flags for a run of this model without an evaluation."""
    names = {"--model": model, "--data": folder / "train.jsonl", "--device": "cpu"}
    return [*(str(word) for pair in names.items() for word in pair), *UNEVEN]


@pytest.fixture(scope="module")
def other_models(folder, tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, keys in OTHER_MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        for file in (folder / "model").glob("tokenizer*"):
            shutil.copy(file, made[name])
        sizes = {"vocab_size": 1536, "hidden_size": 32, "intermediate_size": 48}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
        config = json.dumps(sizes | keys | {"model_type": name})
        (made[name] / "config.json").write_text(config)
        torch.manual_seed(0)
        model = Transformer(ModelConfig.from_json(made[name] / "config.json"))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1) if p.dim() == 1 else None  # biases are not zero
        model.save_pretrained(made[name])
    return made


# Runs of train.py one after the other in the same processes, as starting them takes longest.
SEVERAL = """
import json, os, sys, train
from run.answers import answers
train.answers = lambda model, tokenizer, prompts, n: answers(model, tokenizer, prompts, 8)
for arguments in map(json.loads, sys.argv[1:]):
    try:
        train.run_command(train.parse(arguments))
    except ValueError as error:
        print("ValueError:", error, file=sys.stderr, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def two_processes(folder, other_models, tmp_path_factory):
    """rows(*flags), printed, errors, of runs on two processes that were started at once."""
    out, script = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("script") / "several.py"
    script.write_text(SEVERAL)
    runs = [(sft_loss, *more) for sft_loss in ("response", "full") for more in ((), SHARD)]
    commands = [
        [*files(folder), *SAVED, "--out", str(out / "-".join(flags)), "--sft-loss", *flags]
        for flags in runs
    ]
    for name, more in WITH_OTHERS:
        commands.append([*trains(folder, other_models[name]), *more])
        commands[-1] += ["--out", str(out / "-".join((name, *more)))]
    commands.append([*files(folder), *SHARD, "--lam", "1e37", "--out", str(out / "not-finite")])
    process = start(2, [json.dumps(command) for command in commands], script)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, printed, errors


@pytest.mark.parametrize("sft_loss", ["response", "full"])
@pytest.mark.parametrize("more", [(), SHARD])
def test_two_processes_equal_one(one_process, two_processes, sft_loss, more):
    """40 pairs by 7: the sixth step has 5. A learning rate at which roundings do not grow."""
    one, out_one = one_process(*SAVED, "--sft-loss", sft_loss)
    out_two = two_processes[0] / "-".join((sft_loss, *more))
    compare(one, rows_of(out_two / "metrics.jsonl"), rel=2e-5)
    compare_models(out_one, out_two, 1e-5)


@pytest.mark.parametrize(("name", "more"), WITH_OTHERS)
def test_two_processes_equal_one_with_other_models(
    folder, two_processes, other_models, tmp_path, name, more
):
    one = run(trains(folder, other_models[name]), "--out", str(tmp_path / "one"))
    out_two = two_processes[0] / "-".join((name, *more))
    compare(one, rows_of(out_two / "metrics.jsonl"), rel=2e-5)
    compare_models(tmp_path / "one", out_two, 1e-5)


@pytest.mark.parametrize("more", [(), SHARD])
def test_the_best_model_and_a_checkpoint_are_gathered_like_the_last_model(
    two_processes, tmp_path, more
):
    """All three are of step 8. The checkpoint of two processes is read by one."""
    out = two_processes[0] / "-".join(("full", *more))
    step, made = out / "checkpoints" / "step-00000008", tmp_path / "made"
    printed = call("-m", "tools.export", step, "--out", made)
    assert printed == (f"wrote {made}, a Hugging Face folder\n", "")
    assert len([*out.glob("checkpoints/*/*.distcp")]) == 2
    model, best = file_bytes(out / "model"), file_bytes(out / "best")
    assert json.loads(best.pop("evaluation.json"))["step"] == 8
    assert file_bytes(made) == model == best


def test_process_0_alone_speaks_and_tells_the_balance(two_processes):
    n_runs = 5 + len(WITH_OTHERS)
    assert two_processes[1].count("parameters, stored as") == n_runs
    assert two_processes[1].count("over 2 processes, the busiest with 1.") == n_runs


ANSWER = """
import functools, json, os, sys, torch, data, train
from run import answers, processes
source, out, prompts = sys.argv[1:]
config = train.TrainConfig(device="cpu")
processes.pick_device(config)
found = []
for shard in (None, functools.partial(processes.shard, config=config)):
    model = train.Transformer.from_pretrained(source, config.device, torch.float32, shard)
    tokenizer, batches, generate = data.load_tokenizer(source), [], model.generate
    model.generate = lambda rows, *a, **k: batches.append(rows) or generate(rows, *a, **k)
    for temperature in (0.0, 1.0):
        sampling = {"temperature": temperature, "generator": torch.Generator().manual_seed(0)}
        texts = answers.answers(model, tokenizer, json.loads(prompts), 16, 95, **sampling)
        found.append([texts, len(batches)])
        batches.clear()
with open(f"{out}/{processes.rank()}.json", "w") as f:
    json.dump(found, f)
processes.barrier()
os._exit(0)
"""


def test_processes_share_the_answers_and_find_those_of_one(tmp_path):
    """Of nine prompts in five batches each process has three or two, but all of them where the
    model is sharded. Sampled answers of another process are other draws."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 200) for _ in range(rng.randint(1, 40))] for _ in range(9)]
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(FACTS / "base")
    sampling = {"temperature": 1.0, "generator": torch.Generator().manual_seed(0)}
    greedy = answers(model, tokenizer, prompts, 16, 95)
    sampled = answers(model, tokenizer, prompts, 16, 95, **sampling)
    (tmp_path / "script.py").write_text(ANSWER)
    words = [str(FACTS / "base"), str(tmp_path), json.dumps(prompts)]
    process = start(2, words, tmp_path / "script.py")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = [json.loads((tmp_path / f"{k}.json").read_text()) for k in range(2)]
    assert [[n for _, n in own] for own in found] == [[3, 3, 5, 5], [2, 2, 5, 5]]
    texts = [[text for text, _ in own] for own in found]
    assert texts[0] == texts[1]
    shared, shared_sampled, sharded, sharded_sampled = texts[0]
    assert greedy == shared == sharded and len(set(greedy)) > 2
    assert sampled == sharded_sampled != shared_sampled
    assert any(a == b for a, b in zip(sampled, shared_sampled, strict=True))


LOAD_AND_SAVE = """
import functools, os, sys, torch, train
from run import processes
source, out = sys.argv[1:]
config = train.TrainConfig(shard=True, device="cpu")
processes.pick_device(config)
shard = functools.partial(processes.shard, config=config)
model = train.Transformer.from_pretrained(source, config.device, torch.float32, shard)
assert all(2 * p.to_local().numel() < 1.1 * p.numel() for p in model.parameters() if p.dim() == 2)
model.save_pretrained(out if processes.rank() == 0 else None, shard_bytes=30_000)
os._exit(0)
"""


@pytest.mark.slow
def test_a_sharded_model_is_saved_as_it_was_loaded(tmp_path):
    """GPT-2 has its matrices the other way round, and those of q, k and v in one."""
    torch.manual_seed(0)
    gpt = FAMILIES["gpt2"].values | {"family": "gpt2", "max_seq_len": 64}
    model = Transformer(ModelConfig(101, 36, 2, 2, 50, **gpt))
    model.save_pretrained(tmp_path / "in", shard_bytes=30_000)
    (tmp_path / "script.py").write_text(LOAD_AND_SAVE)
    process = start(2, [str(tmp_path / name) for name in ("in", "out")], tmp_path / "script.py")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    written = sorted(file.name for file in (tmp_path / "out").glob("model*"))
    assert written == sorted(file.name for file in (tmp_path / "in").glob("model*"))
    assert len(written) > 2
    for name in written:
        assert (tmp_path / "in" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_what_is_not_finite_is_found_by_every_process(folder, two_processes):
    out, _, errors = two_processes
    assert errors.count(f"step 1: loss or gradient not finite at {folder / 'train.jsonl'}:") == 2
    assert errors.count("(its gradient)") == 6 and not (out / "not-finite" / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--dtype", "bfloat16"], ["--compile"]])
def test_two_processes_equal_one_in_bfloat16_and_compiled(folder, one_process, tmp_path, more):
    flags, bf16 = [*UNEVEN, "--sft-loss", "full"], "bfloat16" in more
    one, out_one = one_process(*flags, *(more if bf16 else []))
    two, _ = launch(2, [*files(folder), *flags, *more, "--shard"], "--out", str(tmp_path / "two"))
    compare(one, two, rel=2e-2 if bf16 else 2e-5)
    compare_models(out_one, tmp_path / "two", 1e-2 if bf16 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--shard"]])
def test_three_processes_for_steps_of_two_pairs(folder, one_process, tmp_path, more):
    """One process has no pair at all, in any step, and weights do not divide by three."""
    flags = ["--batch-size", "2", "--max-steps", "4", "--lr", "1e-3", "--sft-loss", "full"]
    three, _ = launch(3, [*files(folder), *flags, *more], "--out", str(tmp_path / "three"))
    compare(one_process(*flags)[0], three, rel=2e-5)


@pytest.mark.slow
def test_a_run_goes_on_over_2_then_1_then_2_processes(folder, one_process, tmp_path):
    """Stopped twice by SIGTERM: to torchrun, which hands it on, and to one process."""
    flags = ["--batch-size", "40", "--max-steps", "60", "--lr", "1e-4", "--save-every", "0"]
    whole, out_whole = one_process(*flags)
    out = tmp_path / "out"
    arguments = [*files(folder), *flags, "--out", str(out)]
    stops = []
    for n, more in ((2, ["--shard"]), (1, [])):
        metrics, process = out / "metrics.jsonl", start(n, [*arguments, *more, "--resume"])
        wanted = len(rows_of(metrics)) + 3
        while process.poll() is None and len(rows_of(metrics)) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
        assert "SIGTERM: stopped after step" in printed and "--resume" in printed, errors
        assert process.returncode == (143 if n == 1 else 1), errors  # 1 is torchrun's own
        stops.append(max(int(f.name[5:]) for f in (out / "checkpoints").glob("step-*")))
    rows, _ = launch(2, arguments, "--resume")
    assert 0 < stops[0] < stops[1] < 60
    compare(whole, rows, rel=2e-5)
    compare_models(out, out_whole, 1e-5)


def test_sharding_needs_several_processes(folder, tmp_path, capsys):
    arguments = [*files(folder), "--out", str(tmp_path), "--shard"]
    assert "torchrun --nproc-per-node" in fails(capsys, arguments)


def test_a_scheduler_s_variables_for_one_process_start_one(folder, tmp_path, monkeypatch):
    """Kubernetes' training jobs set these four and no LOCAL_RANK, also where there is one pod."""
    names = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert run([*files(folder), "--max-steps", "1", "--out", str(tmp_path / "out")])
    assert not torch.distributed.is_initialized()


def test_a_world_size_without_the_rest_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    error = fails(capsys, [*files(folder), "--out", str(tmp_path / "out")])
    assert "WORLD_SIZE=8, but no MASTER_ADDR and no MASTER_PORT: start with torchrun" in error


STOPPED_IN_EVALUATION = """
import signal, sys, train
evaluate, n = train.evaluate, [0]
def signalled(*args):
    n[0] += 1
    if n[0] == 2:
        signal.raise_signal(signal.SIGTERM)
    return evaluate(*args)
train.evaluate = signalled
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_stop_within_an_evaluation_of_a_sharded_model_is_saved(folder, tmp_path, one_process):
    """Embedding and lm_head are still gathered then, and must go back to their parts first."""
    flags = ["--batch-size", "8", "--max-steps", "8", "--lr", "1e-3", "--eval-every", "4"]
    whole, _ = one_process(*flags)
    (tmp_path / "script.py").write_text(STOPPED_IN_EVALUATION)
    out = tmp_path / "out"
    arguments = [*files(folder), *flags, "--shard", "--out", str(out)]
    process = start(2, [*arguments, "--save-every", "0"], tmp_path / "script.py")
    printed, errors = process.communicate(timeout=300)
    assert "SIGTERM: stopped after step 4 of 8; continue with --resume" in printed, errors
    assert [f.name for f in (out / "checkpoints").glob("*")] == ["step-00000004"]
    rows, _ = launch(2, arguments, "--resume")
    compare(whole, rows, rel=2e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NCCL error in: a.cpp:7\nncclSystemError: ...\nLast error:\nno space in /dev/shm\n",
         ": NCCL error in: a.cpp:7 ... no space in /dev/shm"),
        ("Connection closed by peer [127.0.0.1]", ": Connection closed by peer [127.0.0.1]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_connection_is_said(text, said):
    """NCCL's own reason stands in its last line, and is of this process as often."""
    assert processes.about_peers(RuntimeError(text)).endswith(said)


@pytest.mark.slow
def test_torchrun_hands_on_a_signal_of_slurm_where_it_is_told_to(folder, tmp_path):
    """By itself it dies of SIGUSR1, and leaves its processes to whoever finds them."""
    out = tmp_path / "out"
    arguments = [*files(folder), "--max-steps", "9999", "--save-every", "0", "--out", str(out)]
    process = start(2, arguments, torchrun=["--signals-to-handle", "SIGTERM,SIGUSR1"])
    while len(rows_of(out / "metrics.jsonl")) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    printed, errors = process.communicate(timeout=60)
    assert "SIGUSR1: stopped after step" in printed, errors
    assert [*(out / "checkpoints").glob("step-*")]


def test_a_process_that_loses_another_says_so_in_a_sentence(folder, tmp_path, monkeypatch):
    """Without torchrun, which would end the other process itself, with lines of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = [*files(folder), "--max-steps", "9999", "--out", str(tmp_path / "out")]
    processes = []
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("LOCAL_RANK", number)
        processes.append(Forked("train.py", *arguments))
    while not rows_of(tmp_path / "out" / "metrics.jsonl") and processes[0].poll() is None:
        time.sleep(0.02)
    processes[1].kill()
    _, errors = processes[0].communicate(timeout=100)
    processes[1].communicate()
    assert processes[0].poll() == 1
    (line,) = [line for line in errors.splitlines() if "step/s" not in line]
    assert line.startswith("train.py, process 0: another process of this job has failed or was")
    assert re.search(r"; start again( with --overwrite)?, as there is no checkpoint$", line)
