"""Write a Llama 3-V as a stock directory that transformers, and what reads its layout, load without this package.

model*.safetensors, config.json       the fold (model/fold.py)
tokenizer.json, tokenizer_config.json the LLM's own, with <image> reserved past its vocabulary
chat_template.jinja                   our prompt (model/prompt.py), as a template
processor_config.json                 one tile of tile_size pixels per <image>; preprocessor_config.json for readers of old
generation_config.json                greedy, with every id that ends a turn
README.md                             how to load it; exporters/card.py completes it
"""

import json
from pathlib import Path
from typing import Any

from llama3v.errors import CheckpointError
from llama3v.exporters import licence, texts
from llama3v.model.fold import POSITION_BORDER, fold_config, fold_weights, require_exact_positions
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.model.prompt import IMAGE_TOKEN, Renderer
from llama3v.model.vision import SiglipTower

# Tokens that a form's processor adds by itself: they are reserved, so that loading it changes no id and no size.
FRAMING_TOKENS = {
    "smolvlm": (),
    "idefics3": ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
}
_PROCESSORS = {
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessor"),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessor"),
}
_BICUBIC = 3  # Pillow's number


def write_stock(
    model: Llama3VForConditionalGeneration,
    tokenizer: Any,
    directory: Path,
    *,
    form: str,
    dtype: str,
    program: str = "transformers",
) -> dict[str, Any]:
    """Write `model` into the existing, empty `directory` and return what the summary should say.

    Args:
        tokenizer: the LLM's fast tokenizer.
        form: "smolvlm" or "idefics3".
        dtype: type of the written weights ("float32", "bfloat16", "float16").
        program: "transformers", or "vllm", which reads positions without a border (model/fold.py).

    Raises:
        CheckpointError: the model has no stock form, its tokenizer cannot reserve <image>, or vLLM would round its
            positions.
    """
    tower = foldable_tower(model)
    config = model.config
    renderer = Renderer(tokenizer, config.prompt_format, model.tokens_per_tile, config.image_token_id)
    new_tokens = (IMAGE_TOKEN, *FRAMING_TOKENS[form])
    write_tokenizer(tokenizer, config, new_tokens, renderer, directory)
    border = POSITION_BORDER
    if program == "vllm":
        require_exact_positions(tower.grid_side)
        border = 0
    _write_json(directory / "config.json", _stock_config(config, tokenizer, renderer, form, dtype, border))
    _write_json(directory / "generation_config.json", _generation_config(tokenizer, renderer))
    processor = _processor_config(tower, model.tokens_per_tile, form)
    _write_json(directory / "processor_config.json", processor)
    _write_json(directory / "preprocessor_config.json", processor["image_processor"])
    (directory / "chat_template.jinja").write_text(texts.chat_template(config.prompt_format))
    tensors, size = _write_weights(model, tower, len(new_tokens), dtype, directory, border)
    base = licence.base_of(config.text_config, tokenizer)
    built_with = licence.built_with(base)
    (directory / "README.md").write_text(texts.readme(form, tower.tile_size, model.tokens_per_tile, built_with))
    return {
        "format": "hf",
        "form": form,
        "dtype": dtype,
        "program": program,
        "tensors": tensors,
        "bytes": size,
        "image_token_id": config.image_token_id,
        "tokens_per_tile": model.tokens_per_tile,
        "base": base,
    }


def foldable_tower(model: Llama3VForConditionalGeneration) -> SiglipTower:
    """The model's tower, if it and the projector have a stock counterpart; else CheckpointError."""
    if not isinstance(model.vision, SiglipTower):
        raise CheckpointError(
            f"a tower of kind {model.vision.kind} has no stock form, so this model runs in llama3v only; "
            "export a model that was built on a SigLIP tower"
        )
    if model.config.projector_head != "linear":
        raise CheckpointError(
            "a projector with an MLP at its end has no stock form: it is for ablations, and runs in llama3v only"
        )
    return model.vision


def _write_weights(
    model: Llama3VForConditionalGeneration,
    tower: SiglipTower,
    new_tokens: int,
    dtype: str,
    directory: Path,
    border: int,
) -> tuple[int, int]:
    """Write model.safetensors (in shards past 5 GB); returns the number of tensors and their bytes."""
    import torch
    from huggingface_hub import save_torch_state_dict

    sizes = {"depth": tower.depth, "grid_side": tower.grid_side, "new_tokens": new_tokens, "border": border}
    folded = fold_weights(model.state_dict(), **sizes)
    folded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in folded.items()}
    save_torch_state_dict(folded, directory, max_shard_size="5GB", metadata={"format": "pt"})
    return len(folded), sum(tensor.nbytes for tensor in folded.values())


