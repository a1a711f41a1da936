"""Does the model see? The same questions with the right image, with another sample's image, and blind.

A model that answers as well with a wrong image has learnt the questions, not to look.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llama3v.engines.base import BatchEngine, ImageFeatures
from llama3v.errors import DataError
from llama3v.model.prompt import Turn

CONDITIONS = ("right image", "wrong image", "blind")
OVERVIEW = "overview only"
"""The right image without its slices: another condition, for what slicing changes."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A question with one exact answer about one image."""

    kind: str
    question: str
    answer: str
    image: ImageFeatures
    picture: str  # the image's file, for reports


@dataclass(frozen=True, eq=False)
class Sight:
    """Answers to the probes under each condition: `answers[condition][i]` belongs to `probes[i]`."""

    probes: Sequence[Probe]
    answers: dict[str, list[str]]

    def accuracy(self, condition: str, kind: str | None = None) -> float:
        """Share of exact answers (case and a final full stop do not count), of one kind or of all."""
        right = [
            same_answer(answer, probe.answer)
            for probe, answer in zip(self.probes, self.answers[condition], strict=True)
            if kind is None or probe.kind == kind
        ]
        return sum(right) / len(right)

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(probe.kind for probe in self.probes))


def same_answer(answer: str, expected: str) -> bool:
    return _plain(answer) == _plain(expected)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def measure_sight(
    engine: BatchEngine,
    probes: Sequence[Probe],
    *,
    batch: int = 64,
    max_new_tokens: int = 8,
    advance: Callable[[int], object] = lambda count: None,
) -> Sight:
    """Ask every probe under each condition, greedily. `advance` is told how many answers came."""
    wrong = wrong_images(probes)
    images: dict[str, list[ImageFeatures | None]] = {
        "right image": [probe.image for probe in probes],
        "wrong image": list(wrong),
        "blind": [None] * len(probes),
    }
    answers: dict[str, list[str]] = {}
    for condition in CONDITIONS:
        shown = images[condition]
        answers[condition] = [""] * len(probes)
        for some in _batches(shown, batch):
            questions = [_question(probes[index].question, shown[index]) for index in some]
            for index, answer in zip(some, engine.answer_batch(questions, max_new_tokens=max_new_tokens), strict=True):
                answers[condition][index] = answer
            advance(len(some))
    return Sight(probes, answers)


def wrong_images(probes: Sequence[Probe]) -> list[ImageFeatures]:
    """For each probe the image of the next picture, going round among the sliced pictures or among the others."""
    groups: dict[bool, list[Probe]] = {}
    for probe in probes:
        groups.setdefault(probe.image.grid.tiles > 1, []).append(probe)
    other: dict[str, ImageFeatures] = {}
    for group in groups.values():
        pictures = list({probe.picture: probe.image for probe in group}.items())
        if len(pictures) < 2:
            raise DataError(f"{pictures[0][0]} has no other picture to stand in for it; give more held-out pictures")
        other |= {name: pictures[(i + 1) % len(pictures)][1] for i, (name, _) in enumerate(pictures)}
    return [other[probe.picture] for probe in probes]


def _question(text: str, image: ImageFeatures | None) -> tuple[list[Turn], list[ImageFeatures]]:
    if image is None:
        return [Turn("user", text)], []
    return [Turn("user", text, images=(0,))], [image]


def _batches(shown: Sequence[ImageFeatures | None], size: int) -> Iterable[list[int]]:
    """Indices in batches of similar prompt length: images with as many tiles stand together."""
    order = sorted(range(len(shown)), key=lambda index: 0 if (image := shown[index]) is None else image.grid.tiles)
    return [order[start : start + size] for start in range(0, len(order), size)]
