"""Tokenizers as Hugging Face folders hold them.

Reads      tokenizer.json (byte-pair encoding over bytes: GPT-2, OPT, Phi, Qwen2, Llama 3; or in
           sentencepiece's manner: Llama 2, Mistral), tokenizer.model (by the sentencepiece
           library), vocab.json with merges.txt; special tokens from tokenizer_config.json,
           special_tokens_map.json and added_tokens.json
Refuses    every other kind (WordPiece, Unigram in JSON, other normalisers and pre-tokenizers) in
           one sentence that says what was found and what is supported

By hand and not by the tokenizers library, because a reader can follow two hundred lines and not a
Rust package, and because a response must be encoded as the continuation of its prompt, which the
library does not offer. Every id is held to that library's in tests/peers/.
"""

import functools
import json
import re
import sys
import unicodedata
from heapq import heapify, heappop, heappush
from itertools import chain, groupby, pairwise
from pathlib import Path

import sentencepiece

from formats.chat_template import (
    AUTHORS_CHAT_TEMPLATE,
    BOS_IN_FRONT,
    read_chat_template,
    render_chat_template,
)


class UnsupportedTokenizer(ValueError):
    """The file is sound, but of a kind that is not implemented here."""


def load_tokenizer(path, chat_template=None) -> "Tokenizer":
    """The tokenizer of a folder: tokenizer.json, else tokenizer.model, else vocab.json and
    merges.txt. path may also be one of these files. If tokenizer.json is of an unsupported kind,
    tokenizer.model is read instead. chat_template: a jinja file that is used in place of the
    folder's own. Raises FileNotFoundError or ValueError with the path."""
    if chat_template is not None:
        try:
            template = Path(chat_template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{chat_template}: {error}") from None
        tokenizer = load_tokenizer(path)
        tokenizer.chat_template = template
        return tokenizer
    path = Path(path)
    files = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()] or [path / "vocab.json"]
    if not files[0].is_file():
        names = "tokenizer.json, vocab.json with merges.txt, or sentencepiece's tokenizer.model"
        raise FileNotFoundError(f"{path}: needs {names}: none is there")
    for file in files:
        try:
            config = _read_json(file.parent / "special_tokens_map.json")
            config |= _read_json(file.parent / "tokenizer_config.json")
            if file.name in ("vocab.json", "merges.txt"):
                return BPETokenizer(file, config, _vocab_and_merges(file.parent, config))
            if file.suffix == ".json":
                return BPETokenizer(file, config, _read_json(file))
            return SentencePieceTokenizer(file, config)
        except UnsupportedTokenizer:
            if file == files[-1]:
                raise
        except OSError:
            raise
        except Exception as error:  # other people's files can be broken in any way
            problem = f"{type(error).__name__}: {error!s:.300}"
            raise ValueError(f"{path}: broken tokenizer: {problem}") from None


def _read_json(file: Path) -> dict:
    """A JSON object; an empty one where there is no such file."""
    try:
        value = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file.name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.name}: a JSON object is expected, not {type(value).__name__}")
    return value


def _refuse(file: Path, part: str, found):
    found = json.dumps(found, ensure_ascii=False)[:300]
    supported = "BPE over bytes with the pre-tokenizer of GPT-2, Qwen2 or Llama 3, and BPE in "
    supported += "sentencepiece's manner (Llama 2, Mistral); added tokens without lstrip, rstrip"
    raise UnsupportedTokenizer(f"{file}: its {part} is {found}; supported: {supported}")


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


