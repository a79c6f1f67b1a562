r"""What happens to a text before any merge: the normalizer and pre_tokenizer of a tokenizer.json.

Reads      normalizers NFC, NFD, NFKC, NFKD, Prepend, Replace; pre-tokenizers Split, Digits,
           Punctuation, ByteLevel, Metaspace; and sequences of them
Refuses    every other step by its name, and regular expressions that Python's re cannot be given

A step is a function of (text, where): a normalizer returns a text, a pre-tokenizer a list of words
that no merge crosses. where says what comes before the text, because some steps put a space in
front of it. Here and not in tokenizer.py, because it is the part that differs from one published
tokenizer to the next.
"""

import functools
import itertools
import re
import sys
import unicodedata
from collections.abc import Callable
from enum import Enum

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# ASCII's own idea of punctuation, and Unicode's.
PUNCTUATION = r"[\p{P}$+<=>^`|~]"
# White space as Unicode and the tokenizers library have it; Python's includes \x1c to \x1f.
WHITE_SPACE = re.sub("[\x1c-\x1f]", "", "".join(c for c in map(chr, range(0x3001)) if c.isspace()))


class Where(Enum):
    """What comes before a text."""

    START = 0  # nothing
    INSIDE = 1  # a special token, or another word
    CONTINUES = 2  # a text that it continues, so that nothing may be put between them


Normalizer = Callable[[str, Where], str]
PreTokenizer = Callable[[str, Where], list[str]]


class UnsupportedStep(ValueError):
    """A step that is sound, but not implemented here."""


def steps_of(spec: dict, part: str) -> list[dict]:
    """The steps of a part of tokenizer.json: of a Sequence all of them, else the only one."""
    step = spec.get(part)
    if not step:
        return []
    if step["type"] != "Sequence":
        return [step]
    # The list is called normalizers, decoders, but pretokenizers without the underscore.
    steps = step.get(part.replace("_", "") + "s", [])
    return list(itertools.chain.from_iterable(steps_of({part: s}, part) for s in steps))


# ---------------------------------------------------------------------------------------------
# Regular expressions.


@functools.cache
def _members(name: str, n_characters: int) -> str:
    r"""The characters of \p{name} below n_characters, as ranges for a set of Python's re."""
    if not re.fullmatch("[CLMNPSZ][a-z]?", name):
        raise UnsupportedStep(rf"\p{{{name}}}, which is not a general category")
    categories = (unicodedata.category(chr(i)) for i in range(n_characters))
    inside = "".join("01"[category.startswith(name)] for category in categories)
    runs = (m.span() for m in re.finditer("1+", inside))
    return "".join(rf"\U{a:08x}-\U{b - 1:08x}" for a, b in runs)


def _others(members: str) -> str:
    """The complement of a set's content, as ranges."""
    pattern = re.compile(f"[{members}]") if members else re.compile("(?!)")
    inside = "".join("10"[bool(pattern.match(chr(i)))] for i in range(sys.maxunicode + 1))
    return "".join(rf"\U{m.start():08x}-\U{m.end() - 1:08x}" for m in re.finditer("1+", inside))


TOKEN = re.compile(r"\\[pP]\{(\^?)(\w+)\}|\\[pP](\w)|\\.|\[\^?|\{\d+(?:,\d*)?\}\+|.", re.DOTALL)


