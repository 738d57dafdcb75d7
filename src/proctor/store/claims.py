"""The ledger of claims: so that two runs do not ask the same thing at the same time.

Claims are numbered without gaps, and a number is taken by `link()`, which only one process can win. So claim
n was made by someone who had seen every claim below n, and grants nothing that a live one of them holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from proctor.errors import StoreError
from proctor.store.durable import GONE, make_directory, remove, store_errors, sync_directory, temporary
from proctor.store.keys import KeyArray, KeyTable, from_bytes, key_array, to_bytes
from proctor.store.owner import Alive, Owner, alive

HURRY_S: Final = 300.0
"""A claim that took longer from its listing to its link is given back: see `KEEP_S`."""
KEEP_S: Final = 3600.0
"""Finished claims stay this long, so that no one in time can link a number that was swept. Much more than HURRY_S."""

_POLL_FIRST_S: Final = 0.05
_POLL_LAST_S: Final = 5.0
_NAME: Final = re.compile(r"(\d{8,})\.claim(\.done|\.void)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a process may ask, and what others are asking already."""

    seq: int | None
    """None: nothing was granted, and there is nothing to finish."""
    granted: tuple[str, ...]
    deferred: dict[int, tuple[str, ...]]
    """By the number of the live claim that holds them."""


