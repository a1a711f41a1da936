"""What prepared samples are called in their data sets, and the few whose answers a run shows.

    prepared/<...>/names.jsonl   one id per sample, in their order
                   shown.json    a few samples, drawn evenly: id, images, question, expected answer

Neither decides what is computed: both are for people.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

NAMES, SHOWN = "names.jsonl", "shown.json"
MOST_SHOWN = 8


@dataclass(frozen=True)
class ShownSample:
    """A sample whose answer is shown while the model trains.

    Attributes:
        sample: its number in the prepared data. source: the number of its data set.
        images: their names in the data set. question: the first user turn. expected: the first answer.
    """

    sample: int
    id: str
    source: int
    images: tuple[str, ...]
    question: str
    expected: str


class NamesWriter:
    """Notes samples while they are prepared; memory stays flat."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = (directory / NAMES).open("w")
        self._random = random.Random(0)
        self._with_images: list[ShownSample] = []
        self._others: list[ShownSample] = []
        self._seen = {True: 0, False: 0}

    def add(self, sample: ShownSample) -> None:
        """Note one sample. All are equally likely to be shown; those without images only where none has any."""
        self._file.write(json.dumps(sample.id) + "\n")
        has_images = bool(sample.images)
        kept = self._with_images if has_images else self._others
        self._seen[has_images] += 1
        place = len(kept) if len(kept) < MOST_SHOWN else self._random.randrange(self._seen[has_images])
        if place < MOST_SHOWN:  # reservoir sampling (Vitter 1985, algorithm R)
            kept[place : place + 1] = [sample]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def commit(self) -> None:
        """Everything was added: write what is to be shown."""
        self.close()
        shown = sorted(self._with_images or self._others, key=lambda sample: sample.sample)
        (self._directory / SHOWN).write_text(json.dumps([asdict(sample) for sample in shown]))


def has_names(directory: Path) -> bool:
    """Whether both files are there; data that an earlier version prepared has none."""
    return (directory / NAMES).is_file() and (directory / SHOWN).is_file()


def names_of(directory: Path, samples: Iterable[int]) -> list[str]:
    """The ids of samples, in the order asked for. Reads the file once; nothing of it is kept."""
    wanted = list(samples)
    missing, found = set(wanted), {}
    with (directory / NAMES).open() as file:
        for number, line in enumerate(file):
            if number in missing:
                found[number] = str(json.loads(line))
                if len(found) == len(missing):
                    break
    return [found[sample] for sample in wanted]


def shown_samples(directory: Path) -> list[ShownSample]:
    """The samples to show."""
    return [
        ShownSample(**{**sample, "images": tuple(sample["images"])})
        for sample in json.loads((directory / SHOWN).read_text())
    ]
