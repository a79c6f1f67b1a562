"""The loop: what it writes, that it computes the objective, and that it can be interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import data
import orpo
import train
from checkpoint import FAMILIES
from model import ModelConfig, Transformer, rotary
from tests.layout import segments_of

FACTS = Path(train.__file__).parent / "examples" / "facts"
METRICS = {
    *("step", "loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "grad_norm", "epoch"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "learning_rate"),
    *("tokens_per_second", "tflops", "peak_memory_gb"),
}
CLOCKS = {"tokens_per_second", "tflops", "peak_memory_gb"}  # differ from run to run


def run(arguments: list[str], *more: str) -> list[dict]:
    """Runs train.py in this process; the rows it wrote."""
    arguments = [*arguments, *more]
    train.main(arguments)
    last_out = len(arguments) - arguments[::-1].index("--out")
    lines = (Path(arguments[last_out]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def steps(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows if "loss" in row]


def test_every_step_has_one_row_with_every_metric_and_the_loss_goes_down(arguments, capsys):
    rows = run(arguments)
    trained, evaluated = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [r["step"] for r in trained] == list(range(1, 13))
    assert all(set(r) == METRICS for r in trained)
    assert [r["step"] for r in evaluated] == [0, 12]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert {"eval_accepted/sampled", "eval_accepted/greedy"} < set(evaluated[0])
    assert trained[4]["epoch"] == 1 and trained[11]["epoch"] == 12 / 5
    printed = capsys.readouterr().out
    for word in ("parameters", "40 pairs of 40", "12 of 8 pairs", "memory", "before:", "after:"):
        assert word in printed


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_step_1_is_the_objective_by_the_plain_path(arguments, sft_loss):
    """Each pair as two ordinary sequences, logits, log-softmax, orpo_loss, autograd."""
    row = run(arguments, "--sft-loss", sft_loss, "--max-steps", "1", "--grad-clip", "0")[1]
    config = train.parse([*arguments, "--sft-loss", sft_loss])
    model = Transformer.from_pretrained(config.model, dtype=torch.float64)
    rows = data.load_preferences(config.data)
    pairs, _ = data.encode_rows(data.load_tokenizer(config.model), rows, 128, 128)
    sides, nll_all, n_all = {"chosen": [], "rejected": []}, 0.0, 0
    for pair in train.step_pairs(pairs, 1, config):
        for name, logps in sides.items():
            tokens = torch.tensor([[*pair.prompt, *getattr(pair, name)]])
            mask = torch.arange(1, tokens.shape[1])[None] >= len(pair.prompt)
            logits = model(tokens)[:, :-1]
            logps.append(orpo.response_logps(logits, tokens[:, 1:], mask))
            if name == "chosen":
                log_softmax = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])
                nll_all, n_all = nll_all - log_softmax.sum(), n_all + tokens.shape[1] - 1
    a, b = torch.cat(sides["chosen"]), torch.cat(sides["rejected"])
    l_or = orpo.odds_ratio_loss(a, b).mean()
    nll = -a.mean() if sft_loss == "response" else nll_all / n_all
    loss = nll + 0.5 * l_or
    loss.backward()
    grad_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    expected = {
        "loss": loss,
        "nll_loss": nll,
        "log_odds_ratio": -l_or,
        "log_odds_chosen": (orpo.log_odds(a) - orpo.log_odds(b)).mean(),
        "rewards/chosen": 0.5 * a.mean(),
        "rewards/rejected": 0.5 * b.mean(),
        "rewards/margins": 0.5 * (a - b).mean(),
        "rewards/accuracies": (a > b).double().mean(),
        "logps/chosen": a.mean(),
        "logps/rejected": b.mean(),
        "grad_norm": grad_norm,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_a_step_ignores_how_it_is_cut_into_micro_batches(arguments, tmp_path, sft_loss):
    whole, cut = (
        steps(run(arguments, "--sft-loss", sft_loss, *budget, "--out", str(tmp_path / budget[1])))
        for budget in (("--micro-batch-tokens", "100000"), ("--micro-batch-tokens", "70"))
    )
    for a, b in zip(whole, cut, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-5)


def test_every_pair_is_seen_once_an_epoch_also_in_a_short_last_step():
    config = train.TrainConfig(batch_size=4, seed=7)
    pairs = [data.Pair([i], [i], [i]) for i in range(10)]
    epochs = [[train.step_pairs(pairs, 3 * e + i, config) for i in (1, 2, 3)] for e in (0, 1)]
    assert [len(step) for step in epochs[0]] == [4, 4, 2]
    seen = [[pair.prompt[0] for step in epoch for pair in step] for epoch in epochs]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(10)) and seen[0] != seen[1]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        # (1 + cos(pi k/4)) / 2 for k = 0, 1, 2, 3
        ("cosine", [0.5, 1, 1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
        ("inverse_sqrt", [0.5, 1, 1, (2 / 3) ** 0.5, 0.5**0.5, 0.4**0.5]),
    ],
)
def test_learning_rate_warms_up_then_decays(schedule, expected):
    config = train.TrainConfig(lr=1.0, lr_schedule=schedule, warmup_steps=2)
    assert [train.lr_at(s, 6, config) for s in range(1, 7)] == pytest.approx(expected)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


def kill_at(monkeypatch, step: int):
    """Training dies while `step`'s metrics are read, before its row is written."""

    class Dying(train.HostCopy):
        rows = 0

        def read(self):
            Dying.rows += "grad_norm" in self.names
            if Dying.rows == step:
                raise Killed
            return super().read()

    monkeypatch.setattr(train, "HostCopy", Dying)


