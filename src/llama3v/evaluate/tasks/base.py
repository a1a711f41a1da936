"""What a benchmark is here: samples, a rule that reads an answer, a rule that scores it, and the figures it reports.

Parsing and scoring are pure, torch-free and never raise, whatever a model answers. An answer that no rule can read is
*unparsed*: it is counted, and where the published rule then guesses, the guess is scored but never called parsed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, TypeAlias

from llama3v.data.sources.base import ImageRef
from llama3v.errors import DataError
from llama3v.evaluate.records import AnswerRecord, Parsed
from llama3v.evaluate.statistics import Value, share
from llama3v.evaluate.tasks.rows import Row, find_files, read_rows

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
SHORT_PROMPT = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class TaskSample:
    """One question of a benchmark."""

    id: str
    images: tuple[ImageRef, ...]
    prompt: str
    references: tuple[str, ...]
    category: str = ""
    choices: tuple[str, ...] = ()
    """The texts of the options A, B, C ..."""
    cluster: str = ""
    """What dependent samples share (a picture with six questions); "" where a sample stands alone."""
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """What an answer is worth. `parsed` is None where no rule could read it."""

    parsed: Parsed | None
    score: float


Tallies: TypeAlias = Callable[[AnswerRecord], Sequence[float]]


@dataclass(frozen=True)
class Figure:
    """A figure of many answers, from 0 to `most`: `value` of the sums of what each answer adds.

    Written like this, an accuracy, an F1 and the accuracy of one half can all be resampled for their interval.
    """

    name: str
    tallies: Tallies
    value: Value = share
    most: float = 1.0


def mean_score(name: str, among: Callable[[AnswerRecord], bool] = lambda record: True, *, most: float = 1.0) -> Figure:
    """The mean score of the answers that `among` picks; `most` is the largest one."""
    return Figure(name, lambda record: (record.score, 1.0) if among(record) else (0.0, 0.0), most=most)


class Task(ABC):
    """A benchmark in its public on-disk form. A subclass says which files, how a row reads, and the two rules."""

    name: ClassVar[str]
    rule: ClassVar[str]
    """The scoring rule and its source in a line or two; printed beside every score."""
    hub: ClassVar[str | None] = None
    """The data set's name on the Hugging Face hub."""
    files: ClassVar[tuple[str, ...]] = ("*.parquet", "*.json", "*.jsonl", "*.tsv")
    """Patterns of the split's files under the directory or hub data set; the first that matches any is taken."""
    max_new_tokens: ClassVar[int] = 16

    def __init__(self, where: str | None = None) -> None:
        """`where`: a file, a directory or a hub data set; the benchmark's own on the hub if not given."""
        self.where = where or self.hub
        if self.where is None:
            raise DataError(f"{self.name}: has no public home to read from; give a path: {self.name}=PATH")

    def samples(self, limit: int | None = None) -> Iterator[TaskSample]:
        """The samples in file order, the first `limit` of them. Raises DataError, naming file and row."""
        return islice(self._samples(), limit)

    def _samples(self) -> Iterator[TaskSample]:
        assert self.where is not None
        for path in find_files(self.where, self.files):
            for row in read_rows(path):
                sample = self.sample(row)
                if sample is not None:
                    yield sample

    def sample(self, row: Row) -> TaskSample | None:
        """The sample of a row; None where the row is not part of this task. Raises DataError."""
        raise NotImplementedError(f"{self.name} reads no rows")

    @abstractmethod
    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        """What the answer says, or None where the rule cannot tell."""

    @abstractmethod
    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        """0 to 1, or partial credit in between where the rule gives it."""

    def guess(self, answer: str, sample: TaskSample) -> Parsed | None:
        """What the published rule puts in place of an unparsed answer; None (score 0) for most."""
        return None

    def grade(self, answer: str, sample: TaskSample) -> Grade:
        parsed = self.parse(answer, sample)
        used = self.guess(answer, sample) if parsed is None else parsed
        return Grade(parsed, 0.0 if used is None else self.score(used, sample))

    def settle(self, records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
        """Scores that can be told only with all answers at hand (of one condition)."""
        return list(records)

    def figures(self) -> tuple[Figure, ...]:
        """What is reported, the headline first."""
        return (mean_score("accuracy"),)

    def corpus_figures(self, records: Sequence[AnswerRecord]) -> dict[str, float]:
        """Further figures that belong to all the answers together and have no interval."""
        return {}


def lettered(choices: Sequence[str], form: str = "{}. {}") -> str:
    """The options, one a line, each with its letter."""
    return "\n".join(form.format(letter, choice) for letter, choice in zip(LETTERS, choices, strict=False))


def as_letter(text: str, count: int) -> str | None:
    """The letter of one of `count` options that the text is, in either case."""
    lower = text.lower()
    return next((letter for letter in LETTERS[:count] if letter.lower() == lower), None)


def letter_of(index: int, choices: Sequence[str], row: Row) -> str:
    """The letter of option `index`. Raises DataError where there is no such option."""
    if not 0 <= index < len(choices) <= len(LETTERS):
        raise DataError(f"{row.name}: expected the number of one of {len(choices)} options, found {index}")
    return LETTERS[index]
