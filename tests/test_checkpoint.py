"""Hugging Face folders in and out: whole, sharded, renamed and broken; safetensors byte by byte."""

import json
import os
import random
import string

import pytest
import torch

import checkpoint
from checkpoint import write_safetensors
from model import Transformer
from tests.test_model import KINDS, V, kinds, random_model


def read_safetensors(path) -> dict:
    return dict(checkpoint.read_safetensors(path))


# -----------------------------------------------------------------------------
# Checkpoint folders


def state(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_weights(model, wanted: dict):
    got = state(model)
    assert got.keys() == wanted.keys()
    for name, p in got.items():
        assert p.dtype == wanted[name].dtype and torch.equal(p, wanted[name]), name


def file_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@kinds
def test_saved_and_loaded_is_bitwise_the_same(kind, tmp_path):
    model = random_model(torch.float32, **kind)
    for folder in ("a", "b/c"):
        model.save_pretrained(tmp_path / folder)
    assert sorted(file_bytes(tmp_path / "a")) == ["config.json", "model.safetensors"]  # and no .tmp
    loaded = Transformer.from_pretrained(tmp_path / "a")
    assert_same_weights(loaded, state(model))
    assert not loaded.training and loaded.config.tie_embeddings == kind["tie_embeddings"]
    tokens = torch.arange(9)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    # The bytes depend on the weights alone: not on the folder, the time, or a trip through a file.
    loaded.save_pretrained(tmp_path / "d")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b/c") == file_bytes(tmp_path / "d")


def test_saving_over_the_folder_it_was_loaded_from(tmp_path):
    random_model(torch.float32).save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    before = file_bytes(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_storage_dtype_and_dtype_argument(stored, tmp_path):
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path, dtype=stored)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(stored).removeprefix("torch.")
    rounded = {name: p.to(stored) for name, p in state(model).items()}
    loaded = Transformer.from_pretrained(tmp_path)
    assert_same_weights(loaded, rounded)  # dtype None: as stored
    assert loaded(torch.arange(5)[None]).dtype == stored
    loaded = Transformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    assert_same_weights(loaded, {name: p.float() for name, p in rounded.items()})


def test_shards_have_an_index_and_load(tmp_path):
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    for file in files:
        tensors = read_safetensors(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 4000
    assert_same_weights(Transformer.from_pretrained(tmp_path), state(model))
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=files[1].name):
        Transformer.from_pretrained(tmp_path)


def test_stories260k_is_saved_as_it_came(shared, tmp_path):
    model = Transformer.from_pretrained(shared / "stories260K")
    model.save_pretrained(tmp_path)
    original = read_safetensors(shared / "stories260K" / "model.safetensors")
    saved = read_safetensors(tmp_path / "model.safetensors")
    original.pop("lm_head.weight", None)  # tied
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    before = json.loads((shared / "stories260K" / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == before


@pytest.mark.parametrize("first, second", [(10**9, 4000), (4000, 10**9), (2500, 4000)])
def test_saving_over_an_older_model_leaves_only_the_newer(first, second, tmp_path):
    random_model(torch.float32, seed=1).save_pretrained(tmp_path, shard_bytes=first)
    random_model(torch.float32, seed=2).save_pretrained(tmp_path, shard_bytes=second)
    random_model(torch.float32, seed=2).save_pretrained(tmp_path / "new", shard_bytes=second)
    wanted = state(random_model(torch.float32, seed=2))
    assert_same_weights(Transformer.from_pretrained(tmp_path), wanted)
    assert {f.name for f in tmp_path.iterdir()} - {"new"} == set(file_bytes(tmp_path / "new"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hosts", 3, None], ids=str)
def test_an_index_cannot_point_outside_its_folder(name, tmp_path):
    random_model().save_pretrained(tmp_path / "inner")
    (tmp_path / "inner" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "inner" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map"):
        Transformer.from_pretrained(tmp_path / "inner")


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


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model.norm.weight": None}, ["norm.weight", "missing"]),
        ({"lm_head.weight": None}, ["lm_head.weight", "missing"]),
        ({"model.layers.0.mlp.gate_proj.bias": torch.ones(24)}, ["mlp.gate_proj.bias"]),
        ({"model.layers.2.mlp.gate_proj.weight": torch.ones(24, 16)}, ["layers.2.mlp.gate_proj"]),
        ({"norm.weight": torch.ones(16)}, ["norm.weight", "twice"]),
        ({"model.norm.weight": torch.ones(8)}, ["norm.weight", "shape", "(8,)", "(16,)"]),
        ({"lm_head.weight": torch.ones(16, V)}, ["lm_head", "shape", "(16, 31)", "(31, 16)"]),
        ({"model.norm.weight": torch.ones(16).long()}, ["norm.weight", "int64"]),
    ],
    ids=["missing", "no-head", "bias", "a-layer-more", "twice", "shape", "transposed", "integers"],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_wrong_tensor_is_named(change, words, form, tmp_path):
    random_model(torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: t.clone() for name, t in read_safetensors(file).items()} | change
    tensors = {name: t for name, t in tensors.items() if t is not None}
    write_safetensors(file, tensors)
    if form == "bin":
        file.unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


class Pickled:
    """Runs a command when it is unpickled, as any pickle may."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "value", [[1, 2], {"model.norm.weight": 3}, {3: torch.ones(2)}, "code", "bytes"], ids=str
)
def test_a_bin_that_holds_no_tensors_is_refused_and_not_run(value, tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    if value == "bytes":
        file.write_bytes(b"not a pickle")
    else:
        torch.save(Pickled(tmp_path / "ran") if value == "code" else value, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: ") as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def with_config(folder, **change):
    """Rewrites config.json; a key whose value is ... goes."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": ...}, "model_type"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic"}, "rope_scaling": None}, "dynamic"),
        ({"rope_scaling": "linear"}, "linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "swish7"}, "swish7"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"num_key_value_heads": 3}, "3"),
        ({"head_dim": 3}, "3"),
        ({"vocab_size": "31"}, "31"),
        ({"hidden_size": 16.5}, "16.5"),
        ({"vocab_size": -31}, "-31"),
        ({"num_attention_heads": 0}, "0"),
        ({"rms_norm_eps": "small"}, "small"),
        ({"tie_word_embeddings": "no"}, "no"),
    ],
    ids=str,
)
def test_a_config_out_of_reach_is_refused_in_one_sentence(change, word, tmp_path):
    random_model().save_pretrained(tmp_path)
    with_config(tmp_path, **change)
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in message
    assert word in message.removeprefix(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, b"\xff\xfe{}"], ids=lambda x: repr(x)[:9]
)
def test_a_config_that_is_no_object_names_its_file(text, tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json: "):
        Transformer.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Transformer.from_pretrained(tmp_path)
    random_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*pytorch_model\.bin"):
        Transformer.from_pretrained(tmp_path)


def test_config_keys_old_and_new(tmp_path):
    """transformers 5 writes rope_parameters and dtype, older ones rope_theta and torch_dtype."""
    model = random_model(torch.float32, rope_theta=500.0)
    model.save_pretrained(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    new = {"rope_parameters": rope, "dtype": "float32", "rope_theta": ..., "torch_dtype": ...}
    with_config(tmp_path, **new, bos_token_id=1)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config.rope_theta == 500.0 and loaded.config.dtype == "float32"
    assert torch.equal(loaded(torch.arange(9)[None]), model(torch.arange(9)[None]))
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["rope_theta"] == 500.0 and saved["torch_dtype"] == "float32"
    assert saved["bos_token_id"] == 1, "a key that we do not use is lost"
    again = Transformer.from_pretrained(tmp_path / "again")
    assert torch.equal(again(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_absent_config_keys_mean_what_transformers_means(tmp_path):
    """Defaults of LlamaConfig: as many key/value heads as heads, eps 1e-6, theta 1e4, untied."""
    random_model(n_kv_heads=4).save_pretrained(tmp_path)
    keys = "num_key_value_heads head_dim rms_norm_eps rope_theta max_position_embeddings "
    keys += "tie_word_embeddings torch_dtype hidden_act"
    with_config(tmp_path, **dict.fromkeys(keys.split(), ...))
    c = Transformer.from_pretrained(tmp_path).config
    assert (c.n_kv_heads, c.head_dim, c.norm_eps, c.rope_theta) == (4, 4, 1e-6, 1e4)
    assert (c.max_seq_len, c.tie_embeddings) == (2048, False)


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
    got = read_safetensors(raw_file(tmp_path, json.dumps(header).encode() + b"   ", body))
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
    got = read_safetensors(file)["a"]
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
    got = read_safetensors(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    for name, t in tensors.items():
        assert got[name].dtype == t.dtype and torch.equal(got[name], t), name
    raw = (tmp_path / "x.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + n])["__metadata__"] == {"format": "pt"}  # transformers asks so
    assert n % 8 == 0, "tensors should start aligned"


def test_what_was_read_outlives_a_newer_file(tmp_path):
    """Views of a memory map: writing beside and renaming leaves them their old file."""
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": torch.zeros(1000)})
    old = read_safetensors(file)["a"]
    write_safetensors(file, {"a": torch.ones(1000)})
    assert old.sum() == 0 and read_safetensors(file)["a"].sum() == 1000
    old += 1  # and a write into a view stays in this process
    assert torch.equal(read_safetensors(file)["a"], torch.ones(1000))


A, B = entry(), entry(offsets=[8, 16])
BROKEN = {  # header, body, header length written (None: the true one)
    "no body": ({"a": A}, b"", None),
    "body cut short": ({"a": A}, bytes(7), None),
    "bytes that no tensor has": ({"a": A}, bytes(9), None),
    "length past the end": (b"{}", b"", 3),
    "length 2^63": (b"{}", b"", 2**63),
    "length 2^64 - 1": (b"{}", b"", 2**64 - 1),
    "length 0": ({"a": A}, bytes(8), 0),
    "not UTF-8": (b'{"\xff": 1}', b"", None),
    "not JSON": (b"{'a': 1}", b"", None),
    "deeply nested": (b"[" * 100_000, b"", None),
    "digits without end": (b'{"a":' + b"9" * 10_000 + b"}", b"", None),
    "an array": ([A], bytes(8), None),
    "an empty array": ([], b"", None),
    "a number": (3, b"", None),
    "null": (None, b"", None),
    "a string": ("a", b"", None),
    "entry an array": ({"a": [1]}, bytes(8), None),
    "entry null": ({"a": None}, bytes(8), None),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), None),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None),
    "unknown dtype": ({"a": entry("F33")}, bytes(8), None),
    "torch's dtype name": ({"a": entry("float32")}, bytes(8), None),
    "dtype an array": ({"a": entry(["F32"])}, bytes(8), None),
    "dtype null": ({"a": entry(None)}, bytes(8), None),
    "negative shape": ({"a": entry(shape=[-2])}, bytes(8), None),
    "two negatives": ({"a": entry(shape=[-1, -2])}, bytes(8), None),
    "float shape": ({"a": entry(shape=[2.0])}, bytes(8), None),
    "bool shape": ({"a": entry(shape=[True, 2])}, bytes(8), None),
    "shape a number": ({"a": entry(shape=2)}, bytes(8), None),
    "shape a string": ({"a": entry(shape="2")}, bytes(8), None),
    "shape an object": ({"a": entry(shape={}, offsets=[0, 4])}, bytes(4), None),
    "shape null": ({"a": entry(shape=None)}, bytes(8), None),
    "a string times a number": ({"a": entry(shape=["ab", 10**18])}, bytes(8), None),
    "a list times a number": ({"a": entry(shape=[[1], 10**18])}, bytes(8), None),
    "beyond float": ({"a": entry(shape=[10**400, 1.5])}, bytes(8), None),
    "infinite": ({"a": entry(shape=[float("inf")])}, bytes(8), None),
    "nothing times too much": ({"a": entry(shape=[0, 2**70], offsets=[0, 0])}, b"", None),
    "product overflows": ({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b"", None),
    "product wraps to 2": ({"a": entry(shape=[2**63 + 1, 2])}, bytes(8), None),
    "fewer bytes than the shape": ({"a": entry(shape=[3])}, bytes(8), None),
    "more bytes than the shape": ({"a": entry(shape=[1])}, bytes(8), None),
    "offsets past the end": ({"a": entry(shape=[4], offsets=[0, 16])}, bytes(8), None),
    "negative offsets": ({"a": entry(offsets=[-8, 0])}, bytes(8), None),
    "offsets reversed": ({"a": entry(offsets=[8, 0])}, bytes(8), None),
    "one offset": ({"a": entry(offsets=[8])}, bytes(8), None),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, bytes(8), None),
    "float offsets": ({"a": entry(offsets=[0.0, 8.0])}, bytes(8), None),
    "bool offset": ({"a": entry(offsets=[False, 8])}, bytes(8), None),
    "string offsets": ({"a": entry(offsets=["0", "8"])}, bytes(8), None),
    "offsets null": ({"a": entry(offsets=None), "b": B}, bytes(16), None),
    "first not at 0": ({"b": B}, bytes(16), None),
    "overlapping": ({"a": A, "b": entry(offsets=[4, 12])}, bytes(12), None),
    "the same bytes twice": ({"a": A, "b": A}, bytes(8), None),
    "a hole": ({"a": A, "b": entry(offsets=[12, 20])}, bytes(20), None),
    "mixed offsets": ({"a": A, "b": entry(offsets=["8", 16])}, bytes(16), None),
    "a name twice": (
        b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(B).encode() + b"}",
        bytes(16),
        None,
    ),
    "a key twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"",
        None,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_safetensors_are_refused(what, tmp_path):
    file = raw_file(tmp_path, *BROKEN[what])
    with pytest.raises(ValueError) as error:
        read_safetensors(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_damaged_safetensors_raise_only_value_errors(tmp_path):
    """Cuts at every byte, flipped bits, replaced header characters, noise. Seeded."""
    rng, file = random.Random(0), tmp_path / "x.safetensors"
    write_safetensors(file, {"model.a": torch.randn(3, 4), "b": torch.ones(5).half()})
    good = file.read_bytes()
    n_header = 8 + int.from_bytes(good[:8], "little")
    cuts = [good[:n] for n in range(len(good))]
    damaged = []
    for _ in range(300):
        flipped, replaced = bytearray(good), bytearray(good)
        flipped[rng.randrange(n_header)] ^= 1 << rng.randrange(8)
        for _ in range(rng.randint(1, 3)):
            replaced[rng.randrange(8, n_header)] = ord(rng.choice('0123456789-.eE,:[]{}" \\tn'))
        damaged += [bytes(flipped), bytes(replaced), rng.randbytes(rng.randrange(60))]
    accepted = []
    for content in cuts + damaged:
        file.write_bytes(content)
        try:
            tensors = read_safetensors(file)
        except ValueError:
            continue
        accepted.append(content)  # a name may have changed; every byte must be there to be read
        assert sum(t.clone().nbytes for t in tensors.values()) <= len(content)
    assert 0 < len(accepted) < len(damaged) / 2
    assert not set(cuts) & set(accepted), "a file that was cut short is accepted"


def test_names_are_free_text(tmp_path):
    names = [string.printable, "", "ключ", "a" * 1000, "__metadata"]
    tensors = {name: torch.tensor([i]) for i, name in enumerate(names)}
    write_safetensors(tmp_path / "x", tensors)
    assert {k: v.item() for k, v in read_safetensors(tmp_path / "x").items()} == {
        name: i for i, name in enumerate(names)
    }
