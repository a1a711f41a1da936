"""The pair score: the probability that SigLIP gives one image and one text."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
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
def stock_scores(siglip_dir: Path, images, texts: list[str], tokenizer) -> torch.Tensor:
    """[images, texts]: what transformers' own model says; every text fits."""
    ids = []
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert len(tokens) <= 16, text
        ids.append(tokens + [tokenizer.pad_token_id] * (16 - len(tokens)))
    resized = [np.asarray(image.resize((42, 42), Image.Resampling.BICUBIC), dtype=np.float32) for image in images]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1
    stock = SiglipModel.from_pretrained(siglip_dir).eval()
    return torch.sigmoid(stock(input_ids=torch.tensor(ids), pixel_values=pixels).logits_per_image)


def test_scores_are_the_sigmoid_of_the_stock_models_logits(siglip_dir: Path, images, tiny_tokenizer) -> None:
    texts = ["a red square", "the grass"]
    scores = PairScorer.from_pretrained(siglip_dir).score(images, texts)
    expected = stock_scores(siglip_dir, images, texts, tiny_tokenizer)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert scores.shape == (3, 2)


def test_a_text_that_is_too_long_is_read_whole_and_scores_the_mean_of_its_pieces(
    siglip_dir: Path, images, tiny_tokenizer
) -> None:
    scorer = PairScorer.from_pretrained(siglip_dir)
    assert len(tiny_tokenizer.encode(TEXTS[1])) > 16
    pieces = scorer.pieces(TEXTS[1])
    assert len(pieces) > 1
    assert " ".join(pieces) == TEXTS[1]
    expected = stock_scores(siglip_dir, images, pieces, tiny_tokenizer).mean(dim=1)
    torch.testing.assert_close(scorer.score(images, TEXTS)[:, 1], expected, rtol=1e-5, atol=1e-6)
    assert scorer.pieces(TEXTS[0]) == [TEXTS[0]]


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_the_rest_of_the_tower_gives_the_embedding_of_the_whole(siglip_dir: Path, images, cut: int) -> None:
    """From the features behind any layer, as a cache with that cut holds them."""
    from llama3v.model.tiles import make_tiles, to_pixels

    scorer = PairScorer.from_pretrained(siglip_dir)
    tiles = np.concatenate([make_tiles(image, 42, max_tiles=0).pixels for image in images])
    whole = scorer.embed_tiles(tiles)
    pixels = to_pixels(tiles, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        features = scorer.model.vision_model(pixels, output_hidden_states=True).hidden_states[cut]
    scorer.forget_trunk(cut)
    torch.testing.assert_close(scorer.embed_features(features, cut), whole, rtol=1e-5, atol=1e-6)


def test_the_identity_follows_what_scores_depend_on_and_nothing_else(siglip_dir: Path) -> None:
    scorer = PairScorer.from_pretrained(siglip_dir)
    scorer.score([Image.new("RGB", (42, 42))], TEXTS)  # using it changes nothing
    before = {cut: scorer.identity(cut) for cut in (0, 1)}
    assert before[0] != before[1]
    with torch.no_grad():
        scorer.model.vision_model.encoder.layers[0].mlp.fc1.bias[0] += 1  # below cut 1: in the cache's fingerprint
    assert scorer.identity(1) == before[1]
    assert scorer.identity(0) != before[0]
    with torch.no_grad():
        scorer.model.text_model.head.bias[0] += 1
    assert scorer.identity(1) != before[1]


def test_each_pair_stands_alone(siglip_dir: Path, images) -> None:
    scorer = PairScorer.from_pretrained(siglip_dir)
    together = scorer.score(images, TEXTS)
    alone = [[float(scorer.score([image], [text])) for text in TEXTS] for image in images]
    torch.testing.assert_close(together, torch.tensor(alone), rtol=1e-4, atol=1e-6)
    assert ((together > 0) & (together < 1)).all()


def test_a_tower_without_its_text_half_cannot_score(tiny_vision_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="only a vision half"):
        PairScorer.from_pretrained(tiny_vision_dir)


def test_a_checkpoint_that_lacks_tensors_is_refused(siglip_dir: Path, tmp_path: Path) -> None:
    """transformers makes them up at random."""
    directory = shutil.copytree(siglip_dir, tmp_path / "damaged")
    weights = load_file(directory / "model.safetensors")
    del weights["text_model.head.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, such as text_model\.head\.weight"):
        PairScorer.from_pretrained(directory)


def test_other_models_and_absent_directories_are_refused(tiny_llm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a 'llama' model"):
        PairScorer.from_pretrained(tiny_llm_dir)
    with pytest.raises(CheckpointError, match="no SigLIP at"):
        PairScorer.from_pretrained(tmp_path / "absent")


def test_nothing_to_score_is_refused(siglip_dir: Path, images) -> None:
    scorer = PairScorer.from_pretrained(siglip_dir)
    with pytest.raises(DataError, match="found 3 and 0"):
        scorer.score(images, [])
