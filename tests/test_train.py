"""The loop: that it computes the objective, and what it hands back."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

import data
import orpo
import train
from data import step_pairs, steps_in_epoch
from examples import minimal
from model import Transformer
from run.flags import BUILTIN
from run.processes import pick_device
from tests.runs import (
    TWELVE_STEPS,
    evaluates_to,
    evaluations,
    file_bytes,
    files,
    run,
    steps,
    weights,
)
from tools import export as export_file


@pytest.mark.parametrize(
    ("sft_loss", "batch"), [("response", ()), ("full", ()), ("full", ("--batch-size", "1000"))]
)
def test_step_1_is_the_objective_by_the_plain_path(arguments, sft_loss, batch):
    """Each pair as two ordinary sequences, logits, log-softmax, orpo_loss, autograd; also where the
    step has fewer pairs than --batch-size."""
    arguments += batch
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


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_without_a_warm_up_the_first_step_is_at_the_peak(schedule):
    """inverse_sqrt then falls as after a warm-up of 10,000 steps."""
    config = train.TrainConfig(lr=1.0, lr_schedule=schedule, warmup_steps=0)
    rates = [train.lr_at(step, 4, config) for step in (1, 2, 3)]
    wanted = {"constant": [1, 1, 1], "linear": [1, 0.75, 0.5]}
    wanted["cosine"] = [1, (1 + 2**-0.5) / 2, 0.5]
    wanted["inverse_sqrt"] = [(10_000 / (10_000 + k)) ** 0.5 for k in range(3)]
    assert rates == pytest.approx(wanted[schedule], rel=1e-9)


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


# ---------------------------------------------------------------------------------------------
# Memory.


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
