"""A server of the tests' own: health, models, a key, and several ways to go wrong."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--name", default="default")
parser.add_argument("--model", default="")
parser.add_argument("--key-file")
parser.add_argument("--start-s", type=float, default=0.0)
parser.add_argument("--die", help="print this and exit with status 1")
parser.add_argument("--once", help="file: if it exists, die as above; else make it and serve")
parser.add_argument("--hang", action="store_true")
parser.add_argument("--no-models", action="store_true")
parser.add_argument("--child", action="store_true", help="start a child in a session of its own")
options = parser.parse_args()

print(f"serving {options.model!r}", flush=True)
if options.child:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
if options.hang:
    time.sleep(600)
time.sleep(options.start_s)
if options.die:
    print(options.die, flush=True)
    sys.exit(1)
KEY = open(options.key_file).read() if options.key_file else None


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {})
        elif KEY is not None and self.headers.get("Authorization") != f"Bearer {KEY}":
            self.answer(401, {"error": "wrong key"})
        elif self.path == "/v1/models" and not options.no_models:
            self.answer(200, {"object": "list", "data": [{"id": options.name, "owned_by": "mini"}]})
        elif self.path == "/version":
            self.answer(200, {"version": "1.5"})
        else:
            self.answer(404, {"error": "no such path"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wrong = KEY is not None and self.headers.get("Authorization") != f"Bearer {KEY}"
        self.answer(401 if wrong else 400, {"error": "wrong key" if wrong else "no such model"})

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
