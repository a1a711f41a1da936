"""Sample answers: every so many steps the model in training answers the same few questions about pictures, greedily.

out/samples.jsonl     one line each time: {"step", "samples": [{"id", "question", "expected", "answer", "pictures"}]}
out/samples/*.png     the pictures, small; where the images are not on this machine, there are none
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama3v.data.sources.base import AddressableSource
from llama3v.errors import DataError, ImageError
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.features.base import FeatureSource
from llama3v.train.meter import MetricsLog, Record, trim_metrics
from llama3v.train.names import ShownSample, shown_samples
from llama3v.train.prepared import PreparedData
from llama3v.train.step import autocast, set_modes

SAMPLES = "samples.jsonl"
ANSWER_TOKENS = 64
PICTURE_SIDE = 480  # pixels on the longer side


@dataclass(frozen=True)
class Questions:
    """What is asked, and of what.

    Attributes:
        data: prepared samples, `source` their features, `sources` the data sets they came from.
        stop_ids: tokens that end an answer.
        decode: token ids -> text.
    """

    data: PreparedData
    source: FeatureSource
    sources: Sequence[AddressableSource]
    stop_ids: Sequence[int]
    decode: Any
    bf16: bool = False

    def answers(self, model: Llama3VForConditionalGeneration, samples: Sequence[int]) -> list[str]:
        """Greedy answers to the first question of each sample, as one batch."""
        prompts = [self._prompt(sample) for sample in samples]
        keys = [key for sample, ids in zip(samples, prompts, strict=True) for key in self._keys(sample, ids, model)]
        device = next(model.parameters()).device
        features = self.source.features(keys).to(device) if keys else None
        kernel = model.llm.config._attn_implementation
        model.eval()
        model.llm.set_attn_implementation("sdpa")  # prompts are not packed, and grow token by token
        try:
            with torch.no_grad(), autocast(device, self.bf16):
                made = greedy(model, prompts, features, self.stop_ids)
        finally:
            model.llm.set_attn_implementation(kernel)
            set_modes(model)
        return [self.decode(ids) for ids in made]

    def _prompt(self, sample: int) -> list[int]:
        """All before the first answer: the header of its turn included."""
        start, end = int(self.data.starts[sample]), int(self.data.starts[sample + 1])
        first = int(self.data.supervised[start:end].argmax())
        return self.data.tokens[start : start + first].tolist()

    def _keys(self, sample: int, prompt: list[int], model: Llama3VForConditionalGeneration) -> list[str]:
        """The images of the prompt: later turns may own more."""
        left = prompt.count(model.config.image_token_id) // model.tokens_per_tile
        keys = []
        for key, (columns, rows) in zip(self.data.images(sample), self.data.grids_of(sample), strict=True):
            left -= 1 if columns * rows == 1 else 1 + columns * rows
            if left < 0:
                break
            keys.append(key)
        return keys


def greedy(
    model: Llama3VForConditionalGeneration,
    prompts: Sequence[list[int]],
    features: Tensor | None,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to ANSWER_TOKENS, without the token that ends it.

    Args:
        features: of all images of all prompts, in order: [tiles, patches, width].
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    # left padding: every prompt ends at the last column, where the first new token is predicted
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    untyped: Any = model  # transformers annotates generate's self with a protocol of its own
    made = untyped.generate(
        input_ids=ids,
        attention_mask=mask,
        features=features,
        do_sample=False,
        num_beams=1,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )
    return [_until_stop(row[width:].tolist(), stop_ids) for row in made]


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0]] if ends else ids


@dataclass
class SampleAnswers:
    """Asks after every `every` steps (None: never before the last), and after the last of `steps`."""

    out: Path
    model: Llama3VForConditionalGeneration
    questions: Questions
    every: int | None
    steps: int

    def __post_init__(self) -> None:
        self.shown = shown_samples(self.questions.data.directory)
        self._pictures: dict[int, list[str]] = {}

    def resume(self, step: int) -> None:
        """Forget the answers after that step, which are given again."""
        trim_metrics(self.out / SAMPLES, step)

    def due(self, step: int) -> bool:
        """Whether there are answers when so many steps are done."""
        return step == self.steps or (self.every is not None and step % self.every == 0)

    @property
    def images(self) -> list[str]:
        """Keys of the images that the answers need."""
        return [key for shown in self.shown for key in self.questions.data.images(shown.sample)]

    def after_step(self, record: Record) -> None:
        """Answer, where it is due."""
        step = record["step"]
        if not self.due(step):
            return
        answers = self.questions.answers(self.model, [shown.sample for shown in self.shown])
        samples = [
            {
                "id": shown.id,
                "question": shown.question,
                "expected": shown.expected,
                "answer": answer,
                "pictures": self._pictures_of(shown),
            }
            for shown, answer in zip(self.shown, answers, strict=True)
        ]
        log = MetricsLog(self.out / SAMPLES)
        log.append({"step": step, "samples": samples})
        log.close()

    def _pictures_of(self, shown: ShownSample) -> list[str]:
        """The sample's pictures as small files, relative to `out`; those that are not to be had are left out."""
        if shown.sample not in self._pictures:
            found = [self._picture(shown, name) for name in shown.images]
            self._pictures[shown.sample] = [name for name in found if name is not None]
        return self._pictures[shown.sample]

    def _picture(self, shown: ShownSample, name: str) -> str | None:
        from llama3v.model.tiles import decode_image

        file = (
            Path("samples")
            / f"{hashlib.blake2b(f'{shown.source} {name}'.encode(errors='replace'), digest_size=8).hexdigest()}.png"
        )
        if (self.out / file).is_file():
            return str(file)
        try:
            picture = decode_image(self.questions.sources[shown.source].image(name).read())
        except (ImageError, DataError):  # training needs no images: they may lie on another machine
            return None
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        (self.out / file).parent.mkdir(exist_ok=True)
        picture.save(self.out / file)
        return str(file)