def write_tokenizer(
    tokenizer: Any, config: Any, new_tokens: tuple[str, ...], renderer: Renderer, directory: Path
) -> None:
    """tokenizer.json and tokenizer_config.json, with `new_tokens` at image_token_id and the ids after it."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    first = config.image_token_id
    taken = [token for token in new_tokens if backend.token_to_id(token) is not None]
    if taken:
        raise CheckpointError(
            f"the tokenizer has its own {taken[0]} (id {backend.token_to_id(taken[0])}), which the export reserves as "
            f"id {first}; use an LLM without image tokens"
        )
    # An embedding is often larger than the vocabulary; new tokens take the next free id, so fill up to it.
    free = range(backend.get_vocab_size(with_added_tokens=True), first)
    reserved = [*(f"<|reserved_{index}|>" for index in free), *new_tokens]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in reserved])
    found = [backend.token_to_id(token) for token in new_tokens]
    if found != list(range(first, first + len(new_tokens))):
        raise CheckpointError(
            f"expected to reserve {', '.join(new_tokens)} from id {first}, but the tokenizer gives them the ids "
            f"{found}; its ids have gaps, so this LLM has no stock form here"
        )
    # The chat template writes the begin token itself; a post-processor would add a second one.
    backend.post_processor = None
    _keep_header_apart(backend)
    backend.save(str(directory / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": backend.id_to_token(renderer.stop_ids[0]),
        "pad_token": tokenizer.pad_token or backend.id_to_token(renderer.stop_ids[-1]),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.text_config.max_position_embeddings,
        "extra_special_tokens": _framing(new_tokens),
    }
    _write_json(directory / "tokenizer_config.json", {k: v for k, v in content.items() if v is not None})


def _keep_header_apart(backend: Any) -> None:
    """Let the line breaks after a header be one piece, as model/prompt.py writes them, whatever text follows.

    Llama 3's own tokenizer does so; GPT-2's pattern cuts the last line break off a run of them.
    """
    from tokenizers import Regex, pre_tokenizers

    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    if ids("\n\nA") != ids("\n\n") + ids("A"):
        split = pre_tokenizers.Split(Regex(r"\A\n\n"), behavior="isolated")  # \A: just after a control token
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])


def _framing(new_tokens: tuple[str, ...]) -> dict[str, str]:
    """What stands around an image, by the names under which a SmolVLM processor asks for it: nothing."""
    if len(new_tokens) > 1:  # Idefics3's processor has its framing built in
        return {"image_token": IMAGE_TOKEN}
    return {"image_token": IMAGE_TOKEN, "fake_image_token": "", "global_image_token": ""}


def _stock_config(
    config: Any, tokenizer: Any, renderer: Renderer, form: str, dtype: str, border: int
) -> dict[str, Any]:
    content = fold_config(config, form=form, new_tokens=1 + len(FRAMING_TOKENS[form]), dtype=dtype, border=border)
    ids = _special_ids(tokenizer, renderer)
    content["text_config"] |= ids
    return content | {key: value for key, value in ids.items() if key != "bos_token_id"}


def _generation_config(tokenizer: Any, renderer: Renderer) -> dict[str, Any]:
    return {"do_sample": False, **_special_ids(tokenizer, renderer)}


def _special_ids(tokenizer: Any, renderer: Renderer) -> dict[str, Any]:
    stops = list(renderer.stop_ids)
    pad = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops,
        "pad_token_id": stops[-1] if pad is None else pad,
    }


def _processor_config(tower: SiglipTower, tokens_per_tile: int, form: str) -> dict[str, Any]:
    """One image is one tile: resized directly to the tile's size (do_resize would first keep its aspect ratio)."""
    processor, image_processor = _PROCESSORS[form]
    edge = {"longest_edge": tower.tile_size}
    pixels = {
        "do_convert_rgb": True,
        "do_resize": False,
        "do_image_splitting": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
        "do_pad": True,
        "resample": _BICUBIC,
        "size": edge,
        "max_image_size": edge,
    }
    content: dict[str, Any] = {
        "processor_class": processor,
        "image_seq_len": tokens_per_tile,
        "image_processor": {"image_processor_type": image_processor, "processor_class": processor, **pixels},
    }
    if form == "smolvlm":  # its processor insists on a video processor
        content["video_processor"] = {"video_processor_type": "SmolVLMVideoProcessor", **pixels}
        for image_only in ("do_image_splitting",):
            del content["video_processor"][image_only]
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
