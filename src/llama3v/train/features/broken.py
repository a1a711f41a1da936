"""Images that were planned by their headers, and that only show while training that they are broken behind them.

Such an image ends the run: it is never replaced. Its samples were promised to certain steps, so leaving it out would make
another run of this one. But its file may be mended, and then the run goes on where it was.
"""

from pathlib import Path

from llama3v.errors import DataError
from llama3v.feature_cache import journal


class BrokenImages:
    """The broken images of one run: a journal with lines {"key", "name", "reason"}."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = {entry["key"] for entry in journal.read(path)}

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def note(self, key: str, data: str, name: str, reason: str) -> DataError:
        """Remember that an image is broken; returns the error to raise."""
        journal.append(self._path, [{"key": key, "name": name, "reason": reason}])
        return DataError(
            f"image {name} of {data} cannot be used: {reason}. Its header was whole when the run was planned. It is not "
            "replaced by another image: put the right file in its place, and the same command resumes. "
            f"`llama3v encode --mode pixels --data {data}` finds all such images beforehand, and modes pixels and "
            "features leave them out"
        )
