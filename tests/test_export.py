"""A training checkpoint as a model folder. Whole runs, LoRA's too, compare it with OUT/model:
in test_train.py, test_lora.py, test_distributed.py."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from formats.config import write_config
from formats.families import FAMILIES
from model import Transformer
from run.saving import save_state
from tests.runs import file_bytes
from tests.small import random_model, state
from tools import export as export_file
from tools.export import export


def step_folder(tmp_path, model: Transformer):
    """A checkpoint as train.py writes it, without tokenizer files."""

    def write_more(folder):
        (folder / "model").mkdir()
        write_config(folder / "model", model.config, torch.bfloat16)

    moments = {f"{name}.exp_avg": torch.ones_like(p) for name, p in state(model).items()}
    save_state(tmp_path, 5, state(model) | moments, {"lora_rank": 0}, 2, write_more)
    return tmp_path / "checkpoints" / "step-00000005"


def fails(capsys, *arguments) -> str:
    """The complaint of export.py, which must end with status 2, in one line."""
    with pytest.raises(SystemExit) as stopped:
        export_file.main([*map(str, arguments)])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    return message.removeprefix("export.py: ").strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_every_family_becomes_what_its_model_would_be_saved_as(family, tmp_path):
    values = FAMILIES[family].values | {"family": family, "head_dim": 8, "n_kv_heads": 2}
    model = random_model(torch.float32, **values)
    model.save_pretrained(tmp_path / "wanted", torch.bfloat16)
    step = step_folder(tmp_path, model)
    export_file.main([str(step), "--out", str(tmp_path / "made")])
    assert file_bytes(tmp_path / "made") == file_bytes(tmp_path / "wanted")


def test_adams_moments_are_not_loaded_to_make_a_model_folder(tmp_path, monkeypatch):
    model, loaded = random_model(torch.float32), []
    load = dcp.load

    def note(wanted, **folder):
        loaded.extend(wanted.values())
        load(wanted, **folder)

    monkeypatch.setattr(dcp, "load", note)
    step = step_folder(tmp_path, model)
    export(step, tmp_path / "made")
    assert sum(x.nbytes for x in loaded) == 2 * sum(p.numel() for p in model.parameters())


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    step, out = step_folder(tmp_path, random_model(torch.float32)), tmp_path / "made"
    for wrong in (tmp_path / "nowhere", tmp_path, tmp_path / "checkpoints"):
        message = fails(capsys, wrong, "--out", out)
        assert message.startswith(
            f"{wrong}: not a checkpoint, as it lacks model/config.json or .metadata; name a "
        )
    assert "are required: --out" in fails(capsys, step)
    assert "all weights" in fails(capsys, step, "--out", out, "--model", tmp_path)
    assert fails(capsys, step, "--out", tmp_path) == f"--out {tmp_path}: exists; name a new folder"
    (step / "__0_0.distcp").unlink()
    assert fails(capsys, step, "--out", out).startswith(f"{step}: cannot be read: ")
    assert not out.exists()
