"""Scenes on disk, in the form that everyone's data has: pictures, and LLaVA JSON with captions or conversations."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from llama3v.data.synthetic.language import CAPTION_PROMPTS, Question, caption, choose, questions
from llama3v.data.synthetic.scenes import Scene, draw, make_scene

SHEET_SHARE = 0.25
QUESTIONS_PER_SCENE = 7
WEIGHTS = {"word": 4.0, "digit": 2.0, "relation": 2.0, "count": 2.0, "colour": 0.5, "size": 0.5}
"""Of the kinds of question: what is hard to see is asked more often."""
LARGE_SHARE = 0.1  # of the one-page scenes are drawn so large that slicing cuts through them
MAGNIFICATIONS = (2, 3, 4)
CAPTION_SHARE = 0.3  # of the conversations that also ask for a caption, so that stage 2 does not forget it


@dataclass(frozen=True)
class SceneFiles:
    """What `write_scenes` left on disk."""

    captions: Path  # LLaVA JSON, one caption a picture
    conversations: Path  # LLaVA JSON, questions and answers, a caption among them
    scenes: tuple[Scene, ...]
    pictures: tuple[Path, ...]


def make_scenes(split: str, count: int) -> tuple[Scene, ...]:
    """The same split and count give the same scenes everywhere; every fourth is a sheet. Splits share no seed."""
    sheets = round(1 / SHEET_SHARE)
    return tuple(make_scene(f"{split}/{number}", sheet=number % sheets == 0) for number in range(count))


def write_scenes(directory: Path, split: str, count: int) -> SceneFiles:
    """Draw `count` scenes as PNG files and write their captions and conversations beside them."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    scenes = make_scenes(split, count)
    pictures, captions, conversations = [], [], []
    for number, scene in enumerate(scenes):
        name = f"images/{number:05d}.png"
        draw(scene, magnification_of(scene)).save(directory / name)
        pictures.append(directory / name)
        rng = random.Random(scene.seed + "/conversation")
        described = [(rng.choice(CAPTION_PROMPTS), caption(scene))]
        captions.append(_row(scene, name, described))
        asked = [(question.text, question.answer) for question in _asked(scene, rng)]
        if rng.random() < CAPTION_SHARE:
            asked.insert(rng.randrange(len(asked) + 1), described[0])
        conversations.append(_row(scene, name, asked))
    files = SceneFiles(directory / "captions.json", directory / "conversations.json", scenes, tuple(pictures))
    files.captions.write_text(json.dumps(captions, indent=1))
    files.conversations.write_text(json.dumps(conversations, indent=1))
    return files


def _asked(scene: Scene, rng: random.Random) -> list[Question]:
    return choose(questions(scene, rng), QUESTIONS_PER_SCENE, WEIGHTS, rng)


def magnification_of(scene: Scene) -> int:
    """How large a data set draws the scene: 1, and for some one-page scenes more."""
    rng = random.Random(scene.seed + "/magnification")
    return rng.choice(MAGNIFICATIONS) if not scene.is_sheet and rng.random() < LARGE_SHARE else 1


def _row(scene: Scene, image: str, turns: list[tuple[str, str]]) -> dict[str, object]:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        conversation += [
            {"from": "human", "value": ("<image>\n" if number == 0 else "") + question},
            {"from": "gpt", "value": answer},
        ]
    return {"id": scene.seed, "image": image, "conversations": conversation}
