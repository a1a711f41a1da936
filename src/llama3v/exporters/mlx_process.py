"""Run as a program by exporters/mlx.py: mlx-vlm alone, without this package.

python -P mlx_process.py convert STOCK DIRECTORY SETTINGS
python -P mlx_process.py check DIRECTORY INPUTS.safetensors OUTPUTS.safetensors NEW_TOKENS IMAGE_TOKEN_ID
"""

import sys

sys.modules["llama3v"] = None  # type: ignore[assignment] # from here on, importing it fails

import json  # noqa: E402 (the line above comes first)
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402


def convert(stock: str, directory: str, settings_text: str) -> None:
    from mlx_vlm.convert import convert as convert_stock

    settings = json.loads(settings_text)
    options: dict[str, Any] = {}
    if settings["bits"] is not None:
        options = {"q_bits": settings["bits"], "q_group_size": settings["group"], "quant_predicate": _is_quantised}
    convert_stock(stock, directory, quantize=bool(options), dtype=settings["dtype"], trust_remote_code=False, **options)


def _is_quantised(path: str, module: Any) -> bool:
    """Matrices of the LLM alone: mlx-vlm by itself would take the projector's last one, too.

    Where a matrix is no multiple of 64 numbers, mlx-vlm would quantise it here and not expect it at loading.
    """
    return path.startswith("language_model") and hasattr(module, "to_quantized") and module.weight.size % 64 == 0


def check(directory: str, inputs_file: str, outputs_file: str, new_tokens: str, image_token_id: str) -> None:
    """For each case: visual tokens, logits at every place, and the greedy continuation."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_vlm.utils import load_model

    model = load_model(Path(directory))
    inputs = load_file(inputs_file)
    outputs: dict[str, np.ndarray] = {}
    for name in sorted({key.partition(".")[0] for key in inputs}):
        ids = mx.array(inputs[f"{name}.ids"])
        pixels = inputs.get(f"{name}.pixels")
        embeddings = model.get_input_embeddings(ids, None if pixels is None else mx.array(pixels)[None]).inputs_embeds
        if pixels is not None:
            slots = np.flatnonzero(inputs[f"{name}.ids"][0] == int(image_token_id))
            outputs[f"{name}.visual_tokens"] = _numbers(embeddings[0])[slots]
        cache = make_prompt_cache(model.language_model)
        logits = model.language_model(ids, inputs_embeds=embeddings, cache=cache).logits
        outputs[f"{name}.logits"] = _numbers(logits[0])[:, : int(image_token_id)]  # the rest are reserved tokens
        answer = [int(outputs[f"{name}.logits"][-1].argmax())]
        while len(answer) < int(new_tokens):
            logits = model.language_model(mx.array([answer[-1:]]), cache=cache).logits
            answer.append(int(_numbers(logits[0, -1])[: int(image_token_id)].argmax()))
        outputs[f"{name}.greedy"] = np.array(answer, np.int64)
    # safetensors writes the memory of an array as it lies: a slice would come back scrambled
    save_file({name: np.ascontiguousarray(values) for name, values in outputs.items()}, outputs_file)


def _numbers(values: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(values.astype(mx.float32))


if __name__ == "__main__":
    (convert if sys.argv[1] == "convert" else check)(*sys.argv[2:])
