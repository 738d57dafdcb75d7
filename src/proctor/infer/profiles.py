"""Engine habits: what lm-eval 0.4.13's `hf`, `vllm` and `local-completions` classes do to a task's raw request.

Pure functions. The classes differ in when they add BOS, in the window and what they cut to fit it, in default
lengths, and in what the sampling arguments mean (`profiles_sampling`). The rules were read from that release;
a change of behaviour here raises the profile's version, which is part of the resolution digest.

Where a class would go on with nonsense (no room left for the prompt, a continuation longer than the window),
or stop the whole run with an assertion, the request becomes a `Failure` here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from proctor.config.spec import OpenAIEngine
from proctor.infer.engine import Passage, Sampling
from proctor.infer.latest import Latest
from proctor.records import Kind, canonical_json, digest

VERSIONS: Final[Mapping[str, int]] = {"hf": 1, "vllm": 1, "local-completions": 1}

DEFAULT_LENGTH: Final = 2048
"""The window where nothing names one, in all three classes."""

DEFAULT_GENERATION: Final = 256
"""Tokens to generate where the task names no number, in all three classes."""


class DoesNotFit(ValueError):
    """The request does not fit the window, even when its context is cut."""


class CannotEncode(ValueError):
    """The request has nothing to score or nothing to condition on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """One profile with a model's facts: all that decides how a request is resolved, but the ids themselves."""

    profile: str
    max_length: int
    max_gen_toks: int = DEFAULT_GENERATION
    add_bos_token: bool | None = None
    bos: str | None = None
    eos: str | None = None
    prefix_id: int | None = None
    """Stands in for an empty context and before a document: BOS, else EOS."""

    @property
    def prefix(self) -> str | None:
        """The text of `prefix_id`."""
        return self.bos if self.bos is not None else self.eos

    @property
    def scored_window(self) -> int:
        """The most tokens, context and continuation together, that a scored request keeps."""
        return self.max_length + 1 if self.profile == "hf" else self.max_length - 1

    @property
    def rolling_window(self) -> int:
        """The most tokens that one window of a document predicts."""
        return self.max_length if self.profile == "hf" else self.max_length - 2


def add_special(rules: Rules, text: str, *, kind: Kind, after_prefix: bool = False) -> bool:
    """Whether the tokenizer's own special tokens are added to `text`.

    `after_prefix`: the text is a continuation that follows the prefix token (an empty context).
    """
    if rules.profile == "local-completions":
        return bool(rules.add_bos_token)
    if after_prefix or (rules.profile == "vllm" and not text and kind is not Kind.GENERATE):
        # vllm's class encodes an empty text to nothing, whatever the tokenizer would add.
        return False
    # hf looks for BOS itself when it generates, and for the prefix token (BOS, else EOS) when it scores.
    start = rules.bos if rules.profile == "hf" and kind is Kind.GENERATE else rules.prefix
    if start is not None and text.startswith(start):
        return False
    return True if rules.add_bos_token is None else rules.add_bos_token


def texts_to_encode(rules: Rules, kind: Kind, text: str, continuation: str | None) -> tuple[tuple[str, bool], ...]:
    """What must be tokenised for one request, as (text, whether special tokens are added).

    LOGLIKELIHOOD: the whole and its context, or the continuation alone after an empty context. Else: the text.
    """
    if kind is not Kind.LOGLIKELIHOOD:
        return ((text, add_special(rules, text, kind=kind)),)
    continuation = continuation or ""
    if text == "":
        return ((continuation, add_special(rules, continuation, kind=kind, after_prefix=True)),)
    context, continuation = move_spaces(text, continuation)
    whole = context + continuation
    return (whole, add_special(rules, whole, kind=kind)), (context, add_special(rules, context, kind=kind))


