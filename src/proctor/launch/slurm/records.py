"""What Slurm prints, as values: squeue, sacct, and scontrol's one-line records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from proctor.errors import LaunchError
from proctor.launch.launcher import JobState
from proctor.launch.slurm.states import bare_word, job_state

_FIELDS: Final = (
    *("JobID", "ArrayJobID", "ArrayTaskID", "State", "RestartCnt", "exit_code", "SubmitTime", "StartTime", "EndTime"),
    *("NodeList", "UserName", "Account", "QOS", "Partition", "Reason", "Name"),
)
QUEUE_FORMAT: Final = ",".join(f"{field}:|" for field in _FIELDS)
"""For `squeue -O`: every value whole, whatever its length. Name is last since only it may hold the separator."""
SACCT_FIELDS: Final = "jobid,jobidraw,state,exitcode,submit,start,end,nodelist,user,account,qos,partition,jobname"
_NOTHING: Final = frozenset({"", "N/A", "(null)", "None", "Unknown", "NONE", "n/a"})
_STUCK: Final = re.compile(r"launch[ _]failed[ _]requeued[ _]held", re.IGNORECASE)
_DURATION: Final = re.compile(r"(?:(?P<d>\d+)-)?(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)|(?P<only>\d+)(?P<min>)")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRecord:
    """One job or one array task, as the scheduler sees it now."""

    job: str
    """Its own id, which srun and the task itself know."""
    array: str
    """The id that sbatch printed: the array's, or `job` again."""
    array_task: str
    """Index in the array; empty for a job that is none."""
    state: str
    """Slurm's word."""
    restarts: int
    """How often it was requeued; goes up while the attempt before is still COMPLETING."""
    exit_status: int | None
    """128 + n for signal n; None while there is none."""
    submitted: float | None
    started: float | None
    """Unix time; of a pending job the forecast, if there is one."""
    ends: float | None
    """Unix time at which it ended or will be ended."""
    nodes: str
    user: str
    account: str
    qos: str
    partition: str
    reason: str
    name: str

    @property
    def stands(self) -> JobState:
        """Raises LaunchError for a word of Slurm's that is not in the table."""
        return job_state(self.state)

    @property
    def id(self) -> str:
        """What scontrol and scancel take: a bare id would mean the whole array."""
        return f"{self.array}_{self.array_task}" if self.array_task else self.job

    @property
    def completing(self) -> bool:
        return bare_word(self.state) == "COMPLETING"

    @property
    def stuck(self) -> bool:
        """Whether Slurm itself holds it, since it could not start it or lost sight of it: it waits for ever."""
        return self.stands is JobState.PENDING and _STUCK.fullmatch(self.reason) is not None


def parse_queue(text: str) -> list[QueueRecord]:
    """The output of `squeue -h -r -O QUEUE_FORMAT`; arrays that wait are expanded if squeue has not done so.

    Raises LaunchError for a line that is none of squeue's.
    """
    # A job's name may hold line breaks; a record begins with two ids.
    lines = re.split(r"\n(?=\d+\|\d+\|)", text.strip("\n"))
    return [record for line in lines if line.strip() for record in _queue_line(line)]


def _queue_line(line: str) -> Iterator[QueueRecord]:
    values = line.removesuffix("|").split("|", len(_FIELDS) - 1)
    if len(values) != len(_FIELDS):
        raise LaunchError(f"squeue printed a line that Proctor cannot read: {line!r}", hint="see `squeue --version`")
    row = dict(zip(_FIELDS, (value.strip() for value in values), strict=True))
    tasks = [""] if row["ArrayTaskID"] in _NOTHING else [str(task) for task in expand_tasks(row["ArrayTaskID"])]
    try:
        restarts = int(row["RestartCnt"] or 0)
    except ValueError:
        raise LaunchError(f"squeue printed a restart count that is no number: {line!r}") from None
    for task in tasks:
        yield QueueRecord(
            job=row["JobID"],
            array=row["ArrayJobID"],
            array_task=task,
            state=row["State"],
            restarts=restarts,
            exit_status=exit_status(row["exit_code"]) if job_state(row["State"]).final else None,
            submitted=moment(row["SubmitTime"]),
            started=moment(row["StartTime"]),
            ends=moment(row["EndTime"]),
            nodes=_text(row["NodeList"]),
            user=row["UserName"],
            account=_text(row["Account"]),
            qos=_text(row["QOS"]),
            partition=row["Partition"],
            reason=_text(row["Reason"]),
            name=row["Name"],
        )


