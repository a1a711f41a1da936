"""lmms-eval runs our models: the entry point `lmms_eval.models` leads here (pyproject.toml).

    lmms_eval --model llama3v --model_args pretrained=runs/stage2 --tasks pope

Only this file needs lmms-eval, and only lmms-eval imports it.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from llama3v.engines.base import EngineImage, Question
from llama3v.engines.terminal import open_engine
from llama3v.errors import PromptError
from llama3v.model.prompt import Turn
from llama3v.model.tiles import upright_rgb

if TYPE_CHECKING:  # lmms_eval.protocol may be what is being imported while this plug-in is loaded
    from lmms_eval.protocol import ChatMessages

MODEL_ID = "llama3v"
LENGTH = 128  # new tokens, where a task does not say


def manifest() -> ModelManifest:
    """What the entry point gives."""
    return ModelManifest(model_id=MODEL_ID, chat_class_path=f"{__name__}.Llama3V")


class Llama3V(lmms):
    """A Llama 3-V directory, hub name or GGUF pair, in lmms-eval's chat form.

    Args:
        pretrained: the model. batch_size: questions that are answered together. Other arguments of lmms-eval (device, ...)
            have no meaning here.
    """

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int | str = 16, **others: object) -> None:
        super().__init__()
        self.batch = 16 if batch_size == "auto" else int(batch_size)
        self.engine = open_engine(pretrained, quiet=True)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, in the order of the requests; those of one length together."""
        answers = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            options = request.args[2]
            if float(options.get("temperature") or 0) > 0 or options.get("do_sample"):
                raise PromptError(
                    "llama3v answers lmms-eval greedily; set temperature 0 in the task's generation_kwargs"
                )
            by_length.setdefault(int(options.get("max_new_tokens") or LENGTH), []).append(index)
        for length, indices in by_length.items():
            for start in range(0, len(indices), self.batch):
                some = indices[start : start + self.batch]
                questions = [self._question(requests[index]) for index in some]
                for index, text in zip(some, self.engine.answer_batch(questions, max_new_tokens=length), strict=True):
                    answers[index] = _cut(text, requests[index].args[2].get("until"))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("llama3v answers questions; tasks that compare likelihoods cannot be run")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("llama3v answers lmms-eval in one round")

    def _question(self, request: Any) -> Question:
        from lmms_eval.protocol import ChatMessages

        context, to_messages, _, number, task, split = request.args
        return question_of(ChatMessages(messages=to_messages(self.task_dict[task][split][number])), context)


def question_of(chat: "ChatMessages", context: str = "") -> Question:
    """Turns and pictures of lmms-eval's messages. Raises PromptError for video and sound.

    Our models see a turn's pictures before its text, so what points at them stays in the text. lmms-eval makes messages of
    a text with marks (MMMU's "<image 2>") by cutting it there; `context`, the request's text, still has them.
    """
    turns: list[Turn] = []
    images: list[EngineImage] = []
    for message in chat.messages:
        pieces, own = [], []
        for part in message.content:
            if part.type == "text":
                pieces.append(part.text)
            elif part.type == "image":
                own.append(len(images))
                images.append(upright_rgb(part.url))
                pieces.append(_Mark(f"<image {len(own)}>"))
            else:
                raise PromptError(f"expected text and images from the task, found {part.type}")
        turns.append(Turn(message.role, _text(pieces), tuple(own)))
    if len(turns) == 1 and images and len(set(_MARKS.findall(context))) == len(images):
        turns[0] = replace(turns[0], text=context)
    return turns, images


class _Mark(str):
    """Stands for a picture in a list of texts."""


_MARKS = re.compile(r"<image \d+>")  # MMMU's


def _text(pieces: Sequence[str]) -> str:
    """The texts of a turn; pictures between them are marked by their number, those around them are not."""
    texts = [number for number, piece in enumerate(pieces) if not isinstance(piece, _Mark)]
    within = pieces[texts[0] : texts[-1] + 1] if texts else []
    return (" " if any(isinstance(piece, _Mark) for piece in within) else "").join(within)


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first of the task's stopping strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text
