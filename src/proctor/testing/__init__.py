"""The fakes that Proctor ships: an OpenAI-compatible server without a model, and a tokenizer for it.

Engines have their own fake (`engine: {type: fake}`, `infer.fake`). The server also runs as a program:
`python -m proctor.testing.server --help`.
"""

from proctor.testing.openai_server import FakeServer, prompt_digest
from proctor.testing.options import Faults, Latency, ServerOptions
from proctor.testing.tokenizer import write_byte_tokenizer

__all__ = ["FakeServer", "Faults", "Latency", "ServerOptions", "prompt_digest", "write_byte_tokenizer"]
