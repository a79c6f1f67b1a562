"""Rows, pairs, truncation, packing and showing: small tables worked out by hand."""

import gzip
import json
import signal
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
import torch

import data
import train
from data import (
    Dropped,
    Pair,
    encode_pair,
    encode_pairs,
    epoch_permutation,
    micro_batches,
    split_by_tokens,
)
from formats.chat_template import left_out
from formats.rows import Preference, load_preferences, warnings_of
from formats.tokenizer import load_tokenizer
from run.processes import pick_device
from tests.forked import Forked, call
from tests.small import some_pairs, tokens

ROOT = Path(__file__).resolve().parents[1]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_rows(path, *rows):
    """Rows as JSON Lines; bytes and strings as they are."""
    lines = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return path


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


class Letters:
    """A tokenizer of one id a character, so that a text is as long as it looks."""

    bos_id, eos_id = 1, 2

    def encode(self, text, continuation=False, after=()):
        return [ord(c) for c in text]


def row_of(prompt, chosen, rejected):
    return Preference(prompt, chosen, rejected, None, "rows.jsonl:7")


# -----------------------------------------------------------------------------
# Rows

Q, YES, NO = user("q"), assistant("yes"), assistant("no")
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "row, wanted",
    [
        (("q", " yes", " no"), ("q", " yes", " no")),
        (([Q], [YES], [NO]), ([Q], [YES], [NO])),
        (([SYSTEM, Q], [SYSTEM, Q, YES], [NO]), ([SYSTEM, Q], [YES], [NO])),
        ((None, [Q, YES], [Q, NO]), ([Q], [YES], [NO])),
        ((None, [Q, YES, Q, YES], [Q, YES, Q, NO]), ([Q, YES, Q], [YES], [NO])),
        ((None, [Q, YES], [Q, YES]), ([Q], [YES], [YES])),  # identical: dropped later, counted
        (("q", [Q, YES], [Q, NO]), ([Q], [YES], [NO])),
        (("other text", [SYSTEM, Q, YES], [SYSTEM, Q, NO]), ([SYSTEM, Q], [YES], [NO])),
    ],
    ids=["strings", "answers", "repeated", "dialogues", "turns", "equal", "string", "string-2"],
)
def test_row_shapes(row, wanted, tmp_path):
    row = dict(zip(("prompt", "chosen", "rejected"), row, strict=True), score=3)
    if row["prompt"] is None:
        del row["prompt"]
    (got,) = load_preferences(write_rows(tmp_path / "rows.jsonl", row))
    assert (got.prompt, got.chosen, got.rejected) == wanted
    assert got.accept is None and got.where == f"{tmp_path / 'rows.jsonl'}:1"


