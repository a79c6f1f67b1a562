"""prepare.py, sample.py, plot.py, follow.py and task.py."""

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import data
from tools import follow, plot, prepare, sample

ROOT = Path(data.__file__).resolve().parent
BASE = ROOT / "examples" / "facts" / "base"
PERU = "Question: What is the capital of Peru?\nAnswer:"


def run(tool, *arguments, code: int = 0) -> tuple[str, str]:
    """What a tool prints and complains of, in this process. Nobody types anything."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as error,
        mock.patch("sys.stdin", io.StringIO("\n")),
        pytest.raises(SystemExit) if code else contextlib.nullcontext() as stopped,
    ):
        tool.main(list(map(str, arguments)))
    assert code == (stopped.value.code if code else 0)
    return out.getvalue(), error.getvalue()


def prepared(*arguments, code: int = 0) -> str:
    """What prepare.py prints, or complains of."""
    return run(prepare, *arguments, code=code)[bool(code)]


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: See you.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Whatever.",
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz"])
def test_prepare_turns_hh_rlhf_into_dialogues_and_counts_what_it_drops(tmp_path, kind):
    rows = [
        HH,
        {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"},
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "Human: a"},
        HH | {"rejected": "\n\nHuman: Hello\n\nAssistant: No."},
        {"prompt": "p", "score": 3},
        {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 9.5},
    ]
    text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    file, out = tmp_path / f"rows.{kind}", tmp_path / "out.jsonl"
    file.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    printed = prepared(file, "--out", out)
    assert "2 pairs of 6 rows" in printed
    for line, reason in (
        (2, "dialogues end with a question"),
        (3, "turns are not Human, Assistant, ..."),
        (4, "dialogues part before the last answer"),
        (5, "neither chosen nor rejected is among the row's keys: ['prompt', 'score']"),
    ):
        assert f"1 {reason} (first: {file}:{line})\n" in printed
    assert "ignored columns: score_chosen (1 rows)" in printed
    dialogue, strings = data.load_preferences(out)
    assert [m["content"] for m in dialogue.prompt] == ["Hi", "Hello.", "Bye"]
    assert dialogue.chosen == [{"role": "assistant", "content": "See you."}]
    assert (strings.prompt, strings.chosen, strings.rejected) == ("p", "c", "r")


def messages(*turns: str) -> list[dict]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def said(*turns: str) -> list[dict]:
    """The same in ShareGPT's form."""
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": roles[m["role"]], "value": m["content"]} for m in messages(*turns)]


