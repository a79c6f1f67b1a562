"""Hugging Face model folders, in and out, and the state of a training run.

    python checkpoint.py OUT/checkpoints/step-N --out FOLDER      a checkpoint as a model folder

Reads      config.json of the families below, its keys old and new; model.safetensors, or its
           shards by their index; else pytorch_model.bin, or its shards, as tensors and no code
Writes     config.json and model.safetensors (above 5 GB shards with an index)
Refuses    other families, quantised weights, GGUF, values of config.json that model.py does not
           build, and every tensor whose name, shape or dtype is not the expected one
Training   weights, moments and counts by torch.distributed.checkpoint: written beside the others,
           then renamed, so that a folder named step-N is complete
Adapters   as peft reads them

By hand and not by the safetensors library: a file is eight bytes, a header in JSON and the tensors'
bytes, and here each tensor is a view of the mapped file, so that loading takes no second copy of
the model. Nothing in this file is needed to understand ORPO.
"""

import argparse
import contextlib
import fcntl
import json
import math
import mmap
import os
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

# ---------------------------------------------------------------------------------------------
# Families: what a Hugging Face architecture calls things, and what makes it what it is.


class Family(NamedTuple):
    """Keys and values of ModelConfig, names of parameters. What is not said is as in Llama."""

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
        "Qwen3ForCausalLM", keys=BIASES, values={"qk_norm": True, "head_dim": 128},
        supported=ROPE, windows=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM", keys={"rotary_fraction": "partial_rotary_factor"}, supported=ROPE,
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


# ---------------------------------------------------------------------------------------------
# config.json


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises FileNotFoundError or ValueError with the path."""
    if path.parent.is_file():
        raise ValueError(f"{path.parent}: is a file; the folder of a Hugging Face model is wanted")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face model folder has one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


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
    found = {"torch_dtype": source.get("dtype"), "rope_type": rope_type, **rope}
    found |= {key: value for key, value in source.items() if value is not None}
    for key, supported in family.supported.items():
        if key in found and found[key] not in supported:
            raise ValueError(f"{key} {found[key]!r} is not supported, only {supported}")
    keys = LLAMA_KEYS | family.keys
    values = {name: found[key] for name, key in keys.items() if found.get(key) is not None}
    if source["model_type"] == "gpt2" and "n_embd" in found:
        values.setdefault("hidden_dim", 4 * found["n_embd"])
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"):
        if name not in values:
            raise ValueError(f"key {keys[name]!r} is missing")
    for name, value in values.items():
        most = 1000 if name == "n_layers" else 2**63 if types[name] is float else 2**31
        if not _fits(value, types[name], most):
            raise ValueError(f"{keys[name]} cannot be {value!r:.80}")
    for key in ROPE_NUMBERS.get(str(rope_type), ()):
        if not _fits(rope.get(key), float):
            raise ValueError(f"rope_scaling of type {rope_type} needs a number {key!r} above 0")
    values["windows"] = _windows(found, values["n_layers"]) if family.windows else []
    values["rope_scaling"] = rope | {"rope_type": rope_type} if rope_type != "default" else {}
    return family.values | values | {"family": source["model_type"], "source": source}


def _fits(value, kind: type, most=2**31) -> bool:
    """Is of this type; a number is between 0 and most, which NaN is not."""
    if kind not in (int, float):
        return isinstance(value, kind)
    is_number = isinstance(value, (int, float) if kind is float else int)
    return is_number and not isinstance(value, bool) and 0 < value < most


def _windows(found: dict, n_layers: int) -> list:
    """How far back each layer sees: Qwen only in the layers switched on, the others everywhere."""
    size, everywhere = found.get("sliding_window"), found["model_type"] in ("mistral", "phi3")
    if not size or not (everywhere or found.get("use_sliding_window")):
        return []
    if not _fits(size, int):
        raise ValueError(f"sliding_window cannot be {size!r:.80}")
    first = 0 if everywhere else found.get("max_window_layers", 28)
    types = ["sliding_attention" if i >= first else "full" for i in range(n_layers)]
    types = found.get("layer_types", types)
    if not isinstance(types, list) or len(types) != n_layers:
        raise ValueError(f"layer_types must list {n_layers} layers, not {types!r:.80}")
    return [size if t == "sliding_attention" else None for t in types]


def config_json(config) -> dict:
    """The config.json of a ModelConfig: what was read, and what we know under its family's keys."""
    family = FAMILIES[config.family]
    known = {key: getattr(config, name) for name, key in (LLAMA_KEYS | family.keys).items()}
    if config.position_offset is not None and config.source:
        # Rotary's keys mean nothing here: only those that were read.
        known = {key: known[key] for key in known if key in config.source or key == "torch_dtype"}
    kept = {key: value for key, value in config.source.items() if key != "dtype"}
    return kept | known | {"architectures": [family.architecture], "model_type": config.family}


