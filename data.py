"""From preference rows to packed micro-batches of plain tensors.

    one pair            [ prompt p0..p9 | chosen c0..c5 | rejected r0..r3 ]
    positions             0 ........ 9    10 ...... 15    10 ..... 13
    predicted by          (nothing) p0..   p9 c0 .. c4     p9 r0 .. r2

    a micro-batch       such runs end to end: no padding, each prompt computed once (attention.py
                        says which tokens see which)

A prompt is tokenised once and a response as its continuation, so the shared prefix really is
shared, and training sees the tokens that generation will see.

    rows    load_preferences(file)       JSON Lines -> Preference (formats/rows.py)
    pairs   encode_pair(...)             -> Pair; the one place that truncates and drops
            encode_pairs(...)            all rows of a file
    steps   step_pairs(...)              which pairs come when: a function of seed and step
    batches micro_batches(...)           -> Batch: tensors, and how much every token counts

Look at your own data before training on it:  python data.py FILE --model DIR
"""

import argparse
import functools
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention import Segments, to_device
from formats.chat_template import left_out, where_they_part
from formats.files import model_folder
from formats.messages import says
from formats.rows import Preference, load_preferences, warnings_of
from formats.tokenizer import load_tokenizer
from model import ModelConfig

# ---------------------------------------------------------------------------------------------
# Pairs.


