"""Our tokenizer beside the sentencepiece library, and our chat templates beside transformers'.

    python -m pytest tests/peers/test_tokenizer.py

For a tokenizer.model the library is the reference: transformers converts such files by itself and
gets runs of spaces wrong. Three models: Llama 2's and stories260K's where the shared data is
present, and one trained here.
"""

import json
import random
import re

import pytest
import sentencepiece

import data
import train
from run.processes import pick_device
from tests.tokenizer_json import LEVEL, byte_level

from . import tiny

TRICKY = [
    *("", " ", "  ", "\n", "\t", "a", " a", "a ", "  a  b   c ", "a\nb\n\nc", "\n\na", "a \n b"),
    *("Hello world", "Hello  world", "don't", "3.14159", "1000000", "x=y**2;//z", "C:\\path"),
    *("naïve café", "cafe\u0301", "ﬁnancial ﬀ", "Straße", "ЖЁлтый", "日本語テキスト", "한국어"),
    *(
        "العربية",
        "😀",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "\u200bzero\u200bwidth",
        "\ufeffmark",
        "a\u00a0b",
    ),
    *("▁", "a▁b", "▁▁a", "<0x41>", "<0x0A>", "<unk>x"[1:], "<s", "s>", "</s", "< s >", "<|user|>"),
    *("\x00", "\x07bell", "\r\n", "\u2028", "A" * 300, "ab " * 100, "é" * 50, "\U0010fffd"),
    "def f(x):\n    return x  # twice\n",
    "| a | b |\n|---|---|\n| 1 | 2 |",
]


def random_texts(n, seed=0):
    """Words, spaces and characters from all over Unicode, thrown together."""
    rng = random.Random(seed)
    alphabets = [
        "etaoin shrdlu ETAOIN .,!?'\"",
        "0123456789+-*/=()[]{}<>|\\",
        "  \n\t ",
        "äöüßñçéèøåœ€£§µ",
        "абвгдежзийклмнопрст",
        "漢字仮名交文日本語",
        "😀🎉❤️👍🏽🚀",
    ]
    return [
        "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 60)))
        for _ in range(n)
    ]


