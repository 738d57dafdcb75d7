"""Chat prompts that stay messages: what stands in for a model's chat template while recording.

lm-eval asks the model to render its messages. Our model returns them as JSON between two marks, so that the
messages can be taken out of the finished prompt, whatever the task did with it on the way, or the task is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from proctor.errors import TaskError
from proctor.records import Message

_OPEN: Final = "\ue000proctor:"
_CLOSE: Final = "\ue001"
_MARKED: Final = re.compile(f"{_OPEN}([\x20-\x7e]*){_CLOSE}")


def render(chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """The messages as one marked text: the signature of lm-eval's LM.apply_chat_template.

    Raises TaskError for messages that are more than a role and a text.
    """
    for message in chat_history:
        if set(message) != {"role", "content"} or not all(isinstance(v, str) for v in message.values()):
            raise TaskError(
                f"a chat message has {sorted(message)} of types {[type(v).__name__ for v in message.values()]}"
            )
    turns = [[m["role"], m["content"]] for m in chat_history]
    return _OPEN + json.dumps([turns, bool(add_generation_prompt)], ensure_ascii=True) + _CLOSE


def parse(prompt: str) -> tuple[str, tuple[Message, ...], bool]:
    """(text, messages, add_generation_prompt) of a recorded prompt; no messages if none were rendered.

    Raises TaskError if the task changed the rendered prompt, put text around it or joined several.
    """
    found = _MARKED.fullmatch(prompt)
    if found is None:
        if _OPEN in prompt or _CLOSE in prompt:
            raise TaskError("it changes the prompt after the chat template, so the messages cannot be recovered")
        return prompt, (), True
    turns, add_generation_prompt = json.loads(found.group(1))
    return "", tuple(Message(role=role, content=content) for role, content in turns), add_generation_prompt
