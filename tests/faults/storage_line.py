"""Faults of an S3 server, in the proxy in front of it."""

from __future__ import annotations

import random
import threading
import time

from tests.proxy import Answer, Line

_REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_SLOW_SECONDS = 0.3


class StorageFaults:
    """What goes wrong between clients and the S3 server. Nothing at first.

    Attributes:
        refuse: The probability that a request is answered with 503.
        cut: The probability that a piece of a response is cut in the middle.
        slow: The probability that a piece waits for a moment.
        count: The number of faults so far.
    """

    def __init__(self) -> None:
        self.refuse = 0.0
        self.cut = 0.0
        self.slow = 0.0
        self.count = 0
        self._replies_to_lose = 0
        self._lock = threading.Lock()
        self._dice = random.Random()

    def lose_replies(self, puts: int, dice: random.Random) -> None:
        """Lose the replies to the next uploads, which reach the server."""
        self._replies_to_lose = puts
        self._dice = dice

    def begin(self, dice: random.Random, *, refuse: float = 0.0, cut: float = 0.0, slow: float = 0.0) -> None:
        """Make faults with these probabilities from now on."""
        self._dice = dice
        self.refuse = refuse
        self.cut = cut
        self.slow = slow

    def end(self) -> None:
        """Make no more faults."""
        self._replies_to_lose = 0
        self.begin(self._dice)

    def new_line(self) -> Line:
        """The flaws of one connection."""
        loses_reply = threading.Event()

        def request(piece: bytes) -> bytes:
            if self._happens(self.slow):
                time.sleep(_SLOW_SECONDS)
            if piece.startswith((b"PUT ", b"GET ", b"HEAD ")) and self._happens(self.refuse):
                raise Answer(_REFUSAL)
            if piece.startswith(b"PUT ") and self._takes_reply():
                loses_reply.set()
            return piece

        def response(piece: bytes) -> bytes:
            if loses_reply.is_set():
                return b""
            if self._happens(self.cut):
                return piece[: len(piece) // 2]
            return piece

        return request, response

    def _happens(self, probability: float) -> bool:
        if probability == 0:
            return False
        with self._lock:
            happens = self._dice.random() < probability
            self.count += happens
            return happens

    def _takes_reply(self) -> bool:
        with self._lock:
            if self._replies_to_lose == 0:
                return False
            self._replies_to_lose -= 1
            self.count += 1
            return True
