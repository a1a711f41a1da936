"""Asking a run to stop: SIGTERM (a spot machine's notice), Ctrl-C, or what watches it. It finishes the step, writes a
checkpoint and leaves.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

EXIT_ASKED = 3
"""Exit code of a run that stopped short of its last step because an option told it when to."""


class StopRequest:
    """While entered, the first signal only asks the loop to stop; a second one acts as it would have before.

    With `patient` set, later ones ask again and no more: torchrun may pass the same signal on twice.
    In a thread other than the main one, where Python allows no handlers, signals keep their usual effect.

    Attributes:
        requested: the signal, or in words what else asked; None while nothing has.
        advice: how to go on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: signal.Signals | str | None = None
        self.advice = "run the same command to resume"
        self.patient = False
        self._before: dict[signal.Signals, Any] = {}
        self._action: Callable[[], None] | None = None

    def then(self, action: Callable[[], None]) -> None:
        """What to do at once when the stop is asked for. It runs inside a signal handler, so it must take no lock."""
        self._action = action

    def ask(self, why: str, advice: str) -> None:
        """Ask for a stop without a signal. The first one that asks is the one that is told."""
        if self.requested is None:
            self.requested, self.advice = why, advice

    @property
    def reason(self) -> str:
        """What asked, in words."""
        return self.requested.name if isinstance(self.requested, signal.Signals) else self.requested or "a signal"

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells report it, also where another rank got it; EXIT_ASKED without one."""
        return EXIT_ASKED if isinstance(self.requested, str) else 128 + (self.requested or signal.SIGTERM)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        if not self.patient:
            self._restore()
        if self._action is not None:
            self._action()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
