"""The store: recordings, answers, claims and scores, on any POSIX shared file system."""

from proctor.store.answers import Answers, Counts
from proctor.store.claims import Claim, Ledger
from proctor.store.compaction import Compacted
from proctor.store.owner import Alive, Owner, alive
from proctor.store.recording import Requests
from proctor.store.rows import Damage
from proctor.store.scores import ScoredSuite
from proctor.store.store import Store, WeightsSummary
from proctor.store.writer import Writer

__all__ = [
    "Alive",
    "Answers",
    "Claim",
    "Compacted",
    "Counts",
    "Damage",
    "Ledger",
    "Owner",
    "Requests",
    "ScoredSuite",
    "Store",
    "WeightsSummary",
    "Writer",
    "alive",
]
