"""A model as the gateway sees it: prompts that are counted before they wait, and answers as steps of work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama3v.engines.base import Counts, Sampling
from llama3v.engines.cached import CachedEngine
from llama3v.engines.prefix import SeenImage
from llama3v.engines.turns import FairLock
from llama3v.errors import PromptError
from llama3v.model.prompt import Turn
from llama3v.model.slicing import Grid
from llama3v.model.tiles import Tiles
from llama3v.server.errors import refused
from llama3v.server.pictures import Picture
from llama3v.server.scheduler import Ticket
from llama3v.server.vision_cache import VisionCache


@dataclass(frozen=True)
class Text:
    """More of answer number `choice`; `tokens` where log-probabilities are asked for."""

    choice: int
    text: str
    tokens: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of answer number `choice`."""

    choice: int
    reason: str
    """stop or length"""
    counts: Counts


@dataclass(frozen=True, eq=False)
class Question:
    """Turns and pictures that fit the model: what `ServedModel.question` has checked."""

    turns: Sequence[Turn]
    pictures: Sequence[Picture]
    prompt_tokens: int
    max_new_tokens: int


@dataclass
class Sight:
    """Of the pictures of a request: for how many the vision tower ran. Filled in while it is answered."""

    new_images: int = 0


class Cancelled(Exception):  # noqa: N818 - not an error
    """The client has gone while its picture was looked at."""


class ServedModel:
    """Args:
    engine: any engine of this package.
    name: in the API.
    """

    def __init__(self, engine: CachedEngine, name: str, vision_cache: VisionCache) -> None:
        self.engine = engine
        self.name = name
        self.vision_cache = vision_cache
        self.context_tokens = engine.context_tokens
        self._tower = FairLock()  # towers of some runtimes are for one thread; two would be no faster

    def question(
        self, turns: Sequence[Turn], pictures: Sequence[Picture], max_new_tokens: int | None, most: int
    ) -> Question:
        """Check that everything fits before it waits for a worker.

        Args:
            max_new_tokens: what the client asks for; None: as many as `most`, and as the context has room for.
            most: what the server allows.

        Raises ApiError (400) where the prompt does not fit, or cannot be written.
        """
        tokens = len(self.ids(turns, [picture.grid for picture in pictures]))
        room = self.context_tokens - tokens
        wanted = min(max_new_tokens or most, most)
        if max_new_tokens is None:
            wanted = min(wanted, max(room, 1))
        if wanted > room:
            raise refused(
                f"This model's context holds {self.context_tokens} tokens, but the prompt has {tokens} and the answer "
                f"may have {wanted}. Send less text or fewer or smaller images, or ask for fewer tokens.",
                code="context_length_exceeded",
                param="messages",
            )
        return Question(turns, pictures, tokens, wanted)

    def ids(self, turns: Sequence[Turn], grids: Sequence[Grid] = ()) -> list[int]:
        """The prompt's ids. Raises ApiError (400) where turns cannot be written."""
        try:
            return self.engine.renderer.render(turns, grids, generate=True).ids
        except PromptError:
            raise refused(
                "The messages cannot be written as one prompt: the last must be the user's, only the user's may hold "
                "images, and text must be valid Unicode.",
                code="invalid_messages",
                param="messages",
            ) from None

    def text_ids(self, text: str) -> list[int]:
        """Ids of a plain text alone."""
        try:
            return self.engine.renderer.encode(text)
        except PromptError:
            raise refused("The text is not valid Unicode.", code="invalid_text", param="prompt") from None

    def answers(
        self,
        ticket: Ticket,
        question: Question,
        samplings: Sequence[Sampling],
        sight: Sight,
        hear: Callable[[Text | Finished], None],
    ) -> None:
        """One answer after the other, one for each of `samplings`: work for the scheduler.

        Args:
            hear: gets what is said, maybe in another thread; it must not wait.
        """
        for choice, sampling in enumerate(samplings):
            images = [self._image(picture, ticket, sight) for picture in question.pictures]
            generation = self.engine.generate(
                question.turns, images, max_new_tokens=question.max_new_tokens, sampling=sampling
            )
            ticket.on_cancel(generation.close)
            try:
                self.engine.run(generation, lambda piece, n=choice: hear(Text(n, piece.text, piece.tokens)))  # type: ignore[misc]
            except Cancelled:
                return
            except PromptError:  # all else was refused before it waited (`question`)
                raise refused(
                    "The answer cannot follow the JSON schema any further: it is too complex. Send a simpler one.",
                    code="invalid_json_schema",
                    param="response_format",
                ) from None
            finally:
                generation.close()
            if generation.finish == "closed":
                return
            hear(Finished(choice, str(generation.finish), generation.counts))

    def _image(self, picture: Picture, ticket: Ticket, sight: Sight) -> SeenImage:
        rows = picture.grid.tiles * self.engine.renderer.tokens_per_tile

        def look() -> Any:
            tokens, known = self.vision_cache.get(picture.key, rows, lambda: self._see(picture.tiles, ticket))
            sight.new_images += not known
            return for_engine(self.engine, tokens)

        return SeenImage(picture.key, picture.grid, look, FairLock())

    def _see(self, tiles: Tiles, ticket: Ticket) -> np.ndarray:
        """Visual tokens float32 [tiles * tokens_per_tile, hidden], tile by tile: between two a client may leave."""
        parts = []
        for pixels in tiles.pixels:
            if ticket.cancelled.is_set():
                raise Cancelled
            with self._tower:
                parts.append(as_array(self.engine.visual_tokens(Tiles(pixels[None], Grid(1, 1)))))
        return np.concatenate(parts)


def as_array(tokens: Any) -> np.ndarray:
    """An engine's visual tokens as float32 of numpy."""
    return np.asarray(tokens.float().cpu() if hasattr(tokens, "cpu") else tokens, np.float32)


def for_engine(engine: CachedEngine, tokens: np.ndarray) -> Any:
    """Visual tokens float32 as the engine's own kind of array."""
    if engine.name == "torch":
        import torch

        return torch.from_numpy(tokens).to(engine.device, engine.dtype)  # type: ignore[attr-defined]
    if engine.name == "mlx":
        import mlx.core

        return mlx.core.array(tokens)
    return tokens
