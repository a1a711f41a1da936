"""What was left out, and why: one JSON line per sample or image. Nothing is skipped silently, and nothing
replaced.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llama3v.errors import DataError


class Ledger:
    """A JSONL file that only grows. `count` is what this process left out since it cannot be used, `by_choice` what it
    left out though it could.

    A run that is repeated meets the same faults again: a line that an earlier run wrote is not written
    twice, and one that a kill cut short is removed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.count = self.by_choice = 0
        self._first_reason = ""
        self._written = _whole_lines(self.path)

    def leave_out(self, id: str, reason: str, *, by_choice: bool = False, **detail: Any) -> None:
        """Note that `id` is not used. On disk (the system's, if not the platter's) when this returns."""
        if by_choice:
            self.by_choice += 1
        else:
            self.count += 1
            self._first_reason = self._first_reason or f"{id}: {reason}"
        # Escaped to ASCII: a file name may hold bytes that are no UTF-8 (lone surrogates in Python).
        line = json.dumps({"id": id, "reason": reason, **detail}).encode() + b"\n"
        if self._written[line] > 0:
            self._written[line] -= 1
        else:
            with self.path.open("ab", buffering=0) as file:
                file.write(line)  # one system call, so that lines of several writers do not mix

    def check_ratio(self, total: int, max_bad_ratio: float) -> None:
        """Raises DataError where more than `max_bad_ratio` of `total` cannot be used."""
        if self.count > max_bad_ratio * total:
            raise DataError(
                f"{self.count:,} of {total:,} were left out, more than --max-bad-ratio allows "
                f"({max_bad_ratio:.1%}); the first is {self._first_reason}; all are in {self.path}"
            )


def _whole_lines(path: Path) -> Counter[bytes]:
    """The lines that are there, counted; what follows the last line end is cut off. Makes a missing file."""
    with path.open("a+b") as file:
        file.seek(0)
        lines: Counter[bytes] = Counter()
        end = 0
        for line in file:
            if line.endswith(b"\n"):
                lines[line] += 1
                end += len(line)
            else:  # only then: another writer may have appended a line since
                file.truncate(end)
    return lines
