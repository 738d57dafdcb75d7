"""Entries of oellm's clusters.yaml, read as they are.

An entry has `hostname_pattern` and keys in capitals; `shared` holds keys of all entries. `{KEY}` in a value stands
for another key of the entry or a variable of the environment, and stays as it is where there is neither. Keys
that are not known here become environment variables of the job, as they do there.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any, Final

_TEMPLATE: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_HOSTS: Final = "hostname_pattern"
_PLAIN: Final = {
    "PARTITION": "partition",
    "ACCOUNT": "account",
    "QUEUE_LIMIT": "queue_limit",
    "GPUS_PER_NODE": "gpus_per_node",
    "SLURM_MEM": "memory",
    "CPUS_PER_TASK": "cpus",
}
_USED: Final = frozenset(
    {"EVAL_CONTAINER_IMAGE", "SINGULARITY_ARGS", "NODELIST", "NODES", "HF_HUB_OFFLINE", "TIME_LIMIT"}
)
"""Keys with a meaning of their own that are no plain field. TIME_LIMIT is not used there either: a job's limit is
computed. NODES is how many servers across nodes need, which a run says, not a site."""


def is_oellm(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is written with oellm's keys."""
    return _HOSTS in entry or any(key.isupper() for key in entry)


def translated(entry: Mapping[str, Any], shared: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The entry with a profile's keys; keys of a profile that it has already stay."""
    raw = {key: value for key, value in {**shared, **entry}.items() if key.isupper()}
    values = {key: _filled(value, raw, environ) for key, value in raw.items()}
    out = {key: value for key, value in entry.items() if not key.isupper() and key != _HOSTS}
    if _HOSTS in entry:
        out["hosts"] = entry[_HOSTS]
    for key, field in _PLAIN.items():
        if values.get(key) not in (None, ""):
            out[field] = values[key]
    base = str(values.get("EVAL_BASE_DIR") or "")
    if base:
        out["shared"] = [base]
    container = _container(values, base)
    if container:
        out["container"] = container
    if values.get("NODELIST"):
        out["sbatch"] = {"nodelist": values["NODELIST"]}
    if "HF_HUB_OFFLINE" in values:
        out["offline"] = str(values["HF_HUB_OFFLINE"]).lower() not in ("0", "false", "")
    variables = {k: str(v) for k, v in values.items() if k not in _PLAIN and k not in _USED and v is not None}
    return out | ({"env": variables} if variables else {})


def _container(values: Mapping[str, Any], base: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    image = str(values.get("EVAL_CONTAINER_IMAGE") or "")
    if image:
        out |= {"type": "singularity", "image": os.path.join(base, image) if "://" not in image else image}
    if values.get("SINGULARITY_ARGS"):
        out |= {"type": "singularity", "args": shlex.split(str(values["SINGULARITY_ARGS"]))}
    return out


def _filled(value: Any, raw: Mapping[str, Any], environ: Mapping[str, str], depth: int = 0) -> Any:
    if not isinstance(value, str) or depth > len(raw):
        return value

    def put(found: re.Match[str]) -> str:
        name = found[1]
        # As oellm has it: what the user exported goes before what the file says.
        if name in environ:
            return environ[name]
        return str(_filled(raw[name], raw, environ, depth + 1)) if name in raw else found[0]

    return _TEMPLATE.sub(put, value)
