"""The store as a whole: one directory, shared by whoever evaluates."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from proctor.errors import StoreError
from proctor.records import Json, Recording, Suite, canonical_json
from proctor.store import recording as recordings
from proctor.store import scores
from proctor.store.answers import Answers
from proctor.store.claims import Ledger
from proctor.store.compaction import Compacted, compact
from proctor.store.completion import Completion, completion
from proctor.store.durable import check_name, make_directory, publish_bytes, store_errors
from proctor.store.owner import Alive, Owner, alive
from proctor.store.rows import Damage
from proctor.store.scores import ScoredSuite
from proctor.store.segments import listing
from proctor.store.writer import SEGMENT_BYTES, Writer

FORMAT: Final = 1
"""Raised when an older version could no longer read what a newer one writes."""
_MARKER: Final = "store.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSummary:
    """What the store holds for one weights fingerprint."""

    weights: str
    responses: int
    """Distinct physical keys with a response."""
    aliases: int
    failures: int
    """Rows: a request that failed three times counts three times."""
    duplicates: int
    parts: int
    segments: int
    open_segments: int
    """Segments whose writer runs or has died."""
    bytes: int
    damage: tuple[Damage, ...]


class Store:
    """Recordings, answers, claims and scores in one directory of a POSIX file system.

    Append-only, without locks: every file has one writer. Names are fingerprints and ids, never paths.
    """

    def __init__(self, path: Path, *, alive: Alive = alive) -> None:
        """Use `open`."""
        self.path: Final = path
        self._alive = alive

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = True, alive: Alive = alive) -> Self:
        """Open the store at `path`; with `create`, make one where there is nothing yet.

        Raises StoreError for what is not a store, for a newer format, and where it cannot be read or made.
        `alive` decides whether the owner of a segment or claim still runs.
        """
        root = Path(path)
        marker = root / _MARKER
        with store_errors("open the store", root):
            if not marker.exists():
                if not create:
                    raise StoreError(f"there is no store at {root}", hint="check `store:` or start with `proctor run`")
                # Hidden names may be another process's, which makes the same store right now.
                there = {name for name in os.listdir(root) if not name.startswith(".")} if root.exists() else set[str]()
                if there and _MARKER not in there:
                    raise StoreError(
                        f"{root} is not a store: it holds other files and no {_MARKER}",
                        hint="choose an empty or new directory for `store:`",
                    )
                make_directory(root)
                publish_bytes(marker, canonical_json({"format": "proctor-store", "version": FORMAT}).encode())
            data = marker.read_bytes()
        _check_marker(root, data)
        return cls(root, alive=alive)

    # --- recordings and suites ---

    def has_recording(self, fingerprint: str) -> bool:
        """Whether the recording is here."""
        return self._recording(fingerprint).is_file()

    def write_recording(self, recording: Recording) -> None:
        """Keep a recording; one that is here already stays as it is. Raises StoreError."""
        self._make("requests")
        recordings.write_recording(self._recording(recording.fingerprint), recording)

    def label_recording(self, fingerprint: str, labels: Sequence[str]) -> None:
        """Keep what marking this recording was found to need; its file stays as it is. Raises StoreError."""
        recordings.write_labels(self._recording(fingerprint), labels)

    def recording_labels(self, fingerprint: str) -> tuple[str, ...]:
        """What marking this recording needs, as far as it was found out. Raises StoreError."""
        return recordings.read_labels(self._recording(fingerprint))

    def read_recording(self, fingerprint: str) -> Recording:
        """The recording. Raises StoreError if it is missing or damaged."""
        return recordings.read_recording(self._recording(fingerprint))

    def recorded_requests(self, fingerprint: str) -> recordings.Requests:
        """A recording's requests, without what marking needs. Raises StoreError if it is missing or damaged."""
        return recordings.read_requests(self._recording(fingerprint))

    def recording_keys(self, fingerprint: str) -> list[str]:
        """The keys of a recording's requests, in order, without reading the requests. Raises StoreError."""
        return recordings.read_keys(self._recording(fingerprint))

    def recording_outline(self, fingerprint: str) -> recordings.Outline:
        """What planning needs of a recording, without reading its requests. Raises StoreError."""
        return recordings.read_outline(self._recording(fingerprint))

    def recording_path(self, fingerprint: str) -> Path:
        """The file of a recording, which never changes."""
        return self._recording(fingerprint)

    def write_suite(self, suite: Suite) -> None:
        """Keep a suite. Raises StoreError."""
        self._make("suites")
        recordings.write_suite(self._suite(suite.id), suite)

    def read_suite(self, id: str) -> Suite:
        """The suite. Raises StoreError if it is missing or damaged."""
        return recordings.read_suite(self._suite(id))

    def suites(self) -> list[str]:
        """The ids of all suites, sorted."""
        return sorted(name.removesuffix(".json") for name in self._names("suites") if name.endswith(".json"))

    # --- answers ---

    def weights(self) -> list[str]:
        """The weights fingerprints that have a directory here, sorted."""
        return self._names("weights")

    def write_identity(self, weights: str, identity: Json) -> None:
        """Keep what a weights fingerprint is made of; the first one written stays. Raises StoreError."""
        path = self._weights(weights) / "identity.json"
        with store_errors("write an identity", path):
            if not path.exists():
                make_directory(path.parent)
                publish_bytes(path, canonical_json(identity).encode())

    def read_identity(self, weights: str) -> Json:
        """What a weights fingerprint is made of; None if nobody has said. Raises StoreError."""
        path = self._weights(weights) / "identity.json"
        with store_errors("read an identity", path):
            if not path.exists():
                return None
            data = path.read_bytes()
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(f"{path} is damaged: {error}", hint="delete it; the next run writes it again") from error

    def writer(
        self,
        weights: str,
        resolution: str,
        *,
        owner: Owner,
        segment_bytes: int = SEGMENT_BYTES,
        fsync: Callable[[int], None] = os.fsync,
    ) -> Writer:
        """A writer of answers, to be entered with `async with`."""
        return Writer(self._weights(weights), resolution, owner, segment_bytes=segment_bytes, fsync=fsync)

    def answers(self, weights: str, resolution: str, *, without: Writer | None = None) -> Answers:
        """The answers stored for these weights under `resolution`. Raises StoreError if they cannot be read.

        `without`: whose segments are left out, because whoever asks writes them and knows what they hold.
        """
        skipped = None if without is None else without.name
        return Answers(self._weights(weights), resolution, alive=self._alive, without=skipped)

    def completion(
        self,
        weights: str,
        resolution: str,
        outlines: Mapping[str, recordings.Outline],
        *,
        measure: bool = False,
    ) -> Completion:
        """Which requests of these recordings, by task fingerprint, are answered; with `measure`, how long answers were.

        Quick for finished models, however large: see `store.completion`. Raises StoreError.
        """
        return completion(self._weights(weights), resolution, outlines, measure=measure, alive=self._alive)

    def segments(self, weights: str) -> int:
        """How many segment files these weights have: the fewer, the quicker the store opens. Raises StoreError."""
        return sum(".jsonl" in name for name in self._names(f"weights/{weights}"))

    def compact(self, weights: str) -> Compacted:
        """Move what finished and dead writers have left into one part. Raises StoreError; nothing is lost then."""
        return compact(self._weights(weights), alive=self._alive)

    def ledger(self, weights: str, *, owner: Owner, segment: str = "") -> Ledger:
        """The claims on these weights; `segment` is the name of the writer that will store the answers."""
        return Ledger(self.claims_directory(weights), owner, segment=segment, alive=self._alive)

    def claims_directory(self, weights: str) -> Path:
        """Where the ledger of these weights is."""
        return self._weights(weights) / "claims"

    # --- scores ---

    def write_scores(self, run: str, scored: Sequence[ScoredSuite]) -> None:
        """Keep the scores of one scoring job. Raises StoreError."""
        scores.write_scores(self.path / "scores", run, scored)

    def read_scores(self, *, run: str | None = None, samples: bool = False) -> list[ScoredSuite]:
        """The latest scores of each run, model, label and suite, in the order of writing. Raises StoreError.

        Samples are read only when asked for: they hold every prompt and answer.
        """
        return scores.read_scores(self.path / "scores", run=run, samples=samples)

    # --- the whole ---

    def summary(self) -> list[WeightsSummary]:
        """What is stored for each weights fingerprint; reads every index. Raises StoreError."""
        return [self._summary(weights) for weights in self.weights()]

    def _summary(self, weights: str) -> WeightsSummary:
        directory = self._weights(weights)
        answers = Answers(directory, "0" * 16, alive=self._alive)
        with store_errors("list answers", directory):
            seen = listing(directory)
            size = 0
            for entry in os.scandir(directory):
                with contextlib.suppress(FileNotFoundError):
                    size += entry.stat().st_size
        counts = answers.counts
        return WeightsSummary(
            weights=weights,
            responses=counts.responses,
            aliases=counts.aliases,
            failures=counts.failures,
            duplicates=counts.duplicates,
            parts=len(seen.parts),
            segments=len(seen.segments),
            open_segments=sum(not sealed for sealed in seen.segments.values()),
            bytes=size,
            damage=tuple(answers.damage),
        )

    # --- where things are ---

    def _recording(self, fingerprint: str) -> Path:
        return self.path / "requests" / f"{check_name('task fingerprint', fingerprint)}.parquet"

    def _suite(self, id: str) -> Path:
        return self.path / "suites" / f"{check_name('suite id', id)}.json"

    def _weights(self, weights: str) -> Path:
        return self.path / "weights" / check_name("weights fingerprint", weights)

    def _make(self, name: str) -> None:
        with store_errors(f"write {name}", self.path / name):
            make_directory(self.path / name)

    def _names(self, folder: str) -> list[str]:
        with store_errors(f"list {folder}", self.path / folder):
            try:
                return sorted(name for name in os.listdir(self.path / folder) if not name.startswith("."))
            except FileNotFoundError:
                return []


def _check_marker(root: Path, data: bytes) -> None:
    try:
        marker = json.loads(data)
        version = marker["version"]
        known = marker["format"] == "proctor-store" and isinstance(version, int)
    except (ValueError, TypeError, KeyError):
        known, version = False, 0
    if not known:
        raise StoreError(f"{root} is not a store: its {_MARKER} says nothing that is understood")
    if version > FORMAT:
        raise StoreError(
            f"the store at {root} has format {version}, this Proctor reads up to {FORMAT}",
            hint="install a newer Proctor: `pip install --upgrade proctor-evals`",
        )
