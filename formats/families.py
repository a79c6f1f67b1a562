"""Model families: what a Hugging Face architecture calls things, and what makes it what it is.

Reads      config.json of the families below, its keys old and new
Writes     config.json, as transformers 4 and 5 read it
Refuses    other families, quantised weights, and values of config.json that model.py does not build

A family is a row of FAMILIES, and only names and values: model.py knows none of them by name.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch


class Family(NamedTuple):
    """Keys and values of ModelConfig, names of parameters. Fields that are not set are Llama's."""

    architecture: str
    keys: dict = {}  # our field: its key in config.json  # noqa: RUF012
    values: dict = {}  # fields that config.json need not hold  # noqa: RUF012
    supported: dict = {}  # keys of config.json, and the only values that are built  # noqa: RUF012
    modules: dict = {}  # our module: its name in the checkpoint  # noqa: RUF012
    prefix: str = "model."  # of every name but lm_head's
    conv1d: bool = False  # the matrices of a block are stored transposed, as (in, out)
    windows: bool = False  # attention may have a sliding window


# fmt: off
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings", "activation": "hidden_act", "dtype": "torch_dtype",
}
ROPE_NUMBERS = {  # the supported types of rope_scaling, and the numbers that each needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE = {"rope_type": tuple(ROPE_NUMBERS)}
LONGROPE = {"rope_type": (*ROPE_NUMBERS, "longrope")}
BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
GPT = {
    "layer_norm": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "gated": False,
    "norm_eps": 1e-5,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", keys=BIASES | {"mlp_bias": "mlp_bias"}, supported=ROPE,
    ),
    "mistral": Family("MistralForCausalLM", supported=ROPE, windows=True),
    "qwen2": Family("Qwen2ForCausalLM", values={"qkv_bias": True}, supported=ROPE, windows=True),
    "qwen3": Family(
        # qk_norm adds self_attn.q_norm and k_norm, which have these names in the checkpoint too.
        "Qwen3ForCausalLM", keys=BIASES, values={"qk_norm": True, "head_dim": 128},
        supported=ROPE, windows=True,
    ),
    "gemma": Family(
        "GemmaForCausalLM", keys=BIASES,
        values={
            "norm_adds_one": True, "scale_embeddings": True, "tie_embeddings": True,
            "head_dim": 256, "n_kv_heads": 16, "max_seq_len": 8192,
            "activation": "gelu_pytorch_tanh",
        },
        supported={"use_bidirectional_attention": (False,)} | ROPE,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", keys=BIASES,
        values={"norm_outputs": True, "qk_norm": True, "qk_norm_joint": True, "norm_eps": 1e-5},
        supported=ROPE,
        modules={
            "input_layernorm": "post_attention_layernorm",
            "post_attention_layernorm": "post_feedforward_layernorm",
        },
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        keys=BIASES | {"mlp_bias": "mlp_bias", "rope_layers": "no_rope_layers"},
        values={
            "tie_embeddings": True, "rope_theta": 2e6, "n_kv_heads": 4, "max_seq_len": 32768,
        },
        supported=ROPE, windows=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM", keys={"rotary_fraction": "partial_rotary_factor"}, supported=LONGROPE,
        modules={
            "self_attn.q_proj": "self_attn.qkv_proj", "self_attn.k_proj": "self_attn.qkv_proj",
            "self_attn.v_proj": "self_attn.qkv_proj", "mlp.gate_proj": "mlp.gate_up_proj",
            "mlp.up_proj": "mlp.gate_up_proj",
        },
        windows=True,
    ),
    "phi": Family(
        "PhiForCausalLM",
        keys={"norm_eps": "layer_norm_eps", "rotary_fraction": "partial_rotary_factor"},
        values=GPT | {
            "lm_head_bias": True, "parallel": True, "rotary_fraction": 0.5,
            "activation": "gelu_new",
        },
        supported={"qk_layernorm": (False,)} | ROPE,
        modules={
            "self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2", "norm": "final_layernorm",
        },
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        keys={
            "dim": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "hidden_dim": "n_inner",
            "max_seq_len": "n_positions", "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        values=GPT | {
            "tie_embeddings": True, "rotary_fraction": 0, "position_offset": 0,
            "activation": "gelu_new", "max_seq_len": 1024,
        },
        supported={
            "scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
        },
        modules={
            "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "norm": "ln_f",
            "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
            "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn",
            "self_attn.v_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
        },
        prefix="transformer.", conv1d=True,
    ),
    "opt": Family(
        "OPTForCausalLM",
        keys={
            "hidden_dim": "ffn_dim", "activation": "activation_function",
            "embed_dim": "word_embed_proj_dim", "norm_first": "do_layer_norm_before",
        },
        values=GPT | {
            "tie_embeddings": True, "rotary_fraction": 0, "position_offset": 2,
            "activation": "relu",
        },
        supported={
            "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,),
        },
        modules={
            "self_attn.o_proj": "self_attn.out_proj", "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm", "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2", "norm": "final_layer_norm",
        },
        prefix="model.decoder.",
    ),
}
# fmt: on


