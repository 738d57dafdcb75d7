"""How often Python looks for cyclic garbage in processes that hold very many records."""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 50_000
"""Objects made and not freed between two looks at the young ones. Python's own 700 make a worker with 10,000 requests
look all the time: a fifth of its CPU (`bench.client`). Records have no cycles; what little there is can wait."""


def collect_seldom() -> None:
    """For this process, from now on."""
    gc.set_threshold(YOUNG, 20, 20)
