"""Chat templates: messages as the text that a model was trained to continue.

Reads      chat_template.jinja, else the template in tokenizer_config.json
Refuses    templates that fail, or that raise an exception about the messages

A template is code that comes with a download, so it runs in jinja2's immutable sandbox, with the
settings and the functions that transformers gives it.
"""

import functools
import json
import re
import time
from pathlib import Path

import jinja2.sandbox

# For models without one: each message is its role, its content, EOS, a newline (xfactlab/orpo).
AUTHORS_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{{ eos_token }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# The comment's end takes the newline away, so that the template still begins a line.
BOS_IN_FRONT = "{{ bos_token }}{# as in training #}\n"


def read_chat_template(folder: Path, config: dict) -> str | None:
    """The template of a folder whose tokenizer_config.json holds config; None without one."""
    file, template = folder / "chat_template.jinja", config.get("chat_template")
    if file.is_file():
        return file.read_text("utf-8")
    if isinstance(template, list):  # several templates, each with a name
        return {t["name"]: t["template"] for t in template}.get("default")
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
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    # {% generation %} marks what a model writes. It has no effect on the text.
    template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template)
    template = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", template)
    return environment.from_string(template)


def render_chat_template(template: str, messages, add_generation_prompt, special_tokens) -> str:
    """A Hugging Face chat template (jinja2) filled in. Raises ValueError whatever goes wrong."""
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    given |= {"tools": None, "documents": None, **special_tokens}
    try:
        return _compile_chat_template(template).render(given)
    except Exception as error:  # whatever other people's code raises is the template's error
        raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from None
