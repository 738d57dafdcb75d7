"""Marks of lm-eval's tasks, computed by lm-eval itself from the answers, without a model, a GPU or a network."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from proctor.errors import HarnessError
from proctor.processes.exchange import run_module
from proctor.records import (
    Answer,
    Coverage,
    Failure,
    Instance,
    Json,
    Kind,
    Recording,
    Response,
    SampleScore,
    Suite,
)
from proctor.score.replay import Marks, MetricValue

_CHILD: Final = "proctor.catalog.lm_eval.replay"
_ENVIRONMENT: Final = {
    "PYTHONHASHSEED": "0",
    "PYTHONSAFEPATH": "1",
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_OFFLINE: Final = dict.fromkeys(
    ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"
)
"""Hub libraries then fail at once, or read their cache, instead of waiting for a network."""
_UNPARSABLE: Final = "[invalid]"
"""What lm-eval's extraction filters put where they find nothing."""

Strip = Callable[[str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leaf:
    """One recording with the answers that there are."""

    recording: Recording
    groups: tuple[tuple[Instance, ...], ...]
    """Instances of lm-eval: each with its repeats."""
    complete: tuple[int, ...]
    """Documents all of whose requests are answered, in recorded order."""
    documents: int
    coverage: Coverage


class LmEvalReplay:
    """Marks suites of the lm_eval source. See `score.replay.Replay`."""

    def __init__(self, python: str | None = None, *, think_end_token: str | None = None) -> None:
        """`python`: interpreter that has lm-eval; None: the one that recorded.

        `think_end_token`: generated text up to and including its last occurrence is left out, as lm-eval's
        model classes do before they hand an answer over.
        """
        self._python = python
        self._think_end_token = think_end_token

    def mark(self, suite: Suite, recordings: Sequence[Recording], answers: Mapping[str, Answer]) -> Marks:
        """Compute the suite's metrics, groups and samples with lm-eval's code.

        `recordings` may be in any order and hold others too. Raises HarnessError if one is missing, if the
        task has changed since, or if lm-eval's code fails; MissingTool without lm-eval.
        """
        settings = json.loads(suite.settings)
        leaves = [_leaf(recording, answers) for recording in _in_order(suite, recordings)]
        strip = self._strip(settings)
        with tempfile.TemporaryDirectory(prefix="proctor-replay-") as name:
            directory = Path(name)
            job = _job(directory, settings, leaves, answers, strip)
            network = job["network"]
            python = self._python or settings["python"]
            result = run_module(python, _CHILD, directory, job, env=_ENVIRONMENT | ({} if network else _OFFLINE))
            raw = json.loads((directory / "raw.json").read_text(encoding="utf-8"))
            samples = _samples(directory / "samples.jsonl", leaves, answers)
        _check_version(result["version"], leaves)
        unparsable = Counter((s.task, s.filter) for s in samples if _UNPARSABLE in s.extracted)
        values = _values(suite, leaves, raw, result["empty"], unparsable)
        return Marks(values=tuple(values), samples=tuple(samples), raw=json.dumps(raw))

    def _strip(self, settings: Mapping[str, Json]) -> Strip:
        token = self._think_end_token or settings.get("think_end_token")
        if not token:
            return lambda text: text
        return lambda text: text.split(token)[-1].lstrip()


def _in_order(suite: Suite, recordings: Sequence[Recording]) -> list[Recording]:
    known = {recording.fingerprint: recording for recording in recordings}
    missing = [fingerprint for fingerprint in suite.recordings if fingerprint not in known]
    if missing:
        raise HarnessError(f"suite {', '.join(suite.names)} lacks recordings {', '.join(f[:12] for f in missing)}")
    return [known[fingerprint] for fingerprint in suite.recordings]


def _leaf(recording: Recording, answers: Mapping[str, Answer]) -> _Leaf:
    groups: list[list[Instance]] = []
    for instance in recording.instances:
        if instance.repeat == 0:
            groups.append([])
        groups[-1].append(instance)
    asked = dict.fromkeys(instance.doc_id for instance in recording.instances)
    owed = {i.doc_id for i in recording.instances if not _answers(i, answers.get(i.key))}
    return _Leaf(
        recording=recording,
        groups=tuple(tuple(group) for group in groups),
        complete=tuple(doc_id for doc_id in asked if doc_id not in owed),
        documents=len(asked),
        coverage=_coverage(recording, answers),
    )


def _answers(instance: Instance, answer: Answer | None) -> bool:
    """Whether `answer` is one to this kind of question."""
    if not isinstance(answer, Response):
        return False
    if instance.request.kind is Kind.GENERATE:
        return answer.text is not None
    return answer.logprob is not None and (instance.request.kind is Kind.ROLLING or answer.is_greedy is not None)


def _coverage(recording: Recording, answers: Mapping[str, Answer]) -> Coverage:
    given = [(instance, answers.get(instance.key)) for instance in recording.instances]
    failures = Counter(answer.boundary.value for _, answer in given if isinstance(answer, Failure))
    good = [answer for instance, answer in given if isinstance(answer, Response) and _answers(instance, answer)]
    return Coverage(
        requested=len(given),
        answered=len(good),
        failed=sum(failures.values()),
        truncated=sum(1 for answer in good if answer.truncated_tokens or answer.finish_reason == "length"),
        failures=tuple(sorted(failures.items())),
    )


def _job(
    directory: Path,
    settings: Mapping[str, Json],
    leaves: Sequence[_Leaf],
    answers: Mapping[str, Answer],
    strip: Strip,
) -> dict[str, Json]:
    described: list[Json] = []
    for number, leaf in enumerate(leaves):
        documents, instances = f"documents-{number}.json", f"instances-{number}.jsonl"
        (directory / documents).write_text(leaf.recording.documents, encoding="utf-8")
        with (directory / instances).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(leaf, answers, strip))
        described.append(
            {
                "task": leaf.recording.task,
                "config": json.loads(leaf.recording.settings)["config"],
                "documents": documents,
                "instances": instances,
                "ids": list(leaf.complete),
                "dataset": "dataset" in leaf.recording.labels,
            }
        )
    return {
        "settings": settings,
        "leaves": described,
        "network": any("network" in leaf.recording.labels for leaf in leaves),
    }


def _rows(leaf: _Leaf, answers: Mapping[str, Answer], strip: Strip) -> Iterator[list[Json]]:
    complete = set(leaf.complete)
    for group in leaf.groups:
        first = group[0]
        if first.doc_id in complete:
            given = [_plain(instance.request.kind, answers[instance.key], strip) for instance in group]
            yield [first.request.kind.value, first.doc_id, first.index, given]


def _plain(kind: Kind, answer: Answer, strip: Strip) -> Json:
    assert isinstance(answer, Response)
    if kind is Kind.GENERATE:
        return strip(answer.text or "")
    return [answer.logprob, answer.is_greedy] if kind is Kind.LOGLIKELIHOOD else answer.logprob


def _check_version(version: str, leaves: Sequence[_Leaf]) -> None:
    recorded = {leaf.recording.source_version for leaf in leaves}
    if recorded != {version}:
        raise HarnessError(f"recorded with lm-eval {', '.join(sorted(recorded))}, but {version} would mark it")


# --- what lm-eval said ------------------------------------------------------------------------------


def _samples(file: Path, leaves: Sequence[_Leaf], answers: Mapping[str, Answer]) -> list[SampleScore]:
    asked: dict[tuple[str, int], list[Instance]] = {}
    for leaf in leaves:
        for instance in leaf.recording.instances:
            asked.setdefault((leaf.recording.task, instance.doc_id), []).append(instance)
    with file.open(encoding="utf-8") as lines:
        return [_sample(row, asked[row["task"], row["doc_id"]], answers) for row in map(json.loads, lines)]


def _sample(row: Mapping[str, Any], instances: Sequence[Instance], answers: Mapping[str, Answer]) -> SampleScore:
    return SampleScore(
        task=row["task"],
        doc_id=row["doc_id"],
        filter=row["filter"],
        prompt=_prompt(instances[0]),
        target=_text(row["target"]),
        responses=tuple(_said(answers[instance.key]) for instance in instances),
        extracted=tuple(_text(value) for value in row["filtered_resps"]),
        metrics=tuple((name, _number(value)) for name, value in row["metrics"].items()),
        keys=tuple(instance.key for instance in instances),
    )


def _prompt(instance: Instance) -> str:
    request = instance.request
    if not request.messages:
        return request.text
    return "\n".join(f"[{message.role}] {message.content}" for message in request.messages)


def _said(answer: Answer) -> str:
    if not isinstance(answer, Response):
        return ""
    if answer.text is not None:
        return answer.text
    return json.dumps(answer.logprob if answer.is_greedy is None else [answer.logprob, answer.is_greedy])


def _text(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: Json) -> float | None:
    return float(value) if isinstance(value, bool | int | float) else None


def _values(
    suite: Suite,
    leaves: Sequence[_Leaf],
    raw: Mapping[str, Any],
    empty: Mapping[str, Sequence[tuple[str, str, bool | None]]],
    unparsable: Mapping[tuple[str, str], int],
) -> Iterator[MetricValue]:
    by_name = {leaf.recording.task: leaf for leaf in leaves}
    for name, leaf in by_name.items():
        for metric, filter_, better in empty.get(name, ()):
            yield _leaf_value(leaf, metric, filter_, 0, None, None, better, 0)
        for metric, filter_, value, stderr in _metrics(raw["results"].get(name, {})):
            better = raw["higher_is_better"].get(name, {}).get(metric)
            missed = unparsable.get((name, filter_), 0)
            yield _leaf_value(leaf, metric, filter_, len(leaf.complete), value, stderr, better, missed)
    yield from _group_values(suite, by_name, raw, set(empty))


def _leaf_value(
    leaf: _Leaf,
    metric: str,
    filter_: str,
    n: int,
    value: float | None,
    stderr: float | None,
    better: bool | None,
    unparsable: int,
) -> MetricValue:
    c = leaf.coverage
    return MetricValue(
        task=leaf.recording.task,
        metric=metric,
        filter=filter_,
        value=value,
        stderr=stderr,
        n=n,
        n_expected=leaf.documents,
        higher_is_better=better,
        num_fewshot=leaf.recording.num_fewshot,
        task_version=leaf.recording.task_version,
        fingerprint=leaf.recording.fingerprint,
        coverage=Coverage(
            requested=c.requested,
            answered=c.answered,
            failed=c.failed,
            truncated=c.truncated,
            unparsable=unparsable,
            failures=c.failures,
        ),
    )


def _group_values(
    suite: Suite, leaves: Mapping[str, _Leaf], raw: Mapping[str, Any], empty: set[str]
) -> Iterator[MetricValue]:
    groups: Mapping[str, Sequence[str]] = json.loads(suite.settings)["groups"]
    for name in groups:
        members = _below(name, groups)
        missing = tuple(member for member in members if member in empty)
        found = [leaves[member] for member in members]
        shots = raw["n-shot"].get(name)
        for metric, filter_, value, stderr in _metrics(raw["results"].get(name, {})):
            yield MetricValue(
                task=name,
                metric=metric,
                filter=filter_,
                value=None if missing else value,
                stderr=None if missing else stderr,
                n=sum(len(leaf.complete) for leaf in found),
                n_expected=sum(leaf.documents for leaf in found),
                higher_is_better=raw["higher_is_better"].get(name, {}).get(metric),
                is_group=True,
                num_fewshot=shots if isinstance(shots, int) else None,
                task_version=str(raw["versions"].get(name, "")),
                fingerprint=suite.id,
                coverage=_total([leaf.coverage for leaf in found]),
                missing_members=missing,
            )


def _below(group: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The leaf tasks of a group, each once."""
    found: dict[str, None] = {}
    for child in groups[group]:
        found.update(dict.fromkeys(_below(child, groups) if child in groups else [child]))
    return list(found)


def _total(parts: Sequence[Coverage]) -> Coverage:
    failures: Counter[str] = Counter()
    for part in parts:
        failures.update(dict(part.failures))
    return Coverage(
        requested=sum(part.requested for part in parts),
        answered=sum(part.answered for part in parts),
        failed=sum(part.failed for part in parts),
        truncated=sum(part.truncated for part in parts),
        failures=tuple(sorted(failures.items())),
    )


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, str, float | None, float | None]]:
    """(metric, filter, value, stderr) of one entry of lm-eval's results; "N/A" is None."""
    for key, value in results.items():
        metric, comma, filter_ = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filter_, _number(value), _number(results.get(f"{metric}_stderr,{filter_}"))
