"""What Meta's licences ask of whoever distributes a model built on Llama 3: a Notice, a sentence, a name.

Meta Llama 3 Community License, section 1.b (https://llama.meta.com/llama3/license), and those of Llama 3.1 to 3.3,
which ask the same with "Built with Llama". Their text is not part of this package: an export copies it from beside the
model, or tells where it must go (exporters/card.py).
"""

import re
from pathlib import Path
from typing import Any

# Llama 3's tokenizer, by which a base is recognised whatever its directory is called
_VOCABULARY = 128256
_BEGIN_OF_TEXT = ("<|begin_of_text|>", 128000)

_KNOWN = (
    (r"google/siglip.*", "apache-2.0", "Apache License 2.0"),
    (r"HuggingFaceTB/SmolLM.*", "apache-2.0", "Apache License 2.0"),
)
"""Of what a model may be built: its name, its licence as hubs call it, and in words (as their pages stated in 2026)."""


def base_of(text_config: Any, tokenizer: Any) -> str | None:
    """The Llama 3 that a model is built on, as its licence calls it ("Meta Llama 3", "Llama 3.1" ...), or None.

    Llama 3.1 and 3.3 cannot be told apart by their files; both are called 3.1 here.
    """
    token, number = _BEGIN_OF_TEXT
    if text_config.vocab_size != _VOCABULARY or tokenizer.convert_tokens_to_ids(token) != number:
        return None
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":  # only later ones scale their positions: 3.1 by 8, 3.2 by 32
        return "Meta Llama 3"
    return "Llama 3.2" if rope.get("factor") == 32 else "Llama 3.1"


def built_with(base: str | None) -> str | None:
    """The sentence that must be shown prominently, or None."""
    if base is None:
        return None
    return "Built with Meta Llama 3" if base == "Meta Llama 3" else "Built with Llama"


def notice(base: str) -> str:
    """The text of the Notice file."""
    return f"{base} is licensed under the {base} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"


def address(base: str) -> str:
    """Where Meta publishes the agreement."""
    return "https://llama.meta.com/llama3/license" if base == "Meta Llama 3" else "https://www.llama.com/license"


def identifier(llm: str | None, base: str | None) -> str:
    """The licence of a model as hubs name it in a card's front matter: that of its language model."""
    if base is not None:
        return "llama3" if base == "Meta Llama 3" else base.lower().replace(" ", "")
    return next((name for pattern, name, _ in _KNOWN if re.fullmatch(pattern, llm or "")), "other")


def in_words(source: str | None, base: str | None) -> str:
    """The licence of one part."""
    if base is not None:
        return f"{base} Community License (NOTICE, LICENSE)"
    known = (words for pattern, _, words in _KNOWN if re.fullmatch(pattern, source or ""))
    return next(known, "under the terms of its publisher")


def warnings(base: str | None, directory: Path) -> list[str]:
    """What else the licence asks of the user before `directory` is distributed, one line each."""
    if base is None:
        return []
    start = "Llama 3" if base == "Meta Llama 3" else "Llama"
    if directory.name.replace("-", " ").replace("_", " ").lower().startswith(start.lower()):
        return []
    return [f"the base is {base}: a model that you distribute needs a name that begins with {start!r}"]
