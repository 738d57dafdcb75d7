"""The frozen values that cross stages, and their keys.

Standard library only: this module is also imported by child processes that run in a harness's own
Python environment, where none of our dependencies are installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar, cast

Json = Any
"""A value that JSON can express: None, bool, int, float, str, list, dict with string keys."""

_Frozen = TypeVar("_Frozen")

KEY_VERSION: Final = 1
"""Part of every key; raised when the canonical form of a request changes."""


_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
"""Kept: `json.dumps` makes one for each call that does not use its defaults."""


def canonical_json(value: Json) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, ASCII, types kept (1 is not 1.0).

    Raises ValueError for NaN and infinities, TypeError for values that JSON cannot express.
    """
    return _ENCODER.encode(value)


def digest(value: Json) -> str:
    """SHA-256 of `canonical_json(value)`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def quickly(cls: type[_Frozen]) -> type[_Frozen]:
    """What makes instances of a frozen dataclass with slots, as `cls` itself does, in half the time or less.

    `dataclass` fills what is frozen by `object.__setattr__`, ten times as dear as an assignment. Here a twin with the
    same slots that is not frozen is filled, and then becomes an instance of `cls`. For what there is of every request;
    for classes without default factories.
    """

    def freeze(twin: object) -> None:
        twin.__class__ = cls

    same = [(f.name, f.type, field(default=f.default)) for f in fields(cast("Any", cls))]
    twin = make_dataclass(cls.__name__, same, kw_only=True, slots=True, namespace={"__post_init__": freeze})
    return cast("type[_Frozen]", twin)


class Kind(StrEnum):
    """What is asked of the model; the names are lm-evaluation-harness's."""

    LOGLIKELIHOOD = "loglikelihood"
    ROLLING = "loglikelihood_rolling"
    GENERATE = "generate_until"


_KINDS: Final = {kind.value: kind for kind in Kind}
"""Looking a kind up is quicker than making it, and recordings have very many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat. `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question of a task, as the task asks it: before any model's template or tokenizer.

    Exactly one of `text` and `messages` carries the prompt. For LOGLIKELIHOOD, `text` is the context
    and `continuation` is scored; for ROLLING, `text` is the whole document; for GENERATE, `arguments`
    holds the source's raw generation arguments (a profile resolves them, see `infer.profiles`).
    """

    kind: Kind
    text: str = ""
    messages: tuple[Message, ...] = ()
    add_generation_prompt: bool = True
    """With messages: open an assistant turn; if False, the last message is a prefix to continue."""
    template_arguments: str = "{}"
    """With messages: canonical JSON of extra arguments for the chat template (enable_thinking, ...)."""
    continuation: str | None = None
    arguments: str = "{}"
    """Canonical JSON of the raw generation arguments."""
    sample_index: int = 0
    """Which of several answers to the same question (lm-eval's repeats)."""
    replicate: int = 0
    """Runs with different replicates share no sampled answers."""

    @property
    def key(self) -> str:
        """The logical key: 64 hexadecimal digits that depend on what is asked and on nothing else."""
        return digest(self.to_json() | {"v": KEY_VERSION})

    def to_json(self) -> dict[str, Json]:
        """The request as a JSON object; fields at their defaults are left out."""
        out: dict[str, Json] = {"kind": self.kind.value}
        if self.messages:
            out["messages"] = [[m.role, m.content] for m in self.messages]
            out["add_generation_prompt"] = self.add_generation_prompt
            if self.template_arguments != "{}":
                out["template_arguments"] = self.template_arguments
        else:
            out["text"] = self.text
        if self.continuation is not None:
            out["continuation"] = self.continuation
        if self.kind is Kind.GENERATE:
            out["arguments"] = self.arguments
        if self.sample_index:
            out["sample_index"] = self.sample_index
        if self.replicate:
            out["replicate"] = self.replicate
        return out

    @staticmethod
    def from_json(value: Mapping[str, Json]) -> Request:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        given = dict(value)
        given["kind"] = _KINDS[given["kind"]]
        if "messages" in given:
            given["messages"] = tuple([_message(role=r, content=c) for r, c in given["messages"]])
        return _request(**given)


