"""A TCP proxy that corrupts, cuts or answers connections."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Flaw = Callable[[bytes], bytes]
"""What becomes of a piece of the stream; where it gets shorter, the connection is cut after it. May raise Answer."""
Line = tuple[Flaw, Flaw]
"""The flaws of the requests and of the responses of one connection."""


class Answer(Exception):
    """Raised by a flaw of requests: the proxy sends this reply instead of the request, and closes the connection."""

    def __init__(self, reply: bytes) -> None:
        super().__init__(reply)
        self.reply = reply


@contextmanager
def proxy(port: int, *, requests: Flaw = bytes, responses: Flaw = bytes) -> Iterator[int]:
    """Run a proxy of 127.0.0.1:port during the block, whose connections share their flaws. Yields its port."""
    with proxy_of_lines(port, lambda: (requests, responses)) as own_port:
        yield own_port


@contextmanager
def proxy_of_lines(port: int, new_line: Callable[[], Line]) -> Iterator[int]:
    """Run a proxy of 127.0.0.1:port during the block. Each connection gets the flaws of a new line. Yields its port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            requests, responses = new_line()
            with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)) as server:
                pump = threading.Thread(target=_pump, args=(self.request, server, requests), daemon=True)
                pump.start()
                _pump(server, self.request, responses)
                pump.join(10)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 100

    with Server(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield int(listener.server_address[1])
        finally:
            listener.shutdown()


def _pump(source: socket.socket, to: socket.socket, flaw: Flaw) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            try:
                spoilt = flaw(piece)
            except Answer as answer:
                source.sendall(answer.reply)
                break
            to.sendall(spoilt)
            if len(spoilt) < len(piece):
                break
    for end in (source, to):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