def parts(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


QA = {"prompt": messages("u:2+2?"), "chosen": messages("a:4"), "rejected": messages("a:5")}
SYSTEM = QA | {"prompt": messages("s:Be brief.", "u:2+2?")}
FOUR = {"chosen": "4", "rejected": "5"}
DIALOGUES = {"chosen": messages("u:2+2?", "a:4"), "rejected": messages("u:2+2?", "a:5")}
FORMS = {  # what: (the row, the row as written)
    "Intel's orca pairs": ({"system": "Be brief.", "question": "2+2?"} | FOUR, SYSTEM),
    "without a system text": ({"system": "", "question": "2+2?"} | FOUR, QA),
    "argilla's orca pairs": (
        {"system": "Be brief.", "input": "2+2?", "rating": [9]} | FOUR,
        SYSTEM,
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2, 2"} | FOUR,
        QA | {"prompt": messages("u:Add.\n\n2, 2")},
    ),
    "Alpaca without input": ({"instruction": "2+2?", "input": ""} | FOUR, QA),
    "a prompt with a system text": ({"system": "Be brief.", "prompt": "2+2?"} | FOUR, SYSTEM),
    "dialogues with a system text": ({"system": "Be brief."} | DIALOGUES, SYSTEM),
    "dialogues": (DIALOGUES | {"prompt": "2+2?", "messages": DIALOGUES["chosen"]}, QA),
    "a string before messages": (QA | {"prompt": "2+2?"}, QA),
    "messages before strings": (QA | FOUR, QA),
    "ShareGPT": (
        {
            "conversations": said("s:Be brief.", "u:2+2?"),
            "chosen": said("a:4")[0],
            "rejected": said("a:5")[0],
        },
        SYSTEM,
    ),
    "ShareGPT's dialogues": (
        {"chosen": said("u:2+2?", "a:4"), "rejected": said("u:2+2?", "a:5")}, QA,
    ),
    "parts": (QA | {"chosen": [{"role": "assistant", "content": parts("4")}]}, QA),
    "null system": (QA | {"prompt": [{"role": "system", "content": None}, *QA["prompt"]]}, QA),
    "strings": ({"prompt": "2+2=", "accept": ["4"]} | FOUR,) * 2,
    "a common beginning": (
        {"chosen": "2+2 = 4", "rejected": "2+2 = 5"},
        {"prompt": "2+2 =", "chosen": " 4", "rejected": " 5"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FORMS)
def test_prepare_reads_a_row_in_every_published_form(what):
    row, wanted = FORMS[what]
    got, _ = prepare.convert(row, "FILE:1")
    made = {key: getattr(got, key) for key in ("prompt", "chosen", "rejected", "accept")}
    assert {key: value for key, value in made.items() if value is not None} == wanted
    assert got.ignored == (("rating",) if "rating" in row else ())


def test_prepare_says_which_columns_became_what(tmp_path):
    rows = [FORMS[what][0] for what in ("Intel's orca pairs", "without a system text", "Alpaca")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = prepared(tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert "1 from question as the user's message, after system\n" in printed
    assert "1 from question as the user's message\n" in printed
    assert "1 from instruction and input as the user's message\n" in printed


def test_prepare_warns_where_only_some_rows_get_the_template(tmp_path):
    rows = [{"prompt": "2+2?"} | FOUR, {"prompt": "2+2?", "system": "Be brief."} | FOUR]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = prepared(tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert f"warning: 1 rows are text (first: {tmp_path / 'rows.jsonl'}:1)" in printed
    printed = prepared(tmp_path / "rows.jsonl", "--prompt", "prompt", "--out", tmp_path / "out")
    assert "rows are text" not in printed


def test_prepare_counts_rows_that_it_cannot_use_with_the_first_ones_line(tmp_path):
    image = [{"type": "image", "url": "x"}]
    bad = [
        (b"{", "2 not JSON", 1),
        (b'{"prompt": "\xff"}', "1 not UTF-8", 2),
        (b'{"prompt": ', "", 3),
        (b"3", "1 a JSON object is expected, not int", 4),
        (QA | {"chosen": None}, "1 key 'chosen' is missing; the row has", 5),
        (
            QA | {"chosen": [{"role": "assistant", "content": None}]},
            "1 chosen: a message's content is",
            6,
        ),
        (QA | {"prompt": [{"role": "user", "content": image}]}, "1 a message's content has", 7),
    ]
    lines = [x if isinstance(x, bytes) else json.dumps(x).encode() for x, *_ in bad]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b"\n".join([*lines, json.dumps(QA).encode(), b""]))
    printed = prepared(file, "--out", out)
    assert "1 pairs of 8 rows" in printed and len(data.load_preferences(out)) == 1
    for _, reason, line in bad:
        assert not reason or any(
            reason in x and x.endswith(f"(first: {file}:{line})") for x in printed.splitlines()
        )
    out.unlink()
    file.write_bytes(b"\n".join(lines))
    error = prepared(file, "--out", out, code=2)
    assert "no pairs left of 7 rows" in error and f"2 not JSON (first: {file}:1)" in error
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + json.dumps(QA).encode(),
        f"\n \n[{json.dumps(QA)}]".encode(),
        rb'[{"prompt": "\ud800", "chosen": "a", "rejected": "b"},' + json.dumps(QA).encode() + b"]",
    ],
    ids=["BOM", "blank lines", "half a surrogate pair"],
)
def test_prepare_reads_behind_a_bom_and_an_array_behind_blank_lines(tmp_path, content):
    (tmp_path / "rows.json").write_bytes(content)
    prepared(tmp_path / "rows.json", "--out", tmp_path / "out")
    assert data.load_preferences(tmp_path / "out")[0].prompt == QA["prompt"]


HUB = ("README.md", "dataset_infos.json", ".cache/x/train.jsonl", "data/test-00000-of-00001.jsonl")


@pytest.mark.parametrize(
    "files, flags, taken",
    [
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], [], [0, 1]),
        (["train.jsonl", "test.jsonl"], [], [0]),
        (["helpful/train.jsonl", "harmless/train.jsonl"], [], [1, 0]),
        (["train_prefs-00000-of-00001.jsonl"], [], [0]),
        (["a/llama_3.1_no-00000-of-00001.jsonl"], ["--split", "llama_3.1_no"], [0]),
        (["default/train/0000.jsonl", "default/test/0000.jsonl"], [], [0]),
        (["train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"], [], None),
        (["train_prefs-00000-of-00001.jsonl", "train_sft.jsonl"], ["--split", "train_sft"], [1]),
        (["train.jsonl"], ["--split", "dev"], None),
    ],
)
def test_prepare_takes_the_training_split_of_a_folder(files, flags, taken, tmp_path):
    folder, out = tmp_path / "hub", tmp_path / "out.jsonl"
    for name in (*HUB, *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name, **FOUR}) + "\n")
    done = prepared(folder, "--out", out, *flags, code=2 if taken is None else 0)
    if taken is None:
        assert "its splits are" in done and "--split" in done
        return
    assert [row.prompt for row in data.load_preferences(out)] == [files[i] for i in taken]
    assert done.startswith(f"taken: {folder / files[taken[0]]}")


