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
import functools
import json
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from heapq import heapify, heappop, heappush
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import jinja2.sandbox
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
    expected = "UTF-8 text, a JSON object a line, is expected (examples/prepare.py makes it)"
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {problem}; {expected}")
    rows, content = [], path.read_bytes()
    if content.startswith((b"PAR1", b"\x1f\x8b")):
        raise ValueError(f"{path}: is a parquet or gzip file; {expected}")
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                json.dumps(row, ensure_ascii=False).encode("utf-8")  # not so half a surrogate pair
                rows.append(_preference(row, f"{path}:{number}"))
            except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}; {expected}") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error!s:.300}") from None
    if not rows:
        raise ValueError(f"{path}: the file has no rows; {expected}")
    return rows


def _preference(row, where: str) -> Preference:
    if not isinstance(row, dict):
        hint = " (examples/prepare.py reads such a file)" if isinstance(row, list) else ""
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}{hint}")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"key {key!r} is missing; the row has {sorted(row)}")
        if not isinstance(row[key], str | list):
            raise ValueError(f"{key} must be text or a list of messages, not {row[key]!r:.30}")
    name = next((key for key in ("prompt", "instruction", "question") if key in row), "prompt")
    prompt, chosen, rejected, accept = map(row.get, (name, "chosen", "rejected", "accept"))
    if not isinstance(accept, list | None) or not all(isinstance(x, str) for x in accept or ()):
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
        same = [a == b for a, b in zip(chosen[:-1], rejected[:-1], strict=False)]
        prompt, form = chosen[: [*same, False].index(False)], "dialogues with a common beginning"
    answers = []
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        answer = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
        if not prompt or len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = [m["role"] for m in messages]
            wanted = "the prompt's messages and one assistant message more, or that message alone"
            raise ValueError(f"{key} must be {wanted}; it is {roles} after {len(prompt)} messages")
        answers.append(answer)
    return Preference(prompt, *answers, accept, where, form)


def _check_messages(key: str, messages):
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key} must be text or a list of messages, like its neighbours")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or {type(m.get(x)) for x in ("role", "content")} != {str}:
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
    prompt_text, texts = row.prompt, (row.chosen, row.rejected)
    if not isinstance(prompt_text, str):
        try:
            prompt_text = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)
            full = [tokenizer.apply_chat_template(row.prompt + answer) for answer in texts]
            if not all(text.startswith(prompt_text) for text in full):
                raise ValueError("the chat template changes the prompt once it is answered")
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
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
    return ids if tokenizer.bos_id in (None, *ids[:1]) else [tokenizer.bos_id, *ids]


def encode_rows(tokenizer, rows, max_length: int, max_prompt_length: int, progress=iter):
    """All rows -> (pairs, their rows, Counter of drops by reason). ValueError if none is left."""
    encoded = [encode_pair(tokenizer, row, max_length, max_prompt_length) for row in progress(rows)]
    dropped = Counter(x for x in encoded if isinstance(x, str))
    kept = [(pair, row) for pair, row in zip(encoded, rows, strict=True) if isinstance(pair, Pair)]
    if not kept:
        raise ValueError(f"no pairs left of {len(rows)} rows: {describe(dropped)}")
    return [pair for pair, _ in kept], [row for _, row in kept], dropped


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


def micro_batches(
    pairs: list[Pair], budget: int, sft_loss: str, multiple: int = 1, rank: int = 0, world: int = 1
) -> list[Batch]:
    """One optimizer step's pairs as micro-batches of at most `budget` tokens (see `cut`).

    Of several processes each gets its own share, in as many micro-batches as all the others, as
    they may have to compute together: an empty one where it has no pair.

    Tokens and predictions are filled up to a multiple of `multiple`, where kernels want that: by a
    run of token 0 that nobody sees, and by predictions without weight.

    The weights are the whole step's, so the gradients of all micro-batches simply add up:
    sft_loss "response": 1/(pairs * m) for each of the m tokens of a chosen response;
    sft_loss "full": 1/(such tokens) for every predicted token of prompt and chosen, as in TRL.
    """
    n_tokens = sum(p + c - 1 for p, c, _ in (pair.lengths for pair in pairs))
    shares = [cut(share, budget) for share in deal(pairs, world)]
    parts = shares[rank] + [[]] * (max(map(len, shares)) - len(shares[rank]))
    return [_pack(part, sft_loss, len(pairs), n_tokens, multiple) for part in parts]


