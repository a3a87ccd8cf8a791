"""An HTTP server in the place of a pipeline's frontend."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launch.ports import LOOPBACK

MODELS = {"object": "list", "data": [{"id": "toy"}]}


@contextmanager
def server(answer: Callable[[dict[str, Any]], tuple[int, bytes]]) -> Iterator[str]:
    """An HTTP server that knows a model and answers every question alike; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, json.dumps(MODELS).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(*answer(json.loads(body)))

        def reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{listening.server_port}"
        finally:
            listening.shutdown()
            thread.join()
