"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LIMIT_S = 400.0


def wait_for(what: str, ready: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """Polls until `ready` gives something true, and returns it."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if found := ready():
            return found
        time.sleep(0.02)
    raise AssertionError(f"timed out waiting for {what}")