@pytest.mark.parametrize("name", ["instruction", "question"])
@pytest.mark.parametrize("prompt", ["Say q.", [Q]], ids=["string", "messages"])
def test_other_names_of_the_prompt(name, prompt, tmp_path):
    """Answers with a common beginning, which would be the prompt if there were none."""
    yes, no = ([YES], [NO]) if prompt == [Q] else ("It is yes", "It is no")
    row = {name: prompt, "chosen": yes, "rejected": no}
    (got,) = load_preferences(write_rows(tmp_path / "rows.jsonl", row))
    assert (got.prompt, got.chosen, got.rejected) == (prompt, yes, no)
    said = f"1 of 1 prompts are text under {name}, as at {got.where}: used without a chat templ"
    assert any(said in line for line in warnings_of([got])) == isinstance(prompt, str)


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("Q: x A: yes", "Q: x A: no", "Q: x A:"),
        ("The sky is blue", "The sky is black", "The sky is"),
        ("\n\nHuman: Hi\n\nBot: A", "\n\nHuman: Hi\n\nBot: B", "\n\nHuman: Hi\n\nBot:"),
        ("Hi there", "Hi there, friend", "Hi"),  # else one answer would be empty
        ("yes sir", "yesterday", ""),  # a word's end in both
        ("yesterday", "yes sir", ""),
        ("yes", "no", ""),
        ("same text", "same text", "same"),
    ],
)
def test_strings_without_prompt_are_cut_at_a_word(chosen, rejected, prompt, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", {"chosen": chosen, "rejected": rejected})
    (got,) = load_preferences(file)
    assert got.prompt == prompt
    assert (got.prompt + got.chosen, got.prompt + got.rejected) == (chosen, rejected)


def test_blank_lines_are_skipped_and_lines_counted(tmp_path):
    row = {"prompt": "é", "chosen": "\u2028", "rejected": "b", "accept": ["x", "y"]}
    text = json.dumps(row, ensure_ascii=False)  # U+2028 is a line's end to str.splitlines
    rows = load_preferences(write_rows(tmp_path / "r", "", f"{text}\r", "  \t", text, "", ""))
    assert [r.where for r in rows] == [f"{tmp_path / 'r'}:2", f"{tmp_path / 'r'}:4"]
    assert rows[0][:4] == ("é", "\u2028", "b", ["x", "y"]) == rows[1][:4]


def row(prompt="q", chosen="a", rejected="b", **more):
    given = {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more
    return {key: value for key, value in given.items() if value is not ...}


HINT = "UTF-8 text, a JSON object a line, is expected (tools/prepare.py makes it)"
NEIGHBOURS = "must be text or a list of messages, like its neighbours"


def not_an_answer(key: str, roles: str, after: int) -> str:
    """roles: u for user, a for assistant."""
    wanted = "the prompt's messages and one assistant message more, or only that message"
    found = [{"u": "user", "a": "assistant"}[role] for role in roles]
    return f"{key} must be {wanted}; it is {found} after {after} messages"


BAD_ROWS = {  # what: (the row, words of the complaint)
    "broken JSON": ('{"prompt": "q", ', HINT),
    "invalid UTF-8": (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', "'utf-8' codec"),
    "UTF-16": ("{}".encode("utf-16"), HINT),
    "half a surrogate pair": (r'{"prompt": "\ud800", "chosen": "a", "rejected": "b"}', HINT),
    "deeply nested": ("[" * 100_000, HINT),
    "a list": ([1], "a JSON object is expected, not list (tools/prepare.py reads such a file)"),
    "a string": ('"x"', "a JSON object is expected, not str"),
    "null": ("null", "a JSON object is expected, not NoneType"),
    "no chosen": (row(chosen=...), "key 'chosen' is missing; the row has ['prompt', 'rejected']"),
    "no rejected": (row(rejected=...), "key 'rejected' is missing"),
    "other names": (
        {"question": "q", "answer": "a"},
        "neither chosen nor rejected is among the row's keys: ['answer', 'question']",
    ),
    "a thousand keys": (dict.fromkeys(map(str, range(1000)), 0), "neither chosen nor rejected"),
    "chosen a number": (row(chosen=3), "chosen must be text or a list of messages, not 3"),
    "rejected null": (row(rejected=None), "rejected must be text or a list of messages, not None"),
    "prompt a number": (row(prompt=3), "prompt must be text or a list of messages, not 3"),
    "rejected messages, chosen text": (row(rejected=[NO]), f"chosen {NEIGHBOURS}"),
    "chosen messages, rejected text": (row(chosen=[YES]), f"rejected {NEIGHBOURS}"),
    "prompt messages, answers text": (row(prompt=[Q]), f"chosen {NEIGHBOURS}"),
    "prompt an empty list": (row([], [YES], [NO]), not_an_answer("chosen", "a", 0)),
    "chosen an empty list": (row([Q], [], [NO]), f"chosen {NEIGHBOURS}"),
    "a message without role": (
        row([Q], [{"content": "x"}], [NO]),
        "chosen: a message has no role; its keys are ['content']",
    ),
    "a message without content": (
        row([Q, {"role": "user"}], [YES], [NO]),
        "prompt: a message's content is null, and it has nothing else",
    ),
    "content null": (row([Q], [YES], [assistant(None)]), "rejected: a message's content is null"),
    "content a number": (row([Q], [YES], [assistant(3)]), "rejected: a message's content is not"),
    "an image": (
        row([Q], [YES], [assistant([{"type": "image"}])]),
        "rejected: a message's content has parts that are not text",
    ),
    "a message is text": (row([Q], ["yes"], [NO]), "chosen: a message is not an object but 'yes'"),
    "the prompt ends with an answer": (
        row([Q, assistant("Sure,")], [YES], [NO]),
        "prompt ends with a message of the assistant, where its answer should begin",
    ),
    "lists of unlike lengths": (
        row([Q], {"role": ["assistant"], "content": ["a", "b"]}, [NO]),
        "chosen: a dialogue has lists of different lengths",
    ),
    "images beside the text": (row(images=["a.jpg"]), "images is not text"),
    "KTO's": ({"prompt": "q", "completion": "a", "label": True}, "unpaired ratings"),
    "tools that are no list": (row([Q], [YES], [NO], tools={"a": 1}), "tools must be a list"),
    "kwargs that are no object": (
        row([Q], [YES], [NO], chat_template_kwargs=[1]),
        "chat_template_kwargs must be an object",
    ),
    "kwargs of ours": (
        row([Q], [YES], [NO], chat_template_kwargs={"tools": []}),
        "chat_template_kwargs has tools",
    ),
    "tools that are no JSON": (row([Q], [YES], [NO], tools="weather"), "tools is text, but not"),
    "the answer is the user's": (row([Q], [user("x")], [NO]), not_an_answer("chosen", "u", 1)),
    "two answers": (row([Q], [YES], [NO, NO]), not_an_answer("rejected", "aa", 1)),
    "a thousand answers": (row([Q], [YES] * 1000, [NO]), "chosen must be the prompt's messages"),
    "the dialogue is another": (row([Q], [user("x"), YES], [NO]), not_an_answer("chosen", "ua", 1)),
    "nothing in common": (row(..., [Q, YES], [user("x"), NO]), not_an_answer("chosen", "ua", 0)),
    "answers alone": (row(..., [YES], [NO]), not_an_answer("chosen", "a", 0)),
    "answers behind a string": (row("q", [YES], [NO]), "prompt is text, but chosen and rejected"),
    "unlike lengths": (row(..., [Q, YES], [Q, YES, Q, NO]), not_an_answer("rejected", "uaua", 1)),
    "accept is text": (row(accept="a"), "accept must be a list of strings"),
    "accept holds a number": (row(accept=["a", 1]), "accept must be a list of strings"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_name_file_and_line(what, tmp_path):
    bad, words = BAD_ROWS[what]
    file = write_rows(tmp_path / "rows.jsonl", row(), "", bad, row())
    with pytest.raises(ValueError) as error:
        load_preferences(file)
    message = str(error.value)
    assert message.startswith(f"{file}:3: ") and words in message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file has no rows"),
        (b"\n", "the file has no rows"),
        (b" \n\t\n\n", "the file has no rows"),
        (b"PAR1\x15\x04" + bytes(99) + b"PAR1", "is a parquet or gzip file"),
        (gzip.compress(b"{}"), "is a parquet or gzip file"),
    ],
    ids=["empty", "a line", "lines", "parquet", "gzip"],
)
def test_a_file_that_holds_no_rows_is_told_what_is_read(content, words, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_preferences(tmp_path / "rows.jsonl")
    assert str(error.value) == f"{tmp_path / 'rows.jsonl'}: {words}; {HINT}"


@pytest.mark.parametrize("line, content", [(1, "[{}]"), (1, "\ufeff["), (3, "\n  \n  [\n {")])
def test_a_json_array_is_told_apart_wherever_it_begins(line, content, tmp_path):
    (tmp_path / "rows.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_preferences(tmp_path / "rows.json")
    assert str(error.value) == f"{tmp_path / 'rows.json'}:{line}: a JSON array begins here; {HINT}"


@pytest.mark.parametrize(
    "name, words", [("absent.jsonl", "no such file"), ("", "is a folder, not a file")]
)
def test_a_missing_file_is_named(name, words, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_preferences(tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}: {words}; {HINT}"


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"\xef\xbb\xbf" + text],
    ids=["CRLF", "BOM"],
)
def test_what_windows_writes_is_read(change, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", row(), row("\u00e9"))
    wanted = load_preferences(file)
    file.write_bytes(change(file.read_bytes()))
    assert load_preferences(file) == wanted


@pytest.mark.parametrize(
    "more, ignored",
    [
        ({"system": "s", "input": "i", "score": 0}, ("system", "input", "score")),
        ({"system": "", "input": None, "tags": [], "accept": ["a"]}, ()),  # nothing is lost
        ({"question": "q", "output": "a"}, ()),  # says again what is used
        ({"question": "another"}, ("question",)),
    ],
)
@pytest.mark.parametrize("form", ["strings", "messages", "dialogues"])
def test_columns_whose_content_is_lost_are_known(form, more, ignored, tmp_path):
    """UltraFeedback's rows repeat their prompt as text and the chosen dialogue as `messages`."""
    q, a, b = user("q"), assistant("a"), assistant("b")
    forms = {
        "strings": row(),
        "messages": row([q], [a], [b]),
        "dialogues": row("q", [q, a], [q, b], messages=[q, a]),
    }
    (got,) = load_preferences(write_rows(tmp_path / "rows.jsonl", forms[form] | more))
    assert got.ignored == ignored


def about(rows, tmp_path, tokenizer=None, max_length=99):
    loaded = load_preferences(write_rows(tmp_path / "rows.jsonl", *rows))
    pairs, dropped = data.encode_pairs(tokenizer or Letters(), loaded, max_length, 98)
    return "\n".join(data.summary(loaded, pairs, dropped, max_length))


def test_ignored_columns_are_counted_in_one_line(tmp_path):
    rows = [row(score=1), row(score=2, system="s"), row(system="", input="i")]
    lines = about(rows, tmp_path).splitlines()
    (line,) = (line for line in lines if line.strip().startswith("ignored"))
    assert line.strip() == "ignored columns: score (2 rows), system (1 rows), input (1 rows)"
    (line,) = (line for line in lines if "prepare.py" in line)
    assert "system and input not used" in line
    assert "prepare.py" not in about([row(score=1)], tmp_path)


def test_prompts_that_are_all_empty_are_warned_of(tmp_path):
    empty = row(prompt="")
    assert "all prompts are empty" in about([empty, row(prompt=...)], tmp_path)
    few = about([row(), empty], tmp_path)
    assert f"warning: 1 of 2 prompts are empty (first: {tmp_path}/rows.jsonl:2)" in few
    assert "prompts are empty" not in about([row()], tmp_path)


def test_prompts_that_run_into_their_answer_are_counted_and_one_is_shown(tmp_path):
    """Not: a space on either side, a line's end, a template's mark, scripts without spaces."""
    apart = (
        ("q: ", "a"),
        ("q:", " a"),
        ("q\n", "a"),
        ("<|assistant|>", "a"),
        ("何", "水"),
        ("", "a"),
    )
    rows = [row(prompt, chosen) for prompt, chosen in apart]
    assert "without a space" not in about(rows, tmp_path)
    text = about([*rows, row("What is 2+2?", "Four."), row("q", "a")], tmp_path)
    assert "2 of 8 prompts run into their answer without a space" in text
    assert f"{tmp_path / 'rows.jsonl'}:7: 'What is 2+2?Four.'" in text


# -----------------------------------------------------------------------------
# Truncation and drops


@pytest.mark.parametrize(
    "prompt, chosen, rejected, max_length, max_prompt_length, wanted",
    [
        # tokens, BOS and EOS counted      -> prompt, chosen, rejected
        (4, 3, 5, 100, 100, (4, 3, 5)),
        (4, 3, 5, 9, 100, (4, 3, 5)),  # both fit to the last token
        (4, 3, 5, 8, 100, (4, 3, 4)),  # only the longer one is cut
        (4, 5, 3, 8, 100, (4, 4, 3)),
        (4, 5, 6, 8, 100, (4, 4, 4)),
        (100, 450, 300, 512, 256, (100, 412, 300)),  # not 62 of each
        (400, 200, 200, 512, 511, (400, 112, 112)),  # not 600 in all
        (10, 512, 5, 512, 256, (10, 502, 5)),  # not none at all
        (10, 5, 5000, 512, 256, (10, 5, 502)),
        (4, 3, 5, 5, 100, (4, 1, 1)),
        (4, 3, 5, 4, 100, "no room"),
        (9, 3, 5, 4, 100, "no room"),
        (4, 3, 5, 100, 4, (4, 3, 5)),
        (5, 3, 5, 100, 4, "prompt over 4"),
        (1, 2, 2, 3, 1, (1, 2, 2)),  # BOS alone
    ],
)
def test_each_response_is_cut_by_its_own_length(
    prompt, chosen, rejected, max_length, max_prompt_length, wanted
):
    texts = row_of("p" * (prompt - 1), "c" * (chosen - 1), "r" * (rejected - 1))
    pair = encode_pair(Letters(), texts, max_length, max_prompt_length)
    if isinstance(wanted, str):
        assert wanted in pair
        return
    assert pair.lengths == wanted
    assert tokens(pair)[0] == [1] + [ord("p")] * (prompt - 1)
    for ids, letter, n in ((pair.chosen, "c", chosen), (pair.rejected, "r", rejected)):
        whole = [ord(letter)] * (n - 1) + [2]  # EOS once, and only where nothing was cut
        assert ids.tolist() == whole[: len(ids)]


@pytest.mark.parametrize(
    "chosen, rejected, max_length, reason",
    [
        ("same", "same", 99, "identical responses"),
        ("", "b", 99, "empty"),
        ("a", "", 99, "empty"),
        ("", "", 99, "empty"),
        ("abcd", "abce", 5, "identical once cut"),  # BOS q + three tokens
        ("ab", "abc", 4, "identical once cut"),
        ("ab", "abc", 5, None),  # a b EOS against a b c
        ("same ", "same", 99, None),
    ],
)
def test_identical_and_empty_responses_are_dropped(chosen, rejected, max_length, reason):
    pair = encode_pair(Letters(), row_of("q", chosen, rejected), max_length, 99)
    assert isinstance(pair, Pair) if reason is None else reason in pair


def test_responses_that_lose_their_eos_are_counted(tmp_path):
    """BOS q leave 4 tokens of 6: abc and EOS fit, abcd and EOS do not."""
    texts = ("abc", "abcd"), ("abcd", "x"), ("abcde", "abcdx"), ("abcd", "abcx")
    text = about([row("q", *pair) for pair in texts], tmp_path, max_length=6)
    assert "3 pairs of 4; dropped: 1 identical once cut" in text
    assert "cut to 6 tokens, so without EOS: 2 chosen, 2 rejected" in text


DROPPED = [("q", "a", "a"), ("q", "", "b"), ("q", "c", "c"), ("q" * 9, "a", "b")]


def test_drops_are_counted_by_reason():
    rows = [row_of(*texts) for texts in [("q", "a", "b"), *DROPPED]]
    (pair,), dropped = encode_pairs(Letters(), rows, 99, 8)
    assert pair.where == rows[0].where and tokens(pair) == [[1, 113], [97, 2], [98, 2]]
    assert sum(dropped.values()) == 4 and sorted(dropped.values()) == [1, 1, 2]


def test_ten_reasons_are_named_and_the_others_counted():
    dropped = Dropped()
    for i in range(12):
        for line in range(12 - i):
            dropped.add(f"reason {i:02d}", None, row_of("q", "a", "b")._replace(where=f"F:{line}"))
    text = str(dropped)
    assert text.startswith("12 reason 00 (first: F:0), 11 reason 01 (first: F:0), ")
    assert text.endswith("3 reason 09 (first: F:0), 3 for other reasons")
    assert str(Dropped()) == "none"


def test_when_no_pair_is_left_the_reasons_are_said():
    with pytest.raises(ValueError, match="no pairs left") as error:
        encode_pairs(Letters(), [row_of(*texts) for texts in DROPPED], 99, 8)
    for word in ("4 rows", "2 identical", "1 empty", "1 prompt over 8"):
        assert word in str(error.value)


def test_hold_out_keeps_the_rows_of_a_prompt_together():
    """A quarter of nine prompts, rounded, is two, with the three rows that each has."""
    rows = [row_of([user(f"q{i % 9}")], f"a{i}", "b") for i in range(27)]
    train, held_out = data.hold_out(rows, 0.25, seed=42)
    assert len(held_out) == 6 and len({row.prompt[0]["content"] for row in held_out}) == 2
    assert [row for row in rows if row not in held_out] == train  # in their order
    assert data.hold_out(rows, 0.01, seed=42)[1]  # one prompt at least


def test_a_tokenizer_without_bos_and_eos():
    class Bare(Letters):
        bos_id = eos_id = None

    assert tokens(encode_pair(Bare(), row_of("q", "a", "b"), 9, 9)) == [[113], [97], [98]]
    assert "empty prompt" in encode_pair(Bare(), row_of("", "a", "b"), 9, 9)


@pytest.mark.parametrize("prompt", [[user("")], [user(" \n")], [SYSTEM, user("")]])
def test_messages_that_ask_nothing_are_an_empty_prompt(prompt, tokenizer):
    """Whatever the template writes around them."""
    row = row_of(prompt, [assistant("a")], [assistant("b")])
    assert encode_pair(tokenizer, row, 999, 999) == "empty prompt"
    row = row._replace(prompt=[SYSTEM])  # which may ask by itself
    assert isinstance(encode_pair(tokenizer, row, 999, 999), Pair)


def test_an_empty_prompt_gives_way_to_another_column(tmp_path):
    """As prepare.py reads it; sets that were merged have both."""
    row = {"prompt": "", "question": "What is 2 + 2?", "chosen": " 4.", "rejected": " 5."}
    (got,) = load_preferences(write_rows(tmp_path / "rows.jsonl", row))
    assert (got.prompt, got.chosen) == ("What is 2 + 2?", " 4.")
    row = {"question": "", "chosen": "It is 4.", "rejected": "It is 5.", "system": "s"}
    (got,) = load_preferences(write_rows(tmp_path / "rows.jsonl", row))
    assert (got.prompt, got.chosen) == ("", "It is 4.")  # it has one, and that is empty


def test_a_template_that_writes_none_in_place_of_no_content_is_refused(tokenizer):
    """Llama 3's and Gemma's trim it, and jinja makes text of it."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    answers = [{"role": "assistant", "content": None, "tool_calls": [call]}], [assistant("b")]
    row = row_of([user("None of it?")], *answers)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }};{% endfor %}"
    assert "writes None where a message has no content" in encode_pair(tokenizer, row, 999, 999)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content or m.tool_calls | tojson }};{% endfor %}"
    )
    assert isinstance(encode_pair(tokenizer, row, 999, 999), Pair)


# -----------------------------------------------------------------------------
# Pairs by a real tokenizer


def test_a_pair_is_a_prompt_and_two_continuations(tokenizer):
    """BOS once in front, EOS once behind each response, and no dummy space between."""
    for prompt, response in (("What is 2+2?", "4"), ("What is 2+2?", " 4"), ("The tea", "cher")):
        pair = encode_pair(tokenizer, row_of(prompt, response, "other"), 999, 999)
        assert tokens(pair) == [
            [1, *tokenizer.encode(prompt)],
            [*tokenizer.encode(response, continuation=True), 2],
            [*tokenizer.encode("other", continuation=True), 2],
        ]


def test_real_pairs_decode_to_what_was_read(shared):
    """1100 rows of which 6 are ties, through Llama 2's tokenizer; no special token is lost."""
    t = load_tokenizer(shared / "llama2-tokenizer")
    rows = load_preferences(shared / "politeness-pairs.jsonl")
    pairs, dropped = encode_pairs(t, rows, 512, 256)
    row_at = {row.where: row for row in rows}
    assert len(rows) == 1100 and len(pairs) == 1094 and list(dropped.values()) == [6]
    assert "identical" in next(iter(dropped))
    for pair in pairs:
        (prompt, *responses), r = tokens(pair), row_at[pair.where]
        for ids, text in zip(responses, (r.chosen, r.rejected), strict=True):
            assert prompt[0] == t.bos_id and ids[-1] == t.eos_id
            assert Counter(prompt + ids)[t.bos_id] == Counter(ids)[t.eos_id] == 1
            assert t.decode(prompt[1:] + ids[:-1]) == r.prompt + text


def test_messages_end_at_eos_once(tokenizer):
    """The template's newline behind EOS is never generated, so it is not trained on."""
    pair = encode_pair(tokenizer, row_of([Q], [YES], [NO]), 99, 99)
    assert tokens(pair) == [
        tokenizer.encode("<s><|user|>\nq</s>\n<|assistant|>\n"),  # as whoever serves it
        [*tokenizer.encode("yes", continuation=True), 2],
        [*tokenizer.encode("no", continuation=True), 2],
    ]


def test_an_empty_message_is_an_empty_response_whatever_its_template_writes(tokenizer):
    """Also where the end of a turn is not EOS, and white space is nothing."""
    for template in (None, "{% for m in messages %}<{{ m.content }}>\n{% endfor %}"):
        tokenizer.chat_template = template or tokenizer.chat_template
        for said in ("", " \n"):
            row = row_of([Q], [assistant(said)], [NO])
            assert encode_pair(tokenizer, row, 99, 99) == "empty response"
            row = row_of([Q], [YES], [assistant(said)])
            assert encode_pair(tokenizer, row, 99, 99) == "empty response"
    assert encode_pair(tokenizer, row_of("q", " ", "b"), 99, 99) == "empty response"


def test_eos_within_an_answer_is_text_and_at_its_end_is_its_end(tokenizer):
    """As of an answer that is about HTML; white space after the last EOS is a template's."""
    for text, wanted in (
        ("a</s>b", ["a", 2, "b"]),
        ("</s> closes", [2, " closes"]),
        ("a</s>", ["a"]),
        ("a</s> \n", ["a"]),
        ("a</s></s>\n", ["a"]),
        ("a</s>b</s>", ["a", 2, "b"]),
    ):
        ids = []
        for part in wanted:
            new = [part] if part == 2 else tokenizer.encode(part, continuation=True)
            ids += new
        pair = encode_pair(tokenizer, row_of("q", text, "other"), 999, 999)
        assert tokens(pair)[1] == [*ids, 2], text


def test_bos_in_front_of_an_answer_is_left_out_and_counted(tmp_path, tokenizer):
    rows = [row("q", "<s>yes", "no"), row("q", "<s>yes", "<s>no"), row("q", "yes", "a <s> b")]
    loaded = load_preferences(write_rows(tmp_path / "rows.jsonl", *rows))
    pairs, dropped = encode_pairs(tokenizer, loaded, 99, 98)
    assert [pair.n_bos for pair in pairs] == [1, 2, 0] and 1 in tokens(pairs[2])[2]
    assert not any(1 in tokens(pair)[1] for pair in pairs)
    text = "\n".join(data.summary(loaded, pairs, dropped, 99))
    assert "3 responses began with BOS, which is left out" in text


LOOP = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_bos_and_eos_are_there_once_whether_or_not_a_template_writes_them(make_tokenizer):
    pairs = []
    for template in (LOOP, "{{ bos_token }}" + LOOP):
        t = make_tokenizer(chat_template=template, legacy=True)
        pairs.append(tokens(encode_pair(t, row_of([Q], [YES], [NO]), 99, 99)))
        text = t.encode("[q]"), t.encode("[yes]", continuation=True)
        assert pairs[-1][:2] == [[1, *text[0]], [*text[1], 2]]
    assert pairs[0] == pairs[1]


def test_a_template_that_changes_the_prompt_once_it_is_answered_is_refused(make_tokenizer):
    t = make_tokenizer(chat_template=LOOP + "{% if add_generation_prompt %}> {% endif %}")
    row = row_of([Q], [YES], [NO])
    assert encode_pair(t, row, 99, 99) == "the chat template changes the prompt once it is answered"
    with pytest.raises(ValueError) as error:
        encode_pairs(t, [row], 99, 99)
    for words in ("rows.jsonl:7, where after '[q]' the prompt has '> '", "dialogue has '[yes]'"):
        assert words in str(error.value)
    assert "--chat-template" in str(error.value)


def test_rows_that_a_template_refuses_are_counted_as_all_others_are(make_tokenizer):
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    t = make_tokenizer(
        chat_template="{% for m in messages %}" + refuses + "[{{ m.content }}]{% endfor %}"
    )
    system = {"role": "system", "content": "s"}
    rows = [row_of([Q], [YES], [NO]), *[row_of([system, Q], [YES], [NO])] * 2]
    pairs, dropped = encode_pairs(t, rows, 99, 99)
    reason = "the chat template fails: TemplateError: no system"
    assert len(pairs) == 1 and dropped == {reason: 2}
    assert f"dropped: 2 {reason} (first: rows.jsonl:7)" in "\n".join(
        data.summary(rows, pairs, dropped, 99)
    )
    with pytest.raises(ValueError, match="no pairs left of 2 rows: 2 the chat template fails"):
        encode_pairs(t, rows[1:], 99, 99)


BY_ROLE = (  # as Qwen's and Phi-3's: what is none of these roles is not written
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def warnings_by(template, make_tokenizer, *rows):
    t = make_tokenizer(chat_template=template)
    pairs, dropped = encode_pairs(t, list(rows), 999, 999)
    return "\n".join(data.summary(list(rows), pairs, dropped, 999)), pairs


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_what_is_left_out_of_one_answer_only_is_counted(side, make_tokenizer):
    row = row_of([Q], [YES], [NO])
    answer = getattr(row, side)[0] | {"reasoning_content": "because"}
    text, _ = warnings_by(BY_ROLE, make_tokenizer, row._replace(**{side: [answer]}))
    assert "leaves out reasoning_content of assistant messages, or a part of it, in 1 pai" in text


def test_what_a_template_does_not_write_is_counted(make_tokenizer):
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"c": "x"}}}
    tool = {"role": "tool", "content": "18 degrees", "name": "weather", "tool_call_id": "1"}
    rows = [
        row_of([Q], [YES], [NO]),
        row_of([Q], [assistant("<think>so</think>yes")], [NO]),
        row_of([Q], [YES | {"reasoning_content": "because"}], [NO]),
        row_of([Q, YES | {"tool_calls": [call]}, tool], [YES], [NO]),
        row_of([Q], [YES], [NO])._replace(tools=[call]),
    ]
    text, pairs = warnings_by(BY_ROLE, make_tokenizer, *rows)
    assert len(pairs) == 5
    for what in (
        "content of assistant messages",
        "reasoning_content of assistant messages",
        "tool_calls of assistant messages",
        "content of tool messages",
        "name of tool messages",
        "tools",
    ):
        assert f"leaves out {what}, or a part of it, in 1 pairs (first: rows.jsonl:7)" in text
    assert text.count("leaves out") == 6


@pytest.mark.parametrize(
    "written", ["m.content | trim", "m.content | tojson", "m.content.split() | join('  ')"]
)
def test_what_a_template_writes_in_another_way_is_not_counted(written, make_tokenizer):
    """Stripped, escaped as JSON, or with other white space; and in another order."""
    t = make_tokenizer(
        chat_template="{% for m in messages | reverse %}{{ " + written + " }}{% endfor %}"
    )
    asked = [{"role": "system", "content": "be\nbrief"}, user(' say "a"\nor b ')]
    assert left_out(asked, t.apply_chat_template(asked)) == []


def test_a_text_within_another_message_is_not_taken_for_its_own():
    asked = [user("Lima is where?"), user("Lima")]
    assert left_out(asked, "<Lima is where?>") == ["content of user messages"]
    assert left_out(asked, "<Lima is where?><Lima>") == []


def test_what_is_said_twice_is_written_twice():
    asked = [user("Yes."), YES, user("Yes.")]
    said = f"<Yes.>{YES['content']}<Yes.>"
    assert left_out(asked, said) == []
    assert left_out(asked, said[len("<Yes.>") :]) == ["content of user messages"]


def test_a_prompt_of_which_nothing_is_written_is_dropped(make_tokenizer):
    rows = [row_of([{"role": "critic", "content": "Who?"}], [YES], [NO]), row_of([Q], [YES], [NO])]
    text, pairs = warnings_by(BY_ROLE, make_tokenizer, *rows)
    assert len(pairs) == 1
    assert "1 the chat template writes nothing of the prompt (first: rows.jsonl:7)" in text
    with pytest.raises(ValueError, match="no pairs left of 1 rows: 1 the chat template writes not"):
        warnings_by(BY_ROLE, make_tokenizer, rows[0])


def test_answers_that_differ_only_in_what_is_left_out_are_told_apart_from_equal_ones(
    make_tokenizer,
):
    t = make_tokenizer(chat_template=BY_ROLE)
    other = assistant("<think>hm</think>yes")
    reason = "identical responses, as the chat template leaves out what differs"
    assert encode_pair(t, row_of([Q], [YES], [other]), 99, 99) == reason
    assert encode_pair(t, row_of([Q], [YES], [YES]), 99, 99) == "identical responses"


def test_tools_and_all_keys_of_a_message_reach_the_template(make_tokenizer):
    template = (
        "{{ tools[0].name if tools }}{% for m in messages %}[{{ m.content }}"
        "{% for call in m.tool_calls %}{{ call.function.arguments.city }}{% endfor %}]{% endfor %}"
    )
    t = make_tokenizer(chat_template=template)
    call = {"function": {"name": "weather", "arguments": {"city": "Lima"}}}
    chosen = {"role": "assistant", "content": "", "tool_calls": [call]}
    loaded = row_of([Q], [chosen], [NO])._replace(tools=[{"name": "weather"}])
    pair = encode_pair(t, loaded, 99, 99)
    assert t.decode(pair.prompt[1:]) == "weather[q]" and t.decode(pair.chosen[:-1]) == "[Lima]"
    assert t.decode(pair.rejected[:-1]) == "[no]"


def test_chat_template_kwargs_of_a_row_reach_the_template_and_unknown_ones_are_named(
    make_tokenizer, tmp_path
):
    """SmolLM3's own preference data has them; without them its template asks for a <think>."""
    template = (
        "{% if enable_thinking is defined and not enable_thinking %}/no{% endif %}{{ more }}"
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    t = make_tokenizer(chat_template=template)
    kwargs = {"enable_thinking": False, "more": "brief", "depth": 3}
    line = row([Q], [YES], [NO], chat_template_kwargs=kwargs)
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    (loaded,) = load_preferences(tmp_path / "rows.jsonl")
    assert not loaded.ignored
    pair = encode_pair(t, loaded, 99, 99)
    assert t.decode(pair.prompt[1:]) == "/nobrief[q]"
    assert pair.left_out == ("depth of chat_template_kwargs",)


# -----------------------------------------------------------------------------
# Steps and micro-batches


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    for n in (1, 2, 50):
        assert sorted(epoch_permutation(n, 42, 0)) == list(range(n))
    orders = {(s, e): tuple(epoch_permutation(50, s, e)) for s in (0, 1, 42) for e in (0, 1, 2)}
    assert len(set(orders.values())) == 9 and tuple(range(50)) not in orders.values()
    torch.manual_seed(7)  # no other state
    assert all(tuple(epoch_permutation(50, *key)) == value for key, value in orders.items())


def pairs_of(*lengths):
    """Pairs of these (p, c, r); every token of all of them is another number."""
    ids = iter(range(10**6))
    return [Pair(*([next(ids) for _ in range(n)] for n in pcr)) for pcr in lengths]


SOME = [(3, 2, 3), (1, 3, 1), (10, 5, 5), (2, 2, 2), (1, 1, 1), (1, 1, 1)]  # 8 5 20 6 3 3


@pytest.mark.parametrize(
    "budget, wanted",
    [
        (100, [[8, 5, 20, 6, 3, 3]]),
        (13, [[8, 5], [20], [6, 3, 3]]),
        (12, [[8], [5], [20], [6, 3, 3]]),
        (20, [[8, 5], [20], [6, 3, 3]]),
        (9, [[8], [5], [20], [6, 3], [3]]),
        (1, [[8], [5], [20], [6], [3], [3]]),
    ],
)
def test_cut_keeps_the_budget_and_never_splits_a_pair(budget, wanted):
    parts = split_by_tokens(pairs_of(*SOME), budget)
    assert [[sum(pair.lengths) for pair in part] for part in parts] == wanted
    assert [pair for part in parts for pair in part] == pairs_of(*SOME)  # in order, none lost
    assert split_by_tokens([], budget) == []


TWO = [Pair([1, 10, 11], [20, 2], [30, 31, 2]), Pair([1], [21, 22, 2], [32])]


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_a_micro_batch_by_hand(sft_loss):
    """
    row        0  1  2   3  4   5  6  7 |  8   9 10 11  12
    token      1 10 11  20  2  30 31  2 |  1  21 22  2  32
               prompt   chosen rejected    p  chosen    rejected
    position   0  1  2   3  4   3  4  5 |  0   1  2  3   1

    Row 2 predicts 20 and 30, row 3 predicts 2, rows 5 and 6 predict 31 and 2; row 8 predicts 21
    and 32, rows 9 and 10 predict 22 and 2. "response": two pairs with m = 2 and 3, so 1/4 and 1/6
    for each chosen token. "full" has rows 0 and 1 predict 10 and 11 as well; prompt and chosen
    less the first token are 4 + 3 = 7 tokens, so 1/7 each.
    """
    (b,) = micro_batches(TWO, 13, sft_loss)
    assert b.segments.lengths == ((5, 5), (3, 6), (4, 4), (1, 2))
    assert b.segments.key_index.tolist() == [*range(5), 0, 1, 2, 5, 6, 7, *range(8, 12), 8, 12]
    assert (b.groups, b.n_pairs) == ([(0, 9 if sft_loss == "response" else 11)], 2)
    assert b.tokens.tolist() == [1, 10, 11, 20, 2, 30, 31, 2, 1, 21, 22, 2, 32]
    assert b.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 1]
    assert b.response_lengths.tolist() == [2, 3, 3, 1]
    predict, targets = [2, 3, 2, 5, 6, 8, 9, 10, 8], [20, 2, 30, 31, 2, 21, 22, 2, 32]
    response = [0, 0, 1, 1, 1, 2, 2, 2, 3]
    weight = [1 / 4] * 2 + [0] * 3 + [1 / 6] * 3 + [0]
    if sft_loss == "full":
        predict, targets, response = [0, 1, *predict], [10, 11, *targets], [-1, -1, *response]
        weight = [1 / 7] * 4 + [0] * 3 + [1 / 7] * 3 + [0]
    assert b.predict.tolist() == predict
    assert b.targets.tolist() == targets
    assert b.response.tolist() == response
    assert b.nll_weight.dtype == torch.float32
    torch.testing.assert_close(b.nll_weight, torch.tensor(weight), rtol=1e-6, atol=0)
    ints = b.tokens, b.positions, b.predict, b.targets, b.response, b.response_lengths
    assert {x.dtype for x in ints} == {torch.int64}


@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_a_step_weighs_the_same_however_it_is_cut(sft_loss):
    """Each target (all are different numbers) keeps its weight; together they are 1."""
    steps = []
    for budget in (100, 13, 1):
        batches = micro_batches(pairs_of(*SOME), budget, sft_loss)
        steps.append({})
        for b in batches:
            steps[-1] |= dict(zip(b.targets.tolist(), b.nll_weight.tolist(), strict=True))
        assert sum(float(b.nll_weight.double().sum()) for b in batches) == pytest.approx(1, 1e-6)
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("limit", [1, 9, 10, 30, 31, 1000])
@pytest.mark.parametrize("sft_loss", ["response", "full"])
def test_few_rows_go_through_lm_head_at_a_time(limit, sft_loss, monkeypatch):
    """As many pairs as have at most so many predictions, or one that has more: what bounds the
    logits that are kept. No two neighbouring groups would fit into one."""
    monkeypatch.setattr(data, "GROUP_ROWS", limit)
    pairs = some_pairs(12, seed=3, longest=9)
    sizes = [c + r + (p - 1) * (sft_loss == "full") for p, c, r in (x.lengths for x in pairs)]
    (batch,) = data.micro_batches(pairs, 10**9, sft_loss, multiple=1)
    ends = [0, *accumulate(sizes)]
    starts, stops = zip(*batch.groups, strict=True)
    assert [*starts, stops[-1]] == [0, *stops] and {*stops} <= {*ends} and stops[-1] == ends[-1]
    n_pairs = [ends.index(stop) - ends.index(start) for start, stop in batch.groups]
    assert all(n == 1 or stop - start <= limit
               for n, (start, stop) in zip(n_pairs, batch.groups, strict=True))  # fmt: skip
    for start, stop in batch.groups[:-1]:
        assert ends[ends.index(stop) + 1] - start > limit


def test_a_prediction_is_one_position_ahead_in_its_own_branch():
    """Of every pair in a micro-batch, by the numbers of its tokens."""
    pairs = pairs_of(*SOME)
    (b,) = micro_batches(pairs, 100, "full")
    before = {}
    for p in pairs:
        for response in (p.chosen, p.rejected):
            text = p.prompt + response
            before |= dict(zip(text[1:], text, strict=False))
    assert b.tokens[b.predict].tolist() == [before[t] for t in b.targets.tolist()]
    assert len(b.targets) == len(before)  # every token that has one before it, once


# -----------------------------------------------------------------------------
# python data.py


@pytest.fixture
def shown(tokenizer):
    """A pair, and how it is shown without and with colours."""
    pair = encode_pair(tokenizer, row_of("The teacher:", " a\nviolin", "10"), 99, 99)
    return pair, *(data.show(pair, tokenizer, colour=colour) for colour in (False, True))


def test_shown_tokens_are_the_text(shown):
    pair, plain, _ = shown
    lines = plain.splitlines()
    for count, name, n in zip(lines[0::2], Pair._fields[:3], pair.lengths, strict=True):
        assert count.startswith(f"{name}: {n} tokens")
    texts = [line.strip().replace("·", "") for line in lines[1::2]]
    assert texts == ["<s> The teacher:", "a\\nviolin</s>", "10</s>"]
    assert "\x1b" not in plain


def test_a_character_of_several_tokens_is_shown_whole(tokenizer):
    """Here of three tokens, one for each byte; also where a response begins or is cut within it."""
    pair = encode_pair(tokenizer, row_of("中a中", "中 b", "x中"), 99, 99)
    prompt, chosen, rejected = data.show(pair, tokenizer, colour=False).splitlines()[1::2]
    assert prompt.replace("·", "") == "  <s> 中a中" and "·中·a·中" in prompt
    assert chosen == "  中· ·b·</s>" and rejected == "  x·中·</s>"
    cut = pair._replace(rejected=pair.rejected[:2])
    assert data.show(cut, tokenizer, colour=False).endswith("x·\N{REPLACEMENT CHARACTER}")


def test_colours_tell_context_from_what_is_made_likelier_and_less_likely(shown):
    *_, coloured = shown
    paints = [line.strip()[:5] for line in coloured.splitlines()[1::2]]
    assert [p.split("m")[0] for p in paints] == ["\x1b[2", "\x1b[32", "\x1b[31"]
    assert coloured.count("\x1b[0m") == 3


def test_data_py_shows_three_pairs_and_the_counts(tiny_tokenizer, tmp_path):
    rows = [row(f"Question {i}?", f" yes {i}", f" no {i}") for i in range(4)]
    file = write_rows(tmp_path / "rows.jsonl", *rows, row(), row(chosen="b"))
    out, error = call("data.py", file, "--model", tiny_tokenizer)
    assert error == ""
    for name in Pair._fields[:3]:
        assert out.count(f"\n{name}: ") + out.startswith(f"{name}: ") == 3
    assert "5 pairs of 6; dropped: 1 identical" in out
    assert "\x1b" not in out  # no colours into a file


LONG = " ".join(["likes"] * 400)  # more than tiny_llama's context, which is 256


def test_data_py_shows_the_pairs_that_train_py_trains_on(tiny_llama, tmp_path, capsys, monkeypatch):
    """With the model's context, a template of one's own, and all that the plan says of the data."""
    monkeypatch.setattr("os.getloadavg", lambda: (0, 0, 0))  # a busy machine is told in a line more
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    rows = [row([Q], [assistant(answer)], [NO], system="s") for answer in (LONG, "yes", "no")]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    flags = ["--model", str(tiny_llama), "--chat-template", str(tmp_path / "own.jinja")]
    config = train.parse([*flags, "--data", str(file), "--out", "unused", "--device", "cpu"])
    pick_device(config)
    config.max_length = 256  # the model's context
    _, tokenizer, pairs, _ = train.load_inputs(config)
    told = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(told) if line.startswith("train"))  # after the model's
    told = [line[9:] for line in told[first:]]
    data.main([str(file), *flags])
    shown = capsys.readouterr().out
    assert len(pairs) == 2 and sum(pairs[0].lengths[:2]) == 256
    for pair in pairs:
        assert data.show(pair, tokenizer, colour=False) in shown
    assert shown.endswith("\n".join(told) + "\n") and "2 pairs of 3" in told[0]
    assert "cut to 256 tokens, so without EOS: 1 chosen, 0 rejected" in shown


@pytest.mark.parametrize(
    "content, options, words",
    [
        (b'{"prompt": "q"}\n', [], ["rows.jsonl:1: ", "chosen"]),
        (b'{"prompt": "q", "chosen": "a", "rejected": "a"}\n', [], ["no pairs left", "1 identic"]),
        (b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n', ["--max-length=2"], ["no room"]),
        (None, [], ["rows.jsonl"]),
        (b"{}", ["--model=/nowhere"], ["/nowhere", "tokenizer.model"]),
        (b"{}", ["--nonsense"], ["--nonsense"]),
        (b"{}", ["--chat-template=/no.jinja"], ["/no.jinja"]),
        (b"{}", ["--max-length=long"], ["--max-length", "long"]),
    ],
)
def test_data_py_says_what_is_wrong_and_exits_2(
    content, options, words, tiny_tokenizer, tmp_path, capsys
):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as done:
        data.main([str(tmp_path / "rows.jsonl"), "--model", str(tiny_tokenizer), *options])
    captured = capsys.readouterr()
    assert done.value.code == 2 and captured.out == ""
    assert all(word in captured.err for word in words)
    assert len(captured.err.splitlines()) <= 2 and "usage:" not in captured.err


def test_data_py_prints_no_traceback(tiny_tokenizer, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", "{")
    out, error = call("data.py", rows, "--model", tiny_tokenizer, code=2)
    assert out == "" and f"{rows}:1: " in error and "Traceback" not in error


def test_data_py_ends_quietly_where_its_reader_does(tiny_tokenizer, tmp_path):
    """As `python data.py ... | head -1` does."""
    file = write_rows(tmp_path / "rows.jsonl", *[row("q" * 50_000, "a", "b")] * 3)
    command = ["data.py", file, "--model", tiny_tokenizer]
    command += ["--max-length", "99999", "--max-prompt-length", "99999"]
    process = Forked(*command, pipe=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.communicate() == ("", "")
    assert process.poll() == -signal.SIGPIPE  # so it ended early, as other viewers do


def test_data_py_helps(capsys):
    with pytest.raises(SystemExit) as done:
        data.main(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert all(word in out for word in ("--model", "--max-length", "--max-prompt-length"))
