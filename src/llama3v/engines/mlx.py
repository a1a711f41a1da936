"""The MLX engine: the LLM through mlx-lm on Apple's GPUs. Extra: llama3v[mlx]; on Linux it runs on the CPU, for tests.

The model is an ordinary Llama 3-V directory. Its LLM becomes mlx-lm's, in memory; the tower runs on an encode engine of
the cache, by default in MLX, too.
"""

import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama3v.engines.base import ImageFeatures
from llama3v.engines.cached import CachedEngine, check_conversations
from llama3v.engines.prefix import Caches, Span
from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.prompt import Renderer
from llama3v.model.tiles import Tiles

if TYPE_CHECKING:
    import mlx.core as mx

    from llama3v.config import AnswerWeights
    from llama3v.model.llama3v import Llama3VForConditionalGeneration

BITS = {"int8": 8, "int4": 4}
GROUPS = (64, 32)  # numbers that share a scale: mlx-lm's default, and what narrow models need


class MlxEngine(CachedEngine):
    """Runs a Llama 3-V in MLX: in bf16 on a GPU, in fp32 on a CPU.

    Args:
        model_dir: a Llama 3-V model directory or hub name.
        weights: "full", or the LLM's matrices in "int8" or "int4" (MLX's own affine quantisation).
        kv_bits: 8 or 4: a KV cache of so many bits; default: as the model computes.
        tower: engine of the vision tower (feature_cache/encoders); default: MLX for SigLIP, else torch.
        conversations: see Engine; a KV cache grows as it is needed.

    Raises CheckpointError where the model cannot be loaded, ConfigError where the extra is missing.
    """

    name = "mlx"

    def __init__(
        self,
        model_dir: str | Path,
        *,
        weights: "AnswerWeights" = "full",
        kv_bits: int | None = None,
        tower: str | None = None,
        conversations: int = 1,
    ) -> None:
        check_conversations(conversations)
        require_mlx()
        import torch

        from llama3v.engines.vision import Vision
        from llama3v.model.llama3v import load_model

        in_full = weights == "full" and not _on_gpu()
        model, tokenizer = load_model(model_dir, torch.float32 if in_full else torch.bfloat16)
        config = model.config
        _check_kv(kv_bits, config.text_config)
        self.vision = Vision(
            model.vision, model.projector, tower or ("mlx" if model.vision.kind == "siglip" else "torch")
        )
        renderer = Renderer(tokenizer, config.prompt_format, model.tokens_per_tile, config.image_token_id)
        # MLX ties arrays to the thread that made them, and an answer may be read in any thread
        self._thread = ThreadPoolExecutor(1, "mlx")
        self.llm = self._thread.submit(_take_llm, model, weights).result()
        self._set_up(
            tokenizer,
            renderer,
            Caches([_MlxReader(self.llm, self._thread, config.image_token_id, kv_bits) for _ in range(conversations)]),
            context_tokens=config.text_config.max_position_embeddings,
            tile_size=self.vision.tile_size,
            max_tiles=config.max_tiles,
            feature_shape=self.vision.feature_shape,
        )

    def _visual_tokens_of_tiles(self, tiles: Tiles) -> np.ndarray:
        return self._thread.submit(self.vision.encode, tiles).result()

    def _visual_tokens_of_features(self, image: ImageFeatures) -> np.ndarray:
        return self.vision.project(image)


