"""Right image, wrong image, blind."""

import pytest
import torch

from llama3v.engines.base import ImageFeatures
from llama3v.errors import DataError
from llama3v.evaluate.sight import Probe, measure_sight, same_answer, wrong_images
from llama3v.model.slicing import Grid


class Seer:
    """An engine that reads the number in the features, and says "nothing" without an image."""

    def answer_batch(self, questions, *, max_new_tokens):
        return [str(int(images[0].features.sum())) if images else "nothing" for _, images in questions]


def probes(grids: list[Grid]) -> list[Probe]:
    images = [ImageFeatures(torch.full((1, 1, 1), float(n)), grid) for n, grid in enumerate(grids)]
    return [Probe("number", "Which?", str(n), image, f"{n}.png") for n, image in enumerate(images) for _ in range(2)]


def test_a_model_that_looks_is_told_from_one_that_guesses() -> None:
    sight = measure_sight(Seer(), probes([Grid(1, 1)] * 4), batch=3)
    assert sight.accuracy("right image") == 1.0
    assert sight.accuracy("wrong image") == 0.0
    assert sight.accuracy("blind") == 0.0
    assert sight.answers["blind"] == ["nothing"] * 8


def test_a_wrong_image_is_another_picture_sliced_or_not_as_this_one_is() -> None:
    asked = probes([Grid(1, 1), Grid(2, 1), Grid(1, 1), Grid(2, 1), Grid(2, 1)])
    for probe, wrong in zip(asked, wrong_images(asked), strict=True):
        assert wrong is not probe.image
        assert (wrong.grid.tiles > 1) == (probe.image.grid.tiles > 1)


def test_a_lone_picture_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match="more held-out pictures"):
        wrong_images(probes([Grid(1, 1), Grid(2, 1), Grid(1, 1)]))


def test_case_and_a_final_full_stop_do_not_count() -> None:
    assert same_answer(" Red. ", "red")
    assert not same_answer("dark red", "red")
