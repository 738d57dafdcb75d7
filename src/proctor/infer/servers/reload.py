"""Other weights into a running vLLM, over its routes for developers, and how it is seen which weights it holds.

These routes ask for no key: whoever can reach the port can use them. Nothing here trusts a status: every parameter is
set to zero first, so that one that was not loaded shows, and what the server holds afterwards is read back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import aiohttp

from proctor.errors import ServerError
from proctor.infer.outcome import UNREADABLE
from proctor.infer.server import Backend

PROMPT_TOKENS: Final = 160
"""Longer than one block of any build's prefix cache, so that a cache that was not emptied shows."""
GENERATED: Final = 4
_STRIDE: Final = 7919
"""A prime: the prompt's tokens lie all over the vocabulary, and so on every part of a split embedding."""

_UNSEEN: Final = hashlib.sha256(b"").hexdigest()
"""Of a parameter that the server keeps elsewhere, in another form: on processors, of all linear layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a server holds, and what it says."""

    sums: Mapping[str, str]
    """A digest of each parameter as it lies in memory, by name."""
    said: str
    """The log-probabilities of a fixed prompt, and of what it generates next, to every digit."""


def probe_tokens(model: str) -> list[int]:
    """The fixed prompt for a model's directory. Raises ServerError where its vocabulary is not known."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        size = int((config.get("text_config") or config)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"the size of the vocabulary is not known: {error}") from error
    return [(1 + number * _STRIDE) % size for number in range(PROMPT_TOKENS)]


class Weights:
    """The weights of one running server. Every method raises ServerError for an answer that is not as it must be."""

    def __init__(self, backend: Backend, tokens: Sequence[int], *, timeout_s: float) -> None:
        self._backend = backend
        self._tokens = list(tokens)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def state(self) -> State:
        """What it holds and says now."""
        body = {"model": self._backend.served_model, "prompt": self._tokens, "temperature": 0, "logprobs": 1}
        sums = await self._sums()
        echoed = await self._post("/v1/completions", body | {"max_tokens": 1, "echo": True})
        # Not an echo: it uses the prefix cache.
        written = await self._post("/v1/completions", body | {"max_tokens": GENERATED, "ignore_eos": True})
        said = [_logprobs(echoed, PROMPT_TOKENS + 1), _logprobs(written, GENERATED)]
        return State(sums=sums, said=json.dumps(said))

    async def load(self, path: str) -> None:
        """Replace all weights by those of the directory, and forget what was computed with the old ones.

        The server is paused meanwhile. It is of no use any more if this raises.
        """
        await self._post("/pause?mode=abort")
        await self._post("/weight_checker", {"action": "reset"})
        empty = await self._sums()
        loading = {"method": "reload_weights", "kwargs": {"weights_path": path}, "timeout": self._timeout.total}
        await self._post("/collective_rpc", loading)
        if (await self._post("/reset_prefix_cache")).get("success") is not True:
            raise ServerError("its prefix cache was not emptied")
        await self._post("/resume")
        sums = await self._sums()
        if sums.keys() != empty.keys():
            raise ServerError("it has other parameters than before")
        left = [name for name, value in sums.items() if value == empty[name] != _UNSEEN]
        if left:
            raise ServerError(f"{len(left)} of {len(sums)} parameters were not loaded, or are zero: first {left[0]!r}")

    async def _sums(self) -> dict[str, str]:
        found = (await self._post("/weight_checker", {"action": "checksum"})).get("checksums")
        if not isinstance(found, dict) or not found:
            raise ServerError("it does not say which weights it holds")
        return {str(name): str(value) for name, value in cast("dict[Any, Any]", found).items()}

    async def _post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        key = self._backend.api_key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            async with (
                aiohttp.ClientSession(timeout=self._timeout) as session,
                session.post(self._backend.url + path, json=body, headers=headers) as reply,
            ):
                text = await reply.text()
        except TimeoutError:
            raise ServerError(f"{path} was not answered within {self._timeout.total:g} s") from None
        except aiohttp.ClientError as error:
            raise ServerError(f"{path}: {type(error).__name__}: {error}") from error
        if reply.status != 200:
            raise ServerError(f"{path} answers HTTP {reply.status}: {text[:200]}")
        try:
            value: Any = json.loads(text or "{}")
        except ValueError:
            raise ServerError(f"{path} answers no JSON: {text[:200]}") from None
        return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _logprobs(answer: Mapping[str, Any], count: int) -> list[float]:
    """All log-probabilities of a completion but that of the first prompt token, which has none."""
    try:
        values = answer["choices"][0]["logprobs"]["token_logprobs"]
        found = [float(value) for value in values if value is not None]
    except UNREADABLE as error:
        raise ServerError(f"its answer to the fixed prompt cannot be read: {type(error).__name__}") from error
    if len(values) != count or not all(map(math.isfinite, found)):
        raise ServerError("its answer to the fixed prompt is incomplete")
    return found
