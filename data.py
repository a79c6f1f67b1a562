"""From preference rows to packed micro-batches of plain tensors.

    one pair            [ prompt p0..p9 | chosen c0..c5 | rejected r0..r3 ]
    positions             0 ........ 9    10 ...... 15    10 ..... 13
    predicted by          (nothing) p0..   p9 c0 .. c4     p9 r0 .. r2
    a micro-batch       such runs end to end: no padding, each prompt computed once

A prompt is tokenised once and a response as its continuation, so the shared prefix really is
shared, and training sees the tokens that generation will see.

    rows    load_preferences(file)       JSON Lines -> Preference, each complaint with FILE:LINE
    pairs   encode_pair(...)             -> Pair; the one place that truncates and drops
    steps   order(n, seed, epoch)        which pairs come when: no other state
    batches micro_batches(...)           -> Batch: tensors, and how much every token counts

Look at your own data before training on it:  python data.py FILE --model DIR
"""

import argparse
import datetime
import functools
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from heapq import heapify, heappop, heappush
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# Rows.


class Preference(NamedTuple):
    """One row. A string is used as it is; a list of messages goes through the chat template."""

    prompt: str | list[dict]
    chosen: str | list[dict]  # messages: the one assistant message that answers the prompt
    rejected: str | list[dict]
    accept: list[str] | None  # answers that count as right, where they can be listed
    where: str  # FILE:LINE
    form: str = ""  # how the row was written, in words


def load_preferences(path) -> list[Preference]:
    """Reads JSON Lines with prompt, chosen, rejected: strings, or lists of {role, content}.

    `instruction` or `question` may stand for `prompt`. Without one, or where chosen and rejected
    are whole dialogues, the prompt is their common beginning. Other keys are ignored, but for
    `accept`, a list of right answers (strings). Raises FileNotFoundError, or ValueError that
    begins with FILE:LINE.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a JSON object a line is expected")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8"))
                json.dumps(row, ensure_ascii=False).encode("utf-8")  # not so half a surrogate pair
                rows.append(_preference(row, f"{path}:{number}"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: the file has no rows; a JSON object a line is expected")
    return rows


def _preference(row, where: str) -> Preference:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"key {key!r} is missing; the row has {sorted(row)}")
        if not isinstance(row[key], str | list):
            kind = type(row[key]).__name__
            raise ValueError(f"{key} must be text or a list of messages, not {kind}")
    name = next((key for key in ("prompt", "instruction", "question") if key in row), "prompt")
    prompt, chosen, rejected = row.get(name), row["chosen"], row["rejected"]
    accept = row.get("accept")
    if accept is not None and not (
        isinstance(accept, list) and all(isinstance(x, str) for x in accept)
    ):
        raise ValueError("accept must be a list of strings")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        form = f"strings: {name}, chosen, rejected"
        if prompt is None:
            prompt, form = _common_text(chosen, rejected), "strings with a common beginning"
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Preference(prompt, chosen, rejected, accept, where, form)

    for key in (name, "chosen", "rejected"):
        if not (key == name and isinstance(prompt, str | None)):
            _check_messages(key, row[key])
    form = f"messages: {name}, chosen, rejected"
    if not isinstance(prompt, list):  # whole dialogues; UltraFeedback repeats a string beside them
        n = 0
        while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
            n += 1
        prompt, form = chosen[:n], "dialogues with a common beginning"
    answers = []
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        answer = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
        if not prompt or len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = [m["role"] for m in messages]
            raise ValueError(
                f"{key} must be the prompt's messages and one assistant message more, or that "
                f"message alone; its roles are {roles} after a prompt of {len(prompt)} messages"
            )
        answers.append(answer)
    return Preference(prompt, *answers, accept, where, form)


def _check_messages(key: str, messages):
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key} must be text or a list of messages, like its neighbours")
    for i, m in enumerate(messages):
        if not (
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
        ):
            raise ValueError(f"{key}[{i}] must be a message: role and content, both strings")


def _common_text(a: str, b: str) -> str:
    """The common beginning of two texts, back to a word's end, so that both go on with a space."""
    n = len(os.path.commonprefix([a, b]))
    while n and not (a[n : n + 1].isspace() and b[n : n + 1].isspace()):
        n -= 1
    return a[:n]


# ---------------------------------------------------------------------------------------------
# Pairs.


