"""The folder of a run: who may write to it, what is replaced as a whole."""

import dataclasses
import json
import os
import shutil

import pytest

import train
from run.flags import settings_of
from run.folder import FOLDERS, is_finished, locked, refuse_unshared, replaced, tidy
from tests.runs import fails, file_bytes, run


def folder_of(path, text: str):
    path.mkdir()
    (path / "a").write_text(text)
    return path


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = folder_of(tmp_path / "x", "old")
    (folder / "b").write_text("is not in the new one")
    with replaced(folder) as new:
        (new / "a").write_text("new")
        assert (folder / "a").read_text() == "old"
    assert file_bytes(folder) == {"a": b"new"} and [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=repr)
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, error):
    folder = folder_of(tmp_path / "x", "old")
    with pytest.raises(type(error)) as raised, replaced(folder) as new:
        (new / "a").write_text("new")
        raise error
    assert file_bytes(folder) == {"a": b"old"} and [*tmp_path.iterdir()] == [folder]
    if isinstance(error, OSError):
        assert str(raised.value) == f"{folder}: not written: full"


@pytest.mark.parametrize("call", [1, 2])
def test_a_process_that_is_killed_between_the_renames_loses_no_folder(tmp_path, monkeypatch, call):
    """Behind the first or the second of them, where not even `finally` runs."""
    folder, left, replace = folder_of(tmp_path / "x", "old"), [call], os.replace

    def killed(*paths):
        replace(*paths)
        left[0] -= 1
        if left[0] == 0:
            monkeypatch.setattr("run.folder.tidy", lambda folder: None)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        with replaced(folder) as new:
            (new / "a").write_text("new")
    assert len([*tmp_path.iterdir()]) == 2
    monkeypatch.undo()
    tidy(folder)
    assert file_bytes(folder) == {"a": b"old" if call == 1 else b"new"}
    assert [*tmp_path.iterdir()] == [folder]


def test_a_folder_belongs_to_one_process(arguments, tmp_path, capsys):
    """That one which is killed does not keep it: test_killed_three_times_..."""
    for made_before in (False, True):
        with locked(tmp_path / "out"):
            message = fails(capsys, arguments)
        assert f"--out {tmp_path}/out: another process is running in this folder" in message
        assert (tmp_path / "out").exists() == made_before
        (tmp_path / "out").mkdir(exist_ok=True)


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_that_only_one_machine_has_is_refused(shared, tmp_path, monkeypatch):
    """Seen from the second of two processes: process 0 leaves a file, and it is there or not."""
    monkeypatch.setattr("run.folder.world_size", lambda: 2)
    monkeypatch.setattr("run.folder.rank", lambda: 1)
    monkeypatch.setattr("run.folder.max_over_processes", lambda number: 17)
    monkeypatch.setattr("run.folder.barrier", lambda: None)
    if shared:
        (tmp_path / ".seen-17").touch()
        return refuse_unshared(tmp_path)
    with pytest.raises(
        ValueError, match="this folder is not shared by all machines; name one that is"
    ):
        refuse_unshared(tmp_path, seconds=0)


def test_overwrite_replaces_an_earlier_run_and_nothing_else(arguments, tmp_path, capsys):
    run(arguments, "--max-steps", "2", "--save-every", "1")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds a run; add --resume or --overwrite" in fails(capsys, arguments)
    rows = run(arguments, "--max-steps", "1", "--save-every", "0", "--overwrite")
    assert [row["step"] for row in rows] == [0, 1, 1]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"notes.txt", "metrics.jsonl", "run.json", "model", "finished"}


def test_the_best_model_is_not_replaced_by_a_run_on_it(arguments, capsys, tmp_path):
    shutil.copytree(arguments[1], tmp_path / "out" / "best")
    message = fails(capsys, [*arguments, "--model", str(tmp_path / "out" / "best")])
    assert "its best/ would replace --model" in message


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize(
    "name",
    [*FOLDERS, "run.json", "metrics.jsonl", "finished"],
)
def test_what_bears_our_names_and_is_not_ours_is_refused(name, flag, arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / name
    if "." in name or name == "finished":
        mine.write_text("mine")
    else:
        folder_of(mine, "mine")
    message = fails(capsys, [*arguments, *flag])
    assert f"--out {tmp_path}/out: holds {name}, which no run has made" in message
    assert mine.is_dir() or mine.read_text() == "mine"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name}


def test_other_files_of_the_user_are_no_hindrance(arguments, tmp_path):
    """Also a config.json, which is what the settings were once called."""
    (tmp_path / "out").mkdir()
    for name in ("config.json", "train.jsonl", "notes"):
        (tmp_path / "out" / name).write_text('{"model_type": "llama"}')
    run(arguments, "--max-steps", "1")
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "llama"}'


@pytest.mark.parametrize("place", ["", "checkpoints/x", "adapters"])
def test_a_run_does_not_write_into_the_folder_of_its_model(place, arguments, tmp_path, capsys):
    model = tmp_path / "out" / place
    shutil.copytree(arguments[1], model)
    before = file_bytes(model)
    message = fails(capsys, [*arguments, "--model", str(model), "--overwrite"])
    assert "--out" in message and "--model" in message and file_bytes(model) == before


