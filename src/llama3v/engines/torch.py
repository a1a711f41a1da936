"""The reference engine: our model in PyTorch, with KV caches, streaming, and left-padded batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama3v.config import AnswerWeights, LlmWeights
from llama3v.engines.base import EngineImage, ImageFeatures, Question
from llama3v.engines.cached import CachedEngine, check_conversations
from llama3v.engines.detokenizer import Detokenizer
from llama3v.engines.prefix import Caches, Span
from llama3v.errors import CheckpointError
from llama3v.feature_cache.encoders.torch import best_device
from llama3v.model.frozen import hold
from llama3v.model.llama3v import Llama3VForConditionalGeneration, load_model
from llama3v.model.prompt import Renderer
from llama3v.model.tiles import Tiles, decode_image, make_tiles, to_pixels, upright_rgb

_HELD: dict[AnswerWeights, LlmWeights] = {"full": "fp32", "int8": "int8", "int4": "nf4"}


class TorchEngine(CachedEngine):
    """Runs a Llama 3-V in PyTorch: in fp32 on a CPU, in bf16 on a GPU (CUDA's, or Apple's through MPS).

    Args:
        model_dir: a Llama 3-V model directory or hub name.
        device: "cpu", "cuda", "mps", ...; default: a GPU where there is one.
        weights: "full", or the LLM's matrices in "int8" or "int4" (NF4), through bitsandbytes (model/frozen.py).
        conversations: see Engine; a KV cache grows as it is needed.

    Raises CheckpointError where the model cannot be loaded, ConfigError where bitsandbytes is needed and absent.
    """

    name = "torch"

    def __init__(
        self,
        model_dir: str | Path,
        device: str | None = None,
        *,
        weights: AnswerWeights = "full",
        conversations: int = 1,
    ) -> None:
        check_conversations(conversations)
        target = torch.device(device) if device is not None else best_device()
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
        # What is rounded further is not held in fp32 on the way: that would be 32 GB for an LLM of 8 billion weights
        model, tokenizer = load_model(model_dir, dtype if weights == "full" else torch.bfloat16)
        hold(model.llm, _HELD[weights], target, dtype)
        model.vision.to(dtype)
        model.projector.to(dtype)
        model.to(device=target)  # type: ignore[call-arg]  # transformers' wrapper loses the self
        self._open(model, tokenizer, conversations)

    @classmethod
    def of(cls, model: Llama3VForConditionalGeneration, tokenizer: Any, *, conversations: int = 1) -> "TorchEngine":
        """An engine of a model in memory, left on its device and in its precision; it is put into evaluation mode."""
        engine = cls.__new__(cls)
        engine._open(model, tokenizer, conversations)
        return engine

    def _open(self, model: Llama3VForConditionalGeneration, tokenizer: Any, conversations: int) -> None:
        self.model = model.eval()
        self.device = model.projector.norm.weight.device
        self.dtype = model.projector.norm.weight.dtype
        config, tower = model.config, model.vision
        self._set_up(
            tokenizer,
            Renderer(tokenizer, config.prompt_format, model.tokens_per_tile, config.image_token_id),
            Caches([_TorchReader(model) for _ in range(conversations)]),
            context_tokens=config.text_config.max_position_embeddings,
            tile_size=tower.tile_size,
            max_tiles=config.max_tiles,
            feature_shape=(tower.grid_side**2, tower.width),
        )

    def features_of(self, image: EngineImage) -> ImageFeatures:
        """What the vision tower's trunk makes of an image, as the feature cache holds it (there in bf16)."""
        if isinstance(image, ImageFeatures):
            self._check(image)
            return image
        picture = decode_image(image) if isinstance(image, bytes) else upright_rgb(image)
        tiles = make_tiles(picture, self.tile_size, self._max_tiles)
        return ImageFeatures(self._trunk(tiles), tiles.grid)

    @torch.inference_mode()
    def _trunk(self, tiles: Tiles) -> Tensor:
        tower = self.model.vision
        pixels = to_pixels(tiles.pixels, tower.mean, tower.std)  # [tiles, 3, S, S]
        return tower.trunk(pixels.to(self.device, self.dtype))

    def _visual_tokens_of_tiles(self, tiles: Tiles) -> Tensor:
        return self._project(self._trunk(tiles))

    def _visual_tokens_of_features(self, image: ImageFeatures) -> Tensor:
        return self._project(image.features.to(self.device, self.dtype))

    @torch.inference_mode()
    def _project(self, features: Tensor) -> Tensor:
        return self.model.visual_tokens(features).flatten(0, 1)  # [tiles * tokens_per_tile, hidden]

    @torch.inference_mode()
    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """See Engine. All questions run as one batch: give as many as memory holds, of similar length."""
        prompts = [self._prompt(turns, images, max_new_tokens) for turns, images in questions]
        if not prompts:
            return []
        spans = [prompt.span(0, len(prompt.ids)) for prompt in prompts]
        with self._caches.lock:
            answers = self._answer_batch(spans, max_new_tokens)
        return [Detokenizer(self.tokenizer).text_of(answer) for answer in answers]

    def _answer_batch(self, spans: Sequence[Span], max_new_tokens: int) -> list[list[int]]:
        width = max(len(span.ids) for span in spans)
        # left padding: every prompt ends at the last column, where the first new token is predicted
        mask = torch.tensor([[0] * (width - len(span.ids)) + [1] * len(span.ids) for span in spans], device=self.device)
        embeddings = torch.stack(
            [torch.nn.functional.pad(embed(self.model, span), (0, 0, width - len(span.ids), 0)) for span in spans]
        )
        out = self.model.llm(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # padding does not count
            use_cache=True,
            logits_to_keep=1,
        )
        answers: list[list[int]] = [[] for _ in spans]
        running = set(range(len(spans)))
        for _ in range(max_new_tokens):
            tokens = _finite(out.logits[:, -1]).argmax(-1)  # [batch]
            for index, token in enumerate(tokens.tolist()):
                if index in running and token in self.renderer.stop_ids:
                    running.remove(index)
                if index in running:
                    answers[index].append(token)
            if not running:
                break
            mask = torch.cat([mask, mask.new_ones(len(spans), 1)], dim=1)
            out = self.model.llm(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        return answers


class _TorchReader:
    """See Reader (prefix.py): transformers' growing cache of one conversation."""

    def __init__(self, model: Llama3VForConditionalGeneration) -> None:
        self._model = model
        self._past: Any = None

    @torch.inference_mode()
    def read(self, start: int, span: Span) -> np.ndarray:
        out = self._model.llm(
            inputs_embeds=embed(self._model, span)[None],
            past_key_values=self._past,  # its length tells the positions
            use_cache=True,
            logits_to_keep=1,
        )
        self._past = out.past_key_values
        logits: np.ndarray = out.logits[0, -1].float().cpu().numpy()
        return logits

    def forget(self, keep: int) -> None:
        length = 0 if self._past is None else self._past.get_seq_length()
        if keep == 0:
            self._past = None
        elif keep < length:
            self._past.crop(keep - length)


def embed(model: Llama3VForConditionalGeneration, span: Span) -> Tensor:
    """Text embeddings with the visual tokens in their places [length, hidden]: `Llama3V.embed` of a part of a prompt."""
    table = model.get_input_embeddings()
    ids = torch.tensor(span.ids, device=model.projector.norm.weight.device)
    slots = ids == model.config.image_token_id
    embeddings: Tensor = table(ids.masked_fill(slots, 0))
    if span.visual:
        embeddings[slots] = torch.cat(span.visual).to(embeddings.dtype)
    return embeddings


def _finite(logits: Tensor) -> Tensor:
    if logits.isnan().any():
        raise CheckpointError(
            "expected numbers from the model, found NaN; its weights are damaged, use another checkpoint"
        )
    return logits
