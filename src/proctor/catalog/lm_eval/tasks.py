"""lm-eval's own task loading, cut at the leaves: which tasks a name stands for, and how to build one of them.

Runs where lm-eval is. Groups, tags and overrides are resolved by lm-eval's code; only the building of a leaf
task, which loads data, is put off so that each can be built alone in a process of its own.
"""

# lm-eval is not in the environment that the types are checked in.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks import _factory as factory_module
from lm_eval.tasks import manager as manager_module
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from proctor.errors import TaskError, UnknownName

KINDS = {Kind.TASK: "task", Kind.PY_TASK: "python", Kind.GROUP: "group", Kind.TAG: "tag"}
_OWN = Path(manager_module.__file__).parent
ClassMap = Callable[[type], type]
"""What to build a task from, given the class that lm-eval would take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One task as lm-eval would build it: an entry of its index, or a configuration written inside a group."""

    name: str
    entry: Entry | None
    config: Mapping[str, Any]
    """Overrides of the entry, or the whole configuration."""


@dataclass(slots=True, kw_only=True)
class Plan:
    """What one top-level name stands for."""

    name: str
    leaves: dict[str, Leaf] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    """Their leaves are stand-ins that know their names."""
    index: list[list[Any]] = field(default_factory=list)
    """Rows of the index that this name needed."""


def index_rows(include_path: list[str], *, own: bool) -> list[list[Any]]:
    """[name, kind, path, tags, members] of everything in `include_path`, and of lm-eval's `own` tasks."""
    index = TaskManager(include_path=_checked(include_path) or None, include_defaults=own).task_index
    return [_row(name, entry) for name, entry in index.items() if entry.kind in KINDS]


def _row(name: str, entry: Entry) -> list[Any]:
    return [name, KINDS[entry.kind], str(entry.yaml_path or ""), sorted(entry.tags), _members(entry)]


def anchored(rows: list[list[Any]], include_path: list[str]) -> list[list[Any]]:
    """Rows whose paths are [place, rest]: place 0 is lm-eval's own tasks, n the nth of `include_path`, -1 nowhere."""
    places = [_OWN, *map(Path, include_path)]

    def anchor(path: str) -> list[Any]:
        inside = [n for n, place in enumerate(places) if path and Path(path).is_relative_to(place)]
        return [inside[-1], str(Path(path).relative_to(places[inside[-1]]))] if inside else [-1, path]

    return [[name, kind, anchor(path), tags, members] for name, kind, path, tags, members in rows]


def unanchored(rows: list[list[Any]], include_path: list[str]) -> list[list[Any]]:
    """The inverse of `anchored`, for this environment and these directories."""
    places = [_OWN, *map(Path, include_path)]
    return [
        [name, kind, rest if place < 0 else str(places[place] / rest), tags, members]
        for name, kind, (place, rest), tags, members in rows
    ]


class _Noticing(dict[str, Entry]):
    """An index that notices which of its names are used."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self.noticed: set[str] = set()

    def __getitem__(self, name: str) -> Entry:
        self.noticed.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


def open_manager(settings: Mapping[str, Any], rows: list[list[Any]] | None) -> TaskManager:
    """lm-eval's TaskManager, as its command line makes it; `rows` spare it reading every file again."""
    build = manager_module.TaskIndex.build
    if rows is not None:
        kinds = {text: kind for kind, text in KINDS.items()}
        entries = {
            name: Entry(name=name, kind=kinds[kind], yaml_path=Path(path) if path else None, tags=set(tags))
            for name, kind, path, tags, _ in rows
        }
        manager_module.TaskIndex.build = staticmethod(lambda *_args, **_kwargs: entries)
    try:
        return TaskManager(include_path=_checked(settings["include_path"]) or None, metadata=dict(settings["metadata"]))
    finally:
        manager_module.TaskIndex.build = build


