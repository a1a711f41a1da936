"""The pair score: the probability that SigLIP gives one image and one text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipModel

from llama3v.errors import CheckpointError, DataError
from llama3v.model.pair_score import PairScorer

TEXTS = ["a red square", "a photograph of a dog that runs over the grass, and of much else beside it"]


@pytest.fixture(scope="module")
def siglip_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A random SigLIP with both halves; its text half reads 16 tokens."""
    directory = tmp_path_factory.mktemp("siglip")
    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(
            vision_config=half | {"image_size": 42, "patch_size": 14},
            text_config=half
            | {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 16, "projection_size": 16},
        )
    )
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.0)
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, 60, 3), dtype=np.uint8)) for size in (42, 90, 13)]


@torch.no_grad()
def test_scores_are_the_sigmoid_of_the_stock_models_logits(siglip_dir: Path, images, tiny_tokenizer) -> None:
    scores = PairScorer.from_pretrained(siglip_dir).score(images, TEXTS)
    ids = []
    for text in TEXTS:  # padded, or cut, to the 16 tokens of the text half
        tokens = tiny_tokenizer.encode(text, add_special_tokens=False)[:16]
        ids.append(tokens + [tiny_tokenizer.pad_token_id] * (16 - len(tokens)))
    resized = [np.asarray(image.resize((42, 42), Image.Resampling.BICUBIC), dtype=np.float32) for image in images]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1
    stock = SiglipModel.from_pretrained(siglip_dir).eval()
    logits = stock(input_ids=torch.tensor(ids), pixel_values=pixels).logits_per_image
    torch.testing.assert_close(scores, torch.sigmoid(logits), rtol=1e-5, atol=1e-6)
    assert scores.shape == (3, 2)
    assert ids[0].count(tiny_tokenizer.pad_token_id) > 0  # one text is padded
    assert len(tiny_tokenizer.encode(TEXTS[1])) > 16  # and one is cut


def test_each_pair_stands_alone(siglip_dir: Path, images) -> None:
    scorer = PairScorer.from_pretrained(siglip_dir)
    together = scorer.score(images, TEXTS)
    alone = [[float(scorer.score([image], [text])) for text in TEXTS] for image in images]
    torch.testing.assert_close(together, torch.tensor(alone), rtol=1e-4, atol=1e-6)
    assert ((together > 0) & (together < 1)).all()


def test_a_tower_without_its_text_half_cannot_score(tiny_vision_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="only a vision half"):
        PairScorer.from_pretrained(tiny_vision_dir)


def test_other_models_and_absent_directories_are_refused(tiny_llm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a 'llama' model"):
        PairScorer.from_pretrained(tiny_llm_dir)
    with pytest.raises(CheckpointError, match="no SigLIP at"):
        PairScorer.from_pretrained(tmp_path / "absent")


def test_nothing_to_score_is_refused(siglip_dir: Path, images) -> None:
    scorer = PairScorer.from_pretrained(siglip_dir)
    with pytest.raises(DataError, match="found 3 and 0"):
        scorer.score(images, [])
