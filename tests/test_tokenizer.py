"""Every kind of tokenizer that is read, by ids worked out by hand, and what is refused; templates.

sentencepiece's is the model that conftest.py trains (0 <unk>, 1 <s>, 2 </s>, 400 pieces), and Llama
2's where it is present. Equality with the libraries, on thousands of strings, is tests/peers/'s.
"""

import json
import random
import shutil
import struct
import time

import pytest
import torch

from data import encode_prompt
from formats.bpe import BPE, CHARACTER_OF_BYTE, merge_symbols
from formats.tokenizer import QWEN2_WORDS, load_tokenizer
from formats.words import GPT2_WORDS, Split, Where, make_pre_tokenizer
from tests.conftest import train_sentencepiece
from tests.tokenizer_json import LEVEL, LLAMA3_WORDS, byte_level, llama2, metaspace


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(params=["tiny", "llama2"])
def either_tokenizer(request):
    if request.param == "tiny":
        return load_tokenizer(request.getfixturevalue("tiny_tokenizer"))
    return load_tokenizer(request.getfixturevalue("shared") / "llama2-tokenizer")


@pytest.fixture
def make_json(tmp_path):
    """Loads a folder with this tokenizer.json, and no tokenizer.model beside it."""

    def make(spec, **config):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    return make


# -----------------------------------------------------------------------------
# sentencepiece: tokenizer.model

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


@pytest.mark.parametrize("text, more", TEXTS)
def test_a_text_and_its_continuation_decode_to_both(text, more, either_tokenizer):
    t = either_tokenizer
    assert t.decode(t.encode(text) + t.encode(more, continuation=True)) == text + more


def test_encoding_is_the_librarys(either_tokenizer):
    t = either_tokenizer
    for text in [text for pair in TEXTS for text in pair]:
        assert t.encode(text) == t.sp.encode(text)
    assert t.encode("") == t.encode("", continuation=True) == []
    assert t.decode([]) == ""


WHOLE = {  # options of training -> words are not encoded alone, because it might change ids
    "as Llama's": ({}, False),
    "pieces over spaces": ({"split_by_whitespace": False}, True),
    "spaces behind words": ({"treat_whitespace_as_suffix": True}, True),
    "spaces collapse": ({"remove_extra_whitespaces": True}, True),
    "unknown characters are joined": ({"byte_fallback": False}, True),
    "probabilities": ({"model_type": "unigram"}, True),
}


@pytest.mark.parametrize("what", WHOLE)
def test_words_are_encoded_alone_only_where_the_library_s_ids_stay(what, tmp_path):
    """Random texts of what may matter: spaces in runs and in other forms, newlines, ▁ itself."""
    options, whole = WHOLE[what]
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    t, rng = load_tokenizer(tmp_path / "tokenizer.model"), random.Random(0)
    parts = [
        " ",
        "  ",
        "\n",
        "\t",
        "\u00a0",
        "▁",
        "the",
        " a",
        "violin",
        "é",
        "e\u0301",
        "日",
        "\r\n",
    ]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 9)))
        assert t.encode(text, continuation=True) == t.sp_continuation.encode(text) or (
            t.strips_spaces and text[0] == " "
        )
        assert t.encode(text) == t.sp.encode(text)
    assert t.splits != whole and bool(t.word_ids) != whole


def test_words_are_forgotten_before_they_fill_the_memory(tokenizer, monkeypatch):
    before = [tokenizer.encode(text) for text, _ in TEXTS]
    monkeypatch.setattr(type(tokenizer.word_ids), "most", 2)
    tokenizer.word_ids.clear()
    assert [tokenizer.encode(text) for text, _ in TEXTS] == before
    assert 0 < len(tokenizer.word_ids) <= 2


def test_a_continuation_has_no_dummy_space(either_tokenizer):
    t = either_tokenizer
    with_space, without = t.encode("violin"), t.encode("violin", continuation=True)
    assert with_space != without and t.encode(" violin", continuation=True) == with_space


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


@pytest.mark.parametrize("nobody", [-1, 400])
def test_an_id_that_a_padded_embedding_gives_has_no_text(nobody, tokenizer):
    assert tokenizer.decode([nobody, *tokenizer.encode("hello", continuation=True)]) == "hello"