@functools.cache
def python_pattern(published: str, n_characters: int = sys.maxunicode + 1) -> re.Pattern:
    r"""A published pattern for Python's re, which has no \p{...} and another idea of \s: both are
    written out, as ranges of the characters below n_characters.

    Which characters are letters depends on the Unicode version of the running Python, which may
    differ from the tokenizers library's in characters that were assigned lately.
    """
    out, inside = [], None  # inside: the content of the set that is open, else None
    for m in TOKEN.finditer(published):
        token, members = m.group(), None
        if token[:2] in (r"\p", r"\P"):
            members = _members(m.group(2) or m.group(3), n_characters)
            negated = (token[1] == "P") != bool(m.group(1))
        elif token in (r"\s", r"\S"):
            members, negated = WHITE_SPACE, token == r"\S"
        if members is not None and inside is not None:
            inside.append(_others(members) if negated else members)
        elif members is not None:
            out.append(_a_set([members], negated))
        elif inside is None and token.startswith("["):
            inside, inside_negated = [], token == "[^"
        elif inside is None and token.endswith("}+"):
            # To Python a possessive repetition, but to the tokenizers library a repeated one.
            if out[-1] == ")":
                raise UnsupportedStep(f"the repetition {token} of a group")
            out[-1] = f"(?:{out[-1]}{token[:-1]})+"
        elif inside is None:
            out.append(token)
        elif token == "]" and inside:
            out.append(_a_set(inside, inside_negated))
            inside = None
        elif token.startswith("["):
            raise UnsupportedStep("a set within a set of characters")
        else:
            inside.append("\\" + token if token in ("&", "|", "~") else token)
    source = "".join(out)
    try:  # $ and ^ are of lines, as in the tokenizers library
        return re.compile(source, re.MULTILINE)
    except re.error as error:
        why = "needs Python 3.11" if sys.version_info < (3, 11) else "cannot be read"
        raise UnsupportedStep(f"the pattern {published!r:.80} {why}: {error}") from None


def _a_set(parts: list[str], negated: bool) -> str:
    content = "".join(parts)
    if not content:  # none of its characters is below n_characters
        content, negated = r"\x00-\U0010ffff", not negated
    return f"[{'^' * negated}{content}]"


# ---------------------------------------------------------------------------------------------
# Splitting.


class Split:
    """Cuts a text at what a pattern matches, or with invert at what it does not match."""

    BEHAVIORS = "Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"

    def __init__(self, published: str, behavior: str = "Isolated", invert: bool = False):
        if behavior not in self.BEHAVIORS:
            raise UnsupportedStep(f"Split with the behavior {behavior!r}")
        self.published, self.behavior, self.invert = published, behavior, invert
        # Most texts are ASCII, and the short ranges of that make the search six times as fast. The
        # other pattern takes a moment to make, so it is made when a text needs it.
        self.ascii = python_pattern(published, 128)

    def __call__(self, text: str, where: Where = Where.START) -> list[str]:
        pattern = self.ascii if text.isascii() else python_pattern(self.published)
        if not pattern.groups and (self.behavior, self.invert) == ("Removed", True):
            return pattern.findall(text)
        if not pattern.groups and (self.behavior, self.invert) == ("Isolated", False):
            words = pattern.findall(text)
            if sum(map(len, words)) == len(text):  # as published patterns do, it matches everything
                return words
        pieces, end = [], 0  # (a piece, whether it counts as a match)
        for m in pattern.finditer(text):
            if m.start() > end:
                pieces.append((text[end : m.start()], self.invert))
            if m.group():
                pieces.append((m.group(), not self.invert))
            end = m.end()
        if end < len(text):
            pieces.append((text[end:], self.invert))
        return _join(pieces, self.behavior)


def _join(pieces: list[tuple[str, bool]], behavior: str) -> list[str]:
    """The words of pieces that are matches, or lie between them."""
    if behavior == "Isolated":
        return [piece for piece, _ in pieces]
    if behavior == "Removed":
        return [piece for piece, is_match in pieces if not is_match]
    if behavior == "MergedWithNext":
        backwards = [(piece[::-1], is_match) for piece, is_match in reversed(pieces)]
        return [word[::-1] for word in reversed(_join(backwards, "MergedWithPrevious"))]
    words, before = [], False
    for piece, is_match in pieces:
        contiguous = behavior == "Contiguous" and is_match == before
        merged = behavior == "MergedWithPrevious" and is_match and not before
        if words and (contiguous or merged):
            words[-1] += piece
        else:
            words.append(piece)
        before = is_match
    return words


