"""`llama3v cache scores`: how well the images and texts of a data set belong together, as an HTML report."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama3v.config import CacheConfig
from llama3v.data.sources import open_source
from llama3v.errors import CacheError, ImageError
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.scores import open_scores
from llama3v.feature_cache.scores_survey import Seen, Survey, below
from llama3v.histogram import Histogram

if TYPE_CHECKING:
    from llama3v.report import GalleryItem, Report

REPORT = "scores.html"
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
THRESHOLDS = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5)
NEAR = 6
"""Pairs shown on each side of the threshold."""
BARS = 48
_END = 1e-5
"""Scores nearer to 0 or 1 are drawn in the first or last bar."""
_TICKS = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
_LONGEST_TEXT = 600

_WHAT = [
    "A score is the probability that SigLIP gives an image and a text, alone, of belonging together. The image is seen "
    "whole, shrunk to one tile; the text is the answer to the turn that shows it: a caption, or the first answer of a "
    "conversation. A text that is longer than the text half reads is scored in pieces, and its score is their mean. A "
    "sample with several images has the lowest of their scores.",
    "Look at the pairs before you choose a threshold. Low scores are pictures with the wrong caption, but also short "
    "answers such as a number or yes, text in the picture, and whatever SigLIP never learnt. Scores of different kinds of "
    "data are not comparable.",
]


def report_scores(paths: CachePaths, config: CacheConfig) -> dict[str, Any]:
    """Write <out>/scores.html, and return its numbers.

    Raises:
        CacheError: the cache has no scores, or damaged ones. DataError: a data set cannot be opened.
    """
    from llama3v.report import Report

    assert config.out is not None, "the config was validated"
    scores = open_scores(paths)
    if scores is None:
        raise CacheError(f"{paths.directory} has no pair scores; `llama3v encode --score` makes them")
    survey = Survey(config.worst, NEAR, config.min_score)
    for data in config.data:
        survey.add(paths, scores, open_source(data))
    found = survey.scores() if config.data else scores.rows["score"]
    unit = "samples" if config.data else "pairs"
    numbers = _numbers(found, unit, config) | ({"pairs in the cache": len(scores)} if config.data else {})
    if config.data:
        numbers |= {
            "samples without a score": survey.without_score,
            "samples without an image or an answer": survey.without_pair,
            "rows that are no samples": survey.rejected,
        }
    report = Report("Pair scores", ", ".join(config.data) or f"all pairs of {paths.directory}")
    _add_numbers(report, found, numbers, unit, config.min_score)
    if config.data:
        _add_pictures(report, survey, config.min_score)
    return numbers | {"report": str(report.write(config.out / REPORT))}


def _numbers(scores: np.ndarray, unit: str, config: CacheConfig) -> dict[str, Any]:
    thresholds = sorted({*THRESHOLDS, *([] if config.min_score is None else [config.min_score])})
    quantiles = np.quantile(scores, QUANTILES).tolist() if len(scores) else []
    return {
        unit: len(scores),
        "mean": float(scores.mean()) if len(scores) else None,
        "quantiles": {f"{q:.0%}": value for q, value in zip(QUANTILES, quantiles, strict=False)},
        f"{unit} that --min-score would leave out": {f"{t:g}": n for t, n in below(scores, thresholds).items()},
    }


def _add_numbers(
    report: "Report", scores: np.ndarray, numbers: dict[str, Any], unit: str, threshold: float | None
) -> None:
    cards: list[tuple[str, Any, str]] = [
        (unit, len(scores), "with a score"),
        ("median", numbers["quantiles"].get("50%"), "half are below"),
    ]
    left_out = numbers[f"{unit} that --min-score would leave out"]
    if threshold is not None:
        dropped = left_out[f"{threshold:g}"]
        cards.append(("left out", _share(dropped, len(scores)), f"{dropped:,} {unit} below {threshold:g}"))
    if missing := numbers.get("samples without a score"):
        cards.append(("without a score", missing, "run encode --score on this data; training stops there"))
    report.add_figures(cards)
    report.add_text("What a score is", _WHAT)
    if len(scores):
        mark = None if threshold is None else (_log_odds(threshold), f"--min-score {threshold:g}")
        report.add_histogram(
            "Scores",
            histogram(scores),
            "probability of belonging together",
            unit,
            mark,
            "The axis is stretched towards 0 and 1 (log-odds), where most scores are; those nearer than 0.00001 are in the "
            "outermost bars.",
        )
        report.add_table(
            "Quantiles",
            [f"share of {unit} below", "score"],
            [[share, value] for share, value in numbers["quantiles"].items()],
        )
    report.add_table(
        "What a threshold leaves out",
        ["--min-score", unit, "share"],
        [[value, count, _share(count, len(scores))] for value, count in left_out.items()],
    )


def _add_pictures(report: "Report", survey: Survey, threshold: float | None) -> None:
    lowest = survey.lowest.sorted()
    report.add_gallery(f"The {len(lowest)} lowest scores", *_items(lowest))
    if threshold is not None:
        report.add_gallery(f"Just below {threshold:g}: left out", *_items(survey.below.sorted()))
        report.add_gallery(f"Just above {threshold:g}: kept", *_items(survey.above.sorted()))


def _items(pairs: Sequence[Seen]) -> "tuple[list[GalleryItem], str]":
    """The pictures with their texts, and a note that says how many could not be shown."""
    from llama3v.model.tiles import decode_image
    from llama3v.report import GalleryItem

    items, hidden = [], []
    for seen in pairs:
        text = seen.judged.text
        if len(text) > _LONGEST_TEXT:
            text = f"{text[:_LONGEST_TEXT]}... ({len(text) - _LONGEST_TEXT:,} characters more)"
        lines: list[tuple[str, str, bool | None]] = [
            ("score", f"{seen.judged.score:.4g}", None),
            ("text", text, None),
            ("sample", seen.sample, None),
            ("image", seen.image.name, None),
        ]
        if seen.judged.pieces > 1:
            lines.insert(1, ("read in", f"{seen.judged.pieces} pieces", None))
        try:
            items.append(GalleryItem(decode_image(seen.image.read()), lines))
        except ImageError as error:
            hidden.append(f"{seen.image.name} (score {seen.judged.score:.4g}): {error}")
    note = f"{len(hidden)} pictures cannot be read now: {'; '.join(hidden)}" if hidden else ""
    return items, note or ("" if items else "None.")


def histogram(scores: np.ndarray) -> Histogram:
    """Over the log-odds of scores, from the first to the last bar that is not empty."""
    end = _log_odds(1 - _END)
    clipped = np.clip(scores.astype(np.float64), _END, 1 - _END)
    counts, edges = np.histogram(np.log(clipped / (1 - clipped)), BARS, (-end, end))
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    ticks = [(_log_odds(p), f"{p:.5f}".rstrip("0")) for p in _TICKS]
    return Histogram(counts[first : last + 1].tolist(), edges[first : last + 2].tolist(), ticks)


def _log_odds(probability: float) -> float:
    inside = min(max(probability, _END), 1 - _END)
    return math.log(inside / (1 - inside))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
