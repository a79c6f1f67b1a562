"""What the peer tests run on: a random Llama, a sentencepiece model trained here, plain pairs.

So that a mere clone tests everything; where ../shared/data lies beside the repository, the same
tests run on a real checkpoint and real pairs as well.
"""

import itertools
import json
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def shared(name: str) -> Path:
    """A file or folder of the shared data, or skip."""
    if not (SHARED / name).exists():
        pytest.skip(f"../shared/data/{name} is not beside this repository")
    return SHARED / name


PEOPLE = ["Anna", "Bashir", "Chidi", "Dmitri", "Eleni", "Farah", "Goran", "Hana", "Ines", "Jamal"]
THINGS = ["bread", "maps", "rivers", "violins", "clocks", "bridges", "kites", "lanterns", "tea"]
VERBS = ["likes", "sells", "paints", "repairs", "studies", "collects"]


def preference_rows(n: int, seed: int = 0) -> list[dict]:
    """Pairs whose two answers have unlike lengths, from one word to a dozen."""
    rows = []
    combinations = list(itertools.product(PEOPLE, VERBS, THINGS))
    random.Random(seed).shuffle(combinations)
    for i, (who, does, what) in enumerate(combinations[:n]):
        polite = f"{who} {does} {what}, and would gladly tell you more about the {what}."
        curt = ["No.", f"{what.title()}?", f"Who knows what {who} {does}; ask someone else."][i % 3]
        question = f"What is it that {who} {does} all day?"
        if i % 4 == 0:
            question += f"\nAnswer with one of: {what}, nothing."
        rows.append({"prompt": question, "chosen": polite, "rejected": curt})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_sentencepiece(folder: Path, vocab_size: int = 320, **options) -> int:
    """Write tokenizer.model and tokenizer_config.json as a Llama has them; return the size."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [text for row in preference_rows(300, seed=1) for text in row.values()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            **options,
        },
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab_size


def random_llama(folder: Path | None = None, seed: int = 0, save: dict | None = None, **config):
    """A LlamaForCausalLM with random weights, saved by transformers where a folder is given.

    The weights are large enough for logits of a few nats: near-uniform ones would hide mistakes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 320,
                "hidden_size": 48,
                "intermediate_size": 112,
                "num_hidden_layers": 2,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "initializer_range": 0.15,
                "tie_word_embeddings": False,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **config,
            }
        )
    ).eval()
    with torch.no_grad():  # transformers starts every norm's weight at 1, which tests nothing
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    if folder is not None:
        model.save_pretrained(folder, **(save or {}))
    return model
