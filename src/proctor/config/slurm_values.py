"""What Slurm accepts as a time limit, as the name of an option and as text in a directive."""

from __future__ import annotations

import re
from typing import Any, Final, cast

_TIME: Final = re.compile(
    r"(?P<m>\d+)|(?P<m2>\d+):(?P<s2>\d+)|(?P<h3>\d+):(?P<m3>\d+):(?P<s3>\d+)"
    r"|(?P<d>\d+)-(?P<h>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?",
    re.ASCII,
)
_FORMS: Final = "minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s, such as 90, 1:30:00 or 2-12"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")

RESERVED: Final = frozenset(
    "job-name partition account qos array nodes cpus-per-task gres time signal output error dependency requeue "
    "no-requeue wait gpus gpus-per-node gpus-per-socket gpus-per-task gpu-bind gpu-freq cpus-per-gpu cores-per-socket "
    "sockets-per-node threads-per-core ntasks ntasks-per-node ntasks-per-core ntasks-per-socket ntasks-per-gpu hint "
    "extra-node-info tres-bind tres-per-task "
    "chdir export export-file input open-mode parsable quiet test-only wrap".split()
)
"""Options that Proctor sets itself, or that would break how it submits. The first two lines and a half are
eval-hive's list; memory may be given as `mem`, `mem-per-cpu` or `mem-per-gpu`."""
_OWN_KEYS: Final = {
    "cpus-per-task": "cpus",
    "time": "time_limit",
    "gres": "gpu_flag_style",
    "gpus": "gpu_flag_style",
    "gpus-per-node": "gpu_flag_style",
    "nodes": "nodes_per_server",
    "signal": "signal_lead_s",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
}


def seconds(text: str | int) -> int | None:
    """Slurm's time in seconds; None for 0, which is no limit. Parts need not stay below 60.

    Raises ValueError for anything but Slurm's seven forms (`0`, `m`, `m:s`, `h:m:s`, `d-h`, `d-h:m`, `d-h:m:s`).
    """
    found = _TIME.fullmatch(str(text).strip())
    if found is None or isinstance(text, bool):
        raise ValueError(f"expected Slurm's form of a time: {_FORMS}")
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    days, hours = part["d"], part["h"] + part["h3"]
    minutes = part["m"] + part["m2"] + part["m3"] + part["dm"]
    total = ((days * 24 + hours) * 60 + minutes) * 60 + part["s2"] + part["s3"] + part["ds"]
    return total or None


def time_text(value: object) -> object:
    """A time as text, checked: what `seconds` takes. A number is minutes, as in Slurm."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        seconds(value)
        return str(value).strip()
    return value


def time_or_auto(value: object) -> object:
    """`time_text`, or the word auto."""
    return value if value == "auto" else time_text(value)


def clock(limit_s: float) -> str:
    """Seconds as `D-HH:MM:SS` or `HH:MM:SS`, rounded up to a whole minute, which is what Slurm keeps."""
    minutes = max(1, -(-int(-(-limit_s // 1)) // 60))
    days, minutes = divmod(minutes, 24 * 60)
    text = f"{minutes // 60:02d}:{minutes % 60:02d}:00"
    return f"{days}-{text}" if days else text


def one_line(value: str) -> str:
    """The text itself. Raises ValueError if it holds a line break or another control character."""
    if _CONTROL.search(value):
        raise ValueError("must not contain line breaks or control characters")
    return value


def option(name: str) -> str:
    """An option of sbatch as it is written without its dashes. Raises ValueError for one that Proctor sets itself.

    sbatch also takes the beginning of an option's name, so the beginning of a reserved one is refused too.
    """
    bare = name.strip().lstrip("-").replace("_", "-").lower()
    if not re.fullmatch(r"[a-z][a-z0-9-]+", bare):
        raise ValueError(f"{name!r} is no long option of sbatch; write for example reservation, constraint or nodelist")
    if bare in RESERVED:
        own = _OWN_KEYS.get(bare)
        raise ValueError(f"{bare!r} is set by Proctor" + (f"; use the key `{own}`" if own else ""))
    longer = sorted(r for r in RESERVED if r.startswith(bare))
    if longer:
        raise ValueError(f"{bare!r} is short for {longer[0]!r}, which is set by Proctor")
    return bare


def options(value: object) -> object:
    """The map of further options, their names checked; a value is text, a number, or true for a bare flag."""
    if not isinstance(value, dict):
        return value
    return {option(str(k)): v for k, v in cast("dict[Any, Any]", value).items()}
