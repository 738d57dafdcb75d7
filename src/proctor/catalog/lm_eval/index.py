"""Child: every name that lm-eval knows. Job: {include_path}. Result: {version, metadata, rows}."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proctor.catalog.lm_eval.session import metadata, version
from proctor.catalog.lm_eval.tasks import index_rows
from proctor.catalog.lm_eval.wire import serve


def main(_directory: Path, job: Mapping[str, Any]) -> Any:
    """List everything."""
    return {"version": version(), "metadata": metadata(), "rows": index_rows(job["include_path"])}


if __name__ == "__main__":
    serve(main)
