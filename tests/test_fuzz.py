"""Files damaged at random: a reader either works, or says ValueError with the file's path.

Nothing else may be raised, nothing may be read outside of the file, memory is bounded by the file's
size. hypothesis makes the files: sound ones with bytes overwritten, cut out and put in, and sound
JSON with values replaced, dropped and moved. Few examples in `make test`, many in `make test-slow`,
the same ones every time.
"""

import copy
import json
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import data
from formats import tokenizer
from formats.families import FAMILIES
from formats.weights import read_safetensors, write_safetensors
from model import ModelConfig, Transformer
from tests.tokenizer_json import byte_level, llama2, metaspace


def sizes(few: int, many: int):
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.slow)])


def run(n: int, check, strategy, *examples):
    """check(content) for n contents that strategy makes, and for these examples."""
    for content in examples:
        check = example(content)(check)
    no = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    options = {"derandomize": True, "database": None, "deadline": None}
    settings(max_examples=n, suppress_health_check=no, **options)(given(strategy)(check))()


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor within it, views of others included."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            self.largest = max(self.largest, out.nbytes)
        return out


def attempt(read, path, n_bytes: int):
    """read(), or None where it refuses the file, by its name; within its bounds in any case."""
    tracemalloc.start()
    try:
        with Allocations() as allocations:
            return read()
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error), error
        assert len(str(error)) < 1500 and len(str(error).splitlines()) == 1
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22 + 200 * n_bytes  # an empty list is 2 bytes of JSON and 64 of memory
        assert allocations.largest <= n_bytes


# ---------------------------------------------------------------------------------------------
# Damage.

NUMBERS = [0, -1, 1, 2, 3, 64, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, 10**400]
FLOATS = [0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]
WORDS = ["", " ", "▁", "Ġ", "a", "a b", "<s>", "F8_E4M3", "../x", "\ud800", "\0", "{{", "{% if %}"]
scalars = st.none() | st.booleans() | st.sampled_from([*NUMBERS, *FLOATS, *WORDS])
scalars |= st.integers() | st.floats() | st.text(max_size=5)
LIKE = {bool: st.booleans(), int: st.sampled_from(NUMBERS), float: st.sampled_from(FLOATS)}
LIKE |= {str: st.sampled_from(WORDS)}
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "type", "content", "id", "role"]), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edited(draw, sound) -> bytes:
    """JSON with one to three of its values replaced, dropped, or copied to another place."""
    value = copy.deepcopy(sound)
    copied = 0
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        node = value
        while node:
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            inner = node[key]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
                node = inner
                continue
            match draw(st.sampled_from(["like", "like", "anything", "drop", "paste"])):
                case "like":  # of its type, so that it gets further
                    node[key] = draw(LIKE.get(type(inner), anything))
                case "anything":
                    node[key] = draw(anything)
                case "drop":
                    del node[key]
                case "paste":
                    node[key], copied = copied, copy.deepcopy(inner)
            break
    return json.dumps(value).encode()


@st.composite
def damaged(draw, sound: bytes) -> bytes:
    raw = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(raw))), draw(st.integers(0, 8))
        match draw(st.sampled_from(["cut", "take out", "put in", "overwrite"])):
            case "cut":
                del raw[at:]
            case "take out":
                del raw[at : at + n]
            case "put in":
                raw[at:at] = draw(st.binary(max_size=8))
            case "overwrite":
                raw[at : at + n] = draw(st.binary(max_size=n))
    return bytes(raw)


def mostly(often, *seldom):
    return st.sampled_from([often] * 4 * len(seldom) + list(seldom)).flatmap(lambda x: x)


def json_files(*sounds):
    texts = [json.dumps(sound, ensure_ascii=False).encode() for sound in sounds]
    bytewise = st.one_of(*map(damaged, texts), st.binary(max_size=50))
    return mostly(st.one_of(*map(edited, sounds)), bytewise)


# ---------------------------------------------------------------------------------------------
# Weights and config.json.


@sizes(150, 5000)
def test_safetensors(n, tmp_path):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": torch.ones(3, 4), "b": torch.ones(5).half(), "c": torch.ones(())})
    sound = file.read_bytes()
    n_header = int.from_bytes(sound[:8], "little")
    header, body = json.loads(sound[8 : 8 + n_header]), sound[8 + n_header :]

    def check(content):
        file.write_bytes(content)
        tensors = attempt(lambda: dict(read_safetensors(file)), file, len(content)) or {}
        # Every byte of a tensor can be read: outside of the file this would be the end.
        assert sum(t.clone().nbytes for t in tensors.values()) <= len(content)

    headers = mostly(edited(header), damaged(sound[8 : 8 + n_header]))
    bodies = mostly(st.just(body), st.sampled_from([body[:-1], body * 2, b""]))
    whole = st.tuples(headers, bodies).map(
        lambda parts: len(parts[0]).to_bytes(8, "little") + b"".join(parts)
    )
    lengths = st.integers(0, 2**64 - 1).map(lambda k: k.to_bytes(8, "little") + sound[8:])
    run(n, check, mostly(whole, damaged(sound) | lengths | st.binary(max_size=99)), sound)


