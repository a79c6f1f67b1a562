"""Chat templates: messages as the text that a model was trained to continue.

Reads      chat_template.jinja, else the template in tokenizer_config.json
Refuses    templates that fail, or that raise an exception about the messages

A template is code that comes with a download, so it runs in jinja2's immutable sandbox, with the
settings and the functions that transformers gives it.
"""

import datetime
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2.sandbox

# For models without one: each message is its role, its content, EOS, a newline (xfactlab/orpo).
AUTHORS_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{{ eos_token }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# The comment's end takes the newline away, so that the template still begins a line.
BOS_IN_FRONT = "{{ bos_token }}{# as in training #}\n"
MORE_TEMPLATES = "additional_chat_templates"  # a folder: NAME.jinja


def read_chat_templates(folder: Path, config: dict) -> dict[str, str]:
    """The templates of a folder whose tokenizer_config.json holds config, by name. Where
    there are template files, the config's templates do not count, as in transformers."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if found := {name: f.read_text("utf-8") for name, f in files.items() if f.is_file()}:
        return found
    template = config.get("chat_template") or []
    if isinstance(template, list):  # several templates, each with a name
        return {t["name"]: t["template"] for t in template}
    return {"default": template}


def default_of(templates: dict[str, str]) -> str | None:
    """The default of a folder's templates; None where there are none. Where there is no default it
    is one that refuses whatever it is given."""
    if templates and "default" not in templates:
        problem = (
            f"the model has the chat templates {', '.join(templates)}, and none is the default: "
            "write the one that is meant into a file, and name it with --chat-template"
        )
        return f"{{{{ raise_exception({json.dumps(problem)}) }}}}"
    return templates.get("default")


def read_template_file(file: Path) -> str:
    """The template of --chat-template. Raises FileNotFoundError, ValueError.

    Template files are often laid out over indented lines, to be read by people; their authors
    remove indentation and line ends before use (chujiezheng/chat_templates). We do that where jinja
    would write an indentation into the text: in front of {{, after a tag that keeps white space.
    """
    try:
        template = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {error}") from None
    if re.search(r"(?<!-)[%}#]\}\s*\n[ \t]+\{\{(?!-)", template):
        template = re.sub(r"^[ \t]+|\n", "", template, flags=re.MULTILINE)
    return template


@functools.lru_cache(maxsize=8)  # compiling takes a hundred times as long as rendering
def _compile_chat_template(template: str) -> jinja2.Template:
    """In a sandbox, as a template is code that comes with a download."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # jinja2's own tojson escapes HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    # {% generation %} marks what a model writes. It has no effect on the text.
    template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template)
    template = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", template)
    return environment.from_string(template)


def render_chat_template(
    template: str,
    messages: list[dict],
    add_generation_prompt: bool,
    more: dict,
    date: datetime.date | None = None,
) -> str:
    """A Hugging Face chat template (jinja2) filled in. more: special tokens, tools and whatever
    else it reads. date: what strftime_now tells (default: today). Raises ValueError whatever goes
    wrong."""
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    given |= {"tools": None, "documents": None, **more}
    given["strftime_now"] = (date or datetime.date.today()).strftime
    try:
        return _compile_chat_template(template).render(given)
    except Exception as error:  # whatever other people's code raises is the template's error
        raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from None


def left_out(messages: list[dict], text: str) -> list[str]:
    """What a template did not write: "content of system messages" and the like, once for each
    message of which `text`, what it wrote, lacks a part.

    White space may differ, and a text may be escaped as in JSON. The longest is looked for first
    and then taken out of the text, so that a short one is not found inside another message.
    """
    parts = [part for message in messages for part in _texts_of(message)]
    missing: list[str] = []
    for name, part in sorted(parts, key=lambda part: -len(part[1])):
        form = part if part in text else json.dumps(part, ensure_ascii=False)[1:-1]
        if form in text:
            text = text.replace(form, "\0", 1)
        elif "".join(part.split()) not in "".join(text.split()):
            missing.append(name)
    return missing


def _texts_of(message: dict) -> Iterator[tuple[str, str]]:
    """(what it is, text) of everything in a message that says something."""
    for key, value in message.items():
        if key != "role" and not _is_id(key):
            name = f"{key} of {message['role']} messages"
            yield from ((name, text) for text in map(str.strip, _leaves(value)) if text)


def _is_id(key: str) -> bool:
    """Ids and types are for programs: templates need not write them."""
    return key in ("id", "type") or key.endswith("_id")


def _leaves(value) -> Iterator[str]:
    """The texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not _is_id(key):
                yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)


def where_they_part(prompt: str, *answered: str) -> str:
    """Where a dialogue stops being what its prompt begins, and what can be done."""
    text = next(text for text in answered if not text.startswith(prompt))
    n = len(os.path.commonprefix([prompt, text]))
    same = prompt[max(0, n - 20) : n]
    return (
        f"where after {same!r} the prompt has {prompt[n : n + 20]!r} and the dialogue has "
        f"{text[n : n + 20]!r}; name a template without this difference with --chat-template"
    )
