"""What logs of real failures are taken for, and what lines of healthy logs are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from proctor.infer.servers.hints import CAUSES, find_cause, killed_hint

LINES = [
    ("OSError: [Errno 98] Address already in use", "port taken"),
    ("srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080", "port taken"),
    ("ERROR: [Errno 98] error while attempting to bind on address ('127.0.0.1', 8000): address already in use",
     "port taken"),
    ("api_server.py: error: unrecognized arguments: --max-modle-len 5", "unknown option"),
    ("api_server.py: error: argument --dtype: invalid choice: 'float33' (choose from auto, half)", "unknown option"),
    ("/usr/bin/python3: Error while finding module specification (ModuleNotFoundError: No module named 'vllm')",
     "missing module"),
    ("ImportError: libcudart.so.12: cannot open shared object file: No such file or directory", "missing module"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB", "GPU out of memory"),
    ("ValueError: Free memory on device (3.1/79.2 GiB) on startup is less than desired GPU memory utilization",
     "GPU out of memory"),
    ("ValueError: The model's max seq len (131072) is larger than the maximum number of tokens that can be stored "
     "in KV cache (35568).", "window larger than the KV cache"),
    ("ValueError: To serve at least one request with the models's max seq len (8192), (1.0 GiB KV cache is needed, "
     "which is larger than the available KV cache memory (0.4 GiB)", "window larger than the KV cache"),
    ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
     "window larger than the KV cache"),
    ("ValueError: User-specified max_model_len (99999) is greater than the derived max_model_len "
     "(max_position_embeddings=2048)", "window larger than the model's"),
    ("ValueError: Total number of attention heads (9) must be divisible by tensor parallel size (2).",
     "heads not divisible"),
    ("llama_model_load: error loading model: unknown model architecture: 'brandnew'", "unknown architecture"),
    ("ValueError: Model architectures ['FooForCausalLM'] are not supported for now.", "unknown architecture"),
    ("ValueError: The repository x contains custom code which must be executed to correctly load the model. Please "
     "pass the argument `trust_remote_code=True`", "unknown architecture"),
    ("gguf_init_from_reader: failed to read key-value pairs", "damaged weights"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
     "damaged weights"),
    ("gguf_init_from_file: failed to open GGUF file '/x.gguf' (No such file or directory)", "weights not found"),
    ("OSError: /models/x does not appear to have a file named config.json.", "weights not found"),
    ("huggingface_hub.errors.GatedRepoError: 401 Client Error.", "hub refused"),
    ("OSError: [Errno 28] No space left on device", "no space"),
    ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
     "out of memory"),
    ("terminate called after throwing an instance of 'std::bad_alloc'", "out of memory"),
    ("RuntimeError: No CUDA GPUs are available", "no GPU"),
    ("/bin/sh: 1: my-server: not found", "program not found"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "name"), LINES)
def test_cause_of_a_line(line: str, name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"INFO starting\n(EngineCore_0 pid=12) {line}\nbye\n" if name != "program not found" else line)
    cause = find_cause(log)
    assert cause is not None
    assert cause.name == name


HEALTHY = """\
INFO 11-21 05:13:01 [utils.py:253] non-default args: {'port': 41, 'max_model_len': 2048, 'trust_remote_code': False}
INFO 11-21 [core.py:93] Initializing a V1 LLM engine with config: model='/m', trust_remote_code=False
WARNING 11-21 [cpu.py:150] VLLM_CPU_KVCACHE_SPACE not set. Using 4 GiB for the KV cache.
WARNING 11-21 [interface.py:221] Failed to import from vllm._C: ModuleNotFoundError("No module named 'vllm._C'")
INFO 11-21 [model.py:514] Resolved architecture: LlamaForCausalLM
INFO 11-21 [shm_broadcast.py:285] vLLM message queue communication handle: using /dev/shm
INFO:     Application startup complete.
"""


def test_a_healthy_log_shows_no_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(HEALTHY)
    assert find_cause(log) is None
    assert find_cause(tmp_path / "absent") is None


def test_the_root_cause_wins_over_its_consequences(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "torch.OutOfMemoryError: CUDA out of memory.\nRuntimeError: Engine core initialization failed.\n"
        "ImportError: cannot clean up\n"
    )
    cause = find_cause(log)
    assert cause is not None
    assert cause.name == "GPU out of memory"


def test_every_cause_has_a_line_or_is_the_fallback() -> None:
    tested = {name for _, name in LINES}
    assert {cause.name for cause in CAUSES} - tested == {"shared memory", "model not loaded"}


def test_exit_status_alone() -> None:
    assert "out of memory" in (killed_hint(137) or "")
    assert "signal 11" in (killed_hint(139) or "")
    assert killed_hint(1) is None
    assert killed_hint(None) is None