@sizes(150, 4000)
def test_config(n, tmp_path):
    """A config that is accepted also loads its weights and runs, or is refused by their shapes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 6}
    Transformer(ModelConfig(**sizes, max_seq_len=16)).save_pretrained(tmp_path)
    file, weights = tmp_path / "config.json", (tmp_path / "model.safetensors").read_bytes()
    sound = json.loads(file.read_text()) | {"head_dim": 4, "attention_bias": False}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    window = {"model_type": "mistral", "sliding_window": 2, "layer_types": ["full_attention"] * 2}
    longrope = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "attention_factor": 1.5}
    longrope = {"original_max_position_embeddings": 8, "rope_scaling": longrope}
    smollm3 = window | {"no_rope_layers": [1, 0], "use_sliding_window": True}
    sounds = [sound, sound | {"rope_scaling": llama3}, sound | window]
    sounds += [
        sound | longrope | {"model_type": "phi3"},
        sound | smollm3 | {"model_type": "smollm3"},
    ]
    sounds += [sound | {"model_type": family} for family in FAMILIES]

    def check(content):
        file.write_bytes(content)
        model = attempt(
            lambda: Transformer.from_pretrained(tmp_path), tmp_path, len(content) + len(weights)
        )
        if model is not None and model.config.max_seq_len > 2:
            assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 11)

    run(n, check, json_files(*sounds), *(json.dumps(x).encode() for x in sounds))


# ---------------------------------------------------------------------------------------------
# Tokenizers.

SPECIAL = {
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False, "normalized": False},
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
        "legacy": False,
        "add_prefix_space": False,
        "tokenizer_class": "GPT2Tokenizer",
        "chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"}],
    },
    "special_tokens_map.json": {"unk_token": "<unk>", "pad_token": {"content": "</s>"}},
    "added_tokens.json": {"<extra>": 300},
}
LEVEL = byte_level(
    ["a b", "ab c", "Ġ a"], added=[{"content": "</s>"}, {"content": "<s>", "special": True}]
)
QWEN2 = [
    {"type": "Split", "pattern": {"Regex": tokenizer.QWEN2_WORDS}, "behavior": "Isolated"},
    LEVEL["pre_tokenizer"] | {"use_regex": False},
]
KINDS = {  # JSON where it is no bytes
    "bytes": {"tokenizer.json": LEVEL},
    "qwen2": {
        "tokenizer.json": LEVEL
        | {"normalizer": {"type": "NFC"}}
        | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": QWEN2}}
    },
    "llama2": {"tokenizer.json": llama2()},
    "metaspace": {"tokenizer.json": metaspace()},
    "vocab": {
        "vocab.json": LEVEL["model"]["vocab"] | {"<|endoftext|>": 259},
        "merges.txt": "#version: 0.2\na b\nab c\nĠ a\n".encode(),
    },
    "sentencepiece": {"tokenizer.model": ...},
}


@sizes(40, 1500)
@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers(kind, n, sentencepiece_model, tmp_path):
    sound = KINDS[kind] | SPECIAL | {"chat_template.jinja": b"{{ messages[0]['content'] }}!"}
    sound = {name: sentencepiece_model if x is ... else x for name, x in sound.items()}
    raw = {k: x if isinstance(x, bytes) else json.dumps(x).encode() for k, x in sound.items()}

    def check(changes):
        files = raw | changes
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        n_bytes = sum(map(len, files.values()))
        tokenizer = attempt(lambda: data.load_tokenizer(tmp_path), tmp_path, n_bytes)
        if tokenizer is None:
            return
        ids = tokenizer.encode("abc a <s>é\n▁", bos=True, eos=True)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids), ids
        tokenizer.decode([*ids, 10**6]).encode()
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
        except ValueError:
            text = ""
        assert isinstance(text, str)

    parts = [
        st.tuples(st.just(name), damaged(x) if isinstance(x, bytes) else json_files(x))
        for name, x in sound.items()
    ]
    own = st.one_of(*parts[: len(KINDS[kind])])  # as often as all the others together
    run(n, check, (own | st.one_of(*parts)).map(lambda part: dict([part])), {})


# ---------------------------------------------------------------------------------------------
# Rows.

MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The farmer."}]
OTHER = [MESSAGES[0], {"role": "assistant", "content": "Nobody."}]
ROWS = [
    {"prompt": "q", "chosen": " a", "rejected": " b", "accept": ["a"]},
    {"chosen": "the same a", "rejected": "the same b"},
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": OTHER[1:]},
    {"prompt": "Who?", "chosen": MESSAGES, "rejected": OTHER},
]


@sizes(150, 5000)
def test_rows(n, tiny_tokenizer, tmp_path):
    file, tokenizer = tmp_path / "rows.jsonl", data.load_tokenizer(tiny_tokenizer)
    whole = b"\n".join(json.dumps(row).encode() for row in ROWS)

    def check(content):
        file.write_bytes(content)
        rows = attempt(lambda: data.load_preferences(file), file, len(content))
        for row in rows or ():
            for part in row[:3]:
                assert isinstance(part, str) or all(
                    isinstance(m["role"], str) and isinstance(m["content"], str | None)
                    for m in part
                )
            pair = data.encode_pair(tokenizer, row, 64, 32)
            assert isinstance(pair, str | data.Pair)

    run(n, check, mostly(json_files(*ROWS), damaged(whole)), whole)
