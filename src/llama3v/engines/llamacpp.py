"""The llama.cpp engine: a GGUF pair of `llama3v export --format gguf`, visual tokens fed in as embeddings.

The prompt is ours (model/prompt.py) and the tiles are ours; llama.cpp only reads tokens and embeddings, so the model
gets exactly what it was trained with, which stock programs' own slicing and framing would not give it.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from llama3v.engines.base import EngineImage, ImageFeatures, Question
from llama3v.engines.detokenizer import Detokenizer
from llama3v.engines.gguf_vision import GgufVision
from llama3v.engines.llama_api import Llama
from llama3v.errors import CheckpointError, PromptError
from llama3v.model.prompt import Renderer, Turn
from llama3v.model.slicing import Grid
from llama3v.model.tiles import decode_image, image_key

LLM_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
REMEMBERED_IMAGES = 16

Cell = int | tuple[str, int]
"""What stands at one place of the KV cache: a token id, or (an image's key, number of its visual token)."""


class LlamaCppEngine:
    """Runs a GGUF pair.

    A question that begins as the one before it (the next turn of a chat, another question about the same image) reads
    only what is new; an image that was seen goes through the vision tower no more.

    Args:
        directory: holds model.gguf, mmproj.gguf and tokenizer.json.
        kv: type of the KV cache: "f32", "f16", "q8_0" or "q4_0".
        context_tokens: default: what the model was trained for, at most 8192.
        tower: engine of the vision tower (feature_cache/encoders); default: OpenVINO where it is installed, else torch.

    Raises CheckpointError for files that are absent, damaged or no pair, ConfigError where an extra is missing.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        kv: str = "f16",
        context_tokens: int | None = None,
        tower: str | None = None,
        threads: int | None = None,
    ) -> None:
        folder = Path(directory)
        self.tokenizer = _tokenizer(folder / "tokenizer.json")
        self.llm = Llama(folder / LLM_FILE, context_tokens=context_tokens, kv=kv, threads=threads)
        self.vision = GgufVision(folder / VISION_FILE, tower)
        if self.vision.hidden != self.llm.hidden:
            raise CheckpointError(
                f"{folder}: {VISION_FILE} makes visual tokens of {self.vision.hidden} numbers, {LLM_FILE} takes "
                f"{self.llm.hidden}; use the two files of one export"
            )
        self.context_tokens = self.llm.context_tokens
        self.tile_size = self.vision.tile_size
        image_token_id = self.vision.image_token_id
        self.renderer = Renderer(self.tokenizer, self.vision.prompt_format, self.vision.tokens_per_tile, image_token_id)
        self._seen: OrderedDict[str, tuple[np.ndarray, Grid]] = OrderedDict()  # the latest last
        self._cells: list[Cell] = []  # what the KV cache holds
        self._last_reader: object = None  # the stream that put it there

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """See Engine. The prompt is checked and the images are encoded before this returns."""
        keys = [self._key(image) for image in images]
        seen = [self._visual_tokens(key, image) for key, image in zip(keys, images, strict=True)]
        rendered = self.renderer.render(turns, [grid for _, grid in seen], generate=True)
        if len(rendered.ids) + max_new_tokens > self.context_tokens:
            raise PromptError(
                f"expected at most {self.context_tokens} tokens (the context), found a prompt of {len(rendered.ids)} "
                f"and an answer of up to {max_new_tokens}; ask with fewer images, fewer turns or --max-new-tokens"
            )
        cells: list[Cell] = list(rendered.ids)
        values: dict[int, np.ndarray] = {}  # place -> visual token
        for slot in rendered.slots:
            for offset in range(slot.length):
                number = slot.tile * slot.length + offset
                cells[slot.start + offset] = (keys[slot.image], number)
                values[slot.start + offset] = seen[slot.image][0][number]
        return self._pieces(cells, values, max_new_tokens, temperature, seed)

    def answer(
        self,
        turns: Sequence[Turn],
        images: Sequence[EngineImage] = (),
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """See Engine."""
        return "".join(self.stream(turns, images, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """See Engine. One after the other: the KV cache holds one conversation."""
        return [self.answer(turns, images, max_new_tokens=max_new_tokens) for turns, images in questions]

    def _key(self, image: EngineImage) -> str:
        if isinstance(image, ImageFeatures):
            return f"features {image_key(image.features.float().cpu().numpy().tobytes())} {image.grid}"
        if isinstance(image, bytes):
            return image_key(image)
        return image_key(repr((image.mode, image.size)).encode() + image.tobytes())

    def _visual_tokens(self, key: str, image: EngineImage) -> tuple[np.ndarray, Grid]:
        """(visual tokens of all tiles [n, hidden], grid) of an image; the latest ones are remembered."""
        if key not in self._seen:
            if isinstance(image, ImageFeatures):
                self._seen[key] = (self.vision.project(image), image.grid)
            else:
                picture: Image.Image = decode_image(image) if isinstance(image, bytes) else image
                self._seen[key] = self.vision.encode(picture.convert("RGB"))
        self._seen.move_to_end(key)
        found = self._seen[key]
        while len(self._seen) > REMEMBERED_IMAGES:
            self._seen.popitem(last=False)
        return found

    def _pieces(
        self, cells: list[Cell], values: dict[int, np.ndarray], max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[str]:
        random = np.random.default_rng(seed)
        detokenizer = Detokenizer(self.tokenizer)
        logits = self._read_prompt(cells, values)
        self._last_reader = values
        for made in range(1, max_new_tokens + 1):
            token = choose(logits[: self.vision.image_token_id], temperature, random)
            if token in self.renderer.stop_ids:
                break
            if piece := detokenizer.push(token):
                yield piece
            if made == max_new_tokens:
                break
            cells.append(token)
            if self._last_reader is values:
                logits = self._read(len(cells) - 1, [token], cells)
            else:  # another stream was read in between: the KV cache is its
                logits = self._read_prompt(cells, values)
                self._last_reader = values
        if rest := detokenizer.rest():
            yield rest

    def _read_prompt(self, cells: list[Cell], values: dict[int, np.ndarray]) -> np.ndarray:
        """Logits after `cells`, of which only what the KV cache lacks is read: tokens and embeddings in turns."""
        start = _common(self._cells, cells[:-1])  # at least the last token is read, for its logits
        self._cells = self._cells[:start]
        self.llm.forget(start)
        logits = np.zeros(0, np.float32)
        while start < len(cells):
            visual = start in values
            end = start + 1
            while end < len(cells) and (end in values) == visual:
                end += 1
            if visual:
                logits = self._read(start, np.stack([values[place] for place in range(start, end)]), cells)
            else:
                logits = self._read(start, [cell for cell in cells[start:end] if isinstance(cell, int)], cells)
            start = end
        return logits

    def _read(self, start: int, new: Sequence[int] | np.ndarray, cells: list[Cell]) -> np.ndarray:
        """Read what stands in `cells` from `start` on, given as ids or embeddings."""
        logits = self.llm.read(start, new)
        self._cells += cells[start : start + len(new)]
        if np.isnan(logits).any():
            raise CheckpointError(
                "expected numbers from the model, found NaN; its weights are damaged, export the model again"
            )
        return logits


def choose(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """The next token out of logits [vocabulary]; temperature 0 is greedy."""
    if temperature == 0:
        return int(logits.argmax())
    odds = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return int(random.choice(len(odds), p=odds / odds.sum()))


def is_gguf_pair(name: str | Path) -> bool:
    """Whether a model's name is a directory that this engine runs."""
    return (Path(name) / LLM_FILE).is_file()


def _common(before: Sequence[Cell], now: Sequence[Cell]) -> int:
    """How many cells the two begin with together."""
    for place, (old, new) in enumerate(zip(before, now, strict=False)):
        if old != new:
            return place
    return min(len(before), len(now))


class _Tokenizer:
    """tokenizer.json with the interface that Renderer and Detokenizer use; transformers is slow to import."""

    def __init__(self, path: Path) -> None:
        self.backend_tokenizer = Tokenizer.from_file(str(path))

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces  # it never does
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def _tokenizer(path: Path) -> _Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}; export the model with `llama3v export --format gguf`")
    return _Tokenizer(path)
