"""In lm-eval's environment: what it lists for a small library, for what is added to it, and for both together.

Arguments: the library and a directory that is added. Prints {whole, own, added}.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
import json
import sys
from pathlib import Path

from lm_eval.tasks import manager as manager_module

from proctor.catalog.lm_eval import tasks

library, added = sys.argv[1:]
manager_module.__file__ = str(Path(library) / "manager.py")
print(
    json.dumps(
        {
            "whole": tasks.index_rows([added], own=True),
            "own": tasks.index_rows([], own=True),
            "added": tasks.index_rows([added], own=False),
        }
    )
)
