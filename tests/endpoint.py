"""An OpenAI-compatible endpoint in a thread: what tests give it to say, it says; what it was asked, it keeps."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], tuple[int, str]]
"""A request's JSON -> (HTTP status, the answer or the error's text)."""


class Endpoint:
    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []


@contextmanager
def endpoint(reply: Reply) -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.requests.append(asked)
            found.keys.append(self.headers.get("Authorization", ""))
            status, text = reply(asked)
            message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            body = {"choices": [message]} if status == 200 else {"error": {"message": text}}
            data = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", **body}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
