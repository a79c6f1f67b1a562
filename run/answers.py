"""The model's own answers: to show, and to count how many are right.

Here and not in train.py, because whoever talks to a model (tools/sample.py) does not train it.
"""

import functools
import math

import torch

from data import Pair
from model import Transformer
from run.processes import gather, is_sharded, rank, resharded, world_size


def answers(
    model, tokenizer, prompts, max_new: int, batch_tokens=8192, progress=iter, **sampling
) -> list[str]:
    """The model's answer to each prompt (token ids), as text without what the chat template puts
    around an answer; "" where the prompt fills the context.

    Prompts of like lengths go together while they and their longest answers have batch_tokens
    tokens. Sampled answers depend on their neighbours (see Transformer.generate), and on the number
    of processes, each of which answers a share of the batches.
    """
    texts, context = [""] * len(prompts), model.config.max_seq_len
    ends, (before, after) = tokenizer.end_ids(), tokenizer.around_answer()
    batches, size = [], math.inf
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if len(prompts[i]) >= context:
            continue
        n_tokens = min(len(prompts[i]) + max_new, context)
        if size + n_tokens > batch_tokens:
            batches, size = [*batches, []], 0
        batches[-1].append(i)
        size += n_tokens
    # The processes of a sharded model must go through its forward passes together, and different
    # batches would end after different numbers of them: so all processes answer every batch.
    own, n = (0, 1) if is_sharded(model) else (rank(), world_size())
    if own and sampling.get("generator") is not None:  # not the same draws as in process 0
        sampling["generator"].manual_seed(sampling["generator"].initial_seed() + own)
    answered = {}
    with resharded(model):
        for first in progress(range(0, len(batches), n)):  # by all together, also the last
            for batch in batches[first + own : first + own + 1]:
                rows = [prompts[i] for i in batch]
                new = model.generate(rows, max_new, eos_id=ends or None, **sampling)
                for i, ids in zip(batch, new, strict=True):
                    text = tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids).strip()
                    answered[i] = text.removeprefix(before).removesuffix(after).strip()
    for share in gather(answered):
        for i, text in share.items():
            texts[i] = text
    return texts


def checked(items, may_stop):
    for item in items:
        yield item
        may_stop()


def accepted(
    model: Transformer, tokenizer, pairs: list[Pair], seed: int, may_stop=lambda: None
) -> dict[str, float]:
    """The share of the model's own answers that are right, sampled and greedy, among the rows that
    list right answers; {} where none does. may_stop is called after each batch of them."""
    asked = [pair for pair in pairs if pair.accept is not None]
    if not asked:
        return {}
    prompts = [pair.prompt for pair in asked]
    longest = 2 * max(max(pair.lengths[1:]) for pair in asked)
    shares = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        generator = torch.Generator(model.device).manual_seed(seed)
        sampling = {"temperature": temperature, "generator": generator}
        progress = functools.partial(checked, may_stop=may_stop)
        texts = answers(model, tokenizer, prompts, longest, progress=progress, **sampling)
        right = [[x.strip() for x in pair.accept] for pair in asked]  # as the answers are
        good = [text in accept for text, accept in zip(texts, right, strict=True)]
        shares[f"eval_accepted/{name}"] = sum(good) / len(good)
    return shares