def test_without_a_config_the_model_itself_has_bos_and_eos(sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    t = load_tokenizer(tmp_path)
    assert (t.bos_id, t.eos_id) == (1, 2)


def test_a_file_will_do_in_place_of_its_folder(sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    for path in (tmp_path / "tokenizer.model", str(tmp_path / "tokenizer.model"), str(tmp_path)):
        assert load_tokenizer(path).vocab_size == 400


# -----------------------------------------------------------------------------
# Byte-pair encoding: tokenizer.json


@pytest.mark.parametrize("form", [list, str], ids=["lists", "text"])
def test_bytes_by_hand(form, make_json):
    """h=104 e=101 " "=32: "he" 256, " t" 257, " the" 258; é is the bytes c3 a9."""
    merges = [["h", "e"], ["Ġ", "t"], ["Ġt", "he"]]
    t = make_json(byte_level(merges if form is list else [" ".join(m) for m in merges]))
    assert t.encode("he the") == [256, 258]
    assert t.encode(" the") == t.encode(" the", continuation=True) == [258]
    assert t.encode("é\n") == [0xC3, 0xA9, 10] and t.decode([0xC3, 0xA9, 10]) == "é\n"
    assert t.decode([0xA9, 256, 0xC3]) == "\ufffdhe\ufffd"
    assert t.encode("") == [] and t.decode([]) == "" and t.decode([999]) == ""
    assert t.vocab_size == 259


def test_characters_by_hand(make_json):
    """▁=259 t h e; "▁t" 263, "he" 264, "▁the" 265; what is unknown is bytes (3 + byte)."""
    t = make_json(llama2(), bos_token="<s>", eos_token="</s>")
    assert t.encode("the", bos=True, eos=True) == [1, 265, 2]
    assert t.encode("the", continuation=True) == [260, 264]
    assert t.encode("the  the") == [265, 259, 265] and t.decode([265, 259, 265]) == "the  the"
    assert t.encode("é", continuation=True) == [3 + 0xC3, 3 + 0xA9]
    assert t.decode([1, 3 + 0xC3, 3 + 0xA9]) == "<s>é" and t.decode([3 + 0xC3]) == "\ufffd"
    assert t.encode("the</s>the") == [265, 2, 265]  # Prepend is for each part
    assert t.encode("the</s>the", continuation=True) == [260, 264, 2, 265]
    assert t.encode("xy", continuation=True) == [3 + ord("x"), 3 + ord("y")]


@pytest.mark.parametrize(
    "legacy, behind",
    [({"legacy": True}, [265]), ({"legacy": False}, [260, 264]), ({}, [260, 264])],
    ids=str,
)
def test_a_llama_tokenizer_follows_legacy_and_not_its_file(legacy, behind, make_json):
    """As transformers, which builds a LlamaTokenizer anew: "the" behind </s>, 2."""
    t = make_json(llama2(), tokenizer_class="LlamaTokenizer", **legacy)
    assert t.encode("the</s>the") == [265, 2, *behind]
    assert t.encode("the</s>the", continuation=True) == [260, 264, 2, *behind]


@pytest.mark.parametrize("more", [{}, {"add_prefix_space": False}, {"add_prefix_space": True}])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("spec", [llama2(), metaspace(prepend_scheme="always", split=True)])
def test_a_llama_tokenizer_hands_on_the_steps_that_it_follows(
    spec, legacy, more, make_json, tmp_path
):
    """For transformers 4, which takes them from the file."""
    t = make_json(spec, tokenizer_class="LlamaTokenizer", legacy=legacy, **more)
    texts = ("the</s>the", " the", "a  the", "</s> the", "")
    wanted = [t.encode(text) for text in texts]
    t.save_class(tmp_path)
    assert [load_tokenizer(tmp_path).encode(text) for text in texts] == wanted
    (tmp_path / "tokenizer_config.json").unlink()
    assert [load_tokenizer(tmp_path).encode(text) for text in texts] == wanted


def test_what_a_llama_tokenizer_does_without_a_word_is_said(make_json, tmp_path):
    """Without `legacy` transformers 4 takes true, and transformers 5 false."""
    make_json(llama2(), tokenizer_class="LlamaTokenizerFast").save_class(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["legacy"] is False


@pytest.mark.parametrize(
    ("kind", "spec", "elsewhere"),
    [
        ("LlamaTokenizerFast", byte_level(), "PreTrainedTokenizerFast"),  # DeepSeek's
        ("CodeLlamaTokenizer", llama2(), "PreTrainedTokenizerFast"),
        ("TokenizersBackend", byte_level(), "PreTrainedTokenizerFast"),
        ("CodeGenTokenizer", byte_level(), "GPT2Tokenizer"),  # Phi-2's
        ("GPT2Tokenizer", byte_level(), None),
        ("LlamaTokenizer", llama2(), None),
    ],
)
def test_the_class_that_we_hand_on_is_read_alike_by_transformers_4_and_5(
    kind, spec, elsewhere, make_json, tmp_path
):
    """And gives a model of transformers 4 no token_type_ids, which it would refuse."""
    make_json(spec, tokenizer_class=kind).save_class(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == (elsewhere or kind)
    named = ["input_ids", "attention_mask"] if elsewhere == "PreTrainedTokenizerFast" else None
    assert config.get("model_input_names") == named


@pytest.mark.parametrize("prefix", [True, False])
def test_a_space_in_front_is_said_where_transformers_4_looks_for_it(prefix, make_json, tmp_path):
    spec = byte_level() | {"pre_tokenizer": LEVEL | {"add_prefix_space": prefix}}
    make_json(spec, tokenizer_class="PreTrainedTokenizerFast").save_class(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config.get("add_prefix_space", False) is prefix


def test_special_tokens_that_transformers_5_has_saved_have_the_name_that_4_reads(
    make_json, tmp_path
):
    make_json(byte_level(), extra_special_tokens=["<s>"]).save_class(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<s>"] and "extra_special_tokens" not in config
    make_json(byte_level(), extra_special_tokens={"image_token": "<i>"}).save_class(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["extra_special_tokens"] == {"image_token": "<i>"}


@pytest.mark.parametrize("scheme, behind", [("always", [265]), ("first", [260, 264])])
def test_metaspace_puts_the_dummy_space(scheme, behind, make_json):
    t = make_json(metaspace(prepend_scheme=scheme))
    assert t.encode("the") == [265] and t.encode(" the") == [265]  # no second ▁
    assert t.encode("the<s>the") == [265, 1, *behind]
    assert t.encode("the<s>the", continuation=True) == [260, 264, 1, *behind]


@pytest.mark.parametrize("merges", [("▁ t", "h e", "▁t he"), ("e ▁", "▁ t", "t h")])
def test_cutting_at_spaces_does_not_change_merges(merges, make_json, tmp_path):
    """Where merges reach over spaces ("e ▁") the text is not cut: t h e▁ t h e."""
    t = make_json(llama2(merges))
    text = "the the"
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}
    wanted = merge_symbols(list("▁the▁the"), ranks)
    assert t.encode(text) == [vocab[piece] for piece in wanted]
    assert ("e▁" in wanted) == ("e ▁" in merges)


def test_the_pair_of_lowest_rank_then_the_leftmost():
    ranks = {("a", "a"): 1, ("aa", "a"): 2, ("a", "b"): 0}
    assert merge_symbols(list("aaaab"), ranks) == ["aaa", "ab"]
    assert merge_symbols(list("aaaaa"), ranks) == ["aa", "aaa"]
    assert merge_symbols([], ranks) == [] and merge_symbols(["a"], ranks) == ["a"]


def test_a_page_without_a_space_is_not_slow():
    ranks = {("a" * 2**k, "a" * 2**k): k for k in range(5)}
    start = time.process_time()
    assert merge_symbols(["a"] * 100_000, ranks) == ["a" * 32] * 3125
    assert time.process_time() - start < 5


@pytest.mark.parametrize("published", [GPT2_WORDS, QWEN2_WORDS, LLAMA3_WORDS])
def test_words_join_to_the_text(published):
    text = "I'm here    x's 12345'S\n\n a.\n\n \x1c½٣ 日本\u2028\u017f'\u017f"
    assert "".join(Split(published)(text)) == text and Split(published)("") == []


def test_words_by_hand():
    text = "I'M  12345 x!\n\n  y"
    assert Split(GPT2_WORDS)(text) == ["I", "'", "M", " ", " 12345", " x", "!", "\n\n ", " y"]
    numbers = [["1", "2", "3", "4", "5"], ["123", "45"]]
    for published, digits in zip((QWEN2_WORDS, LLAMA3_WORDS), numbers, strict=True):
        words = ["I", "'M", " ", " ", *digits, " x", "!\n\n", " ", " y"]
        assert Split(published)(text) == words
        assert Split(published)("a'\u017f٣٤")[:2] == ["a", "'\u017f"]  # a long s is an S too


@pytest.mark.parametrize("letter", ["a", "é"], ids=["the pattern for ASCII", "the whole one"])
def test_a_separator_is_no_white_space(letter):
    r"""\x1c is white space to Python, and not to Unicode."""
    assert Split(GPT2_WORDS)(f"{letter}\x1c!") == [letter, "\x1c!"]


def test_a_word_of_the_vocabulary_may_be_spared_the_merges(make_json):
    spec = byte_level(["a b"])
    spec["model"]["vocab"]["abc"] = 300
    assert make_json(spec).encode("abc ab") == [256, ord("c"), 32, 256]
    spec["model"]["ignore_merges"] = True
    assert make_json(spec).encode("abc ab") == [300, 32, 256]


def test_nfc_composes_before_the_merges(make_json):
    t = make_json(byte_level(["Ã ©"], normalizer={"type": "NFC"}))
    assert t.encode("e\u0301") == t.encode("é") == [256]


def test_gpt2_from_vocab_and_merges(shared):
    t = load_tokenizer(shared / "gpt2-tokenizer")
    assert t.encode("Hello world") == [15496, 995]
    assert t.encode("<|endoftext|> hello<|endoftext|>") == [50256, 23748, 50256]
    assert (t.bos_id, t.eos_id, t.vocab_size) == (50256, 50256, 50257)
    by_file = load_tokenizer(shared / "gpt2-tokenizer" / "vocab.json")
    assert by_file.encode("Hello world") == [15496, 995]


def test_vocab_and_merges_need_no_more_than_a_line_of_version(tmp_path):
    vocab = byte_level(["a a"])["model"]["vocab"] | {"<|endoftext|>": 257}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na a\n")
    t = load_tokenizer(tmp_path)
    assert t.encode("aa<|endoftext|>a") == [256, 257, 97]
    assert t.eos_id is None  # nobody says so


def test_config_json_has_the_special_ids_where_the_tokenizers_files_say_nothing(
    make_json, tmp_path
):
    """As GPT-2's is published."""
    (tmp_path / "config.json").write_text('{"bos_token_id": 256, "eos_token_id": 256}')
    t = make_json(byte_level(added=[{"content": "<|endoftext|>"}]))
    assert (t.bos_id, t.eos_id) == (256, 256)


# -----------------------------------------------------------------------------
# Booleans. Each is true, false, null or not there: published files have all four.

ABSENT = object()
STEPS = {  # step.option: (the step's other keys, a text, its words where true and false, if absent)
    "Digits.individual_digits": ({}, "a12", ["a", "1", "2"], ["a", "12"], False),
    "ByteLevel.use_regex": ({"add_prefix_space": False}, "a b", ["a", " b"], ["a b"], True),
    "ByteLevel.add_prefix_space": ({"use_regex": False}, "a b", [" a b"], ["a b"], True),
    "Metaspace.split": (
        {"replacement": "_", "prepend_scheme": "never"}, "a b", ["a", "_b"], ["a_b"], True,
    ),
    "Metaspace.add_prefix_space": (
        {"replacement": "_", "split": False}, "a b", ["_a_b"], ["a_b"], True,
    ),
    "Split.invert": (
        {"pattern": {"Regex": "[0-9]"}, "behavior": "Removed"}, "a1b", ["1"], ["a", "b"], False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", [True, False, ABSENT], ids=["true", "false", "absent"])
@pytest.mark.parametrize("what", STEPS)
def test_a_boolean_of_a_step(what, value):
    more, text, if_true, if_false, default = STEPS[what]
    kind, _, option = what.partition(".")
    step = {"type": kind} | more | ({} if value is ABSENT else {option: value})
    value = default if value is ABSENT else value
    assert make_pre_tokenizer([step])(text, Where.START) == (if_true if value else if_false)


MODELS = {  # option of a model: (its other options, a text, its ids where true, where false)
    "byte_fallback": ({}, "é", [3 + 0xC3, 3 + 0xA9], [0]),
    "fuse_unk": ({"byte_fallback": False}, "éé", [0], [0, 0]),
    "ignore_merges": ({"merges": []}, "he", [264], [261, 262]),
}


@pytest.mark.parametrize(
    "value", [True, False, None, ABSENT], ids=["true", "false", "null", "absent"]
)
@pytest.mark.parametrize("what", MODELS)
def test_a_boolean_of_a_model(what, value):
    """llama2()'s pieces: <unk> 0, bytes from 3 on, ▁=259 t h e, ▁t, he=264."""
    more, text, if_true, if_false = MODELS[what]
    model = llama2()["model"]
    del model["byte_fallback"], model["fuse_unk"]
    model |= more | ({} if value is ABSENT else {what: value})
    ids = BPE(model, over_bytes=False, joins_bytes=True).merge_word(text)
    assert list(ids) == (if_true if value is True else if_false)


def test_flags_of_an_added_token_that_are_false_change_nothing(make_json):
    token = {"content": "<r>"}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    for text in ("a <r> b", "a<r>b"):
        wanted = make_json(byte_level(added=[token])).encode(text)
        for more in (flags, dict.fromkeys(flags), flags | {"special": False}):
            assert make_json(byte_level(added=[token | more])).encode(text) == wanted


@pytest.mark.parametrize("value", [True, False, None])
def test_only_add_prefix_space_false_takes_sentencepieces_dummy_space_away(value, make_tokenizer):
    with_space = make_tokenizer().encode("violin")
    without = make_tokenizer().encode("violin", continuation=True)
    assert with_space != without
    wanted = without if value is False else with_space
    assert make_tokenizer(add_prefix_space=value).encode("violin") == wanted


# -----------------------------------------------------------------------------
# Special tokens


def test_special_token_text_becomes_the_id(tokenizer):
    t = tokenizer
    hello = t.encode("hello", continuation=True)
    assert (t.bos_id, t.eos_id, t.vocab_size) == (1, 2, 400)
    assert t.encode("hello</s>hello") == [*t.encode("hello"), 2, *hello]
    assert t.encode("<s></s><unk>") == [1, 2, 0]


def test_bos_and_eos_are_added_where_asked_for(tokenizer):
    assert tokenizer.encode("hello", bos=True, eos=True) == [1, *tokenizer.encode("hello"), 2]
    assert tokenizer.encode("", bos=True, eos=True) == [1, 2]


def test_decoding_shows_special_tokens(tokenizer):
    hello = tokenizer.encode("hello", continuation=True)
    assert tokenizer.decode([1, *hello, 2, *hello, 2]) == "<s>hello</s>hello</s>"
    assert tokenizer.decode(torch.tensor([2])) == "</s>"


def test_added_tokens_are_found_leftmost_then_longest(make_tokenizer):
    added = {"400": {"content": "<a>"}, "401": {"content": "<a><b>"}, "402": {"content": "b><a>x"}}
    t = make_tokenizer({"added_tokens.json": {"(*)": 405}}, added_tokens_decoder=added)
    assert t.vocab_size == 406  # 1 + the largest id: 403 and 404 are nobody's
    assert t.encode("<a>") == [400]
    assert t.encode("<a><b>") == [401]  # longest
    assert t.encode("<a><b><a>x") == [401, 400, *t.encode("x", continuation=True)]  # leftmost
    assert t.encode("(*)(*)") == [405, 405]  # is no pattern
    assert t.decode([401, 400, 405]) == "<a><b><a>(*)"
    assert t.decode([401, 403]) == "<a><b>"


def test_added_tokens_among_bytes(make_json):
    tokens = [{"content": "<a>"}, {"content": "<a><b>"}, {"content": "<n>", "normalized": True}]
    t = make_json(byte_level(added=tokens))
    assert t.encode("<a><b><a>") == [257, 256]  # longest
    assert t.encode("x <n> x") == [120, 32, 258, 32, 120]
    assert t.decode([120, 257, 32, 258]) == "x<a><b> <n>"
    assert t.vocab_size == 259


def test_a_normalized_token_is_looked_for_in_the_normalized_text(make_json):
    """Prepend has it looked for as ▁<n>; of a LlamaTokenizer transformers drops that normalizer."""
    spec = llama2()
    spec["added_tokens"].append({"id": 300, "content": "<n>", "normalized": True})
    assert make_json(spec).encode("the <n>") == [265, 300]
    assert make_json(spec).encode("the<n>", continuation=True)[-1] != 300
    assert make_json(spec, tokenizer_class="LlamaTokenizer").encode("the<n>") == [265, 300]


def test_added_tokens_take_the_white_space_beside_them_along(make_json):
    """As Phi-3's: rstrip on the right, lstrip on the left, single_word only a whole word."""
    tokens = [
        {"content": "<r>", "rstrip": True},
        {"content": "<l>", "lstrip": True},
        {"content": "cat", "single_word": True},
    ]
    t = make_json(byte_level(added=tokens))
    assert t.encode("a <r> \n b") == [97, 32, 256, 98]
    assert t.encode("a <l> b") == [97, 257, 32, 98]
    assert t.encode("a <r>  <l>") == [97, 32, 256, 257]
    assert t.encode("a cat.") == [97, 32, 258, 46] and 258 not in t.encode("cats")


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
    assert t.apply_chat_template([{"role": "user", "content": "q"}]) == "<|user|>\nq<end>\n"


def test_bos_within_a_prompt_does_not_stand_for_the_one_in_front(make_tokenizer):
    """As in a dialogue that was joined from several texts."""
    files = {"tokenizer_config.json": {"bos_token": "<begin>"}}
    t = make_tokenizer(files | {"added_tokens.json": {"<begin>": 400}})
    for text in ("he<begin>he", "<begin>he<begin>he"):
        ids = encode_prompt(t, text)
        assert ids[0] == 400 and ids.count(400) == 2


def test_a_null_bos_is_none(make_tokenizer):
    t = make_tokenizer(bos_token=None, eos_token="</s>")
    assert t.bos_id is None and t.encode("hello", bos=True) == t.encode("hello")
    assert encode_prompt(t, "hello") == t.encode("hello")


def test_where_nothing_is_said_there_is_neither_bos_nor_eos(make_json):
    t = make_json(byte_level(["h e"]))
    assert (t.bos_id, t.eos_id) == (None, None)
    assert t.encode("he", bos=True, eos=True) == encode_prompt(t, "he") == [256]


# -----------------------------------------------------------------------------
# What is refused


def split(**more) -> dict:
    step = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated"} | more
    return byte_level(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [step, LEVEL | {"use_regex": False}]}
    )


NOT_OURS = {  # words of the complaint: a file
    "Unigram": {"model": {"type": "Unigram", "vocab": []}},
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {}}},
    "end_of_word_suffix": byte_level(model={"end_of_word_suffix": "</w>"}),
    "a normalizer of type Lowercase": byte_level(normalizer={"type": "Lowercase"}),
    "a pre-tokenizer of type Whitespace": byte_level(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, LEVEL]}
    ),
    "a decoder of another kind": byte_level(pre_tokenizer={"type": "Whitespace"}),
    "a decoder of WordPiece": llama2() | {"decoder": {"type": "WordPiece"}},
    "a decoder of no steps": llama2() | {"decoder": None},
    "a step after ByteLevel": byte_level(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [LEVEL, {"type": "Digits"}]}
    ),
    "Split with the behavior 'Torn'": split(behavior="Torn"),
    "a set within a set": split(pattern={"Regex": "[a[bc]]"}),
    r"\p{Han}, which is not a general category": split(pattern={"Regex": r"\p{Han}+"}),
    "cannot be read": split(pattern={"Regex": "(a"}),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_another_kind_is_refused_by_name(what, make_json, tmp_path):
    with pytest.raises(ValueError) as error:
        make_json(NOT_OURS[what])
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'tokenizer.json'}: ") and "\n" not in text
    assert what in text and text.endswith(" is not supported") and len(text) < 300


@pytest.mark.parametrize("config", [{"add_prefix_space": x} for x in (True, False, None)] + [{}])
def test_add_prefix_space_of_the_config_counts_more_than_the_file(config, make_json):
    """A null is as good as nothing."""
    asked = config.get("add_prefix_space")
    for said in (True, False):
        spec = byte_level(pre_tokenizer=LEVEL | {"add_prefix_space": said})
        t = make_json(spec, **config)
        prefix = [32] * (said if asked is None else asked)
        assert t.encode("a") == [*prefix, 97] and t.encode("a", continuation=True) == [97]
    for spec in (llama2(), metaspace()):
        t = make_json(spec, **config)
        assert t.encode("the") == ([260, 264] if asked is False else [265])


def test_add_prefix_space_that_a_sequence_contradicts_is_refused(make_json):
    """transformers would ignore it there."""
    with pytest.raises(ValueError, match="add_prefix_space True of tokenizer_config"):
        make_json(split(pattern={"Regex": "a"}), add_prefix_space=True)


def test_another_class_of_vocab_and_merges_is_refused_by_name(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(byte_level()["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ValueError, match="CLIPTokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_model_stands_in_for_an_unsupported_tokenizer_json_alone(make_tokenizer):
    assert make_tokenizer({"tokenizer.json": NOT_OURS["Unigram"]}).vocab_size == 400
    assert make_tokenizer({"tokenizer.json": byte_level()}).vocab_size == 256
    with pytest.raises(ValueError, match=r"tokenizer\.json: not JSON"):  # broken is not other
        make_tokenizer({"tokenizer.json": "{"})


# -----------------------------------------------------------------------------
# Broken files


def test_a_folder_without_a_tokenizer_is_told_what_is_read(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer(tmp_path)
    words = "needs tokenizer.json, vocab.json with merges.txt, or sentencepiece's tokenizer.model"
    assert str(error.value) == f"{tmp_path}: {words}: none is there"


def test_vocab_without_merges_asks_for_them(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(byte_level()["model"]["vocab"]))
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt go together"):
        load_tokenizer(tmp_path)


CONFIG = "tokenizer_config.json"
BROKEN = {  # what: (files beside a sound tokenizer.model, words of the complaint)
    "half a model": ({"tokenizer.model": ...}, "tokenizer.model: not a sentencepiece model, or"),
    "noise": ({"tokenizer.model": b"\xff" * 99}, "tokenizer.model: not a sentencepiece model"),
    "an empty model": ({"tokenizer.model": b""}, "tokenizer.model: not a sentencepiece model"),
    "config no JSON": ({CONFIG: "{"}, "tokenizer_config.json: not JSON"),
    "config no UTF-8": ({CONFIG: b"\xff\xfe{}"}, "tokenizer_config.json: not JSON: 'utf-8'"),
    "config a list": ({CONFIG: "[]"}, "tokenizer_config.json: a JSON object is expected, not list"),
    "map a number": ({"special_tokens_map.json": "3"}, "special_tokens_map.json: a JSON object is"),
    "deeply nested": ({"added_tokens.json": "[" * 100_000}, "not JSON"),
    "an id of letters": ({"added_tokens.json": {"<a>": "four"}}, "'four'"),
    "a negative id": ({"added_tokens.json": {"<a>": -1}}, "token '<a>' has the id -1"),
    "an infinite id": ({"added_tokens.json": '{"<a>": Infinity}'}, "infinity"),
    "a list of added": ({CONFIG: {"added_tokens_decoder": ["<a>"]}}, ""),
    "added under x": ({CONFIG: {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "'x'"),
    "added without text": ({CONFIG: {"added_tokens_decoder": {"400": {}}}}, "'content'"),
    "eos a list": ({CONFIG: {"eos_token": ["</s>"]}}, ""),
    "template a list": ({CONFIG: {"chat_template": ["default"]}}, ""),
    "template no UTF-8": ({"chat_template.jinja": b"\xff\xfe"}, "'utf-8'"),
    "json a list": ({"tokenizer.json": []}, "tokenizer.json: a JSON object is expected, not list"),
    "no model": ({"tokenizer.json": {}}, "'model'"),
    "a model that is text": ({"tokenizer.json": {"model": "BPE"}}, ""),
    "no merges": ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0}}}}, "'merges'"),
    "a merge of three": ({"tokenizer.json": byte_level(model={"merges": ["a b c"]})}, "expected 2"),
    "a merge without a token": (
        {"tokenizer.json": byte_level(model={"merges": ["q q"]})}, "merging 'q' and 'q' gives no",
    ),
    "an id that is text": (
        {"tokenizer.json": byte_level(added=[{"content": "<a>", "id": "x"}])}, "'x'",
    ),
    "an added token without text": (
        {"tokenizer.json": byte_level(added=[{"special": True}])}, "'content'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_tokenizer_file_is_an_error_with_the_path(
    what, make_tokenizer, sentencepiece_model, tmp_path
):
    files, words = BROKEN[what]
    files = {name: sentencepiece_model[:4001] if x is ... else x for name, x in files.items()}
    with pytest.raises(ValueError) as error:
        make_tokenizer(files)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'made'}: broken tokenizer: ") and words in message
    assert "\n" not in message and len(message) < 800


# -----------------------------------------------------------------------------
# Chat templates


def test_the_authors_template_is_the_default(tokenizer):
    roles = ("system", "s"), ("user", " q\n"), ("assistant", "<yes> & 'é'")
    messages = [{"role": role, "content": content} for role, content in roles]
    wanted = "<|system|>\ns</s>\n<|user|>\n q\n</s>\n<|assistant|>\n<yes> & 'é'</s>\n"
    assert tokenizer.apply_chat_template(messages) == wanted
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)
    assert prompt == "<|system|>\ns</s>\n<|user|>\n q\n</s>\n<|assistant|>\n"


MINE = "{% for m in messages %}mine {{ m.content }};{% endfor %}"
OTHER = "other"
BY_NAME = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": MINE}]


@pytest.mark.parametrize(
    "files, config",
    [
        ({}, {"chat_template": MINE}),
        ({"chat_template.jinja": MINE}, {}),
        ({"chat_template.jinja": MINE}, {"chat_template": OTHER}),
        ({}, {"chat_template": BY_NAME}),
    ],
    ids=["config", "file", "file-first", "named"],
)
def test_a_tokenizers_own_template_is_used(files, config, make_tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert make_tokenizer(files, **config).apply_chat_template(messages) == "mine a;mine b;"


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
    t = make_tokenizer(chat_template=template)
    assert t.apply_chat_template([{"role": "user", "content": "q"}]) == wanted


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
    messages = [{"role": "user", "content": "q"}]
    with pytest.raises(ValueError, match="chat template") as error:
        t.apply_chat_template(messages)
    assert messages == [{"role": "user", "content": "q"}] and not path.exists()
    assert "\n" not in str(error.value)


def test_a_template_of_one_s_own_is_read_with_the_tokenizer(tiny_tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text(MINE, encoding="utf-8")
    t = load_tokenizer(tiny_tokenizer, tmp_path / "own.jinja")
    assert t.apply_chat_template([{"role": "user", "content": "a"}]) == "mine a;"
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"own\.jinja: 'utf-8'"):
        load_tokenizer(tiny_tokenizer, tmp_path / "own.jinja")


BOS_ONCE = "{{ bos_token }}" + MINE


def contents(folder) -> dict:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "config, wanted",
    [
        ({}, "<s><|user|>\na</s>\n"),  # the authors'
        ({"chat_template": MINE}, "<s>mine a;"),
        ({"chat_template": BOS_ONCE}, "<s>mine a;"),
        ({"chat_template": BY_NAME}, "<s>mine a;"),
        ({"chat_template": "  {% if true %}\n  x{% endif %}\n"}, "<s>  x"),  # begins a line
        ({"chat_template": MINE, "bos_token": None}, "mine a;"),
        (
            {"chat_template": "{{ raise_exception(0) if messages | length < 2 }}{{ bos_token }}"},
            None,
        ),
    ],
    ids=["authors", "own", "with BOS", "named", "line", "no BOS", "refuses one message"],
)
def test_the_template_that_is_saved_begins_with_bos(config, wanted, make_tokenizer, tmp_path):
    """Files whose template does so already stay as they are."""
    t, folder = make_tokenizer(**config), tmp_path / "made"
    before = contents(folder)
    t.save_chat_template(folder)
    saved = load_tokenizer(folder)
    if wanted is not None:
        assert saved.apply_chat_template([{"role": "user", "content": "a"}]) == wanted
    after = contents(folder)
    same = wanted is None or wanted == "mine a;" or config.get("chat_template") == BOS_ONCE
    assert (after == before) == same
    saved.save_chat_template(folder)  # once more changes nothing
    assert contents(folder) == after
    if not same and "chat_template" in config:  # for readers that know no chat_template.jinja
        (folder / "chat_template.jinja").unlink()
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
        assert load_tokenizer(folder).chat_template == saved.chat_template


# -----------------------------------------------------------------------------
# A vocabulary of 150,000 loads in two seconds. Other processes' time does not count.


def test_a_large_tokenizer_model_loads_in_two_seconds(sentencepiece_model, tmp_path):
    """Pieces are appended by hand: field 1 of the model, of text (1) and score (2, a float)."""
    pieces = []
    for i in range(150_000):
        piece = f"piece{i}".encode()
        body = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", -1000.0 - i)
        pieces.append(b"\x0a" + bytes([len(body)]) + body)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model + b"".join(pieces))
    start = time.process_time()
    t = load_tokenizer(tmp_path)
    assert time.process_time() - start < 2
    assert t.vocab_size == 150_400 and t.decode([150_399]) == "piece149999"


def test_a_large_tokenizer_json_loads_in_two_seconds(tmp_path):
    letters = [c for c in CHARACTER_OF_BYTE.values() if c.isascii() and c.isalpha()]
    merges = [[a + b, c + d] for a in letters for b in letters for c in letters for d in "abcdefgh"]
    merges = [[a, b] for a in letters for b in letters] + merges[:150_000]
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level(merges)))
    start = time.process_time()
    t = load_tokenizer(tmp_path)
    t.encode("é")  # builds the character classes
    assert time.process_time() - start < 2
    assert t.vocab_size == 256 + len(merges) > 150_000


