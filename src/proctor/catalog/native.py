"""Native task files as a task source: a file and its data set in, recordings out."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from proctor.catalog.inputs import Inputs, code_digest, file_input, untouched
from proctor.catalog.native_prompts import FieldTemplate
from proctor.catalog.native_rows import Rows, read_rows
from proctor.catalog.source import Made, TaskInfo
from proctor.config.native_task import DatasetSpec, NativeTask, load_task_file
from proctor.config.spec import Limit, NativeTaskRef, TaskSpec
from proctor.errors import ProctorError, TaskError, UnknownName, UsageError, together
from proctor.interpreters import PACKAGE
from proctor.records import Instance, Json, Kind, Message, Recording, Request, Suite, canonical_json, digest

SOURCE: Final = "native"
SOURCE_VERSION: Final = "1"
"""Raised when the same task file would be turned into other requests, or marked otherwise."""

DEMO_PREFIX: Final = "demo:"
_DEMO: Final = Path(__file__).resolve().parent / "demo"
T = TypeVar("T")
R = TypeVar("R")


class NativeSource:
    """Records task files. Implements `catalog.TaskSource`; `score.native` marks what it recorded."""

    def list(self, *, include: Sequence[str] = ()) -> Sequence[TaskInfo]:
        """The packaged tasks (demo:NAME) and every task file below the directories `include`."""
        found = [
            TaskInfo(name=DEMO_PREFIX + p.stem, source=SOURCE, kind="task", path=str(p))
            for p in sorted(_DEMO.glob("*.yaml"))
        ]
        for directory in include:
            for path in sorted(Path(directory).rglob("*.y*ml")):
                if _looks_like_task(path):
                    found.append(TaskInfo(name=str(path), source=SOURCE, kind="file", path=str(path)))
        return found

    def record(self, spec: TaskSpec) -> tuple[list[Suite], list[Recording]]:
        """One suite for each number of shots, over all files that the entry names.

        Raises UnknownName for a packaged task that does not exist, TaskError for a malformed file, template
        or data set, MissingTool for a hub data set without the package `datasets`.
        """
        made = self.make(spec)
        return list(made.suites), list(made.recordings)

    def make(self, spec: TaskSpec) -> Made:
        """`record`, with what was read for it."""
        if not isinstance(spec, NativeTaskRef):
            raise UsageError(f"the native source records native tasks, not {type(spec).__name__}")
        twice = [n for n in spec.native if spec.native.count(n) > 1]
        if twice:
            raise TaskError(f"native: {twice[0]!r} is named twice in one entry")
        paths, unknown = _files_of(spec.native)
        # As they are before they are read: what changes meanwhile is seen.
        before = [file_input(path) for path in paths]
        tasks = _each(_Loaded.open, spec.native)
        crossed = spec.num_fewshot if isinstance(spec.num_fewshot, tuple) else (spec.num_fewshot,)
        suites: list[Suite] = []
        recordings: dict[str, Recording] = {}
        for shots in crossed:
            leaves = _each(partial(_Loaded.record, spec=spec, shots=shots), tasks)
            recordings.update((leaf.fingerprint, leaf) for leaf in leaves)
            suites.append(_suite(spec, shots, leaves))
        files = tuple(f for f in before if f is not None and untouched(f))
        if len(files) < len(before):
            unknown = (*unknown, "a file that changes")
        return Made(
            suites=tuple(suites),
            recordings=tuple(recordings.values()),
            inputs=None if unknown else Inputs(files=files),
            unknown=unknown,
        )

    def input_key(self, spec: NativeTaskRef) -> str | None:
        """A digest of everything but files that decides what `make` makes."""
        here = Path(__file__).parent
        code = [*here.glob("native*.py"), PACKAGE / "records.py", PACKAGE / "config" / "native_task.py"]
        return digest([SOURCE, SOURCE_VERSION, code_digest(code), os.getcwd(), spec.model_dump(mode="json")])


def _each(work: Callable[[T], R], of: Iterable[T]) -> list[R]:
    """What `work` makes of each. Raises, as one, what is wrong with any of them."""
    found: list[R] = []
    errors: list[ProctorError] = []
    for one in of:
        try:
            found.append(work(one))
        except ProctorError as error:
            errors.append(error)
    if errors:
        raise together(errors)
    return found


def _files_of(names: Sequence[str]) -> tuple[list[Path], tuple[str, ...]]:
    """The files of these tasks and of their data, and, in words, the data that is no file."""
    files: list[Path] = []
    others: list[str] = []
    for path, task in _each(lambda path: (path, load_task_file(path)), _each(task_path, names)):
        files.append(path)
        files += [path.parent / name for name in (task.dataset.path, task.fewshot.path) if name is not None]
        if task.dataset.hub is not None:
            # Which commit of the hub is read is not said.
            others.append(f"the data set {task.dataset.hub!r}")
    return files, tuple(others)


def task_path(name: str) -> Path:
    """Where a task's file is: `demo:NAME` is packaged, anything else is a path."""
    if not name.startswith(DEMO_PREFIX):
        return Path(name).expanduser()
    path = _DEMO / f"{name.removeprefix(DEMO_PREFIX)}.yaml"
    valid = [DEMO_PREFIX + p.stem for p in sorted(_DEMO.glob("*.yaml"))]
    if name not in valid:
        raise UnknownName.among("packaged task", name, valid, hint="`proctor tasks` lists what can be asked")
    return path


