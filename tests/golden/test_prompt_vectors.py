"""The renderer against recorded token ids of Llama 3 and of SmolLM2 (ChatML); prompt_vectors.json names the sources.

The real tokenizers are not in the repository: the vectors' own tokens, at their published ids, are one.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from llama3v.model.prompt import Renderer, Turn, detect_format
from llama3v.model.slicing import Grid

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("prompt_vectors.json").read_text())
CASES = [pytest.param(name, case, id=case["name"]) for name in VECTORS for case in VECTORS[name]["cases"]]


def tokenizer_of(name: str) -> Tokenizer:
    """Cuts text into the longest of the listed tokens and gives each its published id."""
    special = VECTORS[name]["special_tokens"]
    text = VECTORS[name]["text_tokens"]
    tokenizer = Tokenizer(models.WordLevel({**text, **special}))
    longest_first = "|".join(re.escape(token) for token in sorted(text, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert all(tokenizer.token_to_id(token) == id for token, id in {**text, **special}.items())
    return tokenizer


@pytest.mark.parametrize(("name", "case"), CASES)
def test_prompt_is_token_for_token_the_published_one(name: str, case: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(name)
    renderer = Renderer(tokenizer, name, case["tokens_per_tile"], VECTORS[name]["image_token_id"])
    turns = [Turn(role, text, tuple(images)) for role, text, images in case["turns"]]
    rendered = renderer.render(turns, [Grid(*grid) for grid in case["grids"]], generate=case["generate"])
    assert rendered.ids == case["ids"]
    assert rendered.spans == [tuple(span) for span in case["spans"]]


@pytest.mark.parametrize("name", list(VECTORS))
def test_format_and_stop_tokens_are_read_off_the_special_tokens(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert detect_format(tokenizer) == name
    renderer = Renderer(tokenizer, name, 1, VECTORS[name]["image_token_id"])
    assert list(renderer.stop_ids) == VECTORS[name]["stop_ids"]
