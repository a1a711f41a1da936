"""SIGTERM (a spot machine's notice) and Ctrl-C: finish the step, write a checkpoint, leave."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, the first signal only asks the loop to stop; a second one acts as it would have before.

    In a thread other than the main one, where Python allows no handlers, signals keep their usual effect.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._action: Callable[[], None] | None = None

    def then(self, action: Callable[[], None]) -> None:
        """What to do at once when the stop is asked for. It runs inside a signal handler, so it must take no lock."""
        self._action = action

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells report it."""
        return 128 + (self.requested or 0)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self._restore()
        if self._action is not None:
            self._action()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