# ---------------------------------------------------------------------------------------------
# Weights.


def stored_names(family: Family, ours) -> dict[str, list[str]]:
    """Names in a checkpoint, without prefix: our parameters, which GPT-2 and Phi-3 stack partly."""
    found = {}
    for name in ours:
        *layer, module, leaf = re.fullmatch(r"(?:(layers)\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        stored = f"{family.modules.get(module, module)}.{leaf}"
        if layer[0]:
            stored = f"{family.modules.get('layers', 'layers')}.{layer[1]}.{stored}"
        found.setdefault(stored, []).append(name)
    return found


def read_weights(folder: Path, model_type: str, shapes: dict[str, torch.Size]):
    """Yields (our name, tensor) for each of our parameters, whose names and shapes are given.

    A tensor is a view of its file: copy it before taking the next. Raises FileNotFoundError, and
    ValueError where a tensor is unknown, missing, or has another shape.
    """
    family = FAMILIES[model_type]
    expected = stored_names(family, shapes)
    for file, name, tensor in _checkpoint_tensors(folder):
        name = re.sub(r"^(model\.|transformer\.)?(decoder\.)?", "", name)
        tied = name == "lm_head.weight" and name not in shapes
        if tied or name.endswith((".inv_freq", ".attn.bias", ".attn.masked_bias")):
            continue
        if name not in expected:
            raise ValueError(f"{file}: tensor {name!r} is unknown here, or is there twice")
        ours = expected.pop(name)
        if family.conv1d and name.startswith("h.") and tensor.dim() == 2:
            tensor = tensor.t()
        if not tensor.is_floating_point() or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{file}: tensor {name!r} is stored as {tensor.dtype}")
        rows = [shapes[name][0] for name in ours]
        wanted = (sum(rows), *shapes[ours[0]][1:])
        if tensor.shape != wanted:
            raise ValueError(
                f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"config.json asks for shape {wanted}"
            )
        yield from zip(ours, tensor.split(rows), strict=True)
    if expected:
        names = ", ".join([*expected][:5]) + (", ..." if len(expected) > 5 else "")
        raise ValueError(f"{folder}: {len(expected)} tensors are missing: {names}")


def write_config(folder: Path, config, dtype: torch.dtype):
    """Writes the config.json of a ModelConfig, for weights that are stored in dtype."""
    about = config_json(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def write_weights(
    folder: Path | None,
    model_type: str,
    parameters: dict[str, Tensor],
    dtype: torch.dtype,
    shard_bytes: int = 5 * 10**9,
):
    """Writes the weights, cast to dtype, in shards of at most shard_bytes.

    Of a sharded model each tensor is gathered as it is written, by all processes together: one of
    them has the folder, the others pass None and write nothing.
    """
    family, tensors = FAMILIES[model_type], {}
    for name, ours in stored_names(family, parameters).items():
        parts = [parameters[our_name].detach() for our_name in ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if family.conv1d and name.startswith("h.") and tensor.dim() == 2:
            tensor = tensor.t()
        tensors[name if name.startswith("lm_head.") else family.prefix + name] = tensor
    if folder is None:
        for tensor in tensors.values():
            full_tensor(tensor)
        return
    shards, size, total = [{}], 0, 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + n_bytes > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size, total = size + n_bytes, total + n_bytes
    # An older model's files in this folder would be loaded in place of these.
    for old in (*folder.glob("model*.safetensors"), *folder.glob("model*.index.json")):
        old.unlink()
    if len(shards) == 1:
        return write_safetensors(folder / "model.safetensors", tensors, dtype)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, dtype)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor gathered by all of its processes; any other one as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _checkpoint_tensors(folder: Path):
    """Yields (file, name, tensor) of a model folder, safetensors in preference to pickles."""
    kinds = ("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_pickle)
    for kind, read in kinds:
        index = folder / f"{kind}.index.json"
        if (folder / kind).is_file():
            files = [folder / kind]
        elif index.is_file():
            weight_map = read_json(index).get("weight_map")
            names = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
            if not all(isinstance(x, str) and x and Path(x).name == x for x in names):
                raise ValueError(f"{index}: weight_map must map tensor names to files beside it")
            files = [folder / name for name in sorted(names)]
        else:
            continue
        for file in files:
            yield from ((file, name, tensor) for name, tensor in read(file))
        return
    known = "no model.safetensors or pytorch_model.bin, nor their index"
    raise FileNotFoundError(f"{folder}: {known} (GGUF and other formats are not read)")


def _read_pickle(file: Path):
    """Yields (name, tensor) of a file of torch.save. weights_only: other pickles may run code."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:  # only the zip format, new since torch 1.6, can be mapped
        is_zip = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        _refuse_pointer(file)
        problem = f"{type(error).__name__}: not a checkpoint of tensors and nothing but tensors"
        raise ValueError(f"{file}: {problem}") from None
    items = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in items):
        raise ValueError(f"{file}: not a dict of names and tensors")
    yield from items


def _refuse_pointer(path: Path):
    with open(path, "rb") as f:
        if f.read(12) == b"version http":
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself: git lfs pull")


# ---------------------------------------------------------------------------------------------
# Safetensors. A file is: 8 bytes, the header's length n, little-endian; n bytes of JSON,
# {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {...}}; the tensors' bytes.

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path):
    """Yields (name, tensor), a view of the mapped file whose pages are let go at the next one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > min(size - 8, 100_000_000):
            _refuse_pointer(path)
            raise ValueError(f"{path}: not a safetensors file, or cut short: header of {n} bytes")
        try:
            entries = _safetensors_header(f.read(n), size - 8 - n)
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            problem = f"lacks the key {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: broken safetensors file: {problem:.300}") from None
        # ACCESS_COPY: torch wants writable memory; a write would stay in this process
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, dtype, shape, begin, n_bytes in entries:
        tensor, begin = torch.empty(shape, dtype=dtype), 8 + n + begin
        if n_bytes:
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=n_bytes, offset=begin)
            if begin % dtype.itemsize:
                raw = raw.clone()  # a tensor must be aligned
            tensor = raw.view(dtype).view(shape)
        yield name, tensor
        page = begin - begin % mmap.PAGESIZE
        if n_bytes and sys.platform == "linux":  # which alone knows the advice
            mapped.madvise(mmap.MADV_DONTNEED, page, begin + n_bytes - page)


def _safetensors_header(header: bytes, n_data: int) -> list[tuple]:
    """[(name, dtype, shape, begin, bytes)] in the file's order, checked to cover it exactly."""
    entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    entries.pop("__metadata__", None)
    tensors, end = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"dtype {entry['dtype']!r} is not supported, only {', '.join(DTYPES)}")
        dtype, shape, (begin, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sizes = shape if isinstance(shape, list) else [-1]
        if not all(type(x) is int and x >= 0 for x in (*sizes, begin, stop)):
            raise ValueError(f"tensor {name!r} has a negative or broken shape or offset")
        if math.prod(max(x, 1) for x in shape) >= 2**63:
            raise ValueError(f"tensor {name!r} has too large a shape")
        n_bytes = math.prod(shape) * dtype.itemsize
        if begin != end or stop - begin != n_bytes or stop > n_data:
            raise ValueError(f"tensor {name!r}, shape {shape}: bytes {begin}:{stop} of {n_data}")
        end = stop
        tensors.append((name, dtype, shape, begin, n_bytes))
    if end != n_data:
        raise ValueError(f"{n_data - end} bytes belong to no tensor")
    return tensors


def _unique_keys(pairs):
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return keys


def write_safetensors(path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None):
    """Writes a temporary file, then renames it. The bytes depend on the tensors alone, not on time
    or place. dtype: each tensor is cast to it as it is written."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        stored, begin = dtype or tensor.dtype, offset
        offset += tensor.numel() * stored.itemsize
        header[name] = {"dtype": DTYPE_NAMES[stored], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [begin, offset]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that every tensor starts aligned
    with whole_file(path) as temporary, open(temporary, "wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            f.write(_raw_bytes(full_tensor(tensor.detach()).to("cpu", dtype)))


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary file's path, which becomes `path` when it is written, and else is removed.

    Raises OSError that names `path`.
    """
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: not written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


# ---------------------------------------------------------------------------------------------
# LoRA.


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
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()),
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


