"""tools/prepare.py reads what the datasets library writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import data

ROOT = Path(data.__file__).resolve().parent


def test_parquet_in_ultrafeedback_s_form(tmp_path):
    """Prompt as text, both dialogues as messages, scores beside them: one pair a row."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    dialogue = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    worse = [dialogue[0], {"role": "assistant", "content": "What?"}]
    rows = [{"prompt": "Hi?", "chosen": dialogue, "rejected": worse, "score_chosen": 8.5}] * 3
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    out = tmp_path / "pairs.jsonl"
    words = [
        sys.executable,
        "-m",
        "tools.prepare",
        str(tmp_path / "train.parquet"),
        "--out",
        str(out),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "3 pairs of 3 rows" in done.stdout
    assert "3 from messages" in done.stdout
    assert "ignored columns: score_chosen (3 rows)" in done.stdout
    row = data.load_preferences(out)[0]
    assert (row.prompt, row.chosen, row.rejected) == ([dialogue[0]], [dialogue[1]], [worse[1]])
    assert set(json.loads(out.read_text().splitlines()[0])) == {"prompt", "chosen", "rejected"}


def test_a_folder_of_save_to_disk_is_one_of_splits(tmp_path):
    """Its arrow files, and not the three JSON files beside them; a key that only some messages have
    is null in the others, and the dialogue may be stored as a list for each key."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    question, answer = (
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hello."},
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "map"}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [{"prompt": [question], "chosen": [x], "rejected": [answer]} for x in (calls, calls)]
    rows[0]["tools"], rows[1]["tools"] = None, [{"name": "look"}]
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    both["test"] = datasets.Dataset.from_list(rows[:1])
    both.save_to_disk(tmp_path / "saved")
    words = [sys.executable, "-m", "tools.prepare", str(tmp_path / "saved"), "--out"]
    out = tmp_path / "pairs.jsonl"
    done = subprocess.run([*words, str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 pairs of 2 rows" in done.stdout and "/train/data-00000-of-00001.arrow" in done.stdout
    first, second = data.load_preferences(out)
    assert first.prompt == [question] and first.chosen == [calls] and first.tools is None
    assert second.tools == [{"name": "look"}]
    lists = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = {key: datasets.Sequence(lists) for key in ("chosen", "rejected")}
    worse = [question, answer | {"content": "What?"}]
    sides = {"chosen": [question, answer], "rejected": worse}
    columns = {
        side: {key: [m[key] for m in messages] for key in lists} for side, messages in sides.items()
    }
    made = datasets.Dataset.from_list([columns], features=datasets.Features(features))
    made.save_to_disk(tmp_path / "alone")
    words[-2] = str(tmp_path / "alone")
    subprocess.run([*words, str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    (row,) = data.load_preferences(out)
    assert (row.prompt, row.chosen) == ([question], [answer])


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / "train.parquet").write_bytes(b"PAR1" + bytes(99) + b"PAR1")
    words = [sys.executable, "-m", "tools.prepare", str(tmp_path / "train.parquet"), "--out"]
    done = subprocess.run([*words, str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"prepare.py: {tmp_path / 'train.parquet'}: broken: ")
    assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]
