"""The llama.cpp engine: a GGUF pair of `llama3v export --format gguf`, visual tokens fed in as embeddings.

The prompt is ours (model/prompt.py) and the tiles are ours; llama.cpp only reads tokens and embeddings, so the model
gets exactly what it was trained with, which stock programs' own slicing and framing would not give it.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from llama3v.engines.base import ImageFeatures, Piece, Room
from llama3v.engines.batched import BatchedCaches
from llama3v.engines.cached import CachedEngine, check_conversations
from llama3v.engines.generation import CachedGeneration
from llama3v.engines.gguf_vision import GgufVision
from llama3v.engines.llama_api import MOST_CONTEXT, Llama
from llama3v.engines.llama_group import LlamaGroup
from llama3v.engines.prefix import Caches, Span
from llama3v.engines.together import Together
from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.prompt import Renderer
from llama3v.model.tiles import Tiles
from llama3v.model.whereabouts import LLM_FILE, VISION_FILE

_MARKS = 64  # tokens around the turns of a question, and more
_REMEMBERED_TEXTS = 16384


class LlamaCppEngine(CachedEngine):
    """Runs a GGUF pair.

    Args:
        directory: holds model.gguf, mmproj.gguf and tokenizer.json.
        kv: type of the KV cache: "f32", "f16", "q8_0" or "q4_0".
        context_tokens: most of a conversation; default: what the model was trained for, at most 8192.
        tower: engine of the vision tower (feature_cache/encoders); default: OpenVINO where it is installed, else torch.
        threads: default: the cores that this process may use.
        conversations: see Engine; each has a KV cache of `context_tokens` from the start.
        room: for all that a conversation will hold, up to `context_tokens`; without, the first image opens the tower.

    Raises CheckpointError for files that are absent, damaged or no pair, ConfigError where an extra is missing.
    """

    name = "llamacpp"

    def __init__(
        self,
        directory: str | Path,
        *,
        kv: str = "f16",
        context_tokens: int | None = None,
        tower: str | None = None,
        threads: int | None = None,
        conversations: int = 1,
        room: Room | None = None,
    ) -> None:
        check_conversations(conversations)
        if context_tokens is not None and context_tokens < 1:
            raise ConfigError(f"expected a context of 1 token or more, found {context_tokens} (--context)")
        self._together: Together | None = None
        folder = Path(directory)
        self.vision = vision = GgufVision(folder / VISION_FILE, tower)
        tiles = {"max_tiles": vision.max_tiles, "tokens_per_tile": vision.tokens_per_tile}
        places = context_tokens if room is None else tokens_of(room, most=context_tokens or MOST_CONTEXT, **tiles)
        with ThreadPoolExecutor(2, "open") as pool:  # both are other libraries' work, without Python's lock
            llm = pool.submit(
                Llama,
                folder / LLM_FILE,
                context_tokens=places,
                kv=kv,
                threads=threads,
                sequences=conversations,
            )
            opened = pool.submit(vision.open) if room is not None and room.images else None
            tokenizer = _tokenizer(folder / "tokenizer.json")
            renderer = Renderer(
                tokenizer, vision.prompt_format, vision.tokens_per_tile, vision.image_token_id, own=True
            )
            self.llm = llm.result()
            if opened is not None:
                opened.result()
        if context_tokens is not None and context_tokens > self.llm.trained_tokens:
            raise ConfigError(
                f"expected a context of at most {self.llm.trained_tokens} tokens, for which this model was trained, "
                f"found {context_tokens} (--context)"
            )
        if vision.hidden != self.llm.hidden:
            raise CheckpointError(
                f"{folder}: {VISION_FILE} makes visual tokens of {vision.hidden} numbers, {LLM_FILE} takes "
                f"{self.llm.hidden}; use the two files of one export"
            )
        self._set_up(
            tokenizer,
            renderer,
            self._new_caches(conversations),
            context_tokens=self.llm.context_tokens,
            trained_tokens=self.llm.trained_tokens,
            tile_size=vision.tile_size,
            max_tiles=vision.max_tiles,
            feature_shape=vision.feature_shape,
        )

    def _new_caches(self, conversations: int) -> Caches:
        if conversations == 1:
            return Caches([LlamaReader(self.llm, self.vision.image_token_id)])
        caches = BatchedCaches(LlamaGroup(self.llm, conversations), conversations)
        self._together = Together(caches)
        return caches

    def run(self, generation: CachedGeneration, hear: Callable[[Piece], None]) -> None:
        """See Engine."""
        if self._together is None:
            super().run(generation, hear)
        else:
            self._together.run(generation, hear)

    def _visual_tokens_of_tiles(self, tiles: Tiles) -> np.ndarray:
        return self.vision.encode(tiles)

    def _visual_tokens_of_features(self, image: ImageFeatures) -> np.ndarray:
        return self.vision.project(image)


class LlamaReader:
    """See Reader (prefix.py): a context of llama.cpp for one conversation."""

    def __init__(self, llm: Llama, image_token_id: int) -> None:
        self._llm = llm
        self._image_token_id = image_token_id

    def read(self, start: int, span: Span) -> np.ndarray:
        """Tokens and embeddings in turns: a batch of llama.cpp has either."""
        logits = np.zeros(0, np.float32)
        visual = np.concatenate(span.visual) if span.visual else np.zeros((0, 0), np.float32)
        place = used = 0
        while place < len(span.ids):
            is_visual = span.ids[place] == self._image_token_id
            end = place + 1
            while end < len(span.ids) and (span.ids[end] == self._image_token_id) == is_visual:
                end += 1
            new = visual[used : used + end - place] if is_visual else span.ids[place:end]
            used += end - place if is_visual else 0
            logits = self._llm.read(start + place, new)
            place = end
        return logits

    def forget(self, keep: int) -> None:
        self._llm.forget(keep)


def tokens_of(room: Room, *, max_tiles: int, tokens_per_tile: int, most: int = MOST_CONTEXT) -> int:
    """Places in a KV cache that hold it; making 8192 ready takes as long as loading an LLM of 100 million weights."""
    image = (1 + room.slices * max_tiles) * (tokens_per_tile + 2)  # a tile has a mark after it
    text = 3 * room.text_bytes  # a byte makes one token at most, and Unicode's NFC makes 3 bytes of one at most
    return min(room.images * image + text + room.new_tokens + _MARKS, most)


def is_gguf_pair(name: str | Path) -> bool:
    """Whether a model's name is a directory that this engine runs."""
    return (Path(name) / LLM_FILE).is_file()


class _Tokenizer:
    """tokenizer.json with the interface that Renderer and Detokenizer use; transformers is slow to import."""

    def __init__(self, path: Path) -> None:
        self.backend_tokenizer = Tokenizer.from_file(str(path))
        # an answer's text is made of decoded pairs of tokens (detokenizer.py), which come again and again
        self._text = functools.lru_cache(_REMEMBERED_TEXTS)(self._decode)

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces  # it never does
        return self._text(tuple(ids), skip_special_tokens)

    def _decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def _tokenizer(path: Path) -> _Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}; export the model with `llama3v export --format gguf`")
    try:
        return _Tokenizer(path)
    except Exception as error:  # the library raises this very class for whatever is wrong with the file
        raise CheckpointError(f"{path} is damaged or cut short ({error}); export the model again") from error