def config_values(source: dict, types: dict[str, type]) -> dict:
    """The values of ModelConfig's fields, whose types are given, from a config.json as read.

    Raises ValueError where a value is missing, impossible, or not built by model.py.
    """
    family = FAMILIES.get(str(source.get("model_type")))
    if family is None:
        found, known = source.get("model_type"), ", ".join(FAMILIES)
        raise ValueError(f"model_type {found!r:.80} is not supported, only {known}")
    if quantised := source.get("quantization_config"):
        raise ValueError(f"quantised weights are not supported: {quantised!r:.80}")
    # transformers 5 renamed some keys; the old ones win, as most checkpoints have them
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling {rope!r:.80} is not an object")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if source["model_type"] == "phi3" and rope_type == "su":  # its name in the first files
        rope_type = "longrope"
    found = {"torch_dtype": source.get("dtype"), **rope, "rope_type": rope_type}
    found |= {key: value for key, value in source.items() if value is not None}
    for key, supported in family.supported.items():
        if key in found and found[key] not in supported:
            raise ValueError(f"{key} {found[key]!r} is not supported, only {supported}")
    keys = LLAMA_KEYS | family.keys
    values = {name: found[key] for name, key in keys.items() if found.get(key) is not None}
    if source["model_type"] == "gpt2" and "n_embd" in found:
        values.setdefault("hidden_dim", 4 * found["n_embd"])
    if source["model_type"] == "gemma" and values.get("activation") == "gelu":
        del values["activation"]  # the first files say gelu and mean its approximation
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"):
        if name not in values:
            raise ValueError(f"key {keys[name]!r} is missing")
    if source.get("num_key_value_heads", 0) is None:  # null does not mean the family's default
        values["n_kv_heads"] = values["n_heads"]
    for name, value in values.items():
        most = 1000 if name == "n_layers" else 2**63 if types[name] is float else 2**31
        if not _fits(value, types[name], most):
            raise ValueError(f"{keys[name]} cannot be {value!r:.80}")
    for key in ROPE_NUMBERS.get(str(rope_type), ()):
        if not _fits(rope.get(key), float):
            raise ValueError(f"rope_scaling of type {rope_type} needs a number {key!r} above 0")
    if "rope_layers" in family.keys:
        values["rope_layers"] = _rope_layers(found, values["n_layers"])
    values["windows"] = _windows(found, values) if family.windows else []
    if rope_type != "default":
        numbers = ROPE_NUMBERS.get(rope_type, ())
        values["rope_scaling"] = {"rope_type": rope_type} | {key: rope[key] for key in numbers}
    if rope_type == "longrope":
        _set_longrope(rope, found, values)
    return family.values | values | {"family": source["model_type"], "source": source}


def _fits(value, kind: type, most=2**31) -> bool:
    """Is of this type; a number is between 0 and most, which NaN is not."""
    if kind not in (int, float):
        return isinstance(value, kind)
    is_number = isinstance(value, (int, float) if kind is float else int)
    return is_number and not isinstance(value, bool) and 0 < value < most


