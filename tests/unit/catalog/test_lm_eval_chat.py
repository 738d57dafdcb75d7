"""Chat prompts stay messages on their way through lm-eval, or are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.catalog.lm_eval import chat
from proctor.errors import TaskError
from proctor.records import Message

TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}), min_size=1
)


@given(TURNS, st.booleans())
def test_messages_come_back_whatever_they_contain(turns: list[dict[str, str]], opens: bool) -> None:
    text, messages, add_generation_prompt = chat.parse(chat.render(turns, add_generation_prompt=opens))
    assert text == ""
    assert messages == tuple(Message(role=t["role"], content=t["content"]) for t in turns)
    assert add_generation_prompt is opens


def test_a_message_that_quotes_a_rendered_prompt_comes_back() -> None:
    inner = chat.render([{"role": "user", "content": "x"}])
    _, messages, _ = chat.parse(chat.render([{"role": "user", "content": inner}]))
    assert messages == (Message(role="user", content=inner),)


def test_plain_text_is_plain_text() -> None:
    assert chat.parse("Question: ü\nAnswer:") == ("Question: ü\nAnswer:", (), True)


@pytest.mark.parametrize(
    "spoil",
    [lambda p: p + " more", lambda p: "before " + p, lambda p: p[:-1], lambda p: p[10:], lambda p: p + p],
    ids=["after", "before", "cut end", "cut start", "twice"],
)
def test_a_prompt_that_was_changed_is_refused(spoil: object) -> None:
    prompt = chat.render([{"role": "user", "content": "x"}])
    with pytest.raises(TaskError, match="messages cannot be recovered"):
        chat.parse(spoil(prompt))  # type: ignore[operator]


@pytest.mark.parametrize("message", [{"role": "user", "content": [{"type": "image"}]}, {"role": "user", "name": "a"}])
def test_messages_that_are_more_than_text_are_refused(message: dict[str, object]) -> None:
    with pytest.raises(TaskError):
        chat.render([message])
