"""What a run needs on nodes without a network: files, listed where there is one and checked where there is none.

The quick check sees a file that is missing, cut, or another one, and damage at its beginning, middle or end. Only the
full one, which reads every byte, sees any damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from proctor.errors import ModelError, StoreError

DATA: Final = "data"
"""The kind of files that no worker reads."""
_AT_ONCE: Final = 8
"""Files that are read at a time: a parallel file system gives more than one stream."""
BLOCK: Final = 1 << 20
"""A file is compared by its size and its first, middle and last mebibyte: small ones whole, weights in milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One file."""

    kind: str
    """weights, tokenizer, adapter, recording or container; data: what only marking reads."""
    path: str
    size: int
    digest: str
    """See `sampled_digest`."""
    models: tuple[str, ...] = ()
    """Who needs it; empty: everybody."""
    source: str | None = None
    """Repository and commit, if it is from a hub."""
    sha256: str | None = None
    """Of the whole file, where it was asked for."""

    @classmethod
    def of(
        cls,
        path: Path,
        *,
        kind: str,
        models: Sequence[str] = (),
        source: str | None = None,
        sha256: str | None = None,
    ) -> Piece:
        """The file as it is now. Raises ModelError if it cannot be read."""
        try:
            return cls(
                kind=kind,
                path=str(path),
                size=path.stat().st_size,
                digest=sampled_digest(path),
                models=tuple(models),
                source=source,
                sha256=sha256,
            )
        except OSError as error:
            raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error

    def fault(self, *, full: bool = False) -> str | None:
        """What is wrong with the file here and now; `full`: reads all of it, where its whole checksum is known."""
        path = Path(self.path)
        try:
            size = path.stat().st_size
            if size != self.size:
                return f"has {size} bytes, not {self.size}"
            if sampled_digest(path) != self.digest:
                return "has other contents"
            if full and self.sha256 is not None and _sha256(path) != self.sha256:
                return "is damaged: its SHA-256 is another one"
            return None
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """All pieces of a run."""

    pieces: tuple[Piece, ...]
    full: bool = False
    """Whether those who check read every byte."""

    def check(self, model: str) -> None:
        """Raises ModelError that names every file which `model` needs and which is not as it was prepared."""
        needed = [p for p in self.pieces if p.kind != DATA and (not p.models or model in p.models)]
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            found = list(pool.map(partial(Piece.fault, full=self.full), needed))
        faults = [f"{p.kind} {p.path!r} {fault}" for p, fault in zip(needed, found, strict=True) if fault is not None]
        if faults:
            more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
            raise ModelError(
                f"what model {model!r} needs is not here as it was prepared: {'; '.join(faults[:_NAMED])}{more}",
                hint="repeat `proctor prepare` where there is a network, then `proctor submit`",
            )

    def to_json(self) -> str:
        """A JSON document."""
        return json.dumps({"version": 1, "full": self.full, "pieces": [asdict(p) for p in self.pieces]}, indent=1)

    @classmethod
    def read(cls, path: Path) -> Bundle | None:
        """None if there is no such file. Raises StoreError if it is damaged."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            pieces = tuple(Piece(**p | {"models": tuple(p["models"])}) for p in raw["pieces"])
            return cls(pieces=pieces, full=bool(raw.get("full", False)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"cannot read {str(path)!r}: {error}", hint="`proctor prepare` writes it again") from error


_NAMED: Final = 5


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_digest(path: Path) -> str:
    """SHA-256, in hexadecimal, of a file's size and its first, middle and last mebibyte. Raises OSError."""
    with path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        for start in _starts(size):
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _starts(size: int) -> Iterable[int]:
    if size <= 3 * BLOCK:
        return range(0, max(size, 1), BLOCK)
    return (0, (size - BLOCK) // 2, size - BLOCK)
