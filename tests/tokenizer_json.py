"""tokenizer.json by hand, of the kinds that formats/tokenizer.py reads."""

from formats.bpe import CHARACTER_OF_BYTE
from formats.tokenizer import QWEN2_WORDS

LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

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
    """256 bytes, then a token a merge, then the added ones."""
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
    """<unk>, <s>, </s>, 256 bytes, ▁ t h e, then a token a merge."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁the"]
    vocab = {piece: i for i, piece in enumerate(pieces + [m.replace(" ", "") for m in merges])}
    model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} | model
    model |= {"type": "BPE", "vocab": vocab, "merges": list(merges)}
    added = [{"id": i, "content": text} for i, text in enumerate(pieces[:3])]
    return LLAMA2 | {"added_tokens": added, "model": model}


def metaspace(**options) -> dict:
    """llama2's, with Metaspace in place of the normalizer."""
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return llama2() | {"normalizer": None, "pre_tokenizer": step | options}
