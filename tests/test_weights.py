"""Hugging Face folders in and out: whole, sharded, renamed and broken; safetensors byte by byte.

Broken files are given to the functions themselves, and each complaint is held to its words. How the
command line passes it on is test_bad_input.py's, and random damage is test_fuzz.py's.
"""

import json
import os
import string
from itertools import pairwise

import pytest
import torch

from formats.weights import read_safetensors, write_safetensors
from model import Transformer
from tests.runs import file_bytes
from tests.small import KINDS, V, complaint, kinds, random_model, state, with_config

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 123\n"


def tensors_of(path) -> dict:
    return dict(read_safetensors(path))


# -----------------------------------------------------------------------------
# Checkpoint folders


def assert_same_weights(model, wanted: dict):
    got = state(model)
    assert got.keys() == wanted.keys()
    for name, p in got.items():
        assert p.dtype == wanted[name].dtype and torch.equal(p, wanted[name]), name


@kinds
def test_saved_and_loaded_is_bitwise_the_same(kind, tmp_path):
    model = random_model(torch.float32, **kind)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert_same_weights(loaded, state(model))
    assert not loaded.training and loaded.config.tie_embeddings == kind["tie_embeddings"]
    tokens = torch.arange(9)[None]
    assert torch.equal(loaded(tokens), model(tokens))


@kinds
def test_the_bytes_of_a_folder_depend_on_the_weights_alone(kind, tmp_path):
    """Not on its name, the time, or a trip through a file."""
    model = random_model(torch.float32, **kind)
    for folder in ("a", "b/c"):
        model.save_pretrained(tmp_path / folder)
    Transformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "d")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b/c") == file_bytes(tmp_path / "d")
    assert sorted(file_bytes(tmp_path / "a")) == ["config.json", "model.safetensors"]  # and no .tmp


def test_saving_over_the_folder_it_was_loaded_from(tmp_path):
    random_model(torch.float32).save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    before = file_bytes(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert file_bytes(tmp_path) == before


STORED = pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64], ids=str)


@STORED
def test_weights_are_stored_and_loaded_in_the_dtype_that_is_asked_for(stored, tmp_path):
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path, dtype=stored)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(stored).removeprefix("torch.")
    loaded = Transformer.from_pretrained(tmp_path)  # dtype None: as stored
    assert_same_weights(loaded, {name: p.to(stored) for name, p in state(model).items()})
    assert loaded(torch.arange(5)[None]).dtype == stored


@STORED
def test_weights_are_cast_as_they_are_loaded(stored, tmp_path):
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path, dtype=stored)
    loaded = Transformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    assert_same_weights(loaded, {name: p.to(stored).float() for name, p in state(model).items()})


