"""SigLIP's loss, the captioning head, and the tower that the package carries."""

import math

import pytest
import torch
from torch.nn import functional as F

from llama3v.data.synthetic.language import caption
from llama3v.data.synthetic.scenes import draw, make_scene
from llama3v.model.pair_score import PairScorer
from llama3v.recipes.quickstart import ASSETS, SCENE_LLM, SCENE_TOWER
from llama3v.train.siglip import INITIAL_LOGIT_BIAS, INITIAL_LOGIT_SCALE, CaptioningHead, sigmoid_loss


def test_the_sigmoid_loss_is_a_sum_of_yes_no_questions() -> None:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(INITIAL_LOGIT_SCALE), torch.tensor(INITIAL_LOGIT_BIAS)
    by_hand = 0.0
    for i in range(4):
        for j in range(4):
            logit = 10.0 * float(image[i] @ text[j]) - 10.0
            by_hand += math.log1p(math.exp(-logit if i == j else logit))
    assert float(sigmoid_loss(image, text, scale, bias)) == pytest.approx(by_hand / 4, rel=1e-5)


def test_the_sigmoid_loss_falls_as_pairs_agree() -> None:
    text = torch.eye(4)
    scale, bias = torch.tensor(INITIAL_LOGIT_SCALE), torch.tensor(-5.0)
    assert sigmoid_loss(text, text, scale, bias) < sigmoid_loss(text.roll(1, 0), text, scale, bias)


def test_the_captioning_head_learns_from_the_features() -> None:
    torch.manual_seed(0)
    head = CaptioningHead(width=32, heads=2, mlp_size=64, grid_side=4, scale_factor=2, vocabulary=20)
    features = torch.randn(3, 16, 32, requires_grad=True)
    tokens = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0], [1, 7, 8, 2]])
    loss, right = head(features, tokens, 0)
    loss.backward()
    assert features.grad is not None
    assert float(features.grad.abs().sum()) > 0
    assert 0 <= float(right) <= 1


def test_the_carried_weights_stay_small_and_are_safetensors() -> None:
    weights = [path for path in ASSETS.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    assert {path.suffix for path in weights} == {".safetensors"}
    assert sum(path.stat().st_size for path in weights) < 15e6


def test_encoder_and_llm_carry_their_own_tokenizer() -> None:
    assert all((directory / "tokenizer.json").is_file() for directory in (SCENE_TOWER, SCENE_LLM))


def test_the_carried_encoder_knows_which_caption_belongs_to_which_scene() -> None:
    scorer = PairScorer.from_pretrained(str(SCENE_TOWER))
    scenes = [make_scene(f"held-out/{number}") for number in range(24)]
    scores = torch.as_tensor(scorer.score([draw(scene) for scene in scenes], [caption(scene) for scene in scenes]))
    assert (scores.argmax(dim=1) == torch.arange(24)).float().mean() > 0.9
    wrong = scores[~torch.eye(24, dtype=torch.bool)]
    assert scores.diagonal().median() > 10 * wrong.median()