# ---------------------------------------------------------------------------------------------
# Folders that are replaced as a whole.


@contextlib.contextmanager
def replaced(folder: Path):
    """Yields an empty folder to write to, which takes the place of `folder` when all went well.

    Whatever happens, `folder` is never half written. Raises OSError with its name and the reason.
    """
    tidy(folder)
    new, old = _beside(folder)
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except OSError as error:
        # Of whole_file's own sentence only the reason: its path is that of the folder beside.
        reason = error.strerror or str(error).rpartition("not written: ")[2]
        raise OSError(f"{folder}: not written: {reason}") from None
    finally:
        tidy(folder)


def tidy(folder: Path):
    """Clears up behind `replaced`, also where its process was killed."""
    new, old = _beside(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for left in filter(Path.exists, (new, old)):
        shutil.rmtree(left)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.unfinished"), folder.with_name(f".{folder.name}.old")


# ---------------------------------------------------------------------------------------------
# The state of a training run: a folder a step; the newest that can be read is the one to resume.

# torch.distributed.checkpoint says so each time that there is a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def rank() -> int:
    """The number of this process; 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """No process goes on before all have come here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(()))  # on the CPU, by gloo: no GPU is waited for


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first."""
    return sorted((out / "checkpoints").glob("step-*"), reverse=True)


LOCK = ".lock"


@contextlib.contextmanager
def locked(out: Path):
    """Makes the folder; within it no other process can have it, on this machine or, where the file
    system can tell, on another. The lock is the kernel's: it ends with the process, however that
    ends. What was made for it alone is removed again. Raises ValueError."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(f.fileno()).st_nlink == 0  # its owner has just removed it
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            taken = False
        if taken:
            raise ValueError(f"--out {out}: another process is running in this folder")
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)
            for folder in made:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()