def select(limit: Limit, count: int, *, name: str) -> list[int]:
    """The documents that `limit` leaves of `count`, in order of the data set.

    int: the first n; float in (0, 1): that fraction, rounded up as lm-evaluation-harness does; "a:b" or
    "a:b:c": a Python slice; a list: document ids. Raises TaskError for ids that do not exist and for a
    limit that leaves nothing.
    """
    everything = range(count)
    if limit is None:
        chosen = list(everything)
    elif isinstance(limit, tuple):
        beyond = [i for i in limit if i not in everything]
        if beyond:
            raise TaskError(f"{name!r}: limit names document {beyond[0]}; valid: 0 to {count - 1}")
        chosen = sorted(set(limit))
    elif isinstance(limit, str):
        try:
            chosen = sorted(everything[slice(*(int(p) if p else None for p in limit.split(":")))])
        except ValueError as error:
            raise TaskError(f"{name!r}: limit {limit!r} is no slice: {error}") from error
    else:
        chosen = list(everything[: math.ceil(count * limit) if isinstance(limit, float) else limit])
    if not chosen:
        raise TaskError(f"{name!r}: limit {limit!r} leaves none of {count} documents")
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What is right for one document: the choices and gold indices, or the references."""

    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def worked(self) -> str:
        """What a worked example shows."""
        return self.choices[self.gold[0]] if self.gold else self.references[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A checked task file, its templates and its documents."""

    file: str
    task: NativeTask
    rows: Rows
    directory: Path

    @classmethod
    def open(cls, name: str) -> _Loaded:
        path = task_path(name)
        task = load_task_file(path)
        return cls(file=name, task=task, rows=read_rows(task.dataset, path.parent), directory=path.parent)

    def record(self, spec: NativeTaskRef, shots: int | None) -> Recording:
        num = self.task.fewshot.num if shots is None else shots
        repeats = self.task.repeats if spec.repeats is None else spec.repeats
        self._check(num, repeats)
        seed = spec.fewshot_seed if self.task.fewshot.seed is None else self.task.fewshot.seed
        shown = self._examples() if num else self.rows
        prompts = _Prompts(loaded=self, spec=spec, num=num, seed=seed, examples=shown)
        instances: list[Instance] = []
        documents: list[Json] = []
        for index in select(spec.limit, len(self.rows.rows), name=self.file):
            asked, document = prompts.ask(index)
            documents.append(document)
            instances += _instances(asked, index, repeats, spec.replicate)
        settings = self._settings(spec, num, seed, repeats, shown.digest if num else "")
        return Recording(
            fingerprint=Recording.compute_fingerprint(
                source=SOURCE,
                source_version=SOURCE_VERSION,
                task=self.task.task,
                task_version=self.task.version,
                settings=settings,
                keys=[i.key for i in instances],
            ),
            source=SOURCE,
            source_version=SOURCE_VERSION,
            task=self.task.task,
            task_version=self.task.version,
            num_fewshot=num,
            settings=settings,
            instances=tuple(instances),
            documents=canonical_json({"marking": self._marking(spec, repeats), "documents": documents}),
        )

    def _check(self, num: int, repeats: int) -> None:
        if self.task.output == "perplexity" and num:
            raise TaskError(f"{self.file!r}: a perplexity task takes no few-shot examples, {num} were asked for")
        if self.task.output != "generate" and repeats > 1:
            raise TaskError(f"{self.file!r}: repeats {repeats} is only for output: generate")

    def _examples(self) -> Rows:
        fewshot = self.task.fewshot
        if fewshot.path is not None:
            return read_rows(DatasetSpec(path=fewshot.path), self.directory)
        if fewshot.split is None:
            return self.rows
        if self.task.dataset.hub is None:
            raise TaskError(f"{self.file!r}: fewshot.split needs dataset.hub; a local file has no splits")
        return read_rows(self.task.dataset.model_copy(update={"split": fewshot.split}), self.directory)

    def _marking(self, spec: NativeTaskRef, repeats: int) -> dict[str, Json]:
        stops = self.task.output == "generate" and bool(_generation(self.task, spec).get("until"))
        return {
            "output": self.task.output,
            "metrics": [m.model_dump(exclude_defaults=True) for m in self.task.marking],
            "extract": [s.model_dump(exclude_defaults=True) for s in self.task.extract],
            "repeats": repeats,
            "expects_stop": stops,
        }

    def _settings(self, spec: NativeTaskRef, num: int, seed: int, repeats: int, examples_digest: str) -> str:
        # Paths and descriptions stay out: the same content elsewhere is the same task.
        definition = self.task.model_dump(
            mode="json", exclude={"description": True, "dataset": {"path"}, "fewshot": {"path", "num", "seed"}}
        )
        return canonical_json(
            {
                "definition": definition,
                "dataset": self.rows.digest,
                "fewshot_dataset": examples_digest,
                "num_fewshot": num,
                "fewshot_seed": seed if num else None,
                "limit": list(spec.limit) if isinstance(spec.limit, tuple) else spec.limit,
                "apply_chat_template": spec.apply_chat_template,
                "system_instruction": spec.system_instruction,
                "fewshot_as_multiturn": spec.fewshot_as_multiturn,
                "gen_kwargs": spec.gen_kwargs if self.task.output == "generate" else {},
                "repeats": repeats,
                "replicate": spec.replicate,
            }
        )


