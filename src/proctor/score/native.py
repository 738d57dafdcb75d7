"""Marks native tasks: implements `score.Replay` for what `catalog.native` recorded."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from proctor.config.native_task import ExtractStep, MetricSpec
from proctor.errors import HarnessError
from proctor.records import (
    Answer,
    Coverage,
    Failure,
    Instance,
    Recording,
    Request,
    Response,
    SampleScore,
    Suite,
)
from proctor.score import metrics
from proctor.score.metrics import Figure
from proctor.score.replay import Marks, MetricValue

FIRST: Final = "none"
"""The filter that scores each document's first answer; named as lm-evaluation-harness names no filter."""

Compare = Callable[[str, Sequence[str]], float]
"""Marks an extracted answer against its references."""


class NativeReplay:
    """Marks native suites. Pure: no model, no network, no files."""

    def mark(
        self,
        suite: Suite,
        recordings: Sequence[Recording],
        answers: Mapping[str, Answer],
        *,
        known: Mapping[str, Marks] | None = None,
    ) -> Marks:
        """Every metric of every leaf.

        A document that lacks one of its answers is left out and shows in the coverage. An answer from which
        the extraction finds nothing is wrong, and counted as unparsable. With repeats, the filter `none`
        scores the first answer and `mean@k` the mean over all k. Raises HarnessError if a recording is
        missing or is not one of ours.

        `known`: marks of single recordings (`mark_one`) by fingerprint; neither they nor their answers are needed.
        """
        by_fingerprint = {r.fingerprint: r for r in recordings}
        leaves: list[Marks] = []
        for fingerprint in suite.recordings:
            marks = None if known is None else known.get(fingerprint)
            if marks is None:
                recording = by_fingerprint.get(fingerprint)
                if recording is None:
                    raise HarnessError(f"suite {suite.id[:12]}: the recording {fingerprint[:12]} is not there")
                marks = self.mark_one(recording, answers)
            leaves.append(marks)
        return Marks(
            values=tuple(value for leaf in leaves for value in leaf.values),
            samples=tuple(sample for leaf in leaves for sample in leaf.samples),
        )

    def mark_one(self, recording: Recording, answers: Mapping[str, Answer]) -> Marks:
        """One recording's part of `mark`."""
        leaf = _Leaf.read(recording)
        marked = leaf.marked(answers)
        samples = tuple(sample for document in marked for sample in document.samples)
        return Marks(values=tuple(leaf.values(marked, answers)), samples=samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Marked:
    """One document, marked."""

    samples: tuple[SampleScore, ...]
    scores: Mapping[tuple[str, str], float]
    """Value by (filter, metric)."""
    logprob: float = 0.0
    words: int = 0
    size: int = 0
    """Bytes."""
    unparsable: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leaf:
    """A recording with its marking read."""

    recording: Recording
    output: str
    specs: tuple[MetricSpec, ...]
    compares: tuple[tuple[str, Compare], ...]
    """Of generations: each metric as it is shown, and how it marks."""
    extract: tuple[ExtractStep, ...]
    repeats: int
    expects_stop: bool
    documents: Mapping[int, Mapping[str, Any]]
    instances: Mapping[int, tuple[Instance, ...]]

    @classmethod
    def read(cls, recording: Recording) -> _Leaf:
        try:
            stored = json.loads(recording.documents)
            marking = stored["marking"]
            documents = {int(d["id"]): d for d in stored["documents"]}
            grouped: defaultdict[int, list[Instance]] = defaultdict(list)
            for instance in recording.instances:
                grouped[instance.doc_id].append(instance)
            if recording.source != "native" or grouped.keys() != documents.keys():
                raise ValueError("instances and documents do not agree")
            specs = tuple(MetricSpec.model_validate(m) for m in marking["metrics"])
            return cls(
                recording=recording,
                output=marking["output"],
                specs=specs,
                compares=tuple((s.shown, _comparison(s)) for s in specs),
                extract=tuple(ExtractStep.model_validate(s) for s in marking["extract"]),
                repeats=int(marking["repeats"]),
                expects_stop=bool(marking["expects_stop"]),
                documents=documents,
                instances={k: tuple(v) for k, v in grouped.items()},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise HarnessError(
                f"the recording {recording.fingerprint[:12]} of {recording.task!r} is no native recording: {error}",
                hint="record the task again: `proctor plan` does",
            ) from error

    def marked(self, answers: Mapping[str, Answer]) -> list[_Marked]:
        """Each document all of whose answers are there."""
        out: list[_Marked] = []
        for doc_id, document in self.documents.items():
            instances = self.instances[doc_id]
            found = [answers.get(i.key) for i in instances]
            responses = [a for a in found if isinstance(a, Response)]
            if len(responses) == len(instances):
                out.append(self._mark(document, instances, responses))
        return out

    def values(self, marked: Sequence[_Marked], answers: Mapping[str, Answer]) -> list[MetricValue]:
        """The task's figures."""
        coverage = self._coverage(marked, answers)
        return [
            self._value(spec, name, marked, coverage)
            for name in (FIRST, *([self._mean_filter] if self.repeats > 1 else []))
            for spec in self.specs
        ]

    @property
    def _mean_filter(self) -> str:
        return f"mean@{self.repeats}"

    def _value(self, spec: MetricSpec, name: str, marked: Sequence[_Marked], coverage: Coverage) -> MetricValue:
        figure = self._figure(spec, name, marked)
        return MetricValue(
            task=self.recording.task,
            metric=spec.shown,
            filter=name,
            value=figure.value,
            stderr=figure.stderr,
            n=len(marked),
            n_expected=len(self.documents),
            higher_is_better=metrics.HIGHER_IS_BETTER[spec.metric],
            num_fewshot=self.recording.num_fewshot,
            task_version=self.recording.task_version,
            fingerprint=self.recording.fingerprint,
            coverage=coverage,
        )

    def _figure(self, spec: MetricSpec, name: str, marked: Sequence[_Marked]) -> Figure:
        logprobs = [m.logprob for m in marked]
        if spec.metric == "word_perplexity":
            return metrics.perplexity_figure(logprobs, [m.words for m in marked])
        if spec.metric == "byte_perplexity":
            return metrics.perplexity_figure(logprobs, [m.size for m in marked])
        if spec.metric == "bits_per_byte":
            return metrics.bits_figure(logprobs, [m.size for m in marked])
        return metrics.mean_figure([m.scores[name, spec.shown] for m in marked])

    def _coverage(self, marked: Sequence[_Marked], answers: Mapping[str, Answer]) -> Coverage:
        found = [answers.get(i.key) for i in self.recording.instances]
        failures = Counter(a.boundary.value for a in found if isinstance(a, Failure))
        return Coverage(
            requested=len(found),
            answered=sum(isinstance(a, Response) for a in found),
            failed=failures.total(),
            truncated=sum(isinstance(a, Response) and self._truncated(a) for a in found),
            unparsable=sum(m.unparsable for m in marked),
            failures=tuple(sorted(failures.items())),
        )

    def _truncated(self, response: Response) -> bool:
        return response.truncated_tokens > 0 or (self.expects_stop and response.finish_reason == "length")

    def _mark(
        self, document: Mapping[str, Any], instances: Sequence[Instance], responses: Sequence[Response]
    ) -> _Marked:
        if self.output == "multiple_choice":
            return self._mark_choice(document, instances, responses)
        if self.output == "generate":
            return self._mark_generated(document, instances, responses)
        return self._mark_passage(document, instances[0], responses[0])

    def _mark_choice(
        self, document: Mapping[str, Any], instances: Sequence[Instance], responses: Sequence[Response]
    ) -> _Marked:
        choices: list[str] = document["choices"]
        logprobs = [_logprob(r) for r in responses]
        picks = {
            "accuracy": metrics.choose(logprobs),
            "normalised_accuracy": metrics.choose_normalised(logprobs, choices),
        }
        scores = {spec.shown: float(picks[spec.metric] in document["gold"]) for spec in self.specs}
        sample = self._sample(
            document,
            instances,
            target=choices[int(document["gold"][0])],
            responses=[repr(value) for value in logprobs],
            extracted=[choices[picks[self.specs[0].metric]]],
            scores=scores,
        )
        return _Marked(samples=(sample,), scores={(FIRST, k): v for k, v in scores.items()})

    def _mark_generated(
        self, document: Mapping[str, Any], instances: Sequence[Instance], responses: Sequence[Response]
    ) -> _Marked:
        references: list[str] = document["references"]
        texts = [_text(r) for r in responses]
        extracted = [extract(text, self.extract) for text in texts]
        each = [
            {shown: 0.0 if answer is None else compare(answer, references) for shown, compare in self.compares}
            for answer in extracted
        ]
        shown = [answer or "" for answer in extracted]
        target = references[0] if len(references) == 1 else json.dumps(references, ensure_ascii=False)
        by_filter = {FIRST: each[0]}
        if self.repeats > 1:
            by_filter[self._mean_filter] = {
                s.shown: sum(scores[s.shown] for scores in each) / len(each) for s in self.specs
            }
        samples = tuple(
            self._sample(
                document,
                instances,
                target=target,
                responses=texts,
                extracted=shown[:1] if name == FIRST else shown,
                scores=scores,
                filter_name=name,
            )
            for name, scores in by_filter.items()
        )
        return _Marked(
            samples=samples,
            scores={(name, k): v for name, scores in by_filter.items() for k, v in scores.items()},
            unparsable=sum(answer is None for answer in extracted),
        )

    def _mark_passage(self, document: Mapping[str, Any], instance: Instance, response: Response) -> _Marked:
        text = instance.request.text
        logprob = _logprob(response)
        words, size = metrics.count_words(text), metrics.count_bytes(text)
        own = {
            "word_perplexity": metrics.perplexity_figure([logprob], [words]).value,
            "byte_perplexity": metrics.perplexity_figure([logprob], [size]).value,
            "bits_per_byte": metrics.bits_figure([logprob], [size]).value,
        }
        sample = self._sample(
            document,
            [instance],
            target="",
            responses=[repr(logprob)],
            extracted=[],
            scores={spec.shown: own[spec.metric] for spec in self.specs},
        )
        return _Marked(samples=(sample,), scores={}, logprob=logprob, words=words, size=size)

    def _sample(
        self,
        document: Mapping[str, Any],
        instances: Sequence[Instance],
        *,
        target: str,
        responses: Sequence[str],
        extracted: Sequence[str],
        scores: Mapping[str, float | None],
        filter_name: str = FIRST,
    ) -> SampleScore:
        return SampleScore(
            task=self.recording.task,
            doc_id=int(document["id"]),
            filter=filter_name,
            prompt=shown_prompt(instances[0].request),
            target=target,
            responses=tuple(responses),
            extracted=tuple(extracted),
            metrics=tuple(scores.items()),
            keys=tuple(i.key for i in instances),
        )


def extract(text: str, steps: Sequence[ExtractStep]) -> str | None:
    """Take the answer out of a raw text, step by step; None where a `regex` step finds nothing."""
    for step in steps:
        if step.regex is not None:
            found = _found(text, step)
            if found is None:
                return None
            text = found
        elif step.remove is not None:
            text = re.sub(step.remove, "", text)
        elif step.do == "first_line":
            text = text.strip("\r\n").partition("\n")[0].rstrip("\r")
        else:
            text = {"strip": text.strip, "lower": text.lower, "upper": text.upper}[step.do or "strip"]()
    return text


def shown_prompt(request: Request) -> str:
    """The prompt as people read it; a chat as its turns, since only a worker renders templates."""
    if request.messages:
        return "\n".join(f"<{m.role}> {m.content}" for m in request.messages)
    return request.text


def _found(text: str, step: ExtractStep) -> str | None:
    pattern = re.compile(step.regex or "")
    group = step.group if step.group is not None else min(1, pattern.groups)
    # A group of an alternative that did not take part is None: that match holds no answer.
    found = [m.group(group) for m in pattern.finditer(text) if m.group(group) is not None]
    if not found:
        return None
    return found[0] if step.which == "first" else found[-1]


def _comparison(spec: MetricSpec) -> Compare:
    """How one metric marks an answer against its references."""
    if spec.metric == "regex":
        return lambda answer, references: metrics.regex_found(
            answer, [spec.pattern] if spec.pattern is not None else references
        )
    if spec.metric == "f1":
        return metrics.token_f1
    ignoring = metrics.Ignoring(
        case=spec.ignore_case, punctuation=spec.ignore_punctuation, whitespace=spec.ignore_whitespace
    )
    compare = metrics.contains if spec.metric == "contains" else metrics.exact_match
    return lambda answer, references: compare(answer, references, ignoring)


def _logprob(response: Response) -> float:
    if response.logprob is None:
        raise HarnessError(f"the answer to {response.key[:12]} has no log-probability; its request asks for one")
    return response.logprob


def _text(response: Response) -> str:
    if response.text is None:
        raise HarnessError(f"the answer to {response.key[:12]} has no text; its request asks for one")
    return response.text
