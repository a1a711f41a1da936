"""The reference engine: our model in PyTorch, with a KV cache, streaming, and left-padded batches."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llama3v.engines.base import EngineImage, ImageFeatures, Question
from llama3v.engines.detokenizer import Detokenizer
from llama3v.errors import CheckpointError, PromptError
from llama3v.model.llama3v import Llama3VForConditionalGeneration, load_model
from llama3v.model.prompt import Renderer, Turn
from llama3v.model.tiles import decode_image, image_key, make_tiles, to_pixels

REMEMBERED_IMAGES = 16  # at most 24 MB each (7 tiles of so400m in fp32)


class TorchEngine:
    """Runs a Llama 3-V in PyTorch: in fp32 on a CPU, in bf16 on a GPU.

    Args:
        model_dir: a Llama 3-V model directory or hub name.
        device: "cpu", "cuda", ...; default: a GPU where there is one.

    Raises CheckpointError where the model cannot be loaded.
    """

    def __init__(self, model_dir: str | Path, device: str | None = None) -> None:
        model, tokenizer = load_model(model_dir)
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
        model.to(device=target, dtype=dtype)  # type: ignore[call-arg]  # transformers' wrapper loses the self
        self._set_up(model, tokenizer)

    @classmethod
    def of(cls, model: Llama3VForConditionalGeneration, tokenizer: Any) -> "TorchEngine":
        """An engine of a model in memory, left on its device and in its precision; it is put into evaluation mode."""
        engine = cls.__new__(cls)
        engine._set_up(model, tokenizer)
        return engine

    def _set_up(self, model: Llama3VForConditionalGeneration, tokenizer: Any) -> None:
        self.model = model.eval()
        self.device = model.projector.norm.weight.device
        self.dtype = model.projector.norm.weight.dtype
        self.tokenizer = tokenizer
        config = model.config
        self.renderer = Renderer(tokenizer, config.prompt_format, model.tokens_per_tile, config.image_token_id)
        self.context_tokens: int = config.text_config.max_position_embeddings
        self.tile_size = model.vision.tile_size
        self._seen: OrderedDict[str, ImageFeatures] = OrderedDict()  # the latest last

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
        ids, features = self._prompt(turns, images, max_new_tokens)
        return self._pieces(ids, features, max_new_tokens, temperature, seed)

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

    @torch.inference_mode()
    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """See Engine. All questions run as one batch: give as many as memory holds, of similar length."""
        if not questions:
            return []
        prompts = [self._prompt(turns, images, max_new_tokens) for turns, images in questions]
        width = max(len(ids) for ids, _ in prompts)
        # left padding: every prompt ends at the last column, where the first new token is predicted
        ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in prompts], device=self.device)
        features = [features for _, features in prompts if features is not None]
        answers: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        logits, past = self._read_prompt(ids, torch.cat(features) if features else None, mask)
        for _ in range(max_new_tokens):
            tokens = logits.argmax(-1)  # [batch]
            for index, token in enumerate(tokens.tolist()):
                if index in running and token in self.renderer.stop_ids:
                    running.remove(index)
                if index in running:
                    answers[index].append(token)
            if not running:
                break
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            logits = self._read_token(tokens[:, None], past, mask)
        return [Detokenizer(self.tokenizer).text_of(answer) for answer in answers]

    def features_of(self, image: EngineImage) -> ImageFeatures:
        """What the vision tower's trunk makes of an image; the latest ones are remembered, so chat encodes it once."""
        if isinstance(image, ImageFeatures):
            return self._checked(image)
        key = image_key(image) if isinstance(image, bytes) else image_key(repr(image.size).encode() + image.tobytes())
        if key not in self._seen:
            self._seen[key] = self._encode(decode_image(image) if isinstance(image, bytes) else image)
        self._seen.move_to_end(key)
        while len(self._seen) > REMEMBERED_IMAGES:
            self._seen.popitem(last=False)
        return self._seen[key]

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> ImageFeatures:
        tower = self.model.vision
        tiles = make_tiles(image.convert("RGB"), tower.tile_size, self.model.config.max_tiles)
        pixels = to_pixels(tiles.pixels, tower.mean, tower.std)  # [tiles, 3, S, S]
        return ImageFeatures(tower.trunk(pixels.to(self.device, self.dtype)), tiles.grid)

    def _checked(self, image: ImageFeatures) -> ImageFeatures:
        tower = self.model.vision
        expected = (image.grid.tiles, tower.grid_side**2, tower.width)
        if tuple(image.features.shape) != expected:
            raise PromptError(
                f"expected features of {expected} for a grid of {image.grid.columns}x{image.grid.rows}, "
                f"found {tuple(image.features.shape)}; use the cache that was made for this model"
            )
        return image

    def _prompt(
        self, turns: Sequence[Turn], images: Sequence[EngineImage], max_new_tokens: int
    ) -> tuple[list[int], Tensor | None]:
        """Token ids, and the features of all tiles [tiles, patches, width] or None without images."""
        seen = [self.features_of(image) for image in images]
        ids = self.renderer.render(turns, [image.grid for image in seen], generate=True).ids
        if len(ids) + max_new_tokens > self.context_tokens:
            raise PromptError(
                f"expected at most {self.context_tokens} tokens (the model's context), found a prompt of {len(ids)} "
                f"and an answer of up to {max_new_tokens}; ask with fewer images, fewer turns or --max-new-tokens"
            )
        features = [image.features.to(self.device, self.dtype) for image in seen]
        return ids, torch.cat(features) if features else None

    def _pieces(
        self, ids: list[int], features: Tensor | None, max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[str]:
        random = torch.Generator().manual_seed(seed)
        detokenizer = Detokenizer(self.tokenizer)
        mask = torch.ones(1, len(ids), dtype=torch.long, device=self.device)
        logits, past = self._read_prompt(torch.tensor([ids], device=self.device), features, mask)
        for made in range(1, max_new_tokens + 1):
            token = _choose(logits[0], temperature, random)
            if token in self.renderer.stop_ids:
                break
            if piece := detokenizer.push(token):
                yield piece
            if made < max_new_tokens:
                mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
                logits = self._read_token(torch.tensor([[token]], device=self.device), past, mask)
        if rest := detokenizer.rest():
            yield rest

    @torch.inference_mode()
    def _read_prompt(self, ids: Tensor, features: Tensor | None, mask: Tensor) -> tuple[Tensor, Any]:
        """ids [batch, length] -> logits of the next token [batch, vocabulary], and the KV cache."""
        out = self.model.llm(
            inputs_embeds=self.model.embed(ids, features),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # padding does not count
            use_cache=True,
            logits_to_keep=1,
        )
        return _finite(out.logits[:, -1]), out.past_key_values

    @torch.inference_mode()
    def _read_token(self, tokens: Tensor, past: Any, mask: Tensor) -> Tensor:
        """One more token for each of the batch [batch, 1] -> logits [batch, vocabulary]; `past` grows in place."""
        out = self.model.llm(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=past,
            use_cache=True,
        )
        return _finite(out.logits[:, -1])


def _choose(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    """The next token out of logits [vocabulary]. Sampling happens on the CPU: the same seed, the same draw."""
    if temperature == 0:
        return int(logits.argmax())
    odds = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    return int(torch.multinomial(odds, 1, generator=random))


def _finite(logits: Tensor) -> Tensor:
    if logits.isnan().any():
        raise CheckpointError(
            "expected numbers from the model, found NaN; its weights are damaged, use another checkpoint"
        )
    return logits
