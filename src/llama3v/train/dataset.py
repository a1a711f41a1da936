"""From data sets to token ids: every sample is rendered once, before training (prepared.py says where it lies then).

Images are not decoded: the cache knows which image of the data set has which key and grid, or the image's header does
(features/). What cannot be used goes to the ledger with its reason, and is never replaced by another sample.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from llama3v.data.ledger import Ledger
from llama3v.data.sources.base import AddressableSource, ImageRef, Rejected, Sample, Source
from llama3v.errors import CacheError, DataError, PromptError
from llama3v.feature_cache.pipeline import read_ahead
from llama3v.model.prompt import Renderer
from llama3v.model.slicing import Grid
from llama3v.train.features.base import ImageLookup, NotFoundError
from llama3v.train.locations import LocationsWriter
from llama3v.train.names import ShownSample
from llama3v.train.pair_filter import TOO_LOW, PairFilter
from llama3v.train.prepared import PreparedData, PreparedWriter, load_prepared

HOPELESS = 64
"""Images looked up in vain, with none found, after which the whole data set is taken to be absent."""
LOOKED_UP_AHEAD = 64
"""Samples whose images are looked up while others are rendered."""

TOO_LONG = "longer than a row"
NO_ANSWER = "no assistant turn, so nothing to learn"


@dataclass(frozen=True)
class Preparation:
    """How data sets become prepared data.

    Attributes:
        sources: the data sets, opened. names: as the user wrote them.
        lookup: finds their images.
        with_locations: whether to note where images lie.
        row_tokens: longest sample that fits.
        made_from: what the result depends on beside these: tokenizer, prompt, fingerprint of the cache.
        max_bad_ratio: largest share of the samples that may be left out.
        refuse_too_long: whether a sample that does not fit is an error, instead of one that is left out.
        encode_command: data set -> the command that fills the cache with it.
        pair_filter: leaves out samples whose images and texts do not belong together.
    """

    sources: Sequence[AddressableSource]
    names: Sequence[str]
    lookup: ImageLookup
    renderer: Renderer
    row_tokens: int
    made_from: dict[str, Any]
    max_bad_ratio: float
    encode_command: Callable[[str], str]
    with_locations: bool = False
    pair_filter: PairFilter | None = None
    refuse_too_long: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What the prepared data is a function of, in words."""
        sources = [source.digest for source in self.sources]
        chosen = self.pair_filter.identity if self.pair_filter else {}
        return {**self.made_from, "row_tokens": self.row_tokens, "sources": sources, **chosen}


def prepare(preparation: Preparation, directory: Path, ledger_path: Path, *, keep: bool) -> PreparedData:
    """Render every sample into `directory`, or take what an earlier run of the same command left there.

    Args:
        keep: take it even if some images were not found then: a resumed run must not change its data.

    Raises:
        CacheError: no image of a data set is found, or a pair has no score. DataError: all samples, or too many, cannot
            be used; or one is too long, where that is refused.
    """
    found = load_prepared(directory, preparation.identity, with_locations=preparation.with_locations)
    if found is not None and (keep or not found.not_in_cache):
        return found
    ledger_path.unlink(missing_ok=True)
    ledger = Ledger(ledger_path)
    locations = LocationsWriter() if preparation.with_locations else None
    total = missing = 0
    with PreparedWriter(directory, locations) as writer, ThreadPoolExecutor(1, "look up") as pool:
        for number, (source, name) in enumerate(zip(preparation.sources, preparation.names, strict=True)):
            images = _Images(source, name, preparation)
            for item, found_images in read_ahead(pool, images.of, source, LOOKED_UP_AHEAD):
                total += 1
                try:
                    rendered = _render(item, found_images, preparation, name)
                    writer.add(*rendered, _for_people(item, number, len(writer)))
                except _LeftOutError as error:
                    ledger.leave_out(item.id, error.reason, by_choice=error.by_choice, data=name, **error.detail)
                    missing += error.not_found
                else:
                    _note_locations(locations, number, item, found_images)
            images.check_that_some_were_found()
        if not len(writer):
            names = ", ".join(preparation.names)
            raise DataError(f"{names}: none of the {total} samples can be trained on; {ledger_path} has the reasons")
        ledger.check_ratio(total, preparation.max_bad_ratio)
        return writer.commit(
            preparation.identity,
            left_out=ledger.count + ledger.by_choice,
            not_in_cache=missing,
            below_min_score=ledger.by_choice,
        )


