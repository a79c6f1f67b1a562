"""lm-evaluation-harness on what we hand back: plain prompts and those of --apply_chat_template get
the ids that were trained, with BOS once, and the answers are ours."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import data
from model import Transformer

from .test_served import base_of, gpt2, llama2, llama3, prompts_of, qwen, trained, yi

NEW = {"until": [], "max_gen_toks": 24, "do_sample": False}


@pytest.mark.parametrize("form", ["strings", "messages"])
@pytest.mark.parametrize(
    "kind, family",
    [(gpt2, "gpt2"), (llama2, "llama"), (yi, "llama"), (llama3, "llama"), (qwen, "qwen2")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_lm_eval_asks_what_was_trained(kind, family, form, tmp_path):
    out, _ = trained(base_of(kind, family, tmp_path / "base"), form, tmp_path)
    ours, model = data.load_tokenizer(out), Transformer.from_pretrained(out)
    theirs = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=2)
    texts, wanted, prompts = [], [], prompts_of(form)
    for prompt in prompts:
        if form == "messages":
            texts.append(theirs.apply_chat_template(prompt))
            prompt = ours.apply_chat_template(prompt, add_generation_prompt=True)
        else:
            texts.append(prompt)
        wanted.append(data.encode_prompt(ours, prompt, chat=form == "messages"))
    assert ours.bos_id is None or all(ids[0] == ours.bos_id not in ids[1:2] for ids in wanted)
    assert [list(theirs.tok_encode(text)) for text in texts] == wanted
    ids, mask = theirs.tok_batch_encode(texts)  # padded to the left
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == wanted
    context, _ = theirs._encode_pair(texts[0], " Yes")  # of a log-likelihood
    assert list(context) == wanted[0]
    requests = [Instance("generate_until", {}, (x, dict(NEW)), i) for i, x in enumerate(texts)]
    for ids, said in zip(wanted, theirs.generate_until(requests, disable_tqdm=True), strict=True):
        (new,) = model.generate([ids], NEW["max_gen_toks"], eos_id=ours.eos_id)
        new = new[:-1] if new[-1] == ours.eos_id else new
        assert ours.decode([*ids, *new])[len(ours.decode(ids)) :].strip() == said.strip()
