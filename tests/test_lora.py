"""Adapters: their gradients, what stays frozen, what they cost, and the model handed back."""

import copy
import json
import shutil

import pytest
import torch
from torch.func import functional_call

import data
import orpo
import train
from formats.families import FAMILIES
from formats.weights import read_safetensors
from model import Linear, ModelConfig, Transformer, trainable
from run.lora import LoRALinear, add_lora, lora_layers, merge_lora, write_adapters
from run.plan import step_flops
from run.saving import Run, norm_of, save_adapters, save_checkpoint, save_model, training_state
from tests.runs import (
    FACTS,
    UNEVEN,
    Killed,
    compare,
    compare_models,
    fails,
    file_bytes,
    files,
    kill_at,
    launch,
    run,
    steps,
    weights,
)
from tests.small import Products, keys_seen, one_step, some_pairs, tiny
from tools import export as export_file
from tools.export import export


def adapted(seed: int, model: Transformer | None = None, rank: int = 3) -> Transformer:
    """A model whose B is not zero, so that every gradient is there."""
    model = tiny() if model is None else model
    add_lora(model, rank, alpha=8.0, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in adapters(model).values():
            module.lora_B.normal_(std=0.1)
    return model


def adapters(model: Transformer) -> dict[str, LoRALinear]:
    return lora_layers(model)


def loss_of(model: Transformer, pairs, lam=0.5) -> torch.Tensor:
    batches = data.micro_batches(pairs, 80, "full")
    return sum(train.forward(model, batch, lam).loss for batch in batches)


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pairs):
        return loss_of(self.model, pairs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_merged_weight(checkpointing):
    """Autograd through W + (8/3) B A, put in place of each weight of a plain model, in float64."""
    model, pairs = adapted(1, tiny(torch.float64)).double(), some_pairs(6, seed=1)
    model.checkpointed_blocks = 2 * checkpointing
    loss_of(model, pairs).backward()
    plain, merged, leaves = Transformer(model.config).double(), {}, {}
    plain.compute_dtype = torch.float64
    for name, p in model.named_parameters():
        if "lora" not in name:
            merged[f"model.{name}"] = p.detach()
    for name, module in adapters(model).items():
        a, b = (p.detach().clone().requires_grad_() for p in (module.lora_A, module.lora_B))
        merged[f"model.{name}.weight"] = module.weight + 8 / 3 * b @ a
        leaves[name] = a, b
    functional_call(Loss(plain), merged, (pairs,)).backward()
    for name, module in adapters(model).items():
        for got, wanted in zip((module.lora_A, module.lora_B), leaves[name], strict=True):
            assert wanted.grad.abs().max() > 1e-6
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_start_the_loss_is_that_of_the_model_alone(dtype):
    model, pairs = tiny(dtype).to(dtype), some_pairs(6, seed=2)
    base = loss_of(model, pairs)
    add_lora(model, 4, 16.0)
    assert torch.equal(loss_of(model, pairs), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_changes_the_adapters_and_nothing_else(dtype):
    model, pairs = tiny(dtype).to(dtype), some_pairs(6, seed=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, 4, 16.0)
    base = loss_of(model, pairs)
    for _ in range(2):  # in the first step B alone has a gradient
        one_step(model, pairs, lr=1e-2, dtype=str(dtype)[6:])
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert all(p.grad is None for p in after.values())
    trained = {name for name, p in after.items() if p.requires_grad}
    assert trained == {name for name in after if ".lora_" in name}
    assert all(after[name].dtype == torch.float32 for name in trained)
    assert all(m.lora_B.any() for m in adapters(model).values())
    assert loss_of(model, pairs) < base


TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture(params=FAMILIES)
def family(request) -> Transformer:
    """A model of each family. GPT-2 stores three projections in one matrix, and transposed."""
    fields = {"family": request.param} | FAMILIES[request.param].values
    sizes = {"vocab_size": 31, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    sizes |= {"n_kv_heads": 2, "head_dim": 8, "max_seq_len": 32}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**fields | sizes))


def test_every_projection_of_every_family_gets_an_adapter(family):
    linears = {n for n, m in family.layers.named_modules() if isinstance(m, Linear)}
    base = family(TOKENS)
    adapted(3, family)
    assert {f"layers.{n}" for n in linears} == set(adapters(family))
    assert (family(TOKENS) - base).abs().max() > 1e-2
    assert "rank" not in repr(family) and "LoRALinear" in repr(family)


def test_the_merged_model_of_every_family_is_saved_like_any_other(family, tmp_path):
    names = [name for name, _ in family.named_parameters()]
    stored = copy.deepcopy(family)
    wanted = adapted(3, family)(TOKENS)
    merged = merge_lora(family, stored)
    assert [name for name, _ in merged.named_parameters()] == names and not adapters(merged)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path)(TOKENS), wanted)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_adapters_are_not_saved_before_they_are_merged(tmp_path):
    with pytest.raises(ValueError, match="merge_lora"):
        adapted(3).save_pretrained(tmp_path)


