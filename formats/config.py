"""config.json of a model folder, as the values of ModelConfig.

Reads      config.json of the families of families.py, its keys old and new
Writes     config.json, as transformers 4 and 5 read it
Refuses    other families, quantised weights, values that model.py does not build, and two keys that
           say one thing in two ways
"""

import math
from pathlib import Path

import torch

from formats.families import FAMILIES, LLAMA_KEYS, ROPE_NUMBERS
from formats.files import write_json


def config_values(source: dict, types: dict[str, type]) -> dict:
    """The values of ModelConfig's fields, whose types are given, from a config.json as read.

    Raises ValueError where a value is missing, impossible, or not built by model.py.
    """
    family = FAMILIES.get(str(source.get("model_type")))
    if family is None:
        found, known = source.get("model_type"), ", ".join(FAMILIES)
        raise ValueError(f"model_type {found!r:.80} is not supported, only {known}")
    if quantised := source.get("quantization_config"):
        advice = "if the weights are 16 bit, as after a merge, remove quantization_config"
        raise ValueError(f"quantised weights are not supported ({quantised!r:.80}); {advice}")
    rope = rope_of(source)
    rope_type = rope.pop("rope_type")
    found = {"torch_dtype": source.get("dtype"), **rope}
    found |= {key: value for key, value in source.items() if value is not None}
    found["rope_type"] = rope_type  # one at the top of the file means nothing to transformers
    if source.get("is_causal") is False:
        raise ValueError("is_causal False is not supported: this model attends to later tokens")
    if source["model_type"] in ("mistral", "qwen2", "qwen3") and "sliding_window" not in source:
        found["sliding_window"] = 4096  # null is something else: no window
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


def rope_of(source: dict) -> dict:
    """What a config.json says of rotary positions, under transformers 5's names.

    transformers 4 has rope_scaling and a rope_theta beside it, transformers 5 has rope_parameters
    with everything; a file that went through both has all of them. Raises ValueError where they
    differ, as each version would take another one.
    """
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = source.get(key) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{key} {rope!r:.80} is not an object")
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"{key} for each kind of layer is not supported: {rope!r:.80}")
        if rope:
            rope_type = rope.get("rope_type") or rope.get("type") or "default"
            if source["model_type"] == "phi3" and rope_type == "su":  # its name in the first files
                rope_type = "longrope"
            found[key] = {k: v for k, v in rope.items() if k != "type"} | {"rope_type": rope_type}
    rope = {"rope_type": "default"} | found.get("rope_scaling", {})
    for key, value in found.get("rope_parameters", {}).items():
        if "rope_scaling" in found and rope.setdefault(key, value) != value:
            raise ValueError(
                f"rope_scaling {source['rope_scaling']!r:.90} and rope_parameters "
                f"{source['rope_parameters']!r:.90} differ in {key}: remove the one that the model "
                "was not trained with"
            )
        rope[key] = value
    theta = source.get("rope_theta")
    if theta is not None and rope.setdefault("rope_theta", theta) != theta:
        raise ValueError(
            f"rope_theta {theta!r:.40} and the {rope['rope_theta']!r:.40} in rope_parameters "
            "differ: make both the one that the model was trained with"
        )
    return rope


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
    if found["model_type"] != "phi3":  # whose code in transformers does not read it
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
    for key in ("short_factor", "long_factor"):  # transformers reads both
        numbers = rope.get(key) or []
        if len(numbers) != n or not all(_fits(x, float) for x in (*numbers, factor)):
            raise ValueError(f"longrope needs {n} numbers as its {key}, not {numbers!r:.80}")
    short = rope["short_factor"]
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
    # dtype has its older name here. auto_map names code that is not handed on; all that we read is
    # in transformers itself. OPT's prefix is a second BOS, which its pipeline would write.
    left_out = ("dtype", "auto_map", "prefix")
    kept = {key: value for key, value in config.source.items() if key not in left_out}
    if config.family == "gpt2":
        kept.setdefault("n_ctx", config.max_seq_len)  # llama.cpp's converter asks for it
    rope = kept.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":  # for transformers 4, which does not know rope_parameters
        numbers = ROPE_NUMBERS.get(rope_type, ("short_factor", "long_factor"))
        if rope_type == "longrope":  # with these transformers 4 refuses it, and 5 needs them here
            numbers += tuple(key for key in ("factor", "attention_factor") if key in rope)
        name = "rope_type" if rope_type == "llama3" else "type"  # as it checks for each
        kept["rope_scaling"] = {name: rope_type} | {key: rope[key] for key in numbers}
    return kept | known | {"architectures": [family.architecture], "model_type": config.family}


def write_config(folder: Path, config, dtype: torch.dtype):
    """Writes the config.json of a ModelConfig, for weights that are stored in dtype."""
    about = config_json(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", about)
