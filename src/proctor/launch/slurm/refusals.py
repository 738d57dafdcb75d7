"""What Slurm says when it refuses, as our errors: the limit or the value, and the next command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from proctor.errors import LaunchError, LimitReached, ProctorError, UnknownName

_NAMED: Final = re.compile(r"\b((?:QOS|Assoc)\w*(?:Limit|PerUser|PerAccount|PerJob)\w*)\b")
"""Slurm's own names: QOSMaxSubmitJobPerUserLimit, AssocGrpSubmitJobsLimit, QOSMaxWallDurationPerJobLimit, ..."""
_TEMPORARY: Final = re.compile(r"Submit|Grp\w*Jobs")
"""Those that jobs which end make room under; the others are about what one job asks for."""
_POLICY: Final = "Job violates accounting/QOS policy"
_FULL: Final = re.compile(r"resource temporarily unavailable|slurm temporarily unable to accept job", re.IGNORECASE)
_ARRAY: Final = re.compile(r"invalid job array specification", re.IGNORECASE)

_REFUSALS: Final[tuple[tuple[str, type[ProctorError], str, str, str], ...]] = (
    # what Slurm prints, class, the option it is about, what is wrong, the next command
    (
        r"invalid partition name|invalid partition specified",
        UnknownName,
        "partition",
        "no such partition",
        "`sinfo -s` lists them",
    ),
    (
        r"invalid account or account/partition",
        UnknownName,
        "account",
        "no such account for this user and partition",
        "`sacctmgr show associations user=$USER format=account,partition,qos` lists yours",
    ),
    (
        r"invalid qos",
        UnknownName,
        "qos",
        "no such QOS for this user and account",
        "`sacctmgr show associations user=$USER format=account,partition,qos` lists yours",
    ),
    (
        r"requested node configuration is not available|invalid generic resource|memory specification can not"
        r"|more processors requested than permitted|node count specification invalid",
        LaunchError,
        "",
        "no node of the partition has what the job asks for (GPUs, CPUs, memory, number of nodes)",
        "`sinfo -o '%P %D %c %m %G'` lists what the nodes of each partition have",
    ),
    (
        r"\b(?:QOS|Assoc)(?:Max|Min|Grp)\w+",
        LaunchError,
        "",
        "the job asks for more than a limit of its QOS or account allows",
        "ask for less, or see `sacctmgr show qos` and `sacctmgr show associations user=$USER`",
    ),
    (
        r"requested time limit is invalid|invalid --time",
        LaunchError,
        "time",
        "the time limit is not allowed",
        "`sinfo -o '%P %l'` lists the longest of each partition",
    ),
    (
        r"user's group not permitted|access/permission denied|user not allowed|not permitted to use this partition",
        LaunchError,
        "partition",
        "this user may not do that",
        "`scontrol show partition` lists who may use which; or choose another partition, account or QOS",
    ),
    (
        r"required partition not available|partition.*(?:inactive|down)|job submission.*disabled",
        LaunchError,
        "partition",
        "the partition takes no jobs now",
        "`sinfo -s` shows which are up",
    ),
    (
        r"invalid (?:feature|license|node name|reservation)|requested reservation is invalid",
        LaunchError,
        "",
        "a constraint, licence, node or reservation that does not exist is asked for",
        "see `sinfo -o '%P %f'`, `scontrol show reservation` and `scontrol show license`",
    ),
    (
        r"job dependency problem",
        LaunchError,
        "dependency",
        "the job to wait for does not exist",
        "`squeue --me` lists your jobs",
    ),
    (
        r"invalid job id|job/step already completing or completed|job has already finished",
        LaunchError,
        "",
        "Slurm does not know that job any more",
        "`squeue --me -t all` lists what it knows",
    ),
    (
        r"job requeue.*disabled|requested operation not supported|requeue.*not permitted",
        LaunchError,
        "",
        "this job may not be requeued here",
        "submit a successor instead (`requeue: successor`)",
    ),
)


def refusal(argv: Sequence[str], message: str, status: int, *, script: str = "") -> ProctorError:
    """The error for what a command of Slurm printed before it ended with `status`; `script`: what it submitted."""
    words = _cleaned(message) or f"status {status}"
    limit = limit_in(message)
    if limit is not None:
        return LimitReached(
            f"Slurm's limit {limit} is reached: {words}", limit=limit, hint=_LIMIT_HINTS.get(limit, _LIMIT_HINT)
        )
    for pattern, kind, option, what, hint in _REFUSALS:
        if re.search(pattern, message, re.IGNORECASE):
            value = _option(argv, script, option)
            named = f"{option} {value!r}: {what}" if value is not None else what
            return kind(f"{named}; {argv[0]}: {words}", hint=hint)
    return LaunchError(
        f"{argv[0]} failed with status {status}: {words}", hint="`scontrol ping` and `sinfo -s` may tell"
    )


_LIMIT_HINT: Final = (
    "wait for jobs to end (`squeue --me`) and repeat the command, or use another QOS or account "
    "(`sacctmgr show qos format=name,maxsubmitjobsperuser,maxjobsperuser`)"
)
_LIMIT_HINTS: Final = {
    "MaxArraySize": "`scontrol show config | grep MaxArraySize`: the highest index is one less",
    "MaxJobCount": "the whole cluster's queue is full; repeat the command later",
}


def limit_in(message: str) -> str | None:
    """The name of the limit that Slurm's words are about; None if they are about something else."""
    named = _NAMED.search(message)
    if named is not None:
        return named.group(1) if _TEMPORARY.search(named.group(1)) else None
    if _POLICY in message:
        return _POLICY
    if _ARRAY.search(message):
        return "MaxArraySize"
    if _FULL.search(message):
        return "MaxJobCount"
    return None


def _cleaned(message: str) -> str:
    lines = [re.sub(r"^\w+: (?:error|fatal): ", "", line.strip()) for line in message.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def _option(argv: Sequence[str], script: str, option: str) -> str | None:
    """What was asked for: a flag goes before a directive."""
    if not option:
        return None
    stated = next((word.removeprefix(f"--{option}=") for word in argv if word.startswith(f"--{option}=")), None)
    if stated is not None:
        return stated
    directive = re.search(rf"^#SBATCH --{re.escape(option)}=\"?(.*?)\"?$", script, re.MULTILINE)
    return None if directive is None else directive[1]
