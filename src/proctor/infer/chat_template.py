"""Chat templates, rendered as `transformers` renders them: same sandbox, same variables, same way to continue a turn.

One thing differs on purpose: `strftime_now` tells a fixed date, because a template that prints today's date
would give the same question another key every day.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from proctor.errors import ModelError
from proctor.records import Message, digest

DEFAULT_DATE: Final = "2024-07-26"
"""What templates take for today: the date that Llama 3's own template falls back to."""

_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "
"""Appended to the last message and searched for in the rendering: where a prefix to continue ends."""

RENDER_ERRORS: Final = (
    jinja2.exceptions.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's own code, or a request that it does not fit, can raise while rendering."""


class _Generation(Extension):
    """Accepts {% generation %} … {% endgeneration %}, which marks assistant text for training; renders the body."""

    tags = {"generation"}  # noqa: RUF012 - the name and the shape are jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(date: str) -> ImmutableSandboxedEnvironment:
    today = datetime.fromisoformat(date)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception  # type: ignore[assignment]
    environment.globals["strftime_now"] = cast(Callable[[str], str], today.strftime)  # type: ignore[assignment]
    return environment


@dataclass(frozen=True, kw_only=True)
class ChatTemplates:
    """A model's templates by name; `default` is the one that is used unless a request names another."""

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    """bos_token, eos_token, ...: visible to the template under these names."""
    date: str = DEFAULT_DATE

    @cached_property
    def digest(self) -> str:
        """Changes when any template, special token or the pinned date does."""
        return digest([dict(self.sources), dict(self.special_tokens), self.date])

    @cached_property
    def _compiled(self) -> dict[str, jinja2.Template]:
        environment = _environment(self.date)
        return {name: environment.from_string(source) for name, source in self.sources.items()}

    def select(self, name: str | None = None) -> str:
        """The name of the template to use. Raises ValueError if there is none, with the valid names."""
        chosen = name or "default"
        if chosen in self.sources:
            return chosen
        if name and len(self.sources) == 1:
            return next(iter(self.sources))
        valid = ", ".join(sorted(self.sources)) or "none"
        raise ValueError(f"the model has no chat template {chosen!r}; it has: {valid}")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. Without `add_generation_prompt` the last message is a prefix that the model continues.

        `arguments` are further variables for the template; `chat_template` among them names one of several.
        Raises one of RENDER_ERRORS: the template refuses the conversation, or drops the text to continue.
        """
        if not messages:
            raise ValueError("a chat template cannot be applied to an empty conversation")
        variables = dict(self.special_tokens) | dict(arguments or {})
        name = self.select(variables.pop("chat_template", None))
        turns = [{"role": m.role, "content": m.content} for m in messages]
        continued = not add_generation_prompt
        if continued:
            if "content" not in self.sources[name]:
                raise ValueError("the chat template does not read a message's content, so it cannot be continued")
            turns[-1]["content"] += _TAG
        rendered = self._compiled[name].render(
            messages=turns,
            tools=variables.pop("tools", None),
            documents=variables.pop("documents", None),
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return _cut_at_tag(rendered, messages[-1].content) if continued else rendered


def _cut_at_tag(rendered: str, final: str) -> str:
    if final.strip() not in rendered or _TAG.strip() not in rendered:
        raise ValueError("the chat template does not show the final message as it is, so it cannot be continued")
    at = rendered.rindex(_TAG.strip())
    if rendered[at : at + len(_TAG)] == _TAG:
        return rendered[:at]
    # The template strips messages: the space that ended the prefix is gone with the tag's own.
    return rendered[:at].rstrip()


def read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A model directory's templates by name, from chat_template.jinja, its siblings, or tokenizer_config.json.

    Raises ModelError for a template file that cannot be read.
    """
    try:
        sources = _from_config(config.get("chat_template"))
        legacy = directory / "chat_template.json"
        if legacy.is_file():
            sources |= _from_config(json.loads(legacy.read_text(encoding="utf-8")).get("chat_template"))
        single = directory / "chat_template.jinja"
        if single.is_file():
            sources["default"] = single.read_text(encoding="utf-8")
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = path.read_text(encoding="utf-8")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot read the chat template in {str(directory)!r}: {error}") from error
    return sources


def _from_config(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {str(entry["name"]): str(entry["template"]) for entry in cast("list[dict[str, str]]", value)}
    return {}