class Pair(NamedTuple):
    """Token ids. The prompt has BOS in front, a response EOS behind unless it was cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def lengths(self) -> tuple[int, int, int]:
        return len(self.prompt), len(self.chosen), len(self.rejected)

    @property
    def n_tokens(self) -> int:
        """Of the packed run: the prompt once."""
        return sum(self.lengths)


def encode_pair(tokenizer, row: Preference, max_length: int, max_prompt_length: int) -> Pair | str:
    """Tokens of a row, or, where it is to be dropped, the reason.

    Each response is cut by its own length, so that prompt and response fit max_length. Raises
    ValueError with FILE:LINE where the chat template rewrites the prompt once it is answered.
    """
    texts = row.chosen, row.rejected
    prompt_text = row.prompt
    if not isinstance(prompt_text, str):
        try:
            prompt_text = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)
            full = [tokenizer.apply_chat_template(row.prompt + answer) for answer in texts]
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        if not all(text.startswith(prompt_text) for text in full):
            raise ValueError(
                f"{row.where}: the chat template changes the prompt once it is answered"
            )
        texts = [text[len(prompt_text) :] for text in full]
    prompt = encode_prompt(tokenizer, prompt_text)
    responses = []
    for text in texts:
        ids = tokenizer.encode(text, continuation=True)
        if tokenizer.eos_id in ids:  # a template's EOS: what follows it is never generated
            ids = ids[: ids.index(tokenizer.eos_id)]
        if not ids:
            return "empty response"
        responses.append(ids if tokenizer.eos_id is None else [*ids, tokenizer.eos_id])
    chosen, rejected = responses
    if chosen == rejected:
        return "identical responses"
    if not prompt:
        return "empty prompt"
    if len(prompt) > max_prompt_length:
        return f"prompt over {max_prompt_length} tokens"
    room = max_length - len(prompt)
    if room < 1:
        return f"prompt leaves no room in {max_length} tokens"
    if chosen[:room] == rejected[:room]:
        return f"identical once cut to {max_length} tokens"
    return Pair(prompt, chosen[:room], rejected[:room])


def encode_prompt(tokenizer, text: str) -> list[int]:
    """A prompt as the model sees it: BOS once in front, also where a template wrote it already."""
    ids = tokenizer.encode(text)
    has_bos = tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id]
    return ids if has_bos else [tokenizer.bos_id, *ids]


def encode_rows(tokenizer, rows, max_length: int, max_prompt_length: int, progress=iter):
    """All rows -> (pairs, their rows, Counter of drops by reason). ValueError if none is left."""
    lengths = max_length, max_prompt_length
    encoded = [encode_pair(tokenizer, row, *lengths) for row in progress(rows)]
    dropped = Counter(x for x in encoded if isinstance(x, str))
    kept = [(pair, row) for pair, row in zip(encoded, rows, strict=True) if isinstance(pair, Pair)]
    if not kept:
        raise ValueError(f"no pairs left of {len(rows)} rows: {describe(dropped)}")
    pairs, rows = zip(*kept, strict=True)
    return list(pairs), list(rows), dropped


def hold_out(rows: list[Preference], fraction: float, seed: int):
    """Splits rows into (train, held out) by prompt: one asked on both sides would tell nothing."""
    prompts = list(dict.fromkeys(json.dumps(row.prompt) for row in rows))
    n = max(1, round(fraction * len(prompts)))
    held_out = {prompts[i] for i in order(len(prompts), seed, 0)[:n]}
    parts = [], []
    for row in rows:
        parts[json.dumps(row.prompt) in held_out].append(row)
    return parts


def describe(dropped: Counter) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.most_common()) or "none"


# ---------------------------------------------------------------------------------------------
# Steps and micro-batches.


@functools.lru_cache(maxsize=1)  # asked for at every step
def order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of n pairs in an epoch: a function of (seed, epoch), so resuming needs no state."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(n).tolist())


class Batch(NamedTuple):
    """A micro-batch of B pairs: N packed tokens, of which P predictions carry weight."""

    lengths: list[tuple[int, int, int]]  # (p, c, r) of each pair; last (fill, 0, 0), if filled up
    tokens: Tensor  # (N,) int64, runs of [prompt | chosen | rejected]
    positions: Tensor  # (N,) int64; chosen and rejected both go on from the prompt's end
    predict: Tensor  # (P,) int64, the row of the hidden states that predicts ...
    targets: Tensor  # (P,) int64, ... this token
    response: Tensor  # (P,) int64: 2*pair chosen, 2*pair+1 rejected, -1 prompt
    nll_weight: Tensor  # (P,) float32, weight in L_SFT: normalised over the whole step
    response_lengths: Tensor  # (2B,) int64: chosen and rejected of pair 0, of pair 1, ...


def micro_batches(pairs: list[Pair], budget: int, sft_loss: str, multiple: int = 1) -> list[Batch]:
    """One optimizer step's pairs as micro-batches of at most `budget` tokens (see `cut`).

    Tokens and predictions are filled up to a multiple of `multiple`, where kernels want that: by a
    run of token 0 that nobody sees, and by predictions without weight.

    The weights are the whole step's, so the gradients of the micro-batches simply add up:
    sft_loss "response": 1/(pairs * m) for each of the m tokens of a chosen response;
    sft_loss "full": 1/(such tokens) for every predicted token of prompt and chosen, as in TRL.
    """
    n_tokens = sum(p + c - 1 for p, c, _ in (pair.lengths for pair in pairs))
    return [_pack(part, sft_loss, len(pairs), n_tokens, multiple) for part in cut(pairs, budget)]


def cut(pairs: list[Pair], budget: int) -> list[list[Pair]]:
    """Runs of pairs of at most `budget` tokens. A pair is never split: a longer one is alone."""
    parts, size = [], budget
    for pair in pairs:
        if size + pair.n_tokens > budget or not parts:
            parts.append([])
            size = 0
        parts[-1].append(pair)
        size += pair.n_tokens
    return parts


def _pack(pairs: list[Pair], sft_loss: str, n_pairs: int, n_tokens: int, multiple: int) -> Batch:
    full = sft_loss == "full"
    tokens, positions, predict, targets, response, weight = [], [], [], [], [], []
    start = 0
    for i, pair in enumerate(pairs):
        p, c, r = pair.lengths
        last, rejected = start + p - 1, start + p + c  # last prompt token, first rejected one
        tokens += [pair.prompt, pair.chosen, pair.rejected]
        positions += [np.arange(p + c), np.arange(p, p + r)]
        if full:
            predict.append(np.arange(start, last))
            targets.append(pair.prompt[1:])
            response.append(np.full(p - 1, -1))
            weight.append(np.full(p - 1, 1 / n_tokens))
        # The last prompt token predicts the first token of both responses.
        predict += [np.arange(last, last + c), [last], np.arange(rejected, rejected + r - 1)]
        targets += [pair.chosen, pair.rejected]
        response += [np.full(c, 2 * i), np.full(r, 2 * i + 1)]
        weight += [np.full(c, 1 / n_tokens if full else 1 / (n_pairs * c)), np.zeros(r)]
        start = rejected + r
    lengths = [pair.lengths for pair in pairs]
    if fill := -start % multiple:
        lengths.append((fill, 0, 0))
        tokens.append(np.zeros(fill))
        positions.append(np.arange(fill))
    fill = -sum(map(len, predict)) % multiple
    for parts, value in ((predict, 0), (targets, 0), (response, -1), (weight, 0)):
        parts.append(np.full(fill, value))
    ints = (tokens, positions, predict, targets, response)
    return Batch(
        lengths,
        *(torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in ints),
        torch.from_numpy(np.concatenate(weight).astype(np.float32)),
        torch.tensor([n for pair in pairs for n in pair.lengths[1:]]),
    )


# ---------------------------------------------------------------------------------------------
# The tokenizer. What follows the model's folder: its special tokens, its chat template.


class UnsupportedTokenizer(ValueError):
    """A sound file of a kind that is not implemented here."""


def load_tokenizer(path) -> "Tokenizer":
    """From a folder: tokenizer.json, else tokenizer.model, else vocab.json and merges.txt; or from
    one of these files. A tokenizer.json of another kind leaves the word to tokenizer.model.

    Raises FileNotFoundError or ValueError with the path.
    """
    path = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    files = [path / name for name in names] if path.is_dir() else [path]
    found = [file for file in files if file.is_file()]
    if not found:
        names = "tokenizer.json, sentencepiece's tokenizer.model, vocab.json with merges.txt"
        raise FileNotFoundError(f"{files[len(files) // 2]}: no such file; supported: {names}")
    try:
        try:
            return _load(found[0])
        except UnsupportedTokenizer:
            if [file.name for file in found[1:2]] != ["tokenizer.model"]:
                raise
            return _load(found[1])
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        if str(error).startswith(str(found[0].parent)):
            raise
        problem = f"broken tokenizer files: {type(error).__name__}: {error}"
        raise ValueError(f"{found[0].parent}: {problem}") from None


def _load(file: Path) -> "Tokenizer":
    config = _read_optional(file.parent / "special_tokens_map.json")
    config |= _read_optional(file.parent / "tokenizer_config.json")
    if file.name in ("vocab.json", "merges.txt"):
        return BPETokenizer(file, config, _vocab_and_merges(file.parent, config))
    if file.suffix == ".json":
        return BPETokenizer(file, config, _read_optional(file))
    return SentencePieceTokenizer(file, config)


class AddedToken(NamedTuple):
    """A token beside the model: its text becomes its id wherever it stands, if flags allow."""

    id: int
    single_word: bool = False  # only where no letter or digit touches it
    lstrip: bool = False  # takes the white space in front of it along
    rstrip: bool = False  # and that behind it
    normalized: bool = False  # looked for once the text between the others is normalised


def _added_token(token: dict, i) -> AddedToken:
    return AddedToken(int(i), *(bool(token.get(flag)) for flag in AddedToken._fields[1:]))


class Tokenizer:
    """What all kinds share: special tokens, beginnings, the chat template, as in transformers.

    A kind has encode_text(text, prefix), decode_text(ids, at_start), normalize(text, prefix).
    `prefix`: put the space in front that the kind wants at a text's start ("dummy space").
    """

    def __init__(self, folder: Path, config: dict, vocab: dict, added: dict, defaults: dict):
        """vocab: {piece: id}; added: {text: AddedToken}; defaults: {"bos_token": text, ...}, for
        what the config does not mention (where it says null, there is none)."""
        for text, i in _read_optional(folder / "added_tokens.json").items():
            added.setdefault(text, AddedToken(i))
        for i, token in config.get("added_tokens_decoder", {}).items():
            added[_content(token)] = _added_token(token, i)
        ids = vocab | {text: token.id for text, token in added.items()}
        named = {name: _content(x) for name, x in config.items() if name.endswith("_token")}
        # bos_token, eos_token, ...: the words that a chat template uses
        self.special_tokens = {n: text for n, text in (defaults | named).items() if text in ids}
        for text in self.special_tokens.values():
            added.setdefault(text, AddedToken(ids[text]))
        self.bos_id = ids.get(self.special_tokens.get("bos_token"))
        self.eos_id = ids.get(self.special_tokens.get("eos_token"))
        self.vocab_size = 1 + max(ids.values())
        self.chat_template = _chat_template(folder, config)
        raw = {text: token for text, token in added.items() if not token.normalized}
        rest = {self.normalize(text, True): t for text, t in added.items() if t.normalized}
        self.added_text = {token.id: text for text, token in (raw | rest).items()}
        # Leftmost first, then longest: an alternation takes its first branch that fits.
        self.raw_pass, self.normalized_pass = (
            (re.compile("|".join(map(re.escape, sorted(x, key=len, reverse=True)))), x)
            for x in (raw, rest)
        )

    prefix_always = False  # also behind special tokens, not only at a text's start

    def normalize(self, text: str, prefix: bool) -> str:
        return text

    def encode(self, text: str, bos=False, eos=False, continuation=False) -> list[int]:
        """Token ids. Special-token text becomes the special id. continuation: not a text's start,
        so no dummy space is put in front. bos and eos do nothing where the tokenizer has none."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        prefix = not continuation
        for special, part in _split_added(text, *self.raw_pass):
            pieces = [(special, part)]
            if special is None:
                pieces = _split_added(self.normalize(part, prefix), *self.normalized_pass)
            for special, piece in pieces:
                ids += self.encode_text(piece, prefix) if special is None else [special]
                prefix = self.prefix_always
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids) -> str:
        """Text. Special tokens show; only the dummy space of a text's start is taken away."""
        parts = []
        for special, run in groupby(map(int, ids), key=self.added_text.__contains__):
            if special:
                parts.extend(self.added_text[i] for i in run)
            else:
                parts.append(self.decode_text(list(run), at_start=not parts))
        return "".join(parts)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt=False) -> str:
        """The text of a dialogue, by the model's own template, else by that of ORPO's authors.

        Raises ValueError where the template is broken, unsafe, or refuses the messages.
        """
        return render_chat_template(
            self.chat_template, messages, add_generation_prompt, self.special_tokens
        )


