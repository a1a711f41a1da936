"""Where the images of prepared data lie: key -> data set, name and grid, for modes that read images while they train.

prepared/<...>/locations.safetensors   keys [images, 16], sources [images], grids [images, 2], names (UTF-8, one after
                                       another), name_starts [images + 1]; every key once
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llama3v.data.sources.base import AddressableSource, ImageRef
from llama3v.errors import DataError
from llama3v.model.slicing import Grid

LOCATIONS = "locations.safetensors"


@dataclass(frozen=True)
class Place:
    """Where an image lies, and how it was to be cut when the data was prepared.

    Attributes:
        source: number of the data set, and `data` its name as the user wrote it.
    """

    source: int
    data: str
    image: ImageRef
    grid: Grid


Locate = Callable[[str], Place]
"""Place of an image by its key. DataError for an unknown key."""


class LocationsWriter:
    """Gathers locations while data is prepared."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._keys, self._names = bytearray(), bytearray()
        self._sources, self._grids, self._name_starts = array("i"), array("i"), array("q", [0])

    def add(self, key: str, source: int, name: str, grid: Grid) -> None:
        """Note where an image lies, the first time it is met. `source` counts the data sets from 0."""
        short = bytes.fromhex(key)
        if short not in self._known:
            self._known.add(short)
            self._keys += short
            self._names += name.encode(errors="surrogateescape")
            self._sources.append(source)
            self._grids.extend((grid.columns, grid.rows))
            self._name_starts.append(len(self._names))

    def save(self, directory: Path) -> None:
        """Write the file."""
        arrays: dict[str, np.ndarray] = {
            "keys": np.frombuffer(bytes(self._keys), np.uint8).reshape(-1, 16),
            "names": np.frombuffer(bytes(self._names), np.uint8),
            "sources": np.asarray(self._sources, np.int32),
            "grids": np.asarray(self._grids, np.int32).reshape(-1, 2),
            "name_starts": np.asarray(self._name_starts, np.int64),
        }
        save_file(arrays, directory / LOCATIONS)


class Locations:
    """What a LocationsWriter wrote."""

    def __init__(self, directory: Path) -> None:
        from llama3v.feature_cache.index import SortedKeys

        arrays = load_file(directory / LOCATIONS)
        halves = np.ascontiguousarray(arrays["keys"]).view(">u8").astype(np.uint64)
        self._keys = SortedKeys(halves[:, 0], halves[:, 1])
        self._names, self._starts, self._sources = arrays["names"], arrays["name_starts"], arrays["sources"]
        self._grids = arrays["grids"]

    def find(self, key: str) -> tuple[int, str, Grid] | None:
        """(number of the data set, name of the image, its grid), or None."""
        positions = self._keys.find(bytes.fromhex(key))
        if not len(positions):
            return None
        place = int(positions[0])
        name = self._names[self._starts[place] : self._starts[place + 1]].tobytes()
        columns, rows = self._grids[place].tolist()
        return int(self._sources[place]), name.decode(errors="surrogateescape"), Grid(columns, rows)


def locate_in(parts: Sequence[tuple[Locations, Sequence[AddressableSource], Sequence[str]]]) -> Locate:
    """A `Locate` over several preparations: of each the locations, the data sets, and the names of these.

    Data sets count through all of them.
    """

    def locate(key: str) -> Place:
        before = 0
        for locations, sources, names in parts:
            if (found := locations.find(key)) is not None:
                number, name, grid = found
                return Place(before + number, names[number], sources[number].image(name), grid)
            before += len(sources)
        raise DataError(f"no image {key} in {', '.join(name for _, _, names in parts for name in names)}")

    return locate
