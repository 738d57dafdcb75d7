"""A task's raw generation arguments → every sampling field, by the habits of each lm-eval 0.4.13 model class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from proctor.infer.engine import Sampling
from proctor.records import canonical_json

LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the output length, the first that is given wins (`hf` and `vllm`)."""

HF_TOP_K: Final = 50
"""What `transformers` samples from unless told otherwise."""

_HF_INERT: Final = {
    "bos_token_id",
    "cache_implementation",
    "early_stopping",
    "eos_token_id",
    "length_penalty",
    "pad_token_id",
    "use_cache",
}
"""Arguments of `generate` that change nothing without beams, or only how it computes."""

_HF_NEUTRAL: Final[Mapping[str, Any]] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
}
"""Arguments that a server cannot follow: accepted at the value that does nothing, refused otherwise."""

_FIELDS: Final = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class CannotExpress(ValueError):
    """The raw arguments are malformed, or ask for what the profile cannot pass on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Resolved arguments. `context_room` is what the profile reserves for the output when it cuts the context."""

    sampling: Sampling
    reserve: int
    total_length: int | None = None
    """hf's `max_length` argument: prompt and output together, in tokens."""
    base_seed: int | None = None
    """A seed that the task itself asks for."""


def resolve_generation(
    profile: str, raw: Mapping[str, Any], *, default_length: int, eos: str | None, defaults: Mapping[str, Any]
) -> Generation:
    """Resolve one request's raw arguments. `defaults` is the model's generation_config.json, which only hf obeys.

    Raises CannotExpress.
    """
    try:
        if profile == "hf":
            return _hf(dict(raw), default_length, eos, defaults)
        if profile == "vllm":
            return _vllm(dict(raw), default_length, eos)
        return _local_completions(dict(raw), default_length, eos)
    except (TypeError, ValueError) as error:
        if isinstance(error, CannotExpress):
            raise
        raise CannotExpress(f"malformed generation arguments {canonical_json(raw)}: {error}") from error


def _stops(until: Any, eos: str | None) -> tuple[str, ...]:
    if until is None:
        stops: list[str] = []
    elif isinstance(until, list):
        stops = [str(s) for s in cast("list[Any]", until) if s is not None]
    elif isinstance(until, str):
        stops = [until]
    else:
        raise CannotExpress(f"`until` must be a text or a list of texts, not {until!r}")
    if eos is not None and eos not in stops:
        stops.append(eos)
    return tuple(stops)


def _length(raw: dict[str, Any], default: int) -> int:
    given = [raw.pop(name, None) for name in LENGTHS]
    return int(next((value for value in given if value is not None), default))


def _sampling(
    raw: dict[str, Any], *, temperature: float, max_tokens: int, stop: tuple[str, ...], extra: Mapping[str, Any]
) -> Sampling:
    """Take the known fields out of `raw`; at temperature 0, those that only shape sampling become neutral."""
    values: dict[str, Any] = {name: raw.pop(name) for name in _FIELDS if raw.get(name) is not None}
    for name in _FIELDS:
        raw.pop(name, None)
    if temperature == 0.0:
        for name in ("top_p", "top_k", "min_p"):
            values.pop(name, None)
    numbers = {name: int(v) if name == "top_k" else float(v) for name, v in values.items()}
    numbers["top_k"] = max(0, int(numbers.get("top_k", 0)))
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        stop=tuple(s for s in stop if s),
        min_tokens=int(raw.pop("min_tokens", None) or 0),
        stop_token_ids=tuple(int(t) for t in raw.pop("stop_token_ids", None) or ()),
        extra=canonical_json(dict(extra) | raw),
        **numbers,  # type: ignore[arg-type]
    )


def _hf(raw: dict[str, Any], default: int, eos: str | None, defaults: Mapping[str, Any]) -> Generation:
    max_tokens = _length(raw, default)
    stop = _stops(raw.pop("until", []), eos)
    temperature = float(raw.pop("temperature", 0.0))
    do_sample = raw.pop("do_sample", None)
    if do_sample is None:
        do_sample = temperature > 0.0
    if do_sample and temperature <= 0.0:
        raise CannotExpress("do_sample: true needs a temperature above 0: transformers refuses to sample at 0")
    total = raw.pop("max_length", None)
    for name, neutral in _HF_NEUTRAL.items():
        value = raw.pop(name, None)
        value = defaults.get(name) if value is None else value
        if value is not None and value != neutral:
            raise CannotExpress(
                f"`{name}: {value}` cannot be asked of a server; use engine {{type: lm_eval, model: hf}}"
            )
    for name in _HF_INERT:
        raw.pop(name, None)
    if raw.get("min_new_tokens") is not None:
        raw["min_tokens"] = raw.pop("min_new_tokens")
    for name in ("repetition_penalty", "top_p", "top_k", "min_p"):
        if raw.get(name) is None and defaults.get(name) is not None:
            raw[name] = defaults[name]
    if raw.get("top_k") is None:
        raw["top_k"] = HF_TOP_K
    sampling = _sampling(raw, temperature=temperature if do_sample else 0.0, max_tokens=max_tokens, stop=stop, extra={})
    if sampling.extra != "{}":
        names = ", ".join(json.loads(sampling.extra))
        raise CannotExpress(f"generation arguments without a counterpart over HTTP: {names}")
    return Generation(sampling=sampling, reserve=max_tokens, total_length=None if total is None else int(total))


def _vllm(raw: dict[str, Any], default: int, eos: str | None) -> Generation:
    max_tokens = _length(raw, default)
    stop = _stops(raw.pop("until", []), eos)
    # The class leaves an absent temperature to SamplingParams, whose own default is 1: it then samples.
    temperature = float(raw.pop("temperature", 0.0 if raw.get("do_sample") is False else 1.0))
    if raw.pop("do_sample", None) is False:
        temperature = 0.0
    seed = raw.pop("seed", None)
    extra = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    sampling = _sampling(raw, temperature=temperature, max_tokens=max_tokens, stop=stop, extra=extra)
    return Generation(sampling=sampling, reserve=max_tokens, base_seed=None if seed is None else int(seed))


def _local_completions(raw: dict[str, Any], default: int, eos: str | None) -> Generation:
    raw.pop("do_sample", None)
    # The room reserved in the window knows only max_gen_toks; the length sent prefers max_tokens.
    reserve = int(raw.get("max_gen_toks", default))
    max_tokens = int(raw.pop("max_tokens")) if "max_tokens" in raw else reserve
    if max_tokens == reserve:
        raw.pop("max_gen_toks", None)
    temperature = float(raw.pop("temperature", 0))
    stop = _stops(raw.pop("until", None), eos)
    seed = raw.pop("seed", None)
    sampling = _sampling(raw, temperature=temperature, max_tokens=max_tokens, stop=stop, extra={})
    return Generation(sampling=sampling, reserve=reserve, base_seed=None if seed is None else int(seed))
