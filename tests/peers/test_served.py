"""Whoever follows OUT/model's own files gets the ids that were trained: transformers for strings
and for messages, the tokenizers library from tokenizer.json by itself; and its greedy answers are
ours, token for token, for each family with a tokenizer of its own structure.

With another transformers (4.57.1 was tried):

    PYTHONPATH=FOLDER python -m pytest tests/peers/test_served.py
"""

import json
import shutil

import pytest
import torch

import data
import train
from model import ModelConfig, Transformer
from run.saving import Run, write_model_files
from tests.tokenizer_json import byte_level

from . import tiny
from .test_families import FAMILIES, SUFFIX
from .test_tokenizer import TEMPLATES
from .test_tokenizer_structures import LEVEL, OVER_BYTES, OVER_CHARACTERS, write

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["What does Anna like?", " a", "", "a  b\nc", "</s> closes", "naïve 1000"]
QUESTION = [{"role": "user", "content": "What does Anna like?"}]
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def of_bytes(folder, bos, eos, post_processor=None, **config):
    """Byte-level, in tokenizer.json."""
    texts = dict.fromkeys(text for text in (bos, eos) if text)
    added = [{"content": text, "special": True} | FLAGS for text in texts]
    spec = byte_level(["W h", "Wh a", "a t", "Ġ l"], added, pre_tokenizer=LEVEL, decoder=LEVEL)
    spec["post_processor"] = post_processor or LEVEL
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config |= {"bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return spec


def gpt2(folder):
    of_bytes(folder, "<|endoftext|>", "<|endoftext|>", tokenizer_class="GPT2Tokenizer")


def vocab_and_merges(folder):
    spec = of_bytes(folder, "<|endoftext|>", "<|endoftext|>", tokenizer_class="GPT2Tokenizer")
    vocab = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer.json").unlink()


def llama3(folder):
    """Its post-processor writes BOS already."""
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    post = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, other]}
    of_bytes(folder, "<s>", "</s>", tokenizer_class="PreTrainedTokenizerFast")
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    (i,) = (t["id"] for t in spec["added_tokens"] if t["content"] == "<s>")
    post["special_tokens"] = {"<s>": {"id": "<s>", "ids": [i], "tokens": ["<s>"]}}
    file.write_text(json.dumps(spec | {"post_processor": post}))


def qwen(folder):
    of_bytes(folder, None, "<|endoftext|>", tokenizer_class="Qwen2Tokenizer")


def adds_eos(folder):
    of_bytes(folder, "<s>", "</s>", tokenizer_class="PreTrainedTokenizerFast", add_eos_token=True)


def llama2(folder):
    tiny.train_sentencepiece(folder)


def yi(folder):
    llama2(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))


def phi3(folder):
    """As Llama 2's, in tokenizer.json, and without BOS."""
    yi(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')  # transformers 4 asks for it
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))


KINDS = [gpt2, vocab_and_merges, llama3, qwen, adds_eos, llama2, yi, phi3]


def served(base, out, chat: bool, plain: bool):
    """What a run leaves beside the weights."""
    tokenizer = data.load_tokenizer(base)
    size = tokenizer.vocab_size + -tokenizer.vocab_size % 8
    model = Transformer(ModelConfig(size, 8, 1, 2, 8))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    a_run = Run(train.TrainConfig(model=str(base)), out, model, None, tokenizer, chat, plain, 1, {})
    write_model_files(out, a_run)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(out)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_strings_get_the_ids_that_were_trained(kind, tmp_path):
    kind(tmp_path / "base")
    ours, theirs = served(tmp_path / "base", tmp_path / "out", chat=False, plain=True)
    alone = tmp_path / "out" / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(alone)) if alone.is_file() else None
    for text in TEXTS:
        if text.startswith(" ") and kind in (llama2, yi):
            continue  # transformers 5 leaves out a mark there that sentencepiece writes
        wanted = data.encode_prompt(ours, text)
        assert theirs(text)["input_ids"] == wanted, text
        assert library is None or library.encode(text).ids == wanted, text


