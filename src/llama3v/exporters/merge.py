"""The verb `merge`: a model that refers to its LLM, and its adapters, become one that stands alone; checked first."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3v.config import MergeConfig
from llama3v.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_DIFFERENCE = 1e-4
"""Of logits, relative to the largest one, between adapters beside the weights and in them: fp32 keeps about 1e-6."""


def merge(config: MergeConfig) -> dict[str, Any]:
    """Write a plain model directory whose logits are those of the model with its adapters, within rounding.

    An LLM that was held in fewer bits in training is written with the values it had then. The directory appears whole
    or not at all.

    Returns:
        the summary that also lies there as summary.json; `logits` is the largest difference that was found.

    Raises:
        CheckpointError: no such model, one that stands alone already, its LLM is not where it was, or `out` is in use.
    """
    import torch

    from llama3v.exporters.verbs import appearing, refuse_foreign
    from llama3v.model.llama3v import save_model
    from llama3v.model.lora import has_lora, merge_lora
    from llama3v.model.on_base import load_on_base, read_base, refers_to_base

    if not refers_to_base(config.model):
        raise CheckpointError(
            f"{config.model} holds no adapters and refers to no other model, so there is nothing to merge; "
            "use it as it is"
        )
    refuse_foreign(config.out, "merge")
    base = read_base(config.model)
    model, tokenizer = load_on_base(config.model, merge=False)
    adapters = has_lora(model.llm)
    before = _logits(model)
    merge_lora(model.llm)
    difference = float((_logits(model) - before).abs().max() / before.abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"{config.model}: logits change by {difference:.1e} when its adapters are merged, more than rounding does "
            f"({LARGEST_DIFFERENCE:.0e}); its weights are damaged or very large, use an earlier checkpoint"
        )
    if config.precision == "bf16":
        torch.nn.Module.to(model, torch.bfloat16)
        model.config.dtype = torch.bfloat16
    model.requires_grad_(True)
    summary = {
        "verb": "merge",
        "model": config.model,
        "llm": base.source,
        "llm_weights": base.weights,
        "adapters": adapters,
        "precision": config.precision,
        "logits": difference,
    }
    with appearing(config.out) as directory:
        save_model(model, tokenizer, directory)
        (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    size = sum(file.stat().st_size for file in Path(config.out).glob("*.safetensors"))
    print(f"{config.out}: {size / 1e6:,.1f} MB, stands alone; largest relative difference of logits {difference:.1e}")
    if base.weights in ("int8", "nf4"):
        print(f"note: its LLM has the values that it had in training, of {base.weights}, not those of {base.source}")
    return summary


def _logits(model: Any) -> "Tensor":
    """Of a fixed prompt with a tile of fixed features: [1, tokens, vocabulary]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tower, vocabulary = model.vision, model.config.text_config.vocab_size
    features = torch.randn(1, tower.grid_side**2, tower.width, generator=generator)
    text = torch.randint(vocabulary, (1, 32), generator=generator)
    slots = torch.full((1, model.tokens_per_tile), model.config.image_token_id)
    with torch.inference_mode():
        return model(input_ids=torch.cat([slots, text], dim=1), features=features).logits
