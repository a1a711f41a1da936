"""Run as a program by exporters/check.py: what does stock transformers make of an export, without this package?

    python -P stock_process.py DIRECTORY INPUTS.safetensors CASES.json OUTPUTS.safetensors

For each case: the image features, the visual tokens, the logits and the greedy continuation in float32, and the token
ids that the directory's own tokenizer and chat template make of the conversation.
"""

import sys

sys.modules["llama3v"] = None  # type: ignore[assignment] # from here on, importing it fails

import json  # noqa: E402 (the line above comes first)
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoTokenizer  # noqa: E402


def main(directory: str, inputs_file: str, cases_file: str, outputs_file: str) -> None:
    inputs, cases = load_file(inputs_file), json.loads(Path(cases_file).read_text())
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    outputs: dict[str, torch.Tensor] = {}
    for name, case in cases.items():
        results = _run(model, inputs[f"{name}.ids"], inputs.get(f"{name}.pixels"), case["max_new_tokens"])
        results["template_ids"] = _template_ids(tokenizer, case["messages"], case["tokens_per_tile"])
        outputs |= {f"{name}.{key}": value.contiguous().clone() for key, value in results.items()}
    save_file(outputs, outputs_file)


@torch.no_grad()
def _run(model: Any, ids: torch.Tensor, pixels: torch.Tensor | None, max_new_tokens: int) -> dict[str, torch.Tensor]:
    """ids [1, length], pixels [tiles, 3, S, S] -> named results."""
    images: dict[str, torch.Tensor] = {}
    results: dict[str, torch.Tensor] = {}
    if pixels is not None:
        images = {"pixel_values": pixels.unsqueeze(0)}  # [1, tiles, 3, S, S]
        features = model.model.get_image_features(**images, return_dict=True)
        results["features"] = features.last_hidden_state  # [tiles, patches, width]
        results["visual_tokens"] = torch.cat(list(features.pooler_output))  # [visual tokens, hidden]
    results["logits"] = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **images)
    results["greedy"] = answer[:, ids.shape[1] :]
    return results


def _template_ids(tokenizer: Any, messages: list[dict], tokens_per_tile: int) -> torch.Tensor:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace("<image>", "<image>" * tokens_per_tile)  # as a processor does
    return torch.tensor([tokenizer(text)["input_ids"]])


if __name__ == "__main__":
    main(*sys.argv[1:])
