"""HTTP connections: a time limit for receiving a request, and problem details for what is not HTTP."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.errors import problem


class Connection(H11Protocol):
    """A connection that is closed if a request does not arrive completely in time, header and body together.

    Without the limit, clients that send a request slowly, or none, could hold all connections that the process may
    have. uvicorn limits only the time between two requests.
    """

    def __init__(self, *arguments: Any, request_seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._request_seconds = request_seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_deadline()

    def _update_deadline(self) -> None:
        """Start the deadline if the next bytes belong to a request, and end it if none is being received."""
        state = self.conn.their_state
        is_between_requests = self.timeout_keep_alive_task is not None
        if state is h11.SEND_BODY or (state is h11.IDLE and not is_between_requests):
            if self._deadline is None:
                self._deadline = self.loop.call_later(self._request_seconds, self._expire)
        else:
            self._cancel_deadline()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        received, _ = self.conn.trailing_data
        if self.conn.their_state is h11.IDLE and not received:  # a client that has sent nothing expects no response
            self.transport.close()
        else:
            detail = f"expected the whole request within {self._request_seconds:g} seconds"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", detail)

    def send_400_response(self, msg: str) -> None:
        """Refuse a message that is not HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, "malformed_http", msg)

    def _refuse(self, status: HTTPStatus, code: str, detail: str) -> None:
        """Close the connection, with this response unless the application's response has started."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # the application is not to send another response

        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = problem(status, code, detail, headers={"Connection": "close"})
            head = h11.Response(status_code=status, headers=response.raw_headers, reason=status.phrase.encode())
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
