"""
Rows, truncation, packing and the tokenizer: small tables worked out by hand, a sentencepiece model
trained in conftest.py (ids: 0 <unk>, 1 <s>, 2 </s>), Llama 2's where it is present.
"""

import json
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
import torch

import data
from data import (
    Pair,
    Preference,
    encode_pair,
    encode_prompt,
    encode_rows,
    epoch_permutation,
    load_preferences,
    load_tokenizer,
    micro_batches,
    split_by_tokens,
)
from tests.layout import tokens

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
def make_tokenizer(sentencepiece_model, tmp_path):
    """Loads a folder with tokenizer.model and these files: name -> text, or what JSON takes."""

    def make(files=None, **config):
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model)
        for name, value in ({"tokenizer_config.json": config} | (files or {})).items():
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return load_tokenizer(folder)

    return make


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(params=["tiny", "llama2"])
def either_tokenizer(request):
    if request.param == "tiny":
        return load_tokenizer(request.getfixturevalue("tiny_tokenizer"))
    return load_tokenizer(request.getfixturevalue("shared") / "llama2-tokenizer")


class Letters:
    """A tokenizer of one id a character, so that a text is as long as it looks."""

    bos_id, eos_id = 1, 2

    def encode(self, text, continuation=False):
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


BAD_ROWS = {
    "broken JSON": ('{"prompt": "q", ', ""),
    "invalid UTF-8": (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', "utf-8"),
    "half a surrogate pair": (r'{"prompt": "\ud800", "chosen": "a", "rejected": "b"}', ""),
    "deeply nested": ("[" * 100_000, ""),
    "a list": ([1], "object"),
    "a string": ('"x"', "object"),
    "null": ("null", "object"),
    "no chosen": (row(chosen=...), "'chosen'"),
    "no rejected": (row(rejected=...), "'rejected'"),
    "other names": ({"question": "q", "answer": "a"}, "question"),
    "chosen a number": (row(chosen=3), "chosen"),
    "rejected null": (row(rejected=None), "rejected"),
    "prompt a number": (row(prompt=3), "prompt"),
    "rejected messages, chosen text": (row(rejected=[NO]), "chosen"),
    "prompt messages, answers text": (row(prompt=[Q]), "chosen"),
    "prompt an empty list": (row([], [YES], [NO]), "prompt"),
    "chosen an empty list": (row([Q], [], [NO]), "chosen"),
    "a message without role": (row([Q], [{"content": "x"}], [NO]), "chosen[0]"),
    "a message without content": (row([Q, {"role": "user"}], [YES], [NO]), "prompt[1]"),
    "content null": (row([Q], [YES], [{"role": "assistant", "content": None}]), "rejected[0]"),
    "content a list": (row([Q], [YES], [{"role": "assistant", "content": []}]), "rejected[0]"),
    "a message is text": (row([Q], ["yes"], [NO]), "chosen[0]"),
    "the answer is the user's": (row([Q], [user("yes")], [NO]), "chosen"),
    "two answers": (row([Q], [YES], [NO, NO]), "rejected"),
    "the dialogue is another": (row([Q], [user("other"), YES], [NO]), "chosen"),
    "nothing in common": (row(..., [Q, YES], [user("other"), NO]), "chosen"),
    "answers alone": (row(..., [YES], [NO]), "chosen"),
    "unlike lengths": (row(..., [Q, YES], [Q, YES, Q, NO]), "rejected"),
    "accept is text": (row(accept="a"), "accept"),
    "accept holds a number": (row(accept=["a", 1]), "accept"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_name_file_and_line(what, tmp_path):
    bad, word = BAD_ROWS[what]
    file = write_rows(tmp_path / "rows.jsonl", row(), "", bad, row())
    with pytest.raises(ValueError) as error:
        load_preferences(file)
    message = str(error.value)
    assert message.startswith(f"{file}:3: ") and word in message and "\n" not in message


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\n\n"])
def test_a_file_without_rows_is_an_error(content, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl: .*no rows"):
        load_preferences(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_preferences(tmp_path / name)


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


def test_drops_are_counted_by_reason():
    texts = [("q", "a", "b"), ("q", "a", "a"), ("q", "", "b"), ("q", "c", "c"), ("q" * 9, "a", "b")]
    rows = [row_of(*text) for text in texts]
    (pair,), dropped = encode_rows(Letters(), rows, 99, 8)
    assert pair.where == rows[0].where and tokens(pair) == [[1, 113], [97, 2], [98, 2]]
    assert sum(dropped.values()) == 4 and sorted(dropped.values()) == [1, 1, 2]
    with pytest.raises(ValueError, match="no pairs left") as error:
        encode_rows(Letters(), rows[1:], 99, 8)
    for word in ("4 rows", "2 identical", "1 empty", "1 prompt over 8"):
        assert word in str(error.value)


def test_a_tokenizer_without_bos_and_eos():
    class Bare(Letters):
        bos_id = eos_id = None

    assert tokens(encode_pair(Bare(), row_of("q", "a", "b"), 9, 9)) == [[113], [97], [98]]
    assert "empty prompt" in encode_pair(Bare(), row_of("", "a", "b"), 9, 9)


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
    assert (b.q_lens, b.k_lens) == ([5, 3, 4, 1], [5, 6, 4, 2])
    assert b.key_index.tolist() == [*range(5), 0, 1, 2, 5, 6, 7, *range(8, 12), 8, 12]
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
# The tokenizer

TEXTS = [
    ("What is 2+2?", "4"),
    ("What is 2+2?", " 4"),
    ("2+2=", "4"),
    ("The teacher likes", " a violin."),
    ("The tea", "cher"),
    ("two  spaces ", "  and three   "),
    ("line\n", "\nline\n\n"),
    ("naïve 日本", "語 😀"),
    ("\ttab", "\x00\x07"),
    ("<|user|>\nHi\n<|assistant|>\n", "Hello."),
    ("<s", ">"),
]


@pytest.mark.parametrize("prompt, response", TEXTS)
def test_a_response_is_a_continuation(prompt, response, either_tokenizer):
    t = either_tokenizer
    ids = t.encode(prompt) + t.encode(response, continuation=True)
    assert t.decode(ids) == prompt + response
    pair = encode_pair(t, row_of(prompt, response, "other"), 999, 999)
    assert tokens(pair)[:2] == [
        [t.bos_id, *t.encode(prompt)],
        [*t.encode(response, continuation=True), t.eos_id],
    ]


def test_encoding_is_the_librarys(either_tokenizer, sentencepiece_model):
    """At a text's start; and a continuation is the same without the dummy space."""
    t = either_tokenizer
    for text in [text for pair in TEXTS for text in pair]:
        assert t.encode(text) == t.sp.encode(text)
    with_space, without = t.encode("violin"), t.encode("violin", continuation=True)
    assert with_space != without and t.encode(" violin", continuation=True) == with_space
    assert t.encode("") == t.encode("", continuation=True) == []
    assert t.decode([]) == ""


def test_real_pairs_decode_to_what_was_read(shared):
    """1100 rows of which 6 are ties, through Llama 2's tokenizer; no special token is lost."""
    t = load_tokenizer(shared / "llama2-tokenizer")
    rows = load_preferences(shared / "politeness-pairs.jsonl")
    pairs, dropped = encode_rows(t, rows, 512, 256)
    row_at = {row.where: row for row in rows}
    assert len(rows) == 1100 and len(pairs) == 1094 and list(dropped.values()) == [6]
    assert "identical" in next(iter(dropped))
    for pair in pairs:
        (prompt, *responses), r = tokens(pair), row_at[pair.where]
        for ids, text in zip(responses, (r.chosen, r.rejected), strict=True):
            assert prompt[0] == t.bos_id and ids[-1] == t.eos_id
            assert Counter(prompt + ids)[t.bos_id] == Counter(ids)[t.eos_id] == 1
            assert t.decode(prompt[1:] + ids[:-1]) == r.prompt + text


def test_collapsing_spaces_do_not_swallow_a_word_boundary(shared):
    """stories260K's tokenizer turns runs of spaces into one and strips those at a text's start."""
    t = load_tokenizer(shared / "stories260K")
    for prompt, response, wanted in [
        ("The cat", " sat", "The cat sat"),
        ("The cat", "  sat  down", "The cat sat down"),
        ("The ca", "t sat", "The cat sat"),
        ("2+2=", "4", "2+2=4"),
    ]:
        assert t.decode(t.encode(prompt) + t.encode(response, continuation=True)) == wanted


def test_special_token_text_becomes_the_id(tokenizer):
    t = tokenizer
    hello = t.encode("hello", continuation=True)
    assert (t.bos_id, t.eos_id, t.vocab_size) == (1, 2, 400)
    assert t.encode("hello</s>hello") == [*t.encode("hello"), 2, *hello]
    assert t.encode("<s></s><unk>") == [1, 2, 0]
    assert t.encode("hello", bos=True, eos=True) == [1, *t.encode("hello"), 2]
    assert t.encode("", bos=True, eos=True) == [1, 2]
    assert t.decode([1, *hello, 2, *hello, 2]) == "<s>hello</s>hello</s>"
    assert t.decode(torch.tensor([2])) == "</s>"
    for nobody in (-1, 400):  # a padded embedding can give such ids: they have no text
        assert t.decode([nobody, *hello]) == "hello"


def test_special_tokens_match_leftmost_then_longest(make_tokenizer):
    added = {"400": {"content": "<a>"}, "401": {"content": "<a><b>"}, "402": {"content": "b><a>x"}}
    t = make_tokenizer({"added_tokens.json": {"(*)": 405}}, added_tokens_decoder=added)
    assert t.vocab_size == 406  # 1 + the largest id: 403 and 404 are nobody's
    assert t.encode("<a>") == [400]
    assert t.encode("<a><b>") == [401]  # longest
    assert t.encode("<a><b><a>x") == [401, 400, *t.encode("x", continuation=True)]  # leftmost
    assert t.encode("(*)(*)") == [405, 405]  # is no pattern
    assert t.decode([401, 400, 405]) == "<a><b><a>(*)"
    assert t.decode([401, 403]) == "<a><b>"


@pytest.mark.parametrize("legacy", [True, False, None])
def test_only_legacy_adds_the_dummy_space_behind_a_special_token(legacy, make_tokenizer):
    t = make_tokenizer(**({} if legacy is None else {"legacy": legacy}))
    behind = t.encode("violin") if legacy else t.encode("violin", continuation=True)
    assert t.encode("<s>violin</s>violin") == [1, *behind, 2, *behind]
    assert t.encode("violin</s>violin", continuation=True) == [
        *t.encode("violin", continuation=True),
        2,
        *behind,
    ]
    assert t.encode("violin", bos=True) == [1, *t.encode("violin")]  # a text's start in any case


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("as_object", [False, True], ids=["text", "AddedToken"])
def test_bos_and_eos_from_either_file_and_form(file, as_object, make_tokenizer):
    names = {"bos_token": "<begin>", "eos_token": "<end>"}
    if as_object:
        names = {k: {"content": v, "lstrip": False, "special": True} for k, v in names.items()}
    added = {"<begin>": 400, "<end>": 401}
    t = make_tokenizer({file: names, "added_tokens.json": added})
    assert (t.bos_id, t.eos_id, t.vocab_size) == (400, 401, 402)
    assert t.encode("", bos=True, eos=True) == [400, 401]
    assert t.apply_chat_template([user("q")]) == "<|user|>\nq<end>\n"


def test_without_a_config_the_model_itself_has_bos_and_eos(sentencepiece_model, tmp_path):
    """And a file will do in place of a folder."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    for path in (tmp_path, tmp_path / "tokenizer.model", str(tmp_path)):
        t = load_tokenizer(path)
        assert (t.bos_id, t.eos_id) == (1, 2)


def test_a_null_bos_is_none(make_tokenizer):
    t = make_tokenizer(bos_token=None, eos_token="</s>")
    assert t.bos_id is None and t.encode("hello", bos=True) == t.encode("hello")
    assert encode_prompt(t, "hello") == t.encode("hello")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": "{"},
        {"tokenizer_config.json": "[]"},
        {"special_tokens_map.json": "3"},
        {"added_tokens.json": "[" * 100_000},
        {"added_tokens.json": {"<a>": "four"}},
        {"tokenizer_config.json": {"added_tokens_decoder": ["<a>"]}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<a>"}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"400": {}}}},
        {"tokenizer_config.json": {"eos_token": ["</s>"]}},
        {"tokenizer_config.json": {"chat_template": ["default"]}},
    ],
    ids=lambda files: str(files)[:70],
)
def test_a_broken_tokenizer_file_is_an_error_with_the_path(files, make_tokenizer, tmp_path):
    with pytest.raises(ValueError) as error:
        make_tokenizer(files)
    assert str(error.value).startswith(str(tmp_path / "made")) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["absent", "half", "noise", "empty"])
def test_a_broken_sentencepiece_model_is_named(change, sentencepiece_model, tmp_path):
    content = {"half": sentencepiece_model[:4001], "noise": b"\xff" * 99, "empty": b""}
    if change != "absent":
        (tmp_path / "tokenizer.model").write_bytes(content[change])
    with pytest.raises((FileNotFoundError, ValueError), match=r"tokenizer\.model: "):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_150000_loads_in_two_seconds(sentencepiece_model, tmp_path):
    """Pieces are appended by hand: field 1 of the model, of text (1) and score (2, a float)."""
    pieces = []
    for i in range(150_000):
        piece = f"piece{i}".encode()
        body = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", -1000.0 - i)
        pieces.append(b"\x0a" + bytes([len(body)]) + body)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model + b"".join(pieces))
    start = time.process_time()  # other processes do not count
    t = load_tokenizer(tmp_path)
    assert time.process_time() - start < 2
    assert t.vocab_size == 150_400 and t.decode([150_399]) == "piece149999"


def test_the_tokenizer_of_the_fixtures_is_reproducible(tiny_tokenizer, tiny_llama):
    """Ids in tests are fixed; both folders hold the same model."""
    a, b = (load_tokenizer(folder) for folder in (tiny_tokenizer, tiny_llama))
    assert a.encode("The teacher likes 10 clocks.") == b.encode("The teacher likes 10 clocks.")
    assert isinstance(a.sp, sentencepiece.SentencePieceProcessor)


# -----------------------------------------------------------------------------
# Chat templates


def test_the_authors_template_is_the_default(tokenizer):
    messages = [SYSTEM, user(" q\n"), assistant("<yes> & 'é'")]
    wanted = "<|system|>\ns</s>\n<|user|>\n q\n</s>\n<|assistant|>\n<yes> & 'é'</s>\n"
    assert tokenizer.apply_chat_template(messages) == wanted
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)
    assert prompt == "<|system|>\ns</s>\n<|user|>\n q\n</s>\n<|assistant|>\n"


def test_messages_end_at_eos_once(tokenizer):
    """The template's newline behind EOS is never generated, so it is not trained on."""
    pair = encode_pair(tokenizer, row_of([Q], [YES], [NO]), 99, 99)
    assert tokens(pair) == [
        [1, *tokenizer.encode("<|user|>\nq</s>\n<|assistant|>\n")],
        [*tokenizer.encode("yes", continuation=True), 2],
        [*tokenizer.encode("no", continuation=True), 2],
    ]
    assert encode_pair(tokenizer, row_of([Q], [assistant("")], [NO]), 99, 99).startswith("empty")


def test_bos_and_eos_are_there_once_whether_or_not_a_template_writes_them(make_tokenizer):
    loop = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    pairs = []
    for template in (loop, "{{ bos_token }}" + loop):
        t = make_tokenizer(chat_template=template, legacy=True)
        pairs.append(tokens(encode_pair(t, row_of([Q], [YES], [NO]), 99, 99)))
        text = t.encode("[q]"), t.encode("[yes]", continuation=True)
        assert pairs[-1][:2] == [[1, *text[0]], [*text[1], 2]]
    assert pairs[0] == pairs[1]
    t = make_tokenizer(chat_template=loop + "{{ eos_token }}")
    with pytest.raises(ValueError, match=r"^rows\.jsonl:7: .*changes the prompt"):
        encode_pair(t, row_of([Q], [YES], [NO]), 99, 99)


MINE = "{% for m in messages %}mine {{ m.content }};{% endfor %}"
OTHER = "other"


@pytest.mark.parametrize(
    "files, config",
    [
        ({}, {"chat_template": MINE}),
        ({"chat_template.jinja": MINE}, {}),
        ({"chat_template.jinja": MINE}, {"chat_template": OTHER}),
        (
            {},
            {
                "chat_template": [
                    {"name": "tool_use", "template": OTHER},
                    {"name": "default", "template": MINE},
                ]
            },
        ),
    ],
    ids=["config", "file", "file-first", "named"],
)
def test_a_tokenizers_own_template_is_used(files, config, make_tokenizer):
    t = make_tokenizer(files, **config)
    assert t.apply_chat_template([user("a"), assistant("b")]) == "mine a;mine b;"


@pytest.mark.parametrize(
    "template, wanted",
    [
        ("{% if true %}\nx\n{% endif %}\ny", "x\ny"),  # trim_blocks
        ("  {% if true %}x{% endif %}", "x"),  # lstrip_blocks
        ("{{ bos_token }}{{ eos_token }}{{ unk_token }}", "<s></s><unk>"),
        ("{{ messages[0]['content'] }}{{ messages[0].role }}", "quser"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "2"),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("{% if tools %}tools{% endif %}{{ undefined_name }}", ""),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ ' x ' | trim }}{{ 'a,b'.split(',')[1] }}", "xb"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("<&'\">", "<&'\">"),
        ("x\n", "x"),  # jinja2's default, and so transformers'
    ],
)
def test_a_template_is_given_what_transformers_gives(template, wanted, make_tokenizer):
    assert make_tokenizer(chat_template=template).apply_chat_template([user("q")]) == wanted


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'][1] }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.mkdir(PATH) }}",
    "{{ lipsum.__globals__['os'].mkdir(PATH) }}",
    "{{ raise_exception.__globals__.os.mkdir(PATH) }}",
    "{{ strftime_now.__globals__['os'].mkdir(PATH) }}",
    "{{ (strftime_now | attr('__globals__'))['os'].mkdir(PATH) }}",
    "{{ self._TemplateReference__context.environment.from_string('x').render() }}",
    "{{ '{0.__class__.__mro__[1].x}'.format(messages) }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(content='x') }}",
    "{{ messages[0].pop('content') }}",
    "{% set messages[0].content = 'x' %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% for i in range(3) %}{{ raise_exception('no ' ~ i) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1 / 0 }}",
    "{{ messages.nothing.at_all }}",
    "{{ messages[0].content + 1 }}",
    "{% if %}",
    "{{ undefined_name() }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_or_broken_template_is_an_error_and_nothing_else(
    template, make_tokenizer, tmp_path
):
    path = tmp_path / "made-by-template"
    t = make_tokenizer(chat_template=template.replace("PATH", repr(str(path))))
    messages = [user("q")]
    with pytest.raises(ValueError, match="chat template") as error:
        t.apply_chat_template(messages)
    assert messages == [user("q")] and not path.exists()
    assert "\n" not in str(error.value)


def test_what_a_template_refuses_is_said_with_file_and_line(make_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    t = make_tokenizer(chat_template=template)
    with pytest.raises(ValueError, match=r"^rows\.jsonl:7: .*roles must alternate"):
        encode_pair(t, row_of([Q], [YES], [NO]), 99, 99)


# -----------------------------------------------------------------------------
# python data.py


def test_shown_tokens_are_the_text(tokenizer):
    pair = encode_pair(tokenizer, row_of("The teacher:", " a\nviolin", "10"), 99, 99)
    plain, coloured = (data.show(pair, tokenizer, colour=c) for c in (False, True))
    lines = plain.splitlines()
    for count, name, n in zip(lines[0::2], Pair._fields[:3], pair.lengths, strict=True):
        assert count.startswith(f"{name}: {n} tokens")
    texts = [line.strip().replace("·", "") for line in lines[1::2]]
    assert texts == ["<s> The teacher:", "a\\nviolin</s>", "10</s>"]
    assert "\x1b" not in plain
    paints = [line.strip()[:5] for line in coloured.splitlines()[1::2]]
    assert [p.split("m")[0] for p in paints] == ["\x1b[2", "\x1b[32", "\x1b[31"]  # context, +, -
    assert coloured.count("\x1b[0m") == 3


def run(*arguments):
    command = [sys.executable, "data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_data_py_shows_three_pairs_and_the_counts(tiny_tokenizer, tmp_path):
    rows = [row(f"Question {i}?", f" yes {i}", f" no {i}") for i in range(4)]
    file = write_rows(tmp_path / "rows.jsonl", *rows, row(), row(chosen="b"))
    done = run(file, "--model", tiny_tokenizer)
    assert done.returncode == 0 and done.stderr == ""
    for name in Pair._fields[:3]:
        assert done.stdout.count(f"\n{name}: ") + done.stdout.startswith(f"{name}: ") == 3
    assert "5 pairs of 6 rows" in done.stdout and "1 identical" in done.stdout
    assert "\x1b" not in done.stdout  # no colours into a file


@pytest.mark.parametrize(
    "content, options, words",
    [
        (b'{"prompt": "q"}\n', [], ["rows.jsonl:1: ", "chosen"]),
        (b'{"prompt": "q", "chosen": "a", "rejected": "a"}\n', [], ["no pairs left", "1 identic"]),
        (b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n', ["--max-length=2"], ["no room"]),
        (None, [], ["rows.jsonl"]),
        (b"{}", ["--model=/nowhere"], ["/nowhere", "tokenizer.model"]),
        (b"{}", ["--nonsense"], ["--nonsense"]),
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
    done = run(write_rows(tmp_path / "rows.jsonl", "{"), "--model", tiny_tokenizer)
    assert done.returncode == 2 and done.stdout == ""
    assert f"{tmp_path / 'rows.jsonl'}:1: " in done.stderr and "Traceback" not in done.stderr


def test_data_py_helps(capsys):
    with pytest.raises(SystemExit) as done:
        data.main(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert all(word in out for word in ("--model", "--max-length", "--max-prompt-length"))
