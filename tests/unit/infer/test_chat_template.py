"""Rendering of chat templates; equality with transformers is shown in tests/parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proctor.config.spec import OpenAIEngine as Spec
from proctor.errors import ModelError
from proctor.infer.chat_template import RENDER_ERRORS, ChatTemplates, read_templates
from proctor.infer.client import Client
from proctor.infer.engine import PhysicalRequest
from proctor.infer.fake_model import decode
from proctor.infer.profiles import resolution_digest
from proctor.infer.resolve import Resolver
from proctor.records import Boundary, Failure, Kind, Message, Request
from proctor.testing import write_byte_tokenizer

SIMPLE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.content }}]{% endfor %}"
)
HELLO = (Message(role="user", content="Hello"),)


def render(template: str, *messages: Message, prompt: bool = True, **arguments: Any) -> str:
    templates = ChatTemplates(sources={"default": template}, special_tokens={"bos_token": "<s>"})
    return templates.render(messages or HELLO, add_generation_prompt=prompt, arguments=arguments)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SIMPLE, "<user>Hello\n<a>"),
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>Hello"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{% if thinking is defined %}{{ thinking }}{% endif %}", "yes"),
    ],
)
def test_templates_see_what_transformers_shows_them(template: str, expected: str) -> None:
    assert render(template, thinking="yes") == expected


def test_a_prefix_is_continued_and_not_closed() -> None:
    turns = (*HELLO, Message(role="assistant", content="The answer is "))
    assert render(SIMPLE, *turns, prompt=False) == "<user>Hello\n<assistant>The answer is "
    trimming = SIMPLE.replace("m.content", "m.content | trim")
    assert render(trimming, *turns, prompt=False) == "<user>Hello\n<assistant>The answer is"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{{ 1 + 'a' }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{{ 1 // 0 }}",
    ],
)
def test_whatever_a_template_does_wrong_is_a_render_error(template: str) -> None:
    with pytest.raises(RENDER_ERRORS):
        render(template)


def test_text_to_continue_that_the_template_drops_is_refused() -> None:
    with pytest.raises(ValueError, match="final message"):
        render("{{ messages[0].content[:2] }}", Message(role="user", content="Hello"), prompt=False)


@pytest.mark.parametrize("profile", ["hf", "vllm", "local-completions"])
async def test_a_refused_system_turn_is_left_out_where_the_class_does_so(tmp_path: Path, profile: Any) -> None:
    directory = write_byte_tokenizer(tmp_path, chat_template=NO_SYSTEM)
    messages = (Message(role="system", content="Be brief"), *HELLO)
    request = Request(kind=Kind.GENERATE, messages=messages, arguments='{"do_sample":false}')
    (found,) = await Resolver(Spec(profile=profile), directory, client=Client(lambda: [])).resolve([request])
    if profile == "local-completions":
        assert isinstance(found, Failure)
        assert found.boundary is Boundary.RENDER
        assert "no system role" in found.message
    else:
        assert isinstance(found, PhysicalRequest) and found.prompt_ids is not None
        assert decode(found.prompt_ids) == "[Hello]"


def test_templates_are_found_in_every_place(tmp_path: Path) -> None:
    named = {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}
    assert read_templates(tmp_path, named) == {"default": "D", "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("J")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert read_templates(tmp_path, {"chat_template": "C"}) == {"default": "J", "rag": "R"}
    templates = ChatTemplates(sources=read_templates(tmp_path, {}))
    assert templates.render(HELLO, add_generation_prompt=True, arguments={"chat_template": "rag"}) == "R"
    with pytest.raises(ValueError, match="default, rag"):
        templates.render(HELLO, add_generation_prompt=True, arguments={"chat_template": "other"})


def test_a_malformed_template_entry_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match="chat template"):
        read_templates(tmp_path, {})


def test_the_pinned_date_changes_prompt_and_digest() -> None:
    source = {"default": "{{ strftime_now('%Y') }}"}
    old, new = ChatTemplates(sources=source), ChatTemplates(sources=source, date="2031-01-02")
    assert old.render(HELLO, add_generation_prompt=True) == "2024"
    assert new.render(HELLO, add_generation_prompt=True) == "2031"
    assert old.digest != new.digest
    digests = {
        resolution_digest(Spec(template_date=date), tokenizer="t", template="c", max_length=9)
        for date in ("2024-07-26", "2031-01-02")
    }
    assert len(digests) == 2


def test_template_arguments_reach_the_template() -> None:
    arguments = json.loads('{"enable_thinking": false}')
    template = "{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}"
    assert render(template, **arguments) == "quiet"