def test_adapters_are_not_added_twice():
    with pytest.raises(ValueError, match="already"):
        add_lora(adapted(3), 2, 1.0)


def test_a_frozen_lm_head_costs_two_products_and_not_three():
    model, pairs = tiny(), some_pairs(6, seed=3)
    (batch,) = data.micro_batches(pairs, 10**9, "full")
    gradients = []
    for frozen, n_products in ((False, 3), (True, 2)):
        hidden = torch.randn(len(batch.predict), 32, generator=torch.Generator().manual_seed(0))
        hidden.requires_grad_()
        weight = model.lm_head_weight.detach().clone().requires_grad_(not frozen)
        with Products() as products:
            output = orpo.fused_linear_orpo(
                hidden, weight, batch.targets, batch.response, batch.nll_weight, 0.5, len(pairs)
            )
            output.loss.backward()
        assert len(products.shapes) == n_products
        assert (weight.grad is None) == frozen
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


def test_a_step_does_the_operations_that_the_formula_counts():
    """But for the first block's q, k and v: what comes into them has no gradient, as nothing in
    front of them is trained."""
    model, pairs = tiny(), some_pairs(7, seed=4)
    add_lora(model, 5, 8.0)
    with Products() as products:
        one_step(model, pairs)
    n = sum(pair.n_tokens for pair in pairs)
    first = model.layers[0].self_attn
    unneeded = sum(
        2 * n * (m.weight.numel() + m.lora_A.numel())
        for m in (first.q_proj, first.k_proj, first.v_proj)
    )
    attention = 12 * model.config.n_layers * model.config.dim * keys_seen(pairs)
    needed = step_flops(model, pairs, train.TrainConfig(sft_loss="full"))
    assert products.operations == needed - attention - unneeded


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients():
    model, pairs = adapted(5), some_pairs(5, seed=5)

    def gradients():
        model.zero_grad()
        loss_of(model, pairs).backward()
        return [p.grad for p in trainable(model)]

    wanted = gradients()
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(dynamic=True, backend="aot_eager")
    try:
        torch.testing.assert_close(gradients(), wanted)
    finally:
        torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------
# Whole runs.

LORA = ["--lora-rank", "4", "--lora-alpha", "8", "--lr", "5e-2"]


def test_a_run_resumes_to_the_bit(arguments, tmp_path, monkeypatch):
    arguments += ["--save-every", "4", *LORA]
    whole = run(arguments, "--out", str(tmp_path / "whole"))
    assert steps(whole)[-1]["loss"] < steps(whole)[0]["loss"] - 0.1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 10)
        run(arguments)
    assert steps(run(arguments, "--resume")) == steps(whole)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_checkpoint_holds_adapters_alone_and_a_number_to_know_the_base_again():
    model = tiny()
    add_lora(model, 4, 8.0)
    state = training_state(model, train.make_optimizer(model, train.TrainConfig()))
    n_trained = sum(p.numel() for p in trainable(model))
    assert 0 < n_trained < sum(p.numel() for p in model.parameters()) / 2
    assert sum(x.numel() for x in state.values()) == n_trained + 1


