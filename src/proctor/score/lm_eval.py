"""Marks of lm-eval's tasks, computed by lm-eval itself from the answers, without a model, a GPU or a network."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from proctor.errors import HarnessError, ProctorError, together
from proctor.interpreters import OFFLINE, PACKAGE
from proctor.processes.exchange import RunModule, error_of, run_module
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
    digest,
)
from proctor.score.replay import Marks, MetricValue

_CHILD: Final = "proctor.catalog.lm_eval"
_ENVIRONMENT: Final = {
    "PYTHONHASHSEED": "0",
    "PYTHONSAFEPATH": "1",
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_OFFLINE: Final = dict.fromkeys(OFFLINE, "1")
_UNPARSABLE: Final = "[invalid]"
"""What lm-eval's extraction filters put where they find nothing."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What lm-eval said of one suite, as it said it."""

    token: str
    """A digest of all that it was given: the suite, its recordings, the answers, our code beside it."""
    suite: str
    empty: Mapping[str, Sequence[tuple[str, str, bool | None]]]
    """Of tasks without a complete document: (metric, filter, higher is better)."""
    samples: str
    """A line of JSON for each document and filter."""
    raw: str
    """JSON text of its results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """One suite as lm-eval gets it."""

    suite: Suite
    leaves: tuple[_Leaf, ...]
    rows: tuple[str, ...]
    token: str

    @classmethod
    def of(cls, suite: Suite, leaves: Sequence[_Leaf], plain: Callable[[Instance], Json]) -> _Given:
        rows = tuple(_rows(leaf, plain) for leaf in leaves)
        parts = [
            [leaf.recording.fingerprint, list(leaf.recording.labels), list(leaf.complete), _hashed(text)]
            for leaf, text in zip(leaves, rows, strict=True)
        ]
        token = digest([_marking_code(), suite.id, suite.settings, parts])
        return cls(suite=suite, leaves=tuple(leaves), rows=rows, token=token)


def _hashed(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class LmEvalReplay:
    """Marks suites of the lm_eval source. See `score.replay.Replay`."""

    def __init__(
        self, python: str | None = None, *, think_end_token: str | None = None, run: RunModule = run_module
    ) -> None:
        """`python`: interpreter that has lm-eval; None: the one that recorded. `run`: how a job gets there.

        `think_end_token`: generated text up to and including its last occurrence is left out, as lm-eval's
        model classes do before they hand an answer over.
        """
        self._python = python
        self._think_end_token = think_end_token
        self._run = run

    def mark(self, suite: Suite, recordings: Sequence[Recording], answers: Mapping[str, Answer]) -> Marks:
        """Compute the suite's metrics, groups and samples with lm-eval's code.

        `recordings` may be in any order and hold others too. Raises HarnessError if one is missing, if the
        task has changed since, or if lm-eval's code fails; MissingTool without lm-eval.
        """
        marks = self.mark_all([suite], recordings, answers)[0]
        if isinstance(marks, ProctorError):
            raise marks
        return marks

    def mark_all(
        self,
        suites: Sequence[Suite],
        recordings: Sequence[Recording],
        answers: Mapping[str, Answer],
        *,
        known: MutableMapping[str, Said] | None = None,
    ) -> list[Marks | ProctorError]:
        """`mark` for several suites, started once for each interpreter and in parallel; errors stand in their place.

        `known`: what lm-eval said before, by token: a suite whose token is there is not given to it again, and what it
        says of the others is added.
        """
        marked: dict[str, Marks | ProctorError] = {}
        known = {} if known is None else known
        for python, ours in self._by_python(suites).items():
            plain = self._plain(answers)
            given = [
                _Given.of(suite, [_leaf(r, answers) for r in _in_order(suite, recordings)], plain) for suite in ours
            ]
            marked.update(self._ask(python, [one for one in given if one.token not in known], known))
            for one in given:
                if one.suite.id not in marked:
                    # Put last again: of what is known of a suite, the last is what counts.
                    said = known[one.token] = known.pop(one.token)
                    marked[one.suite.id] = _marks(said, one.suite, one.leaves, answers)
        return [marked[suite.id] for suite in suites]

    def _ask(
        self, python: str | None, given: Sequence[_Given], known: MutableMapping[str, Said]
    ) -> dict[str, ProctorError]:
        """Have lm-eval mark; what it says lands in `known`, its errors, by suite, are returned."""
        if not given:
            return {}
        failed: dict[str, ProctorError] = {}
        with tempfile.TemporaryDirectory(prefix="proctor-replay-") as name:
            directory = Path(name)
            job = _job(directory, given)
            env = _ENVIRONMENT | ({} if any(s["network"] for s in job["suites"]) else _OFFLINE)
            result = self._run(python, f"{_CHILD}.replay", directory, job, env=env, partly=_any_error)
            for n, one in enumerate(given):
                _check_version(result["version"], one.leaves)
                found = result["suites"][n]
                if "error" in found:
                    failed[one.suite.id] = error_of(found["error"])
                else:
                    known[one.token] = Said(
                        token=one.token,
                        suite=one.suite.id,
                        empty=found["empty"],
                        samples=(directory / f"{n}.samples.jsonl").read_text(encoding="utf-8"),
                        raw=(directory / f"{n}.raw.json").read_text(encoding="utf-8"),
                    )
        return failed

    def prove(self, suites: Sequence[Suite], recordings: Sequence[Recording]) -> list[Recording]:
        """The recordings, labelled with what marking them needs beyond answers; proven by marking made-up answers.

        Needs the tasks' data, and runs lm-eval's scoring on text that no model wrote. Labels: `dataset`, `model`,
        `tokenizer`, and `unproven` where lm-eval itself cannot mark made-up answers. Raises TaskError, naming all
        tasks that cannot be marked offline or would be marked differently.
        """
        labels: dict[str, set[str]] = {}
        refused: list[ProctorError] = []
        for python, ours in self._by_python(suites).items():
            leaves = [[_whole(r) for r in _in_order(suite, recordings)] for suite in ours]
            given = [_Given.of(s, of_it, lambda i: i.key) for s, of_it in zip(ours, leaves, strict=True)]
            with tempfile.TemporaryDirectory(prefix="proctor-prove-") as name:
                directory = Path(name)
                job = _job(directory, given)
                try:
                    result = self._run(
                        python, f"{_CHILD}.prove", directory, job, env=_ENVIRONMENT | _OFFLINE, partly=_any_error
                    )
                except ProctorError as error:
                    refused.append(error)
                    continue
            for found, suite in zip(result["suites"], leaves, strict=True):
                if "error" in found:
                    refused.append(error_of(found["error"]))
                    continue
                for leaf in suite:
                    given = found["labels"][leaf.recording.task]
                    labels.setdefault(leaf.recording.fingerprint, set()).update(given)
        if refused:
            raise together(refused)
        return [replace(r, labels=tuple(sorted(labels.get(r.fingerprint, r.labels)))) for r in recordings]

    def _by_python(self, suites: Sequence[Suite]) -> dict[str | None, list[Suite]]:
        found: dict[str | None, list[Suite]] = {}
        for suite in suites:
            found.setdefault(self._python or json.loads(suite.settings)["python"], []).append(suite)
        return found

    def _plain(self, answers: Mapping[str, Answer]) -> Callable[[Instance], Json]:
        token = self._think_end_token

        def plain(instance: Instance) -> Json:
            answer = answers[instance.key]
            assert isinstance(answer, Response)
            if instance.request.kind is Kind.GENERATE:
                text = answer.text or ""
                return text.split(token)[-1].lstrip() if token else text
            return [answer.logprob, answer.is_greedy] if instance.request.kind is Kind.LOGLIKELIHOOD else answer.logprob

        return plain


def _any_error(result: Any) -> bool:
    return any("error" in suite for suite in result["suites"])


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


def _whole(recording: Recording) -> _Leaf:
    """The leaf as if everything were answered."""
    leaf = _leaf(recording, {})
    return replace(leaf, complete=tuple(dict.fromkeys(i.doc_id for i in recording.instances)))


def _job(directory: Path, given: Sequence[_Given]) -> dict[str, Any]:
    written: dict[str, dict[str, Json]] = {}
    for one in given:
        for leaf, rows in zip(one.leaves, one.rows, strict=True):
            if leaf.recording.fingerprint not in written:
                written[leaf.recording.fingerprint] = _described(directory, len(written), leaf, rows)
    return {
        "workers": len(os.sched_getaffinity(0)),
        "suites": [
            {
                "settings": json.loads(one.suite.settings),
                "leaves": [written[leaf.recording.fingerprint] for leaf in one.leaves],
                "network": any("network" in leaf.recording.labels for leaf in one.leaves),
            }
            for one in given
        ],
    }


def _described(directory: Path, number: int, leaf: _Leaf, rows: str) -> dict[str, Json]:
    documents, instances = f"documents-{number}.json", f"instances-{number}.jsonl"
    (directory / documents).write_text(leaf.recording.documents, encoding="utf-8")
    (directory / instances).write_text(rows, encoding="utf-8")
    return {
        "task": leaf.recording.task,
        "config": json.loads(leaf.recording.settings)["config"],
        "documents": documents,
        "instances": instances,
        "ids": list(leaf.complete),
        "dataset": "dataset" in leaf.recording.labels,
    }


def _rows(leaf: _Leaf, plain: Callable[[Instance], Json]) -> str:
    """The answered instances as lm-eval's side reads them, a line each."""
    complete = set(leaf.complete)
    lines: list[str] = []
    for group in leaf.groups:
        first = group[0]
        if first.doc_id in complete:
            row = [first.request.kind.value, first.doc_id, first.index, [plain(instance) for instance in group]]
            lines.append(json.dumps(row) + "\n")
    return "".join(lines)


