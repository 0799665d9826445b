"""A way to the attention of host modules that never pass transformer_options on, so that no override reaches it.

While a text module of such a network runs, a function of ours stands in the place of the host module's
`optimized_attention`. It acts for the threads that run one, and calls what stood there before; other threads notice
nothing. When the last is done, what stood there is back.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

NAME = "optimized_attention"


class DirectAttention:
    """One host module's attention function, diverted for the threads that entered."""

    def __init__(self, host: str):
        self._host = importlib.import_module(host)
        self._lock = threading.Lock()
        self._overrides: dict[int, Callable[..., Any]] = {}
        self._resident: Callable[..., Any] | None = None

    def enter(self, override: Callable[..., Any]) -> None:
        """Until `leave`, this thread's calls go to `override(function, *args, **kwargs)`."""
        with self._lock:
            if not self._overrides:
                self._resident = getattr(self._host, NAME)
                setattr(self._host, NAME, self._attention)
            self._overrides[threading.get_ident()] = override

    def leave(self) -> None:
        """Also where this thread did not enter, or left already."""
        with self._lock:
            entered = self._overrides.pop(threading.get_ident(), None)
            if entered is not None and not self._overrides:
                setattr(self._host, NAME, self._resident)

    def _attention(self, *args, **kwargs):
        override = self._overrides.get(threading.get_ident())
        return self._resident(*args, **kwargs) if override is None else override(self._resident, *args, **kwargs)


@cache
def direct_attention(host: str) -> DirectAttention:
    return DirectAttention(host)
