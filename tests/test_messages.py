"""Messages in their published spellings, and the templates that write them."""

import datetime
import json

import pytest

from data import load_tokenizer
from formats.chat_template import read_template_file, render_chat_template
from formats.messages import messages_of, says, tools_of
from formats.rows import load_preferences, warnings_of

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
SPELLINGS = {
    "role and content": [Q, A],
    "ShareGPT": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    "other roles": [{"role": "User", "content": "q"}, {"role": "bot", "content": "a"}],
    "OpenAssistant": [{"role": "prompter", "content": "q"}, {"role": "Assistant", "content": "a"}],
    "in an object": {"messages": [Q, A]},
    "a list for each key": {"role": ["user", "assistant"], "content": ["q", "a"]},
    "ShareGPT, a list for each key": {"from": ["human", "gpt"], "value": ["q", "a"]},
    "JSON text": json.dumps([Q, A]),
    "JSON text of an object": json.dumps({"messages": [Q, A]}),
    "Python's repr": repr([Q, A]),
    "numpy's repr": "[" + repr(Q) + "\n " + repr(A) + "]",
    "JSON text of a list for each key": '{"role": ["user", "assistant"], "content": ["q", "a"]}',
    "JSON text of ShareGPT": json.dumps({"conversations": [{"from": "human", "value": "q"}, A]}),
    "the other spelling beside an empty one": [
        {"role": "user", "content": "", "value": "q"},
        A | {"value": None},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A],
    "nulls, as parquet has them": [Q | {"tool_calls": None, "name": None}, A | {"tool_calls": []}],
    "an empty system message": [{"role": "system", "content": None}, Q, A],
}


@pytest.mark.parametrize("what", SPELLINGS)
def test_every_spelling_is_the_same_dialogue(what):
    assert messages_of(SPELLINGS[what]) == [Q, A]


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"a": 1}', "[INST] hi", "{ role", "[]", '["role"]', '{"role": "x"}', ""]
)
def test_text_that_is_no_dialogue_stays_text(text):
    assert messages_of(text) == text


def test_keys_that_only_other_rows_have_are_left_out_of_calls_and_tools():
    """As `datasets` writes them into JSON. A null in a text of JSON is the author's own."""
    function = {"name": "weather", "arguments": {"city": "Lima", "x": None}, "y": None}
    call = {"type": "function", "id": None, "function": function}
    (got,) = messages_of([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert got["tool_calls"] == [CALL]
    text = {"name": "weather", "arguments": '{"x": null}'}
    (got,) = messages_of([A | {"tool_calls": [{"function": text}]}])
    assert got["tool_calls"][0]["function"]["arguments"] == {"x": None}
    tool = {"type": "function", "function": {"parameters": {"city": {"type": "string"}, "x": None}}}
    (got,) = tools_of([tool])
    assert got["function"]["parameters"] == {"city": {"type": "string"}}
    assert tools_of(json.dumps([tool])) == tools_of([json.dumps(tool)]) == [tool]


def test_other_keys_stay_and_calls_are_objects():
    """OpenAI writes arguments as JSON text, ShareGPT a call as an answer of its own role."""
    as_text = CALL | {"function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [as_text], "weight": 0}
    (got,) = messages_of([answer])
    assert got == answer | {"tool_calls": [CALL]}
    call = {"from": "function_call", "value": json.dumps(CALL["function"])}
    seen = {"from": "observation", "value": "18 C"}
    assert messages_of([call, seen]) == [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "18 C"},
    ]


@pytest.mark.parametrize(
    "value, words",
    [
        (
            {"system": "Be brief.", "messages": [Q, A]},
            "system must stand in the row, not in",
        ),
        ({"messages": [Q], "tools": [CALL]}, "tools must stand in the row"),
        ([Q | {"content": [{"type": "image", "image": "x", "text": ""}]}], "not text: image"),
        (
            [Q | {"content": [{"type": "text", "text": "a", "image_url": "x"}]}],
            "not text: image_url",
        ),
        ([Q | {"content": [{"type": "thinking", "thinking": "hm", "text": ""}]}], "thinking"),
        ([Q | {"content": [{"type": "input_audio", "text": "x"}]}], "input_audio"),
        (r'[{"role": "user", "content": "\ud800"}]', "surrogates not allowed"),
    ],
)
def test_what_would_be_lost_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        messages_of(value)


def test_tools_in_their_spellings():
    """JSON text, JSON texts in a list, Python's repr; nothing is no tools."""
    for value in (json.dumps([CALL]), [json.dumps(CALL)], repr([CALL]), [CALL]):
        assert tools_of(value) == [CALL]
    for value in (None, "", "  ", [], "[]"):
        assert tools_of(value) is None


def test_calls_and_their_answers_in_other_spellings():
    calls = {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)}
    assert messages_of([calls])[0]["tool_calls"] == [CALL] * 2
    for given in (json.dumps([CALL]), [json.dumps(CALL)]):
        (got,) = messages_of([{"role": "assistant", "content": "", "tool_calls": given}])
        assert got["tool_calls"] == [CALL]
    bare = {"name": "weather", "arguments": '{"city": "Lima"}'}
    (got,) = messages_of([{"role": "assistant", "content": "", "tool_calls": [bare]}])
    assert got["tool_calls"][0]["arguments"] == {"city": "Lima"}
    assert messages_of([{"role": "tool", "content": {"temp": 3}}])[0]["content"] == '{"temp": 3}'
    kept = {"role": "system", "content": "", "functions": "[]x"}
    assert messages_of([kept]) == [kept]


def rows(tmp_path, *objects):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, objects)))
    return load_preferences(file)