# White space as Unicode has it, and the tokenizers library: Python's \s takes \x1c to \x1f too.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
_WHITE_SPACE += "".join(map(chr, range(0x2000, 0x200B)))


def _split_added(text: str, pattern: re.Pattern, added: dict):
    """A text in pieces (None, text) and added tokens (id, their text), in order, none empty."""
    start = 0
    for match in pattern.finditer(text) if added else ():
        begin, end = match.span()
        token, touching = added[match[0]], (text[begin - 1 : begin], text[end : end + 1])
        if token.single_word and any(map(_is_word, touching)):
            continue
        if token.lstrip:
            begin = start + len(text[start:begin].rstrip(_WHITE_SPACE))
        if token.rstrip:
            end += len(text[end:]) - len(text[end:].lstrip(_WHITE_SPACE))
        if start < begin:
            yield None, text[start:begin]
        yield token.id, match[0]
        start = end
    if start < len(text):
        yield None, text[start:]


def _is_word(c: str) -> bool:
    r"""\w in the tokenizers library (but for Ⓐ and its like)."""
    category = unicodedata.category(c) if c else "none"
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or c in ("\u200c", "\u200d")


# Appended to a serialised sentencepiece model these bytes override its normaliser, as protobuf
# merges what comes twice: field 3 of the model, in which 3 is add_dummy_prefix and 4
# remove_extra_whitespaces.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_NO_DUMMY_PREFIX_KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model: segmentation by the sentencepiece library."""

    def __init__(self, file: Path, config: dict):
        model = file.read_bytes()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.continuation, self.raw = (
                sentencepiece.SentencePieceProcessor(model_proto=model + override)
                for override in (_NO_DUMMY_PREFIX, _NO_DUMMY_PREFIX_KEEP_SPACES)
            )
        except RuntimeError:
            raise ValueError(f"{file}: not a sentencepiece model, or cut short") from None
        self.adds_dummy_prefix = self.sp.encode("a") != self.raw.encode("a")
        self.strips_spaces = self.sp.encode("  a") == self.sp.encode("a")
        # After a special token only old ("legacy") Llama tokenizers add the dummy space.
        self.prefix_always = bool(config.get("legacy", False))
        n = self.sp.vocab_size()
        pieces = [self.sp.id_to_piece(i) for i in range(n)]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        control = [i for i in range(n) if self.sp.is_control(i) or self.sp.is_unknown(i)]
        added = {pieces[i]: AddedToken(i) for i in control}
        default = {name: getattr(self.sp, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
        default = {f"{name}_token": pieces[i] for name, i in default.items() if i >= 0}
        super().__init__(file.parent, config, vocab, added, default)

    def encode_text(self, text: str, prefix: bool) -> list[int]:
        # Where runs of spaces collapse to one, and leading ones to none, a dummy space in front
        # of a continuation stands for the spaces it begins with.
        prefix |= self.strips_spaces and self.adds_dummy_prefix and text[0] == " "
        return (self.sp if prefix else self.continuation).encode(text)

    def decode_text(self, ids: list[int], at_start: bool) -> str:
        ids = [i for i in ids if 0 <= i < self.sp.vocab_size()]  # a padded embedding has more
        # Only the library knows which of a text's first spaces is the dummy one.
        return (self.sp if at_start else self.raw).decode(ids)


# How published byte-level tokenizers cut a text into words, before any merge. A newly assigned
# letter counts as one from the Unicode version of the running Python on, which may be older, or
# younger, than the tokenizers library's.
_GPT2_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # and OPT, Phi
)
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_WORDS = (_GPT2_WORDS, _QWEN2_WORDS, _LLAMA3_WORDS)
_SUPPORTED = (
    "supported: BPE over bytes with the pre-tokenizer of GPT-2, Qwen2 or Llama 3, and BPE in "
    "sentencepiece's manner (Llama 2, Mistral)"
)


@functools.cache
def _word_pattern(published: str, n_characters: int = sys.maxunicode + 1) -> re.Pattern:
    r"""Python's re has no \p{L} and \p{N}: here they are written out, as ranges of characters."""
    categories = "".join(unicodedata.category(chr(i))[0] for i in range(n_characters))
    members = {r"\s": _WHITE_SPACE, r"\S": "^" + _WHITE_SPACE}
    for major in "LN":
        runs = (m.span() for m in re.finditer(f"{major}+", categories))
        members[rf"\p{{{major}}}"] = "".join(rf"\U{a:08x}-\U{b - 1:08x}" for a, b in runs)

    def write_out(match) -> str:
        text = match[0]
        for name, characters in members.items():
            text = text.replace(name, characters)
        return text if match[0][0] == "[" else f"[{text}]"

    return re.compile(re.sub(r"\[.*?\]|\\p\{.\}|\\[sS]", write_out, published))


def _cut(text: str, published: str) -> list[str]:
    """A text's words. Short ranges, for the commonest texts, make it six times as fast."""
    pattern = _word_pattern(published, 128) if text.isascii() else _word_pattern(published)
    return pattern.findall(text)


# Byte-level pieces are written in printable characters, one for each byte: itself where it is one
# in Latin-1, else the next of those from U+0100 on (so a space is Ġ).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTER_OF = dict(zip(_PRINTABLE, map(chr, _PRINTABLE), strict=True))
_CHARACTER_OF |= {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_BYTE_OF = {character: byte for byte, character in _CHARACTER_OF.items()}
_BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}  # sentencepiece's byte fallback
_PREPEND = {"type": "Prepend", "prepend": "▁"}


class BPETokenizer(Tokenizer):
    """tokenizer.json: byte-pair merges over the bytes of words (GPT-2, Qwen2, Llama 3), or over
    characters with ▁ for a space (Llama 2, Mistral). Its post_processor is not looked at."""

    def __init__(self, file: Path, config: dict, spec: dict):
        self.file, model = file, spec["model"]
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        odd = [option for option in odd if model.get(option)]
        if model.get("type", "BPE") != "BPE" or odd:
            self.refuse("model", [model.get("type"), *odd])
        self.vocab, self.unk = model["vocab"], model.get("unk_token")
        self.fuse_unk, self.byte_fallback = model.get("fuse_unk"), model.get("byte_fallback")
        self.ignore_merges = model.get("ignore_merges")
        self.pieces = {i: piece for piece, i in self.vocab.items()}
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        for a, b in self.ranks:
            if a + b not in self.vocab:
                raise ValueError(f"{file}: a merge gives {a + b!r}, which the vocabulary lacks")
        self.read_steps(*(_steps(spec, p) for p in ("normalizer", "pre_tokenizer")), config)
        self.read_decoder(_steps(spec, "decoder"))
        self.word_ids = functools.lru_cache(maxsize=1 << 16)(self.merge_word)
        added = {t["content"]: _added_token(t, t["id"]) for t in spec.get("added_tokens") or ()}
        # GPT-2's tokenizer_config.json names no special tokens, but the model's has their ids.
        ids = _read_optional(file.parent / "config.json")
        default = {
            f"{name}_token": text
            for name in ("bos", "eos")
            for text, token in added.items()
            if ids.get(f"{name}_token_id") == token.id
        }
        super().__init__(file.parent, config, self.vocab, added, default)
        if not self.byte_level:  # decoded like any piece: a ▁ in one is a space too
            self.pieces, self.added_text = self.pieces | self.added_text, {}

    def refuse(self, part: str, found):
        found = json.dumps(found, ensure_ascii=False)
        raise UnsupportedTokenizer(f"{self.file}: its {part} is {found[:300]}; {_SUPPORTED}")

    def read_steps(self, normalizer: list, pre_tokenizer: list, config: dict):
        """Sets what comes in front of the merges: how a text is normalised, what prefix a text's
        start gets, and `words`, which cuts a text into what merges stay within."""
        self.nfc = normalizer[:1] == [{"type": "NFC"}]
        self.byte_level = self.metaspace = self.prepends = self.marks_spaces = False
        self.prefix = ""
        # transformers builds a LlamaTokenizer anew, by `legacy`, whatever the file says
        llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        legacy = bool(config.get("legacy", not llama))
        mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        match normalizer[self.nfc :], pre_tokenizer:
            case [], [{"type": "ByteLevel", **options}] if options.get("use_regex", True):
                adds = config.get("add_prefix_space")
                if options["add_prefix_space"] if adds is None else adds:
                    self.prefix, self.prefix_always = " ", True
                self.byte_level, self.words = True, functools.partial(_cut, published=_GPT2_WORDS)
            case [], [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", **options},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ] if regex in _WORDS and not options.get("invert"):
                self.byte_level, self.words = True, functools.partial(_cut, published=regex)
            case [], [{"type": "Metaspace", "replacement": "▁", **options}]:
                scheme = options.get("prepend_scheme", "always")
                if scheme != "never" and options.get("add_prefix_space", True):
                    self.prefix, self.prefix_always = "▁", scheme == "always" and legacy
                split = re.compile("▁[^▁]*|[^▁]+").findall
                self.words = split if options.get("split", True) else self.between_spaces()
                self.metaspace = True
            case [*prepend, last], [] if last == mark and prepend in ([], [_PREPEND]):
                self.prepends, self.prefix_always = bool(prepend), bool(prepend) and legacy
                self.marks_spaces, self.words = True, self.between_spaces()
            case _:
                self.refuse("normalizer and pre_tokenizer", [normalizer, pre_tokenizer])

    def normalize(self, text: str, prefix: bool) -> str:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        text = "▁" + text if self.prepends and prefix else text
        return text.replace(" ", "▁") if self.marks_spaces else text

    def between_spaces(self):
        """Here a whole text is one word. But where no merge goes on over a space, cutting in
        front of spaces changes nothing, and then words come again and can be cached."""
        crosses = any("▁" in (a + b).lstrip("▁") for a, b in self.ranks)
        if crosses or "▁" not in self.vocab or self.ignore_merges:
            return lambda text: [text]
        return re.compile("▁*[^▁]+|▁+").findall

    def read_decoder(self, decoder: list):
        """Sets which of the three kinds of decoder it is, and whether it strips the dummy space."""
        self.decoder = decoder[0]["type"] if decoder else None
        self.strips = decoder[-1:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        match decoder[: len(decoder) - self.strips]:
            case [{"type": "ByteLevel"}] if self.byte_level and not self.strips:
                pass
            case [{"type": "Metaspace", "replacement": "▁"}] if self.metaspace and not self.strips:
                pass
            case [replace, {"type": "ByteFallback"}, {"type": "Fuse"}] if not self.byte_level:
                if replace != {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                    self.refuse("decoder", decoder)
            case _:
                self.refuse("decoder", decoder)

    def encode_text(self, text: str, prefix: bool) -> list[int]:
        if self.metaspace:
            text = text.replace(" ", "▁")
        if prefix and not text.startswith(self.prefix):
            text = self.prefix + text
        return list(chain.from_iterable(map(self.word_ids, self.words(text))))

    def merge_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word; what the vocabulary lacks goes in as bytes, else as <unk>."""
        if self.byte_level:
            word = word.encode().decode("latin-1").translate(_CHARACTER_OF)
        if self.ignore_merges and word in self.vocab:
            return (self.vocab[word],)
        symbols = []
        for c in word:
            if c in self.vocab:
                symbols.append(c)
                continue
            in_bytes = [f"<0x{byte:02X}>" for byte in c.encode()] if self.byte_fallback else [None]
            if all(byte in self.vocab for byte in in_bytes):
                symbols += in_bytes
            elif self.unk in self.vocab and not (self.fuse_unk and symbols[-1:] == [self.unk]):
                symbols.append(self.unk)
        return tuple(self.vocab[symbol] for symbol in _merge(symbols, self.ranks))

    def decode_text(self, ids: list[int], at_start: bool) -> str:
        """As the tokenizers library: an id that is nobody's (a padded embedding has such) gives no
        text, bytes that are no UTF-8 give U+FFFD."""
        pieces = [self.pieces.get(i, "") for i in ids]
        if self.decoder == "ByteLevel":
            return b"".join(map(_piece_bytes, pieces)).decode("utf-8", errors="replace")
        if self.decoder == "Metaspace":
            if at_start and self.prefix:
                pieces[0] = pieces[0].replace("▁", "")
            return "".join(pieces).replace("▁", " ")
        text = ""
        for is_byte, run in groupby(pieces, key=_BYTE_PIECES.__contains__):
            if is_byte:
                raw = bytes(map(_BYTE_PIECES.get, run))
                try:
                    text += raw.decode()
                except UnicodeDecodeError:
                    text += "\ufffd" * len(raw)
            else:
                text += "".join(run).replace("▁", " ")
        return text.removeprefix(" ") if self.strips and at_start else text


def _piece_bytes(piece: str) -> bytes:
    return bytes(map(_BYTE_OF.get, piece)) if _BYTE_OF.keys() >= set(piece) else piece.encode()


def _merge(symbols: list[str], ranks: dict) -> list[str]:
    """Joins neighbours, always the pair of lowest rank, the leftmost of several, until none has
    one. A heap of pairs and a linked list of symbols: n log n, even where a page is one word."""
    n = len(symbols)
    before, behind = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, i = heappop(heap)
        j = behind[i]
        if j == n or ranks.get((symbols[i], symbols[j])) != rank:
            continue  # one of the two has been merged with its other neighbour since
        symbols[i] += symbols[j]
        symbols[j] = ""
        k = behind[i] = behind[j]
        if k < n:
            before[k] = i
        for left, right in ((before[i], i), (i, k)):
            if left >= 0 and right < n and (pair := (symbols[left], symbols[right])) in ranks:
                heappush(heap, (ranks[pair], left))
    return [symbol for symbol in symbols if symbol]


def _vocab_and_merges(folder: Path, config: dict) -> dict:
    """GPT-2's older pair of files (and Qwen2's) in the form of a tokenizer.json."""
    kind = str(config.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "CodeGenTokenizer", "Qwen2Tokenizer"):
        problem = f"tokenizer_class {kind} with vocab.json, merges.txt is not supported"
        raise UnsupportedTokenizer(f"{folder}: {problem}; GPT2Tokenizer, Qwen2Tokenizer are")
    vocab, file = _read_optional(folder / "vocab.json"), folder / "merges.txt"
    if not vocab or not file.is_file():
        raise FileNotFoundError(f"{folder}: vocab.json and merges.txt go together; one is missing")
    merges = file.read_text(encoding="utf-8").splitlines()
    special, qwen2 = "<|endoftext|>", kind == "Qwen2Tokenizer"
    cut = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not qwen2}
    return {
        "model": {"vocab": vocab, "merges": [m for m in merges if m and m[:8] != "#version"]},
        "normalizer": {"type": "NFC"} if qwen2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level] if qwen2 else [level]},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"content": special, "id": vocab[special]}] if special in vocab else [],
    }


def _steps(spec: dict, part: str) -> list[dict]:
    """The steps of a Sequence, or the only one, or none."""
    step = spec.get(part) or {"type": "Sequence"}
    names = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    return step.get(names[part], []) if step["type"] == "Sequence" else [step]


# Where a tokenizer has none: each message is tag, content, EOS, newline (xfactlab/orpo).
AUTHORS_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{{ eos_token }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def render_chat_template(template: str, messages, add_generation_prompt, special_tokens) -> str:
    """A Hugging Face chat template (jinja2), in a sandbox: it comes with a download, it is code."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what a model writes: of no effect on the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except Exception as error:  # a template is foreign code: whatever it does is its error
        raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from None


def turn_end(tokenizer) -> str:
    """What the chat template puts behind an answer: EOS, or for instance <|im_end|> before it."""
    asked, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "@@"}
    try:
        text = tokenizer.apply_chat_template([asked, answer])
    except ValueError:
        return ""
    return text.rpartition("@@")[2].strip()


def _chat_template(folder: Path, config: dict) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t.get("name"): t.get("template") for t in template}.get("default")
    return template or AUTHORS_CHAT_TEMPLATE


def _content(token) -> str | None:
    """A special token is written as text or as an AddedToken object."""
    return token.get("content") if isinstance(token, dict) else token


def _read_optional(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    raise ValueError(f"{file}: a JSON object is expected, not {type(value).__name__}")


# ---------------------------------------------------------------------------------------------
# Looking at the data.


def show(pair: Pair, tokenizer, colour: bool = True) -> str:
    """A pair as text, a line a part, token boundaries visible: dim is context, green is made
    likelier, red less likely."""
    lines = []
    what = (
        ("context", "\x1b[2m"),
        ("trained towards", "\x1b[32m"),
        ("trained away from", "\x1b[31m"),
    )
    for name, ids, (role, paint) in zip(Pair._fields, pair, what, strict=True):
        lines.append(f"{name}: {len(ids)} tokens, {role}")
        # Decoded one by one after a fixed token, so that no leading space is taken away.
        head = tokenizer.decode(ids[:1])
        texts = [head] + [tokenizer.decode([ids[0], i])[len(head) :] for i in ids[1:]]
        texts = [text.replace("\n", "\\n") for text in texts]
        lines.append("  " + (paint + "·".join(texts) + "\x1b[0m" if colour else "·".join(texts)))
    return "\n".join(lines)


def use_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


class Parser(argparse.ArgumentParser):
    def error(self, message):  # without the dump of the usage
        raise ValueError(f"{message} (see python data.py --help)")


def main(argv=None):
    parser = Parser(description="Show encoded pairs, coloured by what is trained on.")
    parser.add_argument("file", help="preference rows, JSON Lines")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with the tokenizer")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--max-prompt-length", type=int, default=1792, help="(default: %(default)s)"
    )
    try:
        args = parser.parse_args(argv)
        tokenizer, rows = load_tokenizer(args.model), load_preferences(args.file)
        pairs, _, dropped = encode_rows(tokenizer, rows, args.max_length, args.max_prompt_length)
    except (OSError, ValueError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    for pair in pairs[:3]:
        print(show(pair, tokenizer, use_colour()))
        print()
    print(f"{len(pairs)} pairs of {len(rows)} rows; dropped: {describe(dropped)}")


if __name__ == "__main__":
    main()
