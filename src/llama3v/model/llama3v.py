"""Llama 3-V: a vision tower, the projection block and a Llama, as one Hugging Face model.

Visual tokens are *prepended* to the text of the turn that owns the image: the prompt holds `image_token_id` at their
places (model/prompt.py), and `embed` puts the projector's output there.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from llama3v.errors import CheckpointError, ConfigError, PromptError
from llama3v.model.llm import load_llm, load_tokenizer
from llama3v.model.on_base import Base, load_on_base, refers_to_base, save_on_base
from llama3v.model.projector import Projector
from llama3v.model.prompt import detect_format
from llama3v.model.vision import VisionTower, load_stock, load_tower, make_tower, refuse_missing, stored_part
from llama3v.model.whereabouts import require_model


class Llama3VConfig(PreTrainedConfig):
    """Everything that decides the shape and the prompt of a Llama 3-V.

    Args:
        vision_config: geometry of the vision tower (`VisionTower.geometry`), with its cut.
        text_config: configuration of the LLM (any Llama-family model transformers knows).
        scale_factor: r; r x r patches become one visual token.
        projector_blocks: self-attention blocks in the projector.
        projector_head: "linear", or "mlp" (for ablations) after the unshuffle.
        max_tiles: most slices of one image beside its overview.
        prompt_format: "llama3" or "chatml".
    """

    model_type = "llama3v"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads a plain class attribute)

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        scale_factor: int = 3,
        projector_blocks: int = 2,
        projector_head: str = "linear",
        max_tiles: int = 6,
        prompt_format: str = "llama3",
        **kwargs: Any,
    ) -> None:
        self.vision_config = vision_config or {}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.scale_factor = scale_factor
        self.projector_blocks = projector_blocks
        self.projector_head = projector_head
        self.max_tiles = max_tiles
        self.prompt_format = prompt_format
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def image_token_id(self) -> int:
        """One past the LLM's vocabulary, so that no id it was trained on is taken; exports reserve it as <image>."""
        return self.text_config.vocab_size