def test_a_split_of_a_file_is_its_rows_with_that_name(tmp_path):
    """As in HelpSteer2's file, which holds both splits; the shell expands *.parquet to files."""
    file, out = tmp_path / "all.jsonl", tmp_path / "out.jsonl"
    names = ["train", "validation", "train"]
    rows = [QA | {"prompt": messages(f"u:{i}"), "split": x} for i, x in enumerate(names)]
    file.write_text("\n".join(map(json.dumps, rows)))
    printed = prepared(file, "--out", out)
    assert "warning: the rows are of several splits (train 2, validation 1): name" in printed
    printed = prepared(file, "--out", out, "--split", "validation")
    assert "1 pairs of 3 rows" in printed and "left out: 2 rows of other splits" in printed
    assert [row.prompt[0]["content"] for row in data.load_preferences(out)] == ["1"]
    error = prepared(file, "--out", out, "--split", "test", code=2)
    assert "all.jsonl: no row has 'test' in a column `split`, as --split asks" in error
    assert out.read_text().count("\n") == 1
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(QA) + "\n{")  # without a split, and broken
    printed = prepared(file, other, "--out", out, "--split", "train")
    assert "2 pairs of 5 rows" in printed and "left out: 2 rows of other splits" in printed
    assert "dropped: 1 not JSON" in printed


def test_a_split_of_a_folder_takes_its_files_whole(tmp_path):
    """Also where their rows name other splits in a column, which is then said."""
    (tmp_path / "hub").mkdir()
    rows = [QA | {"split": name} for name in ("train", "validation")]
    (tmp_path / "hub" / "preference.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = prepared(tmp_path / "hub", "--split", "preference", "--out", tmp_path / "out")
    assert "2 pairs of 2 rows" in printed and "left out" not in printed
    assert "several splits (train 1, validation 1): name the file itself and --split" in printed


def test_an_input_that_adds_nothing_is_named(tmp_path):
    for name, text in (("a", json.dumps(QA)), ("b", ""), ("c", "version https://git-lfs.githu")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    printed = prepared(*files[:2], "--out", tmp_path / "out")
    assert f"warning: {files[1]}: no rows" in printed and f"{files[0]}: no" not in printed
    error = prepared(*files, "--out", tmp_path / "out", code=2)
    assert f"{files[2]}: broken: a Git LFS pointer" in error


def test_prepare_writes_through_a_link_and_over_no_device(tmp_path):
    file, real, link = (tmp_path / name for name in ("a.jsonl", "real.jsonl", "link.jsonl"))
    file.write_text(json.dumps(QA))
    link.symlink_to(real)
    prepared(file, "--out", link)
    assert link.is_symlink() and real.read_text().count("\n") == 1
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which root could replace
    error = prepared(file, "--out", tmp_path / "pipe", code=2)
    assert "pipe: is not a file; name one for the pairs" in error
    assert (tmp_path / "pipe").is_fifo()


def test_prepare_takes_the_only_file_of_a_folder(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "orca_rlhf.jsonl").write_text(json.dumps(QA))
    prepared(tmp_path / "hub", "--out", tmp_path / "out")
    error = prepared(tmp_path, "--split", "train", "--out", tmp_path / "o", code=2)
    assert "its splits are orca_rlhf" in error


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b"{"), ("a.json", b"[1,"), ("a.jsonl.gz", b"x"), ("a.parquet", b"PAR1xPAR1")],
)
def test_prepare_names_a_broken_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    error = prepared(tmp_path / name, "--out", tmp_path / "out", code=2)
    assert name in error and len(error.splitlines()) == 1


