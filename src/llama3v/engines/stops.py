"""Stop texts, which a stream must find although they may span pieces."""

from collections.abc import Sequence


class StopFinder:
    """Passes text on, but holds back what may be the beginning of a stop text.

    Attributes:
        found: the stop text that ended the answer; None until then. What follows it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is final after this piece."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            place, self.found = min(places, key=lambda found: found[0])
            self._held = ""
            return text[:place]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What is held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