class _Prompts:
    """Turns documents into requests."""

    def __init__(self, *, loaded: _Loaded, spec: NativeTaskRef, num: int, seed: int, examples: Rows) -> None:
        self._loaded = loaded
        self._task = loaded.task
        self._spec = spec
        self._num = num
        self._seed = seed
        self._examples = examples
        self._contents = [canonical_json(row) for row in examples.rows] if num else []
        self._copies = Counter(self._contents)
        self._worked: dict[int, tuple[str, str]] = {}
        self._prompt = self._template("prompt", self._task.prompt)
        self._instruction = self._template("instruction", self._task.instruction)
        self._text = self._template("text", self._task.text)
        self._choices = [
            self._template(f"choices.{i}" if len(self._task.choices) > 1 else "choices", source)
            for i, source in enumerate(self._task.choices)
        ]
        self._target = None if self._task.target is None else self._template("target", self._task.target)
        if loaded.task.output == "generate":
            self._arguments = _canonical_arguments(_generation(self._task, spec), loaded.file)

    def ask(self, index: int) -> tuple[list[Request], dict[str, Json]]:
        """The requests of one document, and what marking needs to know about it."""
        rows = self._loaded.rows
        if self._task.output == "perplexity":
            text = self._text.text(rows, index)
            if not text:
                raise self._wrong("text", rows, index, "the passage is empty")
            return [Request(kind=Kind.ROLLING, text=text)], {"id": index}
        answer = self._answer(rows, index)
        prompt = self._context(index)
        if self._task.output == "generate":
            request = Request(kind=Kind.GENERATE, arguments=self._arguments, **prompt)
            return [request], {"id": index, "references": list(answer.references)}
        # In a chat the choice opens the assistant's turn, so nothing separates it (as lm-eval does).
        delimiter = "" if self._spec.apply_chat_template else self._task.delimiter
        asked = [
            Request(kind=Kind.LOGLIKELIHOOD, continuation=delimiter + choice, **prompt) for choice in answer.choices
        ]
        return asked, {"id": index, "choices": list(answer.choices), "gold": list(answer.gold)}

    def _template(self, key: str, source: str) -> FieldTemplate:
        return FieldTemplate(source, key=key, file=self._loaded.file)

    def _wrong(self, key: str, rows: Rows, index: int, reason: str) -> TaskError:
        return TaskError(f"{self._loaded.file!r}: `{key}` at {rows.place(index)}: {reason}")

    def _answer(self, rows: Rows, index: int) -> _Answer:
        if self._target is None:
            return _Answer()
        target = self._target.value(rows, index)
        if self._task.output == "multiple_choice":
            choices = self._choice_texts(rows, index)
            return _Answer(choices=choices, gold=self._gold(target, choices, rows, index))
        found = tuple(cast("list[Any]", target)) if isinstance(target, list | tuple) else (target,)
        references = tuple(str(r) for r in found if r is not None)
        if not references or not all(r.strip() for r in references):
            raise self._wrong("target", rows, index, "there is no gold answer (the reference is empty)")
        return _Answer(references=references)

    def _choice_texts(self, rows: Rows, index: int) -> tuple[str, ...]:
        if len(self._choices) == 1:
            value = self._choices[0].value(rows, index)
            if not isinstance(value, list | tuple):
                raise self._wrong(
                    "choices", rows, index, f"one expression must yield a list, not {type(value).__name__}"
                )
            choices = tuple(str(v) for v in cast("list[Any]", value))
        else:
            choices = tuple(template.text(rows, index) for template in self._choices)
        if len(choices) < 2 or not all(choices):
            raise self._wrong("choices", rows, index, f"at least two choices, none empty, are needed: {choices!r}")
        return choices

    def _gold(self, target: Any, choices: tuple[str, ...], rows: Rows, index: int) -> tuple[int, ...]:
        """Indices of the gold choice and of its equals: choosing a duplicate of the right answer is right."""
        if target is None or str(target).strip() == "":
            raise self._wrong("target", rows, index, "there is no gold answer")
        by_index = _as_index(target, len(choices)) if self._task.target_is != "text" else None
        by_text = choices.index(str(target)) if str(target) in choices and self._task.target_is != "index" else None
        if by_index is not None and by_text is not None and choices[by_index] != choices[by_text]:
            reason = f"{target!r} is an index and also a choice's text; say `target_is: index` or `target_is: text`"
            raise self._wrong("target", rows, index, reason)
        gold = by_index if by_index is not None else by_text
        if gold is None:
            reason = f"{target!r} is neither the text of a choice nor an index from 0 to {len(choices) - 1}"
            raise self._wrong("target", rows, index, f"{reason}; choices: {choices!r}")
        return tuple(i for i, choice in enumerate(choices) if choice == choices[gold])

    def _context(self, index: int) -> dict[str, Any]:
        """`text` or `messages` of the document's requests."""
        separator = self._task.fewshot.separator
        rows = self._loaded.rows
        parts = (self._spec.system_instruction or "", self._instruction.text(rows, index))
        system = separator.join(p for p in parts if p)
        worked = [self._example(i) for i in self._shown_to(index)]
        question = self._prompt.text(rows, index)
        if not self._spec.apply_chat_template:
            blocks = [q + self._task.delimiter + a for q, a in worked]
            return {"text": separator.join([*([system] if system else []), *blocks, question])}
        turns = [Message(role="system", content=system)] if system else []
        if self._spec.fewshot_as_multiturn is not False:
            for q, a in worked:
                turns += [Message(role="user", content=q), Message(role="assistant", content=a)]
        else:
            question = separator.join([*(q + self._task.delimiter + a for q, a in worked), question])
        return {"messages": (*turns, Message(role="user", content=question))}

    def _example(self, index: int) -> tuple[str, str]:
        """Prompt and answer of one worked example; it is shown to many documents and rendered once."""
        if index not in self._worked:
            rows = self._examples
            self._worked[index] = self._prompt.text(rows, index), self._answer(rows, index).worked
        return self._worked[index]

    def _shown_to(self, index: int) -> list[int]:
        """Indices of the worked examples of one document: never the document or its equal, and none twice.

        The j-th draw is SHA-256 of (seed, document, j) modulo the pool's size; draws that do not fit are
        passed over. So it is the same on every machine and Python, and more shots extend fewer.
        """
        if not self._num:
            return []
        itself = canonical_json(self._loaded.rows.rows[index])
        size = len(self._contents)
        if size - self._copies[itself] < self._num:
            raise TaskError(
                f"{self._loaded.file!r}: {self._num} few-shot examples were asked for; {self._examples.name!r} has "
                f"{size - self._copies[itself]} beside the document itself"
            )
        chosen: dict[int, None] = {}
        draw = 0
        while len(chosen) < self._num:
            number = int.from_bytes(hashlib.sha256(f"{self._seed}:{index}:{draw}".encode()).digest())
            if self._contents[number % size] != itself:
                chosen[number % size] = None
            draw += 1
        return list(chosen)