def test_adapters_then_an_export_then_the_whole_model(arguments, tmp_path):
    """Each run begins where the one before ended, and writes no adapters where it has none."""
    arguments += ["--max-steps", "2", "--save-every", "1", "--keep", "1"]
    first = run(arguments, *LORA)
    export(tmp_path / "out" / "checkpoints" / "step-00000002", tmp_path / "made")
    second = run(arguments, "--model", str(tmp_path / "made"), "--out", str(tmp_path / "second"))
    model = str(tmp_path / "second" / "model")
    third = run(arguments, *LORA, "--lora-adapters", "--model", model, "--overwrite")
    for before, after in ((first, second), (second, third)):
        assert after[0]["step"] == 0 and before[-1]["step"] == 2
        assert after[0]["eval_loss"] == pytest.approx(before[-1]["eval_loss"], rel=1e-5)
        assert after[0]["eval_loss"] != after[-1]["eval_loss"]
    assert not (tmp_path / "second" / "adapters").exists()
    named = json.loads((tmp_path / "out" / "adapters" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == model


@pytest.mark.parametrize("newest", ["abc", "def"])
@pytest.mark.parametrize("name", ["ORG/NAME-7B", "gpt2"])
def test_adapters_name_a_model_of_the_hub_and_not_this_machines_cache(
    name, newest, tmp_path, monkeypatch
):
    """Where that name means the same weights there."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / f"models--{name.replace('/', '--')}"
    folder = model / "snapshots" / "abc"
    for folder_of_it in (folder, model / "snapshots" / newest):
        folder_of_it.mkdir(parents=True, exist_ok=True)
        (folder_of_it / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(newest)
    write_adapters(tmp_path, "llama", {}, 2, 4.0, folder)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = (name, "abc") if newest == "abc" else (str(folder), None)
    assert (found["base_model_name_or_path"], found["revision"]) == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_run_exports_is_what_it_evaluated(arguments, tmp_path, dtype, capsys):
    """bfloat16 rounds the sum of weight and change once more: 8 bits."""
    base = tmp_path / "base"
    Transformer.from_pretrained(FACTS / "base", dtype=torch.float32).save_pretrained(base)
    for file in (FACTS / "base").glob("tokenizer*"):
        shutil.copyfile(file, base / file.name)
    rows = run(arguments, *LORA, "--lr", "1e-2", "--dtype", dtype, "--model", str(base))
    eval_data = arguments[arguments.index("--eval-data") + 1]
    capsys.readouterr()
    out = str(tmp_path / "out" / "model")
    flags = ["--eval-only", "--model", out, "--eval-data", eval_data, "--lam", "0.5"]
    train.main([*flags, "--dtype", dtype, "--device", "cpu"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    rel = 1e-5 if dtype == "float32" else 2e-2
    assert again["eval_loss"] == pytest.approx(rows[-1]["eval_loss"], rel=rel)
    assert rows[0]["eval_loss"] > 1.2 * rows[-1]["eval_loss"]  # it has learnt


def test_a_float32_checkpoint_stays_one_in_bfloat16_runs(tmp_path):
    """The run's own frozen weights are rounded; exported are the stored ones and the change."""
    tiny().save_pretrained(tmp_path)
    stored = Transformer.from_pretrained(tmp_path)
    model = adapted(6, Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16))
    merged = merge_lora(model, Transformer.from_pretrained(tmp_path))
    assert torch.equal(merged.embed_tokens.weight, stored.embed_tokens.weight)
    for name, m in adapters(model).items():
        change = 8 / 3 * (m.lora_B.double() @ m.lora_A.double())
        wanted = stored.get_submodule(name).weight + change
        torch.testing.assert_close(
            merged.get_submodule(name).weight.double(), wanted, rtol=1e-6, atol=1e-7
        )


def test_a_checkpoint_becomes_the_merged_model(folder, arguments, tmp_path, capsys):
    base = shutil.copytree(folder / "model", tmp_path / "base")
    run(arguments, "--save-every", "12", *LORA, "--model", str(base))
    step, made = tmp_path / "out" / "checkpoints" / "step-00000012", tmp_path / "made"
    export_file.main([str(step), "--out", str(made)])
    assert file_bytes(made) == file_bytes(tmp_path / "out" / "model")
    # The base has moved, and in its place there is nothing, or another one.
    moved, again = base.rename(tmp_path / "moved"), tmp_path / "again"
    with pytest.raises(ValueError, match=r"base: the base model of .* is not there; .* --model"):
        export(step, again)
    export_file.main([str(step), "--out", str(again), "--model", str(moved)])
    assert file_bytes(made) == file_bytes(again)
    model = Transformer.from_pretrained(moved)
    with torch.no_grad():
        model.norm.weight.mul_(1.01)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match=r"base: is not the model that was trained; .* --model"):
        export(step, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    export(step, tmp_path / "other", moved)  # counts more than the place that the run names
    assert file_bytes(made) == file_bytes(tmp_path / "other")


def test_a_checkpoint_of_every_family_becomes_the_merged_model(family, tiny_tokenizer, tmp_path):
    """Frozen weights in bfloat16, of a model that is stored in float32."""
    base, dtype = tmp_path / "base", torch.bfloat16
    family.save_pretrained(base)
    config = train.TrainConfig(model=str(base), lora_rank=3, lora_alpha=8.0, dtype="bfloat16")
    model = adapted(3, Transformer.from_pretrained(base, dtype=dtype))
    optimizer, tokenizer = train.make_optimizer(model, config), data.load_tokenizer(tiny_tokenizer)
    about = {"chat": False, "plain": True, "n_steps": 2, "digests": {}}
    a_run = Run(config, tmp_path, model, optimizer, tokenizer, **about)
    save_model(a_run, tmp_path / "model")
    save_checkpoint(a_run, 1)
    export(tmp_path / "checkpoints" / "step-00000001", tmp_path / "made")
    assert file_bytes(tmp_path / "made") == file_bytes(tmp_path / "model")
    assert Transformer.from_pretrained(tmp_path / "made").config.dtype == "float32"


def test_adapters_of_every_family_give_the_merged_model_as_peft_reads_them(
    family, tmp_path, monkeypatch
):
    """W + alpha/r B A of each stored matrix, turned where peft would turn it. Of joined projections
    (GPT-2's, Phi-3's) rank and alpha are those of the patterns. The tokenizer is left out."""
    monkeypatch.setattr("run.saving.write_serving_files", lambda *_: None)
    family.save_pretrained(tmp_path / "base")
    model, base = adapted(3, copy.deepcopy(family)), tmp_path / "base"
    merge_lora(model, family).save_pretrained(tmp_path / "merged")
    config = train.TrainConfig(model=str(base), lora_rank=3, lora_alpha=8.0)
    about = {"chat": False, "plain": True, "n_steps": 2, "digests": {}}
    save_adapters(Run(config, tmp_path, model, None, None, **about), tmp_path / "adapters")
    before, wanted = (dict(read_safetensors(tmp_path / x / "model.safetensors"))
                      for x in ("base", "merged"))  # fmt: skip
    before = {name: tensor.clone() for name, tensor in before.items()}
    peft = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == str(base)
    found = read_safetensors(tmp_path / "adapters" / "adapter_model.safetensors")
    parts, seen = {name: tensor.clone() for name, tensor in found}, set()
    for name in [name for name in parts if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        stored, last = module.removeprefix("base_model.model."), module.rpartition(".")[2]
        a, b = parts.pop(name), parts.pop(f"{module}.lora_B.weight")
        rank = peft["rank_pattern"].get(last, peft["r"])
        scale = peft["alpha_pattern"].get(last, peft["lora_alpha"]) / rank
        change = scale * b.double() @ a.double()
        assert len(a) == rank and last in peft["target_modules"]
        change = change.t() if peft["fan_in_fan_out"] else change
        got = before[f"{stored}.weight"].double() + change
        torch.testing.assert_close(got, wanted[f"{stored}.weight"].double(), rtol=1e-6, atol=1e-7)
        seen.add(f"{stored}.weight")
    assert not parts and seen == {n for n, x in before.items() if not torch.equal(x, wanted[n])}


def test_the_best_model_is_a_merged_one(arguments, tmp_path):
    run(arguments, "--eval-every", "12", *LORA)
    best = file_bytes(tmp_path / "out" / "best")
    assert best.pop("evaluation.json") and best == file_bytes(tmp_path / "out" / "model")


def test_resuming_on_another_base_is_refused(folder, arguments, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(folder / "model", tmp_path / "base")
    arguments += ["--save-every", "4", *LORA, "--model", str(base)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 6)
        run(arguments)
    model = Transformer.from_pretrained(base)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(1.3)
    model.save_pretrained(base)
    assert "was trained on another model than" in fails(capsys, [*arguments, "--resume"])


def test_a_model_that_has_moved_is_resumed_on_and_another_shape_is_not(
    folder, arguments, tmp_path, monkeypatch, capsys
):
    """The checkpoint has what was trained; what was frozen is compared, and so are the shapes."""
    arguments += ["--save-every", "4", *LORA]
    whole = run(arguments, "--out", str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 6)
        run(arguments)
    other = shutil.copytree(folder / "model", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    Transformer(ModelConfig.from_json(other / "config.json")).save_pretrained(other)
    theta = 77.0 + config.get("rope_theta", 0)
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": theta}))
    error = fails(capsys, [*arguments, "--resume", "--model", str(other)])
    assert "was trained on another model than" in error
    moved = shutil.copytree(folder / "model", tmp_path / "moved")
    rows = run(arguments, "--resume", "--model", str(moved))
    assert "--resume: --model was " in capsys.readouterr().out
    assert steps(rows) == steps(whole)
    assert file_bytes(tmp_path / "out" / "model") == file_bytes(tmp_path / "whole" / "model")
    error = fails(capsys, [*arguments, "--resume", "--model", str(other)])  # it is finished now
    assert "--resume: model was" in error


def test_the_number_of_a_frozen_weight_is_its_norm_without_a_copy_of_it(monkeypatch):
    p = torch.randn(5000, 4000)
    sizes, double = [], torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda x: sizes.append(x.numel()) or double(x))
    assert float(norm_of(p)) == pytest.approx(float(double(p).norm()), rel=1e-12)
    assert sizes == [2**24, 20_000_000 - 2**24]


def test_adapters_that_are_asked_for_after_the_run_are_written(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    run(arguments, *LORA, "--save-every", "0")
    kept = file_bytes(out / "model")
    error = fails(capsys, [*arguments, *LORA, "--save-every", "0", "--resume", "--lora-adapters"])
    assert "is finished, and no checkpoint has them" in error
    run(arguments, *LORA, "--overwrite")
    rows = run(arguments, *LORA, "--resume", "--lora-adapters")
    assert len(steps(rows)) == 12 and file_bytes(out / "model") == kept
    assert (out / "adapters" / "adapter_model.safetensors").is_file()
    run(arguments, *LORA, "--resume", "--lora-adapters")
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    rows = []
    for n in (1, 2):
        out = ["--out", str(tmp_path / str(n))]
        rows.append(launch(n, [*files(folder), *UNEVEN, *LORA, *out])[0])
    compare(*rows, rel=2e-5)
    compare_models(tmp_path / "1", tmp_path / "2", 1e-5)


def test_a_begins_with_numbers_up_to_the_root_of_its_inputs():
    """As torch.nn.Linear's; seen where a projection is not square."""
    model = tiny(hidden_dim=200)
    add_lora(model, 8, 16.0)
    for layer in lora_layers(model).values():
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound and not layer.lora_B.any()
