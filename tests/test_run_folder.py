"""The folder of a run: who may write to it, what is replaced as a whole."""

import os
import shutil

import pytest

from run.folder import locked, replaced, tidy
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


def test_overwrite_replaces_an_earlier_run_and_nothing_else(arguments, tmp_path, capsys):
    run(arguments, "--max-steps", "2", "--save-every", "1")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds a run; add --resume or --overwrite" in fails(capsys, arguments)
    rows = run(arguments, "--max-steps", "1", "--save-every", "0", "--overwrite")
    assert [row["step"] for row in rows] == [0, 1, 1]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"notes.txt", "metrics.jsonl", "config.json", "model", "finished"}


def test_the_best_model_is_not_replaced_by_a_run_on_it(arguments, capsys, tmp_path):
    shutil.copytree(arguments[1], tmp_path / "out" / "best")
    message = fails(capsys, [*arguments, "--model", str(tmp_path / "out" / "best")])
    assert "its best/ would replace --model" in message
