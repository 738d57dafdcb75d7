"""What a run needs on nodes without a network: files, listed where there is one and checked where there is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from proctor.errors import ModelError, StoreError

BLOCK: Final = 1 << 20
"""A file is compared by its size and its first, middle and last mebibyte: small ones whole, weights in milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One file."""

    kind: str
    """weights, tokenizer, recording or container."""
    path: str
    size: int
    digest: str
    """See `sampled_digest`."""
    models: tuple[str, ...] = ()
    """Who needs it; empty: everybody."""

    @classmethod
    def of(cls, path: Path, *, kind: str, models: Sequence[str] = ()) -> Piece:
        """The file as it is now. Raises ModelError if it cannot be read."""
        try:
            return cls(
                kind=kind, path=str(path), size=path.stat().st_size, digest=sampled_digest(path), models=tuple(models)
            )
        except OSError as error:
            raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error

    def fault(self) -> str | None:
        """What is wrong with the file here and now."""
        path = Path(self.path)
        try:
            size = path.stat().st_size
            if size != self.size:
                return f"has {size} bytes, not {self.size}"
            return None if sampled_digest(path) == self.digest else "has other contents"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """All pieces of a run."""

    pieces: tuple[Piece, ...]

    def check(self, model: str) -> None:
        """Raises ModelError that names every file which `model` needs and which is not as it was prepared."""
        faults = [
            f"{p.kind} {p.path!r} {fault}"
            for p in self.pieces
            if (not p.models or model in p.models) and (fault := p.fault()) is not None
        ]
        if faults:
            more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
            raise ModelError(
                f"what model {model!r} needs is not here as it was prepared: {'; '.join(faults[:_NAMED])}{more}",
                hint="repeat `proctor prepare` where there is a network, then `proctor submit`",
            )

    def to_json(self) -> str:
        """A JSON document."""
        return json.dumps({"version": 1, "pieces": [asdict(p) for p in self.pieces]}, indent=1)

    @classmethod
    def read(cls, path: Path) -> Bundle | None:
        """None if there is no such file. Raises StoreError if it is damaged."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(pieces=tuple(Piece(**p | {"models": tuple(p["models"])}) for p in raw["pieces"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"cannot read {str(path)!r}: {error}", hint="`proctor prepare` writes it again") from error


_NAMED: Final = 5


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
