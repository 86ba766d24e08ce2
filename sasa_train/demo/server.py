"""The page's server: three files and one question, over HTTP, for browsers on this machine."""

import errno
import ipaddress
import json
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from sasa_train.refusal import ConfigError, ExpectedFailure
from sasa_train.terminal import printable, warn

if TYPE_CHECKING:
    from sasa_train.demo.answers import Demo

FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
# The page can load nothing from elsewhere, and no other page can show it in a frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NUM_PORTS = 100  # to try in search of a free one


class Server(ThreadingHTTPServer):
    """Listens from its creation; `demo` must be set before `serve_forever`."""

    demo: "Demo"

    def __init__(self, host: str, port: int):
        self.address_family = family(host, port)
        self.host = host
        super().__init__((host, port), Page)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would look up this machine's name, which can take seconds
        self.server_name, self.server_port = self.host, self.socket.getsockname()[1]

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):  # a browser that went away
            super().handle_error(request, client_address)


def family(host: str, port: int) -> int:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]


def listen(host: str, port: int) -> Server:
    """Return a server that listens on a port of `host`; 0 chooses a free one.

    Raises:
        ConfigError: the host is not an address of this machine, or the port is taken or not allowed.
    """
    try:
        return Server(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where = f"--host {printable(host)} --port {port}"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ConfigError(f"{where}: the port is taken; add --port {next_free(host, port)}") from error
        if isinstance(error, PermissionError):
            raise ConfigError(f"{where}: {reason}; a port from 1024 is allowed to all") from error
        raise ConfigError(f"{where}: {reason}; the host must be an address of this machine") from error


def next_free(host: str, port: int) -> int:
    """Return the next free port, or 0, which takes any, if there is none among the next NUM_PORTS."""
    for candidate in range(port + 1, min(port + NUM_PORTS, 65535) + 1):
        try:
            Server(host, candidate).server_close()
            return candidate
        except OSError:
            continue
    return 0


class Page(BaseHTTPRequestHandler):
    """Answers one request; errors are JSON objects with an `error`."""

    server: Server
    timeout = 60  # seconds to wait for a browser to send

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._is_for_us():
            return
        if path == "/model":
            self._send_json(HTTPStatus.OK, self.server.demo.about())
        elif path in FILES:
            name, kind = FILES[path]
            self._send(HTTPStatus.OK, (resources.files("sasa_train.demo") / name).read_bytes(), kind)
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"there is no {path}"})

    def do_POST(self) -> None:
        """Answer /look?row=R&column=C, whose body is an image file."""
        if not self._is_for_us():
            return
        try:
            pixel, length = self._question()
            code, found = HTTPStatus.OK, self.server.demo.look(self.rfile.read(length), pixel)
        except Refusal as error:
            code, found = error.code, {"error": str(error)}
        except ConfigError as error:
            code, found = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except ExpectedFailure as error:
            code, found = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}
            warn(printable(error))
        self._send_json(code, found)

    def _question(self) -> tuple[tuple[int, int] | None, int]:
        """Return the pixel (None: the centre) and the length of the body in bytes."""
        from sasa_train.demo.answers import MAX_BYTES

        parts = urlsplit(self.path)
        if parts.path != "/look":
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is no {parts.path}")
        given = parse_qs(parts.query)
        texts = [given.get(name, [""])[-1] for name in ("row", "column")]
        if any(texts) and not all(text.isdecimal() and len(text) < 10 for text in texts):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"row={texts[0]} and column={texts[1]} must be whole numbers")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, f"Content-Length={length} must be the file's size in bytes")
        if len(length) > 18 or int(length) > MAX_BYTES:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"has {length} bytes; at most {MAX_BYTES:,} are taken")
        return (int(texts[0]), int(texts[1])) if any(texts) else None, int(length)

    def _is_for_us(self) -> bool:
        """Refuse, on the loopback address, a request to another host's name, with which a web page could reach us."""
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            name = None
        is_local = ipaddress.ip_address(str(self.server.server_address[0])).is_loopback  # however the host was written
        if not is_local or name in (*LOOPBACK, self.server.host.lower()):
            return True
        error = f"Host {name} must be one of {', '.join(LOOPBACK)}; sasa-demo --host ADDRESS answers to any name"
        self._send_json(HTTPStatus.FORBIDDEN, {"error": error})
        return False

    def _send_json(self, code: HTTPStatus, found: dict[str, Any]) -> None:
        self._send(code, json.dumps(found).encode(), "application/json")

    def _send(self, code: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(code)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body), "Cache-Control": "no-store"}
        headers |= {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print no line per request."""


class Refusal(Exception):
    """Raised for a request that has no answer; `code` is its HTTP status."""

    def __init__(self, code: HTTPStatus, why: str):
        super().__init__(why)
        self.code = code