def save_state(
    out: Path, step: int, state: dict[str, Tensor], settings: dict, keep: int, write_more
):
    """Writes a checkpoint, by all processes together, and removes all but the newest `keep`.

    write_more(folder) writes what else belongs in it, in one process. Raises OSError with the
    reason where it fails; the older checkpoints stay then.
    """
    temporary, final = out / "checkpoints" / "unfinished", out / "checkpoints" / f"step-{step:08d}"
    try:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            (temporary / "config.json").write_text(json.dumps(settings), encoding="utf-8")
            write_more(temporary)
        barrier()
        dcp.save(state, checkpoint_id=temporary)  # returns when all processes are done
        if rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in checkpoints(out)[keep:]:
                shutil.rmtree(old)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = next((folder.name for folder in checkpoints(out)), "none")
        raise OSError(
            f"{final}: not written: {_reason(error)}; the last good checkpoint is {last}; "
            "fix this, then continue with --resume"
        ) from None


def load_state(out: Path, state: dict[str, Tensor], check) -> Path | None:
    """Fills the tensors of state from the newest checkpoint that can be read; returns its folder.

    check(settings, folder) may raise ValueError. None where the run has no checkpoint yet; raises
    ValueError where it has some and none can be read.
    """
    folders = checkpoints(out)
    for folder in folders:
        try:
            check(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder)
            dcp.load(state, checkpoint_id=folder)
            return folder
        except (OSError, json.JSONDecodeError, dcp.CheckpointException) as error:
            if rank() == 0:
                print(f"{folder}: an older one is tried: {_reason(error)}", file=sys.stderr)
    if folders:
        raise ValueError(f"{out / 'checkpoints'}: none can be read; remove it to start again")
    return None


