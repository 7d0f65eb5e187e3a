"""An HTTP server on the device: send it an image, and it answers what the current release sees.

    python3 server.py ~/.toolkit --port 8000
    curl --data-binary @image.png http://localhost:8000/

It takes up another release when `current` moves, without a restart. docs/applications.md explains it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_MOST_BYTES = 32 << 20  # of an image file


class Handler(BaseHTTPRequestHandler):
    """Answers a POST of an image with its classes, and a GET with what is being served."""

    protocol_version = "HTTP/1.1"  # connections are kept
    model = None  # of main()

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MOST_BYTES:
            self.close_connection = True  # what it sends is not read
            self.answer(413, {"error": f"send an image with its Content-Length, at most {_MOST_BYTES:,} bytes"})
            return
        try:
            answer = self.model.predict([self.rfile.read(int(length))])
        except ValueError as problem:
            self.answer(400, {"error": str(problem)})
            return
        (best,) = answer.top(5)
        classes = [{"class": name, "score": score} for name, score in best]
        self.answer(200, {"release": answer.release, "classes": classes})

    def do_GET(self):
        self.answer(200, {"release": self.model.release, "input_shape": self.model.input_shape})

    def answer(self, status, document):
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Do not log every request."""


def main():
    """Serve until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of releases on this device")
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on (default: this device alone)")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    root = str(Path(options.root).expanduser())

    sys.path.insert(0, root + "/current/agent.pyz")
    from toolkit_agent import load

    Handler.model = load(root + "/current")
    server = ThreadingHTTPServer((options.address, options.port), Handler)
    print(f"serving on http://{options.address}:{server.server_port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
