"""The store: recordings, answers, claims and scores, on any POSIX shared file system."""

from proctor.store.answers import Answers
from proctor.store.owner import Alive, Owner, alive
from proctor.store.rows import Damage
from proctor.store.store import Store
from proctor.store.writer import Writer

__all__ = ["Alive", "Answers", "Damage", "Owner", "Store", "Writer", "alive"]