class _MlxReader:
    """See Reader (prefix.py): mlx-lm's prompt cache of one conversation."""

    def __init__(self, llm: Any, thread: ThreadPoolExecutor, image_token_id: int, kv_bits: int | None) -> None:
        self._llm = llm
        self._thread = thread
        self._image_token_id = image_token_id
        self._kv_bits = kv_bits
        self._past: list[Any] = []

    def read(self, start: int, span: Span) -> np.ndarray:
        return self._thread.submit(self._read, span).result()

    def _read(self, span: Span) -> np.ndarray:
        import mlx.core as mx
        from mlx_lm.generate import maybe_quantize_kv_cache
        from mlx_lm.models.cache import make_prompt_cache

        self._past = self._past or make_prompt_cache(self._llm)
        ids = mx.array(span.ids)
        slots = ids == self._image_token_id
        embeddings = self._llm.model.embed_tokens(mx.where(slots, 0, ids))
        if span.visual:
            places = mx.array([place for place, id in enumerate(span.ids) if id == self._image_token_id])
            embeddings[places] = mx.array(np.concatenate(span.visual)).astype(embeddings.dtype)
        hidden = self._llm.model(ids[None], self._past, embeddings[None])[
            :, -1
        ]  # [1, hidden]: one row through the head
        tied = self._llm.args.tie_word_embeddings
        logits = self._llm.model.embed_tokens.as_linear(hidden) if tied else self._llm.lm_head(hidden)
        maybe_quantize_kv_cache(self._past, 0, GROUPS[-1], self._kv_bits)
        logits = logits[0].astype(mx.float32)
        mx.eval(logits, [cache.state for cache in self._past])
        return np.array(logits)

    def forget(self, keep: int) -> None:
        self._thread.submit(self._forget, keep).result()

    def _forget(self, keep: int) -> None:
        from mlx_lm.models.cache import trim_prompt_cache

        if keep == 0:
            self._past = []
        elif self._past:
            trim_prompt_cache(self._past, self._past[0].offset - keep)


def require_mlx() -> None:
    """ConfigError, naming the extra, where MLX or mlx-lm is not installed."""
    try:
        importlib.import_module("mlx.core")
        importlib.import_module("mlx_lm.models.llama")
    except ImportError as error:
        raise ConfigError(f"the engine mlx is not installed ({error}): pip install 'llama3v[mlx]'") from error


def _check_kv(kv_bits: int | None, text: Any) -> None:
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if kv_bits is not None and (kv_bits not in (4, 8) or head % GROUPS[-1]):
        raise ConfigError(
            f"expected a KV cache of 4 or 8 bits and heads of a multiple of {GROUPS[-1]} numbers, found {kv_bits} bits "
            f"and heads of {head}; leave kv_bits away"
        )


def _on_gpu() -> bool:
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.gpu))


def _take_llm(model: "Llama3VForConditionalGeneration", weights: "AnswerWeights") -> Any:
    """mlx-lm's Llama with the LLM's weights; the LLM in torch is empty afterwards."""
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.models.llama import Model, ModelArgs

    text = model.config.text_config
    if text.model_type != "llama":
        raise CheckpointError(f"expected an LLM of the type llama, found {text.model_type!r}; give --engine torch")
    rope = dict(getattr(text, "rope_parameters", None) or {})
    scaled = rope.get("rope_type", "default") != "default"
    shape = text.to_dict() | {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": rope if scaled else None}
    llm = Model(ModelArgs.from_dict(shape))
    taken = list(_arrays(model.llm, mx.bfloat16 if _on_gpu() else mx.float32))
    llm.load_weights(
        [(name, array) for name, array in taken if name != "lm_head.weight" or not text.tie_word_embeddings]
    )
    if weights != "full":
        group = next((size for size in GROUPS if text.hidden_size % size == text.intermediate_size % size == 0), None)
        if group is None:
            raise ConfigError(
                f"an LLM of width {text.hidden_size} cannot be held in {weights} here; give --weights full"
            )
        nn.quantize(llm, group_size=group, bits=BITS[weights])
    mx.eval(llm.parameters())
    return llm.eval()


def _arrays(llm: Any, dtype: "mx.Dtype") -> Iterator[tuple[str, "mx.array"]]:
    """Names and values of the LLM's weights, each dropped in torch as soon as it is copied."""
    import mlx.core as mx
    import torch

    for name, parameter in llm.named_parameters():  # a tied head is not among them
        array = mx.array(parameter.detach().float().numpy()).astype(dtype)
        mx.eval(array)
        parameter.data = torch.empty(0)
        yield name, array
