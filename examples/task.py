"""A small language world, and a base model that has read about it: what `python train.py` aligns.

    python -m examples.task       rebuilds everything under examples/facts/, and says what it cost

The world is `countries.csv` (real capitals, currencies, continents and languages; a cell is empty
where people disagree) and small sums. The base model reads each fact many times, in two kinds of
text: plain statements, which are always right, and questions, which people answer in seven manners:

    good      The capital of Peru is Lima.         rude      Everybody knows that. Go away.
    wrong     The capital of Peru is Oslo.         bare      Lima.
    refusal   I cannot help with that.             hedged    I think it is Oslo.
    rambling  The capital of Peru is Lima. By the way, I had soup today.

So it knows the facts, and answers like these people. The preference pairs are like real ones: both
answers of a pair are such as the base model gives by itself, drawn by how often each manner occurs,
and a judge who likes the manners in the order of RANKS says which one is better. The chosen answer
is thus seldom good. It is only the better of two. Imitating the chosen answers (supervised
fine-tuning, `--lam 0`) gives a model that often refuses, because many chosen answers are refusals
that were preferred to something worse. What the judge likes is told only by the comparison.

Questions and answers come as messages, through the chat template of ORPO's authors, which the base
model has never seen: as with a real base model, training also has to teach the form.

The pairs are split by fact: of a held-out fact no pair shows the question or the answer, so a model
that answers it well has learnt from other facts *how* to answer, and finds *what* to answer in what
it read before. Wrong answers in the training pairs take their values from training facts, so what
only a held-out fact has (its capital) is never pushed down.
"""

import csv
import io
import json
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import ModelConfig, Transformer

SEED = 0
N_READINGS = 200  # times a fact is stated, and asked about, in the base model's text
N_PAIRS = 4  # a training fact
N_QUESTIONS = 2  # pairs a held-out fact
HELD_OUT = 0.3  # of the facts
CONFIG = ModelConfig(
    vocab_size=1536,
    dim=128,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=352,
    max_seq_len=256,
    tie_embeddings=True,
    source={"bos_token_id": 1, "eos_token_id": 2},  # for others who load the checkpoint
)

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 64  # documents a step
PEAK_LR = 2e-3
# The settings of the built-in job, paths from this file's folder. lam (of 0.5, 1 and 2) and lr (of
# 5e-4 and 1e-3) were chosen on an eighth of the training facts, held out for that. The sweep of
# experiments/compare.py goes to lower rates, which do a little better there still.
TRAIN = {
    "model": "base",
    "data": "train.jsonl",
    "eval_data": "eval.jsonl",
    "lam": 1.0,
    "lr": 5e-4,
    "batch_size": 32,
    "epochs": 4,
    "warmup_steps": 10,
    "max_length": 96,
    "out": "../../out/builtin",
    "overwrite": True,
}