class Pair(NamedTuple):
    """Token ids, each (length,) int32. The prompt has BOS in front, a response EOS at its end
    unless it was cut to fit."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    where: str = ""  # FILE:LINE
    accept: list[str] | None = None  # answers that count as right, where they can be listed
    chat: bool = False  # written as messages, which went through the chat template
    cut: tuple[bool, bool] = (False, False)  # chosen, rejected: so long that the end, EOS, is lost
    n_bos: int = 0  # responses that began with BOS, which is left out
    left_out: tuple[str, ...] = ()  # what of its messages the chat template did not write

    @property
    def lengths(self) -> tuple[int, int, int]:
        return len(self.prompt), len(self.chosen), len(self.rejected)

    @property
    def n_tokens(self) -> int:
        """Tokens of the packed run; the prompt counts once."""
        return sum(self.lengths)


def encode_prompt(tokenizer, text: str, chat: bool = False) -> list[int]:
    """A prompt as the model sees it: BOS once in front, also where a template wrote it already.

    chat: the text is a chat template's. Then BOS goes in as text, as the template writes it that is
    saved with the model, because some tokenizers encode the start of a text in another way.
    """
    bos = tokenizer.special_tokens.get("bos_token", "") if chat else ""
    ids = tokenizer.encode(text if text.startswith(bos) else bos + text)
    if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id]:
        return ids
    return [tokenizer.bos_id, *ids]


class Texts(NamedTuple):
    """A row as text, ready to be tokenised."""

    prompt: str
    responses: list[str]  # chosen, rejected
    left_out: tuple[str, ...] = ()  # what of its messages the chat template did not write


CHANGED = "the chat template changes the prompt once it is answered"
NO_PROMPT = "the chat template writes nothing of the prompt"


def texts_of(tokenizer, row: Preference) -> Texts:
    """Raises ValueError where the chat template fails, or rewrites the prompt once it is answered,
    or loses it."""
    if isinstance(row.prompt, str):
        return Texts(row.prompt, [row.chosen, row.rejected])
    prompt, *full = rendered(tokenizer, row)
    if not all(text.startswith(prompt) for text in full):
        raise ValueError(CHANGED)
    responses = [text[len(prompt) :] for text in full]
    missing = left_out(row.prompt, prompt)
    if missing and len(missing) == len(left_out(row.prompt, "")):
        raise ValueError(NO_PROMPT)
    if row.tools and left_out([{"role": "", "tools": row.tools}], prompt):
        missing.append("tools")
    missing += tokenizer.unused(row.template_kwargs or {})
    for answer, text in zip((row.chosen, row.rejected), responses, strict=True):
        missing += left_out(answer, text)
    return Texts(prompt, responses, tuple(dict.fromkeys(missing)))


def rendered(tokenizer, row: Preference) -> list[str]:
    """What the chat template makes of the prompt, and of the prompt with each answer."""
    answered = (row.prompt + answer for answer in (row.chosen, row.rejected))
    apply = functools.partial(tokenizer.apply_chat_template, **row.for_template)
    return [apply(row.prompt, True), *map(apply, answered)]


def encode_pair(tokenizer, row: Preference, max_length: int, max_prompt_length: int) -> Pair | str:
    """The tokens of a row, or the reason why it is dropped.

    Each response is cut by its own length, so that prompt and response fit max_length.
    """
    try:
        texts = texts_of(tokenizer, row)
    except ValueError as error:
        return str(error)
    chat = not isinstance(row.prompt, str)
    prompt = encode_prompt(tokenizer, texts.prompt, chat)
    said = [says(x[0]) if chat else x.strip() for x in (row.chosen, row.rejected)]
    (chosen, had_bos), (rejected, had_bos_too) = (
        encode_response(tokenizer, x, prompt) for x in texts.responses
    )
    if not all(said):  # a template writes something around it all the same
        return "empty response"
    if not (chosen and rejected):
        return "the chat template writes nothing of a response" if chat else "empty response"
    if tokenizer.eos_id is not None:
        chosen, rejected = [*chosen, tokenizer.eos_id], [*rejected, tokenizer.eos_id]
    if chosen == rejected:
        if chat and row.chosen != row.rejected:
            return "identical responses, as the chat template leaves out what differs"
        return "identical responses"
    asked = [m for m in row.prompt if m["role"] != "system"] if chat else []
    if not prompt or (asked and not any(map(says, asked))):
        return "empty prompt"
    if len(prompt) > max_prompt_length:
        return f"prompt over {max_prompt_length} tokens"
    room = max_length - len(prompt)
    if room < 1:
        return f"prompt leaves no room in {max_length} tokens"
    if chosen[:room] == rejected[:room]:
        return f"identical once cut to {max_length} tokens"
    arrays = (np.array(ids, np.int32) for ids in (prompt, chosen[:room], rejected[:room]))
    cut, n_bos = (len(chosen) > room, len(rejected) > room), had_bos + had_bos_too
    return Pair(*arrays, row.where, row.accept, chat, cut, n_bos, texts.left_out)


def encode_response(tokenizer, text: str, prompt: list[int]) -> tuple[list[int], bool]:
    """The response to a prompt, without BOS and EOS, and whether it began with BOS.

    EOS counts as the end where only white space follows, as a template writes it, which is never
    generated. Any other is text of the answer, for instance one that is about HTML.
    """
    ids = tokenizer.encode(text, continuation=True, after=prompt)
    had_bos = tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
    if had_bos:
        ids = ids[1:]
    while tokenizer.eos_id in ids:
        last = len(ids) - 1 - ids[::-1].index(tokenizer.eos_id)
        if tokenizer.decode(ids[last + 1 :]).strip():
            break
        ids = ids[:last]
    return ids, had_bos


class Dropped(Counter):
    """How many rows were dropped, by reason, and where the first of each is."""

    def __init__(self):
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, reason: str, tokenizer, row: Preference):
        self[reason] += 1
        if reason not in self.first:
            self.first[reason] = f"first: {row.where}"
            if reason == CHANGED:
                self.first[reason] += f", {where_they_part(*rendered(tokenizer, row))}"

    def __str__(self):
        reasons = [f"{n} {reason} ({self.first[reason]})" for reason, n in self.most_common(10)]
        others = self.total() - sum(n for _, n in self.most_common(10))
        return ", ".join(reasons + [f"{others} for other reasons"] * bool(others)) or "none"


def encode_pairs(
    tokenizer, rows: list[Preference], max_length: int, max_prompt_length: int, progress=iter
) -> tuple[list[Pair], Dropped]:
    """The pairs of a file's rows, and how many rows were dropped for which reason.

    max_length: at most the model's context. Raises ValueError with the file's name if none is left.
    """
    pairs, dropped = [], Dropped()
    for row in progress(rows):
        pair = encode_pair(tokenizer, row, max_length, max_prompt_length)
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            dropped.add(pair, tokenizer, row)
    if rows and not pairs:
        raise ValueError(f"{rows[0].file}: no pairs left of {len(rows)} rows: {dropped}")
    return pairs, dropped


def refuse_beyond(pairs: list[Pair], tokenizer, vocab_size: int):
    """Raises ValueError with the first row that has a token which the embedding lacks."""
    for pair in pairs if tokenizer.vocab_size > vocab_size else ():
        i = max(int(ids.max()) for ids in pair[:3])
        if i >= vocab_size:
            raise ValueError(
                f"{pair.where}: has the token {tokenizer.decode([i])!r}, {i}, and the embedding "
                f"ends with {vocab_size - 1}: this tokenizer is not the model's"
            )


def summary(rows: list[Preference], pairs: list[Pair], dropped: Dropped, max_length: int):
    """What there is to say of a file's rows and their pairs, a list of lines."""
    lengths = np.array([pair.lengths for pair in pairs]).mean(0)
    chosen, rejected = (sum(pair.cut[i] for pair in pairs) for i in (0, 1))
    lines = [
        f"{rows[0].file}: {len(pairs)} pairs of {len(rows)}; dropped: {dropped}",
        "mean tokens: prompt {:.0f}, chosen {:.0f}, rejected {:.0f}".format(*lengths),
        f"cut to {max_length} tokens, so without EOS: {chosen} chosen, {rejected} rejected",
        *warnings_of(rows),
    ]
    if n_bos := sum(pair.n_bos for pair in pairs):
        lines.append(f"{n_bos} responses began with BOS, which is left out")
    for what, n in Counter(what for pair in pairs for what in pair.left_out).most_common():
        first = next(pair.where for pair in pairs if what in pair.left_out)
        text = f"warning: the chat template leaves out {what}, or a part of it, in {n} pairs"
        lines.append(f"{text} (first: {first})")
    asking = "system", "input", "history"
    if used := [key for key in asking if any(key in row.ignored for row in rows)]:
        how = f" --prompt {rows[0].key}" if isinstance(rows[0].prompt, str) else ""
        text = f"warning: {' and '.join(used)} not used; tools/prepare.py{how} puts such columns"
        lines.append(f"{text} into the prompt")
    return lines


