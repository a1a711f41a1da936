"""What counts as the score of a sample: the one rule, for training and for the report."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama3v.data.pairs import texts_of
from llama3v.data.sources.base import Sample
from llama3v.feature_cache.scores import Scores


@dataclass(frozen=True)
class Judged:
    """A sample's score, and the pair that has it: the number of the image, and the text."""

    score: float
    pieces: int
    image: int
    text: str


class NotScoredError(Exception):
    """A pair of a sample has no score; carries the image's name."""


def judge(scores: Scores, sample: Sample, keys: Sequence[str]) -> Judged | None:
    """The lowest score of the sample's pairs: one picture that does not belong spoils it.

    None where it has no pair, since no image of it is followed by an answer: there is nothing to judge it by.

    Args:
        keys: of the sample's images.

    Raises:
        NotScoredError: a pair has no score.
    """
    lowest: Judged | None = None
    for number, (key, text) in enumerate(zip(keys, texts_of(sample), strict=True)):
        if not text:
            continue
        score = scores.find(key, text)
        if score is None:
            raise NotScoredError(sample.images[number].name)
        if lowest is None or score.value < lowest.score:
            lowest = Judged(score.value, score.pieces, number, text)
    return lowest