def test_settings_of_an_older_version_are_read(arguments, tmp_path):
    """They were called config.json, in OUT and in its checkpoints."""
    rows = run(arguments, "--save-every", "4", "--max-steps", "8", "--lr-schedule", "constant")
    for settings in [*(tmp_path / "out").rglob("run.json")]:
        settings.rename(settings.with_name("config.json"))
    longer = [*arguments, "--lr-schedule", "constant", "--save-every", "4", "--max-steps", "9"]
    assert run(longer, "--resume")[: len(rows) - 1] == rows[:-1]


@pytest.mark.parametrize("longer", [{}, {"epochs": 2}, {"max_steps": 5}])
def test_a_run_is_finished_until_it_is_to_be_longer(longer, tmp_path):
    """By either flag; and not where the file that says so, or its model, is missing."""
    config = train.TrainConfig("/m", "/d", out=str(tmp_path), lr_schedule="constant")
    step = tmp_path / "checkpoints" / "step-00000003"
    for folder in (step, tmp_path / "model"):
        folder.mkdir(parents=True)
    (step / "run.json").write_text(json.dumps(settings_of(config)))
    (tmp_path / "finished").touch()
    config = dataclasses.replace(config, **longer)
    assert is_finished(tmp_path, config) == (not longer)
    (tmp_path / "model").rmdir()
    assert not is_finished(tmp_path, config)
    (tmp_path / "model").mkdir()
    (tmp_path / "finished").unlink()
    assert not is_finished(tmp_path, config)


def test_checkpoints_of_a_run_without_rows_are_a_run(arguments, tmp_path, capsys):
    arguments = [*arguments, "--save-every", "2", "--log-every", "1000"]
    run(arguments, "--max-steps", "4")
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    (tmp_path / "out" / "finished").unlink()
    assert "holds a run; add --resume or --overwrite" in fails(capsys, arguments)


def names(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())


def test_only_what_is_named_as_a_checkpoint_is_one(arguments, tmp_path):
    """A copy beside them is neither taken nor removed."""
    arguments = [*arguments, "--save-every", "2", "--keep", "1", "--lr-schedule", "constant"]
    run(arguments, "--max-steps", "4")
    folder = tmp_path / "out" / "checkpoints"
    for copy in ("step-00000004-good", "step-00000012.bak", "step-9", "mine"):
        shutil.copytree(folder / "step-00000004", folder / copy)
    run(arguments, "--max-steps", "8", "--resume")
    assert names(tmp_path) == [
        *("mine", "step-00000004-good", "step-00000008", "step-00000012.bak", "step-9")
    ]


def test_rotation_leaves_later_steps_alone(arguments, tmp_path):
    """As where a newer checkpoint cannot be read, and the run continues from an older one: its own
    first checkpoint is then not the newest."""
    arguments = [*arguments, "--save-every", "2", "--lr-schedule", "constant"]
    run(arguments, "--max-steps", "8")
    later = tmp_path / "out" / "checkpoints" / "step-00000008"
    (later / ".metadata").write_bytes(b"")
    run(arguments, "--max-steps", "7", "--resume", "--keep", "1")
    assert names(tmp_path) == ["step-00000007", "step-00000008"]


def test_a_checkpoint_that_was_archived_and_linked_back_is_unlinked(arguments, tmp_path):
    arguments = [*arguments, "--save-every", "4", "--lr-schedule", "constant"]
    run(arguments, "--max-steps", "8")
    old = tmp_path / "out" / "checkpoints" / "step-00000004"
    shutil.move(old, tmp_path / "archive")
    old.symlink_to(tmp_path / "archive")
    run(arguments, "--max-steps", "16", "--resume")
    assert names(tmp_path) == ["step-00000012", "step-00000016"]
    assert (tmp_path / "archive" / ".metadata").is_file()


def test_what_cannot_be_removed_is_said_and_ends_nothing(arguments, tmp_path, monkeypatch, capsys):
    """As a file that another machine has open over NFS."""
    rmtree = shutil.rmtree

    def stubborn(path, *more, **options):
        if str(path).endswith("step-00000002") and not options:
            raise OSError(16, "Device or resource busy")
        rmtree(path, *more, **options)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    run(arguments, "--max-steps", "8", "--save-every", "2")
    assert names(tmp_path) == ["step-00000002", "step-00000006", "step-00000008"]
    said = capsys.readouterr().err.splitlines()
    assert "step-00000002: cannot be removed: Device or resource busy" in said[-1]


def test_an_old_run_that_cannot_be_removed_is_not_overwritten(
    arguments, tmp_path, monkeypatch, capsys
):
    """Its checkpoints would be those that --resume takes."""
    run(arguments, "--max-steps", "2", "--save-every", "2")

    def stubborn(path, *more, **options):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    message = fails(capsys, [*arguments, "--overwrite"], before=1)
    assert "--overwrite: " in message and "checkpoints cannot be removed" in message


def test_a_model_folder_that_is_a_link_is_replaced(arguments, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run(arguments, "--max-steps", "1")
    shutil.rmtree(tmp_path / "out" / "model")
    (tmp_path / "out" / "model").symlink_to(tmp_path / "elsewhere")
    run(arguments, "--max-steps", "1", "--overwrite")
    assert not (tmp_path / "out" / "model").is_symlink()
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