def hold_out(rows: list[Preference], fraction: float, seed: int):
    """Splits rows into (train, held out) by prompt: a prompt asked on both sides would not be held
    out."""
    prompts = list(dict.fromkeys(json.dumps(row.prompt) for row in rows))
    n = max(1, round(fraction * len(prompts)))
    held_out = {prompts[i] for i in epoch_permutation(len(prompts), seed, 0)[:n]}
    train, test = [], []
    for row in rows:
        (test if json.dumps(row.prompt) in held_out else train).append(row)
    return train, test


# ---------------------------------------------------------------------------------------------
# Steps: which pairs come when, and which of them go together.


@functools.lru_cache(maxsize=2)  # every step asks for it
def epoch_permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of n pairs in an epoch: a function of (seed, epoch), so resuming needs no state."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(n).tolist())


def steps_in_epoch(n_pairs: int, batch_size: int) -> int:
    """The last step of an epoch may hold fewer pairs; none is dropped."""
    return math.ceil(n_pairs / batch_size)


def step_pairs(pairs: list[Pair], step: int, batch_size: int, seed: int) -> list[Pair]:
    """The pairs of update `step`; 1 is the first."""
    epoch, i = divmod(step - 1, steps_in_epoch(len(pairs), batch_size))
    indices = epoch_permutation(len(pairs), seed, epoch)
    return [pairs[k] for k in indices[i * batch_size :][:batch_size]]


def balance_over_ranks(pairs: list[Pair], world_size: int) -> list[list[Pair]]:
    """A share for each process: the longest pair first, each to the one with the fewest tokens.

    Within a share the order stays.
    """
    shares, tokens = [[] for _ in range(world_size)], [0] * world_size
    for i in sorted(range(len(pairs)), key=lambda i: -pairs[i].n_tokens):
        least = tokens.index(min(tokens))
        shares[least].append(i)
        tokens[least] += pairs[i].n_tokens
    return [[pairs[i] for i in sorted(share)] for share in shares]


def split_by_tokens(pairs: list[Pair], budget: int) -> list[list[Pair]]:
    """Neighbours of at most `budget` tokens together; a longer pair by itself."""
    spans = _split_sizes([pair.n_tokens for pair in pairs], budget)
    return [pairs[start:stop] for start, stop in spans]


def _split_sizes(sizes: list[int], limit: int) -> list[tuple[int, int]]:
    """(start, stop) of neighbours whose sizes add up to at most limit; a larger one by itself."""
    starts, total = [], 0
    for i, size in enumerate(sizes):
        if not starts or total + size > limit:
            starts.append(i)
            total = 0
        total += size
    return list(pairwise([*starts, len(sizes)]))


# ---------------------------------------------------------------------------------------------
# Micro-batches.


