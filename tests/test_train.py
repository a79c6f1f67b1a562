"""The loop: what it writes, that it computes the objective, what it hands back; its settings."""

import dataclasses
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import data
import orpo
import train
from data import step_pairs, steps_in_epoch
from examples import minimal
from model import ModelConfig, Transformer, trainable
from run.answers import accepted, answers
from run.flags import BUILTIN, ELSEWHERE
from run.folder import read_rows
from run.lora import add_lora
from run.plan import count_parameters, disk_needed, fixed_memory, out_of_memory_advice
from run.processes import pick_device
from tests.runs import (
    FACTS,
    METRICS,
    ROOT,
    TWELVE_STEPS,
    evaluates_to,
    evaluations,
    fails,
    file_bytes,
    files,
    run,
    steps,
    weights,
)
from tests.small import random_pairs
from tools import export as export_file


def test_every_step_has_one_row_with_every_metric(whole):
    trained = [row for row in whole.rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 13))
    assert all(set(row) == METRICS for row in trained)


def test_epochs_are_counted_in_parts(whole):
    """40 pairs by 8 are 5 steps an epoch."""
    assert [row["epoch"] for row in steps(whole.rows)] == [step / 5 for step in range(1, 13)]


def test_evaluation_comes_before_the_first_update_and_after_the_last(whole):
    before, after = evaluations(whole.rows)
    assert (before["step"], after["step"]) == (0, 12)
    assert {"eval_accepted/sampled", "eval_accepted/greedy"} < set(before) == set(after)


def test_evaluation_keeps_nothing_for_a_backward_pass(folder, monkeypatch):
    outputs, forward = [], train.forward

    def noted(*args):
        outputs.append(forward(*args))
        return outputs[-1]

    monkeypatch.setattr(train, "forward", noted)
    flags = ["--out", "o", "--micro-batch-tokens", "1", "--dtype", "float32"]
    config = train.parse([*files(folder), *flags])
    model, _, _, eval_pairs = train.load_inputs(config)
    train.evaluate(model, eval_pairs, config)
    assert len(outputs) > 1 and not any(output.loss.requires_grad for output in outputs)


def test_an_evaluation_is_the_same_however_it_is_cut(folder):
    flags = [*files(folder), "--out", "o", "--dtype", "float32"]
    config = train.parse([*flags, "--micro-batch-tokens", "1"])
    model, _, _, eval_pairs = train.load_inputs(config)
    cut = train.evaluate(model, eval_pairs, config)
    assert len(train.pack(eval_pairs, config)) == len(eval_pairs) > 1
    whole = train.evaluate(model, eval_pairs, train.parse(flags))
    assert cut == pytest.approx(whole, rel=1e-5)


def test_the_held_out_loss_goes_down(whole):
    before, after = evaluations(whole.rows)
    assert after["eval_loss"] < before["eval_loss"]