def test_a_row_is_read_alike_in_every_spelling(tmp_path):
    other = [Q, A | {"content": "b"}]
    for dialogue in SPELLINGS.values():
        (row,) = rows(tmp_path, {"prompt": "q", "chosen": dialogue, "rejected": other})
        assert (row.prompt, row.chosen, row.rejected) == ([Q], [A], other[1:]) and not row.ignored


def test_messages_beside_answers_are_the_prompt(tmp_path):
    for key in ("messages", "conversations"):
        (row,) = rows(tmp_path, {key: [Q], "chosen": [A], "rejected": [A | {"content": "b"}]})
        assert row.prompt == [Q] and row.chosen == [A]


def test_one_answer_in_json_among_texts_is_text(tmp_path):
    """As one that shows what messages look like; and it is said."""
    shown = json.dumps([Q, A])
    loaded = rows(tmp_path, {"prompt": "q", "chosen": shown, "rejected": "Sorry."})
    assert loaded[0].chosen == shown
    (line,) = [line for line in warnings_of(loaded) if "look like messages" in line]
    assert line.startswith("warning: 1 of 1 rows")


def test_columns_beside_whole_dialogues_do_not_matter(tmp_path):
    """Another dialogue, a part of it, or an empty one; ids and notes of messages may differ."""
    worse = [Q | {"id": "7"}, A | {"content": "b"}]
    whole = {"chosen": [Q | {"id": "1"}, A], "rejected": worse}
    for more, ignored in (
        ({"messages": [Q, A | {"content": "another"}]}, ("messages",)),
        ({"messages": [Q, A]}, ()),
        ({"prompt": []}, ()),
        ({"conversations": []}, ()),
        ({"prompt": [Q]}, ()),
    ):
        (row,) = rows(tmp_path, whole | more)
        assert (row.prompt[0]["content"], row.chosen, row.rejected) == ("q", [A], worse[1:])
        assert row.ignored == ignored, more
    longer = {key: [Q, A, *side] for key, side in whole.items()}
    assert len(rows(tmp_path, longer | {"prompt": [Q]})[0].prompt) == 3


def test_notes_say_nothing():
    assert not says({"role": "assistant", "content": " ", "model": "gpt-4"})
    assert says({"role": "assistant", "content": None, "tool_calls": [CALL]})


@pytest.mark.parametrize(
    "more, named",
    [
        ({"query": "Why?"}, "query"),
        ({"source": "Who is it?"}, "source"),
        ({"history": [["a", "b"]]}, "history"),
        ({"turns": [Q]}, "turns"),
        ({"trajectory": [{"from": "user", "value": "2 + 3?"}]}, "trajectory"),
    ],
)
@pytest.mark.parametrize("answers", ["text", "messages"])
def test_a_prompt_is_not_guessed_where_another_column_may_be_it(answers, more, named, tmp_path):
    sides = {"chosen": "It is Lima.", "rejected": "It is Cusco."}
    if answers == "messages":
        sides = {key: [{"role": "assistant", "content": text}] for key, text in sides.items()}
    with pytest.raises(ValueError) as error:
        rows(tmp_path, {"id": "x-1", "score": 1, **more} | sides)
    message = str(error.value)
    assert f"rows.jsonl:1: there is no prompt, but text in {named}: " in message
    assert f"tools/prepare.py --prompt {named};" in message


def test_a_prompt_that_both_answers_repeat_counts_once_and_is_said(tmp_path):
    loaded = rows(
        tmp_path,
        {"prompt": "Q: a\n", "chosen": "Q: a\nyes", "rejected": "Q: a\nno"},
        {"prompt": "Q: a\n", "chosen": "Q: a\nyes", "rejected": "no"},
    )
    assert [row.chosen for row in loaded] == ["yes", "Q: a\nyes"]
    (line,) = [line for line in warnings_of(loaded) if "repeat" in line]
    assert line.startswith("1 of 2 rows repeat the prompt in both answers (first: ")


# ---------------------------------------------------------------------------------------------
# Template files.

