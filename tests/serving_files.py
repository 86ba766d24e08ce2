"""A local HTTP server with ranges, which can stall, break off, ignore ranges or redirect, as servers do."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, has_body: bool) -> None:
        server, path = self.server, self.path
        server.asked.append((self.command, path, self.headers.get("Range")))
        fault = server.fault_of(self.command, path, self.headers.get("Range"))
        if fault == "stall":
            server.is_over.wait(60)
        if fault == "redirect":
            return self.head(302, {"Location": f"/moved{path}", "Content-Length": "0"})
        if isinstance(fault, int):
            return self.head(fault, {"Content-Length": "0"})
        file = Path(server.folder) / path.removeprefix("/moved").lstrip("/")
        if not file.is_file():
            return self.head(404, {"Content-Length": "0"})
        content = file.read_bytes()
        first, last = 0, len(content) - 1
        if (given := self.headers.get("Range")) and fault != "ignore ranges":
            first, last = (int(part) for part in given.removeprefix("bytes=").split("-"))
            last = min(last, len(content) - 1)
            about = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        else:
            given, about = None, {}
        self.head(206 if given else 200, {"Content-Length": str(last + 1 - first), **about})
        if has_body:
            body = content[first : last + 1]
            server.num_sent += len(body)
            self.wfile.write(body[: len(body) // 2] if fault == "break off" else body)
            self.close_connection = fault == "break off"
        return None

    def head(self, code: int, fields: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def served(folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """Serve a folder; `server.fault_of(command, path, range)` may be replaced, and `server.asked` lists requests."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.folder, server.asked, server.num_sent = True, folder, [], 0
    server.fault_of, server.is_over = lambda *_: None, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.is_over.set()
        server.shutdown()
        server.server_close()
