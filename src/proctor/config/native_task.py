"""The shape of a native task file: strict, frozen. `load_task_file` turns a file into a `NativeTask`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from proctor.config.complaints import explain, text_places
from proctor.config.document import Node, read
from proctor.config.spec import Strict
from proctor.errors import ConfigError, TaskError

Output = Literal["multiple_choice", "generate", "perplexity"]
MetricName = Literal[
    "accuracy",
    "normalised_accuracy",
    "exact_match",
    "f1",
    "contains",
    "regex",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
]

METRICS: Final[dict[str, tuple[str, ...]]] = {
    "multiple_choice": ("accuracy", "normalised_accuracy"),
    "generate": ("exact_match", "f1", "contains", "regex"),
    "perplexity": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
"""The metrics that each output can have."""

DEFAULT_METRICS: Final[dict[str, tuple[str, ...]]] = METRICS | {"generate": ("exact_match",)}

_SHORT: Final = {"extract": "do", "metrics": "metric"}
"""A plain name in these lists stands for {KEY: NAME}."""
_IGNORING: Final = ("exact_match", "contains")
_FIELDS: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    "multiple_choice": (
        frozenset({"prompt", "choices", "target"}),
        frozenset({"delimiter", "fewshot", "instruction", "target_is"}),
    ),
    "generate": (
        frozenset({"prompt"}),
        frozenset({"target", "delimiter", "fewshot", "instruction", "generation", "repeats", "extract"}),
    ),
    "perplexity": (frozenset({"text"}), frozenset()),
}
"""Required and optional keys of each output, beyond those that all outputs have."""

_COMMON: Final = frozenset({"task", "version", "description", "dataset", "output", "metrics"})


class DatasetSpec(Strict):
    """Where the documents are: a local file, or a data set of the Hugging Face hub."""

    path: str | None = None
    """.jsonl, .json, .csv, .tsv or .parquet, relative to the task file."""
    hub: str | None = None
    name: str | None = None
    """Subset (configuration) of the hub data set."""
    split: str | None = None
    """Split of the hub data set; default test."""
    revision: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> DatasetSpec:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (a local file) or `hub` (a data set of the hub)")
        if self.path is not None and (self.name or self.split or self.revision):
            raise ValueError("`name`, `split` and `revision` belong to `hub`, not to `path`")
        return self


class FewshotSpec(Strict):
    """Where worked examples come from; with neither path nor split, from the data set itself."""

    path: str | None = None
    split: str | None = None
    """Another split of the same hub data set."""
    num: int = Field(default=0, ge=0)
    """Where the run does not say."""
    seed: int | None = None
    """None: the run's fewshot_seed."""
    separator: str = "\n\n"

    @model_validator(mode="after")
    def _one_place(self) -> FewshotSpec:
        if self.path is not None and self.split is not None:
            raise ValueError("give `path` or `split`, not both")
        return self