@pytest.mark.parametrize(
    ("more", "bos"),
    [({}, 400), ({"added_tokens_decoder": {"401": {"content": "<config>"}}}, 401)],
    ids=["older", "newer"],
)
def test_of_two_files_with_special_tokens_the_one_wins_that_wins_in_transformers(
    more, bos, make_tokenizer
):
    """tokenizer_config.json only where it lists the added tokens, too."""
    files = {"special_tokens_map.json": {"bos_token": "<map>", "eos_token": "<map>"}}
    files |= {"tokenizer_config.json": {"bos_token": "<config>"} | more}
    t = make_tokenizer(files | {"added_tokens.json": {"<map>": 400, "<config>": 401}})
    assert (t.bos_id, t.eos_id) == (bos, 400)


def test_a_class_that_we_name_keeps_the_bos_and_eos_that_were_trained(tmp_path):
    """GPT2Tokenizer with digits of their own is handed back as a class without BOS of its own."""
    steps = [{"type": "Digits", "individual_digits": True}, LEVEL | {"use_regex": True}]
    spec = byte_level(added=[{"content": "<b>"}, {"content": "<e>"}])
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "config.json").write_text('{"bos_token_id": 256, "eos_token_id": 257}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    first = load_tokenizer(tmp_path)
    first.save_class(tmp_path)
    again = load_tokenizer(tmp_path)
    assert "PreTrainedTokenizerFast" in (tmp_path / "tokenizer_config.json").read_text()
    assert (first.bos_id, first.eos_id) == (again.bos_id, again.eos_id) == (256, 257)


@pytest.mark.parametrize(
    ("kind", "bos"),
    [("PreTrainedTokenizerFast", None), ("TokenizersBackend", None), ("LlamaTokenizer", 1)],
)
def test_a_default_of_config_json_makes_no_token_bos_of_a_class_that_has_none(kind, bos, tmp_path):
    """LlamaConfig's bos_token_id is 1, which is any token of a vocabulary that was made anew."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama2()))
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, 2)


def test_a_response_begins_anew_after_an_added_token(make_json):
    """Phi-3's <|assistant|> takes the newline after it, and its normalizer begins words with ▁."""
    spec = llama2()
    spec["added_tokens"].append({"id": 300, "content": "<|assistant|>", "rstrip": True})
    tokenizer = make_json(spec, model_type="phi3")
    prompt, whole = "the<|assistant|>\n", "the<|assistant|>\nthe"
    ids = tokenizer.encode(prompt)
    assert ids[-1] == 300
    assert ids + tokenizer.encode("the", continuation=True, after=ids) == tokenizer.encode(whole)
    before = tokenizer.encode("the")  # which continues "the", and nothing is put between the two
    after = tokenizer.encode("the", continuation=True, after=before)
    assert after == tokenizer.encode("the", continuation=True) != before


@pytest.mark.parametrize(
    ("template", "around", "ends"),
    [
        # Phi-3's; ChatML with EOS of another name; Qwen3's; one with no end of its own
        ("{{ c }}<|end|>\n{% if loop.last and not add_generation_prompt %}</s>{% endif %}",
         ("", "<|end|>"), [2, 300]),
        ("{{ c }}<|end|>\n", ("", "<|end|>"), [2, 300]),
        ("{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ c }}</s>",
         ("<think>\n\n</think>", ""), [2]),
        ("{{ c }}</turn>\n</s>", ("", "</turn>"), [2]),
        ("{{ c }}e", ("", "e"), [2]),  # any token of the vocabulary, which answers may have inside
        ("answer<|end|>", ("", ""), [2]),
        ("{{ c }}", ("", ""), [2]),
        ("{{ raise_exception('no') }}", ("", ""), [2]),
    ],
)  # fmt: skip
def test_what_a_template_puts_around_an_answer_is_no_part_of_it(template, around, ends, make_json):
    spec = llama2()
    spec["added_tokens"].append({"id": 300, "content": "<|end|>", "rstrip": True})
    loop = "{% for m in messages %}{% set c = m.content %}" + template + "{% endfor %}"
    tokenizer = make_json(spec, eos_token="</s>", chat_template=loop)
    assert tokenizer.around_answer() == around
    assert tokenizer.end_ids() == ends


def test_merges_of_the_number_sign_are_no_comments(tmp_path):
    vocab = byte_level(["# #"])["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n# #\n")
    assert load_tokenizer(tmp_path).encode("##") == [vocab["##"]]


@pytest.mark.parametrize(
    ("part", "steps", "words"),
    [
        ("pre_tokenizer", {"type": "Metaspace", "replacement": 0}, "Metaspace whose replacement"),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "last"},
         "Metaspace whose prepend_scheme is 'last'"),
        ("normalizer", {"type": "Prepend", "prepend": 1}, "Prepend whose prepend is 1"),
        ("normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": None},
         "Replace whose content is None"),
        ("normalizer", {"type": "Replace", "pattern": {"String": 2}, "content": "a"},
         "Replace whose String is 2"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "b"}, "content": []},
         r"Replace whose content is \[\]"),
    ],
)  # fmt: skip
def test_a_step_whose_value_is_no_text_is_refused_as_the_file_is_read(
    part, steps, words, make_json
):
    """Not by a TypeError at the first text."""
    with pytest.raises(ValueError, match=words):
        make_json(metaspace() | {part: steps})