def deal(pairs: list[Pair], world: int) -> list[list[Pair]]:
    """A share for each process: the longest pair first, each to whom has the fewest tokens yet.

    Within a share the order stays.
    """
    shares, tokens = [[] for _ in range(world)], [0] * world
    for i in sorted(range(len(pairs)), key=lambda i: -pairs[i].n_tokens):
        least = tokens.index(min(tokens))
        shares[least].append(i)
        tokens[least] += pairs[i].n_tokens
    return [[pairs[i] for i in sorted(share)] for share in shares]


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
        first = 1 if full else p  # of prompt and chosen, the first token with a weight in L_SFT
        tokens += [pair.prompt, pair.chosen, pair.rejected]
        positions += [np.arange(p + c), np.arange(p, p + r)]
        # The last prompt token predicts the first token of both responses.
        predict += [np.arange(start + first - 1, last + c), [last]]
        predict += [np.arange(rejected, rejected + r - 1)]
        targets += [pair.prompt[first:], pair.chosen, pair.rejected]
        response += [np.full(p - first, -1), np.full(c, 2 * i), np.full(r, 2 * i + 1)]
        weight += [np.full(p - first + c, 1 / (n_tokens if full else n_pairs * c)), np.zeros(r)]
        start = rejected + r
    lengths = [pair.lengths for pair in pairs]
    if fill := -start % multiple if pairs else multiple:  # kernels want one token at least
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
        torch.tensor([n for pair in pairs for n in pair.lengths[1:]], dtype=torch.int64),
    )


# ---------------------------------------------------------------------------------------------
# The tokenizer. What follows the model's folder: its special tokens, its chat template.


class UnsupportedTokenizer(ValueError):
    """A sound file of a kind that is not implemented here."""


def _refuse(file: Path, part: str, found):
    found = json.dumps(found, ensure_ascii=False)[:300]
    supported = "BPE over bytes with the pre-tokenizer of GPT-2, Qwen2 or Llama 3, and BPE in "
    supported += "sentencepiece's manner (Llama 2, Mistral); added tokens without lstrip, rstrip"
    raise UnsupportedTokenizer(f"{file}: its {part} is {found}; supported: {supported}")


def load_tokenizer(path) -> "Tokenizer":
    """From a folder: tokenizer.json, else tokenizer.model, else vocab.json and merges.txt; or from
    one of these files. A tokenizer.json of another kind leaves the word to tokenizer.model.
    Raises FileNotFoundError or ValueError with the path."""
    path = Path(path)
    files = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()] or [path / "vocab.json"]
    if not files[0].is_file():
        names = "tokenizer.json, vocab.json with merges.txt, or sentencepiece's tokenizer.model"
        raise FileNotFoundError(f"{path}: needs {names}: none is there")
    for file in files:
        try:
            config = _read_optional(file.parent / "special_tokens_map.json")
            config |= _read_optional(file.parent / "tokenizer_config.json")
            if file.name in ("vocab.json", "merges.txt"):
                return BPETokenizer(file, config, _vocab_and_merges(file.parent, config))
            if file.suffix == ".json":
                return BPETokenizer(file, config, _read_optional(file))
            return SentencePieceTokenizer(file, config)
        except UnsupportedTokenizer:
            if file == files[-1]:
                raise
        except OSError:
            raise
        except Exception as error:  # files are foreign: they can be broken in any way
            problem = f"{type(error).__name__}: {error!s:.300}"
            raise ValueError(f"{path}: broken tokenizer: {problem}") from None