class Tokenizer:
    """What all kinds share: special tokens, the start of a text, the chat template.

    A kind adds encode_text(text, dummy_space) and decode_text(ids, at_start). The dummy space is
    the space that sentencepiece models put in front of a text, so that its first word is the same
    token as elsewhere.
    """

    dummy_space_always = False  # also after special tokens, not only at the start of a text
    unsupported_flags = "single_word", "lstrip", "rstrip"  # of added tokens

    def __init__(self, file: Path, config: dict, vocab: dict, added: list[dict], defaults: dict):
        """vocab: {piece: id}. added: tokens beside it, [{"content", "id", flags}]. defaults:
        {"bos_token": id, ...} where config says nothing; where it says null, there is none."""
        more = _read_json(file.parent / "added_tokens.json").items()
        added = [{"content": text, "id": i} for text, i in more] + added
        added += [token | {"id": i} for i, token in config.get("added_tokens_decoder", {}).items()]
        for token in added:
            text = token["content"]
            if token.get("normalized") and not unicodedata.is_normalized("NFC", text):
                _refuse(file, "added token", token)
            if any(token.get(flag) for flag in self.unsupported_flags):
                _refuse(file, "added token", token)
        self.added = {token["content"]: int(token["id"]) for token in added}
        ids = vocab | self.added
        # bos_token, eos_token, ...: the names by which a chat template knows them
        named = {
            name: text for name, i in defaults.items() for text in self.added if ids[text] == i
        }
        for name, token in config.items():
            if name.endswith("_token"):
                named[name] = token["content"] if isinstance(token, dict) else token
        self.special_tokens = {name: text for name, text in named.items() if text in ids}
        self.added |= {text: ids[text] for text in self.special_tokens.values()}
        self.bos_id = ids.get(self.special_tokens.get("bos_token"))
        self.eos_id = ids.get(self.special_tokens.get("eos_token"))
        for text, i in ids.items():
            if type(i) is not int or not 0 <= i < 2**31:
                raise ValueError(f"token {text!r:.80} has the id {i!r:.80}")
        "".join(ids).encode()  # raises where a token is half a surrogate pair, which has no bytes
        self.vocab_size = 1 + max(ids.values())
        template = read_chat_template(file.parent, config)
        self.has_chat_template = bool(template)
        self.chat_template = template or AUTHORS_CHAT_TEMPLATE
        self.text_of_added = {i: text for text, i in self.added.items()}
        # Leftmost, then longest: of the branches of an alternation the first that fits is taken.
        longest_first = map(re.escape, sorted(self.added, key=len, reverse=True))
        self.added_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def encode(self, text: str, bos=False, eos=False, continuation=False) -> list[int]:
        """Token ids. The text of a special token becomes its id, as in transformers.

        continuation: the text continues another one, so it gets no dummy space. bos and
        eos have no effect where the tokenizer has no such token.
        """
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        dummy_space = not continuation
        for part in filter(None, self.added_pattern.split(text)):
            ids += [self.added[part]] if part in self.added else self.encode_text(part, dummy_space)
            dummy_space = self.dummy_space_always
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids) -> str:
        """The text. Special tokens are shown; only the dummy space of a text's start is removed."""
        parts = []
        for is_added, run in groupby(map(int, ids), key=self.text_of_added.__contains__):
            if is_added:
                parts += map(self.text_of_added.get, run)
            else:
                parts.append(self.decode_text(list(run), at_start=not parts))
        return "".join(parts)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt=False) -> str:
        """The text of a dialogue, by the model's own template, else by that of ORPO's authors.
        Raises ValueError where the template is broken or unsafe, or refuses the messages."""
        template, special = self.chat_template, self.special_tokens
        return render_chat_template(template, messages, add_generation_prompt, special)

    def save_chat_template(self, folder: Path):
        """Makes this template the one of a folder of tokenizer files, and lets it begin with BOS
        as training does (data.encode_prompt): who serves a model tokenises a template's text
        without adding special tokens. Writes nothing where the folder has that template already."""
        template, bos = self.chat_template, self.special_tokens.get("bos_token")
        try:
            question = [{"role": "user", "content": "?"}]
            says_bos = bool(bos) and self.apply_chat_template(question, True).startswith(bos)
        except ValueError:  # a template that wants other messages
            says_bos = "bos_token" in template
        if bos and not says_bos:
            template = BOS_IN_FRONT + template
        config = _read_json(folder / "tokenizer_config.json")
        if template == read_chat_template(folder, config):
            return
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        if named := config.get("chat_template"):  # the only place where older readers look
            if isinstance(named, list):
                others = [t for t in named if t["name"] != "default"]
                named = [*others, {"name": "default", "template": template}]
            else:
                named = template
            text = json.dumps(config | {"chat_template": named}, indent=2, ensure_ascii=False)
            (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def turn_end(self) -> str:
        """What the chat template puts after an answer: EOS, or for instance <|im_end|>; "" where
        the template refuses a simple dialogue."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "@@"}
        try:
            text = self.apply_chat_template([question, answer])
        except ValueError:
            return ""
        return text.rpartition("@@")[2].strip()


# A word with the spaces, which sentencepiece writes as ▁, and newlines in front of it.
SPACED_WORDS = re.compile("[▁ \n]*[^▁ \n]+|[▁ \n]+").findall


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model: the sentencepiece library splits the text."""

    def __init__(self, file: Path, config: dict):
        # A serialised model may be followed by bytes that override its fields, as protobuf merges
        # what comes twice. These switch off two options of the normaliser: add_dummy_prefix
        # (field 3), and for decoding remove_extra_whitespaces (field 4) as well.
        overrides = b"", b"\x1a\x02\x18\x00", b"\x1a\x04\x18\x00\x20\x00"
        try:
            self.sp, self.sp_continuation, self.sp_raw = (
                sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes() + override)
                for override in overrides
            )
        except RuntimeError:
            raise ValueError(f"{file.name}: not a sentencepiece model, or cut short") from None
        self.strips_spaces = self.sp.encode("  a") == self.sp.encode("a")
        # The library makes a new int of every id. One for all is faster to read and saves memory.
        shared = list(range(self.sp.vocab_size())).__getitem__
        encode = self.sp_continuation.encode
        self.word_ids = WordIds(lambda word: tuple(map(shared, encode(word))))
        # After a special token only old ("legacy") Llama tokenizers add the dummy space.
        self.dummy_space_always = bool(config.get("legacy", False))
        vocab = {self.sp.id_to_piece(i): i for i in range(self.sp.vocab_size())}
        self.splits = self._splits(vocab)
        control = {p: i for p, i in vocab.items() if self.sp.is_control(i) or self.sp.is_unknown(i)}
        added = [{"content": piece, "id": i} for piece, i in control.items()]
        names = ("bos", "eos", "unk", "pad")
        defaults = {f"{name}_token": getattr(self.sp, f"{name}_id")() for name in names}
        super().__init__(file, config, vocab, added, defaults)

    def encode_text(self, text: str, dummy_space: bool) -> list[int]:
        # Where the model removes leading spaces, the dummy space in front of a continuation
        # stands for the spaces that it begins with.
        dummy_space |= self.strips_spaces and text[0] == " "
        if not self.splits:
            return (self.sp if dummy_space else self.sp_continuation).encode(text)
        words = SPACED_WORDS(text)
        start = self.sp.encode(words.pop(0)) if dummy_space else []
        return start + self.word_ids.of(words)

    def _splits(self, vocab: dict) -> bool:
        """Whether words may be encoded one by one, and so each once: no piece reaches over the
        space or newline in front of a word, and neither does anything else in the library."""
        if self.strips_spaces or "<0x0A>" not in vocab:  # runs of unknown characters are joined
            return False
        ids = range(self.sp.vocab_size())
        by_rank = all(self.sp.get_score(i).is_integer() for i in ids)  # else Unigram's sums
        return by_rank and not any(re.search("[^▁\n][▁\n]", piece) for piece in vocab)

    def decode_text(self, ids: list[int], at_start: bool) -> str:
        # A padded embedding matrix has more rows than the vocabulary has pieces.
        ids = [i for i in ids if 0 <= i < self.sp.vocab_size()]
        # Only the library knows which of a text's first spaces is the dummy one.
        return (self.sp if at_start else self.sp_raw).decode(ids)


