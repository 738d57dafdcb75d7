"""Logical requests → physical ones: render, tokenise a whole batch at once, fit to the window, key."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final, cast

from proctor.config.spec import OpenAIEngine as OpenAISpec
from proctor.infer.chat_template import RENDER_ERRORS
from proctor.infer.client import Client
from proctor.infer.engine import PhysicalRequest
from proctor.infer.profiles import (
    DEFAULT_GENERATION,
    CannotEncode,
    DoesNotFit,
    Rules,
    fit_prompt,
    fit_scored,
    generation_key,
    move_spaces,
    own_window,
    passages_key,
    rolling_passages,
    sample_seed,
    split_pair,
    text_key,
    texts_to_encode,
    window_length,
)
from proctor.infer.profiles_sampling import CannotExpress, Generation, resolve_generation
from proctor.infer.server_tokenizer import ServerTokenizer
from proctor.infer.tokenizer import LocalTokenizer, Tokenizer
from proctor.infer.tokenizer_directory import read_config, read_json
from proctor.records import Boundary, Failure, Kind, Message, Request, canonical_json, digest, quickly


class ServerSide(Enum):
    """Tokenisation by the server."""

    SERVER = "server"
    """Always; an error where the server cannot."""
    IF_OFFERED = "if offered"
    """Where the server can; else text is sent."""


SERVER: Final = ServerSide.SERVER
IF_OFFERED: Final = ServerSide.IF_OFFERED
TokenizerSource = Path | ServerSide | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """A request whose prompt is text."""

    request: Request
    key: str
    text: str


_physical_request: Final = quickly(PhysicalRequest)

_SERVER_IDENTITY: Final = digest("server")
"""Of whatever tokenises in a server: which server that is stands in the fingerprint that answers are kept under."""
_NO_WINDOW: Final = 1 << 40
_REMEMBERED: Final = 1024
"""Different generation arguments that are kept resolved."""


class _Refused(Exception):
    """Carries the failure of one request out of the pure rules."""

    def __init__(self, boundary: Boundary, message: str) -> None:
        super().__init__(message)
        self.boundary = boundary
        self.message = message


class Resolver:
    """Applies one profile to one model. Opens no connection unless the server is the tokenizer."""

    def __init__(
        self, spec: OpenAISpec, source: TokenizerSource, *, client: Client, model_directory: str | Path | None = None
    ) -> None:
        self._spec = spec
        self._source = source
        self._client = client
        self._config: dict[str, Any] = {}
        self._generation_config: dict[str, Any] = {}
        if model_directory is not None:
            self._config = read_json(Path(model_directory) / "config.json")
            if spec.profile == "hf":
                self._generation_config = read_json(Path(model_directory) / "generation_config.json")
        self._tokenizer: Tokenizer | None = None
        self._server_tokenises: bool | None = None
        self._rules: Rules | None = None
        self._whole: Rules | None = None
        self._extra_body = canonical_json(spec.extra_body)
        self._generations: dict[str, Generation] = {}

    @property
    def local(self) -> bool:
        """Whether no server is asked: the tokenizer is a file, or texts are sent as they are."""
        return not isinstance(self._source, ServerSide)

    async def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, loaded once; None where only text can be sent. Raises ModelError, ServerError."""
        if self._tokenizer is None:
            if isinstance(self._source, Path):
                # As an argument of from_pretrained this flag changes what the tokenizer itself adds.
                flag = None if self._spec.profile == "local-completions" else self._spec.add_bos_token
                self._tokenizer = LocalTokenizer(self._source, add_bos_token=flag, date=self._spec.template_date)
            elif self._source is SERVER or (self._source is IF_OFFERED and await self._offered()):
                self._tokenizer = await ServerTokenizer.open(self._client, date=self._spec.template_date)
        return self._tokenizer

    async def _offered(self) -> bool:
        if self._server_tokenises is None:
            self._server_tokenises = await ServerTokenizer.offered(self._client)
        return self._server_tokenises

    async def rules(self) -> Rules:
        """The profile with this model's facts."""
        if self._rules is None:
            tokenizer = await self.tokenizer()
            texts: Mapping[str, str] = tokenizer.special_tokens if tokenizer else {}
            ids: Mapping[str, int] = tokenizer.special_ids if tokenizer else {}
            config = read_config(self._source) if isinstance(self._source, Path) else {}
            self._rules = Rules(
                profile=self._spec.profile,
                max_length=window_length(self._spec, self._config, config),
                max_gen_toks=self._spec.max_gen_toks or DEFAULT_GENERATION,
                add_bos_token=self._spec.add_bos_token,
                bos=texts.get("bos_token"),
                eos=texts.get("eos_token"),
                prefix_id=ids.get("bos_token", ids.get("eos_token")),
            )
            self._whole = self._uncut(self._rules, config)
        return self._rules

    def _uncut(self, rules: Rules, tokenizer_config: dict[str, Any]) -> Rules:
        """The rules for what is not to be cut.

        A profile's window says where its class would cut. Where nothing is cut, the model's own one counts; and where
        that is not known, the server has the word.
        """
        if self._spec.truncation != "fail" or self._spec.max_length:
            return rules
        window = own_window(self._config, tokenizer_config) or _NO_WINDOW
        return replace(rules, max_length=max(window, rules.max_length))

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        """One result per request, in order. Raises ModelError or ServerError for the tokenizer, never for a request."""
        tokenizer, rules = await self.tokenizer(), await self.rules()
        keys = [r.key for r in requests] if keys is None else keys
        out: list[PhysicalRequest | Failure] = []
        drawn: list[tuple[int, _Drawn]] = []
        for request, key in zip(requests, keys, strict=True):
            try:
                found = self._draw(request, key, tokenizer)
                if isinstance(found, _Drawn):
                    _check_text(found.text)
                    _check_text(request.continuation or "")
            except _Refused as refused:
                found = _failure(key, refused)
            if not isinstance(found, _Drawn):
                out.append(found)
            elif tokenizer is not None:
                drawn.append((len(out), found))
                out.append(_failure(found.key, _Refused(Boundary.RENDER, "not tokenised")))
            else:
                out.append(self._settle(rules, found, None))
        if tokenizer is not None:
            encoded = await _encode(rules, tokenizer, [d for _, d in drawn])
            for (at, one), ids in zip(drawn, encoded, strict=True):
                out[at] = self._settle(rules, one, ids)
        return out

    def _draw(self, request: Request, key: str, tokenizer: Tokenizer | None) -> _Drawn | PhysicalRequest:
        if not request.messages:
            return _Drawn(request=request, key=key, text=request.text)
        if tokenizer is None or (tokenizer.templates is None and not isinstance(self._source, Path)):
            return self._chat(request, key)
        if tokenizer.templates is None:
            raise _Refused(Boundary.RENDER, "the model has no chat template")
        return _Drawn(request=request, key=key, text=self._render(request, tokenizer))

    def _render(self, request: Request, tokenizer: Tokenizer) -> str:
        assert tokenizer.templates is not None
        arguments = _object(request.template_arguments)
        if self._spec.profile == "vllm":
            arguments.setdefault("enable_thinking", None)

        def render(messages: Sequence[Message]) -> str:
            assert tokenizer.templates is not None
            return tokenizer.templates.render(
                messages, add_generation_prompt=request.add_generation_prompt, arguments=arguments
            )

        try:
            try:
                return render(request.messages)
            except RENDER_ERRORS[0]:
                if self._spec.profile == "local-completions":
                    raise
                # hf and vllm try once more without the system turn, which some templates refuse.
                return render([m for m in request.messages if m.role != "system"])
        except RENDER_ERRORS as error:
            raise _Refused(Boundary.RENDER, f"the chat template refuses the conversation: {error}") from error

    def _settle(self, rules: Rules, drawn: _Drawn, encoded: list[list[int]] | None) -> PhysicalRequest | Failure:
        kind = drawn.request.kind
        try:
            if kind is Kind.GENERATE:
                return self._generation(rules, drawn, None if encoded is None else encoded[0])
            if encoded is None:
                return self._scored_text(drawn)
            return self._scored_ids(rules, drawn, encoded)
        except DoesNotFit as error:
            return _failure(drawn.key, _Refused(Boundary.CONTEXT, str(error)))
        except (CannotEncode, CannotExpress) as error:
            return _failure(drawn.key, _Refused(Boundary.RENDER, str(error)))
        except _Refused as refused:
            return _failure(drawn.key, refused)

    def _scored_ids(self, rules: Rules, drawn: _Drawn, encoded: list[list[int]]) -> PhysicalRequest:
        kind = drawn.request.kind
        if kind is Kind.ROLLING:
            passages, cut = rolling_passages(rules, encoded[0]), 0
        else:
            whole = self._whole or rules
            passage, cut = fit_scored(whole, *split_pair(rules, drawn.text, encoded))
            passages = (passage,)
            self._check_cut(whole, cut)
        return _physical_request(
            key=drawn.key,
            physical_key=passages_key(kind, passages, self._extra_body),
            kind=kind,
            request=drawn.request,
            passages=passages,
            truncated_tokens=cut,
        )

    def _scored_text(self, drawn: _Drawn) -> PhysicalRequest:
        request = drawn.request
        context, continuation = move_spaces(drawn.text, request.continuation or "")
        if request.kind is Kind.ROLLING or not context:
            raise CannotEncode("a document, or a continuation of nothing, cannot be scored without a tokenizer")
        whole = context + continuation
        return PhysicalRequest(
            key=drawn.key,
            physical_key=text_key(request.kind, whole, len(context), self._identity, self._extra_body),
            kind=request.kind,
            request=request,
            prompt_text=whole,
        )

    def _generation(self, rules: Rules, drawn: _Drawn, ids: list[int] | None) -> PhysicalRequest:
        found = self._generation_arguments(drawn.request, rules)
        cut = 0
        if ids is not None:
            whole = self._whole or rules
            ids, cut = fit_prompt(whole, ids, found.reserve)
            self._check_cut(whole, cut)
            if found.total_length is not None:
                found = replace(found, sampling=replace(found.sampling, max_tokens=found.total_length - len(ids)))
        if ids is None:
            prompt = [drawn.text, self._identity]
            return self._finish(drawn.request, drawn.key, found, prompt, text=drawn.text)
        return self._finish(drawn.request, drawn.key, found, ids, ids=tuple(ids), cut=cut)

    def _chat(self, request: Request, key: str) -> PhysicalRequest:
        """A conversation that the server renders."""
        if request.kind is not Kind.GENERATE:
            raise _Refused(Boundary.RENDER, "a conversation cannot be scored without a local chat template")
        try:
            found = self._generation_arguments(request, None)
        except CannotExpress as error:
            raise _Refused(Boundary.RENDER, str(error)) from error
        shown = [[m.role, m.content] for m in request.messages]
        prompt = [shown, request.add_generation_prompt, request.template_arguments, self._identity]
        return self._finish(request, key, found, prompt)

    def _generation_arguments(self, request: Request, rules: Rules | None) -> Generation:
        """What the profile makes of a request's arguments: the same for all requests of a task, as a rule."""
        found = self._generations.get(request.arguments)
        if found is None:
            if len(self._generations) >= _REMEMBERED:
                self._generations.clear()
            found = self._generations[request.arguments] = resolve_generation(
                self._spec.profile,
                _object(request.arguments),
                default_length=self._spec.max_gen_toks or DEFAULT_GENERATION,
                eos=rules.eos if rules else None,
                defaults=self._generation_config,
            )
        return found

    def _finish(
        self,
        request: Request,
        key: str,
        found: Generation,
        prompt: object,
        *,
        text: str | None = None,
        ids: tuple[int, ...] | None = None,
        cut: int = 0,
    ) -> PhysicalRequest:
        """`prompt` is what the key is made of; a conversation that the server renders has neither text nor ids."""
        sampling = found.sampling
        if sampling.max_tokens < 1:
            raise CannotExpress(f"{sampling.max_tokens} tokens to generate: there must be at least one")
        sample = None
        if sampling.temperature > 0:
            base = self._spec.seed if found.base_seed is None else found.base_seed
            sample = (request.replicate, request.sample_index)
            sampling = replace(sampling, seed=sample_seed(base, request.replicate, key, request.sample_index))
        if self._spec.extra_body:
            extra = cast("dict[str, Any]", json.loads(sampling.extra)) | self._spec.extra_body
            sampling = replace(sampling, extra=canonical_json(extra))
        return _physical_request(
            key=key,
            physical_key=generation_key(prompt, sampling, sample=sample),
            kind=request.kind,
            request=request,
            prompt_ids=ids,
            prompt_text=text,
            sampling=sampling,
            truncated_tokens=cut,
        )

    def _check_cut(self, rules: Rules, cut: int) -> None:
        if cut and self._spec.truncation == "fail":
            raise DoesNotFit(
                f"the prompt is {cut} tokens too long for a window of {rules.max_length}: raise `engine.max_length` if "
                "the server has more, or cut as lm-eval does with `engine.truncation: truncate_left`"
            )

    @property
    def _identity(self) -> str:
        return self._tokenizer.identity if self._tokenizer else _SERVER_IDENTITY


