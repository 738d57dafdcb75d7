"""What each make of server calls the sampling fields, and which it understands at all."""

from __future__ import annotations

import json
from enum import StrEnum
from functools import partial
from typing import Any, Final, NamedTuple, cast

from proctor.infer.client import Client
from proctor.infer.engine import PhysicalRequest, Sampling
from proctor.infer.latest import Latest
from proctor.infer.loglikelihood import ordered_choices


class Dialect(StrEnum):
    """Whose extensions of the OpenAI protocol a server speaks."""

    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"
    OPENAI = "openai"
    """Only the standard fields: a strict endpoint refuses others."""


class Generated(NamedTuple):
    """One generation as the server tells it."""

    text: str
    token_ids: tuple[int, ...] | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


NATIVE: Final = "/completion"
"""llama.cpp's own route."""

PENALISED: Final = 65_536
"""Tokens that llama.cpp's penalties look back on: all of them, as elsewhere. It refuses -1; its default is 64."""

_BY_ENGINE = {"vllm": Dialect.VLLM, "fake": Dialect.VLLM, "sglang": Dialect.SGLANG, "llama.cpp": Dialect.LLAMA_CPP}


async def find_dialect(client: Client, engine: str) -> Dialect:
    """From the engine's name, or from what an unnamed server answers to."""
    if engine in _BY_ENGINE:
        return _BY_ENGINE[engine]
    if "default_generation_settings" in (await client.get("/props") or {}):
        return Dialect.LLAMA_CPP
    if "model_path" in (await client.get("/get_model_info") or {}):
        return Dialect.SGLANG
    if "version" in (await client.get("/version") or {}):
        return Dialect.VLLM
    return Dialect.OPENAI


def generation_body(request: PhysicalRequest, sampling: Sampling, dialect: Dialect) -> tuple[str, dict[str, Any]]:
    """Path and body of one generation, with every sampling field that the dialect has.

    Without ids and text, the server renders the messages itself (/v1/chat/completions).
    """
    body = _FIELDS[dialect](sampling).copy()
    if request.prompt_ids is not None and dialect is Dialect.LLAMA_CPP:
        # Its own route, because only that one returns the generated ids.
        body["n_predict"] = body.pop("max_tokens")
        return NATIVE, {"prompt": request.prompt_ids, "return_tokens": True} | body
    if request.prompt_ids is not None or request.prompt_text is not None:
        body["prompt"] = request.prompt_text if request.prompt_ids is None else request.prompt_ids
        return "/v1/completions", body
    asked = request.request
    body["messages"] = [{"role": m.role, "content": m.content} for m in asked.messages]
    if dialect is not Dialect.OPENAI:
        body["add_generation_prompt"] = asked.add_generation_prompt
        if dialect is not Dialect.LLAMA_CPP:
            body["continue_final_message"] = not asked.add_generation_prompt
        if asked.template_arguments != "{}":
            body["chat_template_kwargs"] = json.loads(asked.template_arguments)
    return "/v1/chat/completions", body


def read_native(value: dict[str, Any]) -> Generated:
    """What llama.cpp generated on its own route. Raises one of `outcome.UNREADABLE` for anything else."""
    return Generated(
        text=_text(value["content"]),
        token_ids=tuple(int(t) for t in value["tokens"]),
        finish_reason="length" if value["stop_type"] == "limit" else "stop",
        prompt_tokens=int(value["tokens_evaluated"]),
        completion_tokens=int(value["tokens_predicted"]),
    )


def read_generation(value: dict[str, Any]) -> Generated:
    """What a server generated. Raises one of `outcome.UNREADABLE` for anything else."""
    choice = ordered_choices(value)[0]
    usage: dict[str, int | None] = value.get("usage") or {}
    ids: list[int] | None = choice.get("token_ids")
    if "message" not in choice:
        text = choice["text"]
    elif (text := choice["message"]["content"]) is None:
        text = ""  # what chat servers say when nothing but reasoning came
    reason = choice.get("finish_reason")
    return Generated(
        _text(text),
        None if ids is None else tuple(map(int, ids)),
        None if reason is None else _text(reason),
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is no {type(value).__name__}")
    return value


def sampling_fields(sampling: Sampling, dialect: Dialect) -> dict[str, Any]:
    """Every sampling field under the dialect's name, neutral values included: nothing is left to a default."""
    body: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "n": 1,
        "stream": False,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if dialect is Dialect.LLAMA_CPP:
        body |= _llama_cpp(sampling)
    elif dialect is not Dialect.OPENAI:
        body |= {
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "min_tokens": sampling.min_tokens,
        }
        if sampling.stop_token_ids:
            body["stop_token_ids"] = list(sampling.stop_token_ids)
        if dialect is Dialect.VLLM:
            body["return_token_ids"] = True
    return body | cast("dict[str, Any]", json.loads(sampling.extra))


def _llama_cpp(sampling: Sampling) -> dict[str, Any]:
    penalised = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
    return {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "typical_p": 1.0,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": PENALISED if penalised else 0,
        "dry_multiplier": 0.0,
        "xtc_probability": 0.0,
        "mirostat": 0,
        "dynatemp_range": 0.0,
        "cache_prompt": True,
    }


_FIELDS: Final = {dialect: Latest(partial(sampling_fields, dialect=dialect)) for dialect in Dialect}
"""Not to be changed by who gets them."""
