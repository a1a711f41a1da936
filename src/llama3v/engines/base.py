"""What every engine can do: answer turns about images. Verbs, evaluation and serving know nothing more of it.

What a server may rely on:

- **Threads.** `generate`, `stream`, `answer` and `answer_batch` may be called from several threads at once, and each
  Generation may be read in a thread of its own. Answers do not disturb one another: each is what it would be alone, up
  to the rounding of a batch. The model itself runs one step at a time, in turns of one token or one part of a prompt.
- **Refusals come first.** Whatever is wrong with a request (turns, images, the context) raises in the call of
  `generate`, before any vision or LLM work and before any output. The images are decoded there too. What raises later,
  while reading, is a CheckpointError: a damaged model; or a PromptError: a JSON schema that is too complex further on.
- **Cancelling.** `Generation.close` may be called from any thread, at any time, more than once. The work ends within one
  step: a token, a part of a prompt (`engines/prefix.py: PART_TOKENS`), or an image in the vision tower. The next read
  ends the iteration and `finish` is "closed". Others are not touched. A Generation that is dropped unread costs nothing.
- **Together.** `run` makes a whole answer, and several that are made at the same time may be read in the same passes of the
  model (llama.cpp with several conversations). Greedy answers are the same as alone.
- **Several conversations.** An engine keeps the KV caches of `conversations` conversations (an argument of its
  constructor). More Generations than that still answer right, but take each other's cache away and read prompts again:
  let the rest wait in a queue.
- **Prefix reuse.** Whatever a prompt begins with that stands in a free KV cache, visual tokens included, is not computed
  again: the next turn, or another question about the same image. Images are known by a hash of their content. The latest
  `REMEMBERED_IMAGES` keep their features, so an image in another place of a prompt costs no vision either.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from llama3v.config import Sampling
from llama3v.model.prompt import Turn
from llama3v.model.slicing import Grid

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = [
    "BatchEngine",
    "Counts",
    "Engine",
    "EngineImage",
    "Generation",
    "ImageFeatures",
    "Piece",
    "Question",
    "Room",
    "Sampling",
    "Token",
]


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """An image that the vision tower has seen: the features at the cut [tiles, patches, width], and its grid."""

    features: "torch.Tensor"
    grid: Grid


EngineImage: TypeAlias = "bytes | Image.Image | ImageFeatures"
"""The bytes of an image file, a decoded picture (of any mode, EXIF obeyed), or what the feature cache holds for one."""

Question: TypeAlias = tuple[Sequence[Turn], Sequence[EngineImage]]
"""Turns that end with the user's, and the images that they own, in order."""


@dataclass(frozen=True)
class Room:
    """What a conversation will hold at most, for who knows it before a model is opened: less memory is made ready.

    Attributes:
        images: where there are some, the vision tower is opened at once; else the first image opens it.
        text_bytes: of all turns, in UTF-8.
        new_tokens: of the answers.
        slices: images are cut; without, they are overviews alone.
    """

    images: int
    text_bytes: int
    new_tokens: int
    slices: bool = True


Finish: TypeAlias = Literal["stop", "length", "closed"]
"""Why an answer ended: the model or a stop text ended it, `max_new_tokens` were made, or it was closed."""


@dataclass(frozen=True)
class Token:
    """A token that was chosen, or an alternative to one. `logprob`: natural logarithm, of the model's own odds."""

    id: int
    text: str
    logprob: float
    alternatives: tuple["Token", ...] = ()
    """The likeliest tokens at this place, as many as `Sampling.logprobs` asks for."""


@dataclass(frozen=True)
class Piece:
    """Text that is final, and the tokens since the piece before it (none unless `Sampling.logprobs` asks for them)."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass
class Counts:
    """What an answer took; complete when its iteration has ended."""

    prompt_tokens: int = 0
    """All of the prompt, visual and cached tokens among them."""
    visual_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt: those that a KV cache held already."""
    new_tokens: int = 0
    """Tokens made, without the one that ends the turn."""
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    """Reading the prompt, without vision, but with the turns of others in between; so the next one."""
    decode_seconds: float = 0.0


class Generation(Protocol):
    """One answer in the making: an iterator of its pieces."""

    counts: Counts
    finish: Finish | None
    """None until the iteration has ended."""

    def __iter__(self) -> Iterator[Piece]: ...

    def __next__(self) -> Piece: ...

    def close(self) -> None:
        """Stop the work; from any thread."""
        ...


class BatchEngine(Protocol):
    """What evaluation and captions need: many questions, answered greedily.

    Attributes:
        tile_size: side of a tile in pixels; a picture of that size is not cut.
    """

    tile_size: int

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """Greedy answers to many questions at once, in their order. Raises as Engine does."""
        ...


class Engine(BatchEngine, Protocol):
    """A way to run a trained model.

    Those that take turns raise PromptError where turns and images do not fit together or the prompt and `max_new_tokens` exceed the
    model's context (nothing is ever truncated), and ImageError for an image that cannot be read; before any output.

    Attributes:
        name: "torch", "llamacpp" or "mlx".
        context_tokens: most tokens of a prompt and its answer together.
        conversations: KV caches that are kept.
    """

    name: str
    context_tokens: int
    conversations: int

    def generate(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> Generation:
        """Check and begin an answer; the work is done while it is read, or by `run`. Without `sampling` it is greedy."""
        ...

    def run(self, generation: Any, hear: Callable[[Piece], None]) -> None:
        """Make the whole of an answer that `generate` began. Returns when it has ended, or was closed.

        Args:
            hear: gets its pieces, maybe in another thread; it must not wait.
        """
        ...

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """The texts of `generate`; closing the iterator stops the work. `sampling` wins over the other two."""
        ...

    def answer(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        sampling: Sampling | None = None,
    ) -> str:
        """The pieces of `stream`, joined."""
        ...
