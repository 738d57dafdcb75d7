"""The child's end of `processes.exchange`: the job in, a result or an error out, each file whole or absent."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from proctor.errors import HarnessError, ProctorError


def write_json(path: Path, value: Any, *, default: Callable[[Any], Any] | None = None) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_lines(path, [json.dumps(value, default=default)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, all or none of them."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.write("\n")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> Iterator[Any]:
    """The values of a file with one JSON value a line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def error_report(error: BaseException) -> dict[str, str | None]:
    """{class, message, hint} of `error`; one that is not ours becomes a HarnessError."""
    if not isinstance(error, ProctorError):
        error = HarnessError(f"{type(error).__name__}: {error}")
    return error.report


def write_error(path: Path, error: BaseException) -> None:
    """Write the report of `error`; the traceback goes to the log."""
    traceback.print_exception(error)
    write_json(path, error_report(error))


def read_error(path: Path) -> ProctorError:
    """The inverse of `write_error`."""
    from proctor import errors  # noqa: PLC0415

    report = read_json(path)
    kind: type[ProctorError] = getattr(errors, report["class"])
    return kind(report["message"], hint=report["hint"])


def answer_in(directory: Path, answer: Callable[[Path, Any], Any]) -> int:
    """Run `answer(directory, job)` with the job in `directory`, leave its result or error there; the exit code."""
    try:
        result = answer(directory, read_json(directory / "job.json"))
    except Exception as error:  # noqa: BLE001  the boundary of the process: reported, and raised again by the parent
        write_error(directory / "error.json", error)
        return 1
    write_json(directory / "result.json", result)
    return 0


def serve(answer: Callable[[Path, Any], Any]) -> None:
    """`answer_in` the directory named on the command line; ends the process."""
    sys.exit(answer_in(Path(sys.argv[1]), answer))