def _object(text: str) -> dict[str, Any]:
    """A JSON object out of a request."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _Refused(Boundary.RENDER, f"malformed arguments {text[:200]!r}: {error}") from error
    if not isinstance(value, dict):
        raise _Refused(Boundary.RENDER, f"arguments must be a JSON object, not {text[:200]!r}")
    return cast("dict[str, Any]", value)


def _check_text(text: str) -> None:
    """Half a surrogate pair is no text: no tokenizer takes it, and no request can carry it."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Refused(Boundary.RENDER, f"the text is not valid Unicode: {error}") from error


async def _encode(rules: Rules, tokenizer: Tokenizer, drawn: Sequence[_Drawn]) -> list[list[list[int]]]:
    """Encode every distinct text once: choices of one question share their context."""
    wanted = [texts_to_encode(rules, d.request.kind, d.text, d.request.continuation) for d in drawn]
    distinct = list(dict.fromkeys(item for items in wanted for item in items))
    ids = dict(zip(distinct, await tokenizer.encode(distinct), strict=True))
    return [[ids[item] for item in items] for items in wanted]


def context_length(request: Request) -> int:
    """Characters of the context, as `texts_to_encode` divides it from the continuation."""
    return len(move_spaces(request.text, "")[0])


def _failure(key: str, refused: _Refused) -> Failure:
    return Failure(key=key, boundary=refused.boundary, message=refused.message, retryable=False, created=time.time())
