"""The structures of published tokenizer.json files, with small vocabularies trained here, against
the tokenizers library: the same ids for hard texts, and the same text back."""

import json
import random
import re

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from formats.bpe import CHARACTER_OF_BYTE
from formats.tokenizer import load_tokenizer

APOSTROPHES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = APOSTROPHES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
LLAMA3 = APOSTROPHES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}{SLASH}"
)
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{APOSTROPHES}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{APOSTROPHES}?|\p{{N}}{{1,3}}{SLASH}"
)
DEEPSEEK = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
UNMARK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
BYTES, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    pattern = {kind: pattern}
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def steps(*parts, name="pretokenizers"):
    return {"type": "Sequence", name: list(parts)}


def words(*splits):
    """Splits, then bytes."""
    return steps(*splits, LEVEL | {"use_regex": False})


def metaspace(**more):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"} | more


def decoders(*parts):
    return steps(*parts, name="decoders")


OVER_BYTES = {  # name: (normalizer, pre_tokenizer)
    "GPT-2, OPT, Phi-2": (None, LEVEL),
    "RoBERTa's prefix": (None, LEVEL | {"add_prefix_space": True}),
    "Qwen2": ({"type": "NFC"}, words(split(QWEN2))),
    "Llama 3": (None, words(split(LLAMA3))),
    "Llama 3, removed and inverted": (None, words(split(LLAMA3, "Removed", True))),
    "GPT-4's own": (None, words(split(CL100K))),
    "Phi-4, GPT-4o": (None, words(split(O200K, "Removed", True))),
    "Mistral-Nemo": (None, words(split(TEKKEN))),
    "SmolLM2": (None, steps({"type": "Digits", "individual_digits": True}, LEVEL)),
    "digits together, with a prefix": (
        None,
        steps({"type": "Digits", "individual_digits": False}, LEVEL | {"add_prefix_space": True}),
    ),
    "DeepSeek-LLM": (
        steps(name="normalizers"),
        words(*map(split, DEEPSEEK), {"type": "Digits", "individual_digits": True}),
    ),
    "OLMo": ({"type": "NFC"}, LEVEL),
    "NFKC and punctuation": (
        steps({"type": "NFKC"}, name="normalizers"),
        steps({"type": "Punctuation", "behavior": "Isolated"}, LEVEL),
    ),
    "contiguous punctuation": (
        None,
        steps({"type": "Punctuation", "behavior": "Contiguous"}, LEVEL | {"use_regex": False}),
    ),
    "merged with the previous": (None, words(split(r"\s", "MergedWithPrevious"))),
    "merged with the next": (None, words(split(" ", "MergedWithNext", kind="String"))),
    "contiguous": (None, words(split(r"[^\P{L}\p{Lu}]", "Contiguous", True))),
}
OVER_CHARACTERS = {  # name: (normalizer, pre_tokenizer, decoder)
    "Llama 2": (
        steps({"type": "Prepend", "prepend": "▁"}, MARK, name="normalizers"),
        None,
        decoders(UNMARK, BYTES, FUSE, STRIP),
    ),
    "Phi-3 by transformers 5": (
        MARK,
        metaspace(prepend_scheme="first", split=False),
        decoders(UNMARK, BYTES, FUSE, STRIP),
    ),
    "Yi": (steps(MARK, name="normalizers"), None, decoders(UNMARK, BYTES, FUSE)),
    "Gemma": (
        MARK,
        split(" ", "MergedWithPrevious", kind="String"),
        decoders(UNMARK, BYTES, FUSE),
    ),
    "Metaspace with splits": (None, metaspace(), decoders(UNMARK, BYTES, FUSE, STRIP)),
    "Metaspace as it was": (
        None,
        {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
    ),
    "Metaspace without a prefix": (
        None,
        metaspace(prepend_scheme="never", split=False),
        decoders(UNMARK, BYTES, FUSE),
    ),
}
ADDED = [  # content, flags
    ("<s>", {}),
    ("</s>", {"rstrip": True}),
    ("<|user|>", {"rstrip": True}),
    ("<|left|>", {"lstrip": True}),
    ("<|both|>", {"lstrip": True, "rstrip": True}),
    ("cat", {"single_word": True}),
    ("<norm> x", {"normalized": True}),
    ("\t\t", {}),
]
CORPUS = [
    "The quick brown fox's jumping over 1234567 lazy dogs, isn't it? We'LL see: 3.14 / 2!\n\n",
    "  Über straße, naïve café, ÀÉÎ; x = {a: [1, 2]}  # comment\r\n\tdef f(x):\n        return x\n",
    "日本語のテキスト、中文文本。한국어 문장. Привет, мир! مرحبا"
    " ١٢٣ हिन्दी ๑๒๓ 🙂👩‍👩‍👧 ½ ² Ⅷ ǅ ʰ ª",
]


def hard_texts(n: int) -> list[str]:
    rng = random.Random(0)
    pieces = [word for text in CORPUS for word in text.split(" ")]
    pieces += [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\x1c", "\u200b", "e\u0301", "ﬁ"]
    pieces += [
        "'s",
        "'S",
        "'\u017f",
        "I'm",
        "12",
        "007",
        "!!",
        "...",
        "/\n",
        "_",
        "A",
        "aB",
        "▁",
        "<0x41>",
    ]
    pieces += [text for text, _ in ADDED] + [
        "concat",
        "cats",
        "<|user|",
        "<norm>",
        "\x00",
        "\ufffd",
    ]
    texts = ["", " ", "\n", "a", " a", "▁a", "<s>", " <s> a", "<s><s>", "x </s>  y", "cat", "a cat"]
    for _ in range(n):
        parts = [rng.choice(pieces) for _ in range(rng.randint(1, 12))]
        texts.append(rng.choice(["", " "]).join(parts))
    return texts


def added_tokens(first: int) -> list[dict]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [flags | {"id": first + i, "content": x} | more for i, (x, more) in enumerate(ADDED)]


def write(folder, normalizer, pre_tokenizer, decoder, over_bytes: bool, **model):
    """A tokenizer.json with some hundred merges of CORPUS; returns the library's tokenizer."""
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    untrained = tokenizers.Tokenizer.from_str(json.dumps(spec))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if over_bytes else list("▁abcdefgh ")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False, limit_alphabet=330
    )
    untrained.train_from_iterator(CORPUS * 3, trainer)
    trained = json.loads(untrained.to_str())["model"]
    vocab = trained["vocab"]
    if not over_bytes:
        for piece in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
            vocab.setdefault(piece, len(vocab))
        model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} | model
    without = model.pop("without", ())
    vocab = {piece: i for i, piece in enumerate(x for x in vocab if x not in without)}
    merges = [(a, b) for a, b in trained["merges"] if {a, b, a + b} <= vocab.keys()]
    spec["model"] = {"type": "BPE", "vocab": vocab, "merges": merges} | model
    spec["added_tokens"] = added_tokens(1 + max(vocab.values()))
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def compare(theirs, folder, n=400):
    ours = load_tokenizer(folder)
    for text in hard_texts(n):
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == wanted, repr(text)
        back = theirs.decode(wanted, skip_special_tokens=False)
        assert ours.decode(wanted) == back, repr(text)