def move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """White space that ends the context belongs to the continuation: words are tokenised with the space before."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def split_pair(rules: Rules, text: str, encoded: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """Context and continuation ids from the encodings of `texts_to_encode`.

    Raises CannotEncode if there is nothing to condition on, or (hf) nothing to score.
    """
    if text == "":
        scored = encoded[0]
        if not scored:
            raise CannotEncode("both the context and the continuation are empty")
        if rules.prefix_id is None:
            raise CannotEncode("an empty context needs a BOS or EOS token, and the tokenizer has neither")
        if scored[0] == rules.prefix_id:
            context, scored = scored[:1], scored[1:]
        else:
            context = [rules.prefix_id]
    else:
        whole, context = encoded
        scored = whole[len(context) :]
    if not context:
        raise CannotEncode("the context has no tokens to condition on")
    if not scored and rules.profile == "hf":
        raise CannotEncode("the continuation has no tokens of its own")
    return context, scored


def fit_scored(rules: Rules, context: list[int], scored: list[int]) -> tuple[Passage, int]:
    """Cut the context from the left to the profile's window; the passage and the number of tokens cut.

    Raises DoesNotFit if no token of the context would be left.
    """
    ids = context + scored
    cut = max(0, len(ids) - rules.scored_window)
    if cut >= len(context):
        raise DoesNotFit(
            f"the continuation alone has {len(scored)} tokens and the window takes {rules.scored_window - 1} of it"
        )
    return Passage(token_ids=tuple(ids[cut:]), scored=len(scored)), cut


def rolling_passages(rules: Rules, ids: list[int]) -> tuple[Passage, ...]:
    """A document as disjoint windows that each predict new tokens; none for an empty document.

    The first window starts from the prefix token; each later one is conditioned on as many tokens before it
    as fit (at least one). Raises CannotEncode without a prefix token, DoesNotFit for a window below 2 tokens.
    """
    if not ids:
        return ()
    if rules.prefix_id is None:
        raise CannotEncode("a document needs a BOS or EOS token to start from, and the tokenizer has neither")
    size = rules.rolling_window
    if size < 1:
        raise DoesNotFit(f"a window of {rules.max_length} tokens leaves no room to score a document")
    end = min(size, len(ids))
    passages = [Passage(token_ids=(rules.prefix_id, *ids[:end]), scored=end)]
    while end < len(ids):
        scored = min(len(ids) - end, size)
        end += scored
        passages.append(Passage(token_ids=tuple(ids[end - size - 1 : end]), scored=scored))
    return tuple(passages)


def fit_prompt(rules: Rules, ids: list[int], reserve: int) -> tuple[list[int], int]:
    """Cut a prompt from the left so that `reserve` tokens can follow; the prompt and the number of tokens cut.

    Raises DoesNotFit if that leaves no prompt.
    """
    window = rules.max_length - 1 if rules.profile == "local-completions" else rules.max_length
    room = window - reserve
    if room <= 0:
        raise DoesNotFit(
            f"{reserve} tokens to generate leave no room for a prompt in a window of {window}"
            "; raise `max_length` of the engine or lower the task's max_gen_toks"
        )
    cut = max(0, len(ids) - room)
    return ids[cut:], cut


def finish_text(profile: str, text: str, sampling: Sampling) -> str:
    """What the profile's class hands to the harness for the text a server returned.

    hf and vllm cut once more at the first stop; local-completions does not. Applied when the answer arrives, so
    a stored text needs nothing further but what the user asks for at replay: stripping a thinking section.
    """
    if profile == "local-completions":
        return text
    for stop in sampling.stop:
        text = text.split(stop)[0]
    return text


def window_length(spec: OpenAIEngine, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int:
    """The window in tokens: the engine's own `max_length`, else the profile's rule over the model's config.json."""
    if spec.max_length:
        return spec.max_length
    if spec.profile == "local-completions":
        return DEFAULT_LENGTH
    return own_window(config, tokenizer_config) or DEFAULT_LENGTH


def own_window(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int | None:
    """The model's own window in tokens, as its files say; None where they do not."""
    inner = config.get("text_config") or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if inner.get(name) is not None:
            return int(inner[name])
    length = tokenizer_config.get("model_max_length")
    # transformers writes 1e30 for "not known".
    return int(length) if length is not None and length < 10**15 else None


def resolution_digest(
    spec: OpenAIEngine,
    *,
    tokenizer: str,
    template: str,
    max_length: int,
    generation_config: Mapping[str, Any] | None = None,
) -> str:
    """Digest of all that turns logical requests into physical ones; needs no server.

    `tokenizer` and `template` are the digests of `infer.tokenizer`; where only the server tokenises, the weights'
    own identity stands for both. `generation_config` counts for hf alone, the class that obeys it.
    """
    return digest(
        {
            "profile": spec.profile,
            "version": VERSIONS[spec.profile],
            "tokenizer": tokenizer,
            "template": template,
            "max_length": max_length,
            "truncation": spec.truncation,
            "add_bos_token": spec.add_bos_token,
            "max_gen_toks": spec.max_gen_toks or DEFAULT_GENERATION,
            "extra_body": canonical_json(spec.extra_body),
            "seed": spec.seed,
            "generation_config": dict(generation_config or {}) if spec.profile == "hf" else {},
            "date": spec.template_date,
        }
    )


def sample_seed(run_seed: int, replicate: int, request_key: str, sample_index: int) -> int:
    """The seed of one sampled request: 31 bits, so that every server takes it."""
    text = f"{run_seed}:{replicate}:{request_key}:{sample_index}"
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:4], "big") >> 1


def passages_key(kind: Kind, passages: Sequence[Passage], extra_body: str = "{}") -> str:
    """The physical key of a scored request."""
    return _key([kind.value, [[p.scored, p.token_ids] for p in passages], extra_body])


def text_key(kind: Kind, text: str, context_length: int, identity: str, extra_body: str = "{}") -> str:
    """The physical key of a scored request that the server tokenises; `identity` says by which tokenizer."""
    return _key([kind.value, text, context_length, identity, extra_body])


_GENERATE: Final = Kind.GENERATE.value


def generation_key(prompt: object, sampling: Sampling, *, sample: tuple[int, int] | None) -> str:
    """The physical key of a generation: `prompt` is ids, or text with the identity of what tokenises it.

    `sample` is (replicate, sample index), and is given for sampled requests only: greedy repeats are one question.
    """
    return _key([_GENERATE, prompt, _sampling_json(sampling), sample])


def _sampling_text(sampling: Sampling) -> orjson.Fragment:
    fields = [
        sampling.max_tokens,
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.stop,
        sampling.stop_token_ids,
        sampling.min_tokens,
        sampling.seed,
        sampling.extra,
    ]
    return orjson.Fragment(orjson.dumps(fields))


_sampling_json: Final = Latest(_sampling_text)


def _key(value: object) -> str:
    return hashlib.sha256(orjson.dumps(value)).hexdigest()