def test_plan_and_answers_are_printed(whole):
    for word in ("parameters", "40 pairs of 40", "12 of 8 pairs", "memory", "before:", "after:"):
        assert word in whole.printed


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_step_1_is_the_objective_by_the_plain_path(arguments, sft_loss):
    """Each pair as two ordinary sequences, logits, log-softmax, orpo_loss, autograd."""
    row = run(arguments, "--sft-loss", sft_loss, "--max-steps", "1", "--grad-clip", "0")[1]
    config = train.parse([*arguments, "--sft-loss", sft_loss])
    model = Transformer.from_pretrained(config.model, dtype=torch.float64)
    rows = data.load_preferences(config.data)
    pairs, _ = data.encode_pairs(data.load_tokenizer(config.model), rows, 128, 128)
    sides, nll_all, n_all = {"chosen": [], "rejected": []}, 0.0, 0
    for pair in step_pairs(pairs, 1, config.batch_size, config.seed):
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
    for logps in sides["chosen"]:
        logps.retain_grad()
    loss.backward()
    grad_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    of_loss = torch.cat([logps.grad for logps in sides["chosen"]])  # (B,): dL/dlog P_w
    of_sft = 1 / len(a) if sft_loss == "response" else 0.0
    expected = {
        "pull_ratio": -(of_loss + of_sft).sum(),
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
    pairs = [data.Pair([i], [i], [i]) for i in range(10)]
    epochs = [[step_pairs(pairs, 3 * e + i, 4, 7) for i in (1, 2, 3)] for e in (0, 1)]
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


def test_two_runs_write_the_same_bytes(arguments, whole, tmp_path):
    assert steps(run(arguments)) == steps(whole.rows)
    assert weights(tmp_path / "out") == weights(whole.out)


@pytest.fixture(scope="module")
def bfloat16_model(folder, tmp_path_factory) -> Path:
    """The model of `folder`, stored in bfloat16, with its tokenizer."""
    copy = shutil.copytree(folder / "model", tmp_path_factory.mktemp("bfloat16") / "model")
    Transformer.from_pretrained(copy).save_pretrained(copy, dtype=torch.bfloat16)
    return copy


@pytest.fixture(scope="module")
def handed_back(folder, bfloat16_model, tmp_path_factory) -> Path:
    """The model folder of a run in bfloat16 from a bfloat16 checkpoint."""
    out = tmp_path_factory.mktemp("handed_back") / "out"
    flags = ["--model", str(bfloat16_model), "--dtype", "bfloat16", "--out", str(out)]
    run([*files(folder), *TWELVE_STEPS, *flags])
    return out / "model"


def test_the_model_is_handed_back_in_the_dtype_it_came_in(handed_back):
    trained = Transformer.from_pretrained(handed_back)
    assert json.loads((handed_back / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(p.dtype == torch.bfloat16 for p in trained.parameters())


def test_the_model_that_is_handed_back_is_another(handed_back, bfloat16_model):
    trained, base = map(Transformer.from_pretrained, (handed_back, bfloat16_model))
    assert not torch.equal(trained.lm_head_weight, base.lm_head_weight)


def test_where_to_stop_is_handed_back(handed_back):
    ids = json.loads((handed_back / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2}


def test_the_model_is_handed_back_with_the_files_it_came_with(handed_back, bfloat16_model):
    """And with the chat template of the messages and where to stop."""
    added = {"generation_config.json", "chat_template.jinja"}
    names = {file.name for file in bfloat16_model.iterdir()} | added
    assert {file.name for file in handed_back.iterdir()} == names


CHAT = {
    "prompt": [{"role": "user", "content": "What is the capital of Peru?"}],
    "chosen": [{"role": "assistant", "content": "Lima."}],
    "rejected": [{"role": "assistant", "content": "Oslo."}],
}


@pytest.fixture
def chat(arguments, tmp_path) -> list[str]:
    """Flags for one step on messages."""
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT) + "\n")
    file = str(tmp_path / "chat.jsonl")
    return [*arguments, "--data", file, "--eval-data", file, "--max-steps", "1"]


def test_messages_take_their_chat_template_along(chat, tmp_path):
    run(chat)
    trained = data.load_tokenizer(tmp_path / "out" / "model")
    text = trained.apply_chat_template(CHAT["prompt"], add_generation_prompt=True)
    assert text == "<s><|user|>\nWhat is the capital of Peru?</s>\n<|assistant|>\n"
    assert (tmp_path / "out" / "model" / "chat_template.jinja").is_file()


def test_the_template_of_a_flag_is_used_and_taken_along(chat, tmp_path, capsys):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    run(chat, "--chat-template", str(template))
    trained = data.load_tokenizer(tmp_path / "out" / "model")
    assert trained.apply_chat_template(CHAT["prompt"]) == "<s>[What is the capital of Peru?]"
    shown = capsys.readouterr().out.replace("·", "")
    assert "[What is the capital of Peru?]" in shown and "[Lima.]</s>" in shown


def test_the_best_model_is_that_of_the_lowest_evaluation(arguments, tmp_path, monkeypatch, capsys):
    """Of the first where two are equal; the model before training does not count, but is told."""
    evaluates_to(monkeypatch, 1.0, 5.0, 3.0, 3.0, 4.0)
    every = ["--eval-every", "3", "--save-every", "3", "--keep", "9"]
    rows, out = run(arguments, *every), tmp_path / "out"
    text = f"wrote {out}/best, the model of step 6: the lowest eval_loss, 3.0000 (but 1.0000 before"
    assert text in capsys.readouterr().out
    best = file_bytes(out / "best")
    assert [json.loads(best.pop("evaluation.json"))] == [
        row for row in evaluations(rows) if row["step"] == 6
    ]
    export_file.main([f"{out}/checkpoints/step-00000006", "--out", str(tmp_path / "exported")])
    assert best == file_bytes(tmp_path / "exported")
    assert best.keys() == file_bytes(out / "model").keys()
    assert best["model.safetensors"] != weights(out)


def test_without_eval_every_there_is_no_best_model(whole):
    assert not (whole.out / "best").exists() and "best" not in whole.printed


def test_the_best_model_is_not_replaced_by_a_run_on_it(arguments, capsys, tmp_path):
    shutil.copytree(arguments[1], tmp_path / "out" / "best")
    message = fails(capsys, [*arguments, "--model", str(tmp_path / "out" / "best")])
    assert "its best/ would replace --model" in message


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


def test_eval_fraction_evaluates_on_a_part_of_the_rows_instead(folder, tmp_path, capsys):
    flags = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    flags += ["--out", str(tmp_path / "out"), "--max-steps", "1", "--device", "cpu"]
    rows = run(flags, "--eval-fraction", "0.25")
    assert [row["step"] for row in evaluations(rows)] == [0, 1]
    rows = data.load_preferences(folder / "train.jsonl")
    train_rows, held_out = data.hold_out(rows, 0.25, seed=42)
    printed = capsys.readouterr().out
    assert f"pairs of {len(train_rows)};" in printed and f"pairs of {len(held_out)};" in printed


@pytest.fixture(scope="module")
def bfloat16_run(folder, tmp_path_factory) -> tuple[list[dict], Path]:
    """Rows and folder of the run that `whole` is, but with products in bfloat16."""
    out = tmp_path_factory.mktemp("bfloat16") / "out"
    flags = ["--out", str(out), *TWELVE_STEPS, "--dtype", "bfloat16"]
    return steps(run([*files(folder), *flags])), out


def test_bfloat16_starts_where_float32_does(bfloat16_run, whole):
    ours, float32 = bfloat16_run[0][0]["loss"], steps(whole.rows)[0]["loss"]
    assert ours == pytest.approx(float32, rel=1e-2) and ours != float32


def test_bfloat16_learns(bfloat16_run):
    rows, _ = bfloat16_run
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_bfloat16_keeps_float32_masters(bfloat16_run):
    """So what is saved has digits that bfloat16 has not."""
    saved = Transformer.from_pretrained(bfloat16_run[1] / "model").lm_head_weight
    assert saved.dtype == torch.float32 and not torch.equal(saved, saved.bfloat16().float())


def test_log_every_thins_the_rows_and_changes_none(arguments, whole):
    thin = steps(run(arguments, "--log-every", "5"))
    assert thin == [row for row in steps(whole.rows) if row["step"] in (5, 10, 12)]


def test_eval_only_prints_the_row_that_training_starts_with(arguments, whole, capsys):
    """And nothing else, but for what the row depends on."""
    train.main([*arguments, "--eval-only"])
    expected = whole.rows[0] | {"lam": 0.5, "sft_loss": "response"}
    assert json.loads(capsys.readouterr().out) == expected


def test_a_runs_config_evaluates_its_model_as_the_run_did(whole, capsys):
    """By its own lam, on its own rows."""
    flags = ["--config", str(whole.out / "config.json"), "--model", str(whole.out / "model")]
    train.main([*flags, "--eval-only"])
    expected = whole.rows[-1] | {"step": 0, "lam": 0.5, "sft_loss": "response"}
    row = json.loads(capsys.readouterr().out)
    # The seed of sampled answers goes with the step.
    assert row | {"eval_accepted/sampled": 0} == expected | {"eval_accepted/sampled": 0}


def test_eval_only_evaluates_on_what_was_held_out(folder, tmp_path, capsys):
    flags = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    flags += ["--eval-fraction", "0.25", "--device", "cpu"]
    before, _ = evaluations(run(flags, "--out", str(tmp_path / "out"), "--max-steps", "1"))
    capsys.readouterr()
    train.main([*flags, "--eval-only"])
    row = json.loads(capsys.readouterr().out)
    assert {name: row[name] for name in before} == before


def test_what_eval_only_leaves_is_no_run_to_protect(arguments):
    train.main([*arguments, "--eval-only"])
    assert len(run(arguments, "--max-steps", "1")) == 3


def test_eval_only_leaves_the_rows_of_a_run_alone(arguments, whole, tmp_path):
    (tmp_path / "out").mkdir()
    metrics = Path(shutil.copy(whole.out / "metrics.jsonl", tmp_path / "out"))
    before = metrics.read_bytes()
    train.main([*arguments, "--eval-only"])
    assert metrics.read_bytes() == before


def test_another_programs_metrics_are_no_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'3\n[1]\n"loss"\n{"loss": 1}\n\xff\n')
    assert read_rows(tmp_path) == []


@pytest.mark.parametrize("said", ["y", "y z", "Y", ""], ids=repr)
def test_only_an_exact_answer_is_accepted(said, monkeypatch):
    """Two of three rows list what they accept. The sampled answers are both right, and of the
    greedy ones half is: the first, "x", but not another text than "z" or "yz"."""
    monkeypatch.setattr(
        "run.answers.answers",
        lambda *args, temperature, **_: ["x", "yz"] if temperature else ["x", said],
    )
    pair = data.Pair([1, 5], [6, 2], [7, 2])
    pairs = [pair._replace(accept=accept) for accept in (["x"], None, ["z", "yz"])]
    shares = accepted(Transformer(ModelConfig(10, 8, 1, 1, 8)), None, pairs, 0)
    assert shares == {"eval_accepted/sampled": 1.0, "eval_accepted/greedy": 0.5}


def test_an_answer_is_without_the_end_that_its_template_writes(folder, monkeypatch):
    """A base model whose EOS is another token writes <|im_end|> as text before it stops."""
    model = Transformer.from_pretrained(folder / "model")
    tokenizer = data.load_tokenizer(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "Lima.<|im_end|>\n")
    assert tokenizer.turn_end() == "<|im_end|>"
    assert answers(model, tokenizer, [[1, 5]], 3) == ["Lima."]


def test_a_prompt_that_fills_the_context_has_no_answer(folder):
    model = Transformer.from_pretrained(folder / "model")
    tokenizer = data.load_tokenizer(folder / "model")
    full = [1] * model.config.max_seq_len
    assert answers(model, tokenizer, [full, [1, 5]], 3)[0] == ""


def test_overwrite_replaces_an_earlier_run_and_nothing_else(arguments, tmp_path, capsys):
    run(arguments, "--max-steps", "2", "--save-every", "1")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds a run; add --resume or --overwrite" in fails(capsys, arguments)
    rows = run(arguments, "--max-steps", "1", "--save-every", "0", "--overwrite")
    assert [row["step"] for row in rows] == [0, 1, 1]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"notes.txt", "metrics.jsonl", "config.json", "model", "finished"}


