"""What a worker is told: one model, one engine, where to read and write. A JSON file in the run directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from proctor.config.names import slug
from proctor.config.spec import EngineSpec
from proctor.errors import StoreError
from proctor.processes.container import Container

_ENGINE: TypeAdapter[EngineSpec] = TypeAdapter(EngineSpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is the same for all workers of one model of one run."""

    run: str
    run_directory: str
    store: str
    model: str
    """Unique within the run: entry name and checkpoint label."""
    display_name: str
    weights: str
    resolution: str
    engine: dict[str, Any]
    """An EngineSpec, with the server spelt out."""
    path: str
    served_model: str
    revision: str | None = None
    urls: tuple[str, ...] = ()
    api_key_env: str | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    chat_template: str | None = None
    """Name of one of the tokenizer's templates; None: its default."""
    trust_remote_code: bool = False
    gpus: int = 0
    """For each worker."""
    container: Container | None = None
    """Around each server that is started."""

    @property
    def job_id(self) -> str:
        """A name for files: safe, and different for different models."""
        return slug(self.model)

    @property
    def engine_spec(self) -> EngineSpec:
        """The validated engine section."""
        return _ENGINE.validate_python(self.engine)

    def write(self, path: Path) -> None:
        """Write the job file; the directory exists."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """Raises StoreError for a file that is not a job."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["urls"] = tuple(fields["urls"])
            if fields.get("container") is not None:
                fields["container"] = Container.from_fields(fields["container"])
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"cannot read the job file {str(path)!r}: {error}",
                hint="repeat `proctor run`: it is written again",
            ) from error
