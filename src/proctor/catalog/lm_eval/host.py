"""Child: imports lm-eval once, then answers jobs until nobody asks any more, each in a fork of its own.

    python -m proctor.catalog.lm_eval.host CONTROL

See `processes.hosting`. This process only imports and forks, so that every job finds random state, caches and modules
as they are after the imports, as it would in a process that was started for it.
"""

# lm-eval is not in the environment that the types are checked in.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from proctor.catalog.lm_eval import forks, index, prove, record, replay, session
from proctor.catalog.lm_eval.wire import answer_in
from proctor.processes.hosting import Host

ANSWERS: Final[Mapping[str, Callable[[Path, Any], Any]]] = {
    "proctor.catalog.lm_eval.index": index.main,
    "proctor.catalog.lm_eval.prove": prove.main,
    "proctor.catalog.lm_eval.record": record.main,
    "proctor.catalog.lm_eval.replay": replay.main,
}


def answer(message: Mapping[str, Any]) -> int:
    """One job, in a process of its own; its exit code."""
    session.heed_offline()
    return answer_in(Path(message["directory"]), ANSWERS[message["module"]])


def main(arguments: list[str]) -> NoReturn:
    """Serve on the descriptor that is named; ends the process."""
    forks.permits.share(len(os.sched_getaffinity(0)))
    Host.on(int(arguments[0]), answer).serve()
    # Nothing is left to be done, and taking thousands of modules down takes half a second.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
