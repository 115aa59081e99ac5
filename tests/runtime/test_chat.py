"""Chat templates next to a model."""

import json

import pytest

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.chat import chat_prompt

pytest.importorskip("jinja2")

TEMPLATE = """{% for message in messages %}
{{ bos_token }}[{{ message['role'] }}]{{ message['content'] }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
RENDERED = "<s>[user]1 < 2\n[assistant]"


@pytest.mark.parametrize("place", ["file", "config", "names"])
def test_the_template_is_that_of_the_file_or_of_the_config(place, tmp_path):
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    template = {"file": {}, "config": {"chat_template": TEMPLATE}, "names": {"chat_template": named}}[place]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, **template}))
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert chat_prompt("1 < 2", [tmp_path]) == RENDERED


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system') }}", "ValueError: no system"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{% for %}", "TemplateSyntaxError"),
        (None, "found none"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_an_error(template, words, tmp_path):
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match=words):
        chat_prompt("hello", [tmp_path])