# ---------------------------------------------------------------------------------------------
# Steps.


def pattern_of(step: dict) -> str:
    pattern = step["pattern"]
    return pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])


def text_of(step: dict, key: str) -> str:
    """A value of a step that must be text. Asked when a file is read, not at the first word."""
    if not isinstance(step[key], str):
        raise UnsupportedStep(f"a {step['type']} whose {key} is {step[key]!r}")
    return step[key]


def make_normalizer(steps: list[dict]) -> Normalizer:
    """Raises UnsupportedStep."""
    made = [_normalizer_step(step) for step in steps]

    def normalize(text: str, where: Where) -> str:
        for function in made:
            text = function(text, where)
        return text

    return normalize


def _normalizer_step(step: dict) -> Normalizer:
    match step["type"]:
        case "NFC" | "NFD" | "NFKC" | "NFKD" as form:
            return lambda text, where: unicodedata.normalize(form, text)
        case "Prepend":
            mark = text_of(step, "prepend")
            return lambda text, where: text if where == Where.CONTINUES else mark + text
        case "Replace" if "String" in step["pattern"]:
            old = text_of(step["pattern"] | {"type": "Replace"}, "String")
            new = text_of(step, "content")
            return lambda text, where: text.replace(old, new)
        case "Replace":
            pattern, new = python_pattern(pattern_of(step)), text_of(step, "content")
            return lambda text, where: pattern.sub(lambda m: new, text)
        case kind:
            raise UnsupportedStep(f"a normalizer of type {kind}")


def make_pre_tokenizer(steps: list[dict]) -> PreTokenizer:
    """Raises UnsupportedStep."""
    made = [_pre_tokenizer_step(step) for step in steps]

    def split(text: str, where: Where) -> list[str]:
        words = [text]
        for function in made:
            places = itertools.chain([where], itertools.repeat(Where.INSIDE))
            words = [word for part in words for word in function(part, next(places))]
        return words

    return split


def _pre_tokenizer_step(step: dict) -> PreTokenizer:
    match step["type"]:
        case "Split":
            return Split(pattern_of(step), step["behavior"], step.get("invert", False))
        case "Digits":
            behavior = "Isolated" if step.get("individual_digits") else "Contiguous"
            return Split(r"\p{N}", behavior)
        case "Punctuation":
            return Split(PUNCTUATION, step.get("behavior", "Isolated"))
        case "ByteLevel":
            words = Split(GPT2_WORDS) if step.get("use_regex", True) else None
            return functools.partial(_byte_level, words, step.get("add_prefix_space", True))
        case "Metaspace":
            mark = text_of(step, "replacement")
            words = Split(re.escape(mark), "MergedWithNext") if step.get("split", True) else None
            return functools.partial(_metaspace, words, mark, prefix_of(step))
        case kind:
            raise UnsupportedStep(f"a pre-tokenizer of type {kind}")


def prefix_of(step: dict) -> str:
    """Where a Metaspace step puts the mark in front: "always", "first" or "never"."""
    old = {True: "always", False: "never"}[step.get("add_prefix_space", True)]
    scheme = step.get("prepend_scheme", old)
    if scheme not in ("always", "first", "never"):
        raise UnsupportedStep(f"a Metaspace whose prepend_scheme is {scheme!r}")
    return scheme


def _byte_level(words: Split | None, adds: bool, text: str, where: Where) -> list[str]:
    if adds and where != Where.CONTINUES and not text.startswith(" "):
        text = " " + text
    return words(text) if words else [text]


def _metaspace(words: Split | None, mark: str, scheme: str, text: str, where: Where) -> list[str]:
    text = text.replace(" ", mark)
    places = {"always": (Where.START, Where.INSIDE), "first": (Where.START,), "never": ()}[scheme]
    if where in places and not text.startswith(mark):
        text = mark + text
    return words(text) if words else [text]
