"""One run, opened: its specification, its directory and its store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proctor.config.load import load_run
from proctor.config.names import slug
from proctor.config.schema import dump_resolved
from proctor.config.spec import RunSpec
from proctor.store import Store
from proctor.worker.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What every verb starts from."""

    spec: RunSpec
    config: Path
    directory: RunDirectory
    overrides: tuple[str, ...] = ()
    """Those of `--set`, which are in `spec` already: where a value was stated can be shown."""

    @classmethod
    def open(cls, config: str | Path, overrides: Sequence[str] = ()) -> RunContext:
        """Read and check the configuration; touches nothing else. Raises ConfigError."""
        path = Path(config)
        spec = load_run(path, overrides)
        directory = RunDirectory(Path(spec.runs) / slug(spec.name))
        return cls(spec=spec, config=path, directory=directory, overrides=tuple(overrides))

    def store(self, *, create: bool) -> Store:
        """Open the store. Raises StoreError; without `create` also when there is none yet."""
        return Store.open(Path(self.spec.store), create=create)

    def write_configuration(self) -> None:
        """Keep the configuration as written and as resolved in the run's directory."""
        self.directory.create()
        self.directory.write(self.directory.config, self.config.read_text(encoding="utf-8"))
        self.directory.write(self.directory.resolved, dump_resolved(self.spec))