class GenerationSpec(Strict):
    """Raw generation arguments, under lm-evaluation-harness's names; a profile resolves them."""

    until: tuple[str, ...] | None = None
    """None: stop at the few-shot separator. An empty list: only at the length limit or end of text."""
    max_gen_toks: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    do_sample: bool = False
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @field_validator("until", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class ExtractStep(Strict):
    """One step from the raw answer to what is compared. Exactly one of `regex`, `remove` and `do`."""

    regex: str | None = None
    """Keep what matches; no match means that the answer is unparsable."""
    group: int | None = Field(default=None, ge=0)
    """None: group 1 if the pattern has groups, else the whole match."""
    which: Literal["first", "last"] = "first"
    remove: str | None = None
    """A pattern; every match is deleted."""
    do: Literal["strip", "lower", "upper", "first_line"] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> ExtractStep:
        if sum(x is not None for x in (self.regex, self.remove, self.do)) != 1:
            raise ValueError("a step is one of: strip, lower, upper, first_line, {regex: ...}, {remove: ...}")
        if self.group is not None and self.regex is None:
            raise ValueError("`group` belongs to `regex`")
        pattern = _compiled(self.regex if self.regex is not None else self.remove)
        if pattern is not None and (self.group or 0) > pattern.groups:
            raise ValueError(f"the pattern has {pattern.groups} group(s), not {self.group}")
        return self


class MetricSpec(Strict):
    """One metric and its options."""

    metric: MetricName
    name: str | None = None
    """What to call it in tables; needed where one metric occurs twice."""
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_whitespace: bool = False
    pattern: str | None = None
    """regex: what to search for; None: each reference is a pattern."""

    @property
    def shown(self) -> str:
        """The name in tables."""
        return self.name or self.metric

    @model_validator(mode="after")
    def _options_fit(self) -> MetricSpec:
        ignoring = self.ignore_case or self.ignore_punctuation or self.ignore_whitespace
        if ignoring and self.metric not in _IGNORING:
            raise ValueError(f"{self.metric} has no ignore_ options; those have: {', '.join(_IGNORING)}")
        if self.pattern is not None and self.metric != "regex":
            raise ValueError("`pattern` belongs to the metric regex")
        _compiled(self.pattern)
        return self


class NativeTask(Strict):
    """A task: documents, how each becomes a prompt, and how the answers are marked."""

    task: str = Field(min_length=1)
    version: str = "1"
    description: str = ""
    """For people: shown in lists, never sent to a model. See `instruction`."""
    dataset: DatasetSpec
    output: Output
    instruction: str = ""
    """Template of what precedes everything (or is the system message, in a chat)."""
    prompt: str = ""
    choices: tuple[str, ...] = ()
    """Templates, or one expression that yields a list."""
    target: str | None = None
    target_is: Literal["auto", "index", "text"] = "auto"
    text: str = ""
    """perplexity: template of the passage."""
    delimiter: str = " "
    """Between prompt and choice, and between a worked example's prompt and answer."""
    fewshot: FewshotSpec = FewshotSpec()
    generation: GenerationSpec = GenerationSpec()
    repeats: int = Field(default=1, ge=1)
    extract: tuple[ExtractStep, ...] = ()
    metrics: tuple[MetricSpec, ...] = ()
    """Empty: the output's usual ones."""

    @field_validator("choices", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("extract", "metrics", mode="before")
    @classmethod
    def _named(cls, value: Any, info: Any) -> Any:
        key = _SHORT[info.field_name]
        if not isinstance(value, list | tuple):
            return value
        return tuple({key: v} if isinstance(v, str) else v for v in cast("list[Any]", value))

    @model_validator(mode="after")
    def _fits_output(self) -> NativeTask:
        required, optional = _FIELDS[self.output]
        for key in sorted(required):
            if not getattr(self, key):
                raise ValueError(f"output: {self.output} needs the key `{key}`")
        extra = self.model_fields_set - required - optional - _COMMON
        if extra:
            raise ValueError(
                f"output: {self.output} does not use {_listed(extra)}; it uses {_listed(required | optional)}"
            )
        if self.output == "generate" and self.target is None and not _needs_no_target(self.marking):
            raise ValueError("output: generate needs the key `target` (only a regex with a `pattern` does not)")
        return self

    @model_validator(mode="after")
    def _metrics_fit(self) -> NativeTask:
        seen: set[str] = set()
        for metric in self.metrics:
            if metric.metric not in METRICS[self.output]:
                raise ValueError(
                    f"the metric {metric.metric} does not go with output: {self.output}; "
                    f"those that do: {', '.join(METRICS[self.output])}"
                )
            if metric.shown in seen:
                raise ValueError(f"two metrics are called {metric.shown!r}; give one a `name`")
            seen.add(metric.shown)
        return self

    @property
    def marking(self) -> tuple[MetricSpec, ...]:
        """The metrics, with the output's usual ones filled in."""
        return self.metrics or tuple(
            MetricSpec.model_validate({"metric": name}) for name in DEFAULT_METRICS[self.output]
        )


def load_task_file(path: Path) -> NativeTask:
    """Read and check one task file. Raises TaskError with file, line, key and the valid keys."""
    try:
        root = read(path)
    except ConfigError as error:
        raise TaskError(
            error.message,
            hint="`proctor tasks` lists the packaged tasks (demo:...); any other is named by the path of its file",
        ) from error
    if root.keys is None:
        found = "a list" if root.items is not None else "empty" if root.scalar is None else repr(root.text[:40])
        raise TaskError(f"{root.origin}: a task file is a mapping with task, dataset and output; this one is {found}")
    return _validated(_spelt_out(root), str(path))


def _spelt_out(root: Node) -> Node:
    """Names in `extract` and `metrics` as mappings, so that a message finds their line."""
    for key, short in _SHORT.items():
        node = root.child(key)
        for i, item in enumerate(node.items or ()) if node is not None else ():
            if isinstance(item.scalar, str):
                root = root.put((key, i), Node(origin=item.origin, keys={short: item}))
    return root


def _validated(root: Node, shown: str) -> NativeTask:
    try:
        return NativeTask.model_validate(root.plain())
    except ValidationError as error:
        as_written = text_places(error, root)
        for loc, node in as_written:
            root = root.put(loc, replace(node, scalar=node.text))
        if as_written:
            return _validated(root, shown)
        lines = explain(error, root, NativeTask)
        text = f"{shown}: {len(lines)} problems\n  " + "\n  ".join(lines) if len(lines) > 1 else lines[0]
        raise TaskError(text) from None


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def _needs_no_target(metrics: tuple[MetricSpec, ...]) -> bool:
    return all(m.metric == "regex" and m.pattern is not None for m in metrics)


def _listed(keys: frozenset[str] | set[str]) -> str:
    return ", ".join(f"`{k}`" for k in sorted(keys))
