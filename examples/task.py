"""A small language world, and a base model that has read about it: what `python train.py` aligns.

    python examples/task.py       rebuilds everything under examples/facts/, and says what it cost

The world is `countries.csv` (real capitals, currencies, continents and languages; a cell is empty
where people disagree) and small sums. The base model reads each fact many times, in two kinds of
text: plain statements, which are always right, and questions with answers, which are anything:

    good      The capital of Peru is Lima.         rude      Everybody knows that. Go away.
    wrong     The capital of Peru is Oslo.         bare      Lima.
    refusal   I cannot help with that.             hedged    I think it is Oslo.
    rambling  The capital of Peru is Lima. By the way, I had soup today.

So it knows the facts, and that few answers in its world state them. The pairs prefer the good
answer to one of the others. They are split by fact: of a held-out fact no pair shows the question
or the answer, so a model that answers it well has learnt from other facts *how* to answer, and
finds *what* to answer in what it read before.

That this can generalise at all is the design: statements and good answers share their wording,
so the knowledge is one; wrong values are drawn at random, so no wrong fact is learnt beside the
right one, only that an answer may be noise; and wrong answers in the pairs take their values from
training facts alone, so what only a held-out fact has (its capital) is never pushed down.
"""

import csv
import io
import json
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from model import ModelConfig, Transformer  # noqa: E402

SEED = 0
N_READINGS = 200  # times a fact is stated, and asked about, in the base model's text
N_PAIRS = 4  # a training fact
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
BATCH_SIZE = 64  # documents a step
PEAK_LR = 2e-3
# The settings of the built-in job, paths from this file's folder.
TRAIN = {
    "model": "base",
    "data": "train.jsonl",
    "eval_data": "eval.jsonl",
    "lam": 0.5,
    "lr": 5e-4,
    "batch_size": 32,
    "epochs": 3,
    "warmup_steps": 10,
    "max_length": 96,
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
# How people answer: how often in the base model's text, and in what words. {v} is the right
# value, {w} a wrong one, {good} and {bad} the good answer with either.
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

RANKS = ("good", "bare", "hedged", "rambling", "refusal", "rude", "wrong")  # the best first


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
    question = rng.choice(KINDS[fact.kind][1].split(" | "))
    return f"Question: {question.format(s=fact.subject)}\nAnswer:"


def answer(fact: Fact, manner: str, facts: list[Fact], rng: random.Random) -> str:
    """An answer in one of ANSWERS' manners; a wrong value is right for another of `facts`."""
    wrong = sorted({f.value for f in facts if f.kind == fact.kind} - {fact.value})
    w = rng.choice(wrong)
    words = {"v": fact.value, "w": w, "good": state(fact), "bad": state(fact, w)}
    return " " + fill(rng.choice(ANSWERS[manner][1].split(" | ")), s=fact.subject, **words)


def documents(facts: list[Fact], rng: random.Random) -> list[str]:
    """The base model's text: every fact stated, and asked about, once in each reading."""
    manners, weights = list(ANSWERS), [weight for weight, _ in ANSWERS.values()]
    docs = []
    for _ in range(N_READINGS):
        for fact in rng.sample(facts, len(facts)):
            docs.append(state(fact, wording=rng.randrange(2)))
            docs.append(ask(fact, rng) + answer(fact, *rng.choices(manners, weights), facts, rng))
    return docs


def pairs(facts: list[Fact], n: int, known: list[Fact], rng: random.Random) -> list[dict]:
    """n preference pairs a fact. A wrong value in the wanted form comes twice as often as any
    other manner, as it is the hardest to tell from a good answer."""
    rows = []
    for fact in facts:
        for _ in range(n):
            manner = rng.choice([m for m in ANSWERS if m != "good"] + ["wrong"])
            row = {"prompt": ask(fact, rng), "chosen": " " + state(fact)}
            rows.append(row | {"rejected": answer(fact, manner, known, rng)})
    rng.shuffle(rows)
    return rows


def ranked_pairs(facts: list[Fact], n: int, known: list[Fact], rng: random.Random) -> list[dict]:
    """n pairs a fact of which the chosen answer is better than the rejected one, and seldom good:
    two manners at random, in the order of RANKS. For compare.py."""
    rows = []
    for fact in facts:
        for _ in range(n):
            better, worse = sorted(rng.sample(range(len(RANKS)), 2))
            row = {"prompt": ask(fact, rng), "accept": [state(fact)]}
            row["chosen"] = answer(fact, RANKS[better], known, rng)
            row["rejected"] = answer(fact, RANKS[worse], known, rng)
            rows.append(row)
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
        cut = [near[j : j + BATCH_SIZE] for j in range(0, len(near), BATCH_SIZE)]
        batches += rng.sample(cut, len(cut))
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
    start = time.time()
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    (out / "base").mkdir(parents=True, exist_ok=True)

    facts, trained_on, held_out = split(rng)
    train_rows = pairs(trained_on, N_PAIRS, trained_on, rng)
    eval_rows = pairs(held_out, 1, facts, rng)
    for row in eval_rows:
        row["accept"] = [row["chosen"].strip()]
    write_rows(out / "train.jsonl", train_rows)
    write_rows(out / "eval.jsonl", eval_rows)
    write_json(out / "train.json", TRAIN)

    docs = documents(facts, rng)
    tokenizer = train_tokenizer(docs, out / "base")
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    ids = [[bos, *x, eos] for x in tokenizer.encode(docs)]
    n_tokens = sum(map(len, ids))
    print(f"{len(facts)} facts: {len(train_rows)} pairs over {len(trained_on)} of them,")
    print(f"one question each about the {len(held_out)} held out")
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