def test_stories260k_is_saved_as_it_came(shared, tmp_path):
    model = Transformer.from_pretrained(shared / "stories260K")
    model.save_pretrained(tmp_path)
    original = tensors_of(shared / "stories260K" / "model.safetensors")
    saved = tensors_of(tmp_path / "model.safetensors")
    original.pop("lm_head.weight", None)  # tied
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    before = json.loads((shared / "stories260K" / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == before


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("kind", KINDS[2:4], ids=["untied", "tied"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_names_with_and_without_the_base_prefix(prefix, kind, form, tmp_path):
    """And beside them what old checkpoints carry along: a tied lm_head, the rotary frequencies."""
    model = random_model(torch.float32, **kind)
    model.save_pretrained(tmp_path)
    tensors = {
        name if name.startswith("lm_head") else prefix + name: p for name, p in state(model).items()
    }
    tensors |= {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    tensors.setdefault("lm_head.weight", tensors[f"{prefix}embed_tokens.weight"])
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same_weights(Transformer.from_pretrained(tmp_path), state(model))


# -----------------------------------------------------------------------------
# Shards


def test_safetensors_are_read_in_preference_to_pickles(tmp_path):
    model = random_model(torch.float32, seed=1)
    model.save_pretrained(tmp_path)
    torch.save(state(random_model(torch.float32, seed=2)), tmp_path / "pytorch_model.bin")
    assert_same_weights(Transformer.from_pretrained(tmp_path), state(model))


@pytest.mark.parametrize("said", ["float32", "auto", None])
def test_the_dtype_is_that_of_the_tensors_whatever_the_config_says(said, tmp_path):
    random_model(torch.float32).save_pretrained(tmp_path, dtype=torch.bfloat16)
    with_config(tmp_path, torch_dtype=... if said is None else said)
    assert Transformer.from_pretrained(tmp_path, dtype=torch.float32).config.dtype == "bfloat16"


@pytest.fixture
def shards(tmp_path):
    """A folder of several shards, and the model in it."""
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path, shard_bytes=4000)
    return tmp_path, model


def test_shards_have_an_index(shards):
    folder, model = shards
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    for file in files:
        assert all(index["weight_map"][name] == file.name for name in tensors_of(file))


def test_shards_are_measured_in_the_dtype_that_is_stored(tmp_path):
    model = random_model(torch.float32)
    n_bytes = sum(2 * p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path, dtype=torch.bfloat16, shard_bytes=n_bytes - 1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == n_bytes
    assert len(set(index["weight_map"].values())) == 2


def test_shards_are_of_at_most_the_size_that_is_asked_for(shards):
    for file in shards[0].glob("*.safetensors"):
        tensors = tensors_of(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 4000


def test_shards_are_no_smaller_than_they_must_be(shards):
    """No two neighbours would fit into one."""
    sizes = [sum(t.nbytes for t in tensors_of(file).values())
             for file in sorted(shards[0].glob("*.safetensors"))]  # fmt: skip
    assert all(a + b > 4000 for a, b in pairwise(sizes))


def test_shards_load(shards):
    folder, model = shards
    assert_same_weights(Transformer.from_pretrained(folder), state(model))


def test_a_missing_shard_is_named(shards):
    folder, _ = shards
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name}: no such file"):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("first, second", [(10**9, 4000), (4000, 10**9), (2500, 4000)])
def test_saving_over_an_older_model_leaves_only_the_newer(first, second, tmp_path):
    random_model(torch.float32, seed=1).save_pretrained(tmp_path, shard_bytes=first)
    random_model(torch.float32, seed=2).save_pretrained(tmp_path, shard_bytes=second)
    random_model(torch.float32, seed=2).save_pretrained(tmp_path / "new", shard_bytes=second)
    wanted = state(random_model(torch.float32, seed=2))
    assert_same_weights(Transformer.from_pretrained(tmp_path), wanted)
    assert {f.name for f in tmp_path.iterdir()} - {"new"} == set(file_bytes(tmp_path / "new"))


@pytest.fixture
def inner(tmp_path):
    """A folder whose weights lie above it, and the index that is still to be written."""
    random_model().save_pretrained(tmp_path / "inner")
    (tmp_path / "inner" / "model.safetensors").rename(tmp_path / "model.safetensors")
    return tmp_path / "inner" / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hosts", "", 3, None], ids=str)
def test_an_index_cannot_point_outside_its_folder(name, inner):
    inner.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map must map"):
        Transformer.from_pretrained(inner.parent)


def test_an_index_that_names_the_folder_above_names_no_file(inner):
    inner.write_text(json.dumps({"weight_map": {"model.norm.weight": ".."}}))
    with pytest.raises(FileNotFoundError, match="no such file"):
        Transformer.from_pretrained(inner.parent)


@pytest.mark.parametrize("text, words", [("{", "not JSON"), ("{}", "weight_map must map")])
def test_a_broken_index_is_named(text, words, inner):
    inner.write_text(text)
    with pytest.raises(ValueError, match=rf"index\.json: {words}"):
        Transformer.from_pretrained(inner.parent)


# -----------------------------------------------------------------------------
# Wrong tensors


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model.norm.weight": None}, "1 tensors are missing: norm.weight"),
        ({"lm_head.weight": None}, "1 tensors are missing: lm_head.weight"),
        ({"model.layers.0.mlp.gate_proj.bias": torch.ones(24)}, "'layers.0.mlp.gate_proj.bias' is"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}, "'layers.2.mlp.up_proj.weight"),
        ({"vision.weight": torch.ones(2)}, "tensor 'vision.weight' is unknown here"),
        ({"norm.weight": torch.ones(16)}, "'norm.weight' is unknown here, or is there twice"),
        ({"model.norm.weight": torch.ones(8)}, "(8,), config.json asks for shape (16,)"),
        ({"lm_head.weight": torch.ones(16, V)}, "'lm_head.weight' has shape (16, 31), config.json"),
        ({"model.norm.weight": torch.ones(16).long()}, "'norm.weight' is stored as torch.int64"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(change, words, tmp_path):
    random_model(torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: t.clone() for name, t in tensors_of(file).items()} | change
    write_safetensors(file, {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and words in str(error.value)


def test_of_many_missing_tensors_five_are_named(tmp_path):
    random_model().save_pretrained(tmp_path)
    with_config(tmp_path, num_hidden_layers=64)
    message = complaint(Transformer.from_pretrained, tmp_path)
    assert message.startswith("558 tensors are missing: layers.2.") and message.endswith(", ...")
    assert message.count("layers") == 5


def test_a_folder_without_weights_is_told_what_is_read(tmp_path):
    """A folder called model.safetensors is no file, and GGUF is another format."""
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.gguf")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        Transformer.from_pretrained(tmp_path)
    words = "no model.safetensors or pytorch_model.bin, nor their index (GGUF and other formats"
    assert str(error.value).startswith(f"{tmp_path}: {words}")


# -----------------------------------------------------------------------------
# Pickles


class Pickled:
    """Runs a command when it is unpickled, as any pickle may."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def refused_pickle(value, folder) -> str:
    """The complaint about a pytorch_model.bin of these bytes, or of this value."""
    random_model().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(value) if isinstance(value, bytes) else torch.save(value, file)
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(folder)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    "value", [[1, 2], {"model.norm.weight": 3}, {3: torch.ones(2)}], ids=["list", "value", "key"]
)
def test_a_pickle_of_other_things_than_named_tensors_is_refused(value, tmp_path):
    assert refused_pickle(value, tmp_path) == "not a dict of names and tensors"


@pytest.mark.parametrize("value", [b"not a pickle", bytes(range(256)), b""], ids=repr)
def test_bytes_that_are_no_pickle_are_refused(value, tmp_path):
    assert "not a checkpoint of tensors" in refused_pickle(value, tmp_path)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    assert "UnpicklingError" in refused_pickle(Pickled(tmp_path / "ran"), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_float8_is_refused(tmp_path):
    """safetensors' reader knows no such dtype, a pickle brings it along."""
    value = {"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}
    assert "'norm.weight' is stored as torch.float8_e4m3fn" in refused_pickle(value, tmp_path)


def test_a_pointer_in_place_of_a_pickle_says_how_to_get_the_file(tmp_path):
    assert "a Git LFS pointer" in refused_pickle(LFS, tmp_path)


# -----------------------------------------------------------------------------
# safetensors


def raw_file(folder, header, body=b"", length=None):
    """A file put together by hand. header: bytes, or what json.dumps takes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    (folder / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + body)
    return folder / "x.safetensors"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_by_hand(tmp_path):
    """
    Names in any order, a text in __metadata__, a scalar, an empty tensor, padding of the header:
    all allowed. -2.0 in float32 is 0xC0000000; 1.0 in bfloat16 is 0x3F80.
    """
    header = {
        "b": entry("F32", [], [4, 8]),
        "__metadata__": {"format": "pt"},
        "a": entry("BF16", [1, 2], [0, 4]),
        "empty": entry("I64", [0, 3], [8, 8]),
    }
    body = bytes.fromhex("803f 803f 000000c0")
    got = tensors_of(raw_file(tmp_path, json.dumps(header).encode() + b"   ", body))
    assert got["a"].tolist() == [[1, 1]] and got["a"].dtype == torch.bfloat16
    assert got["b"].shape == () and got["b"].item() == -2
    assert got["empty"].shape == (0, 3) and got["empty"].dtype == torch.int64
    assert len(got) == 3


@pytest.mark.parametrize("shift", range(8))
def test_tensors_may_start_at_any_byte(shift, tmp_path):
    """The format asks writers to align the data, and readers meet files that do not."""
    values = torch.arange(3, dtype=torch.float64)
    header = json.dumps({"a": entry("F64", [3], [0, 24])}).encode() + b" " * shift
    file = raw_file(tmp_path, header, values.numpy().tobytes())
    got = tensors_of(file)["a"]
    assert torch.equal(got, values)
    assert got.data_ptr() % 8 == 0  # torch takes it for granted, vector instructions need it


def test_every_dtype_comes_back(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.tensor([[0, 1, 5]]).to(dtype) for dtype in dtypes}
    tensors |= {"transposed": torch.randn(3, 5).t(), "scalar": torch.tensor(2.5)}
    tensors |= {"none": torch.empty(0, 4), "é": torch.ones(2, requires_grad=True)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]  # no .tmp
    got = tensors_of(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    for name, t in tensors.items():
        assert got[name].dtype == t.dtype and torch.equal(got[name], t), name


def test_a_written_header_is_aligned_and_says_pt(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(3)})
    raw = (tmp_path / "x").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + n])["__metadata__"] == {"format": "pt"}  # transformers asks so
    assert n % 8 == 0, "tensors should start aligned"


def test_names_are_free_text(tmp_path):
    names = [string.printable, "", "ключ", "a" * 1000, "__metadata"]
    tensors = {name: torch.tensor([i]) for i, name in enumerate(names)}
    write_safetensors(tmp_path / "x", tensors)
    assert {k: v.item() for k, v in tensors_of(tmp_path / "x").items()} == {
        name: i for i, name in enumerate(names)
    }


def test_what_was_read_outlives_a_newer_file(tmp_path):
    """Views of a memory map: writing beside and renaming leaves them their old file."""
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": torch.zeros(1000)})
    old = tensors_of(file)["a"]
    write_safetensors(file, {"a": torch.ones(1000)})
    assert old.sum() == 0 and tensors_of(file)["a"].sum() == 1000
    old += 1  # and a write into a view stays in this process
    assert torch.equal(tensors_of(file)["a"], torch.ones(1000))


A, B, INF = entry(), entry(offsets=[8, 16]), float("inf")
TWICE = b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(B).encode() + b"}"
KEY_TWICE = b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
COUNT = "tensor 'a' has a negative or broken shape or offset"
BROKEN = {  # what: (header, that many bytes after it, words of the complaint)
    "no body": ({"a": A}, 0, "tensor 'a', shape [2]: bytes 0:8 of 0"),
    "body cut short": ({"a": A}, 7, "bytes 0:8 of 7"),
    "bytes that no tensor has": ({"a": A}, 9, "1 bytes belong to no tensor"),
    "no tensor at all": ({}, 8, "8 bytes belong to no tensor"),
    "not UTF-8": (b'{"\xff": 1}', 0, "utf-8"),
    "not JSON": (b"{'a': 1}", 0, "Expecting property name"),
    "deeply nested": (b"[" * 100_000, 0, "recursion"),
    "digits without end": (b'{"a":' + b"9" * 10_000 + b"}", 0, "4300 digits"),
    "an array": ([A], 8, ""),
    "an empty array": ([], 0, ""),
    "a number": (3, 0, ""),
    "null": (None, 0, ""),
    "a string": ("a", 0, ""),
    "entry an array": ({"a": [1]}, 8, ""),
    "entry null": ({"a": None}, 8, ""),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "lacks the key 'dtype'"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "lacks the key 'shape'"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "lacks the key 'data_offsets'"),
    "float8": ({"a": entry("F8_E4M3")}, 8, "dtype 'F8_E4M3' is not supported, only F64, F32, F16"),
    "torch's dtype name": ({"a": entry("float32")}, 8, "dtype 'float32' is not supported"),
    "dtype an array": ({"a": entry(["F32"])}, 8, ""),
    "dtype null": ({"a": entry(None)}, 8, "dtype None is not supported"),
    "negative shape": ({"a": entry(shape=[-2])}, 8, COUNT),
    "two negatives": ({"a": entry(shape=[-1, -2])}, 8, COUNT),
    "float shape": ({"a": entry(shape=[2.0])}, 8, COUNT),
    "bool shape": ({"a": entry(shape=[True, 2])}, 8, COUNT),
    "shape a number": ({"a": entry(shape=2)}, 8, COUNT),
    "shape a string": ({"a": entry(shape="2")}, 8, COUNT),
    "shape an object": ({"a": entry(shape={}, offsets=[0, 4])}, 4, COUNT),
    "shape null": ({"a": entry(shape=None)}, 8, COUNT),
    "a string times a number": ({"a": entry(shape=["ab", 10**18])}, 8, COUNT),
    "a list times a number": ({"a": entry(shape=[[1], 10**18])}, 8, COUNT),
    "beyond float": ({"a": entry(shape=[10**400, 1.5])}, 8, COUNT),
    "infinite": ({"a": entry(shape=[INF])}, 8, COUNT),
    "nothing times too much": ({"a": entry(shape=[0, 2**70], offsets=[0, 0])}, 0, "too large"),
    "product overflows": ({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, 0, "too large"),
    "product wraps to 2": ({"a": entry(shape=[2**63 + 1, 2])}, 8, "too large a shape"),
    "a million axes": ({"a": entry(shape=[1] * 10**6)}, 8, "tensor 'a', shape [1, 1, 1"),
    "fewer bytes than the shape": ({"a": entry(shape=[3])}, 8, "shape [3]: bytes 0:8 of 8"),
    "more bytes than the shape": ({"a": entry(shape=[1])}, 8, "shape [1]: bytes 0:8 of 8"),
    "offsets past the end": ({"a": entry(shape=[4], offsets=[0, 16])}, 8, "bytes 0:16 of 8"),
    "negative offsets": ({"a": entry(offsets=[-8, 0])}, 8, COUNT),
    "offsets reversed": ({"a": entry(offsets=[8, 0])}, 8, "bytes 8:0 of 8"),
    "one offset": ({"a": entry(offsets=[8])}, 8, "expected 2"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, 8, "expected 2"),
    "float offsets": ({"a": entry(offsets=[0.0, 8.0])}, 8, COUNT),
    "bool offset": ({"a": entry(offsets=[False, 8])}, 8, COUNT),
    "string offsets": ({"a": entry(offsets=["0", "8"])}, 8, COUNT),
    "offsets null": ({"a": entry(offsets=None), "b": B}, 16, ""),
    "first not at 0": ({"b": B}, 16, "tensor 'b', shape [2]: bytes 8:16 of 16"),
    "overlapping": ({"a": A, "b": entry(offsets=[4, 12])}, 12, "'b', shape [2]: bytes 4:12 of 12"),
    "the same bytes twice": ({"a": A, "b": A}, 8, "tensor 'b', shape [2]: bytes 0:8 of 8"),
    "a hole": ({"a": A, "b": entry(offsets=[12, 20])}, 20, "bytes 12:20 of 20"),
    "mixed offsets": ({"a": A, "b": entry(offsets=["8", 16])}, 16, ""),
    "a name twice": (TWICE, 16, "a name occurs twice in the header"),
    "a key twice": (KEY_TWICE, 0, "a name occurs twice in the header"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_safetensors_are_refused(what, tmp_path):
    header, n_bytes, words = BROKEN[what]
    message = complaint(tensors_of, raw_file(tmp_path, header, bytes(n_bytes)))
    assert message.startswith("broken safetensors file: ") and words in message


@pytest.mark.parametrize("length", [3, 2**63, 2**64 - 1])
def test_a_header_that_is_longer_than_its_file_is_refused(length, tmp_path):
    message = complaint(tensors_of, raw_file(tmp_path, b"{}", length=length))
    assert message == f"not a safetensors file, or cut short: header of {length} bytes"


def test_a_header_of_length_0_is_refused(tmp_path):
    file = raw_file(tmp_path, {"a": A}, bytes(8), length=0)
    assert "broken safetensors file" in complaint(tensors_of, file)


def test_a_file_that_is_cut_at_any_byte_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"model.a": torch.randn(3, 4), "b": torch.ones(5).half()})
    whole = file.read_bytes()
    n_header = 8 + int.from_bytes(whole[:8], "little")
    for n in range(len(whole)):
        file.write_bytes(whole[:n])
        words = "cut short" if n < n_header else f"of {n - n_header}"
        assert words in complaint(tensors_of, file), n


def test_a_pointer_in_place_of_safetensors_says_how_to_get_the_file(tmp_path):
    (tmp_path / "x").write_bytes(LFS)
    message = complaint(tensors_of, tmp_path / "x")
    assert message == "a Git LFS pointer, not the file itself: git lfs pull"
