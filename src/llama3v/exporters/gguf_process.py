"""Run as a program by exporters/gguf_check.py: what does llama.cpp make of a GGUF pair?

    python -m llama3v.exporters.gguf_process DIRECTORY INPUTS.safetensors OUTPUTS.safetensors

In a process of its own, because an error inside the C library would end whoever called it. Only stock code sees the
pair: llama.cpp for the language model, its mtmd for vision; KV cache in float32.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llama3v.engines.llama_api import Llama
from llama3v.engines.mtmd_api import Mtmd


def main(directory: str, inputs_file: str, outputs_file: str) -> None:
    inputs = load_file(inputs_file)
    settings = json.loads(bytes(inputs.pop("settings")))
    llm = Llama(Path(directory) / "model.gguf", kv="f32", context_tokens=settings["context_tokens"])
    vision = Mtmd(Path(directory) / "mmproj.gguf", llm)
    outputs: dict[str, np.ndarray] = {}
    for name in settings["cases"]:
        ids = inputs[f"{name}.ids"][0]
        visual = np.zeros((0, llm.hidden), np.float32)
        if f"{name}.tiles" in inputs:
            visual = np.concatenate([vision.encode(tile) for tile in inputs[f"{name}.tiles"]])
            outputs[f"{name}.visual_tokens"] = visual
        llm.forget()
        logits = _read(llm, ids, visual, settings["image_token_id"])
        outputs[f"{name}.logits"] = logits[None, :, : settings["image_token_id"]]  # the rest are reserved tokens
        greedy = _greedy(llm, outputs[f"{name}.logits"][0, -1], len(ids), settings)
        outputs[f"{name}.greedy"] = np.array([greedy], np.int64)
    text = llm.tokenise(settings["text"])
    outputs["text_ids"] = np.array([text], np.int64)
    # safetensors writes the memory of an array as it lies: a slice would come back scrambled
    save_file({name: np.ascontiguousarray(values) for name, values in outputs.items()}, outputs_file)


def _read(llm: Llama, ids: np.ndarray, visual: np.ndarray, image_token_id: int) -> np.ndarray:
    """Logits at every place [length, vocabulary], visual tokens standing where `image_token_id` does."""
    slots = ids == image_token_id
    borders = [0, *(np.flatnonzero(slots[1:] != slots[:-1]) + 1).tolist(), len(ids)]
    parts, used = [], 0
    for start, end in itertools.pairwise(borders):
        if slots[start]:
            parts.append(llm.read(start, visual[used : used + end - start], all_logits=True))
            used += end - start
        else:
            parts.append(llm.read(start, ids[start:end].tolist(), all_logits=True))
    return np.concatenate(parts)


def _greedy(llm: Llama, logits: np.ndarray, position: int, settings: dict) -> list[int]:
    """The greedy continuation, with the token that ends it."""
    answer: list[int] = []
    while len(answer) < settings["max_new_tokens"]:
        answer.append(int(logits.argmax()))
        if answer[-1] in settings["stop_ids"]:
            break
        logits = llm.read(position, answer[-1:])[: settings["image_token_id"]]
        position += 1
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:])