def _rope_layers(found: dict, n_layers: int) -> list:
    """1 for each layer with rotary, despite the name of the key; without it all but each n-th."""
    n = found.get("no_rope_layer_interval", 4)
    if not _fits(n, int):
        raise ValueError(f"no_rope_layer_interval cannot be {n!r:.80}")
    layers = found.get("no_rope_layers", [int((i + 1) % n != 0) for i in range(n_layers)])
    layers = layers[:n_layers]  # transformers takes longer lists, too
    if len(layers) != n_layers or not all(x in (0, 1) for x in layers):
        raise ValueError(f"no_rope_layers must be 0 or 1 for {n_layers} layers: {layers!r:.80}")
    return layers


def _windows(found: dict, values: dict) -> list:
    """How far back each layer sees: Qwen only in the layers switched on, SmolLM3 in those without
    rotary, the others everywhere."""
    n_layers = values["n_layers"]
    size, everywhere = found.get("sliding_window"), found["model_type"] in ("mistral", "phi3")
    if not size or not (everywhere or found.get("use_sliding_window")):
        return []
    if not _fits(size, int):
        raise ValueError(f"sliding_window cannot be {size!r:.80}")
    first = 0 if everywhere else found.get("max_window_layers", 28)
    types = ["sliding_attention" if i >= first else "full" for i in range(n_layers)]
    if "rope_layers" in values:
        types = ["full" if rotary else "sliding_attention" for rotary in values["rope_layers"]]
    types = found.get("layer_types", types)
    if not isinstance(types, list) or len(types) != n_layers:
        raise ValueError(f"layer_types must list {n_layers} layers, not {types!r:.80}")
    return [size if t == "sliding_attention" else None for t in types]


def _set_longrope(rope: dict, found: dict, values: dict):
    """Phi-3's longrope has a short_factor for the context that the model was first trained with,
    and a long_factor, which transformers takes for a whole batch if one sequence in it is longer.
    A pair's values must not depend on what it is packed with: the context ends with the short one.
    """
    first = found.get("original_max_position_embeddings", 4096)
    if not _fits(first, int):
        raise ValueError(f"original_max_position_embeddings cannot be {first!r:.80}")
    context = values.get("max_seq_len", 4096)
    stretched = max(1, rope.get("factor") or context / first)
    factor = rope.get("attention_factor") or (1 + math.log(stretched) / math.log(first)) ** 0.5
    head_dim = values.get("head_dim", values["dim"] // values["n_heads"])
    n = int(head_dim * values.get("rotary_fraction", 1)) // 2
    short = rope.get("short_factor") or []
    if len(short) != n or not all(_fits(x, float) for x in (*short, factor)):
        raise ValueError(f"longrope needs {n} numbers as its short_factor, not {short!r:.80}")
    values["rope_scaling"] |= {"short_factor": short, "attention_factor": factor}
    values["max_seq_len"] = min(first, context)


def config_json(config) -> dict:
    """The config.json of a ModelConfig: what was read, and what we know under its family's keys."""
    family = FAMILIES[config.family]
    known = {key: getattr(config, name) for name, key in (LLAMA_KEYS | family.keys).items()}
    if config.position_offset is not None and config.source:
        # Rotary's keys mean nothing here: only those that were read.
        known = {key: known[key] for key in known if key in config.source or key == "torch_dtype"}
    if config.rope_scaling.get("rope_type") == "longrope" and config.source:
        known.pop("max_position_embeddings")  # not the cut one, from which its factors follow
    kept = {key: value for key, value in config.source.items() if key != "dtype"}
    return kept | known | {"architectures": [family.architecture], "model_type": config.family}


def write_config(folder: Path, config, dtype: torch.dtype):
    """Writes the config.json of a ModelConfig, for weights that are stored in dtype."""
    about = config_json(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def stored_names(family: Family, ours) -> dict[str, list[str]]:
    """{name in a checkpoint, without prefix: our parameters in it}; GPT-2 and Phi-3 store several
    as one matrix."""
    found = {}
    for name in ours:
        *layer, module, leaf = re.fullmatch(r"(?:(layers)\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        stored = f"{family.modules.get(module, module)}.{leaf}"
        if layer[0]:
            stored = f"{family.modules.get('layers', 'layers')}.{layer[1]}.{stored}"
        found.setdefault(stored, []).append(name)
    return found