@pytest.mark.parametrize("plain", [False, True], ids=["messages", "both"])
@pytest.mark.parametrize(
    "kind, template",  # Llama 2's template writes BOS, which Qwen's tokenizer has not
    [(k, t) for k in KINDS for t in ("zephyr", "llama2") if (k, t) != (qwen, "llama2")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_messages_get_bos_once_also_where_strings_were_trained(kind, template, plain, tmp_path):
    kind(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATES[template])
    ours, theirs = served(tmp_path / "base", tmp_path / "out", chat=True, plain=plain)
    text = ours.apply_chat_template(QUESTION, add_generation_prompt=True)
    wanted = data.encode_prompt(ours, text, chat=True)
    more = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    assert list(theirs.apply_chat_template(QUESTION, **more)) == wanted
    assert ours.bos_id is None or (wanted[0] == ours.bos_id != wanted[1])


# ---------------------------------------------------------------------------------------------
# Whole runs; those of base_of are also what test_llama_cpp.py and test_lm_eval.py serve.

OWN = {  # family: the structure of its tokenizer, the class that its folder names, BOS
    "llama": ("Llama 2", "LlamaTokenizer", "<s>"),
    "llama3 rope": ("Llama 3", "PreTrainedTokenizerFast", "<s>"),
    "mistral": ("Llama 2", "LlamaTokenizer", "<s>"),
    "mistral, window": ("Mistral-Nemo", "PreTrainedTokenizerFast", "<s>"),
    "qwen2": ("Qwen2", "Qwen2Tokenizer", None),
    "qwen3": ("Qwen2", "Qwen2Tokenizer", None),
    "phi3": ("Phi-3 by transformers 5", "LlamaTokenizer", "<s>"),
    "phi": ("GPT-2, OPT, Phi-2", "CodeGenTokenizer", "<|both|>"),
    "gpt2": ("GPT-2, OPT, Phi-2", "GPT2Tokenizer", "<|both|>"),
    "opt": ("GPT-2, OPT, Phi-2", "GPT2Tokenizer", "<|both|>"),
    "gemma": ("Gemma", "GemmaTokenizer", "<s>"),
    "olmo2": ("GPT-4's own", "GPT2Tokenizer", None),
    "smollm3": ("SmolLM2", "GPT2Tokenizer", "<s>"),
}
ASKED, SAID, OTHER = "The quick brown fox", "lazy dogs, isn't it?", "naïve café"
CHAT = (
    "{% for m in messages %}<|user|>{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant:{% endif %}"
)


def trained(base, form, folder, *more):
    """The model of a run on one pair, which it then knows by heart; and the pair."""
    row = {"prompt": ASKED, "chosen": " " + SAID, "rejected": " " + OTHER}
    if form == "messages":
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        row = {key: [{"role": roles[key], "content": x.strip()}] for key, x in row.items()}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--max-steps", "60", "--batch-size", "1", "--lr", "5e-3", "--device", "cpu"]
    flags += ["--save-every", "0"]
    files = ["--data", str(folder / "rows.jsonl"), "--out", str(folder / "out")]
    train.main(["--model", str(base), *files, *flags, *more])
    return folder / "out" / "model", row


def base_of(kind, family, folder):
    """A random model of a family with one of KINDS, and a chat template."""
    kind(folder)
    file = folder / "tokenizer_config.json"
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": CHAT}
    file.write_text(json.dumps(config | json.loads(file.read_text())))
    context = "n_positions" if family == "gpt2" else "max_position_embeddings"
    sizes = {"vocab_size": data.load_tokenizer(folder).vocab_size, "eos_token_id": 7, context: 256}
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family][1] | sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


QUESTIONS = [ASKED, "a", "a  b\nc", "naïve 1000", "What does Anna like?"]


def prompts_of(form):
    return [q if form == "strings" else [{"role": "user", "content": q}] for q in QUESTIONS]


@pytest.mark.parametrize("form", ["strings", "messages"])
@pytest.mark.parametrize("name", OWN)
def test_a_trained_model_answers_there_as_here(name, form, tmp_path):
    base, (structure, kind, bos) = tmp_path / "base", OWN[name]
    base.mkdir()
    if over_bytes := structure in OVER_BYTES:
        parts = (*OVER_BYTES[structure], LEVEL | {"add_prefix_space": True})
    else:
        parts = OVER_CHARACTERS[structure]
    write(base, *parts, over_bytes)
    config = {"tokenizer_class": kind, "bos_token": bos, "eos_token": "</s>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    n = data.load_tokenizer(base).vocab_size
    family, settings = FAMILIES[name]
    torch.manual_seed(0)
    settings = settings | {"vocab_size": n, "pad_token_id": None, "eos_token_id": 7}
    if rope := dict(settings.pop("rope_parameters", {})):  # in the form that transformers 4 reads
        settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    model = getattr(transformers, family + SUFFIX.get(family, "ForCausalLM"))(
        getattr(transformers, f"{family}Config")(**settings)
    )
    if name == "opt":
        model.config.prefix = bos  # as published: a pipeline writes it before the tokenizer's BOS
    model.save_pretrained(base)
    out, row = trained(base, form, tmp_path)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(out), data.load_tokenizer(out)
    if form == "messages":
        more = {"add_generation_prompt": True, "return_dict": False}
        ids = list(tokenizer.apply_chat_template(row["prompt"], **more))
        text = ours.apply_chat_template(row["prompt"], add_generation_prompt=True)
        assert data.encode_prompt(ours, text, chat=True) == ids
    else:
        asked = tokenizer(ASKED)
        assert {*asked} == {"input_ids", "attention_mask"}  # a model refuses any other
        ids = asked["input_ids"]
        assert data.encode_prompt(ours, ASKED) == ids
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
    answer = answer[0, len(ids) :].tolist()
    here = Transformer.from_pretrained(out).generate([ids], 40, eos_id=ours.eos_id)
    assert here == [answer] and answer[-1] == ours.eos_id  # it stopped by its generation_config
    assert ours.decode(answer).strip().startswith(SAID)
    if form == "strings":
        pipeline = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)
        assert not pipeline.prefix
        (said,) = pipeline(ASKED, max_new_tokens=40, do_sample=False, return_full_text=False)
        assert said["generated_text"].strip() == SAID