class Tokenizer:
    """What all kinds share: special tokens, beginnings, the chat template, as in transformers.

    A kind has encode_text(text, prefix) and decode_text(ids, at_start).
    `prefix`: put the space in front that the kind wants at a text's start ("dummy space").
    """

    prefix_always = False  # also behind special tokens, not only at a text's start
    odd_flags = "single_word", "lstrip", "rstrip"  # of added tokens: not implemented

    def __init__(self, file: Path, config: dict, vocab: dict, added: list[dict], defaults: dict):
        """vocab: {piece: id}; added: tokens beside it, [{"content", "id", flags}]; defaults, where
        the config says nothing: {"bos_token": id, ...} (where it says null, there is none)."""
        more = _read_optional(file.parent / "added_tokens.json").items()
        added = [{"content": text, "id": i} for text, i in more] + added
        added += [token | {"id": i} for i, token in config.get("added_tokens_decoder", {}).items()]
        for t in added:
            changes = t.get("normalized") and not unicodedata.is_normalized("NFC", t["content"])
            if changes or any(map(t.get, self.odd_flags)):
                _refuse(file, "added token", t)
        self.added = {t["content"]: int(t["id"]) for t in added}  # the text, anywhere, is the id
        ids = vocab | self.added
        # bos_token, eos_token, ...: the words that a chat template uses
        names = {name: t for name, i in defaults.items() for t in self.added if ids[t] == i}
        for name, token in config.items():
            if name.endswith("_token"):
                names[name] = token["content"] if isinstance(token, dict) else token
        self.special_tokens = {name: text for name, text in names.items() if text in ids}
        self.added |= {text: ids[text] for text in self.special_tokens.values()}
        self.bos_id = ids.get(self.special_tokens.get("bos_token"))
        self.eos_id = ids.get(self.special_tokens.get("eos_token"))
        for text, i in ids.items():
            if type(i) is not int or not 0 <= i < 2**31:
                raise ValueError(f"token {text!r:.80} has the id {i!r:.80}")
        "".join(ids).encode()  # half a surrogate pair has no bytes: an error
        self.vocab_size = 1 + max(ids.values())
        jinja = file.parent / "chat_template.jinja"
        template = jinja.read_text("utf-8") if jinja.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        self.chat_template = template or AUTHORS_CHAT_TEMPLATE
        self.texts = {i: text for text, i in self.added.items()}
        # Leftmost first, then longest: an alternation takes its first branch that fits.
        longest_first = map(re.escape, sorted(self.added, key=len, reverse=True))
        self.added_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def encode(self, text: str, bos=False, eos=False, continuation=False) -> list[int]:
        """Token ids. Special-token text becomes the special id. continuation: not a text's start,
        so no dummy space is put in front. bos and eos do nothing where the tokenizer has none."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        prefix = not continuation
        for part in filter(None, self.added_pattern.split(text)):
            ids += [self.added[part]] if part in self.added else self.encode_text(part, prefix)
            prefix = self.prefix_always
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids) -> str:
        """Text. Special tokens show; only the dummy space of a text's start is taken away."""
        parts = []
        for special, run in groupby(map(int, ids), key=self.texts.__contains__):
            if special:
                parts += map(self.texts.get, run)
            else:
                parts.append(self.decode_text(list(run), at_start=not parts))
        return "".join(parts)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt=False) -> str:
        """The text of a dialogue, by the model's own template, else by that of ORPO's authors.
        Raises ValueError where the template is broken, unsafe, or refuses the messages."""
        template, known = self.chat_template, self.special_tokens
        return render_chat_template(template, messages, add_generation_prompt, known)


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model: segmentation by the sentencepiece library."""

    def __init__(self, file: Path, config: dict):
        # Behind a serialised model these bytes switch off, in its normaliser, add_dummy_prefix (3),
        # and remove_extra_whitespaces (4) as well: protobuf merges what comes twice.
        overrides = b"", b"\x1a\x02\x18\x00", b"\x1a\x04\x18\x00\x20\x00"
        try:
            self.sp, self.continuation, self.raw = (
                sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes() + override)
                for override in overrides
            )
        except RuntimeError:
            raise ValueError(f"{file.name}: not a sentencepiece model, or cut short") from None
        self.strips_spaces = self.sp.encode("  a") == self.sp.encode("a")
        # After a special token only old ("legacy") Llama tokenizers add the dummy space.
        self.prefix_always = bool(config.get("legacy", False))
        vocab = {self.sp.id_to_piece(i): i for i in range(self.sp.vocab_size())}
        control = {p: i for p, i in vocab.items() if self.sp.is_control(i) or self.sp.is_unknown(i)}
        added = [{"content": piece, "id": i} for piece, i in control.items()]
        names = ("bos", "eos", "unk", "pad")
        defaults = {f"{name}_token": getattr(self.sp, f"{name}_id")() for name in names}
        super().__init__(file, config, vocab, added, defaults)

    def encode_text(self, text: str, prefix: bool) -> list[int]:
        # Where runs of spaces collapse to one, and leading ones to none, a dummy space in front
        # of a continuation stands for the spaces it begins with.
        prefix |= self.strips_spaces and text[0] == " "
        return (self.sp if prefix else self.continuation).encode(text)

    def decode_text(self, ids: list[int], at_start: bool) -> str:
        ids = [i for i in ids if 0 <= i < self.sp.vocab_size()]  # a padded embedding has more
        # Only the library knows which of a text's first spaces is the dummy one.
        return (self.sp if at_start else self.raw).decode(ids)


# How published byte-level tokenizers cut a text into words, before any merge; OPT and Phi as GPT-2.
# A newly assigned letter counts as one from the Unicode version of the running Python on, which may
# be older, or younger, than the tokenizers library's.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# White space as Unicode has it, and the tokenizers library: Python's takes \x1c to \x1f too.
_WHITE_SPACE = re.sub("[\x1c-\x1f]", "", "".join(c for c in map(chr, range(0x3001)) if c.isspace()))


@functools.cache
def _word_pattern(published: str, n_characters: int = sys.maxunicode + 1) -> re.Pattern:
    r"""Python's re has no \p{L} and \p{N}: here they are written out, as ranges of characters."""
    categories = "".join(unicodedata.category(chr(i))[0] for i in range(n_characters))
    members = {r"\s": _WHITE_SPACE, r"\S": "^" + _WHITE_SPACE}
    for major in "LN":
        runs = (m.span() for m in re.finditer(f"{major}+", categories))
        members[rf"\p{{{major}}}"] = "".join(rf"\U{a:08x}-\U{b - 1:08x}" for a, b in runs)
    # What stands outside of brackets gets its own.
    pattern = re.sub(r"(\\p\{.\}|\\[sS])(?![^\[]*\])", r"[\1]", published)
    for name, characters in members.items():
        pattern = pattern.replace(name, characters)
    return re.compile(pattern)