# ---------------------------------------------------------------------------------------------
# Byte-pair encoding by hand.

# How published byte-level tokenizers split a text into words before any merge; OPT and Phi do as
# GPT-2. Which characters are letters depends on the Unicode version of the running Python, which
# may differ from the tokenizers library's in letters that were assigned lately.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# White space as Unicode and the tokenizers library have it; Python's includes \x1c to \x1f.
WHITE_SPACE = re.sub("[\x1c-\x1f]", "", "".join(c for c in map(chr, range(0x3001)) if c.isspace()))


@functools.cache
def _word_pattern(published: str, n_characters: int = sys.maxunicode + 1) -> re.Pattern:
    r"""Python's re has no \p{L} and \p{N}: they are written out here, as ranges of characters."""
    categories = "".join(unicodedata.category(chr(i))[0] for i in range(n_characters))
    members = {r"\s": WHITE_SPACE, r"\S": "^" + WHITE_SPACE}
    for major in "LN":
        runs = (m.span() for m in re.finditer(f"{major}+", categories))
        members[rf"\p{{{major}}}"] = "".join(rf"\U{a:08x}-\U{b - 1:08x}" for a, b in runs)
    # A class that stands outside of brackets gets brackets of its own.
    pattern = re.sub(r"(\\p\{.\}|\\[sS])(?![^\[]*\])", r"[\1]", published)
    for name, characters in members.items():
        pattern = pattern.replace(name, characters)
    return re.compile(pattern)