def _reason(error: BaseException) -> str:
    """The first line of what is behind an error of torch.distributed.checkpoint, or another."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------
# A checkpoint as a model folder. The checkpoint holds in model/ what such a folder has beside its
# weights, and in weights.json the names and shapes of the parameters.


def describe_weights(folder: Path, shapes: dict[str, torch.Size], base: Path | str):
    """Writes weights.json: shapes in the order of the model, and the folder it was loaded from."""
    base = str(Path(base).resolve())
    about = {"base": base, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    (folder / "weights.json").write_text(json.dumps(about), encoding="utf-8")


def export(step: Path, out: Path, base: Path | None = None):
    """Turns a checkpoint of train.py into a model folder, as OUT/model is.

    One process and no GPU do, however many trained; Adam's moments are not loaded. base: the model
    of a LoRA run, where it has moved. Raises ValueError, OSError.
    """
    if not (step / "weights.json").is_file():
        reason = "not a checkpoint, as it has no weights.json"
        raise ValueError(f"{step}: {reason}; name a folder such as OUT/checkpoints/step-00000500")
    if out.exists():
        raise ValueError(f"--out {out}: exists; name a new folder")
    about, config = (read_json(step / name) for name in ("weights.json", "model/config.json"))
    dtype, model_type = getattr(torch, config["torch_dtype"]), config["model_type"]
    shapes = {name: torch.Size(shape) for name, shape in about["shapes"].items()}
    frozen = {name: shape for name, shape in shapes.items() if ".lora_" not in name}
    is_lora = len(frozen) < len(shapes)
    if base is not None and not is_lora:
        raise ValueError(f"--model {base}: is for LoRA runs only, and {step} holds all weights")
    # The tensors are the wanted ones alone, and cast as they are read.
    if is_lora:
        state = {name: torch.empty(shapes[name]) for name in shapes.keys() - frozen.keys()}
        state["frozen"] = torch.zeros((), dtype=torch.float64)
    else:
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    try:
        dcp.load(state, checkpoint_id=step)
    except (OSError, dcp.CheckpointException) as error:
        raise ValueError(f"{step}: cannot be read: {_reason(error)}") from None
    if is_lora:
        base = base or Path(about["base"])
        if not base.is_dir():
            raise ValueError(f"{base}: the base model of {step} is not there; name it by --model")
        state = _merge(base, model_type, frozen, state, read_json(step / "config.json"))
    with replaced(out) as folder:
        shutil.copytree(step / "model", folder, dirs_exist_ok=True)
        write_weights(folder, model_type, state, dtype)


def _merge(base: Path, model_type: str, shapes: dict, adapters: dict, settings: dict) -> dict:
    """The parameters of base, whose shapes are given, with the adapters added."""
    scale, norms, merged = settings["lora_alpha"] / settings["lora_rank"], [], {}
    for name, weight in read_weights(base, model_type, shapes):
        norms.append(weight.to(getattr(torch, settings["dtype"])).double().norm())
        pair = [adapters.get(name.removesuffix("weight") + leaf) for leaf in ("lora_A", "lora_B")]
        changed = weight if pair[0] is None else merge_adapter(weight, *pair, scale)
        merged[name] = changed.to(weight.dtype, copy=True)
    if not torch.isclose(torch.stack(norms).sum(), adapters["frozen"], rtol=1e-9):
        raise ValueError(f"{base}: is not the model that was trained; name that by --model")
    return {name: merged[name] for name in shapes}  # in the order of the model, not of its files


class Parser(argparse.ArgumentParser):
    def error(self, message):  # without the dump of the usage
        raise ValueError(f"{message} (see python {self.prog} --help)")


def main(argv=None):
    parser = Parser(prog="checkpoint.py", description=export.__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="OUT/checkpoints/step-N of a run")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--model", type=Path, help="base model of a LoRA run, where it has moved")
    try:
        given = parser.parse_args(argv)
        export(given.checkpoint, given.out, given.model)
    except (OSError, ValueError) as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"wrote {given.out}, a Hugging Face folder")


if __name__ == "__main__":
    main()