@pytest.mark.parametrize("name", OVER_BYTES)
def test_ids_over_bytes(name, tmp_path):
    decoder = LEVEL | {"add_prefix_space": True}
    compare(write(tmp_path, *OVER_BYTES[name], decoder, over_bytes=True), tmp_path)


@pytest.mark.parametrize("name", OVER_CHARACTERS)
def test_ids_over_characters(name, tmp_path):
    compare(write(tmp_path, *OVER_CHARACTERS[name], over_bytes=False), tmp_path)


@pytest.mark.parametrize("name", [*OVER_BYTES, *OVER_CHARACTERS])
def test_a_response_after_a_special_token_has_the_ids_of_the_whole_text(name, tmp_path):
    """Phi-3's generation prompt ends with one, after which its normalizer puts ▁ before a word."""
    if name in OVER_BYTES:
        theirs = write(tmp_path, *OVER_BYTES[name], LEVEL | {"add_prefix_space": True}, True)
    else:
        theirs = write(tmp_path, *OVER_CHARACTERS[name], False)
    ours, n = load_tokenizer(tmp_path), 0
    for text in hard_texts(500):
        for m in re.finditer(r"<s>|</s>\s*|<\|user\|>\s*", text):
            prompt, response = text[: m.end()], text[m.end() :]
            ids = ours.encode(prompt)
            whole = theirs.encode(text, add_special_tokens=False).ids
            if response and whole[: len(ids)] == ids:
                n += 1
                both = ids + ours.encode(response, continuation=True, after=ids)
                assert both == whole, (prompt, response)
    assert n > 50


@pytest.mark.parametrize("unknown", [{}, {"unk_token": "a"}, {"unk_token": "a", "fuse_unk": True}])
def test_a_vocabulary_that_lacks_some_bytes(unknown, tmp_path):
    """SmolLM2's lacks some; without an unknown token the library leaves them out."""
    lacking = [CHARACTER_OF_BYTE[byte] for byte in (0x00, 0x0D, 0xE3, 0xC3)]
    theirs = write(tmp_path, None, LEVEL, LEVEL, True, without=lacking, **unknown)
    compare(theirs, tmp_path)


def test_a_vocabulary_that_lacks_some_byte_pieces(tmp_path):
    parts = OVER_CHARACTERS["Llama 2"]
    compare(write(tmp_path, *parts, False, without=["<0xE2>", "<0x0A>"]), tmp_path)


def test_ignored_merges(tmp_path):
    compare(write(tmp_path, *OVER_BYTES["Llama 3"], LEVEL, True, ignore_merges=True), tmp_path)


CLASSES = [(x, "llama") for x in ("GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer")]
CLASSES += [("GemmaTokenizer", "llama"), ("CodeLlamaTokenizer", "llama"), (None, "llama")]
CLASSES += [("TokenizersBackend", "llama"), ("CodeGenTokenizer", "phi")]
CLASSES += [("LlamaTokenizer", "mistral"), ("LlamaTokenizer", "phi3")]  # read as they are


@pytest.mark.parametrize("kind, model_type", CLASSES)
@pytest.mark.parametrize("name", [*OVER_BYTES, *OVER_CHARACTERS])
def test_transformers_gets_our_ids_from_what_we_hand_back(name, kind, model_type, tmp_path):
    """Whatever class the folder named before; transformers 5 builds some of them anew."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if name in OVER_BYTES:
        write(tmp_path, *OVER_BYTES[name], LEVEL | {"add_prefix_space": True}, over_bytes=True)
    else:
        write(tmp_path, *OVER_CHARACTERS[name], over_bytes=False)
    config = {"tokenizer_class": kind} if kind else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = load_tokenizer(tmp_path)
    ours.save_class(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in hard_texts(100):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)
