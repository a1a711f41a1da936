"""From data sets to token ids: every sample is rendered once, before training (prepared.py says where it lies then).

Images are not opened: the cache knows which image of the data set has which key, and the key its grid. What cannot be
used goes to the ledger with its reason, and is never replaced by another sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llama3v.data.ledger import Ledger
from llama3v.data.sources.base import ImageRef, Rejected, Sample, Source
from llama3v.errors import CacheError, DataError, ImageError, PromptError
from llama3v.model.prompt import Renderer
from llama3v.model.slicing import Grid
from llama3v.model.tiles import image_key
from llama3v.train.prepared import PreparedData, PreparedWriter, load_prepared

HOPELESS = 64
"""Images looked up in vain, with none found, after which the cache is taken to lack the whole data set."""

NOT_IN_CACHE = "image not in the cache"
TOO_LONG = "longer than a row"
NO_ANSWER = "no assistant turn, so nothing to learn"


class Cache(Protocol):
    """What is asked of a feature_cache.CacheReader here."""

    def __contains__(self, key: str) -> bool: ...
    def record(self, key: str) -> Any: ...
    def key_of(self, source_digest: str, image_name: str) -> str | None: ...


@dataclass(frozen=True)
class Preparation:
    """How data sets become prepared data.

    Attributes:
        sources: the data sets, opened. names: as the user wrote them.
        row_tokens: longest sample that fits.
        made_from: what the result depends on beside these: tokenizer, prompt, fingerprint of the cache.
        max_bad_ratio: largest share of the samples that may be left out.
        encode_command: data set -> the command that fills the cache with it.
    """

    sources: Sequence[Source]
    names: Sequence[str]
    cache: Cache
    renderer: Renderer
    row_tokens: int
    made_from: dict[str, Any]
    max_bad_ratio: float
    encode_command: Callable[[str], str]

    @property
    def identity(self) -> dict[str, Any]:
        """What the prepared data is a function of, in words."""
        sources = [source.digest for source in self.sources]
        return {**self.made_from, "row_tokens": self.row_tokens, "sources": sources}


def prepare(preparation: Preparation, directory: Path, ledger_path: Path, *, keep: bool) -> PreparedData:
    """Render every sample into `directory`, or take what an earlier run of the same command left there.

    Args:
        keep: take it even if the cache lacked some images then: a resumed run must not change its data.

    Raises:
        CacheError: no image of a data set is in the cache. DataError: all samples, or too many, cannot be used.
    """
    found = load_prepared(directory, preparation.identity)
    if found is not None and (keep or not found.not_in_cache):
        return found
    ledger_path.unlink(missing_ok=True)
    ledger = Ledger(ledger_path)
    total = missing = 0
    with PreparedWriter(directory) as writer:
        for source, name in zip(preparation.sources, preparation.names, strict=True):
            images = _Images(source, name, preparation)
            for item in source:
                total += 1
                try:
                    writer.add(*_render(item, images, preparation))
                except _LeftOutError as error:
                    missing += error.reason == NOT_IN_CACHE
                    ledger.leave_out(item.id, error.reason, data=name, **error.detail)
            images.check_that_some_were_found()
        if not len(writer):
            names = ", ".join(preparation.names)
            raise DataError(f"{names}: none of the {total} samples can be trained on; {ledger_path} has the reasons")
        ledger.check_ratio(total, preparation.max_bad_ratio)
        return writer.commit(preparation.identity, left_out=ledger.count, not_in_cache=missing)


class _LeftOutError(Exception):
    """Why a sample is not used."""

    def __init__(self, reason: str, **detail: Any) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _render(
    item: Sample | Rejected, images: "_Images", preparation: Preparation
) -> tuple[np.ndarray, np.ndarray, list[str], list[Grid]]:
    """Ids int32 [tokens], supervised uint8 [tokens], keys and grids of the images."""
    if isinstance(item, Rejected):
        raise _LeftOutError(item.reason)
    if not any(turn.role == "assistant" for turn in item.turns):
        raise _LeftOutError(NO_ANSWER)
    found = [images.find(image) for image in item.images]
    keys, grids = [key for key, _ in found], [grid for _, grid in found]
    try:
        rendered = preparation.renderer.render(item.turns, grids)
    except PromptError as error:
        raise _LeftOutError(str(error)) from error
    if len(rendered.ids) > preparation.row_tokens:
        raise _LeftOutError(TOO_LONG, tokens=len(rendered.ids), row_tokens=preparation.row_tokens)
    supervised = np.zeros(len(rendered.ids), np.uint8)
    for start, end in rendered.spans:
        supervised[start:end] = 1
    assert not supervised[0], "a sample begins with a header, which has no loss"
    return np.asarray(rendered.ids, np.int32), supervised, keys, grids


class _Images:
    """Keys and grids of one source's images: by name where the encode pass noted it, else by the image's bytes."""

    def __init__(self, source: Source, name: str, preparation: Preparation) -> None:
        self._source, self._name = source, name
        self._cache, self._command = preparation.cache, preparation.encode_command
        self._found = self._missing = 0

    def find(self, image: ImageRef) -> tuple[str, Grid]:
        key = self._cache.key_of(self._source.digest, image.name)
        if key is None:
            try:
                key = image_key(image.read())
            except ImageError as error:
                raise self._missed(image=image.name, because=str(error)) from error
        if key not in self._cache:
            raise self._missed(image=image.name, key=key)
        self._found += 1
        return key, self._cache.record(key).grid

    def check_that_some_were_found(self) -> None:
        if self._missing and not self._found:
            raise CacheError(
                f"expected the images of {self._name} in the cache, found none of the first {self._missing}; "
                f"run: {self._command(self._name)}"
            )

    def _missed(self, **detail: Any) -> _LeftOutError:
        self._missing += 1
        if self._missing >= HOPELESS:
            self.check_that_some_were_found()
        return _LeftOutError(NOT_IN_CACHE, **detail)
