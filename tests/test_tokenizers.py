"""tokenizer.json and vocab.json with merges.txt: ids worked out by hand, and what is refused.

Equality with the tokenizers library, on thousands of strings, is tests/peers/'s.
"""

import json
import time

import pytest

from data import encode_prompt, load_tokenizer
from tokenizer import (
    CHARACTER_OF_BYTE,
    GPT2_WORDS,
    LLAMA3_WORDS,
    QWEN2_WORDS,
    merge_symbols,
    split_words,
)

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
UNMARK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
LLAMA2 = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, MARK],
    },
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            UNMARK,
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}


def byte_level(merges=(), added=(), **more) -> dict:
    """A tokenizer.json: 256 bytes, then a token a merge, then the added ones."""
    vocab = {c: byte for byte, c in CHARACTER_OF_BYTE.items()}
    for merge in merges:
        vocab["".join(merge.split() if isinstance(merge, str) else merge)] = len(vocab)
    added = [{"id": len(vocab) + i} | token for i, token in enumerate(added)]
    model = {"type": "BPE", "vocab": vocab, "merges": list(merges)} | more.pop("model", {})
    return {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": LEVEL,
        "decoder": {"type": "ByteLevel"},
        "model": model,
    } | more


def llama2(merges=("▁ t", "h e", "▁t he"), **model) -> dict:
    """A tokenizer.json: <unk>, <s>, </s>, 256 bytes, ▁ t h e, then a token a merge."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁the"]
    vocab = {piece: i for i, piece in enumerate(pieces + [m.replace(" ", "") for m in merges])}
    model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} | model
    model |= {"type": "BPE", "vocab": vocab, "merges": list(merges)}
    added = [{"id": i, "content": text} for i, text in enumerate(pieces[:3])]
    return LLAMA2 | {"added_tokens": added, "model": model}


@pytest.fixture
def make(tmp_path):
    def make(spec, **config):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    return make


@pytest.mark.parametrize("form", [list, str], ids=["lists", "text"])
def test_bytes_by_hand(form, make):
    """h=104 e=101 " "=32: "he" 256, " t" 257, " the" 258; é is the bytes c3 a9."""
    merges = [["h", "e"], ["Ġ", "t"], ["Ġt", "he"]]
    t = make(byte_level(merges if form is list else [" ".join(m) for m in merges]))
    assert t.encode("he the") == [256, 258]
    assert t.encode(" the") == t.encode(" the", continuation=True) == [258]
    assert t.encode("é\n") == [0xC3, 0xA9, 10] and t.decode([0xC3, 0xA9, 10]) == "é\n"
    assert t.decode([0xA9, 256, 0xC3]) == "\ufffdhe\ufffd"
    assert t.encode("") == [] and t.decode([]) == "" and t.decode([999]) == ""
    assert (t.vocab_size, t.bos_id, t.eos_id) == (259, None, None)
    assert t.encode("he", bos=True, eos=True) == [256] and encode_prompt(t, "he") == [256]


def test_characters_by_hand(make):
    """▁=259 t h e; "▁t" 263, "he" 264, "▁the" 265; what is unknown is bytes (3 + byte)."""
    t = make(llama2(), bos_token="<s>", eos_token="</s>")
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
def test_a_llama_tokenizer_follows_legacy_and_not_its_file(legacy, behind, make):
    """As transformers, which builds a LlamaTokenizer anew: "the" behind </s>, 2."""
    t = make(llama2(), tokenizer_class="LlamaTokenizer", **legacy)
    assert t.encode("the</s>the") == [265, 2, *behind]
    assert t.encode("the</s>the", continuation=True) == [260, 264, 2, *behind]


@pytest.mark.parametrize(
    "scheme, start, behind",
    [("always", [265], [265]), ("first", [265], [260, 264])],
)
def test_metaspace_puts_the_dummy_space(scheme, start, behind, make):
    cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    t = make(llama2() | {"normalizer": None, "pre_tokenizer": cut})
    assert t.encode("the") == start and t.encode(" the") == [265]  # no second ▁
    assert t.encode("the<s>the") == [*start, 1, *behind]
    assert t.encode("the<s>the", continuation=True) == [260, 264, 1, *behind]


@pytest.mark.parametrize("merges", [("▁ t", "h e", "▁t he"), ("e ▁", "▁ t", "t h")])
def test_cutting_at_spaces_does_not_change_merges(merges, make, tmp_path):
    """Where merges reach over spaces ("e ▁") the text is not cut: t h e▁ t h e."""
    t = make(llama2(merges))
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
    assert "".join(split_words(text, published)) == text and split_words("", published) == []


def test_words_by_hand():
    text = "I'M  12345 x!\n\n  y"
    assert split_words(text, GPT2_WORDS) == ["I", "'", "M", " ", " 12345", " x", "!", "\n\n ", " y"]
    numbers = [["1", "2", "3", "4", "5"], ["123", "45"]]
    for published, digits in zip((QWEN2_WORDS, LLAMA3_WORDS), numbers, strict=True):
        words = ["I", "'M", " ", " ", *digits, " x", "!\n\n", " ", " y"]
        assert split_words(text, published) == words
        assert split_words("a'\u017f٣٤", published)[:2] == ["a", "'\u017f"]  # a long s is an S too
    # \x1c is no white space in Unicode; by the pattern for ASCII, and by the whole one
    assert split_words("a\x1c!", GPT2_WORDS) == ["a", "\x1c!"]
    assert split_words("é\x1c!", GPT2_WORDS) == ["é", "\x1c!"]


def test_added_tokens(make):
    tokens = [{"content": "<a>"}, {"content": "<a><b>"}, {"content": "<n>", "normalized": True}]
    t = make(byte_level(added=tokens), eos_token={"content": "<a>"}, bos_token=None)
    assert t.encode("<a><b><a>") == [257, 256]  # longest
    assert t.encode("x <n> x") == [120, 32, 258, 32, 120]
    assert t.decode([120, 257, 32, 258]) == "x<a><b> <n>"
    assert (t.bos_id, t.eos_id, t.vocab_size) == (None, 256, 259)


def test_a_normalized_token_is_refused_where_normalising_changes_it(make):
    """Prepend has it looked for as ▁<n>; of a LlamaTokenizer transformers drops that normaliser."""
    spec = llama2()
    spec["added_tokens"].append({"id": 300, "content": "<n>", "normalized": True})
    with pytest.raises(ValueError, match=r"its added token is .*<n>"):
        make(spec)
    assert make(spec, tokenizer_class="LlamaTokenizer").encode("the<n>") == [265, 300]


def test_ignore_merges_and_nfc(make):
    spec = byte_level(["a b", "Ã ©"], normalizer={"type": "NFC"})
    spec["model"]["vocab"]["abc"] = 300
    spec["model"]["ignore_merges"] = True
    t = make(spec)
    assert t.encode("abc ab") == [300, 32, 256]
    assert t.encode("e\u0301") == t.encode("é") == [257] and t.vocab_size == 301


def test_gpt2(shared, tmp_path):
    folder = shared / "gpt2-tokenizer"
    t = load_tokenizer(folder)
    assert t.encode("Hello world") == [15496, 995]
    assert t.encode("<|endoftext|> hello<|endoftext|>") == [50256, 23748, 50256]
    assert (t.bos_id, t.eos_id, t.vocab_size) == (50256, 50256, 50257)
    assert load_tokenizer(folder / "vocab.json").encode("Hello world") == [15496, 995]
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert load_tokenizer(tmp_path).eos_id is None  # nobody says so
    spec = byte_level(added=[{"content": "<|endoftext|>"}])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))  # as GPT-2's is published
    (tmp_path / "config.json").write_text('{"bos_token_id": 256, "eos_token_id": 256}')
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_id) == (256, 256)


SPLIT = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
CUT = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
METASPACE = llama2() | {"normalizer": None, "pre_tokenizer": CUT}
NOT_OURS = {
    "Unigram": {"model": {"type": "Unigram", "vocab": []}},
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {}}},
    "end_of_word_suffix": byte_level(model={"end_of_word_suffix": "</w>"}),
    "Lowercase": byte_level(normalizer={"type": "Lowercase"}),
    "Digits": byte_level(pre_tokenizer={"type": "Digits"}),
    "Regex": byte_level(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [SPLIT, LEVEL | {"use_regex": False}],
        }
    ),
    "WordPiece decoder": byte_level(decoder={"type": "WordPiece"}),
    "[]": byte_level(decoder=None),
    "Metaspace decoder": METASPACE | {"decoder": {"type": "Metaspace", "replacement": "▁"}},
    "never": METASPACE | {"pre_tokenizer": CUT | {"prepend_scheme": "never"}},
    "split": METASPACE | {"pre_tokenizer": CUT | {"split": True}},
    "Replace": llama2() | {"normalizer": MARK},
    "add_prefix_space": byte_level(pre_tokenizer=LEVEL | {"add_prefix_space": True}),
    "byte_fallback": llama2(byte_fallback=False),
    "piece lacking": byte_level(model={"vocab": {"a": 0}}),
    "lstrip": byte_level(added=[{"content": "<a>", "lstrip": True}]),
    "rstrip": byte_level(added=[{"content": "<a>", "rstrip": True}]),
    "single_word": byte_level(added=[{"content": "cat", "single_word": True}]),
    "normalized": byte_level(added=[{"content": "e\u0301", "normalized": True}]),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_another_kind_is_refused_by_name(what, make, tmp_path):
    with pytest.raises(ValueError) as error:
        make(NOT_OURS[what])
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'tokenizer.json'}: ") and "\n" not in text
    assert what.split()[0] in text and "supported: BPE" in text and len(text) < 800


def test_add_prefix_space_of_the_config_counts_more_than_the_file(make):
    with pytest.raises(ValueError, match=r"add_prefix_space.: true"):
        make(byte_level(), add_prefix_space=True)


def test_tokenizer_model_stands_in_for_an_unsupported_tokenizer_json(
    make, sentencepiece_model, tmp_path
):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    assert make(NOT_OURS["Unigram"]).vocab_size == 400
    assert make(byte_level()).vocab_size == 256  # but tokenizer.json has the first word
    with pytest.raises(ValueError, match=r"tokenizer\.json: not JSON"):  # broken is not other
        (tmp_path / "tokenizer.json").write_text("{")
        load_tokenizer(tmp_path)


BROKEN = {
    "no model": {},
    "a model that is text": {"model": "BPE"},
    "no merges": {"model": {"type": "BPE", "vocab": {"a": 0}}},
    "a merge of three": byte_level(model={"merges": ["a b c"]}),
    "a merge without a token": byte_level(model={"merges": ["q q"]}),
    "no vocabulary": byte_level(model={"vocab": {}}),
    "an id that is text": byte_level(added=[{"content": "<a>", "id": "x"}]),
    "an added token without text": byte_level(added=[{"special": True}]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_tokenizer_json_is_an_error_with_the_path(what, make, tmp_path):
    with pytest.raises(ValueError) as error:
        make(BROKEN[what])
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_vocab_without_merges_and_foreign_classes(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(byte_level()["model"]["vocab"]))
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(tmp_path).encode("aa") == [97, 97]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ValueError, match="CLIPTokenizer"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_150000_loads_in_two_seconds(make, tmp_path):
    letters = [c for c in CHARACTER_OF_BYTE.values() if c.isascii() and c.isalpha()]
    merges = [[a + b, c + d] for a in letters for b in letters for c in letters for d in "abcdefgh"]
    merges = [[a, b] for a in letters for b in letters] + merges[:150_000]
    spec = byte_level(merges)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    start = time.process_time()  # other processes do not count
    t = load_tokenizer(tmp_path)
    t.encode("é")  # builds the character classes
    assert time.process_time() - start < 2
    assert t.vocab_size == 256 + len(merges) > 150_000
