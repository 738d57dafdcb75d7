"""Stands for vLLM's API server with its routes for developers; started as an interpreter: `-m MODULE --model DIR ...`.

What it answers depends on the tensors that it holds. FAKE_RELOAD says what a reload really does.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from proctor.testing.answers import Answerer
from proctor.testing.openai_server import FakeServer
from proctor.testing.options import ServerOptions

Tensors = dict[str, bytes]


def write_weights(directory: Path, **tensors: bytes) -> None:
    """model.safetensors with these tensors of bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


def read_weights(directory: str) -> Tensors:
    data = (Path(directory) / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    places = {name: one["data_offsets"] for name, one in header.items() if name != "__metadata__"}
    return {name: data[8 + size + start : 8 + size + end] for name, (start, end) in places.items()}


class FakeVllm(FakeServer):
    """FAKE_RELOAD: right; nothing (the old weights come back); empty (it says that all went well, no more); same-path
    (the first checkpoint is loaded whatever is named); partly (one tensor stays empty); unseen (one tensor stays as it
    was, and no digest shows it); cache (answers that were given before are given again); refused (500); dies."""

    def __init__(self, options: ServerOptions, model: str, *, host: str, port: int) -> None:
        super().__init__(options, host=host, port=port)
        self._how = os.environ.get("FAKE_RELOAD", "right")
        self._first = model
        self._before: Tensors = {}
        self._memory: dict[bytes, Any] = {}
        self._hold(read_weights(model))

    def _hold(self, tensors: Tensors) -> None:
        self._tensors = tensors
        weights = hashlib.sha256(repr(sorted(tensors.items())).encode()).hexdigest()
        self.options = replace(self.options, weights=weights)
        self._answerer = Answerer(self.options)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "POST" and not request.path.startswith("/v1"):
            body = await request.read()
            return self._develop(request.path, orjson.loads(body) if body else {})
        if self._how == "cache" and request.path == "/v1/completions":
            return await self._remembered(request)
        return await super()._handle(request)

    async def _remembered(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        if b'"echo"' in body:
            return await super()._handle(request)
        if body not in self._memory:
            answer = await super()._handle(request)
            assert isinstance(answer, web.Response)
            self._memory[body] = answer.body
        return web.Response(body=self._memory[body], content_type="application/json")

    def _develop(self, path: str, body: dict[str, Any]) -> web.Response:
        if os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
            return web.Response(status=404)
        match path, body.get("action"):
            case "/weight_checker", "checksum":
                return web.json_response({"checksums": self._sums()})
            case "/weight_checker", "reset":
                self._before = dict(self._tensors)
                self._hold({name: bytes(len(data)) for name, data in self._tensors.items()})
            case "/collective_rpc", _:
                return self._reload(body["kwargs"]["weights_path"])
            case "/reset_prefix_cache", _:
                if self._how != "cache":
                    self._memory.clear()
                return web.json_response({"success": True})
        return web.json_response({})

    def _reload(self, path: str) -> web.Response:
        loaded = read_weights(path)
        match self._how:
            case "refused":
                return web.Response(status=500, text="no such method")
            case "dies":
                os._exit(1)
            case "empty":
                return web.json_response({"results": [None]})
            case "nothing":
                loaded = self._before
            case "same-path":
                loaded = read_weights(self._first)
            case "partly":
                loaded["b"] = bytes(len(loaded["b"]))
            case "unseen":
                loaded["b"] = self._before["b"]
        self._hold(loaded)
        return web.json_response({"results": [None]})

    def _sums(self) -> dict[str, str]:
        hidden = {"b"} if self._how == "unseen" else set()
        return {n: hashlib.sha256(b"" if n in hidden else data).hexdigest() for n, data in self._tensors.items()}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="module")
    for name in ("--model", "--host", "--served-model-name"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    told, _ = parser.parse_known_args()
    started = os.environ.get("FAKE_STARTS")
    if started is not None:
        with open(started, "a") as file:
            file.write(f"{Path(told.model).name}\n")
    name, key = told.served_model_name, os.environ["VLLM_API_KEY"]
    options = ServerOptions(served_model=name, api_key=key, end_share=0.0)  # `ignore_eos` is not known to the fake
    async with FakeVllm(options, told.model, host=told.host, port=told.port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