def _cut(text: str, published: str) -> list[str]:
    """A text's words. Short ranges, for the commonest texts, make it six times as fast."""
    pattern = _word_pattern(published, 128) if text.isascii() else _word_pattern(published)
    return pattern.findall(text)


# Byte-level pieces are written in printable characters, one for each byte: itself where it is one
# in Latin-1, else the next of those from U+0100 on (so a space is Ġ).
_CHARACTER_OF = {i: chr(i) for i in range(256) if chr(i).isprintable() and chr(i) != " "}
_OTHERS = [byte for byte in range(256) if byte not in _CHARACTER_OF]
_CHARACTER_OF |= {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_BYTE_OF = {character: bytes([byte]) for byte, character in _CHARACTER_OF.items()}
_BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}  # sentencepiece's byte fallback
_LLAMA2_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


class BPETokenizer(Tokenizer):
    """tokenizer.json: byte-pair merges over the bytes of words (GPT-2, Qwen2, Llama 3), or over
    characters with ▁ for a space (Llama 2, Mistral). Its post_processor is not looked at."""

    def __init__(self, file: Path, config: dict, spec: dict):
        model = spec["model"]
        odd = [*filter(model.get, ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))]
        if model.get("type", "BPE") != "BPE" or odd:
            _refuse(file, "model", [model.get("type"), *odd])
        self.vocab, self.ignore_merges = model["vocab"], model.get("ignore_merges")
        self.pieces = {i: piece for piece, i in self.vocab.items()}
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        for a, b in self.ranks:
            if not a or not b or a + b not in self.vocab:
                raise ValueError(f"{file.name}: merging {a!r} and {b!r} gives no token")
        steps = (_steps(spec, part) for part in ("normalizer", "pre_tokenizer", "decoder"))
        self.read_steps(file, config, *steps)
        alphabet = set(_BYTE_OF if self.byte_level else [*_BYTE_PIECES, "▁"])
        if not (self.byte_level or model.get("byte_fallback")) or not alphabet <= self.vocab.keys():
            _refuse(file, "model", "without byte_fallback, or without a piece for each byte")
        self.word_ids = functools.lru_cache(maxsize=1 << 16)(self.merge_word)
        # GPT-2's tokenizer_config.json names no special tokens, but the model's has their ids.
        ids = _read_optional(file.parent / "config.json")
        defaults = {name: ids.get(f"{name}_id") for name in ("bos_token", "eos_token")}
        super().__init__(file, config, self.vocab, spec.get("added_tokens") or [], defaults)
        if not self.byte_level:  # decoded like any piece: a ▁ in one is a space too
            self.pieces, self.texts = self.pieces | self.texts, {}

    def read_steps(self, file: Path, config: dict, normalizer, pre_tokenizer, decoder):
        """Sets what comes in front of the merges: NFC, the dummy space, and `words`, which cuts a
        text into what merges stay within."""
        # transformers builds a LlamaTokenizer anew, by `legacy`, whatever the file says
        llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
        legacy = bool(config.get("legacy", not llama))
        self.nfc, self.doubles = normalizer == [{"type": "NFC"}], False
        self.byte_level = decoder != _LLAMA2_DECODER
        if self.byte_level and [step["type"] for step in decoder] != ["ByteLevel"]:
            _refuse(file, "decoder", decoder)
        asked = {"add_prefix_space": True} if config.get("add_prefix_space") else {}
        steps = [{"use_regex": True} | step | asked for step in pre_tokenizer]
        match self.byte_level, normalizer[self.nfc :], steps:
            case True, [], [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
                self.words = functools.partial(_cut, published=_GPT2_WORDS)
            case True, [], [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", **options},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ] if regex in (_GPT2_WORDS, _QWEN2_WORDS, _LLAMA3_WORDS) and not options.get("invert"):
                self.words = functools.partial(_cut, published=regex)
            case False, [], [
                {"type": "Metaspace", "replacement": "▁", "split": False, **options}
            ] if options.get("prepend_scheme") in ("first", "always"):
                self.prefix_always = legacy and options["prepend_scheme"] == "always"
            case False, [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ], []:
                self.prefix_always, self.doubles = legacy, True
                self.odd_flags += () if llama else ("normalized",)
            case _:
                _refuse(file, "normalizer and pre_tokenizer", [normalizer, pre_tokenizer, asked])
        if not self.byte_level:
            # A whole text is one word. But where no merge goes on over a space, cutting in front of
            # spaces changes nothing, and then words come again and can be cached.
            crosses = self.ignore_merges or any("▁" in (a + b).lstrip("▁") for a, b in self.ranks)
            self.words = re.compile("(?s:.+)" if crosses else "▁*[^▁]+|▁+").findall

    def encode_text(self, text: str, prefix: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if not self.byte_level:
            dummy = prefix and (self.doubles or text[0] not in " ▁")
            text = "▁" * dummy + text.replace(" ", "▁")
        return list(chain.from_iterable(map(self.word_ids, self.words(text))))

    def merge_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word; a character that the vocabulary lacks goes in as its bytes."""
        if self.byte_level:
            word = word.encode().decode("latin-1").translate(_CHARACTER_OF)
        if self.ignore_merges and word in self.vocab:
            return (self.vocab[word],)
        symbols = []
        for c in word:
            symbols += [c] if c in self.vocab else [f"<0x{byte:02X}>" for byte in c.encode()]
        return tuple(self.vocab[symbol] for symbol in _merge(symbols, self.ranks))

    def decode_text(self, ids: list[int], at_start: bool) -> str:
        """As the tokenizers library: an id that is nobody's (a padded embedding has such) gives no
        text, bytes that are no UTF-8 give U+FFFD."""
        pieces = [self.pieces.get(i, "") for i in ids]
        if self.byte_level:
            raw = b"".join(_BYTE_OF.get(c) or c.encode() for c in "".join(pieces))
            return raw.decode("utf-8", errors="replace")
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
        return text.removeprefix(" ") if at_start else text


def _merge(symbols: list[str], ranks: dict) -> list[str]:
    """Joins neighbours, always the pair of lowest rank, the leftmost of several, until none has
    one. A heap of pairs and a linked list of symbols: n log n, even where a page is one word."""
    n = len(symbols)
    symbols = [*symbols, ""]  # no pair has "": it ends the text and, as number -1, begins it
    before, behind = list(range(-1, n)), list(range(1, n + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, i = heappop(heap)
        j = behind[i]
        if ranks.get((symbols[i], symbols[j])) != rank:
            continue  # one of the two has been merged with its other neighbour since
        symbols[i] += symbols[j]
        symbols[j] = ""
        k = behind[i] = behind[j]
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
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut] * qwen2 + [level]},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"content": special, "id": vocab[special]}] if special in vocab else [],
    }


def _steps(spec: dict, part: str) -> list[dict]:
    """The steps of a Sequence (pre_tokenizer: pretokenizers), or the only one, or none."""
    step = spec.get(part) or {"type": "Sequence"}
    return step.get(part.replace("_", "") + "s", []) if step["type"] == "Sequence" else [step]


# Where a tokenizer has none: each message is tag, content, EOS, newline (xfactlab/orpo).
AUTHORS_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{{ eos_token }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def render_chat_template(template: str, messages, add_generation_prompt, special_tokens) -> str:
    """A Hugging Face chat template (jinja2), in a sandbox: it comes with a download, it is code."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # jinja2's own tojson escapes HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    try:
        # {% generation %} marks what a model writes: of no effect on the text.
        template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template)
        template = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", template)
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        given |= {"tools": None, "documents": None, **special_tokens}
        return environment.from_string(template).render(given)
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


def _read_optional(file: Path) -> dict:
    try:
        value = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file.name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.name}: a JSON object is expected, not {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------------
# Looking at the data.


def show(pair: Pair, tokenizer, colour: bool = True) -> str:
    """A pair as text, tokens set apart: dim is context, green made likelier, red less likely."""
    lines, roles = [], ("context", "trained towards", "trained away from")
    for name, ids, role, paint in zip(Pair._fields, pair, roles, (2, 32, 31), strict=True):
        lines.append(f"{name}: {len(ids)} tokens, {role}")
        # Decoded one by one after a fixed token, so that no leading space is taken away.
        head = tokenizer.decode(ids[:1])
        texts = [head] + [tokenizer.decode([ids[0], i])[len(head) :] for i in ids[1:]]
        text = "·".join(texts).replace("\n", "\\n")
        lines.append(f"  \x1b[{paint}m{text}\x1b[0m" if colour else f"  {text}")
    return "\n".join(lines)


def use_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def main(argv=None):
    """Prints three pairs as they are trained on, and how many are dropped, why."""

    def complain(message):  # without the dump of the usage
        raise ValueError(f"{message} (see python data.py --help)")

    parser = argparse.ArgumentParser(description="Shows pairs, coloured by what is trained on.")
    parser.error = complain
    parser.add_argument("file", help="preference rows, JSON Lines")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with the tokenizer")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens (2048)")
    parser.add_argument("--max-prompt-length", type=int, default=1792, help="tokens (1792)")
    try:
        args = parser.parse_args(argv)
        tokenizer, rows = load_tokenizer(args.model), load_preferences(args.file)
        pairs, _, dropped = encode_rows(tokenizer, rows, args.max_length, args.max_prompt_length)
    except (OSError, ValueError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    for pair in pairs[:3]:
        print(show(pair, tokenizer, use_colour()), end="\n\n")
    print(f"{len(pairs)} pairs of {len(rows)} rows; dropped: {describe(dropped)}")


if __name__ == "__main__":
    main()
