"""Child: every name that lm-eval knows. Job: {include_path, own}. Result: {version, metadata, own, added}.

`own`: rows of lm-eval's own tasks, where the job asks for them; `added`: those of `include_path`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proctor.catalog.lm_eval.session import metadata, version
from proctor.catalog.lm_eval.tasks import index_rows
from proctor.catalog.lm_eval.wire import serve


def main(_directory: Path, job: Mapping[str, Any]) -> Any:
    """List everything."""
    return {
        "version": version(),
        "metadata": metadata(),
        "own": index_rows([], own=True) if job["own"] else None,
        "added": index_rows(job["include_path"], own=False),
    }


if __name__ == "__main__":
    serve(main)