class Batch(NamedTuple):
    """A micro-batch of B pairs: N packed tokens, of which P predictions carry weight."""

    # For the transformer:
    tokens: Tensor  # (N,) int64, runs of [prompt | chosen | rejected]
    positions: Tensor  # (N,) int64; chosen and rejected both continue the prompt's
    segments: Segments  # two a pair: prompt and chosen; rejected, over the prompt and itself
    # For the loss:
    predict: Tensor  # (P,) int64, the row of the hidden states that predicts ...
    targets: Tensor  # (P,) int64, ... this token
    response: Tensor  # (P,) int64: 2*pair chosen, 2*pair+1 rejected, -1 prompt
    nll_weight: Tensor  # (P,) float32, weight in L_SFT: normalised over the whole step
    response_lengths: Tensor  # (2B,) int64: chosen and rejected of pair 0, of pair 1, ...
    groups: list[tuple[int, int]]  # rows of the P, start to stop, that go through lm_head together
    n_pairs: int  # of the whole step

    def to(self, device) -> "Batch":
        """On a device; where that is a GPU the host does not wait for the copies."""
        moved = [to_device(x, device) if torch.is_tensor(x) else x for x in self]
        return Batch(*moved)._replace(segments=self.segments.to(device))


GROUP_ROWS = 2048  # through lm_head at a time: enough for a GPU's products, and few logits


def micro_batches(
    pairs: list[Pair],
    budget: int,
    sft_loss: str,
    multiple: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[Batch]:
    """One optimizer step's pairs as micro-batches of at most `budget` tokens each.

    A pair is never split: one that is longer than the budget is a micro-batch of its own. Of
    several processes each gets its own share, in as many micro-batches as all the others, because
    they may have to compute together: an empty one where it has no pair.

    Tokens and predictions are padded to a multiple of `multiple`, as kernels want that: by a run of
    token 0 that nobody sees, and by predictions without weight.

    The weights are the whole step's, so the gradients of all micro-batches simply add up:
    sft_loss "response": 1/(pairs * m) for each of the m tokens of a chosen response;
    sft_loss "full": 1/(such tokens) for every predicted token of prompt and chosen, as in TRL.
    """
    n_full = None
    if sft_loss == "full":
        n_full = sum(p + c - 1 for p, c, _ in (pair.lengths for pair in pairs))
    shares = [split_by_tokens(share, budget) for share in balance_over_ranks(pairs, world_size)]
    parts, most = shares[rank], max(map(len, shares))
    parts += [[] for _ in range(most - len(parts))]
    return [_pack(part, len(pairs), n_full, multiple) for part in parts]


class _PairRows(NamedTuple):
    """One pair's part of the Batch, as arrays, with the batch's own rows and pair numbers."""

    tokens: np.ndarray
    positions: np.ndarray
    key_index: np.ndarray  # the keys of its two segments, as rows of the batch
    predict: np.ndarray
    targets: np.ndarray
    response: np.ndarray
    nll_weight: np.ndarray


def _lay_out(pair: Pair, i: int, at: int, n_pairs: int, n_full: int | None) -> _PairRows:
    """Pair i, whose first token is row `at` of the batch. n_full: the tokens of the step that count
    where the SFT term covers the prompt too, else None."""
    p, c, r = pair.lengths
    chosen_at, rejected_at, end = at + p, at + p + c, at + p + c + r
    # The rejected response sees the prompt's keys, which are gathered a second time, and its own,
    # but not the chosen response that lies between them.
    key_index = np.r_[at:rejected_at, at:chosen_at, rejected_at:end]
    # A token is predicted by the row in front of it. The first tokens of both responses are
    # predicted by the prompt's last row, which so comes twice.
    first = p if n_full is None else 1  # of prompt and chosen: the first that has a weight in L_SFT
    predict = np.r_[at + first - 1 : rejected_at - 1, chosen_at - 1, rejected_at : end - 1]
    weight = 1 / (n_pairs * c if n_full is None else n_full)
    return _PairRows(
        tokens=np.concatenate([pair.prompt, pair.chosen, pair.rejected]),
        positions=np.r_[0 : p + c, p : p + r],
        key_index=key_index,
        predict=predict,
        targets=np.concatenate([pair.prompt[first:], pair.chosen, pair.rejected]),
        response=np.repeat([-1, 2 * i, 2 * i + 1], [p - first, c, r]),
        nll_weight=np.repeat([weight, 0], [p - first + c, r]),
    )


def _pack(pairs: list[Pair], n_pairs: int, n_full: int | None, multiple: int) -> Batch:
    starts = [0, *accumulate(pair.n_tokens for pair in pairs)]
    runs = [_lay_out(pair, i, starts[i], n_pairs, n_full) for i, pair in enumerate(pairs)]
    n_tokens, rows = starts[-1], [len(run.predict) for run in runs]
    q_lens = [n for p, c, r in (pair.lengths for pair in pairs) for n in (p + c, r)]
    k_lens = [n for p, c, r in (pair.lengths for pair in pairs) for n in (p + c, p + r)]
    # Padding. Kernels want one token at least, so a micro-batch without pairs is a run of it.
    padding = -n_tokens % multiple if pairs else multiple
    more_rows = -sum(rows) % multiple
    if padding:
        q_lens.append(padding)
        k_lens.append(padding)
    place, zero_rows = np.arange(padding), np.zeros(more_rows, int)
    no_response = np.full(more_rows, -1)
    runs.append(
        _PairRows(0 * place, place, n_tokens + place, zero_rows, zero_rows, no_response, zero_rows)
    )
    # Groups of whole pairs; the padding goes with the last.
    ends = [0, *accumulate(rows)]
    groups = [(ends[i], ends[j]) for i, j in _split_sizes(rows, GROUP_ROWS)]
    if groups:
        groups[-1] = groups[-1][0], ends[-1] + more_rows

    def join(parts, dtype=np.int64) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype))

    columns = _PairRows(*zip(*runs, strict=True))
    return Batch(
        tokens=join(columns.tokens),
        positions=join(columns.positions),
        segments=Segments.of(q_lens, k_lens, join(columns.key_index)),
        predict=join(columns.predict),
        targets=join(columns.targets),
        response=join(columns.response),
        nll_weight=join(columns.nll_weight, np.float32),
        response_lengths=torch.tensor([n for pair in pairs for n in pair.lengths[1:]]).long(),
        groups=groups,
        n_pairs=n_pairs,
    )