def split_words(text: str, published: str) -> list[str]:
    """The words of a text by one of the published patterns."""
    # Most texts are ASCII, and the short ranges of that make the search six times as fast.
    pattern = _word_pattern(published, 128) if text.isascii() else _word_pattern(published)
    return pattern.findall(text)


# Byte-level pieces are written in printable characters, one for each byte: itself where it is
# printable in Latin-1, else the next of those from U+0100 on (a space is Ġ).
CHARACTER_OF_BYTE = {i: chr(i) for i in range(256) if chr(i).isprintable() and chr(i) != " "}
_UNPRINTABLE = [byte for byte in range(256) if byte not in CHARACTER_OF_BYTE]
CHARACTER_OF_BYTE |= {byte: chr(256 + i) for i, byte in enumerate(_UNPRINTABLE)}
BYTE_OF_CHARACTER = {character: bytes([byte]) for byte, character in CHARACTER_OF_BYTE.items()}
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}  # sentencepiece's byte fallback
LLAMA2_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


class BPETokenizer(Tokenizer):
    """tokenizer.json: byte-pair merges over the bytes of words (GPT-2, Qwen2, Llama 3), or over
    characters with ▁ for a space (Llama 2, Mistral). Its post_processor is not used."""

    def __init__(self, file: Path, config: dict, spec: dict):
        model = spec["model"]
        options = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
        unsupported = [option for option in options if model.get(option)]
        if model.get("type", "BPE") != "BPE" or unsupported:
            _refuse(file, "model", [model.get("type"), *unsupported])
        self.vocab, self.ignore_merges = model["vocab"], model.get("ignore_merges")
        self.pieces = {i: piece for piece, i in self.vocab.items()}
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        for a, b in self.ranks:
            if not a or not b or a + b not in self.vocab:
                raise ValueError(f"{file.name}: merging {a!r} and {b!r} gives no token")
        steps = (_steps(spec, part) for part in ("normalizer", "pre_tokenizer", "decoder"))
        self._set_steps(file, config, *steps)
        alphabet = set(BYTE_OF_CHARACTER if self.byte_level else [*BYTE_PIECES, "▁"])
        if not (self.byte_level or model.get("byte_fallback")) or not alphabet <= self.vocab.keys():
            _refuse(file, "model", "without byte_fallback, or without a piece for each byte")
        self.word_ids = WordIds(self.merge_word)
        # GPT-2's tokenizer_config.json names no special tokens, but the model's has their ids.
        ids = _read_json(file.parent / "config.json")
        defaults = {name: ids.get(f"{name}_id") for name in ("bos_token", "eos_token")}
        super().__init__(file, config, self.vocab, spec.get("added_tokens") or [], defaults)
        if not self.byte_level:  # an added token is decoded like any piece: its ▁ is a space too
            self.pieces, self.text_of_added = self.pieces | self.text_of_added, {}

    def _set_steps(self, file: Path, config: dict, normalizer, pre_tokenizer, decoder):
        """Sets what happens before the merges: NFC, the dummy space, and `words`, which splits a
        text into parts that no merge crosses."""
        # transformers builds a LlamaTokenizer anew, by `legacy`, whatever the file says.
        llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        legacy = bool(config.get("legacy", not llama))
        self.nfc = normalizer == [{"type": "NFC"}]
        self.prepend_always = False  # the dummy space also where the text begins with one
        self.byte_level = decoder != LLAMA2_DECODER
        if self.byte_level and [step["type"] for step in decoder] != ["ByteLevel"]:
            _refuse(file, "decoder", decoder)
        asked = {"add_prefix_space": True} if config.get("add_prefix_space") else {}
        steps = [{"use_regex": True} | step | asked for step in pre_tokenizer]
        match self.byte_level, normalizer[self.nfc :], steps:
            case True, [], [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
                self.words = functools.partial(split_words, published=GPT2_WORDS)
            case True, [], [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", **options},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ] if regex in (GPT2_WORDS, QWEN2_WORDS, LLAMA3_WORDS) and not options.get("invert"):
                self.words = functools.partial(split_words, published=regex)
            case False, [], [
                {"type": "Metaspace", "replacement": "▁", "split": False, **options}
            ] if options.get("prepend_scheme") in ("first", "always"):
                self.dummy_space_always = legacy and options["prepend_scheme"] == "always"
            case False, [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ], []:
                self.dummy_space_always, self.prepend_always = legacy, True
                if not llama:
                    self.unsupported_flags = (*self.unsupported_flags, "normalized")
            case _:
                _refuse(file, "normalizer and pre_tokenizer", [normalizer, pre_tokenizer, asked])
        if not self.byte_level:
            # A whole text is one word. But where no merge reaches over a space, splitting in front
            # of spaces changes nothing, and words that occur again can be cached.
            inside = any("▁" in (a + b).lstrip("▁") for a, b in self.ranks)
            whole_text = self.ignore_merges or inside
            self.words = re.compile("(?s:.+)" if whole_text else "▁*[^▁]+|▁+").findall

    def encode_text(self, text: str, dummy_space: bool) -> list[int]:
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if not self.byte_level:
            if dummy_space and (self.prepend_always or text[0] not in " ▁"):
                text = "▁" + text
            text = text.replace(" ", "▁")
        return self.word_ids.of(self.words(text))

    def merge_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word. A character that the vocabulary lacks is encoded as its bytes."""
        if self.byte_level:
            word = word.encode().decode("latin-1").translate(CHARACTER_OF_BYTE)
        if self.ignore_merges and word in self.vocab:
            return (self.vocab[word],)
        symbols = []
        for c in word:
            symbols += [c] if c in self.vocab else [f"<0x{byte:02X}>" for byte in c.encode()]
        return tuple(self.vocab[symbol] for symbol in merge_symbols(symbols, self.ranks))

    def decode_text(self, ids: list[int], at_start: bool) -> str:
        """As the tokenizers library: an id without a piece (a padded embedding has such) gives no
        text, and bytes that are not UTF-8 give U+FFFD."""
        pieces = [self.pieces.get(i, "") for i in ids]
        if self.byte_level:
            raw = b"".join(BYTE_OF_CHARACTER.get(c) or c.encode() for c in "".join(pieces))
            return raw.decode("utf-8", errors="replace")
        text = ""
        for is_byte, run in groupby(pieces, key=BYTE_PIECES.__contains__):
            if is_byte:
                raw = bytes(map(BYTE_PIECES.get, run))
                try:
                    text += raw.decode()
                except UnicodeDecodeError:
                    text += "\ufffd" * len(raw)
            else:
                text += "".join(run).replace("▁", " ")
        return text.removeprefix(" ") if at_start else text


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


def _vocab_and_merges(folder: Path, config: dict) -> dict:
    """GPT-2's older pair of files (and Qwen2's) in the form of a tokenizer.json."""
    kind = str(config.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "CodeGenTokenizer", "Qwen2Tokenizer"):
        _refuse(folder / "tokenizer_config.json", "tokenizer_class", kind)
    vocab, file = _read_json(folder / "vocab.json"), folder / "merges.txt"
    if not vocab or not file.is_file():
        raise FileNotFoundError(f"{folder}: vocab.json and merges.txt go together; one is missing")
    merges = file.read_text(encoding="utf-8").splitlines()
    special, qwen2 = "<|endoftext|>", kind == "Qwen2Tokenizer"
    split = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated"}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not qwen2}
    return {
        "model": {"vocab": vocab, "merges": [m for m in merges if m and m[:8] != "#version"]},
        "normalizer": {"type": "NFC"} if qwen2 else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, to_bytes] if qwen2 else [to_bytes],
        },
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"content": special, "id": vocab[special]}] if special in vocab else [],
    }


def _steps(spec: dict, part: str) -> list[dict]:
    """The steps of a part of tokenizer.json: of a Sequence all of them, else the only one."""
    step = spec.get(part)
    if not step:
        return []
    # The list is called normalizers, decoders, but pretokenizers without the underscore.
    return step.get(part.replace("_", "") + "s", []) if step["type"] == "Sequence" else [step]


# ---------------------------------------------------------------------------------------------
# Chat templates.
