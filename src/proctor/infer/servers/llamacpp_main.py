"""The llama.cpp server process: python -m proctor.infer.servers.llamacpp_main OPTIONS_JSON

Needs xllamacpp and the standard library only. The API key comes through the environment. Exit status 1 and
one line on standard error when the model cannot be served.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from importlib.metadata import version
from typing import Any


def main(options: dict[str, Any]) -> int:
    # The library's threads meet at a barrier hundreds of times a token and, by default, spin there: beside other
    # processes on the same cores a token took ten times as long. Read when the library is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        xllamacpp: Any = importlib.import_module("xllamacpp")
    except ImportError as error:
        sys.stderr.write(f"No module named xllamacpp in {sys.executable}: {error}\n")
        return 1
    sys.stderr.write(f"xllamacpp {version('xllamacpp')}\n")
    params: Any = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.model_alias = {options["name"]}
    params.hostnames = [options["host"]]
    params.port = options["port"]
    params.n_parallel = options["slots"]
    params.n_ctx = options["context"] * options["slots"]
    params.cpuparams.n_threads = options["threads"]
    params.cpuparams_batch.n_threads = options["threads"]
    # Its threads spin while they wait for each other; beside any other process on the same cores, ours included,
    # that made scoring eight times slower.
    params.cpuparams.poll = 0
    params.cpuparams_batch.poll = 0
    params.endpoint_metrics = True
    params.ui = False
    # llama.cpp would otherwise shrink the context to what it guesses to fit, and answer with less.
    params.fit_params = False
    key = os.environ.pop("PROCTOR_LLAMACPP_KEY", "")
    if key:
        params.api_keys = [key]
    for name, value in options["args"].items():
        _assign(params, name, value)
    # Blocked before the server's threads start, so that they inherit it and sigwait below gets the signal.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        server: Any = xllamacpp.Server(params)
    except RuntimeError as error:
        sys.stderr.write(f"llama.cpp: failed to load model {options['model']!r}: {error}\n")
        return 1
    sys.stderr.write(f"listening on {server.listening_address}\n")
    signal.sigwait(ends)
    # Not `del server`: its orderly end waits for running generations, which nobody wants any more.
    sys.stderr.flush()
    os._exit(0)


def _assign(params: Any, name: str, value: Any) -> None:
    target, *path = [params, *name.replace("-", "_").split(".")]
    for part in path[:-1]:
        target = getattr(target, part)
    if not hasattr(target, path[-1]):
        sys.exit(f"unknown option {name!r}: CommonParams has no parameter of that name")
    setattr(target, path[-1], value)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