class _LeftOutError(Exception):
    """Why a sample is not used."""

    def __init__(self, reason: str, not_found: bool = False, by_choice: bool = False, **detail: Any) -> None:
        super().__init__(reason)
        self.reason, self.not_found, self.by_choice, self.detail = reason, not_found, by_choice, detail


Found = list[tuple[str, Grid]] | NotFoundError
"""(key, grid) of a sample's images; or why one of them is not to be had."""


def _render(
    item: Sample | Rejected, images: Found, preparation: Preparation, data: str
) -> tuple[np.ndarray, np.ndarray, list[str], list[Grid]]:
    """Ids int32 [tokens], supervised uint8 [tokens], keys and grids of the images."""
    if isinstance(item, Rejected):
        raise _LeftOutError(item.reason)
    if not _is_trained_on(item):
        raise _LeftOutError(NO_ANSWER)
    if isinstance(images, NotFoundError):
        raise _LeftOutError(str(images), not_found=True, by_choice=False, **images.detail)
    keys, grids = [key for key, _ in images], [grid for _, grid in images]
    low = preparation.pair_filter.too_low(item, keys, data) if preparation.pair_filter else None
    if low is not None:
        raise _LeftOutError(TOO_LOW, by_choice=True, score=low.score, image=item.images[low.image].name, text=low.text)
    try:
        rendered = preparation.renderer.render(item.turns, grids)
    except PromptError as error:
        raise _LeftOutError(str(error)) from error
    if len(rendered.ids) > preparation.row_tokens:
        if preparation.refuse_too_long:
            raise DataError(
                f"sample {item.id}: expected at most {preparation.row_tokens} tokens (--row-tokens), found "
                f"{len(rendered.ids)}; give longer rows, or --too-long leave-out to do without such samples"
            )
        raise _LeftOutError(TOO_LONG, tokens=len(rendered.ids), row_tokens=preparation.row_tokens)
    supervised = np.zeros(len(rendered.ids), np.uint8)
    for start, end in rendered.spans:
        supervised[start:end] = 1
    assert not supervised[0], "a sample begins with a header, which has no loss"
    return np.asarray(rendered.ids, np.int32), supervised, keys, grids


def _for_people(item: Sample | Rejected, source: int, sample: int) -> ShownSample:
    assert isinstance(item, Sample), "what is rendered is a sample"
    answer = next(number for number, turn in enumerate(item.turns) if turn.role == "assistant")
    question = next((turn.text for turn in reversed(item.turns[:answer]) if turn.role == "user"), "")
    images = tuple(item.images[image].name for turn in item.turns[:answer] for image in turn.images)
    return ShownSample(sample, item.id, source, images, question, item.turns[answer].text)


def _is_trained_on(item: Sample | Rejected) -> TypeGuard[Sample]:
    return isinstance(item, Sample) and any(turn.role == "assistant" for turn in item.turns)


def _note_locations(locations: LocationsWriter | None, source: int, item: Sample | Rejected, found: Found) -> None:
    if locations is None or not isinstance(item, Sample) or isinstance(found, NotFoundError):
        return
    for image, (key, grid) in zip(item.images, found, strict=True):
        locations.add(key, source, image.name, grid)


class _Images:
    """Looks up the images of one source."""

    def __init__(self, source: Source, name: str, preparation: Preparation) -> None:
        self._source, self._name = source, name
        self._lookup, self._command = preparation.lookup, preparation.encode_command
        self._found = self._missing = 0
        self._first_reason = ""

    def of(self, item: Sample | Rejected) -> tuple[Sample | Rejected, Found]:
        """The item with its images looked up. Runs in a thread, one item after another."""
        try:
            return item, [self._find(image) for image in item.images] if _is_trained_on(item) else []
        except NotFoundError as reason:
            return item, reason

    def check_that_some_were_found(self) -> None:
        if self._missing and not self._found:
            raise CacheError(
                f"expected the images of {self._name}, found none of the first {self._missing} "
                f"({self._first_reason}); {self._lookup.advice(self._command(self._name))}"
            )

    def _find(self, image: ImageRef) -> tuple[str, Grid]:
        try:
            found = self._lookup.find(self._source.digest, image)
        except NotFoundError as reason:
            self._missing += 1
            self._first_reason = self._first_reason or f"{image.name}: {reason.detail.get('because', reason)}"
            if self._missing >= HOPELESS:
                self.check_that_some_were_found()
            raise
        self._found += 1
        return found
