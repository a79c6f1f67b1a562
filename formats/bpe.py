"""The model of a tokenizer.json: byte-pair merges of a word, and pieces as text again.

Reads      BPE over bytes, or over characters with byte fallback; ignore_merges, unk_token, fuse_unk
Refuses    other models (WordPiece, Unigram), dropout, and prefixes or suffixes of pieces
"""

from heapq import heapify, heappop, heappush
from itertools import chain, groupby, pairwise

from formats.words import UnsupportedStep

# Byte-level pieces are written in printable characters, one for each byte: itself where it is
# printable in Latin-1, else the next of those from U+0100 on (a space is Ġ).
CHARACTER_OF_BYTE = {i: chr(i) for i in range(256) if chr(i).isprintable() and chr(i) != " "}
_UNPRINTABLE = [byte for byte in range(256) if byte not in CHARACTER_OF_BYTE]
CHARACTER_OF_BYTE |= {byte: chr(256 + i) for i, byte in enumerate(_UNPRINTABLE)}
BYTE_OF_CHARACTER = {character: bytes([byte]) for byte, character in CHARACTER_OF_BYTE.items()}
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}  # sentencepiece's byte fallback


class BPE:
    """over_bytes: the pieces are bytes as CHARACTER_OF_BYTE writes them, else text with ▁ for a
    space. joins_bytes: pieces such as <0x0A> are bytes when they are decoded."""

    def __init__(self, model: dict, over_bytes: bool, joins_bytes: bool):
        """model: as in tokenizer.json. Raises UnsupportedStep, ValueError."""
        if model.get("type", "BPE") != "BPE":
            raise UnsupportedStep(f"a model of type {model['type']!r:.80}")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise UnsupportedStep(f"a model with {option} {model[option]!r:.80}")
        self.over_bytes, self.joins_bytes = over_bytes, joins_bytes
        self.vocab, self.ignore_merges = model["vocab"], model.get("ignore_merges")
        self.byte_fallback, self.fuse_unk = model.get("byte_fallback"), model.get("fuse_unk")
        self.unknown = model.get("unk_token")
        self.pieces = {i: piece for piece, i in self.vocab.items()}
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        for a, b in self.ranks:
            if not a or not b or a + b not in self.vocab:
                raise ValueError(f"merging {a!r} and {b!r} gives no token")
        self.word_ids = WordIds(self.merge_word)

    def merge_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word. A character that the vocabulary lacks is encoded as its bytes, where
        it has these, else as the unknown token, and without one it is left out."""
        if self.over_bytes:
            word = word.encode().decode("latin-1").translate(CHARACTER_OF_BYTE)
        if self.ignore_merges and word in self.vocab:
            return (self.vocab[word],)
        symbols, waiting = [], []  # the library lets an unknown token wait for a known character
        for c in word:
            as_bytes = [f"<0x{byte:02X}>" for byte in c.encode()] if self.byte_fallback else []
            if c in self.vocab:
                symbols += [*waiting, c]
                waiting = []
            elif as_bytes and all(piece in self.vocab for piece in as_bytes):
                symbols += as_bytes
            elif self.unknown:
                symbols += [] if self.fuse_unk else waiting
                waiting = [self.unknown]
        symbols += waiting
        return tuple(self.vocab[symbol] for symbol in merge_symbols(symbols, self.ranks))

    def text_of(self, ids: list[int]) -> str:
        """As the tokenizers library: an id without a piece (a padded embedding has such) gives no
        text, and bytes that are not UTF-8 give U+FFFD."""
        pieces = [self.pieces.get(i, "") for i in ids]
        if self.over_bytes:
            raw = b"".join(BYTE_OF_CHARACTER.get(c) or c.encode() for c in "".join(pieces))
            return raw.decode("utf-8", errors="replace")
        text = ""
        for is_byte, run in groupby(pieces, key=BYTE_PIECES.__contains__):
            if is_byte and self.joins_bytes:
                raw = bytes(map(BYTE_PIECES.get, run))
                try:
                    text += raw.decode()
                except UnicodeDecodeError:
                    text += "\ufffd" * len(raw)
            else:
                text += "".join(run).replace("▁", " ")
        return text


class WordIds(dict):
    """The ids of words by `encode`, kept until there are `most` of them, which take some 60 MB."""

    most = 1 << 18

    def __init__(self, encode):
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str):
        if len(self) >= self.most:
            self.clear()
        ids = self[word] = self.encode(word)
        return ids

    def of(self, words: list[str]) -> list[int]:
        return list(chain.from_iterable(map(self.__getitem__, words)))


def merge_symbols(symbols: list[str], ranks: dict) -> list[str]:
    """Merges neighbours, always the pair of lowest rank, of several the leftmost, until none is
    left that has a rank.

    A heap of pairs and a linked list of symbols take n log n steps, even for a page without spaces.
    """
    n = len(symbols)
    symbols = [*symbols, ""]  # "" is in no pair: it ends the text and, as number -1, begins it
    before, after = list(range(-1, n)), list(range(1, n + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, i = heappop(heap)
        j = after[i]
        if ranks.get((symbols[i], symbols[j])) != rank:
            continue  # one of the two has been merged with its other neighbour since
        symbols[i] += symbols[j]
        symbols[j] = ""
        k = after[i] = after[j]
        before[k] = i
        for left, right in ((before[i], i), (i, k)):
            if (pair := (symbols[left], symbols[right])) in ranks:
                heappush(heap, (ranks[pair], left))
    return [symbol for symbol in symbols if symbol]
