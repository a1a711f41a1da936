"""`--min-score`: leave out samples whose images and texts do not belong together, as `encode --score` found."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama3v.config import TrainConfig
from llama3v.data.sources.base import Sample
from llama3v.errors import CacheError
from llama3v.feature_cache.layout import CachePaths, read_manifest
from llama3v.feature_cache.scores import Scores, open_scores
from llama3v.feature_cache.scores_judge import Judged, NotScoredError, judge
from llama3v.feature_cache.selection import encode_option

TOO_LOW = "pair score below --min-score"


@dataclass(frozen=True)
class PairFilter:
    """Tells which samples stay.

    Attributes:
        scores: of the pairs of the cache.
        least: a sample with a lower score is left out.
        vision: the SigLIP that scores, for messages; empty where it is not known.
    """

    scores: Scores
    least: float
    vision: str

    @property
    def identity(self) -> dict[str, str]:
        """What decides which samples stay, in words."""
        return {"min_score": repr(self.least), "scored_by": self.scores.paths.scorer}

    def too_low(self, sample: Sample, keys: Sequence[str], data: str) -> Judged | None:
        """The pair for which a sample is left out; None where it stays, as one without any pair does.

        Raises:
            CacheError: a pair has no score; it names the command that scores.
        """
        try:
            found = judge(self.scores, sample, keys)
        except NotScoredError as image:
            raise CacheError(
                f"--min-score needs a score of every sample, and {sample.id} of {data} has none (image {image}); "
                f"run: {score_command(self.scores.paths.features, data, self.vision)}"
            ) from None
        return found if found is not None and np.float32(found.score) < np.float32(self.least) else None


def open_filter(config: TrainConfig, features: CachePaths) -> PairFilter | None:
    """The filter that a run asks for; None where it asks for none.

    Args:
        features: the cache that the run reads.

    Raises:
        CacheError: no pair of the cache was ever scored, or scores are damaged.
    """
    if config.min_score is None:
        return None
    vision = getattr(config, "vision", "")
    scores = open_scores(features)
    if scores is None:
        raise CacheError(
            f"--min-score needs pair scores, and {features.directory} has none; "
            f"run: {score_command(features, config.data[0], vision)}"
        )
    return PairFilter(scores, config.min_score, vision)


def score_command(features: CachePaths, data: str, vision: str) -> str:
    """The command that scores a data set for this cache."""
    made_from = read_manifest(features)
    words = ["llama3v", "encode", "--data", data, "--vision", vision or "SIGLIP", "--cache", str(features.root)]
    words += ["--max-tiles", made_from["max_tiles"]]
    words += ["--cut", made_from["vision.cut"]] if "vision.cut" in made_from else []
    command = f"{shlex.join(words)}{encode_option(made_from['codec'])} --score"
    return (
        command if vision else f"{command} (SIGLIP: the checkpoint with both halves that the model's tower comes from)"
    )
