"""Take xdist's group off the names of failed tests, so that `pytest --last-failed` without xdist finds them."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def plain(name: str) -> str:
    """`test_x.py::test_a[b]@group` → `test_x.py::test_a[b]`; an @ inside the brackets stays."""
    head, at, group = name.rpartition("@")
    return head if at and "]" not in group else name


if __name__ == "__main__":
    path = Path(sys.argv[1])
    if path.exists():
        path.write_text(json.dumps({plain(name): True for name in json.loads(path.read_text())}))
