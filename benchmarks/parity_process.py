"""Run as a program by parity.py: the greedy answers of a stock program to an export, without this package.

    python -P parity_process.py transformers|mlx_vlm DIRECTORY INPUTS

INPUTS/cases.json has {name: {ids, pixels (a file beside it, float32 [tiles, 3, S, S]), new_tokens}}. The last line
of stdout is {name: ids of the answer}.
"""

import sys

sys.modules["llama3v"] = None  # type: ignore[assignment] # from here on, importing it fails

import json  # noqa: E402 (the line above comes first)
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

Answer = Callable[[list[int], Any, int], list[int]]


def with_transformers(directory: str) -> Answer:
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()

    def answer(ids: list[int], pixels: Any, new_tokens: int) -> list[int]:
        prompt = torch.tensor([ids])
        images = {} if pixels is None else {"pixel_values": torch.from_numpy(pixels)[None]}
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=-1,  # no such token: it goes on
            **images,
        )
        return found[0, len(ids) :].tolist()

    return answer


def with_mlx_vlm(directory: str) -> Answer:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_vlm.utils import load_model

    model = load_model(Path(directory))

    def answer(ids: list[int], pixels: Any, new_tokens: int) -> list[int]:
        images = None if pixels is None else mx.array(pixels)[None]
        prompt, cache, made = mx.array([ids]), make_prompt_cache(model.language_model), []
        embeddings = model.get_input_embeddings(prompt, images).inputs_embeds
        while len(made) < new_tokens:
            out = model.language_model(prompt, inputs_embeds=embeddings, cache=cache)
            made.append(int(mx.argmax(out.logits[0, -1])))
            prompt = mx.array([made[-1:]])
            embeddings = model.get_input_embeddings(prompt, None).inputs_embeds
        return made

    return answer


def main(program: str, directory: str, inputs: str) -> None:
    answer = {"transformers": with_transformers, "mlx_vlm": with_mlx_vlm}[program](directory)
    found = {}
    for name, case in json.loads((Path(inputs) / "cases.json").read_text()).items():
        pixels = None if case["pixels"] is None else np.load(Path(inputs) / case["pixels"])
        found[name] = answer(case["ids"], pixels, case["new_tokens"])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
