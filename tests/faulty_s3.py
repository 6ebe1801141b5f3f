"""An object store on a bad day: a proxy on loopback that lets one request in ten fail."""

from __future__ import annotations

import itertools
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = {"503": ("503 SlowDown",), "cut": ("cut request", "cut answer")}
"""What may happen to a request, by mode."""

_PIECE_BYTES = 1 << 18
_OF_ONE_CONNECTION = {"connection", "expect", "keep-alive", "transfer-encoding"}


def random_faults(mode: str, rate: float, seed: int) -> Iterator[str]:
    """For each request its fault (see `FaultyS3`), or "" for none."""
    chance = random.Random(seed)
    while True:
        yield chance.choice(FAULTS[mode]) if chance.random() < rate else ""


class FaultyS3(ThreadingHTTPServer):
    """Forwards requests to the object store at `upstream`, but for those that `faults` spoils.

    "503 SlowDown", and any other status and code: so answered, and not forwarded.
    "cut request": the connection ends half way through the request's body. Nothing is forwarded:
    no store keeps half an object. A request without a body has its answer cut.
    "cut answer": the request is carried out, and the connection ends half way through the body of
    the answer; before an answer without a body, whose reader then cannot know what became of it.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        upstream: str,
        faults: Iterator[str],
        handler: type[BaseHTTPRequestHandler] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler or Forward)
        at = urlsplit(upstream)
        self.upstream = (at.hostname or "", at.port or 80)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests = 0
        self.injected: Counter[str] = Counter()
        self.errors: list[str] = []
        self._faults = faults
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Take no more connections."""
        self.shutdown()
        self.server_close()

    def plan(self, faults: Iterable[str]) -> None:
        """From now on the next requests meet exactly these `faults`, and later ones none."""
        with self._lock:
            self._faults = itertools.chain(faults, itertools.repeat(""))

    def next_fault(self, method: str, path: str) -> str:
        """The fault of one more request."""
        with self._lock:
            self.requests += 1
            return next(self._faults)

    def injecting(self, fault: str) -> None:
        """Count `fault`."""
        with self._lock:
            self.injected[fault] += 1

    def turn(self, conditional: bool) -> AbstractContextManager[object]:
        # S3 decides conditional writes one after the other. moto looks first and writes later,
        # with nothing to keep two of its threads apart.
        return self._one_at_a_time if conditional else nullcontext()

    def handle_error(self, request: object, client_address: object) -> None:
        # A client may hang up whenever it likes; anything else is a bug here.
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.errors.append(repr(error))


class Forward(BaseHTTPRequestHandler):
    server: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        fault = self.server.next_fault(self.command, self.path)
        if fault == "cut request" and not self._has_body:
            fault = "cut answer"
        if fault:
            self.server.injecting(fault)
        if fault == "cut request":
            self._read_half()
        elif fault in ("", "cut answer"):
            with self.server.turn("If-None-Match" in self.headers):
                self._carry_out(cut=fault != "")
        else:
            self._refuse(*fault.split())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def _refuse(self, status: str, code: str) -> None:
        for _ in self._body():
            pass
        reason = f"<Error><Code>{code}</Code><Message>As planned.</Message></Error>".encode()
        self.send_response_only(int(status), code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(reason)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reason)

    def _read_half(self) -> None:
        # To close a socket with unread bytes resets the connection.
        self.close_connection = True
        left = int(self.headers.get("Content-Length", 2)) // 2
        for piece in self._body():
            left -= len(piece)
            if left <= 0:
                return

    def _carry_out(self, *, cut: bool) -> None:
        with socket.create_connection(self.server.upstream) as upstream:
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            upstream.sendall(self._head())
            for piece in self._body():
                upstream.sendall(piece)
            with HTTPResponse(upstream, method=self.command) as answer:
                answer.begin()
                if cut:
                    self.close_connection = True
                    if not answer.length:
                        return
                self._send_back(answer, cut=cut)

    def _send_back(self, answer: HTTPResponse, *, cut: bool) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _OF_ONE_CONNECTION:
                self.send_header(name, value)
        chunked = answer.length is None
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        left = answer.length // 2 if cut and answer.length else None
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while left != 0 and (size := answer.readinto(buffer[:left])):
            if chunked:
                self.wfile.write(b"%x\r\n%b\r\n" % (size, buffer[:size]))
            else:
                self.wfile.write(buffer[:size])
            left = None if left is None else left - size
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _head(self) -> bytes:
        lines = [self.requestline, "Connection: close"]
        if self._is_chunked:
            lines.append("Transfer-Encoding: chunked")
        for name, value in self.headers.items():
            if name.lower() not in _OF_ONE_CONNECTION:
                lines.append(f"{name}: {value}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    @property
    def _is_chunked(self) -> bool:
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    @property
    def _has_body(self) -> bool:
        return self._is_chunked or int(self.headers.get("Content-Length", 0)) > 0

    def _body(self) -> Iterator[bytes | memoryview]:
        """The body as it comes, the frames of its chunks included."""
        if not self._is_chunked:
            yield from self._exactly(int(self.headers.get("Content-Length", 0)))
            return
        while size := int((line := self.rfile.readline()).split(b";")[0], 16):
            yield line
            yield from self._exactly(size + len(b"\r\n"))
        yield line
        while (line := self.rfile.readline()).strip():
            yield line
        yield b"\r\n"

    def _exactly(self, left: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(left, _PIECE_BYTES)))
        while left:
            size = self.rfile.readinto1(buffer[:left])
            if not size:
                raise ConnectionResetError("the client has hung up")
            yield buffer[:size]
            left -= size