LAID_OUT = """\
{% for m in messages %}
    {% if m.role == 'user' %}
        {{ '<' + m.content + '>\\n' }}
    {% else %}
        {{ '[' + m.content + ']' }}
    {% endif %}

{% endfor %}
{% if add_generation_prompt %}
    {{ 'A: ' }}
{% endif %}
"""


def written(template: str) -> str:
    return render_chat_template(template, [Q], True, {})


def test_a_template_file_that_is_laid_out_for_people_is_read_as_its_authors_do(tmp_path):
    """They remove indentation and line ends. A file whose tags strip their own white space, or
    that has no indentation in front of an output, is taken to the letter."""
    for name, template, wanted in (
        ("indented", LAID_OUT, "<q>\nA: "),
        ("with tabs", LAID_OUT.replace("    ", "\t"), "<q>\nA: "),
        ("with tags that strip", LAID_OUT.replace("{{", "{{-").replace("{%", "{%-"), "<q>\nA: "),
        (
            "with lines of text",
            "{% for m in messages %}\n{{ m.content }}\n{% endfor %}\n  A:",
            "q\n  A:",
        ),
        ("after a tag that strips", "{% if true -%}\n    {{ 'a' }}\n{% endif %}b", "a\nb"),
        ("with text of several lines", "{{- 'a\n    {{ b' }}", "a\n    {{ b"),
    ):
        for encoding in ("utf-8", "utf-8-sig"):  # the second as Windows writes it, with a BOM
            (tmp_path / "t.jinja").write_text(template, encoding=encoding)
            assert written(read_template_file(tmp_path / "t.jinja")) == wanted, name


def test_several_templates_without_a_default_are_refused_by_name(tiny_tokenizer, tmp_path):
    config = json.loads((tiny_tokenizer / "tokenizer_config.json").read_text())
    for file in tiny_tokenizer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    named = [{"name": name, "template": name} for name in ("rag", "tool_use")]
    config["chat_template"] = named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path).apply_chat_template([Q])
    assert "the chat templates rag, tool_use, and none is the default" in str(error.value)
    assert "--chat-template" in str(error.value)
    (tmp_path / "t.jinja").write_text("x")
    assert load_tokenizer(tmp_path, tmp_path / "t.jinja").apply_chat_template([Q]) == "x"
    config["chat_template"] = [*named, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).apply_chat_template([Q]) == "d"


@pytest.mark.parametrize("in_files", [False, True])
def test_dialogues_with_tools_get_the_template_for_them(in_files, tiny_tokenizer, tmp_path):
    """Hermes has one beside its default, in a list or in files; a server given tools takes it."""
    for file in tiny_tokenizer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = {"default": "d", "tool_use": "t{{ bos_token }}", "rag": "r"}
    if in_files:
        (tmp_path / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            file = tmp_path / "additional_chat_templates" / f"{name}.jinja"
            file.write_text(named[name])
        (tmp_path / "chat_template.jinja").write_text("d")
    else:
        config["chat_template"] = [{"name": n, "template": text} for n, text in named.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    tools = [{"name": "look"}]
    assert tokenizer.apply_chat_template([Q]) == "d"
    assert tokenizer.apply_chat_template([Q], tools=tools) == "t<s>"
    tokenizer.save_chat_template(tmp_path)  # both begin with BOS where training puts it
    again = load_tokenizer(tmp_path)
    assert again.apply_chat_template([Q]) == "<s>d"
    assert again.apply_chat_template([Q], tools=tools) == "<s>t<s>"
    assert (tmp_path / "additional_chat_templates" / "rag.jinja").read_text() == "r"
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}mine")
    mine = load_tokenizer(tmp_path, tmp_path / "mine.jinja")
    assert mine.apply_chat_template([Q], tools=tools) == "<s>mine"
    mine.save_chat_template(tmp_path)  # so that a server does not take the other one
    assert load_tokenizer(tmp_path).apply_chat_template([Q], tools=tools) == "<s>mine"


def test_a_name_of_a_template_leads_out_of_no_folder(tiny_tokenizer, tmp_path):
    """Names come with a download."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for file in tiny_tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    named = [{"name": name, "template": "x"} for name in ("default", "c/d", "../../../e", "rag")]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    load_tokenizer(folder).save_chat_template(folder)
    assert [*tmp_path.rglob("*.jinja")] == [
        folder / "chat_template.jinja",
        folder / "additional_chat_templates" / "rag.jinja",
    ]


def test_a_template_is_told_the_day_that_is_set(tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert not tokenizer.writes_date
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    assert tokenizer.writes_date
    assert tokenizer.apply_chat_template([Q]) == datetime.date.today().strftime("%d %b %Y")
    tokenizer.date = datetime.date(2024, 2, 29)
    assert tokenizer.apply_chat_template([Q]) == "29 Feb 2024"