def parse_accounting(text: str) -> list[QueueRecord]:
    """The output of `sacct -P -n -X -o SACCT_FIELDS`. It does not say how often a job was requeued: 0."""
    names = SACCT_FIELDS.split(",")
    records: list[QueueRecord] = []
    for line in text.splitlines():
        values = line.split("|", len(names) - 1)
        if len(values) != len(names):
            raise LaunchError(f"sacct printed a line that Proctor cannot read: {line!r}", hint="see `sacct --version`")
        row = dict(zip(names, (value.strip() for value in values), strict=True))
        array, _, task = row["jobid"].partition("_")
        tasks = expand_tasks(task.strip("[]")) if task else [None]
        records += [
            QueueRecord(
                job=row["jobidraw"],
                array=array,
                array_task="" if index is None else str(index),
                state=row["state"],
                restarts=0,
                exit_status=exit_status(row["exitcode"]) if job_state(row["state"]).final else None,
                submitted=moment(row["submit"]),
                started=moment(row["start"]),
                ends=moment(row["end"]),
                nodes="" if row["nodelist"] == "None assigned" else _text(row["nodelist"]),
                user=row["user"],
                account=row["account"],
                qos=row["qos"],
                partition=row["partition"],
                reason="",
                name=row["jobname"],
            )
            for index in tasks
        ]
    return records


def expand_tasks(text: str) -> list[int]:
    """The indices in Slurm's form: `0-3,7`, `0-9:3`, `[2,4-6]%2`. Raises LaunchError for anything else."""
    found: list[int] = []
    for part in text.strip("[]").split("%")[0].strip("[]").split(","):
        matched = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part.strip())
        if matched is None:
            raise LaunchError(f"cannot read the array indices {text!r}; expected a form such as 0-3,7 or 0-9:3")
        first, last, step = matched.groups()
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def parse_pairs(line: str) -> dict[str, str]:
    """`scontrol -o show ...`: Key=Value pairs, where a value may hold blanks and more equals signs."""
    found = list(re.finditer(r"(?:^|(?<=\s))([A-Za-z][\w/:.-]*(?:\[\d+\])?)=", line))
    ends = [match.start() for match in found[1:]] + [len(line)]
    return {match.group(1): line[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


def parse_settings(text: str) -> dict[str, str]:
    """`scontrol show config`: one `Key = Value` a line."""
    rows = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, mark, value in rows if mark and key.strip()}


def exit_status(text: str) -> int | None:
    """Of `3:0` (status:signal) and of the kernel's word (768); 128 + n for signal n. None for no number."""
    status, _, number = text.partition(":")
    if not status.isdigit() or (number and not number.isdigit()):
        return None
    if number:
        return 128 + int(number) if int(number) else int(status)
    signal = int(status) & 0x7F
    return 128 + signal if signal else (int(status) >> 8) & 0xFF


def moment(text: str) -> float | None:
    """Unix time of Slurm's `2026-11-21T10:18:57`, printed in UTC; None for N/A, Unknown and the like."""
    if text in _NOTHING:
        return None
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def duration(text: str) -> float | None:
    """Seconds of Slurm's `1-02:03:04`, `2:03:04`, `03:04` or minutes; None for UNLIMITED and for nothing."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        return None
    if found["only"]:
        return 60.0 * int(found["only"])
    part: Mapping[str, str | None] = found.groupdict()
    days, hours, minutes, seconds = (int(part[name] or 0) for name in "dhms")
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _text(value: str) -> str:
    return "" if value in _NOTHING else value