@pytest.mark.parametrize(("save_every", "killed_at"), [(4, 10), (4, 3), (5, 6)])
def test_resume_is_bitwise(arguments, tmp_path, monkeypatch, save_every, killed_at):
    """Killed after a checkpoint, before the first one, and right behind one."""
    arguments += ["--save-every", str(save_every), "--eval-every", "4"]
    whole = run(arguments, "--out", str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, killed_at)
        run(arguments)
    with open(tmp_path / "out" / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "lo')  # a row half written
    resumed = run(arguments, "--resume")
    assert steps(resumed) == steps(whole)
    assert [r for r in resumed if "eval_loss" in r] == [r for r in whole if "eval_loss" in r]
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("out", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resuming_with_other_settings_is_refused_by_name(arguments, capsys):
    run(arguments, "--save-every", "6")
    message = fails(capsys, [*arguments, "--save-every", "6", "--resume", "--lam", "0.1"])
    assert "lam" in message and "0.5" in message and "0.1" in message


def test_a_run_goes_on_with_smaller_micro_batches(arguments, tmp_path, monkeypatch):
    """Whoever ran out of memory can."""
    whole = run(arguments, "--out", str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8)
        run(arguments, "--save-every", "5")
    smaller = ["--micro-batch-tokens", "60", "--activation-checkpointing", "--save-every", "3"]
    for row, wanted in zip(steps(run(arguments, "--resume", *smaller)), steps(whole), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


def test_a_moved_run_can_be_resumed(arguments, tmp_path):
    whole = run(arguments, "--save-every", "5")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = run(arguments, "--save-every", "5", "--resume", "--out", str(tmp_path / "elsewhere"))
    assert steps(moved) == steps(whole)


def test_a_finished_run_resumes_to_itself(arguments):
    whole = run(arguments, "--save-every", "12")
    assert run(arguments, "--save-every", "12", "--resume") == whole


def test_two_runs_write_the_same_bytes(arguments, tmp_path):
    runs = [tmp_path / name for name in "ab"]
    rows = [steps(run(arguments, "--out", str(out))) for out in runs]
    assert rows[0] == rows[1]
    a, b = ((out / "model" / "model.safetensors").read_bytes() for out in runs)
    assert a == b


def test_the_model_is_handed_back_in_the_dtype_and_with_the_files_it_came_with(
    folder, arguments, tmp_path
):
    bf16 = tmp_path / "bf16"
    shutil.copytree(folder / "model", bf16)
    Transformer.from_pretrained(bf16).save_pretrained(bf16, dtype=torch.bfloat16)
    run(arguments, "--model", str(bf16), "--dtype", "bfloat16")
    out = tmp_path / "out" / "model"
    trained, base = Transformer.from_pretrained(out), Transformer.from_pretrained(bf16)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(p.dtype == torch.bfloat16 for p in trained.parameters())
    assert not torch.equal(trained.lm_head_weight, base.lm_head_weight)
    assert {f.name for f in out.iterdir()} == {f.name for f in bf16.iterdir()} | {
        "generation_config.json"
    }


def test_messages_take_their_chat_template_along(folder, arguments, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "What is the capital of Peru?"}],
        "chosen": [{"role": "assistant", "content": "Lima."}],
        "rejected": [{"role": "assistant", "content": "Oslo."}],
    }
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(row) + "\n")
    run(arguments, "--data", str(file), "--eval-data", str(file), "--max-steps", "1")
    trained = data.load_tokenizer(tmp_path / "out" / "model")
    text = trained.apply_chat_template(row["prompt"], add_generation_prompt=True)
    assert text == "<|user|>\nWhat is the capital of Peru?</s>\n<|assistant|>\n"
    assert (tmp_path / "out" / "model" / "chat_template.jinja").is_file()


