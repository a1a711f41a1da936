"""At start: does the model really see, and is it warm?

A gateway with a broken tower or projector answers fluently about pictures it does not see (ollama 13549 asked for this). So
two pictures that have nothing in common must change what the model would say, or the server does not start.
"""

import logging

import numpy as np
from PIL import Image

from llama3v.engines.base import EngineImage, Sampling, Token
from llama3v.engines.cached import CachedEngine
from llama3v.errors import ConfigError
from llama3v.model.prompt import Turn

log = logging.getLogger("llama3v.server")

QUESTION = "What is in the picture?"
LEAST_CHANGE = 1e-5  # nats; rounding in fp32 is far below, and of a model that sees it is above 0.01
_TOKENS, _ALTERNATIVES = 4, 20


def require_sight(engine: CachedEngine) -> float:
    """How much a picture changes the first tokens' log-probabilities (nats; infinite: other tokens).

    Raises ConfigError where it changes nothing.
    """
    bright, dark = (_first_tokens(engine, picture) for picture in known_pictures(engine.tile_size))
    change = _change(bright, dark)
    if change < LEAST_CHANGE:
        raise ConfigError(
            "expected a model whose answer depends on the picture, found one that says the same about two that have "
            "nothing in common; its vision tower or projector is broken: export or train it again"
        )
    log.info("the model sees: a known picture moves its odds by %.3g nats", change)
    return change


def warm_up(engine: CachedEngine) -> None:
    """Answer once about a large picture, in every KV cache."""
    image = known_pictures(4 * engine.tile_size)[0]
    for number in range(engine.conversations):
        turns = [Turn("user", f"{number} {QUESTION}", (0,))]
        engine.answer(turns, [image], max_new_tokens=_TOKENS)


def known_pictures(size: int) -> tuple[Image.Image, Image.Image]:
    """Two pictures of `size` x `size` pixels: a red disc on white, and blue stripes on black."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    disc = np.where((x**2 + y**2 < 0.1)[..., None], (200, 30, 30), (255, 255, 255))
    stripes = np.where((np.floor(x * 8) % 2 == 0)[..., None], (20, 20, 160), (0, 0, 0))
    return Image.fromarray(disc.astype(np.uint8)), Image.fromarray(stripes.astype(np.uint8))


def _first_tokens(engine: CachedEngine, image: EngineImage) -> list[Token]:
    generation = engine.generate(
        [Turn("user", QUESTION, (0,))], [image], max_new_tokens=_TOKENS, sampling=Sampling(logprobs=_ALTERNATIVES)
    )
    return [token for piece in generation for token in piece.tokens]


def _change(one: list[Token], other: list[Token]) -> float:
    if [token.id for token in one] != [token.id for token in other]:
        return float("inf")
    moved = [abs(a.logprob - b.logprob) for a, b in zip(one, other, strict=True)]
    return max(moved, default=0.0)
