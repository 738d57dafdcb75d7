"""Every error that Proctor raises on purpose.

ProctorError
├── UsageError            the command line or the configuration is wrong; exit 2
│   ├── ConfigError       a file or an override does not fit the schema
│   ├── UnknownName       a task, model, engine, partition, ... that does not exist
│   ├── TaskError         a task that cannot be expressed, or whose file or data is malformed
│   └── ModelError        weights, tokenizer or checkpoint missing or unreadable
├── MissingTool           an optional program or package is needed; says how to install it; exit 2
├── StoreError            the store cannot be read or written, or is damaged beyond a torn line; exit 1
│   └── StoreFull         no space left
├── ServerError           a model server did not start, died or answers wrongly; exit 1
│   └── ProbeError        the server's answers failed the conformance probe
├── HarnessError          a task source's own process failed or disagrees with the recording; exit 1
├── LaunchError           a launcher refused or lost a job; exit 1
└── Incomplete            the verb ended, but work is still owed; exit 3

A message names the value, the valid ones, the next command and, where there is one, the log path.
What goes wrong with a single request is not an exception but a `records.Failure`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class ProctorError(Exception):
    """Base of all; `exit_code` is what the command line returns, `hint` the next thing to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def report(self) -> dict[str, str | None]:
        """What another of our processes makes the same error of: `processes.exchange.error_of`."""
        return {"class": type(self).__name__, "message": self.message, "hint": self.hint}

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  → {self.hint}"


class UsageError(ProctorError):
    """The command line or the configuration is wrong; nothing was changed. No retry helps."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or override does not fit the schema."""


class UnknownName(UsageError):
    """A name that is not among the valid ones."""

    @classmethod
    def among(cls, what: str, name: str, valid: Iterable[str], *, hint: str | None = None) -> UnknownName:
        """Say that `name` is no `what`, with the nearest valid names first."""
        names = list(valid)
        near = nearest(name, names)
        if near:
            shown = f"did you mean {' or '.join(repr(n) for n in near)}?"
        elif names:
            shown = "valid: " + ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        else:
            shown = "there are none"
        return cls(f"unknown {what} {name!r}; {shown}", hint=hint)


class TaskError(UsageError):
    """A task cannot be expressed by record and replay, or its file or data is malformed."""


class ModelError(UsageError):
    """A model's weights, tokenizer or checkpoint are missing or unreadable."""


class MissingTool(UsageError):
    """An optional package or program is needed; the hint says how to install it."""


class StoreError(ProctorError):
    """The store cannot be read or written; answers already on disk are intact."""


class StoreFull(StoreError):
    """No space left where the store lives. Free some and repeat the command: nothing is lost."""


class ServerError(ProctorError):
    """A model server did not start, died, or answers wrongly. A restart may help.

    `state` is starting, stalled, failed, died, unreachable or empty; `log` the path of the server's log.
    """

    def __init__(self, message: str, *, hint: str | None = None, state: str = "", log: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.state = state
        self.log = log


class ProbeError(ServerError):
    """A server ignores or misaligns what a log-likelihood needs. No retry helps."""


class HarnessError(ProctorError):
    """A task source's own process failed, or disagrees with its recording."""


class LaunchError(ProctorError):
    """A launcher refused or lost a job."""


class LimitReached(LaunchError):
    """The scheduler takes no more jobs of this user, account or kind now. What was not submitted stays owed.

    `limit` is the scheduler's name for it, such as QOSMaxSubmitJobPerUserLimit or MaxArraySize.
    """

    def __init__(self, message: str, *, limit: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.limit = limit


class Unreachable(LaunchError):
    """The scheduler does not answer: nothing is known, so nothing is concluded. A retry may help."""


class Incomplete(ProctorError):
    """The verb ended in order, but work is still owed; repeating the command continues it."""

    exit_code = 3


def together(errors: Iterable[ProctorError]) -> ProctorError:
    """One error that says what all of `errors` (at least one) say, each once; of the class of the first."""
    (kind, message, hint), *rest = dict.fromkeys((type(e), e.message, e.hint) for e in errors)
    others = [f"{m}\n  → {h}" if h else m for _, m, h in rest]
    # The first hint stands last, where ProctorError prints it.
    return kind("\n".join([*others, message]), hint=hint)


def nearest(name: str, valid: Iterable[str], n: int = 3) -> list[str]:
    """The valid names that look most like `name`, best first; at most `n`, possibly none."""
    return difflib.get_close_matches(name, list(valid), n=n, cutoff=0.6)
