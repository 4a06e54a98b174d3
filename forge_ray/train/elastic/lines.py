"""JSON lines over a socket: how seats, their compute processes, agents and the coordinator speak to each other.

No pickle: what a process is told cannot run anything in it.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

Message = dict[str, Any]
LIMIT_BYTES = 16 << 20


class Lines:
    """One end of a connection. Messages come whole and in order; a broken connection reads as its end."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""

    def fileno(self) -> int:
        """For a selector."""
        return self.socket.fileno()

    def send(self, message: Message) -> bool:
        """Sends a message; false if the other end is gone."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[Message] | None:
        """What has come, after waiting for something; none at the end of the connection."""
        try:
            piece = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not piece or len(self._rest) > LIMIT_BYTES:
            return None
        *lines, self._rest = (self._rest + piece).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            return None

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
