"""Our adapters in peft: the logits of its model are those of our merged one."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

import data
import train
from model import Transformer, trainable
from run.lora import add_lora, lora_layers, merge_lora
from run.saving import Run, save_adapters
from tests.peers.test_families import FAMILIES, logits_of, same, theirs
from tests.peers.tiny import random_llama


@pytest.mark.filterwarnings("error:fan_in_fan_out")  # peft would correct it, and warn
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_adds_what_we_merge(name, tmp_path):
    """Every projection of every family, and alpha / rank, here 8 / 3."""
    theirs(name).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    config = train.TrainConfig(model=base, lora_rank=3, lora_alpha=8.0, lora_adapters=True)
    model = Transformer.from_pretrained(base)
    add_lora(model, 3, 8.0)
    torch.manual_seed(1)
    for module in lora_layers(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.2)
    a_run = Run(config, tmp_path, model, None, None, chat=False, plain=True, n_steps=1, digests={})
    save_adapters(a_run, tmp_path / "adapters")
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


def test_a_run_writes_adapters_for_its_base(tmp_path, tiny_tokenizer):
    base = tmp_path / "base"
    random_llama(base, vocab_size=400)
    for file in tiny_tokenizer.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    rows = [{"prompt": f"The farmer {i}", "chosen": " sings.", "rejected": " is."} for i in "ab"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(base), "--data", str(tmp_path / "rows.jsonl"), "--device", "cpu"]
    flags += ["--lora-rank", "4", "--lora-alpha", "2", "--lora-adapters", "--lr", "1e-1"]
    out = tmp_path / "out"
    train.main([*flags, "--max-steps", "3", "--warmup-steps", "0", "--out", str(out)])
    named = json.loads((out / "adapters" / "adapter_config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(named["base_model_name_or_path"])
    adapted = peft.PeftModel.from_pretrained(model, out / "adapters").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    text = data.load_tokenizer(out / "model").encode("The farmer a sings.", bos=True)
    with torch.no_grad():
        tokens = torch.tensor([text])
        same(adapted(tokens).logits, merged(tokens).logits)
        with adapted.disable_adapter():
            assert (adapted(tokens).logits - merged(tokens).logits).abs().max() > 0.1