@pytest.mark.skipif(find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_prepare_asks_for_pyarrow_where_parquet_needs_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    error = prepared(tmp_path / "a.parquet", "--out", tmp_path / "out", code=2)
    assert "a.parquet: parquet needs pyarrow" in error


def test_prepare_keeps_the_file_it_was_to_write_when_all_fails(tmp_path):
    out = tmp_path / "pairs.jsonl"
    out.write_text(json.dumps(HH) + "\n")
    prepared(tmp_path / "nowhere.jsonl", "--out", out, code=2)
    assert out.read_text() == json.dumps(HH) + "\n"
    prepared(out, "--out", out)  # onto itself
    assert len(data.load_preferences(out)[0].prompt) == 3


def test_prepare_names_the_file_that_it_cannot_write_and_leaves_none(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(QA))
    out = tmp_path / "nowhere" / "out.jsonl"
    error = prepared(tmp_path / "rows.jsonl", "--out", out, code=2)
    assert f"{out}: cannot be written" in error and ".tmp" not in error
    (tmp_path / "folder").mkdir()
    prepared(tmp_path / "rows.jsonl", "--out", tmp_path / "folder", code=2)
    assert {x.name for x in tmp_path.iterdir()} == {"rows.jsonl", "folder"}


def test_sample_streams_one_answer():
    said, _ = run(sample, BASE, PERU, "--max-new-tokens", "20")
    assert said.strip()


def test_sample_writes_alpacaeval_and_mt_bench_files(tmp_path):
    """The same question as AlpacaEval's set and as the first turn of MT-Bench's."""
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": PERU}, {"instruction": "Hi"}])
    )
    (tmp_path / "mt.jsonl").write_text(json.dumps({"question_id": 81, "turns": [PERU, "And?"]}))
    options = ("--max-new-tokens", "20", "--name", "tiny", "--out")
    run(sample, BASE, "--file", tmp_path / "alpaca.json", *options, tmp_path / "a.json")
    run(sample, BASE, "--file", tmp_path / "mt.jsonl", *options, tmp_path / "m.jsonl")
    alpaca = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "input.json").write_text(json.dumps([{"instruction": "Who", "input": "is it?"}]))
    run(sample, BASE, "--file", tmp_path / "input.json", *options, tmp_path / "i.json")
    assert json.loads((tmp_path / "i.json").read_text())[0]["instruction"] == "Who\n\nis it?"
    assert [set(row) for row in alpaca] == [{"instruction", "output", "generator"}] * 2
    assert alpaca[0]["instruction"] == PERU and alpaca[0]["generator"] == "tiny"
    (judged,) = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert (judged["question_id"], judged["model_id"]) == (81, "tiny")
    turns = judged["choices"][0]["turns"]
    assert len(turns) == 2 and turns[0] == alpaca[0]["output"]


class Words:
    """A tokenizer of words, whose template puts brackets around what the user says."""

    def __init__(self):
        self.words = ["<s>", "</s>"]
        self.bos_id, self.eos_id, self.special_tokens = 0, 1, {"bos_token": "<s>"}

    def encode(self, text, continuation=False):
        self.words += [w for w in text.split() if w not in self.words]
        return [self.words.index(w) for w in text.split()]

    def decode(self, ids):
        return "".join(f" {self.words[i]}" for i in ids)

    def end_ids(self):
        return [1]

    def around_answer(self):
        return "", ""

    def apply_chat_template(self, messages, add_generation_prompt=False):
        said = [f"[ {m['content']} ]" if m["role"] == "user" else m["content"] for m in messages]
        return " ".join(["<s>", *said])


class Parrot:
    """A model that answers every prompt with its number, and keeps the prompts."""

    def __init__(self, tokenizer, context=99):
        self.tokenizer, self.asked = tokenizer, []
        self.config = SimpleNamespace(max_seq_len=context, vocab_size=100)

    def stream(self, prompts, max_new, **sampling):
        self.asked += [self.tokenizer.decode(ids).strip() for ids in prompts]
        answer = self.tokenizer.encode(f"answer-{len(self.asked)} </s>")
        yield from map(torch.tensor, answer[:max_new])