# ---------------------------------------------------------------------------------------------
# Looking at the data.


def show(pair: Pair, tokenizer, colour: bool = True) -> str:
    """A pair as text, token by token: dim is context, green made likelier, red less likely. Tokens
    that only together make a character stand together."""
    lines, roles = [], ("context", "trained towards", "trained away from")
    for name, ids, role, paint in zip(Pair._fields, pair[:3], roles, (2, 32, 31), strict=False):
        lines.append(f"{name}: {len(ids)} tokens, {role}")
        text = "·".join(pieces(ids, tokenizer)).replace("\n", "\\n")
        lines.append(f"  \x1b[{paint}m{text}\x1b[0m" if colour else f"  {text}")
    return "\n".join(lines)


def pieces(ids, tokenizer) -> Iterator[str]:
    """The text of each token, or of several that only together make a character."""
    first, begun = [], []
    for i, token in enumerate(ids):
        begun.append(token)
        # Decoded after the first ones, so that no leading space is taken away.
        text = tokenizer.decode([*first, *begun])[len(tokenizer.decode(first)) :]
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or i == len(ids) - 1:
            yield text
            first, begun = first or begun, []


def use_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def main(argv=None):
    """Prints three pairs as they are trained on, and what train.py says of all of them."""
    parser = argparse.ArgumentParser(
        prog="data.py",
        usage=argparse.SUPPRESS,
        description="Shows pairs, coloured by what is trained on.",
    )
    parser.add_argument("file", help="preference rows, JSON Lines")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with the tokenizer")
    parser.add_argument("--chat-template", metavar="FILE", help="jinja file, not the model's own")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens (2048)")
    parser.add_argument("--max-prompt-length", type=int, default=1792, help="tokens (1792)")
    args = parser.parse_args(argv)
    try:
        folder = model_folder(args.model, weights=False)
        tokenizer = load_tokenizer(folder, args.chat_template)
        length, settings = args.max_length, folder / "config.json"
        if settings.is_file():
            length = min(length, ModelConfig.from_json(settings).max_seq_len)
        rows = load_preferences(args.file)
        pairs, dropped = encode_pairs(tokenizer, rows, length, args.max_prompt_length)
    except (OSError, ValueError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    for pair in pairs[:3]:
        print(show(pair, tokenizer, use_colour()), end="\n\n")
    print("\n".join(summary(rows, pairs, dropped, length)))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as it ends other viewers
    main()
