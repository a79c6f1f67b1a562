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
from collections import Counter
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


def load_preferences(path) -> list[Preference]:
    """Reads JSON Lines with prompt, chosen, rejected: strings, or lists of {role, content}.

    Without prompt, or where chosen and rejected are whole dialogues, the prompt is their common
    beginning. Other keys are ignored, but for `accept`, a list of right answers (strings).
    Raises FileNotFoundError, or ValueError that begins with FILE:LINE.
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
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    accept = row.get("accept")
    if accept is not None and not (
        isinstance(accept, list) and all(isinstance(x, str) for x in accept)
    ):
        raise ValueError("accept must be a list of strings")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        if prompt is None:
            prompt = _common_text(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Preference(prompt, chosen, rejected, accept, where)

    for key in ("prompt", "chosen", "rejected"):
        if not (key == "prompt" and isinstance(prompt, str | None)):
            _check_messages(key, row[key])
    if not isinstance(prompt, list):  # whole dialogues; UltraFeedback repeats a string beside them
        n = 0
        while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
            n += 1
        prompt = chosen[:n]
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
    return Preference(prompt, *answers, accept, where)


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


def encode_rows(tokenizer, rows, max_length: int, max_prompt_length: int):
    """All rows -> (pairs, their rows, Counter of drops by reason). ValueError if none is left."""
    encoded = [encode_pair(tokenizer, row, max_length, max_prompt_length) for row in rows]
    dropped = Counter(x for x in encoded if isinstance(x, str))
    kept = [(pair, row) for pair, row in zip(encoded, rows, strict=True) if isinstance(pair, Pair)]
    if not kept:
        raise ValueError(f"no pairs left of {len(rows)} rows: {describe(dropped)}")
    pairs, rows = zip(*kept, strict=True)
    return list(pairs), list(rows), dropped


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

    lengths: list[tuple[int, int, int]]  # (p, c, r) of each pair
    tokens: Tensor  # (N,) int64, runs of [prompt | chosen | rejected]
    positions: Tensor  # (N,) int64; chosen and rejected both go on from the prompt's end
    predict: Tensor  # (P,) int64, the row of the hidden states that predicts ...
    targets: Tensor  # (P,) int64, ... this token
    response: Tensor  # (P,) int64: 2*pair chosen, 2*pair+1 rejected, -1 prompt
    nll_weight: Tensor  # (P,) float32, weight in L_SFT: normalised over the whole step
    response_lengths: Tensor  # (2B,) int64: chosen and rejected of pair 0, of pair 1, ...


def micro_batches(pairs: list[Pair], budget: int, sft_loss: str) -> list[Batch]:
    """One optimizer step's pairs as micro-batches of at most `budget` tokens (see `cut`).

    The weights are the whole step's, so the gradients of the micro-batches simply add up:
    sft_loss "response": 1/(pairs * m) for each of the m tokens of a chosen response;
    sft_loss "full": 1/(such tokens) for every predicted token of prompt and chosen, as in TRL.
    """
    n_tokens = sum(p + c - 1 for p, c, _ in (pair.lengths for pair in pairs))
    return [_pack(part, sft_loss, len(pairs), n_tokens) for part in cut(pairs, budget)]


def cut(pairs: list[Pair], budget: int) -> list[list[Pair]]:
    """Runs of pairs of at most `budget` tokens. A pair is never split: a longer one is alone."""
    parts, size = [], budget
    for pair in pairs:
        n = sum(pair.lengths)
        if size + n > budget or not parts:
            parts.append([])
            size = 0
        parts[-1].append(pair)
        size += n
    return parts


def _pack(pairs: list[Pair], sft_loss: str, n_pairs: int, n_tokens: int) -> Batch:
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
    ints = (tokens, positions, predict, targets, response)
    return Batch(
        [pair.lengths for pair in pairs],
        *(torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in ints),
        torch.from_numpy(np.concatenate(weight).astype(np.float32)),
        torch.tensor([n for pair in pairs for n in pair.lengths[1:]]),
    )


# ---------------------------------------------------------------------------------------------
# The tokenizer. What follows the model's folder: its special tokens, its chat template.


def load_tokenizer(path) -> "SentencePieceTokenizer":
    """From a folder with tokenizer.model (and tokenizer_config.json), or from such a file.

    Raises FileNotFoundError or ValueError with the path.
    """
    path = Path(path)
    file = path / "tokenizer.model" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; supported: sentencepiece's tokenizer.model")
    try:
        return SentencePieceTokenizer(file)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        if str(error).startswith(str(file.parent)):
            raise
        raise ValueError(f"{file.parent}: broken tokenizer files: {error}") from None


# Appended to a serialised sentencepiece model these bytes override its normaliser, as protobuf
# merges what comes twice: field 3 of the model, in which 3 is add_dummy_prefix and 4
# remove_extra_whitespaces.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_NO_DUMMY_PREFIX_KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"


class SentencePieceTokenizer:
    """sentencepiece's segmentation; special tokens and chat template as in transformers."""

    def __init__(self, file: Path):
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

        folder = file.parent
        config = _read_optional(folder / "special_tokens_map.json")
        config |= _read_optional(folder / "tokenizer_config.json")
        self.legacy = bool(config.get("legacy", False))
        n = self.sp.vocab_size()
        pieces = [self.sp.id_to_piece(i) for i in range(n)]
        special = {pieces[i]: i for i in range(n) if self.sp.is_control(i) or self.sp.is_unknown(i)}
        added = _read_optional(folder / "added_tokens.json")  # {text: id}
        for i, token in config.get("added_tokens_decoder", {}).items():
            added[_content(token)] = int(i)
        special |= added
        ids = {piece: i for i, piece in enumerate(pieces)} | special
        self.special_tokens = {}  # bos_token, eos_token, ...: the words that a chat template uses
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            i = getattr(self.sp, name.replace("token", "id"))()
            text = _content(config[name]) if name in config else pieces[i] if i >= 0 else None
            if text in ids:
                self.special_tokens[name] = text
                special[text] = ids[text]
        self.bos_id = ids.get(self.special_tokens.get("bos_token"))
        self.eos_id = ids.get(self.special_tokens.get("eos_token"))
        self.vocab_size = 1 + max([n - 1, *special.values()])
        self.special = special
        self.special_text = {i: text for text, i in special.items()}
        # Leftmost first, then longest: an alternation takes its first branch that fits.
        longest_first = sorted(special, key=len, reverse=True)
        self.split = re.compile(
            "(" + "|".join(re.escape(text) for text in longest_first) + ")"
        ).split
        self.chat_template = _chat_template(folder, config)

    def encode(self, text: str, bos=False, eos=False, continuation=False) -> list[int]:
        """Token ids. Special-token text becomes the special id. continuation: not a text's start,
        so no dummy space is put in front. bos and eos do nothing where the tokenizer has none."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for i, part in enumerate(self.split(text)):
            if i % 2:
                ids.append(self.special[part])
            elif part:
                # After a special token only old ("legacy") Llama tokenizers add the dummy space.
                starts = not continuation if i == 0 else self.legacy
                # Where runs of spaces collapse to one, and leading ones to none, a dummy space
                # in front of a continuation stands for the spaces it begins with.
                starts |= self.strips_spaces and self.adds_dummy_prefix and part[0] == " "
                ids += (self.sp if starts else self.continuation).encode(part)
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids) -> str:
        """Text. Special tokens show; only the dummy space of a text's start is taken away."""
        ids, text, run = [int(i) for i in ids], "", []
        for i in [*ids, None]:
            if i is not None and i not in self.special_text:
                if not 0 <= i < self.sp.vocab_size():
                    raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
                run.append(i)
                continue
            # Only the library knows which of a text's first spaces is the dummy one.
            text += (self.raw if text else self.sp).decode(run) if run else ""
            run = []
            text += "" if i is None else self.special_text[i]
        return text

    def apply_chat_template(self, messages: list[dict], add_generation_prompt=False) -> str:
        """The text of a dialogue, by the model's own template, else by that of ORPO's authors.

        Raises ValueError where the template is broken, unsafe, or refuses the messages.
        """
        return render_chat_template(
            self.chat_template, messages, add_generation_prompt, self.special_tokens
        )


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
        print(show(pair, tokenizer, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
        print()
    print(f"{len(pairs)} pairs of {len(rows)} rows; dropped: {describe(dropped)}")


if __name__ == "__main__":
    main()