@pytest.mark.parametrize(
    ("plain", "wanted"),
    [
        (False, ["<s> [ a b ]", "<s> [ a b ] answer-1 [ c ]"]),
        (True, ["<s> a b", "<s> c"]),
    ],
)
def test_a_dialogue_remembers_what_was_said_but_not_in_plain_text(
    plain, wanted, monkeypatch, capsys
):
    typed = iter(["a b", "c", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    model = Parrot(Words())
    sample.talk(model, model.tokenizer, None, plain, max_new=9)
    assert model.asked == wanted and next(typed) == "never read"
    assert capsys.readouterr().out.split() == ["answer-1", "answer-2"]


def test_a_dialogue_ends_where_it_fills_the_context(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: "a b")
    model = Parrot(Words(), context=9)  # the first question has 5 tokens, the second dialogue 10
    with pytest.raises(SystemExit) as stopped:
        sample.talk(model, model.tokenizer, None, False, max_new=9)
    assert stopped.value.code == 2 and len(model.asked) == 1
    assert "the dialogue has 10 tokens and fills" in capsys.readouterr().err


def test_a_question_of_the_command_line_gets_one_answer():
    model = Parrot(Words())
    sample.talk(model, model.tokenizer, "a", False, max_new=9)
    assert model.asked == ["<s> [ a ]"]


def test_a_file_of_questions_may_have_rows_of_several_kinds(monkeypatch):
    """instruction before prompt before question; one turn may be fewer than another's."""
    monkeypatch.setattr(
        "tools.sample.answers",
        lambda model, t, prompts, **_: [t.decode(ids).split()[-2].upper() for ids in prompts],
    )
    model, tokenizer = Parrot(None), Words()
    rows = [{"question": "q"}, {"prompt": "p", "question": "q"}]
    rows += [{"instruction": "i", "prompt": "p"}, {"turns": ["t", "u"], "instruction": "i"}]
    for first, wanted in ((0, "QPIT"), (3, "T")):
        made = sample.answer_file(model, tokenizer, rows[first:], "tiny", False)
        if not first:
            assert [row["output"] for row in made] == [*wanted]
            assert [row["instruction"] for row in made] == [*wanted.lower()]
        else:
            assert [row["choices"][0]["turns"] for row in made] == [["T", "U"]]
            assert (made[0]["question_id"], made[0]["answer_id"]) == (0, "tiny-0")


@pytest.mark.parametrize(
    ("config", "jinja", "flags", "plain"),
    [
        ({}, None, [], True),
        ({"chat_template": "t"}, None, [], False),
        ({}, "t", [], False),
        ({"chat_template": "t"}, "t", ["--plain"], True),
    ],
)
def test_a_model_without_a_template_gets_plain_text(
    config, jinja, flags, plain, tiny_llama, tmp_path, monkeypatch
):
    """And the flags reach the sampling; 0 is greedy, and the answers are named by the folder."""
    folder = shutil.copytree(tiny_llama, tmp_path / "mine")
    known = json.loads((folder / "tokenizer_config.json").read_text())
    known.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja)
    seen = []
    monkeypatch.setattr(sample, "talk", lambda *a, **more: seen.append((a[2:], more)))
    more = ["--temperature", "0.5", "--top-p", "0.5", "--seed", "7", "--max-new-tokens", "3"]
    more += ["--device", "cpu"]
    run(sample, folder, "Hi", *flags, *more)
    run(sample, folder, *flags, "--device", "cpu")
    (one, first), (two, second) = seen
    assert one == ("Hi", plain) and two == (None, plain)
    assert (first["max_new"], first["temperature"], first["top_p"]) == (3, 0.5, 0.5)
    assert first["generator"].initial_seed() == 7
    assert (second["max_new"], second["temperature"], second["top_p"]) == (512, 0.0, None)
    assert second["generator"].initial_seed() == 42
    monkeypatch.setattr(sample, "answer_file", lambda m, t, rows, name, *_, **o: [name, *rows])
    (tmp_path / "q.json").write_text('[{"prompt": "?"}]')
    run(sample, folder, "--file", tmp_path / "q.json", "--out", tmp_path / "a.json", *more[-2:])
    assert json.loads((tmp_path / "a.json").read_text()) == ["mine", {"prompt": "?"}]


def test_a_streamed_answer_ends_with_the_turn(tiny_tokenizer, capsys):
    """Also where what ends a turn is not EOS, as <|im_end|> of many base models."""
    tokenizer = data.load_tokenizer(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<s>{% endfor %}"
    said = tokenizer.encode("hello", continuation=True)

    class Model:
        def stream(self, prompts, max_new, **sampling):
            yield from map(torch.tensor, [*said, tokenizer.bos_id, *said])

    assert sample.stream(Model(), tokenizer, tokenizer.encode("q"), 99) == "hello"
    assert capsys.readouterr().out == "hello\n"


def test_sample_says_what_is_wrong_with_its_input(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"text": "?"}')
    words = BASE, "--file", tmp_path / "q.jsonl"
    assert "q.jsonl: row 1" in run(sample, *words, "--out", tmp_path / "a", code=2)[1]
    assert "--file and --out belong together" in run(sample, BASE, "--out", "x", code=2)[1]
    (tmp_path / "q.json").write_text('[{"instruction": "Who?"}]')
    both = ("What?", "--file", tmp_path / "q.json", "--out", tmp_path / "x")
    assert "a question and --file: give one of the two" in run(sample, BASE, *both, code=2)[1]
    (tmp_path / "q.jsonl").write_text('{"prompt": "?"}')
    error = run(sample, *words, "--out", tmp_path / "no" / "a", code=2)[1]
    assert f"there is no folder {tmp_path / 'no'}" in error
    asks_nothing = "row 1 has no instruction, prompt, question or turns"
    assert "this is a folder" in run(sample, *words, "--out", tmp_path, code=2)[1]
    for text, problem in (
        ("", "no questions in it"),
        ("{", "neither JSON nor JSON Lines"),
        ('{"instruction": ""}', asks_nothing),
        ('{"turns": []}', asks_nothing),
        ('{"prompt": 5}', "row 1: what is asked must be text"),
        ('{"turns": ["a", null]}', "row 1: what is asked must be text"),
    ):
        (tmp_path / "q.jsonl").write_text(text)
        assert f"q.jsonl: {problem}" in run(sample, *words, "--out", tmp_path / "a", code=2)[1]
    assert "no such file" in run(sample, tmp_path / "nowhere", "?", code=2)[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-new-tokens", "-1"], "--max-new-tokens -1: at least 1"),
        (["--batch-tokens", "0"], "--batch-tokens 0: at least 1"),
        (["--temperature", "-1"], "--temperature -1.0: a number from 0 is wanted"),
        (["--temperature", "nan"], "--temperature nan: a number from 0 is wanted"),
        (["--top-p", "0", "--temperature", "1"], "--top-p 0.0: a number above 0 and up to 1"),
        (["--top-p", "0.9"], "--top-p: has no effect at --temperature 0, the default"),
        (["--device", "cuda:77"], "--device cuda:77: "),
        (["--device", "gpu"], "--device gpu: "),
    ],
)
def test_sample_refuses_flags_that_mean_nothing(flags, words):
    error = run(sample, BASE, "?", *flags, code=2)[1]
    assert error.startswith(f"sample.py: {words}") and len(error.splitlines()) == 1


def test_a_dialogue_may_be_left_by_ctrl_c(monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    error = run(sample, BASE, "--device", "cpu", code=130)[1]
    assert error.splitlines()[-1] == "sample.py: stopped by Ctrl-C"


def test_questions_may_begin_with_a_bom_and_hold_any_line_end_of_unicode(tmp_path):
    file = tmp_path / "q.jsonl"
    lines = ['{"prompt": "a\u2028b\u0085c"}', '{"prompt": "d"}']
    for text in ("\n".join(lines), "\r\n".join(lines) + "\r\n", f"[{','.join(lines)}]"):
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        rows = sample.read_questions(file)
        assert [row["prompt"] for row in rows] == ["a\u2028b\u0085c", "d"]


def test_sample_says_which_question_fills_the_context(tmp_path):
    """The other question of the file is answered."""
    context = json.loads((BASE / "config.json").read_text())["max_position_embeddings"]
    long = "Question: " + "Peru " * context
    _, error = run(sample, BASE, long, code=2)
    assert re.fullmatch(
        rf"sample.py: the question has \d+ tokens and fills the model's context of {context}\n",
        error,
    )
    questions, out = tmp_path / "q.json", tmp_path / "a.json"
    questions.write_text(json.dumps([{"instruction": PERU}, {"instruction": long}]))
    flags = "--file", questions, "--out", out, "--max-new-tokens", "9"
    _, error = run(sample, BASE, *flags)
    assert "row 2, turn 1, has" in error and "row 1" not in error
    first, second = json.loads(out.read_text())
    assert first["output"] and second["output"] == ""


def test_sample_refuses_a_token_beyond_the_embedding_only_where_it_is_asked(tmp_path):
    """As <pad> of Llama-2's mirrors."""
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    n = json.loads((BASE / "config.json").read_text())["vocab_size"]
    (model / "added_tokens.json").write_text(json.dumps({"<pad>": n}))
    token = f"the token '<pad>', {n}, is beyond the embedding, which ends with {n - 1}: leave it"
    _, error = run(sample, model, f"{PERU}<pad>", code=2)
    assert error.startswith(f"sample.py: the question: {token}") and error.count("\n") == 1
    rows = [{"instruction": PERU}, {"instruction": "<pad>"}]
    for asked in (rows[:1], rows):
        (tmp_path / "q.json").write_text(json.dumps(asked))
        files = ("--file", tmp_path / "q.json", "--out", tmp_path / "a.json")
        code = 2 * (asked == rows)
        _, error = run(sample, model, *files, "--max-new-tokens", "9", code=code)
    assert error.startswith(f"sample.py: {tmp_path / 'q.json'}: row 2, turn 1: {token}")


# ---------------------------------------------------------------------------------------------
# task.py


from examples import task as task_file


def test_the_chosen_answer_is_the_better_of_two_manners():
    rng = task_file.random.Random(1)
    facts, trained_on, held_out = task_file.split(rng)
    by_good = {task_file.state(fact): fact for fact in trained_on}
    rows = task_file.pairs(trained_on, 2, trained_on, rng)
    assert len(rows) == 2 * len(trained_on)
    n_good = 0
    for row in rows:
        fact = by_good[row["accept"][0]]
        said = [row[side][0]["content"] for side in ("chosen", "rejected")]
        better, worse = (task_file.manner_of(text, fact, facts) for text in said)
        better, worse = (m.split(",")[0] for m in (better, worse))
        assert task_file.RANKS.index(better) < task_file.RANKS.index(worse), row
        n_good += said[0] in row["accept"]
    assert 0.2 < n_good / len(rows) < 0.45  # the chosen answer is seldom good
    assert not {row["accept"][0] for row in rows} & {task_file.state(fact) for fact in held_out}


@pytest.mark.parametrize("manner", task_file.ANSWERS)
def test_the_manner_of_an_answer_is_found_in_its_text(manner):
    rng = task_file.random.Random(0)
    facts, *_ = task_file.split(rng)
    for fact in rng.sample(facts, 60):
        text = task_file.answer(fact, manner, facts, rng)
        assert task_file.manner_of(text, fact, facts).split(",")[0] == manner, text
    assert task_file.manner_of("Lima? " + text, fact, facts) == "other"


needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """The folders of three runs, with lam 0, 1 and 2 and two evaluations each."""
    names = ("logps/chosen", "logps/rejected", "rewards/accuracies", "nll_loss", "log_odds_ratio")
    outs = []
    for lam, name in enumerate(("one", "two", "three")):
        row = dict.fromkeys((*names, "log_odds_chosen"), -0.25 - lam)
        held_out = {f"eval_{k}": x for k, x in row.items()} | {"eval_loss": 1.0}
        rows = [held_out | {"step": 0, "eval_nll_loss": 9.0}]
        rows += [{"step": i, "loss": 1.0, **row} for i in (1, 2)] + [held_out | {"step": 2}]
        outs.append(tmp_path / name)
        outs[-1].mkdir()
        text = "".join(json.dumps(x) + "\n" for x in rows)
        (outs[-1] / "metrics.jsonl").write_text(text + '{"step": 3, "lo')  # it was killed
        (outs[-1] / "run.json").write_text(json.dumps({"lam": lam, "sft_loss": "full"}))
    return outs


@needs_matplotlib
def test_plot_draws_one_run_and_several(runs, tmp_path):
    run(plot, runs[0])
    assert "<svg" in (tmp_path / "one" / "curves.svg").read_text()
    many = [*runs, *(shutil.copytree(runs[0], tmp_path / name) for name in ("four", "five"))]
    printed, _ = run(plot, *many, "--save", tmp_path / "all.png")
    assert printed.count("full") == 5 and "all.png, with the first 4 runs" in printed
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
@pytest.mark.parametrize(("steps", "lines"), [((0, 2), 2), ((0, 1, 2), 1), ((), 1)])
def test_what_is_held_out_is_joined_by_a_line(steps, lines):
    """Beside the moving mean of the steps where there are two, and in its place where more."""
    ax = plot.style("agg").figure().add_subplot()
    rows = [{"step": step, "x": 1.0, "loss": 1.0} for step in (1, 2)]
    rows += [{"step": step, "eval_x": 2.0, "eval_loss": 1.0} for step in steps]
    plot.draw_curve(ax, lambda row: row["x"], "--", "#000000", rows, accepted=False)
    drawn = [line for line in ax.get_lines() if line.get_alpha() is None]
    assert [line.get_linestyle() for line in drawn] == ["--"] * lines
    assert [len(line.get_xdata()) for line in drawn if line.get_marker() == "o"] == [
        len(steps) for _ in steps[:1]
    ]


def test_the_table_compares_runs_by_numbers_without_lam(runs):
    head, *lines = plot.table({out.name: out for out in runs}).splitlines()
    assert head.split("  ")[0] == "held out" and "greedy" not in head and "loss" not in head
    assert [line.split() for line in lines] == [
        ["one", "0", "full", "2", *["-0.250"] * 5],
        ["two", "1", "full", "2", *["-1.250"] * 5],
        ["three", "2", "full", "2", *["-2.250"] * 5],
    ]
    assert len({len(line) for line in (head, *lines)}) == 1
    (runs[0] / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    assert plot.table({"one": runs[0]}) == ""


def test_the_followers_get_each_row_once_also_across_a_resume(tmp_path, monkeypatch):
    """Of a run that is followed from its beginning, whose last steps are computed twice."""
    rows = [{"step": 0, "eval_loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}]
    rows += [{"step": 2, "eval_loss": 3.5}]
    states = [rows[:2], rows[:3], rows[:2], rows]

    def goes_on(seconds):
        if states:
            text = "".join(json.dumps(row) + "\n" for row in states.pop(0))
            (tmp_path / "metrics.jsonl").write_text(text)
        else:
            (tmp_path / "finished").write_text("2\n")

    sent = []
    monkeypatch.setattr(time, "sleep", goes_on)
    follow.follow(tmp_path, lambda step, numbers: sent.append({"step": step} | numbers))
    assert sent == rows and not states


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_a_run_is_followed_by(to, runs, monkeypatch):
    """Stand-ins for both packages, of which the project needs neither."""
    sent = []
    if to == "wandb":
        made = SimpleNamespace(
            log=lambda numbers, step: sent.append((step, numbers["loss"])),
            finish=lambda: sent.append("end"),
        )
        module = SimpleNamespace(init=lambda **about: made, __spec__=1)
        monkeypatch.setitem(sys.modules, "wandb", module)
    else:
        add = SimpleNamespace(
            add_scalar=lambda name, x, step: sent.append((step, x)),
            close=lambda: sent.append("end"),
        )
        (runs[0] / "tensorboard").mkdir()
        for name in ("events.out.tfevents.1", "mine"):
            (runs[0] / "tensorboard" / name).touch()
        module = SimpleNamespace(SummaryWriter=lambda out, flush_secs: sent.append(out.name) or add)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(follow, "find_spec", lambda _: True)
    monkeypatch.setattr(follow, "follow", lambda out, send: send(3, {"loss": 1.5}))
    follow.main([str(runs[0]), "--to", to])
    assert sent == ["tensorboard"] * (to == "tensorboard") + [(3, 1.5), "end"]
    if to == "tensorboard":  # an earlier follow.py's rows are sent anew, and nothing else goes
        assert [file.name for file in (runs[0] / "tensorboard").iterdir()] == ["mine"]


def test_a_follower_that_is_not_installed_or_has_no_run_says_so(tmp_path):
    for to in ("tensorboard", "wandb"):
        if find_spec(to) is None:
            error = run(follow, tmp_path, "--to", to, code=2)[1]
            assert error.startswith(f"follow.py: {to} is not installed: {sys.executable} -m pip in")
        else:
            error = run(follow, tmp_path / "no", "--to", to, code=2)[1]
            assert "no: no such folder" in error


def test_runs_of_one_name_are_told_apart(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda runs, file: drawn.append([*runs]))
    same = [shutil.copytree(runs[0], tmp_path / name / "run") for name in "ab"]
    run(plot, *runs[:2])
    run(plot, *same)
    assert drawn == [["one", "two"], [str(folder) for folder in same]]


@needs_matplotlib
def test_plot_says_what_is_wrong(runs, tmp_path):
    assert "metrics.jsonl: no such file" in run(plot, tmp_path, code=2)[1]
    save = runs[0], "--save"
    assert "must end in .svg or .png" in run(plot, *save, tmp_path / "x.pdf", code=2)[1]
    assert "there is no folder" in run(plot, *save, tmp_path / "no" / "x.png", code=2)[1]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1}')
    assert "no training step in it" in run(plot, tmp_path, code=2)[1]


ROW = {"logps/chosen": -0.25, "logps/rejected": -0.75, "rewards/accuracies": 0.5}
ROW |= {"nll_loss": 0.25, "log_odds_ratio": -0.625}


def test_every_curve_is_of_its_metric():
    """L_OR is minus what TRL calls log_odds_ratio."""
    curves = {label: value(ROW) for _, curves in plot.PANELS for label, value, *_ in curves}
    assert curves == {"chosen": -0.25, "rejected": -0.75, "margin": 0.5, "accuracy": 0.5,
                      "L_SFT": 0.25, "L_OR": 0.625}  # fmt: skip
    shares = {"accepted/greedy": 1, "accepted/sampled": 2}
    assert [value(shares) for _, value, *_ in plot.ACCEPTED[1]] == [1, 2]
    assert plot.smooth([1, 2, 3, 6], width=2) == [1, 1.5, 2.5, 4.5]


@pytest.mark.parametrize("n_evaluations", [0, 2, 3])
@pytest.mark.parametrize("accepted", [False, True])
def test_a_bold_line_goes_through_three_evaluations_or_follows_training(n_evaluations, accepted):
    lines = []
    ax = SimpleNamespace(plot=lambda x, y, line="-", **style: lines.append((x, y, line, style)))
    rows = [{"step": i, "loss": 1.0, "x": i * i} for i in range(1, 4)]
    rows += [{"step": i, "eval_loss": 1.0, "eval_x": 10 + i} for i in range(n_evaluations)]
    plot.draw_curve(ax, lambda row: row["x"], "--", "red", rows, accepted)
    dots = [line for line in lines if line[3].get("marker")]
    bold = [line for line in lines if line[3]["lw"] == plot.BOLD and line not in dots]
    if n_evaluations:
        assert dots[0][:3] == ([*range(n_evaluations)], [10, 11, 12][:n_evaluations], "--")
        assert (dots[0][3]["lw"] == plot.BOLD) == (accepted or n_evaluations == 3)
    faint = [line for line in lines if line[3].get("alpha")]
    assert [line[:2] for line in faint] == ([] if accepted else [([1, 2, 3], [1, 4, 9])])
    smooth = [] if accepted or n_evaluations == 3 else [([1, 2, 3], [1, 2.5, 14 / 3])]
    assert [line[:2] for line in bold] == smooth and len(dots) == bool(n_evaluations)