_message: Final = quickly(Message)
_request: Final = quickly(Request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """Where a request stands in its task: binds an answer to a document, choice and repeat."""

    request: Request
    key: str
    doc_id: int
    index: int
    """The choice or sub-question within the document (lm-eval's `idx`)."""
    repeat: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One leaf task turned into requests. Immutable; the fingerprint covers everything below it."""

    fingerprint: str
    source: str
    """lm_eval or native."""
    source_version: str
    task: str
    task_version: str
    num_fewshot: int
    settings: str
    """Canonical JSON of what shaped the recording: shots, seeds, limit, template, overrides, dataset revision."""
    instances: tuple[Instance, ...]
    documents: str
    """JSON text that only the source reads: documents and whatever replay needs."""
    labels: tuple[str, ...] = ()
    """What replay needs beyond the answers: tokenizer, network, model, media. Found by `prepare`."""

    @staticmethod
    def compute_fingerprint(
        *, source: str, source_version: str, task: str, task_version: str, settings: str, keys: list[str]
    ) -> str:
        """The task fingerprint: source, versions, task, settings and the keys of its requests in order."""
        joined = hashlib.sha256("".join(keys).encode("ascii")).hexdigest()
        return digest([source, source_version, task, task_version, settings, joined])


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One entry of `tasks:` at one number of shots: the leaf tasks it stands for, marked together.

    Groups are marked by their source over all their leaves at once, so the suite, not the leaf, is what
    replay takes. `settings` is the source's own JSON object, enough to replay in another process.
    """

    id: str
    """Digest of the settings and the recordings' fingerprints: names the suite in the store."""
    source: str
    names: tuple[str, ...]
    num_fewshot: int | None
    recordings: tuple[str, ...]
    """Fingerprints, in the order of the leaves."""
    settings: str
    """Canonical JSON."""


METHODS: Final = ("", "echo", "cached-echo", "next-token", "forced")
"""How a server is asked; none for generations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What answered: recorded with every response, never part of a key."""

    engine: str
    """vllm, sglang, llama.cpp, openai, lm_eval:hf, fake, ..."""
    version: str
    dtype: str = "unknown"
    parallelism: str = "tp1"
    hardware: str = "unknown"
    method: str = ""
    """How log-likelihoods were measured: one of `METHODS`, or in-process."""
    details: str = "{}"
    """Canonical JSON of anything else worth knowing."""

    @property
    def id(self) -> str:
        """A short digest that rows refer to."""
        return digest(
            [self.engine, self.version, self.dtype, self.parallelism, self.hardware, self.method, self.details]
        )[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer. Text and token ids are raw: nothing stripped, nothing extracted."""

    key: str
    physical_key: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None
    """stop or length, as the engine reported it (GENERATE)."""
    logprob: float | None = None
    """Natural-log probability, summed over the scored tokens (LOGLIKELIHOOD, ROLLING)."""
    is_greedy: bool | None = None
    token_logprobs: tuple[float, ...] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    truncated_tokens: int = 0
    """Prompt tokens cut to fit the window, by the named policy."""
    seed: int | None = None
    seed_honoured: bool | None = None
    engine_id: str = ""
    latency_s: float = 0.0
    created: float = 0.0
    """Unix time of arrival, seconds."""


class Boundary(StrEnum):
    """Which boundary broke when a request has no answer."""

    RENDER = "render"
    """The chat template or tokenizer refused the request."""
    CONTEXT = "context_length"
    """The request does not fit the model's window under the named policy."""
    REFUSED = "refused"
    """The server understood the request and will never answer it (4xx)."""
    TRANSPORT = "transport"
    """Connection, time-out."""
    SERVER = "server"
    """5xx, overload, malformed answer."""
    ENGINE = "engine"
    """The in-process engine raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A request without an answer. Never an empty answer, never a zero score."""

    key: str
    boundary: Boundary
    message: str
    retryable: bool
    """Whether asking again later can help; what cannot be helped is not asked again by itself."""
    physical_key: str = ""
    attempts: int = 1
    created: float = 0.0


Answer = Response | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A slice of one model's owed requests: (task fingerprint, ordinal in its recording), in asking order."""

    id: str
    model: str
    items: tuple[tuple[str, int], ...]
    cost_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScore:
    """One document of one task, marked: what was asked, answered, extracted, and each metric's value."""

    task: str
    doc_id: int
    filter: str
    prompt: str
    target: str
    responses: tuple[str, ...]
    extracted: tuple[str, ...]
    metrics: tuple[tuple[str, float | None], ...]
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of what was asked stands behind a score."""

    requested: int
    answered: int
    failed: int = 0
    truncated: int = 0
    """Answers whose prompt was cut, or generations that stopped at the length limit."""
    unparsable: int = 0
    failures: tuple[tuple[str, int], ...] = ()
    """(boundary, count), sorted."""

    @property
    def complete(self) -> bool:
        """Every requested answer is there."""
        return self.answered == self.requested


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One metric of one task for one model: never without its n and its coverage."""

    model: str
    """Display name."""
    label: str
    """Checkpoint label, or `main`."""
    step: int | None
    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    low: float | None
    high: float | None
    """95 % interval; None where the source gives no standard error."""
    n: int
    """Documents scored."""
    n_expected: int
    num_fewshot: int | None
    higher_is_better: bool | None
    is_group: bool = False
    task_version: str = ""
    source: str = ""
    task_fingerprint: str = ""
    weights: str = ""
    profile: str = ""
    tokens_trained: int | None = None
    coverage: Coverage = field(default_factory=lambda: Coverage(requested=0, answered=0))
    engines: tuple[str, ...] = ()
