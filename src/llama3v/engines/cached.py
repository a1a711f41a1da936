"""What the engines share: images looked at once, prompts checked, answers streamed over KV caches. No torch here."""

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from llama3v.config import Sampling
from llama3v.engines.base import EngineImage, ImageFeatures, Piece, Question
from llama3v.engines.generation import CachedGeneration
from llama3v.engines.grammar import Grammars
from llama3v.engines.prefix import Caches, Prompt, SeenImage
from llama3v.engines.turns import FairLock
from llama3v.errors import ConfigError, PromptError
from llama3v.model.prompt import Renderer, Turn
from llama3v.model.tiles import Tiles, decode_image, image_key, make_tiles, upright_rgb

REMEMBERED_IMAGES = 16


class CachedEngine(ABC):
    """An Engine (base.py) on a runtime whose KV cache can be shortened.

    A runtime brings `_visual_tokens_of_*` (the tower and the projector) and KV caches (prefix.py), and calls `_set_up`.
    """

    name: str

    def _set_up(
        self,
        tokenizer: Any,
        renderer: Renderer,
        caches: Caches,
        *,
        context_tokens: int,
        tile_size: int,
        max_tiles: int,
        feature_shape: tuple[int, int],
        trained_tokens: int | None = None,
    ) -> None:
        """Make it ready.

        Args:
            feature_shape: (patches, width) of a tile's features at the cut.
            trained_tokens: how far `context_tokens` could be raised (--context); default: not at all.
        """
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.context_tokens = context_tokens
        self._trained_tokens = trained_tokens or context_tokens
        self._grammars = Grammars(tokenizer, renderer.stop_ids)
        self.conversations = len(caches)
        self._caches = caches
        self.tile_size, self._max_tiles, self._feature_shape = tile_size, max_tiles, feature_shape
        self._seen: OrderedDict[str, SeenImage] = OrderedDict()  # the latest last
        self._seen_lock = threading.Lock()
        self._vision_lock = FairLock()

    @abstractmethod
    def _visual_tokens_of_tiles(self, tiles: Tiles) -> Any:
        """Tiles -> visual tokens [tiles * tokens_per_tile, hidden] as this runtime takes them."""

    @abstractmethod
    def _visual_tokens_of_features(self, image: ImageFeatures) -> Any:
        """The same from features at the cut."""

    @property
    def max_tiles(self) -> int:
        """Most slices of an image."""
        return self._max_tiles

    def visual_tokens(self, tiles: Tiles) -> Any:
        """Visual tokens [tiles * tokens_per_tile, hidden], for who keeps them: `generate` takes a SeenImage of them."""
        return self._visual_tokens_of_tiles(tiles)

    def generate(
        self,
        turns: Sequence[Turn],
        images: Sequence["EngineImage | SeenImage"] = (),
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> CachedGeneration:
        """See Engine."""
        prompt = self._prompt(turns, images, max_new_tokens)
        sampling = sampling or Sampling()
        grammar = None if sampling.json_schema is None else self._grammars.start(sampling.json_schema)
        return CachedGeneration(
            self._caches,
            prompt,
            self.tokenizer,
            self.renderer.stop_ids,
            self.renderer.image_token_id,
            max_new_tokens,
            sampling,
            grammar,
        )

    def run(self, generation: CachedGeneration, hear: Callable[[Piece], None]) -> None:
        """See Engine. A runtime that reads for several conversations in one pass has its own."""
        for piece in generation:
            hear(piece)

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
        """See Engine."""
        sampling = sampling or Sampling(temperature=temperature, seed=seed)
        return _texts(self.generate(turns, images, max_new_tokens=max_new_tokens, sampling=sampling))

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
        """See Engine."""
        options: dict[str, Any] = {"temperature": temperature, "seed": seed, "sampling": sampling}
        return "".join(self.stream(turns, images, max_new_tokens=max_new_tokens, **options))

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """See Engine. One after the other; a runtime that is faster with many at once has its own."""
        return [self.answer(turns, images, max_new_tokens=max_new_tokens) for turns, images in questions]

    def _prompt(
        self, turns: Sequence[Turn], images: Sequence["EngineImage | SeenImage"], max_new_tokens: int
    ) -> Prompt:
        if max_new_tokens < 1:
            raise PromptError(f"expected an answer of 1 token or more, found {max_new_tokens} (--max-new-tokens)")
        seen = [self._look_at(image) for image in images]
        rendered = self.renderer.render(turns, [image.grid for image in seen], generate=True)
        if len(rendered.ids) + max_new_tokens > self.context_tokens:
            room = (
                f", or give --context, up to {self._trained_tokens}"
                if self._trained_tokens > self.context_tokens
                else ""
            )
            raise PromptError(
                f"expected at most {self.context_tokens} tokens (the model's context), found a prompt of "
                f"{len(rendered.ids)} and an answer of up to {max_new_tokens}; ask with fewer images, fewer turns or "
                f"--max-new-tokens{room}"
            )
        return Prompt(rendered, seen)

    def _look_at(self, image: "EngineImage | SeenImage") -> SeenImage:
        """Decode and cut an image, unless it is among those remembered; the tower runs when an answer needs it."""
        if isinstance(image, SeenImage):
            return image
        if isinstance(image, Image.Image):
            image = upright_rgb(image)  # before its key: palettes and EXIF are no part of the pixels
        key = _key(image)
        with self._seen_lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return self._seen[key]
        seen = self._decoded(key, image)
        with self._seen_lock:
            seen = self._seen.setdefault(key, seen)
            self._seen.move_to_end(key)
            while len(self._seen) > REMEMBERED_IMAGES:
                self._seen.popitem(last=False)
        return seen

    def _decoded(self, key: str, image: EngineImage) -> SeenImage:
        if isinstance(image, ImageFeatures):
            self._check(image)
            return SeenImage(key, image.grid, lambda: self._visual_tokens_of_features(image), self._vision_lock)
        picture = decode_image(image) if isinstance(image, bytes) else image
        tiles = make_tiles(picture, self.tile_size, self._max_tiles)
        return SeenImage(key, tiles.grid, lambda: self._visual_tokens_of_tiles(tiles), self._vision_lock)

    def _check(self, image: ImageFeatures) -> None:
        expected = (image.grid.tiles, *self._feature_shape)
        if tuple(image.features.shape) != expected:
            raise PromptError(
                f"expected features of {expected} for a grid of {image.grid.columns}x{image.grid.rows}, "
                f"found {tuple(image.features.shape)}; use the cache that was made for this model"
            )


def check_conversations(conversations: int) -> int:
    """ConfigError where an engine is asked for none."""
    if conversations < 1:
        raise ConfigError(f"expected 1 conversation or more at once, found {conversations}")
    return conversations


def _key(image: EngineImage) -> str:
    if isinstance(image, ImageFeatures):
        return f"features {image_key(image.features.float().cpu().numpy().tobytes())} {image.grid}"
    if isinstance(image, bytes):
        return image_key(image)
    return image_key(repr(image.size).encode() + image.tobytes())


def _texts(generation: CachedGeneration) -> Iterator[str]:
    try:
        for piece in generation:
            if piece.text:
                yield piece.text
    finally:
        generation.close()
