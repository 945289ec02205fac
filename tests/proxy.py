"""A TCP proxy that corrupts data."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Flaw = Callable[[bytes], bytes]
"""What becomes of a piece of the stream; where it gets shorter, the connection is cut after it."""


@contextmanager
def proxy(port: int, *, requests: Flaw = bytes, responses: Flaw = bytes) -> Iterator[int]:
    """Run a proxy of 127.0.0.1:port during the block. Yields its port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as server:
                pump = threading.Thread(target=_pump, args=(self.request, server, requests), daemon=True)
                pump.start()
                _pump(server, self.request, responses)
                pump.join(10)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield int(listener.server_address[1])
        finally:
            listener.shutdown()


def _pump(source: socket.socket, to: socket.socket, flaw: Flaw) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            spoilt = flaw(piece)
            to.sendall(spoilt)
            if len(spoilt) < len(piece):
                break
    for end in (source, to):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
