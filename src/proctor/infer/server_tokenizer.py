"""Tokenisation by the server: llama.cpp's and vLLM's /tokenize, where no local tokenizer.json exists."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

from proctor.errors import ServerError
from proctor.infer.chat_template import DEFAULT_DATE, ChatTemplates
from proctor.infer.client import Broken, Client
from proctor.records import digest


class ServerTokenizer:
    """Asks the server for ids; its special tokens and chat template come from /props or /tokenizer_info."""

    def __init__(
        self,
        client: Client,
        *,
        llama_cpp: bool,
        special_tokens: Mapping[str, str],
        special_ids: Mapping[str, int],
        templates: ChatTemplates | None,
    ) -> None:
        self._client = client
        self._llama_cpp = llama_cpp
        self._special_tokens = special_tokens
        self._special_ids = special_ids
        self._templates = templates

    @staticmethod
    async def offered(client: Client) -> bool:
        """Whether the server tokenises at all, as vLLM and llama.cpp do."""
        found = await client.try_post("/tokenize", {"prompt": "a", "content": "a", "add_special_tokens": False})
        return found is not None and isinstance(found.get("tokens"), list)

    @classmethod
    async def open(cls, client: Client, *, date: str = DEFAULT_DATE) -> Self:
        """Find out what the server offers. Raises ServerError if it cannot tokenise."""
        props = await client.get("/props") or {}
        llama_cpp = "default_generation_settings" in props
        facts = props if llama_cpp else await client.get("/tokenizer_info") or {}
        texts = {n: facts[n] for n in ("bos_token", "eos_token") if isinstance(facts.get(n), str) and facts[n]}
        template = facts.get("chat_template")
        templates = None
        if isinstance(template, str) and template:
            templates = ChatTemplates(sources={"default": template}, special_tokens=texts, date=date)
        opened = cls(client, llama_cpp=llama_cpp, special_tokens=texts, special_ids={}, templates=templates)
        encoded = await opened.encode([(text, False) for text in ("a", *texts.values())])
        ids = {name: found[0] for name, found in zip(texts, encoded[1:], strict=True) if len(found) == 1}
        return cls(client, llama_cpp=llama_cpp, special_tokens=texts, special_ids=ids, templates=templates)

    @property
    def identity(self) -> str:
        # The ids themselves enter the keys; this only tells the two ways of getting them apart.
        return digest("server")

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self._special_tokens

    @property
    def special_ids(self) -> Mapping[str, int]:
        return self._special_ids

    @property
    def templates(self) -> ChatTemplates | None:
        return self._templates

    async def encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Raises ServerError when the server refuses to tokenise."""
        return list(await asyncio.gather(*(self._encode(text, special) for text, special in texts)))

    async def _encode(self, text: str, special: bool) -> list[int]:
        if not text and not special:
            return []
        body = tokenize_body(text, special, llama_cpp=self._llama_cpp)
        reply = await self._client.post("/tokenize", body, named=not self._llama_cpp)
        tokens = None if isinstance(reply, Broken) else read_tokens(reply.value)
        if tokens is None:
            said = reply.message if isinstance(reply, Broken) else "no ids as `tokens` in the answer"
            raise ServerError(
                f"the server does not tokenise: {said}",
                hint="set `tokenizer:` of the model to a directory with tokenizer.json",
            )
        return tokens


def tokenize_body(text: str, special: bool, *, llama_cpp: bool) -> dict[str, Any]:
    """What /tokenize is asked: with or without the special tokens that the tokenizer adds by itself."""
    if llama_cpp:
        return {"content": text, "add_special": special, "parse_special": True}
    return {"prompt": text, "add_special_tokens": special}


def read_tokens(answer: Mapping[str, Any]) -> list[int] | None:
    """The ids in an answer of /tokenize; None if there are none."""
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, int) for t in cast("list[object]", tokens)):
        return None
    return cast("list[int]", tokens)