class Llama3VForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images and text in, text out. Loads with `from_pretrained`, saves with `save_pretrained`, runs with `generate`.

    Parts: `vision` (VisionTower), `projector` (Projector), `llm` (a causal LM of transformers).

    Attributes:
        base: where the LLM came from, if it stands still and is not to be written with the rest (model/on_base.py).
    """

    base: Base | None = None

    config_class = Llama3VConfig
    base_model_prefix = "llama3v"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Llama3VConfig) -> None:
        super().__init__(config)
        self.vision: VisionTower = make_tower(config.vision_config)
        self.projector = Projector(
            width=self.vision.width,
            heads=self.vision.heads,
            mlp_size=self.vision.mlp_size,
            grid_side=self.vision.grid_side,
            scale_factor=config.scale_factor,
            hidden=config.text_config.hidden_size,
            blocks=config.projector_blocks,
            head=config.projector_head,
        )
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @property
    def tokens_per_tile(self) -> int:
        return self.projector.tokens_per_tile

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts bring their own initialisation (`build_model`); transformers asks only for what a checkpoint lacks."""

    def visual_tokens(self, features: Tensor) -> Tensor:
        """Features at the cut [tiles, patches, width] -> visual tokens [tiles, tokens_per_tile, hidden]."""
        return self.projector(self.vision.top(features.to(self.projector.norm.weight.dtype)))

    def embed(self, input_ids: Tensor, features: Tensor | None = None) -> Tensor:
        """Splice: text embeddings with the visual tokens at the image slots. [batch, length] -> [batch, length, hidden].

        Args:
            input_ids: token ids with `config.image_token_id` wherever a visual token stands.
            features: [tiles, patches, width], the tiles of the whole batch in the order of their slots.

        Raises:
            PromptError: the slots in `input_ids` and the visual tokens of `features` differ in number.
        """
        slots = input_ids == self.config.image_token_id
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(slots, 0))
        wanted, given = int(slots.sum()), 0 if features is None else features.shape[0] * self.tokens_per_tile
        if wanted != given:
            raise PromptError(
                f"the prompt has {wanted} image slots but the images give {given} visual tokens "
                f"({given // self.tokens_per_tile} tiles of {self.tokens_per_tile}); render the prompt with the same images"
            )
        if features is None or not wanted:
            return embeddings
        visual = self.visual_tokens(features).to(embeddings.dtype)
        return embeddings.masked_scatter(slots.unsqueeze(-1), visual)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: [batch, length], see `embed`.
            pixel_values: [tiles, 3, S, S], normalised tiles of the whole batch; or
            features: [tiles, patches, width], what the cache holds for them.
            labels: [batch, length]; -100 where there is no loss (unshifted, as everywhere in transformers).
        """
        if pixel_values is not None and features is not None:
            raise PromptError("give pixel_values or features, not both")
        if inputs_embeds is None:
            if input_ids is None:
                raise PromptError("give input_ids or inputs_embeds")
            if pixel_values is not None:
                features = self.vision.trunk(pixel_values)
            inputs_embeds = self.embed(input_ids, features)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        base: Any = super()  # transformers' annotations of self do not fit a subclass
        inputs = base.prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):  # the images are in the KV cache by now
            inputs["pixel_values"] = inputs["features"] = None
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Beams, and several answers to one prompt: repeat a prompt's tiles as a group, as its tokens are.

        (transformers would repeat them tile by tile, and every prompt of several tiles would see them in disorder.)
        """
        images = {name: kwargs.pop(name) for name in ("pixel_values", "features") if kwargs.get(name) is not None}
        base: Any = super()
        expanded, kwargs = base._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if images and input_ids is not None:
            slots = (input_ids == self.config.image_token_id).sum(dim=1)
            tiles = (slots // self.tokens_per_tile).tolist()  # of each prompt
            for name, stack in images.items():
                if sum(tiles) == len(stack):  # else `embed` says what is wrong
                    stack = torch.cat([group for group in stack.split(tiles) for _ in range(expand_size)])
                kwargs[name] = stack
        return expanded, kwargs


def build_model(
    vision: str,
    llm: str,
    *,
    cut: int | None = None,
    scale_factor: int = 3,
    max_tiles: int = 6,
    prompt_format: str = "auto",
    projector_blocks: int = 2,
    projector_head: str = "linear",
    seed: int = 0,
    llm_dtype: torch.dtype = torch.float32,
) -> tuple[Llama3VForConditionalGeneration, PreTrainedTokenizerBase]:
    """A new Llama 3-V: a pretrained vision tower and a pretrained LLM, joined by a projector at its starting point.

    Args: as in `PretrainConfig`. Returns the model in fp32, its LLM in `llm_dtype`, and the LLM's tokenizer.
    """
    tower = load_tower(vision, cut=cut)
    language_model, tokenizer = load_llm(llm, llm_dtype)
    config = Llama3VConfig(
        vision_config=tower.geometry,
        text_config=language_model.config,
        scale_factor=scale_factor,
        projector_blocks=projector_blocks,
        projector_head=projector_head,
        max_tiles=max_tiles,
        prompt_format=detect_format(tokenizer) if prompt_format == "auto" else prompt_format,
    )
    with torch.device("meta"):  # no memory and no time for a second LLM: only the projector is new
        model = Llama3VForConditionalGeneration(config)
    model.vision, model.llm = tower, language_model
    model.projector.to_empty(device="cpu")
    if language_model.generation_config is not None:
        model.generation_config = language_model.generation_config
    embeddings: Any = model.get_input_embeddings()
    rms = float(embeddings.weight.detach().float().square().mean().sqrt())
    model.projector.initialise(rms, torch.Generator().manual_seed(seed))
    return model.eval(), tokenizer


def save_model(
    model: Llama3VForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, directory: Path | str
) -> None:
    """Write one directory that holds everything: config, weights (safetensors) and the LLM's tokenizer.

    Where the model has a `base`, the frozen LLM is referred to instead, and adapters are written (model/on_base.py).
    """
    if model.base is not None:
        save_on_base(model, tokenizer, Path(directory), model.base)
        return
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load_model(
    name_or_directory: Path | str,
    llm_dtype: torch.dtype = torch.float32,
) -> tuple[Llama3VForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load a Llama 3-V and its tokenizer in evaluation mode, in fp32. Adapters are merged, in memory.

    Args:
        llm_dtype: of the LLM of a directory that holds all of its weights.

    Raises:
        CheckpointError: nothing there, another kind of model, or a tokenizer that does not belong to the LLM.
    """
    path = Path(name_or_directory)
    require_model(name_or_directory)
    if refers_to_base(path):
        return load_on_base(path)
    try:
        model, missing = load_stock(Llama3VForConditionalGeneration, name_or_directory, llm_dtype)
        tokenizer = load_tokenizer(name_or_directory)
    except OSError as error:
        where = "" if path.is_dir() else "there is no such directory, and from the hub: "
        raise CheckpointError(f"no Llama 3-V at {name_or_directory}: {where}{str(error).splitlines()[0]}") from error
    refuse_missing(name_or_directory, missing)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise CheckpointError(
            f"{name_or_directory}: the tokenizer has {len(tokenizer)} tokens but the LLM {model.config.text_config.vocab_size}; "
            "they do not belong together"
        )
    if llm_dtype != torch.float32:  # the rest was rounded on the way: read it again
        for part in ("vision", "projector"):
            module = getattr(model, part).float()
            module.load_state_dict(stored_part(_local(name_or_directory), part))
    return model.eval(), tokenizer


def _local(name_or_directory: Path | str) -> Path:
    """The directory in which a model's files lie; a hub name's have been downloaded."""
    from huggingface_hub import snapshot_download

    path = Path(name_or_directory)
    return path if path.is_dir() else Path(snapshot_download(str(name_or_directory), local_files_only=True))


AutoConfig.register("llama3v", Llama3VConfig)
AutoModelForImageTextToText.register(Llama3VConfig, Llama3VForConditionalGeneration)
__all__ = [
    "ConfigError",
    "Llama3VConfig",
    "Llama3VForConditionalGeneration",
    "build_model",
    "load_llm",
    "load_model",
    "save_model",
]