def test_the_template_of_a_flag_is_used_and_taken_along(arguments, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Lima."}],
        "rejected": [{"role": "assistant", "content": "Oslo."}],
    }
    file, template = tmp_path / "chat.jsonl", tmp_path / "mine.jinja"
    file.write_text(json.dumps(row) + "\n")
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    files = ["--data", str(file), "--eval-data", str(file), "--chat-template", str(template)]
    run(arguments, *files, "--max-steps", "1")
    assert data.load_tokenizer(tmp_path / "out" / "model").chat_template == template.read_text()


def test_eval_fraction_holds_out_prompts_whole(folder, tmp_path, capsys):
    """A quarter of the prompts, rounded, is on the other side, with all the rows they have."""
    flags = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    flags += ["--out", str(tmp_path / "out"), "--max-steps", "1", "--device", "cpu"]
    rows = run(flags, "--eval-fraction", "0.25")
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 1]
    rows = data.load_preferences(folder / "train.jsonl")
    train_rows, held_out = data.hold_out(rows, 0.25, seed=42)
    prompts = [{row.prompt for row in part} for part in (train_rows, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == round(0.25 * len(prompts[0] | prompts[1]))
    printed = capsys.readouterr().out
    assert f"pairs of {len(train_rows)};" in printed and f"pairs of {len(held_out)};" in printed


def test_bfloat16_starts_where_float32_does_and_keeps_float32_masters(arguments, tmp_path):
    a = steps(run(arguments, "--out", str(tmp_path / "a")))
    b = steps(run(arguments, "--dtype", "bfloat16", "--out", str(tmp_path / "b")))
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-2)
    assert a[0]["loss"] != b[0]["loss"]
    assert b[-1]["loss"] < b[0]["loss"]
    saved = Transformer.from_pretrained(tmp_path / "b" / "model")
    assert saved.lm_head_weight.dtype == torch.float32


def test_log_every_thins_the_rows_and_changes_none(arguments, tmp_path):
    every = steps(run(arguments, "--out", str(tmp_path / "a")))
    thin = steps(run(arguments, "--out", str(tmp_path / "b"), "--log-every", "5"))
    assert thin == [row for row in every if row["step"] in (5, 10, 12)]


def test_eval_only_prints_the_row_that_training_starts_with(arguments, tmp_path, capsys):
    row = run(arguments, "--max-steps", "1")[0]
    capsys.readouterr()
    train.main([*arguments, "--eval-only", "--out", str(tmp_path / "eval")])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == row
    run(arguments, "--max-steps", "1", "--out", str(tmp_path / "eval"))  # is no run to protect
    before = (tmp_path / "eval" / "metrics.jsonl").read_bytes()
    train.main([*arguments, "--eval-only", "--out", str(tmp_path / "eval")])
    assert (tmp_path / "eval" / "metrics.jsonl").read_bytes() == before


def test_accepted_counts_exact_answers(folder, monkeypatch):
    """2 of 3 rows have accept; of these answers, one is right: 1/2."""
    tokenizer = data.load_tokenizer(folder / "model")
    pair = data.Pair([1, 5], [6, 2], [7, 2])
    pairs = [pair._replace(accept=accept) for accept in (["x"], None, ["y", "z"])]
    model = Transformer(ModelConfig(10, 8, 1, 1, 8))
    monkeypatch.setattr(train, "answers", lambda model, tok, prompts, *a, **k: ["z"] * len(prompts))
    shares = train.accepted(model, tokenizer, pairs, 0)
    assert shares == {"eval_accepted/sampled": 0.5, "eval_accepted/greedy": 0.5}


def test_an_answer_is_without_the_end_that_its_template_writes(folder, monkeypatch):
    """A base model whose EOS is another token writes <|im_end|> as text before it stops."""
    model = Transformer.from_pretrained(folder / "model")
    tokenizer = data.load_tokenizer(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "Lima.<|im_end|>\n")
    assert tokenizer.turn_end() == "<|im_end|>"
    assert train.answers(model, tokenizer, [[1, 5]], 3) == ["Lima."]


def test_a_prompt_that_fills_the_context_has_no_answer(folder):
    model = Transformer.from_pretrained(folder / "model")
    tokenizer = data.load_tokenizer(folder / "model")
    full = [1] * model.config.max_seq_len
    assert train.answers(model, tokenizer, [full, [1, 5]], 3)[0] == ""


def test_the_built_in_folder_is_replaced_by_the_built_in_job_alone(
    arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = ["--out", str(train.BUILTIN_OUT)]
    run(arguments, *out, "--max-steps", "1")
    assert "holds a run" in fails(capsys, [*arguments, *out])


def test_answers_do_not_depend_on_their_neighbours(folder):
    """Greedy answers in one call, grouped by prompt length, equal those asked one at a time."""
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(FACTS / "base")
    rows = data.load_preferences(FACTS / "eval.jsonl")[:12]
    prompts = [data.encode_prompt(tokenizer, row.prompt) for row in rows]
    together = train.answers(model, tokenizer, prompts, 24)
    assert together == [train.answers(model, tokenizer, [p], 24)[0] for p in prompts]
    assert any(together)


# ---------------------------------------------------------------------------------------------
# Settings and what is wrong with them.


def test_flags_win_over_the_config_and_its_paths_are_relative_to_it(folder, tmp_path):
    file = folder / "settings.json"
    settings = {"model": "model", "data": "train.jsonl", "out": "o", "lam": 0.25, "lr": 1e-3}
    file.write_text(json.dumps(settings))
    config = train.parse(["--config", str(file), "--lr", "2e-3"])
    assert (config.lam, config.lr) == (0.25, 2e-3)
    assert Path(config.model).resolve() == (folder / "model").resolve()
    assert Path(config.out).resolve() == (folder / "o").resolve()


def test_no_flag_means_the_built_in_job():
    config = train.parse([])
    assert Path(config.model).resolve() == (FACTS / "base").resolve()
    assert config.out == str(train.BUILTIN_OUT)
    assert train.parse(["--config", str(train.BUILTIN)]) == config
    assert train.parse(["--seed", "7"]).seed == 7


def fails(capsys, arguments, most: int = 3) -> str:
    """The complaint of a run that must end with status 2 and a short message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "train.py: " in message and len(message.splitlines()) <= most, message
    return message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--lam", "-1"], "--lam must be at least 0"),
        (["--lam", "much"], "--lam"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--adam-beta2", "1"], "--adam-beta2 must be at least 0 and below 1"),
        (["--sft-loss", "half"], "--sft-loss"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:77"], "CUDA devices"),
        (["--max-prompt-length", "1"], "no pairs left of 40 rows: 40 prompt over 1 tokens"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--out", __file__], "is a file"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
    ],
)
def test_a_wrong_flag_gets_one_sentence(arguments, capsys, flags, expected):
    assert expected in fails(capsys, arguments + flags)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"lam": "0.1"}', "--lam must be float, not '0.1'"),
        ('{"lamb": 1}', "unknown: lamb"),
        ("[]", "not an object"),
        ("{", "not JSON"),
        ('{"resume": 1}', "--resume must be bool"),
    ],
)
def test_a_wrong_config_names_its_file(arguments, capsys, tmp_path, text, expected):
    file = tmp_path / "settings.json"
    file.write_text(text)
    message = fails(capsys, [*arguments, "--config", str(file)])
    assert expected in message and str(file) in message


def test_a_bad_row_names_file_and_line(arguments, capsys, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    assert f"{file}:2: key 'chosen' is missing" in fails(capsys, [*arguments, "--data", str(file)])


def test_an_out_that_holds_a_run_is_not_overwritten(arguments, capsys):
    before = run(arguments, "--max-steps", "1")
    assert "--resume" in fails(capsys, arguments)
    assert len(before) == 3


def test_what_is_missing_is_asked_for(capsys, folder):
    assert "--out is needed" in fails(
        capsys, ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    )
    assert "--eval-data is needed" in fails(
        capsys, ["--model", str(folder / "model"), "--eval-only"]
    )


def test_a_tokenizer_larger_than_the_embedding_is_refused(arguments, folder, tmp_path, capsys):
    torch.manual_seed(0)
    Transformer(ModelConfig(100, 16, 1, 2, 16)).save_pretrained(tmp_path / "small")
    shutil.copyfile(folder / "model" / "tokenizer.model", tmp_path / "small" / "tokenizer.model")
    message = fails(capsys, [*arguments, "--model", str(tmp_path / "small")])
    assert "1535" in message and "100" in message


def test_the_fixed_memory_is_counted_from_the_parameters(monkeypatch):
    model, config = Transformer(ModelConfig(100, 16, 2, 2, 24)), train.TrainConfig(dtype="bfloat16")
    n = sum(p.numel() for p in model.parameters())
    assert train.count_parameters(model) == (n, n)
    assert train.fixed_memory(n, n, config) == 16 * n  # weights, gradients, two moments: float32
    monkeypatch.setattr(train, "world_size", lambda: 4)
    assert train.fixed_memory(n, n, config) == 16 * n
    assert train.fixed_memory(n, n, train.TrainConfig(shard=True)) == 4 * n
    model.add_lora(3, 16.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert train.count_parameters(model) == (trained, n)
    config.lora_rank = 3
    assert train.fixed_memory(trained, n, config) == 2 * n + 16 * trained


@pytest.mark.parametrize(
    ("settings", "pairs", "words", "not_words"),
    [
        ({}, [], ["do not fit", "--shard", "--lora-rank 16"], ["what helps"]),
        ({"shard": True}, [], ["do not fit", "more GPUs would"], ["--lora-rank"]),
        ({}, [50, 40], ["90 tokens", "--activation-checkpointing", "--micro-batch-tokens"], []),
        ({}, [90], ["--max-length below", "--shard"], ["--micro-batch-tokens below"]),
        ({"activation_checkpointing": 1}, [50, 40], ["of more blocks"], []),
        ({"activation_checkpointing": True}, [50, 40], ["--micro-batch"], ["checkpointing"]),
    ],
)
def test_running_out_of_memory_names_what_helps(
    settings, pairs, words, not_words, folder, monkeypatch
):
    """On a card that weights, gradients and moments fit by half, or not at all."""
    config = train.TrainConfig(str(folder / "model"), device="cuda:0", **settings)
    n = 16 * sum(p.numel() for p in Transformer.from_pretrained(folder / "model").parameters())

    class Card:
        total_memory = 2 * n if pairs else n // 2

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    pairs = [data.Pair([1] * 10, [2] * (n - 20), [3] * 10) for n in pairs]
    with pytest.raises(ValueError) as error, train.out_of_memory_advice(config, pairs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    message = str(error.value)
    assert all(word in message for word in words), message
    assert not any(word in message for word in not_words), message


@pytest.mark.parametrize("family", ["gpt2", "phi", "opt"])
def test_what_a_block_keeps_is_within_15_percent_of_what_autograd_saves(family):
    """With LayerNorm, which is one kernel on a CPU too, and without what attention adds there."""
    values = FAMILIES[family].values | {"family": family, "max_seq_len": 600}
    model = Transformer(ModelConfig(100, 64, 1, 2, 256, **values))
    model.compute_dtype = torch.float32
    pairs = [data.Pair([1] * 200, [2] * 150, [3] * 100)]
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    (batch,) = data.micro_batches(pairs, 10**9, "full")
    x = torch.randn(len(batch.tokens), 64, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        cos, sin = rotary(batch.positions, model.config)
        out = model.layers[0](x, cos, sin, segments_of(batch))
    kept = sum(n for pointer, n in kept.items() if pointer not in parameters)
    padded = 4 * 64 * (550 + 2 * 600)  # queries and keys of attention once more, in rectangles
    estimate, entrance = train.block_memory(model, pairs)
    assert out.shape == x.shape and entrance == x.nbytes
    assert estimate + padded == pytest.approx(kept, rel=0.15)
