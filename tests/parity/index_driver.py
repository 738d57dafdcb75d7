"""In lm-eval's environment: what it lists for a small library and for what is added to it, and what we make of both.

Arguments: the library and a directory that is added. Prints {whole, own, added}.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
import json
import sys
from pathlib import Path

from lm_eval.tasks import TaskManager
from lm_eval.tasks import manager as manager_module

from proctor.catalog.lm_eval import tasks

library, added = sys.argv[1:]
manager_module.__file__ = str(Path(library) / "manager.py")
index = TaskManager(include_path=[added]).task_index
print(
    json.dumps(
        {
            "whole": [tasks._row(name, entry) for name, entry in index.items()],
            "own": tasks.index_rows([], own=True),
            "added": tasks.index_rows([added], own=False),
        }
    )
)
