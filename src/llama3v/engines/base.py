"""What every engine can do: answer turns about images. Verbs, evaluation and serving know nothing more of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from llama3v.model.prompt import Turn
from llama3v.model.slicing import Grid

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """An image that the vision tower has seen: the features at the cut [tiles, patches, width], and its grid."""

    features: "torch.Tensor"
    grid: Grid


EngineImage: TypeAlias = "bytes | Image.Image | ImageFeatures"
"""The bytes of an image file, a decoded picture, or what the feature cache holds for one."""

Question: TypeAlias = tuple[Sequence[Turn], Sequence[EngineImage]]
"""Turns that end with the user's, and the images that they own, in order."""


class Engine(Protocol):
    """A way to run a trained model.

    All three raise PromptError where turns and images do not fit together or the prompt and `max_new_tokens` exceed the
    model's context (nothing is ever truncated), and ImageError for an image that cannot be read; before any output.

    Attributes:
        tile_size: side of a tile in pixels; a picture of that size is not cut.
    """

    tile_size: int

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The answer, piece by piece as it is made. Temperature 0 is greedy; closing the iterator stops the work."""
        ...

    def answer(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The pieces of `stream`, joined."""
        ...

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """Greedy answers to many questions at once, in their order."""
        ...