def resolve(manager: TaskManager, names: list[str]) -> list[str]:
    """The top-level names and absolute YAML paths that `names` mean: names, globs, YAML files, a directory of them.

    Raises UnknownName with the nearest names for what matches nothing.
    """
    found: list[str] = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            matches = sorted(glob.glob(str(Path(name).expanduser().absolute())))
        else:
            matches = manager.match_tasks([name])
            if not matches and Path(name).is_dir():
                matches = sorted(str(p.absolute()) for p in Path(name).glob("*.yaml"))
        if not matches:
            raise UnknownName.among(
                "lm-eval task",
                name,
                manager.all_tasks,
                hint="proctor tasks PATTERN lists them; include_path adds yours",
            )
        found.extend(m for m in matches if m not in found)
    return found


def plan(manager: TaskManager, spec: str) -> Plan:
    """The leaves and groups of one top-level name or YAML file. Builds no task, reads no data.

    Raises TaskError for a malformed configuration.
    """
    found: dict[str, Leaf] = {}

    class Planner(TaskFactory):
        def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
            name = (overrides or {}).get("task") or entry.name
            found[name] = Leaf(name=name, entry=entry, config=dict(overrides or {}))
            return _Stand(name)

    def inline(config: dict[str, Any]) -> Task:
        found[config["task"]] = Leaf(name=config["task"], entry=None, config=config)
        return _Stand(config["task"])

    kept, factory_module.ConfigurableTask = (manager._factory, manager._index), inline
    manager._factory, manager._index = Planner(meta=manager.metadata), _Noticing(manager._index)
    try:
        what = load_yaml(spec, resolve_func=True) if spec.endswith((".yaml", ".yml")) else spec
        loaded = manager.load([what])
        rows = [_row(name, manager._index[name]) for name in sorted(manager._index.noticed)]
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, AssertionError) as error:
        raise TaskError(f"lm-eval cannot load {spec!r}: {type(error).__name__}: {error}") from error
    finally:
        manager._factory, manager._index = kept
        factory_module.ConfigurableTask = ConfigurableTask
    name = spec if isinstance(what, str) else str(what.get("group") or what.get("task"))
    result = Plan(name=name, groups=loaded["groups"], index=rows)
    result.leaves = {task: found[task] for task in loaded["tasks"]}
    if not result.leaves:
        raise TaskError(f"{spec!r} stands for no task")
    return result


def build(manager: TaskManager, leaf: Leaf, overrides: Mapping[str, Any], cls: ClassMap | None = None) -> Task:
    """Build one leaf as lm-eval does, with `overrides` over its configuration. Loads its data, unless `cls` prevents.

    Raises TaskError if the task's own Python ignores an override; whatever the task raises.
    """
    swap = cls or (lambda c: c)

    class Builder(TaskFactory):
        def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
            config = super()._load_full_config(entry, overrides)
            if "class" in config:
                config["class"] = swap(config["class"])
            return config

    factory_module.ConfigurableTask = swap(ConfigurableTask)
    try:
        config = {**deepcopy(dict(leaf.config)), **deepcopy(dict(overrides))}
        if leaf.entry is None:
            task = factory_module.ConfigurableTask(config=config)
        else:
            task = Builder(meta=manager.metadata)._build_task(leaf.entry, config)
    finally:
        factory_module.ConfigurableTask = ConfigurableTask
    for key, value in overrides.items():
        if key not in ("metadata", "generation_kwargs", "fewshot_config", "metric_list") and not _same(
            task, key, value
        ):
            raise TaskError(f"task {leaf.name!r} is written in Python and ignores the override of {key!r}")
    return task


def _same(task: Task, key: str, value: Any) -> bool:
    return json.dumps(getattr(task.config, key, None), default=str) == json.dumps(value, default=str)


class _Stand(Task):
    """In a plan, stands where a leaf task will be: groups only ask a member for its name."""

    def __new__(cls, name: str) -> _Stand:
        return object.__new__(cls)

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def task_name(self) -> str:
        return self._name


_Stand.__abstractmethods__ = frozenset()


def _members(entry: Entry) -> list[str]:
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    if entry.kind is not Kind.GROUP:
        return []
    members = (entry.cfg or {}).get("task") or []
    members = [members] if isinstance(members, str) else members
    return [m if isinstance(m, str) else str(m.get("group") or m.get("task")) for m in members]


def _checked(include_path: list[str]) -> list[str]:
    for path in include_path:
        if not Path(path).is_dir():
            raise TaskError(f"include_path {path!r} is no directory")
    return include_path
