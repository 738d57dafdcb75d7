"""What the workers of one resource shape are told: which models there are, in which order, on which terms."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from proctor.config.clusters.settings import Staging
from proctor.errors import StoreError

LINGER_S: Final = 120.0
"""How long a worker of an allocation stays for what others are asking: about what starting it again would cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmTerms:
    """What a worker inside a Slurm job may do about its own end."""

    requeue: str = "requeue"
    """requeue: `scontrol requeue` of itself; successor: a new job from `script`; never."""
    script: str = ""
    """The job script, for a successor."""
    max_attempts: int = 10
    """Starts of one array element, the first one included."""
    signal_lead_s: float = 120.0
    """How long before its end the job stops taking requests."""
    scoring: str = ""
    """Name of the job that marks, which has to wait for successors; empty: there is none."""
    prefix: str = ""
    """What the names of all jobs of the run begin with."""
    nodes_per_server: int = 1
    servers: int = 1
    """In each job."""
    staging: Staging | None = None
    """Where weights are copied to on the nodes before they are served."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> SlurmTerms:
        """From what `dataclasses.asdict` made of one, by way of JSON. Raises TypeError for anything else."""
        staging = fields.get("staging")
        plain: dict[str, Any] = {name: value for name, value in fields.items() if name != "staging"}
        return cls(**plain, staging=None if staging is None else Staging(**staging))


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The same file for all workers of the shape; a JSON file in the run's directory."""

    shape: str
    jobs: tuple[str, ...]
    """Names of files in the run's `jobs/`, in plan order."""
    costs: tuple[float, ...]
    """Seconds that each was owed when planned: so many of the workers begin with it."""
    workers: int = 1
    startup_s: float = 0.0
    """Expected from the start of a server to its first answer."""
    swap: bool = True
    """Whether a worker goes on to the next model when its own has nothing left."""
    linger_s: float | None = None
    """How long a worker waits at its end for requests that others are asking; None: until they have ended."""
    slurm: SlurmTerms | None = None

    def order(self, index: int) -> list[str]:
        """The job files in the order in which worker `index` takes them: see `start_position`."""
        first = start_position(self.costs, index=index, workers=self.workers)
        turned = self.jobs[first:] + self.jobs[:first]
        return list(turned if self.swap else turned[:1])

    def write(self, path: Path) -> None:
        """Write the file; the directory exists."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Assignment:
        """Raises StoreError for a file that is not an assignment."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            slurm = raw.pop("slurm")
            raw |= {"jobs": tuple(raw["jobs"]), "costs": tuple(raw["costs"])}
            return cls(**raw, slurm=None if slurm is None else SlurmTerms.from_fields(slurm))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"cannot read the assignment {str(path)!r}: {error}", hint="repeat the command that submitted it"
            ) from error


def start_position(costs: Sequence[float], *, index: int, workers: int) -> int:
    """Which of the models worker `index` of `workers` begins with.

    The models lie end to end on a line, each as long as its cost, and worker i stands at (i + 1/2) / workers of
    it: so each model gets workers in proportion to its work, and indices above `workers` start over.
    """
    ends = list(accumulate(max(c, 0.0) for c in costs))
    if not ends or ends[-1] <= 0:
        return index % len(ends) if ends else 0
    place = (index % workers + 0.5) / workers * ends[-1]
    return min(bisect_right(ends, place), len(ends) - 1)