def test_a_configs_overwrite_is_about_the_folder_that_it_names_itself():
    """So that whoever names another --out loses nothing there."""
    assert train.parse(["--config", str(BUILTIN)]).overwrite
    assert not train.parse(["--config", str(BUILTIN), "--out", "mine"]).overwrite
    assert train.parse(["--config", str(BUILTIN), "--out", "mine", "--overwrite"]).overwrite


@pytest.mark.parametrize("batch_tokens", [1, 200, 10**6])
def test_answers_do_not_depend_on_their_neighbours(batch_tokens):
    """Greedy ones of prompts of 1 to 60 tokens: in one batch, in some, one by one."""
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(FACTS / "base")
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 200) for _ in range(rng.randint(1, 60))] for _ in range(9)]
    batches = []
    together = answers(
        model, tokenizer, prompts, 24, batch_tokens, lambda b: batches.extend(b) or b
    )
    assert len(batches) in {1: [9], 200: range(3, 9), 10**6: [1]}[batch_tokens]
    assert together == [answers(model, tokenizer, [p], 24)[0] for p in prompts]
    assert len(set(together)) > 4


def test_sampled_answers_are_those_of_the_generator():
    model = Transformer.from_pretrained(FACTS / "base", dtype=torch.float32)
    tokenizer = data.load_tokenizer(FACTS / "base")
    prompts = [[5], [6, 7, 8], [9] * 20]
    first, again, other = (
        answers(
            model, tokenizer, prompts, 24, temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    )  # fmt: skip
    assert first == again != other


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
    assert Path(config.out).resolve() == ROOT / "out" / "builtin" and config.overwrite
    assert train.parse(["--config", str(BUILTIN)]) == config
    assert train.parse(["--seed", "7"]).seed == 7


def complaint(flags: list[str]) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train.parse(flags)
    return str(error.value)


GIVEN = ["--model", "m", "--data", "d", "--out", "o"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such"], "unrecognized arguments: --no-such (see python train.py --help)"),
        (["--max-step", "3"], "--max-step 3; did you mean --max-steps (number of updates"),
        (["--learning_rate=1"], "did you mean --lr (peak learning rate of AdamW)?"),
        (
            ["--beta", "1", "--bf16"],
            "did you mean --lam (weight of L_OR; TRL calls it beta) and",
        ),
        (["--eval-every", "2"], "--eval-every needs evaluation data: add --eval-data or --eval-fr"),
        (
            ["--eval-data", "e", "--eval-fraction", "0.1"],
            "--eval-fraction and --eval-data do not",
        ),
        (["--lr"], "argument --lr: expected one argument"),
        (["--lam", "much"], "argument --lam: invalid float value: 'much'"),
        (["--max-steps", "1.5"], "argument --max-steps: invalid int value: '1.5'"),
        (["--sft-loss", "half"], "argument --sft-loss: invalid choice: 'half'"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--lr", "nan"], "--lr must be at least 0, not nan"),
        (["--lr", "inf"], "--lr must be at least 0, not inf"),
        (["--lam", "-1"], "--lam must be at least 0, not -1.0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--adam-beta1", "1"], "--adam-beta1 must be at least 0 and below 1, not 1.0"),
        (["--adam-beta2", "1"], "--adam-beta2 must be at least 0 and below 1, not 1.0"),
        (["--seed", "-1"], "--seed must be at least 0 and below 9223372036854775808, not -1"),
        (["--seed", str(2**64)], "--seed must be at least 0 and below 9223372036854775808, not 18"),
        (["--lora-rank", "-1"], "--lora-rank must be at least 0, not -1"),
        (["--shard", "--lora-rank", "2"], "--shard and --lora-rank do not go together"),
        (["--lora-adapters"], "--lora-adapters needs --lora-rank"),
        (["--dry-run", "--eval-only"], "--dry-run plans a training run, and --eval-only is none"),
        (["--config", "nowhere.json"], "nowhere.json: no such file"),
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_named(flags, words):
    assert words in complaint([*GIVEN, *flags])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"lam": "0.1"}', "--lam must be a number, not '0.1'"),
        ('{"lr": NaN}', "--lr must be at least 0, not nan"),
        ('{"resume": 1}', "--resume must be true or false, not 1"),
        ('{"epochs": true}', "--epochs must be a whole number, not True"),
        ('{"sft_loss": "half"}', "--sft-loss must be one of response, full, not 'half'"),
        ('{"xyz": 1}', "unknown: xyz; known: model, data, "),
        ('{"num_train_epochs": 1}', "unknown: num_train_epochs; did you mean --epochs (passes"),
        ("[]", "a JSON object is expected, not list"),
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_config_names_its_file(tmp_path, text, words):
    file = tmp_path / "settings.json"
    file.write_text(text)
    assert complaint([*GIVEN, "--config", str(file)]).startswith(f"{file}: {words}")


def test_what_is_missing_is_asked_for():
    assert "--out is needed" in complaint(["--model", "m", "--data", "d"])
    assert "--eval-data is needed" in complaint(["--model", "m", "--eval-only"])
    held_out = ["--model", "m", "--eval-only", "--eval-fraction", "0.1"]
    assert "--data is needed" in complaint(held_out)


def test_the_flags_of_other_programs_lead_to_ours():
    ours = {f.name.replace("_", "-") for f in dataclasses.fields(train.TrainConfig)}
    theirs = " ".join(ELSEWHERE.values()).split()
    assert set(ELSEWHERE) <= ours and not set(theirs) & ours
    assert len(set(theirs)) == len(theirs)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu", "--device tpu: unknown; use cpu, cuda or cuda:1"),
        ("meta", "--device meta: only cpu and cuda are supported"),
        ("cuda:77", "--device cuda:77: this machine shows {} CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, words):
    with pytest.raises(ValueError) as error:
        pick_device(train.TrainConfig(device=device))
    assert str(error.value) == words.format(torch.cuda.device_count())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused():
    with pytest.raises(ValueError, match="--device cuda: this machine shows 0 CUDA devices"):
        pick_device(train.TrainConfig(device="cuda"))


# ---------------------------------------------------------------------------------------------
# Memory.


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


def test_the_files_of_a_run_are_as_large_as_the_plan_says(whole):
    model = Transformer.from_pretrained(whole.out / "model")
    needed, n_checkpoints = disk_needed(model, 12, train.TrainConfig())
    files = [*whole.out.glob("model/*.safetensors"), *whole.out.glob("checkpoints/*/*.distcp")]
    assert n_checkpoints == 1
    # Each tensor of a checkpoint has a header, which counts where tensors are tiny.
    assert sum(file.stat().st_size for file in files) == pytest.approx(needed, rel=0.15)


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
    for way in ("micro-batch-tokens", "max-length", "activation-checkpointing", "lora-rank"):
        assert f"--{way}" in message


def test_minimal_py_takes_the_same_steps():
    """examples/minimal.py, on padded batches by autograd: the losses of the first ten steps."""
    config = train.parse(["--device", "cpu"])
    pick_device(config)
    model, _, pairs, _ = train.load_inputs(config)
    optimizer = train.make_optimizer(model, config)
    n_steps, losses = config.epochs * steps_in_epoch(len(pairs), config.batch_size), []
    for step in range(1, 11):
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(step, n_steps, config)
        batches = train.pack(step_pairs(pairs, step, config.batch_size, config.seed), config)
        outputs, _ = train.training_step(model, optimizer, batches, config)
        losses.append(sum(output.loss.item() for output in outputs))
    settings = json.loads(BUILTIN.read_text())
    plain = minimal.train(train.load_model(config), pairs, settings)
    assert list(itertools.islice(plain, 10)) == pytest.approx(losses, rel=1e-5)
    assert losses[9] < losses[0] - 0.1  # they are steps, and not ten times the same