@cache
def _marking_code() -> str:
    """A digest of what of ours runs on lm-eval's side."""
    files = sorted((PACKAGE / "catalog" / "lm_eval").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _check_version(version: str, leaves: Sequence[_Leaf]) -> None:
    recorded = {leaf.recording.source_version for leaf in leaves}
    if recorded != {version}:
        raise HarnessError(f"recorded with lm-eval {', '.join(sorted(recorded))}, but {version} would mark it")


# --- what lm-eval said ------------------------------------------------------------------------------


def _marks(said: Said, suite: Suite, leaves: Sequence[_Leaf], answers: Mapping[str, Answer]) -> Marks:
    raw = json.loads(said.raw)
    samples = _samples(said.samples, leaves, answers)
    unparsable = Counter((s.task, s.filter) for s in samples if _UNPARSABLE in s.extracted)
    return Marks(
        values=tuple(_values(suite, leaves, raw, said.empty, unparsable)), samples=tuple(samples), raw=json.dumps(raw)
    )


def _samples(lines: str, leaves: Sequence[_Leaf], answers: Mapping[str, Answer]) -> list[SampleScore]:
    asked: dict[tuple[str, int], list[Instance]] = {}
    for leaf in leaves:
        for instance in leaf.recording.instances:
            asked.setdefault((leaf.recording.task, instance.doc_id), []).append(instance)
    # Not splitlines(): a text may hold U+2028 and its kin as they are.
    rows = (json.loads(line) for line in lines.split("\n") if line)
    return [_sample(row, asked[row["task"], row["doc_id"]], answers) for row in rows]


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
