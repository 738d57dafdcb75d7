"""Claims on requests: who holds them, whether that attempt still runs, and giving back what a dead one holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proctor.api.context import RunContext
from proctor.errors import MissingTool, UnknownName, UsageError
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.store import Ledger, Owner, Store
from proctor.store.owner import alive
from proctor.worker.attempt import alive_with

__all__ = ["HeldClaim", "claims", "void_claims"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldClaim:
    """One claim that nobody has finished."""

    attempt: str
    """Job, array task and restart count, such as 4711_3.0; or host and process, such as node7:1234."""
    user: str
    run: str
    host: str
    weights: str
    number: int
    requests: int
    alive: bool | None
    """Whether that attempt runs. False: others take its requests over by themselves. None: nobody here can tell."""


def claims(config: str | Path, overrides: Sequence[str] = ()) -> list[HeldClaim]:
    """Every claim in the store of the run that nobody has finished; of other runs too. Blocks.

    Raises StoreError; Unreachable, LaunchError where a scheduler that has to be asked does not answer.
    """
    return asyncio.run(_claims(RunContext.open(config, overrides).store(create=False)))


def void_claims(config: str | Path, attempt: str, overrides: Sequence[str] = ()) -> list[HeldClaim]:
    """Declare that the attempt is dead, for whoever calls vouches: what its claims hold may be asked again.

    A mark is added to each claim; none is removed. Returns them. Raises UsageError for an attempt that is known to run,
    UnknownName for one that holds nothing; and as `claims` does. Blocks.
    """
    store = RunContext.open(config, overrides).store(create=False)
    return asyncio.run(_void(store, attempt))


async def _claims(store: Store) -> list[HeldClaim]:
    held = [
        (weights, seq, one.owner, len(one.keys))
        for weights in store.weights()
        for seq, one in sorted((await _ledger(store, weights).live()).items())
    ]
    says = await asyncio.to_thread(_predicate, [owner for _, _, owner, _ in held])
    return [
        HeldClaim(
            attempt=owner.attempt,
            user=owner.user,
            run=owner.run,
            host=owner.host,
            weights=weights,
            number=seq,
            requests=count,
            alive=await asyncio.to_thread(says, owner),
        )
        for weights, seq, owner, count in held
    ]


async def _void(store: Store, attempt: str) -> list[HeldClaim]:
    there = await _claims(store)
    meant = [one for one in there if one.attempt == attempt]
    if not meant:
        known = list(dict.fromkeys(one.attempt for one in there))
        raise UnknownName.among("attempt with claims", attempt, known, hint="`proctor claims CONFIG` lists them")
    if any(one.alive for one in meant):
        raise UsageError(
            f"attempt {attempt} of run {meant[0].run!r} on {meant[0].host} runs: its claims stay",
            hint="end it first (`proctor cancel`, scancel, or by its process id); then nothing else has to be done",
        )
    for one in meant:
        await _ledger(store, one.weights).void(one.number)
    return meant


def _ledger(store: Store, weights: str) -> Ledger:
    """All claims that are not finished, also of the dead."""
    return Ledger(store.claims_directory(weights), Owner.here(), alive=lambda _: None)


def _predicate(owners: Sequence[Owner]) -> Callable[[Owner], bool | None]:
    if not any(owner.job for owner in owners):
        return alive
    try:
        scheduler = SlurmScheduler.connect()
    except MissingTool as error:
        raise UsageError(
            "jobs of a cluster hold claims in this store, and Slurm cannot be asked from here",
            hint="repeat the command on a login node of the cluster",
        ) from error
    says = alive_with(scheduler)

    def asked(owner: Owner) -> bool | None:
        word = says(owner)
        if scheduler.attempts.failure is not None:
            raise scheduler.attempts.failure
        return word

    return asked
