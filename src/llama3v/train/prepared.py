"""The rendered samples on disk: written once per run, then memory-mapped.

    out/prepared/training/
      tokens.bin        int32, the samples' ids one after another, image_token_id at the visual tokens
      supervised.bin    uint8, 1 where a token has loss
      index.safetensors starts [samples + 1], image_starts [samples + 1], labels [samples] (tokens with loss),
                        keys [images, 32] (hexadecimal digits), grids [images, 2]
      names.jsonl, shown.json  for people (names.py)
      locations.safetensors  only in modes that read images while they train (locations.py)
      prepared.json     what it was made from, and the digest of the three files

Memory stays flat: what is held is a few numbers per sample.
"""

import json
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from llama3v.model.slicing import Grid
from llama3v.train.locations import LOCATIONS, Locations, LocationsWriter
from llama3v.train.names import NamesWriter, ShownSample, has_names

FORMAT = 1
TOKENS, SUPERVISED, INDEX, DESCRIPTION = "tokens.bin", "supervised.bin", "index.safetensors", "prepared.json"
KEY_DIGITS = 32


@dataclass(frozen=True)
class PreparedData:
    """Rendered samples. Sample i has the tokens `starts[i]:starts[i + 1]`, and its images likewise.

    Attributes:
        directory: where it lies.
        made_from: what the data is a function of, in words.
        digest: hash of all that training reads.
        left_out: samples of the sources that are not here; the ledger has the reasons.
        not_in_cache: of them, those of which an image was not found.
        below_min_score: of them, those whose pair score is too low.
        locations: where the images lie, if that was noted.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    image_starts: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    grids: np.ndarray
    made_from: dict[str, Any]
    digest: str
    left_out: int
    not_in_cache: int
    below_min_score: int
    locations: Locations | None
    directory: Path = Path()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, visual tokens included."""
        return np.diff(self.starts)

    @property
    def tiles(self) -> np.ndarray:
        """Tiles of every sample, overviews included."""
        slices = self.grids.prod(axis=1)
        ends = np.concatenate([[0], np.cumsum(np.where(slices == 1, 1, slices + 1))])
        return ends[self.image_starts[1:]] - ends[self.image_starts[:-1]]

    def length(self, sample: int) -> int:
        """Tokens of one sample."""
        return int(self.starts[sample + 1] - self.starts[sample])

    def images(self, sample: int) -> list[str]:
        """Keys of a sample's images, in the order of their slots."""
        found = self.keys[self.image_starts[sample] : self.image_starts[sample + 1]]
        return [key.tobytes().decode() for key in found]

    def grids_of(self, sample: int) -> tuple[tuple[int, int], ...]:
        """(columns, rows) of every image of a sample."""
        found = self.grids[self.image_starts[sample] : self.image_starts[sample + 1]]
        return tuple((int(columns), int(rows)) for columns, rows in found)


class PreparedWriter:
    """Writes prepared data beside its place; `commit` moves it there when it is complete."""

    def __init__(self, directory: Path, locations: LocationsWriter | None = None) -> None:
        self.directory = directory
        self.locations = locations
        self._temporary = directory.with_name(f".preparing-{directory.name}")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._tokens = (self._temporary / TOKENS).open("wb")
        self._supervised = (self._temporary / SUPERVISED).open("wb")
        self._names = NamesWriter(self._temporary)
        self._starts, self._image_starts = array("q", [0]), array("q", [0])
        self._labels, self._keys, self._grids = array("i"), bytearray(), array("i")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __enter__(self) -> "PreparedWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def add(
        self, ids: np.ndarray, supervised: np.ndarray, keys: Sequence[str], grids: Sequence[Grid], shown: ShownSample
    ) -> None:
        """Add one sample: ids int32 [tokens], supervised uint8 [tokens], keys and grids of its images; and for people."""
        self._names.add(shown)
        self._tokens.write(ids.tobytes())
        self._supervised.write(supervised.tobytes())
        self._labels.append(int(supervised.sum()))
        self._starts.append(self._starts[-1] + len(ids))
        self._image_starts.append(self._image_starts[-1] + len(keys))
        for key, grid in zip(keys, grids, strict=True):
            assert len(key) == KEY_DIGITS, f"an image key has {KEY_DIGITS} digits, not {key!r}"
            self._keys += key.encode()
            self._grids.extend((grid.columns, grid.rows))

    def commit(
        self, made_from: dict[str, Any], *, left_out: int, not_in_cache: int, below_min_score: int = 0
    ) -> PreparedData:
        """Move what was added to its place and open it."""
        self._close()
        self._names.commit()
        arrays: dict[str, np.ndarray] = {
            "starts": np.asarray(self._starts, np.int64),
            "image_starts": np.asarray(self._image_starts, np.int64),
            "labels": np.asarray(self._labels, np.int32),
            "keys": np.frombuffer(bytes(self._keys), np.uint8).reshape(-1, KEY_DIGITS),
            "grids": np.asarray(self._grids, np.int32).reshape(-1, 2),
        }
        save_file(arrays, self._temporary / INDEX)
        if self.locations is not None:
            self.locations.save(self._temporary)
        description = {
            "format": FORMAT,
            "samples": len(self),
            "made_from": made_from,
            "left_out": left_out,
            "not_in_cache": not_in_cache,
            "below_min_score": below_min_score,
            "digest": digest_of(self._temporary),
            "locations": _locations_digest(self._temporary),
        }
        (self._temporary / DESCRIPTION).write_text(json.dumps(description, indent=1))
        shutil.rmtree(self.directory, ignore_errors=True)
        self._temporary.rename(self.directory)
        found = load_prepared(self.directory, made_from, with_locations=self.locations is not None)
        assert found is not None, "what was just written loads"
        return found

    def _close(self) -> None:
        self._tokens.close()
        self._supervised.close()
        self._names.close()


def load_prepared(directory: Path, made_from: dict[str, Any], *, with_locations: bool = False) -> PreparedData | None:
    """The data in `directory`, or None where there is none, it was made from something else, or is damaged.

    It is a by-product of sources and cache, so what is damaged is not an error: it is made again.

    Args:
        with_locations: data without them are as good as none.
    """
    try:
        description = json.loads((directory / DESCRIPTION).read_text())
        if (description["format"], description["made_from"]) != (FORMAT, made_from):
            return None
        if description["digest"] != digest_of(directory) or not has_names(directory):
            return None
        locations = _locations_digest(directory)
        if with_locations and (not locations or description.get("locations") != locations):
            return None
        return PreparedData(
            directory=directory,
            tokens=np.memmap(directory / TOKENS, np.int32, mode="r"),
            supervised=np.memmap(directory / SUPERVISED, np.uint8, mode="r"),
            made_from=made_from,
            digest=description["digest"],
            left_out=description["left_out"],
            not_in_cache=description["not_in_cache"],
            below_min_score=description.get("below_min_score", 0),  # absent where an earlier version prepared it
            locations=Locations(directory) if with_locations else None,
            **load_file(directory / INDEX),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest_of(directory: Path) -> str:
    """xxh3_128 over all that decides the losses. Raises OSError where a file is missing."""
    return _digest(directory, (TOKENS, SUPERVISED, INDEX))


def _locations_digest(directory: Path) -> str:
    return _digest(directory, (LOCATIONS,)) if (directory / LOCATIONS).exists() else ""


def _digest(directory: Path, names: tuple[str, ...]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for name in names:
        with (directory / name).open("rb") as file:
            while block := file.read(16 * 2**20):
                digest.update(block)
    return digest.hexdigest()