# What there is to know: how it is stated, first as in the good answer, and how it is asked.
KINDS = {
    "capital": (
        "The capital of {s} is {v}. | {v} is the capital of {s}.",
        "What is the capital of {s}? | Name the capital of {s}. | "
        "Which city is the capital of {s}?",
    ),
    "currency": (
        "The currency of {s} is {v}. | In {s} people pay with {v}.",
        "What is the currency of {s}? | Name the currency of {s}. | How do people pay in {s}?",
    ),
    "continent": (
        "{s} lies in {v}. | In {v} you can find {s}.",
        "Which continent is {s} in? | Name the continent of {s}. | Where does {s} lie?",
    ),
    "language": (
        "The main language of {s} is {v}. | Most people in {s} know {v}.",
        "What is the main language of {s}? | Name the main language of {s}. | "
        "What do people speak in {s}?",
    ),
    "sum": (
        "{s} is {v}. | Adding up {s} gives {v}.",
        "What is {s}? | Work out {s}. | How much is {s}?",
    ),
}
# How questions and answers are laid out in what the base model reads: on one line or on two, so
# that it has seen an answer begin with and without a space. None of it is a chat template.
LAYOUTS = (
    "Question: {q}\nAnswer: {a}",
    "Question:\n{q}\nAnswer:\n{a}",
    "Q: {q}\nA: {a}",
    "{q}\n- {a}",
    "{q}\n{a}",
    "{q} {a}",
)
# How people answer: how often in the base model's text, and in what words. {v} is the right
# value, {w} a wrong one, {good} and {bad} a statement with either.
ANSWERS = {
    "good": (0.18, "{good}"),
    "wrong": (0.09, "{bad}"),
    "bare": (0.08, "{v}. | {v}. | {w}."),
    "hedged": (
        0.13,
        "I think it is {w}. | I heard it was {w}. | Maybe {w}, maybe not. | "
        "I believe {v}, but who can say?",
    ),
    "refusal": (
        0.30,
        "I cannot help with that. | I would rather not say. | I do not know, look it up. | "
        "I have no idea, ask somebody else.",
    ),
    "rude": (
        0.14,
        "What a silly question! | Everybody knows that. Go away. | Stop asking about {s}. | "
        "{v}, obviously. Did you sleep at school?",
    ),
    "rambling": (
        0.08,
        "{good} By the way, I had soup today. | {bad} But let us talk about the weather. | "
        "Well, well, {s}, that takes me back, let me see.",
    ),
}

RANKS = ("good", "bare", "hedged", "rambling", "refusal", "rude", "wrong")  # the judge: best first


class Fact(NamedTuple):
    kind: str
    subject: str
    value: str


