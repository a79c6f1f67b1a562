"""A step that is not finite: no update, and the rows that are to blame."""

import json
import shutil

import pytest
import torch

import data
import train
from data import step_pairs
from model import ModelConfig, Transformer
from run.saving import training_state
from tests.runs import fails, steps


@pytest.fixture
def poisoned(folder, arguments, tmp_path):
    """A model with a token whose embedding is NaN, and 40 rows of which line 7 has it."""

    torch.manual_seed(0)
    model = Transformer(ModelConfig(1536, 32, 2, 4, 48, n_kv_heads=2, max_seq_len=128))
    tokenizer = data.load_tokenizer(folder / "model")
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.encode("Q", continuation=True)[-1]] = torch.nan
    shutil.copytree(folder / "model", tmp_path / "poisoned")
    model.save_pretrained(tmp_path / "poisoned")
    numbers = [*map(str, range(40))]
    numbers[6] += "Q"
    rows = [{"prompt": "n", "chosen": f" is {k}.", "rejected": " is not."} for k in numbers]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--model", str(tmp_path / "poisoned"), "--data", str(file)]
    return [*arguments, *files], file


def test_what_is_not_finite_stops_the_run_with_step_row_and_term(poisoned, tmp_path, capsys):
    """Also where nobody looks at every step: the rows are those of the step that broke."""
    arguments, file = poisoned
    config = train.parse(arguments)
    rows = data.load_preferences(file)
    bad = next(
        k for k in range(1, 6) if rows[6] in step_pairs(rows, k, config.batch_size, config.seed)
    )
    assert bad > 1  # so that there is a checkpoint
    arguments += ["--save-every", str(bad - 1), "--micro-batch-tokens", "30"]
    for log_every in ("1", "50"):
        out = tmp_path / log_every
        message = fails(capsys, [*arguments, "--log-every", log_every, "--out", str(out)])
        assert (
            f"step {bad}: loss or gradient not finite at {file}:7 (L_SFT and L_OR); nothing was"
            in message
        )
        written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        logged = range(1, bad) if log_every == "1" else []
        assert [row["step"] for row in steps(written)] == list(logged)
        left = [f.name for f in (out / "checkpoints").iterdir()]
        assert left == [f"step-{bad - 1:08d}"] and not (out / "model").exists()


@pytest.mark.parametrize(("lam", "term"), [("1e39", "(L_OR)"), ("1e37", "(its gradient)")])
def test_the_term_that_is_not_finite_is_named(arguments, capsys, lam, term):
    """The first is beyond float32, of the second only the squares that a norm sums."""
    message = fails(capsys, [*arguments, "--lam", lam])
    assert "step 1: loss or gradient not finite at " in message and message.count(term) == 3, (
        message
    )


def test_no_update_is_made_from_a_gradient_that_is_not_finite_nor_after_it():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(50, 16, 2, 2, 24))
    with torch.no_grad():
        model.embed_tokens.weight[49] = torch.inf
    config = train.TrainConfig(lr=1e-2, dtype="float32", weight_decay=0.1)
    optimizer = train.make_optimizer(model, config)
    good, bad = [data.Pair([1], [2, 3], [4])], [data.Pair([1], [2, 49, 3], [4])]

    def changed(pairs) -> bool:
        before = [x.clone() for x in training_state(model, optimizer).values()]
        train.training_step(model, optimizer, train.pack(pairs, config), config)
        after = training_state(model, optimizer).values()
        return not all(map(torch.equal, before, after))

    changed(good)
    assert [changed(pairs) for pairs in (good, bad, good)] == [True, False, False]
