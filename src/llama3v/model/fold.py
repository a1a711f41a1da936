"""The fold: a Llama 3-V is a stock Idefics3 / SmolVLM checkpoint under other names.

    vision layers 1..k, the projector's blocks   ->  vision_model.encoder.layers, k + 2 of them
    projector.norm                               ->  vision_model.post_layernorm
    unshuffle (r), projector.linear              ->  connector (scale_factor = r), modality_projection.proj
    llm                                          ->  text_model, lm_head

Pure functions from our tensors and config to theirs; exporters/hf.py writes what they return. Two tensors change:
the position table grows by a border of zeros (`padded_positions`), the vocabulary by the reserved tokens (`grow_rows`).
"""

from typing import Any

import torch
from torch import Tensor

from llama3v.errors import CheckpointError

# Each form's architecture; weights and their names are the same in both.
ARCHITECTURES = {
    "smolvlm": "SmolVLMForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
}

# Idefics3 finds the position of patch i of n by bucketing the fraction i / n at multiples of 1 / side of its table.
# With side = n each fraction lies on a boundary, and rounding decides: on a CPU some sides come out wrong, and other
# devices round otherwise. One more row and column put every fraction strictly inside its bucket, since
# i / (n + 1) < i / n < (i + 1) / (n + 1) for 0 < i < n; the gap, 1 / (n * (n + 1)), is far above float32's rounding.
POSITION_BORDER = 1

_PREFIXES = {
    "vision.embeddings.": "model.vision_model.embeddings.",
    "projector.norm.": "model.vision_model.post_layernorm.",
    "projector.linear.": "model.connector.modality_projection.proj.",
    "llm.model.": "model.text_model.",
    "llm.lm_head.": "lm_head.",
}
_POSITIONS = "vision.embeddings.position_embedding.weight"
_VOCABULARY = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")


def folded_name(name: str, depth: int) -> str:
    """Our parameter name -> the stock one. `depth` is the number of the tower's own layers."""
    for ours, first in (("vision.layers.", 0), ("projector.blocks.", depth)):
        if name.startswith(ours):
            index, _, rest = name.removeprefix(ours).partition(".")
            return f"model.vision_model.encoder.layers.{first + int(index)}.{rest}"
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise CheckpointError(
        f"the parameter {name} has no place in a stock checkpoint; export a Llama 3-V of a SigLIP tower and a Llama"
    )


def require_exact_positions(grid_side: int) -> None:
    """CheckpointError where vLLM's buckets, without a border, give a patch another one's position.

    vLLM wants tiles of the size that its table of positions covers, so that no border can be added. Source:
    vllm/model_executor/models/idefics2_vision_model.py, Idefics2VisionEmbeddings.
    """
    borders = torch.arange(1 / grid_side, 1.0, 1 / grid_side)
    fractions = torch.arange(0, 1 - 1e-6, float(1 / torch.tensor(grid_side)))
    if torch.bucketize(fractions, borders, right=True).tolist() != list(range(grid_side)):
        raise CheckpointError(
            f"vLLM would give some of the {grid_side} x {grid_side} patches of a tile the positions of their neighbours "
            "(27 x 27 are right); serve this model with transformers, llama.cpp or mlx-vlm"
        )


def fold_weights(
    weights: dict[str, Tensor], *, depth: int, grid_side: int, new_tokens: int, border: int = POSITION_BORDER
) -> dict[str, Tensor]:
    """All tensors of a stock checkpoint, out of the state dict of a `Llama3VForConditionalGeneration`.

    Args:
        weights: our state dict; a tied LM head must be in it (it is written out, because MLX reads it explicitly).
        depth: layers of the vision tower. grid_side: patches along one side of a tile.
        new_tokens: token ids that are reserved past the LLM's vocabulary.
        border: rows and columns that are added to the position table; 0 for vLLM.
    """
    folded = {}
    for name, tensor in weights.items():
        if name == _POSITIONS:
            tensor = padded_positions(tensor, grid_side, border)
        elif name in _VOCABULARY:
            tensor = grow_rows(tensor, new_tokens)
        folded[folded_name(name, depth)] = tensor.contiguous()
    return folded


def padded_positions(table: Tensor, grid_side: int, border: int = POSITION_BORDER) -> Tensor:
    """[side**2, width] -> [(side + border)**2, width]: zeros to the right and below, which no patch uses."""
    side, width = grid_side + border, table.shape[1]
    padded = table.new_zeros(side, side, width)
    padded[:grid_side, :grid_side] = table.view(grid_side, grid_side, width)
    return padded.view(side * side, width)


def grow_rows(table: Tensor, count: int) -> Tensor:
    """Append `count` rows, each the mean of all rows: [vocabulary, hidden] -> [vocabulary + count, hidden].

    As rows of the LM head they cannot win greedy decoding: their logit is the mean of all other logits, which is
    below the largest. (Zero rows could: their logit is 0, and nothing keeps the others above it.) Sampled at
    temperature 1 they have at most probability 1 / vocabulary. As embeddings they are never read: <image> is replaced.
    """
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(count, -1)])


def fold_config(
    config: Any, *, form: str, new_tokens: int, dtype: str, border: int = POSITION_BORDER
) -> dict[str, Any]:
    """The stock config.json of a `Llama3VConfig` whose tower is a SigLIP tower.

    Args:
        form: a key of ARCHITECTURES.
        new_tokens: token ids that are reserved past the LLM's vocabulary; the first is <image>.
        dtype: type of the written weights, such as "float32".
        border: as in `fold_weights`.
    """
    vision, text = config.vision_config, config.text_config
    side = vision["tile_size"] // vision["patch_size"] + border
    return {
        "architectures": [ARCHITECTURES[form]],
        "model_type": form,
        "dtype": dtype,
        "image_token_id": config.image_token_id,
        "scale_factor": config.scale_factor,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_cache": True,
        "vision_config": {
            "model_type": f"{form}_vision",
            "hidden_size": vision["width"],
            "intermediate_size": vision["mlp_size"],
            "num_hidden_layers": vision["depth"] + config.projector_blocks,
            "num_attention_heads": vision["heads"],
            "num_channels": 3,
            # The size of the padded position table; tiles keep tile_size pixels (see processor_config.json).
            "image_size": side * vision["patch_size"] if border else vision["tile_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
        },
        "text_config": _text_config(text, text.vocab_size + new_tokens, dtype),
    }


# What transformers writes for every model and says nothing about this one
_NOISE = {
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
}


def _text_config(text: Any, vocabulary: int, dtype: str) -> dict[str, Any]:
    content = {key: value for key, value in text.to_dict().items() if key not in _NOISE}
    content |= {"vocab_size": vocabulary, "dtype": dtype}
    # MLX (and transformers before 5) read rope_theta here; transformers 5 reads it in rope_parameters.
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope:
        content["rope_theta"] = rope["rope_theta"]
    return content
