"""LoRA adapters (Hu et al., arXiv 2106.09685): added to a model, merged into it, written for peft.

By hand and not by peft, which needs transformers' models: a projection with an adapter is a line
more. model.py knows nothing of them.
"""

import contextlib
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats.families import FAMILIES, stored_names
from formats.files import model_folder
from formats.weights import write_safetensors
from model import Linear, Transformer


class LoRALinear(Linear):
    """W x + (alpha / rank) B A x: W is frozen, A (rank, in) and B (out, rank) are trained.

    B is zero at the start, so that nothing changes yet.
    """

    def __init__(self, base: Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        bound = base.in_features**-0.5
        a = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:  # (N, in) -> (N, out)
        low_rank = F.linear(x, self.lora_A.to(x.dtype))  # (N, rank)
        return super().forward(x) + self.scale * F.linear(low_rank, self.lora_B.to(x.dtype))


def add_lora(model: Transformer, rank: int, alpha: float, seed: int = 0):
    """Freezes all, and gives each projection in the blocks a change of this rank to train."""
    if lora_layers(model):
        raise ValueError("the model has adapters already")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for part in [part for block in model.layers for part in (block.self_attn, block.mlp)]:
        for name, module in [*part.named_children()]:
            if isinstance(module, Linear):
                setattr(part, name, LoRALinear(module, rank, alpha, generator))


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    """By their names; empty where the model has no adapters."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge_lora(model: Transformer, base: Transformer) -> Transformer:
    """Adds the changes to the weights of base, the model as it was stored: our own frozen ones
    may have been rounded. Returns base."""
    for name, m in lora_layers(model).items():
        weight = base.get_submodule(name).weight  # rounded once, as it is stored
        weight.copy_(merge_adapter(weight, m.lora_A, m.lora_B, m.scale))
    return base


def merge_adapter(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """W + scale * B A in float64: float32 products on a GPU may go through tf32."""
    return weight.double() + (scale * (lora_B.double() @ lora_A.double())).to(weight.device)


def write_adapters(
    folder: Path,
    model_type: str,
    adapters: dict[str, tuple[Tensor, Tensor]],
    rank: int,
    alpha: float,
    base: Path | str,
):
    """Writes adapter_config.json and adapter_model.safetensors as peft reads them.

    adapters: lora_A (rank, in) and lora_B (out, rank) by the names of our modules.
    base: the folder of the model that they change.
    """
    family, tensors, parts_of = FAMILIES[model_type], {}, {}
    for stored, ours in stored_names(family, [f"{name}.weight" for name in adapters]).items():
        parts = [adapters[name.removesuffix(".weight")] for name in ours]
        module = stored.removesuffix(".weight")
        name = f"base_model.model.{family.prefix}{module}"
        # Of projections that are stored as one (GPT-2's q, k, v) the adapters become one, too: the
        # ranks add up, and each part of B reads its own part of A.
        tensors[f"{name}.lora_A.weight"] = torch.cat([lora_A for lora_A, _ in parts])
        tensors[f"{name}.lora_B.weight"] = torch.block_diag(*(lora_B for _, lora_B in parts))
        parts_of[module.rpartition(".")[2]] = len(parts)
    joined = {module: n for module, n in parts_of.items() if n > 1}
    base, revision = Path(base).resolve(), None
    if of_hub := re.search(r"/models--([^/]+)/snapshots/([^/]+)$", str(base)):
        # The path means something on this machine only. The name is as good, if it leads to it.
        name = of_hub[1].replace("--", "/")
        with contextlib.suppress(FileNotFoundError):
            if model_folder(name, weights=False).resolve() == base:
                base, revision = name, of_hub[2]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "revision": revision,
        "target_modules": sorted(parts_of),
        "r": rank,
        "lora_alpha": alpha,  # peft multiplies by alpha / r, as we do
        "rank_pattern": {module: n * rank for module, n in joined.items()},
        "alpha_pattern": {module: n * alpha for module, n in joined.items()},
        "fan_in_fan_out": family.conv1d,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_safetensors(folder / "adapter_model.safetensors", tensors)
