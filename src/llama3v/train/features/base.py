"""What training asks of every mode: to find an image when data is prepared, and to give features when it trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from llama3v.data.sources.base import ImageRef
from llama3v.model.slicing import Grid
from llama3v.train.locations import Locate

Say = Callable[[str], None]


class NotFoundError(Exception):
    """An image that cannot be used. The text is the reason; `detail` goes to the ledger beside it."""

    def __init__(self, reason: str, **detail: str) -> None:
        super().__init__(reason)
        self.detail = detail


class ImageLookup(Protocol):
    """Tells of an image, without decoding it, its key and how it is cut. May be asked in a thread."""

    def find(self, source_digest: str, image: ImageRef) -> tuple[str, Grid]:
        """Raises NotFoundError."""

    def advice(self, encode_command: str) -> str:
        """What to do where no image of a data set is found."""


@dataclass(frozen=True)
class Demand:
    """What a run will ask for.

    Attributes:
        keys_of: step, counted from 0 -> the images that are read for it, in order, each once; with those of a validation
            that follows it.
        step: the first step. steps: where training ends. epoch_steps: about as many make an epoch.
        checkpoint_every: steps between checkpoints.
    """

    keys_of: Callable[[int], list[str]]
    step: int
    steps: int
    epoch_steps: int
    checkpoint_every: int


class FeatureSource(ABC):
    """Gives the features of images. Called from the thread that assembles passes, and from the one that validates.

    Attributes:
        lookup: finds images when data is prepared.
        fingerprint: of the features, whatever the mode they come in: what losses depend on.
        needs_files: whether images are read while it trains, so that the prepared data must say where they lie.
    """

    lookup: ImageLookup
    fingerprint: str
    needs_files: ClassVar[bool] = False

    def open_files(self, locate: Locate) -> None:
        """Before the first `features` where `needs_files`: how to get at an image of the prepared data."""
        return

    def expect(self, demand: Demand) -> None:
        """Before the first `features`: what is going to be asked for."""
        return

    @abstractmethod
    def features(self, keys: Sequence[str]) -> Tensor:
        """The features of images, one image after another: bf16 [tiles, patches, width], on the CPU.

        Raises:
            CacheError: a record is missing or damaged. DataError: an image cannot be read, or changed.
            StoppedError: `stop` was called while it waited.
        """

    def checkpointed(self, step: int) -> None:
        """A checkpoint after this many steps is committed: training never goes back behind it."""
        return

    def finished(self) -> None:
        """The last step is trained and its checkpoint committed."""
        return

    def report_waiting(self, say: Say) -> None:
        """Where to tell what it waits for; an empty text ends it."""
        return

    def stop(self) -> None:
        """A call of `features` that waits for others ends soon, and so does every later one that would wait. Takes no
        lock: signal handlers call it."""
        return

    def close(self) -> None:
        """Let go of files and locks, after whatever happened."""
        return


class StoppedError(Exception):
    """`FeatureSource.stop` was called while features were waited for."""
