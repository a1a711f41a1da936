"""`llama3v ask`: one question about images."""

import json
import time
from dataclasses import asdict
from typing import Any

from llama3v import __version__
from llama3v.config import AskConfig
from llama3v.data.sources.folder import IMAGE_SUFFIXES
from llama3v.engines.base import Engine, Room
from llama3v.engines.terminal import STDIN, at_detail, is_file, open_engine, read_picture, write, write_summary
from llama3v.errors import ConfigError
from llama3v.model.prompt import Turn
from llama3v.model.tiles import image_key


def ask(config: AskConfig, engine: Engine | None = None) -> dict[str, Any]:
    """Answer one question about images (or about none); the answer streams to stdout, or is part of one JSON object.

    Args:
        engine: runs the model; default: that of `config.model` and `config.engine`.

    Returns the summary, which is also `config.out`/summary.json: question, answer and timings in seconds. Raises
    ConfigError, ImageError, PromptError or CheckpointError before any output.
    """
    names, question = _images_and_question(config.inputs)
    pictures = [read_picture(name) for name in names]  # before the model: a bad file is told at once
    started = time.perf_counter()
    room = Room(len(pictures), len(question.encode("utf-8", "replace")), config.max_new_tokens, config.detail == "high")
    engine = engine or open_engine(config.model, config, room=room)
    loaded = time.perf_counter()
    turns = [Turn("user", question, tuple(range(len(pictures))))]
    generation = engine.generate(
        turns,
        [at_detail(image, config.detail, engine) for _, image in pictures],
        max_new_tokens=config.max_new_tokens,
        sampling=config.sampling,
    )
    pieces: list[str] = []
    first = None
    for piece in generation:
        first = first or time.perf_counter()
        pieces.append(piece.text)
        if not config.json:
            write(piece.text)
    ended = time.perf_counter()
    summary = {
        "verb": "ask",
        "version": __version__,
        "model": config.model,
        "engine": engine.name,
        "weights": config.weights,
        "images": [{"file": name, "key": image_key(data)} for name, (data, _) in zip(names, pictures, strict=True)],
        "question": question,
        "answer": "".join(pieces),
        "max_new_tokens": config.max_new_tokens,
        "detail": config.detail,
        "sampling": asdict(config.sampling) | {"stop": list(config.stop)},
        "finish": generation.finish,
        **{name: round(value, 3) for name, value in asdict(generation.counts).items()},
        "seconds_to_load": round(loaded - started, 3),
        "seconds_to_first_text": round((first or ended) - loaded, 3),
        "seconds": round(ended - started, 3),
    }
    write((json.dumps(summary) if config.json else "") + "\n")
    return write_summary(config.out, summary)


def _images_and_question(inputs: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The last argument is the question; raises ConfigError where it can only be an image."""
    *names, question = inputs
    if question == STDIN or is_file(question) or (not names and question.lower().endswith(IMAGE_SUFFIXES)):
        raise ConfigError(
            f"expected a question as the last argument, found the image {question}; "
            f'ask for example: llama3v ask {question} "What is this?"'
        )
    if not question.strip():
        raise ConfigError("expected a question as the last argument, found an empty one")
    if names.count(STDIN) > 1:
        raise ConfigError('expected at most one "-" (stdin holds one image); name the other images as files')
    return tuple(names), question
