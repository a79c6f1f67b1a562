"""The weights of a Hugging Face model folder.

Reads      model.safetensors, or its shards by their index; else pytorch_model.bin, or its shards,
           as tensors and no code
Writes     model.safetensors, above 5 GB as shards with an index
Refuses    GGUF, Git LFS pointers, files that are broken or cut short, and every tensor whose name,
           shape or dtype is not the expected one

By hand and not by the safetensors library: a file is eight bytes, a header in JSON and the tensors'
bytes, and here each tensor is a view of the mapped file, so that loading takes no second copy of
the model.
"""

import json
import math
import mmap
import re
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from formats.families import FAMILIES, stored_names
from formats.files import read_json, whole_file


def read_weights(folder: Path, model_type: str, shapes: dict[str, torch.Size]):
    """Yields (our name, tensor) for each of our parameters, whose names and shapes are given.

    A tensor is a view of its file: copy it before taking the next. Raises FileNotFoundError, and
    ValueError where a tensor is unknown, missing, or has another shape, or where a head is stored
    that should be the embedding and is not.
    """
    family = FAMILIES[model_type]
    expected, tied = stored_names(family, shapes), {}
    embedding = f"{family.modules.get('embed_tokens', 'embed_tokens')}.weight"

    def parts(file, name: str, tensor: Tensor):
        """(our name, tensor) for each parameter of ours that a stored tensor holds."""
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
        return zip(ours, tensor.split(rows), strict=True)

    for file, name, tensor in _checkpoint_tensors(folder):
        name = re.sub(r"^(model\.|transformer\.)?(decoder\.)?", "", name)
        if "lm_head.weight" not in shapes and name in ("lm_head.weight", embedding):
            tied[name] = tensor
        if name == "lm_head.weight" and name not in shapes:
            continue
        if name.endswith((".inv_freq", ".attn.bias", ".attn.masked_bias")):
            continue
        yield from parts(file, name, tensor)
    if embedding in expected and "lm_head.weight" in tied:  # tied, and stored by its other name
        yield from parts(folder, embedding, tied["lm_head.weight"])
    if len(tied) == 2 and not _equal(*tied.values()):
        raise ValueError(
            f"{folder}: config.json ties lm_head to the embedding, and the weights hold another "
            'lm_head: set "tie_word_embeddings": false there, or remove that tensor'
        )
    if expected:
        names = ", ".join([*expected][:5]) + (", ..." if len(expected) > 5 else "")
        raise ValueError(f"{folder}: {len(expected)} tensors are missing: {names}")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


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
        if n_bytes and sys.platform == "linux":  # only Linux knows the advice
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
    """Writes a temporary file, then renames it. The bytes depend only on the tensors, not on time
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


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