def _as_index(target: Any, count: int) -> int | None:
    if isinstance(target, bool):
        return None
    if isinstance(target, str):
        target = int(target) if target.strip().isdecimal() else None
    return target if isinstance(target, int) and 0 <= target < count else None


def _generation(task: NativeTask, spec: NativeTaskRef) -> dict[str, Json]:
    own = task.generation.model_dump(mode="json", exclude_none=True)
    own.setdefault("until", [task.fewshot.separator])
    merged = own | spec.gen_kwargs
    if isinstance(merged["until"], str):
        merged["until"] = [merged["until"]]
    return merged


def _canonical_arguments(arguments: dict[str, Json], file: str) -> str:
    try:
        return canonical_json(arguments)
    except (TypeError, ValueError) as error:
        raise TaskError(f"{file!r}: gen_kwargs cannot be written as JSON: {error}") from error


def _instances(asked: list[Request], doc_id: int, repeats: int, replicate: int) -> list[Instance]:
    out: list[Instance] = []
    for number, request in enumerate(asked):
        for repeat in range(repeats):
            # A log-likelihood is not sampled: replicates share it.
            sampled = request.kind is Kind.GENERATE and (repeat or replicate)
            one = _sampled(request, repeat, replicate) if sampled else request
            out.append(Instance(request=one, key=one.key, doc_id=doc_id, index=number, repeat=repeat))
    return out


def _sampled(request: Request, repeat: int, replicate: int) -> Request:
    return Request(
        kind=request.kind,
        text=request.text,
        messages=request.messages,
        arguments=request.arguments,
        sample_index=repeat,
        replicate=replicate,
    )


def _suite(spec: NativeTaskRef, shots: int | None, leaves: Sequence[Recording]) -> Suite:
    fingerprints = tuple(leaf.fingerprint for leaf in leaves)
    settings = canonical_json({"source_version": SOURCE_VERSION})
    return Suite(
        id=digest([SOURCE, settings, list(fingerprints)]),
        source=SOURCE,
        names=spec.native,
        num_fewshot=shots,
        recordings=fingerprints,
        settings=settings,
    )


def _looks_like_task(path: Path) -> bool:
    """Whether the file has the keys of a task at its left margin; run files and others have not."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    keys = {line.split(":", 1)[0] for line in text.split("\n") if ":" in line}
    return {"task", "dataset", "output"} <= keys