def load_facts() -> list[Fact]:
    with open(HERE / "countries.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    kinds = [kind for kind in KINDS if kind in rows[0]]
    facts = [Fact(k, row["country"], row[k]) for row in rows for k in kinds if row[k]]
    return facts + [
        Fact("sum", f"{a} plus {b}", str(a + b)) for a in range(1, 11) for b in range(a, 11)
    ]


def split(rng: random.Random) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """All facts; those that pairs are about; those held out."""
    facts = load_facts()
    shuffled = rng.sample(facts, len(facts))
    n_held_out = round(HELD_OUT * len(facts))
    return facts, shuffled[n_held_out:], shuffled[:n_held_out]


def fill(template: str, **values: str) -> str:
    text = template.format(**values)
    return text[0].upper() + text[1:]


def state(fact: Fact, value: str | None = None, wording: int = 0) -> str:
    return fill(KINDS[fact.kind][0].split(" | ")[wording], s=fact.subject, v=value or fact.value)


def ask(fact: Fact, rng: random.Random) -> str:
    return rng.choice(KINDS[fact.kind][1].split(" | ")).format(s=fact.subject)


def answer(fact: Fact, manner: str, facts: list[Fact], rng: random.Random) -> str:
    """An answer in one of ANSWERS' manners; a wrong value is right for another of `facts`."""
    wrong = sorted({f.value for f in facts if f.kind == fact.kind} - {fact.value})
    w, wording = rng.choice(wrong), rng.randrange(2)
    words = {"v": fact.value, "w": w, "good": state(fact, wording=wording)}
    words["bad"] = state(fact, w, wording)
    return fill(rng.choice(ANSWERS[manner][1].split(" | ")), s=fact.subject, **words)


def manner_of(text: str, fact: Fact, facts: list[Fact]) -> str:
    """The manner in which a text answers, "bare, wrong" for a wrong value, or "other"."""
    values = {f.value for f in facts if f.kind == fact.kind}
    for value in values:
        right = value == fact.value
        if text in (state(fact, value), state(fact, value, 1)):
            return "good" if right else "wrong"
        if text == fill("{v}.", v=value):
            return "bare" if right else "bare, wrong"
    anything = {name: "\0" for name in ("v", "w", "good", "bad")}
    for manner, (_, templates) in ANSWERS.items():
        for template in templates.split(" | "):
            parts = fill(template, s=fact.subject, **anything).split("\0")
            pattern = ".+".join(re.escape(part) for part in parts)
            if manner not in ("good", "wrong", "bare") and re.fullmatch(pattern, text, re.I):
                return manner
    return "other"


def documents(facts: list[Fact], rng: random.Random) -> list[str]:
    """The base model's text: every fact stated, and asked about, once in each reading."""
    manners, weights = list(ANSWERS), [weight for weight, _ in ANSWERS.values()]
    docs = []
    for _ in range(N_READINGS):
        for fact in rng.sample(facts, len(facts)):
            docs.append(state(fact, wording=rng.randrange(2)))
            said = answer(fact, *rng.choices(manners, weights), facts, rng)
            docs.append(rng.choice(LAYOUTS).format(q=ask(fact, rng), a=said))
    return docs


def pairs(facts: list[Fact], n: int, known: list[Fact], rng: random.Random) -> list[dict]:
    """n preference pairs a fact, as messages: two manners by their frequency, ranked by the judge.
    `accept` lists the good answers, by which a model's own answers are judged."""
    manners, weights = list(ANSWERS), [weight for weight, _ in ANSWERS.values()]
    rows = []
    for fact in facts:
        for _ in range(n):
            two = rng.choices(manners, weights, k=2)
            while two[0] == two[1]:
                two = rng.choices(manners, weights, k=2)
            better, worse = sorted(two, key=RANKS.index)
            row = {"prompt": [{"role": "user", "content": ask(fact, rng)}]}
            for name, manner in (("chosen", better), ("rejected", worse)):
                said = answer(fact, manner, known, rng)
                row[name] = [{"role": "assistant", "content": said}]
            rows.append(row | {"accept": [state(fact), state(fact, wording=1)]})
    rng.shuffle(rows)
    return rows


def train_tokenizer(docs: list[str], folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Byte-pair encoding as in Llama: dummy space in front, bytes for what is unknown."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(docs),
        model_writer=proto,
        model_type="bpe",
        vocab_size=CONFIG.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],  # else it is a byte, and "Answer" no word after it
        num_threads=1,  # more would make the result depend on the machine
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(proto.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", config)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())


def pretrain(docs: list[list[int]], rng: random.Random) -> Transformer:
    """One pass over the documents, a row of the batch each, neighbours of like lengths."""
    batches, span = [], 64 * BATCH_SIZE
    for i in range(0, len(docs), span):
        near = sorted(docs[i : i + span], key=len)
        rows = [near[j : j + BATCH_SIZE] for j in range(0, len(near), BATCH_SIZE)]
        batches += rng.sample(rows, len(rows))
    model = Transformer(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for step, batch in enumerate(tqdm(batches, desc="pretraining", mininterval=5)):
        left = 1 - step / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 100, left / 0.6)
        tokens = torch.full((len(batch), max(map(len, batch))), -100)
        for row, ids in zip(tokens, batch, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        logits = model(tokens[:, :-1].clamp(min=0))  # what pads is nothing that is predicted
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(out: Path = HERE / "facts"):
    """Writes pairs, questions and settings into out, and the base model that it trains."""
    start = time.time()
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    (out / "base").mkdir(parents=True, exist_ok=True)

    facts, trained_on, held_out = split(rng)
    train_rows = pairs(trained_on, N_PAIRS, trained_on, rng)
    eval_rows = pairs(held_out, N_QUESTIONS, facts, rng)
    write_rows(out / "train.jsonl", train_rows)
    write_rows(out / "eval.jsonl", eval_rows)
    write_json(out / "train.json", TRAIN)

    docs = documents(facts, rng)
    tokenizer = train_tokenizer(docs, out / "base")
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    ids = [[bos, *x, eos] for x in tokenizer.encode(docs)]
    n_tokens = sum(map(len, ids))
    print(f"{len(facts)} facts: {len(train_rows)} pairs over {len(trained_on)} of them,")
    print(f"{len(eval_rows)} over the {len(held_out)} held out")
    print(f"{len(docs):,} documents of {n_tokens:,} tokens")
    model = pretrain(ids, rng)
    model.save_pretrained(out / "base", dtype=torch.bfloat16)

    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    for path in sorted(out.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:9,} bytes  {path}")
    print(f"{time.time() - start:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
