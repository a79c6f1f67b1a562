"""Our adapters in peft: the logits of its model are those of our merged one."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

import data
from model import Transformer, trainable
from run.lora import add_lora, lora_layers, merge_lora, write_adapters
from tests.peers.test_families import FAMILIES, logits_of, same, theirs
from tests.peers.test_served import base_of, gpt2, llama2, qwen, trained


@pytest.mark.filterwarnings("error:fan_in_fan_out")  # peft would correct it, and warn
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_adds_what_we_merge(name, tmp_path):
    """Every projection of every family, and alpha / rank, here 8 / 3."""
    theirs(name).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    model = Transformer.from_pretrained(base)
    add_lora(model, 3, 8.0)
    torch.manual_seed(1)
    for module in lora_layers(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.2)
    adapters = {name: (m.lora_A, m.lora_B) for name, m in lora_layers(model).items()}
    (tmp_path / "adapters").mkdir()
    write_adapters(tmp_path / "adapters", model.config.family, adapters, 3, 8.0, base)
    merge_lora(model, Transformer.from_pretrained(base)).save_pretrained(tmp_path / "merged")

    unchanged = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits_of(unchanged)
    adapted = peft.PeftModel.from_pretrained(unchanged, tmp_path / "adapters").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    wanted = logits_of(merged.eval())
    assert (wanted - before).abs().max() > 0.1
    same(logits_of(adapted), wanted)
    trained = {n for n, _ in adapted.named_parameters() if ".lora_" in n}
    n_theirs = sum(adapted.get_parameter(n).numel() for n in trained)
    n_ours = sum(p.numel() for p in trainable(model))
    # Of n projections that are stored as one, each reads its own part of A, n of rank 3: of B only
    # one n-th is not zero.
    zeros = 0
    for module in adapted.modules():
        n = module.r["default"] // 3 if hasattr(module, "r") else 1
        if n > 1:
            zeros += (n - 1) * module.lora_B["default"].weight.numel() // n
    assert n_theirs - zeros == n_ours


@pytest.mark.parametrize("form", ["strings", "messages"])
@pytest.mark.parametrize("kind, family", [(gpt2, "gpt2"), (llama2, "llama"), (qwen, "qwen2")])
def test_a_run_writes_adapters_for_its_base(kind, family, form, tmp_path):
    """With a tokenizer and a generation_config.json by which they are asked as they were trained;
    GPT-2's own puts no BOS, and the base names another end."""
    base = base_of(kind, family, tmp_path / "base")
    more = ["--lora-rank", "4", "--lora-alpha", "2", "--lora-adapters", "--lr", "1e-1"]
    out, row = trained(base, form, tmp_path, *more)
    folder = out.parent / "adapters"
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = transformers.AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours, theirs = data.load_tokenizer(out), transformers.AutoTokenizer.from_pretrained(folder)
    if form == "messages":
        text = ours.apply_chat_template(row["prompt"], add_generation_prompt=True)
        more = {"add_generation_prompt": True, "return_dict": False}
        ids = theirs.apply_chat_template(row["prompt"], **more)
    else:
        text, ids = row["prompt"], theirs(row["prompt"])["input_ids"]
    assert list(ids) == data.encode_prompt(ours, text, chat=form == "messages")
    tokens = torch.tensor([ids])
    with torch.no_grad():
        same(adapted(tokens).logits, merged(tokens).logits)
        with adapted.disable_adapter():
            assert (adapted(tokens).logits - merged(tokens).logits).abs().max() > 0.1
    how = transformers.GenerationConfig.from_pretrained(folder, max_new_tokens=40, do_sample=False)
    answer = adapted.generate(input_ids=tokens, generation_config=how)[0, len(ids) :].tolist()
    assert [answer] == Transformer.from_pretrained(out).generate([ids], 40, eos_id=ours.eos_id)
    assert how.eos_token_id == [ours.eos_id, 7]