class Known(Protocol):
    """What `Ledger.claim` needs of `Answers`."""

    def refresh(self) -> None: ...

    def owed(self, keys: Sequence[str]) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The contents of a claim file."""

    owner: Owner
    segment: str
    """Name of the writer whose segments get the answers."""
    keys: KeyArray


class Ledger:
    """The claims on one model's requests. One per process; not for use by two tasks at a time."""

    def __init__(self, directory: Path, owner: Owner, *, segment: str = "", alive: Alive = alive) -> None:
        """`segment`: the name of the writer that will store the answers."""
        self._directory = directory
        self._owner = owner
        self._segment = segment
        self._alive = alive
        self._held: dict[int, Held] = {}
        self._mine: set[int] = set()

    async def claim(self, keys: Sequence[str], *, answers: Known | None = None) -> Claim:
        """Claim those of `keys` that no live claim holds.

        What an earlier claim has answered in the meantime is not to be asked again: with `answers`, they are
        refreshed and the grant is reduced to what is owed; without, the caller must do this before asking.
        Raises StoreError.
        """
        return await asyncio.to_thread(self._claim, keys, answers)

    async def finish(self, claim: Claim) -> None:
        """Say that nothing more will be asked under `claim`. What it has not answered may be claimed again."""
        if claim.seq is not None:
            await asyncio.to_thread(self._mark, claim.seq, "done")
            self._mine.discard(claim.seq)

    async def wait(self, seq: int, *, timeout_s: float | None = None) -> bool:
        """Wait until claim `seq` is finished or void; False if `timeout_s` passes first. Raises StoreError.

        ValueError for an unfinished claim of this very ledger, which nobody else would ever finish.
        """
        if seq in self._mine:
            raise ValueError(f"claim {seq} is our own and not finished")
        end = None if timeout_s is None else time.monotonic() + timeout_s
        pause = _POLL_FIRST_S
        while await asyncio.to_thread(self._is_live, seq):
            left = pause if end is None else min(pause, end - time.monotonic())
            if left <= 0:
                return False
            await asyncio.sleep(left)
            pause = min(pause * 1.5, _POLL_LAST_S)
        return True

    async def void(self, seq: int) -> None:
        """Declare the owner of claim `seq` dead where no machine can tell (a container or host that is gone).

        Whoever says so vouches for it: if the owner still runs, requests are asked twice.
        """
        await asyncio.to_thread(self._mark, seq, "void")

    async def sweep(self, *, keep_s: float = KEEP_S) -> int:
        """Delete old claims that are finished or void; how many. Raises StoreError.

        Only from the lowest number up to the first live or recent claim, and never the highest, so that a
        number is never used twice.
        """
        return await asyncio.to_thread(self._sweep, keep_s)

    async def unclaimed(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that no live claim holds now. Raises StoreError."""
        holder = _holders(key_array(keys), await self.live())
        return [keys[int(i)] for i in np.flatnonzero(holder < 0)]

    async def live(self) -> dict[int, Held]:
        """The claims that are neither finished nor void, by number. Raises StoreError."""
        return await asyncio.to_thread(self._live_now)

    # --- in a thread ---

    def _claim(self, keys: Sequence[str], answers: Known | None) -> Claim:
        wanted = key_array(keys)
        with store_errors("claim requests", self._directory):
            while True:
                began = time.clock_gettime(time.CLOCK_BOOTTIME)
                seq, mine, holder = self._take(wanted)
                if seq is None or time.clock_gettime(time.CLOCK_BOOTTIME) - began < HURRY_S:
                    break
                # This process was stopped in between, long enough for later claims to be finished and swept.
                self._mark(seq, "done")
        granted = [keys[int(i)] for i in mine]
        deferred: dict[int, list[str]] = {}
        for i in np.flatnonzero(holder >= 0):
            deferred.setdefault(int(holder[i]), []).append(keys[int(i)])
        if seq is not None:
            self._mine.add(seq)
        if answers is not None and granted:
            answers.refresh()
            granted = answers.owed(granted)
        return Claim(seq=seq, granted=tuple(granted), deferred={n: tuple(k) for n, k in deferred.items()})

    def _take(self, wanted: KeyArray) -> tuple[int | None, NDArray[np.int64], NDArray[np.int64]]:
        """The number taken, the positions granted under it, and for each position the claim that holds it or -1."""
        make_directory(self._directory)
        numbers, over = self._list()
        self._learn(numbers, over)
        seq = max(numbers, default=0) + 1
        while True:
            holder = _holders(wanted, self._live(over))
            mine = np.flatnonzero(holder < 0).astype(np.int64)
            if not len(mine):
                return None, mine, holder
            if self._link(seq, wanted[mine]):
                return seq, mine, holder
            # Somebody was faster: theirs is an earlier claim now.
            self._held[seq] = self._read(seq)
            seq += 1

    def _link(self, seq: int, keys: KeyArray) -> bool:
        """Put a claim in place under `seq`; False if the number is taken. Raises OSError."""
        path = self._path(seq)
        temp = temporary(path)
        data = to_bytes(keys)
        head = {
            "owner": self._owner.to_json(),
            "segment": self._segment,
            "keys": len(keys),
            "crc": zlib.crc32(data),
            "created": time.time(),
        }
        try:
            with temp.open("xb") as file:
                file.write(json.dumps(head).encode("ascii") + b"\n" + data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temp, path)
            except OSError as error:
                # A file server may do it, lose its answer, and refuse the repetition: the link count knows.
                if temp.stat().st_nlink != 2:
                    if error.errno == errno.EEXIST:
                        return False
                    raise
        finally:
            with contextlib.suppress(OSError):
                temp.unlink(missing_ok=True)
        sync_directory(self._directory)
        return True

    def _list(self) -> tuple[list[int], set[int]]:
        """The numbers of all claims, and of those that are finished or declared void. Raises OSError."""
        numbers: list[int] = []
        over: set[int] = set()
        for name in os.listdir(self._directory):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            if match[2]:
                over.add(int(match[1]))
            else:
                numbers.append(int(match[1]))
        return numbers, over

    def _learn(self, numbers: Iterable[int], over: set[int]) -> None:
        """Read the claims that are not over and not known yet, and forget those that are over."""
        listed = list(numbers)
        # A stale listing may miss one in the middle: all between the lowest and the highest were there once.
        for seq in range(min(listed, default=1), max(listed, default=0) + 1):
            if seq in over or seq in self._held:
                continue
            try:
                self._held[seq] = self._read(seq)
            except OSError as error:
                if error.errno not in GONE:
                    raise
        known = set(listed)
        for seq in list(self._held):
            # Swept ones are gone together with the mark that said they were over.
            if seq in over or (seq not in known and not self._path(seq).exists()):
                del self._held[seq]

    def _live(self, over: set[int]) -> dict[int, Held]:
        return {
            seq: held for seq, held in self._held.items() if seq not in over and self._alive(held.owner) is not False
        }

    def _live_now(self) -> dict[int, Held]:
        with store_errors("read claims", self._directory):
            if not self._directory.is_dir():
                return {}
            numbers, over = self._list()
            self._learn(numbers, over)
            there = set(numbers)
            return {seq: held for seq, held in self._live(over).items() if seq in there}

    def _is_live(self, seq: int) -> bool:
        with store_errors("read a claim", self._path(seq)):
            numbers, over = self._list()
            if seq in over or seq not in numbers:
                return False
            if seq not in self._held:
                self._held[seq] = self._read(seq)
            return self._alive(self._held[seq].owner) is not False

    def _read(self, seq: int) -> Held:
        """The claim with this number. Raises OSError, or StoreError if it is damaged."""
        path = self._path(seq)
        head_line, _, data = path.read_bytes().partition(b"\n")
        try:
            head = json.loads(head_line)
            if len(data) != 16 * head["keys"] or zlib.crc32(data) != head["crc"]:
                raise ValueError("its keys do not agree with their checksum")
            return Held(owner=Owner.from_json(head["owner"]), segment=head["segment"], keys=from_bytes(data, 16))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"claim {path} is damaged: {error}",
                hint=f"if no run uses this store now, `touch {path}.void` gives its requests back",
            ) from error

    def _mark(self, seq: int, how: str) -> None:
        path = self._path(seq)
        with store_errors("finish a claim", path):
            path.with_name(f"{path.name}.{how}").touch()

    def _sweep(self, keep_s: float) -> int:
        with store_errors("sweep claims", self._directory):
            if not self._directory.is_dir():
                return 0
            numbers, over = self._list()
            self._learn(numbers, over)
            live = self._live(over)
            count = 0
            now = time.time()
            for seq in sorted(numbers)[:-1]:
                path = self._path(seq)
                if seq in live or now - path.stat().st_mtime < keep_s:
                    break
                # The claim first: a marker without a claim is nothing, a claim without its marker would be live.
                for name in (path.name, f"{path.name}.done", f"{path.name}.void"):
                    remove(path.with_name(name))
                self._held.pop(seq, None)
                count += 1
            return count

    def _path(self, seq: int) -> Path:
        return self._directory / f"{seq:08d}.claim"


def _holders(wanted: KeyArray, live: dict[int, Held]) -> NDArray[np.int64]:
    """For each wanted key the lowest live claim that holds it; -1 where none does."""
    if not live:
        return np.full(len(wanted), -1, np.int64)
    numbers = np.concatenate([np.full(len(held.keys), seq, np.int64) for seq, held in live.items()])
    return KeyTable(np.concatenate([held.keys for held in live.values()]), numbers, numbers).find(wanted)