def real_texts():
    rows = (tiny.SHARED / "politeness-pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [text for row in rows[::4] for text in json.loads(row).values()]


@pytest.fixture(scope="module", params=["trained_here", "llama2-tokenizer", "stories260K"])
def folder(request, tmp_path_factory):
    if request.param != "trained_here":
        return tiny.shared(request.param)
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.train_sentencepiece(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return data.load_tokenizer(folder)


@pytest.fixture(scope="module")
def library(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def texts(folder):
    own = [text for row in tiny.preference_rows(60) for text in row.values()]
    return TRICKY + random_texts(400) + own + (real_texts() if folder.parent == tiny.SHARED else [])


def without_dummy_prefix(folder):
    """The library on the same model with add_dummy_prefix off.

    A protobuf message that occurs twice is merged, the later value winning: field 3 of the model,
    normalizer_spec, is given again with nothing but its field 3, add_dummy_prefix, false.
    """
    proto = (folder / "tokenizer.model").read_bytes() + bytes([3 << 3 | 2, 2, 3 << 3, 0])
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def test_ids_equal_the_library(ours, library, texts):
    assert len(texts) > 500
    for text in texts:
        assert ours.encode(text) == library.encode(text), repr(text)


def test_text_equals_the_library(ours, library, texts):
    for text in texts:
        ids = library.encode(text)
        assert ours.decode(ids) == library.decode(ids), repr(text)


def test_every_single_id_decodes_as_in_the_library(ours, library):
    """Alone and behind a word: bytes that are no UTF-8 by themselves become U+FFFD."""
    start = library.encode("of")
    for i in range(3, library.vocab_size()):
        assert ours.decode([i]) == library.decode([i]), library.id_to_piece(i)
        assert ours.decode([*start, i]) == library.decode([*start, i]), library.id_to_piece(i)


def test_bos_and_eos_are_added_once_and_only_when_asked(ours, library):
    assert (ours.bos_id, ours.eos_id) == (library.bos_id(), library.eos_id()) == (1, 2)
    assert ours.vocab_size == library.vocab_size()
    for text in ("", "Once upon a time", " two  spaces"):
        ids = library.encode(text)
        assert ours.encode(text, bos=True) == [1, *ids]
        assert ours.encode(text, eos=True) == [*ids, 2]
        assert ours.encode(text, bos=True, eos=True) == [1, *ids, 2]


def test_decoding_keeps_the_text_of_special_tokens(ours, library):
    """Where the library leaves them out."""
    ids = [1, *library.encode("Once upon a time"), 2]
    assert library.decode(ids) == "Once upon a time"
    assert re.fullmatch("<s> ?Once upon a time</s>", ours.decode(ids))


CONTINUATIONS = [
    ("What is it?", " It is tea."),
    ("What is it?", "It is tea."),
    ("What is it?\n", "Tea"),
    ("<|assistant|>\n", "Bashir sells maps."),
    ("un", "believable"),
    ("日本", "語"),
    ("a", "b"),
    ("a", ""),
    ("a", " b"),
    ("line", "\n  indented"),
    ("😀", "🎉"),
]


def test_a_continuation_decodes_to_the_text_of_both(ours, library):
    """encode(a) + encode(b, continuation=True) is a + b, as the library has it in one string.

    (Itself a + b for Llama 2; stories260K's model was trained to collapse runs of spaces.)
    """
    for a, b in CONTINUATIONS:
        ids = ours.encode(a, bos=True) + ours.encode(b, continuation=True, eos=True)
        text = ours.decode(ids).removeprefix("<s>").removesuffix("</s>").removeprefix(" ")
        assert text == library.decode(library.encode(a + b)), (a, b)


def test_a_continuation_is_what_the_library_gives_without_dummy_prefix(folder, ours):
    """Letters, digits, other scripts, newlines; what begins with a space is the next test's."""
    library = without_dummy_prefix(folder)
    for text in random_texts(200, seed=1) + [b for _, b in CONTINUATIONS]:
        text = text.strip()
        assert ours.encode(text, continuation=True) == library.encode(text), repr(text)


def test_a_space_that_begins_a_continuation_is_kept(ours, library):
    """As " It" in the middle of a text, not as "It": prompts and answers are often cut there."""
    for a, b in [("What is it?", " It is tea."), ("a", " b"), ("Anna", " likes maps")]:
        assert ours.encode(b, continuation=True) == library.encode(a + b)[len(library.encode(a)) :]


# ---------------------------------------------------------------------------------------------
# Special tokens in a text become their ids, as in transformers; the library would spell them out.


def copy_with(folder, path, **config):
    """The same tokenizer.model with other settings."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | config
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


SPECIAL_TEXTS = ["a<s>b", "one</s>two</s>", "<s>hello", "</s></s>", "x</s>\ny", "<s>", "a </s>b"]


@pytest.mark.parametrize("legacy", [True, False])
def test_special_text_becomes_the_special_id(tmp_path, folder, library, legacy):
    """The text is cut at `<s>` and `</s>`; the parts between are encoded by the library.

    A part behind a special token gets the dummy space only where legacy is true.
    """
    tokenizer = data.load_tokenizer(copy_with(folder, tmp_path / "copy", legacy=legacy))
    later_parts = library if legacy else without_dummy_prefix(folder)
    for text in SPECIAL_TEXTS:
        expected = []
        for i, part in enumerate(re.split("(</?s>)", text)):
            special = {"<s>": [1], "</s>": [2]}.get(part)
            expected += special or (library if i == 0 else later_parts).encode(part)
        assert tokenizer.encode(text) == expected, text


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json"])
def test_added_tokens_are_found_leftmost_then_longest(tmp_path, folder, library, place):
    """`<|im|>` and `<|im|>x` are both added: "a<|im|>x" has the longer one."""
    n = library.vocab_size()
    added = {"<|im|>": n, "<|im|>x": n + 1}
    config = {"legacy": False}
    if place == "added_tokens_decoder":
        entry = {"lstrip": False, "rstrip": False, "normalized": False, "special": True}
        config[place] = {str(i): {"content": text, **entry} for text, i in added.items()}
    path = copy_with(folder, tmp_path / "copy", **config)
    if place == "added_tokens.json":
        (path / place).write_text(json.dumps(added))
    tokenizer = data.load_tokenizer(path)
    plain = without_dummy_prefix(folder)
    assert tokenizer.vocab_size == n + 2
    assert tokenizer.encode("a<|im|>x<|im|>y") == [
        *library.encode("a"),
        n + 1,
        n,
        *plain.encode("y"),
    ]
    assert "<|im|>x" in tokenizer.decode([n + 1])


# ---------------------------------------------------------------------------------------------
# Chat templates.

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere "}],
    [
        {"role": "user", "content": "What is <b>1 + 1</b> & 'so' \"on\"?"},
        {"role": "assistant", "content": "  2  "},
        {"role": "user", "content": "Ünïcödé 日本 😀 </s> {{ not }} {% a %} template"},
        {"role": "assistant", "content": ""},
    ],
]

# What the authors' code writes where a tokenizer has no template: their words, in jinja of ours.
AUTHORS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
<|im_start|>system
You are terse.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""

# The forms of HuggingFaceH4/zephyr and of Llama-2-chat, with its system block and its complaint.
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user, assistant, ...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

TWO_QUESTIONS = [{"role": "user", "content": "Hi"}] * 2
TEMPLATES = {
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "llama2": LLAMA2,
    "bos_once": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}",
    "loop_controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% break %}{% endfor %}",
    "undefined_names": "{{ tools is none }} {{ documents is defined }} {{ nothing is defined }}"
    "{{ nothing }}{% if tools %}tools{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "generation_block": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "year": "{{ strftime_now('%Y') }}",
    "slicing": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ rest | length }}{{ rest[-1].content[:3] }}",
}


def theirs(template):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 1, "</s>": 2}, unk_token="<s>")
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def assert_same_rendering(tokenizer, reference):
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            assert tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompt
            ) == reference.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )


def test_without_a_template_the_authors_is_used(tmp_path, folder):
    reference = theirs(AUTHORS)
    assert_same_rendering(data.load_tokenizer(copy_with(folder, tmp_path / "copy")), reference)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "a list", "chat_template.jinja"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path, template, place):
    """From each place a template may stand in; a .jinja file wins over the configuration."""
    tiny.train_sentencepiece(tmp_path / "source")
    by_name = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    setting = {"a list": by_name, "chat_template.jinja": "not this one"}.get(place, template)
    path = copy_with(tmp_path / "source", tmp_path / "copy", chat_template=setting)
    if place == "chat_template.jinja":
        (path / place).write_text(template, encoding="utf-8")
    assert_same_rendering(data.load_tokenizer(path), theirs(template))


# In the manner of Qwen2.5's.
TOOL_CALLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content }}"
    "{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{% endfor %}{% if m.reasoning_content is defined %}{{ m.reasoning_content }}{% endif %}"
    "{% endfor %}"
)


def test_tools_and_their_calls_render_as_in_transformers(tmp_path):
    tiny.train_sentencepiece(tmp_path / "source")
    tokenizer = data.load_tokenizer(
        copy_with(tmp_path / "source", tmp_path / "copy", chat_template=TOOL_CALLS)
    )
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"at": "é"}}}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 'the "map"'}}}
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Look."},
        {"role": "tool", "name": "look", "content": "there"},
    ]
    rows = {"prompt": messages, "chosen": QUESTION, "rejected": QUESTION, "tools": tools}
    rows |= {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows))
    (row,) = data.load_preferences(tmp_path / "rows.jsonl")
    wanted = theirs(TOOL_CALLS).apply_chat_template(messages, tools=tools, tokenize=False)
    assert tokenizer.apply_chat_template(row.prompt, tools=row.tools) == wanted
    assert 'the \\"map\\"' in wanted and "Look." in wanted and '"look"' in wanted


def test_a_template_for_tools_is_taken_as_in_transformers_before_and_after_saving(tmp_path):
    transformers = pytest.importorskip("transformers")
    bytes_with_bos(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer_config.json"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": TOOL_CALLS}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    for bos in ("", "<s>"):
        ours = data.load_tokenizer(tmp_path / "a")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
        for given in (None, tools):
            text = ours.apply_chat_template(QUESTION, True, given)
            assert text == theirs.apply_chat_template(
                QUESTION, tools=given, tokenize=False, add_generation_prompt=True
            )
            assert text.startswith(bos + ("{" if given else "d"))
        ours.save_chat_template(tmp_path / "a")


@pytest.mark.parametrize(
    "template",
    [
        LLAMA2,  # of two questions in a row
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_a_template_may_refuse_and_may_not_reach_out(tmp_path, template):
    """transformers' sandbox refuses these too, with an error of jinja2's."""
    jinja2 = pytest.importorskip("jinja2")
    tiny.train_sentencepiece(tmp_path / "source")
    path = copy_with(tmp_path / "source", tmp_path / "copy", chat_template=template)
    with pytest.raises(jinja2.TemplateError):
        theirs(template).apply_chat_template(TWO_QUESTIONS, tokenize=False)
    with pytest.raises((jinja2.TemplateError, ValueError)):
        data.load_tokenizer(path).apply_chat_template(TWO_QUESTIONS)


QUESTION = [{"role": "user", "content": "What does Anna like?"}]
ROW = {
    "prompt": QUESTION,
    "chosen": [{"role": "assistant", "content": "Bread."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def bytes_with_bos(folder):
    """Byte-level, in tokenizer.json, with <s> and </s>."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"content": text, "special": True} | flags for text in ("<s>", "</s>")]
    level = LEVEL | {"trim_offsets": True}
    spec = byte_level(["W h", "Wh a", "a t", "Ġ l"], added, pre_tokenizer=level, decoder=level)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config["model_input_names"] = ["input_ids", "attention_mask"]  # as published ones have it
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


KINDS_WITH_BOS = {
    "llama": lambda folder: tiny.train_sentencepiece(folder),
    "legacy llama": lambda folder: tiny.train_sentencepiece(folder),
    "bytes": bytes_with_bos,
}


@pytest.mark.parametrize("template", [None, "zephyr", "llama2", "chatml"])
@pytest.mark.parametrize("kind", KINDS_WITH_BOS)
def test_served_prompts_are_the_trained_ones_with_bos_once(tmp_path, kind, template):
    """What a run on messages leaves in OUT/model, read by transformers: its chat template gives
    the ids that the model was trained on. Of these templates Llama 2's alone writes BOS itself."""
    transformers = pytest.importorskip("transformers")
    base, out = tmp_path / "base", tmp_path / "out"
    KINDS_WITH_BOS[kind](base)
    more = {"chat_template": TEMPLATES[template]} if template else {}
    if kind != "bytes":
        more |= {"tokenizer_class": "LlamaTokenizer", "legacy": kind == "legacy llama"}
    config = json.loads((base / "tokenizer_config.json").read_text()) | more
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    tiny.random_llama(base)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [ROW])
    flags = ["--model", base, "--data", rows, "--out", out, "--max-steps", "1", "--device", "cpu"]
    config = train.parse(list(map(str, flags)))
    train.main(list(map(str, flags)))
    pick_device(config)
    (pair,) = train.load_inputs(config)[2]

    reference = transformers.AutoTokenizer.from_pretrained(out / "model")
    served = reference.apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(served) == pair.prompt.tolist()
    assert served.count(reference.bos_token_id) == 1 == (served[0] == reference.bos_token_id)
    ours = data.load_tokenizer(out / "model")
    text = ours.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert data.encode_prompt(ours, text, chat=True) == list(served)
    untouched = (base / "tokenizer_config.json", out / "model" / "tokenizer_config.json")
    if template in (None, "llama2"):
        assert untouched[0].read_bytes() == untouched[1].read_bytes()
    else:  # for readers that do not look for chat_template.jinja
        assert json.loads(untouched[1].read_text())["chat_template"] == ours.chat_template
