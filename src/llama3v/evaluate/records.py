"""One JSON line per answer: prompt, answer, what was read out of it, score. A run that is killed goes on from them."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from llama3v.errors import DataError

Parsed: TypeAlias = str | tuple[str | float, ...]
"""One reading of an answer, or the several that an open question allows."""


@dataclass(frozen=True)
class AnswerRecord:
    """What a model said to one sample under one condition, and what that was worth."""

    task: str
    id: str
    condition: str  # "right image" | "wrong image" | "blind" (sight.CONDITIONS) | "overview only"
    category: str
    cluster: str
    images: tuple[str, ...]  # names of those that were shown
    prompt: str
    answer: str
    parsed: Parsed | None
    references: tuple[str, ...]
    score: float
    pictures: tuple[str, ...] = ()  # hashes of the image files that were shown

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.task, self.condition, self.id)

    def to_json(self) -> str:
        """One line of strict JSON: numbers that JSON lacks (an answer may say "infinity") are written as text."""
        values = asdict(self)
        if isinstance(self.parsed, tuple):
            values["parsed"] = [_strict(value) for value in self.parsed]
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "AnswerRecord":
        """Raises ValueError, KeyError or TypeError where the line is no record."""
        values: dict[str, Any] = json.loads(line)
        values = {"pictures": (), **values}  # older files have none: such an answer about images is asked again
        record = {one.name: values[one.name] for one in fields(cls)}
        for name in ("images", "references", "parsed", "pictures"):
            if isinstance(record[name], list):
                record[name] = tuple(record[name])
        return cls(**record)


def _strict(value: str | float) -> str | float:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_records(path: Path, records: Iterable[AnswerRecord]) -> None:
    """A whole file at once, in the place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(record.to_json() + "\n" for record in records), encoding="utf-8")
    part.replace(path)


def append_records(path: Path, records: Iterable[AnswerRecord]) -> None:
    """Add lines and wait until they are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[AnswerRecord]:
    """The records of a file, none twice: the last of a sample counts. A last line that a kill cut off is dropped from the file, so that the next
    append starts on a new one; any other broken line is a DataError that names it.
    """
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("r+b") as file:
            file.truncate(whole)
    found: dict[tuple[str, str, str], AnswerRecord] = {}
    for number, line in enumerate(text[:whole].decode("utf-8", "replace").splitlines(), 1):
        try:
            record = AnswerRecord.from_json(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: line {number} is no answer record ({error}); move the file away") from error
        found[record.key] = record
    return list(found.values())


def unparsed_share(records: Sequence[AnswerRecord]) -> float:
    """The share of answers that no rule could read; 0 of none."""
    return sum(record.parsed is None for record in records) / len(records) if records else 0.0
