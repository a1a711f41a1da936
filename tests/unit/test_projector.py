"""The projection block: starts sane, and every part has its exact counterpart in stock transformers."""

import pytest
import torch
from transformers import SiglipVisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from llama3v.errors import ConfigError
from llama3v.model.projector import Projector, pixel_unshuffle

WIDTH, HEADS, MLP, SIDE, HIDDEN = 16, 2, 40, 6, 24


def make_projector(scale_factor: int = 3, rms: float = 0.02) -> Projector:
    projector = Projector(
        width=WIDTH, heads=HEADS, mlp_size=MLP, grid_side=SIDE, scale_factor=scale_factor, hidden=HIDDEN
    )
    projector.initialise(rms, torch.Generator().manual_seed(0))
    return projector.eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, SIDE * SIDE, WIDTH, generator=torch.Generator().manual_seed(1))


def test_a_new_projectors_blocks_pass_features_through_unchanged(features: torch.Tensor) -> None:
    for block in make_projector().blocks:
        assert torch.equal(block(features), features)


def test_a_new_projectors_output_has_the_root_mean_square_of_the_embeddings(features: torch.Tensor) -> None:
    for rms in (0.02, 1.5):
        tokens = make_projector(scale_factor=2, rms=rms)(7 * features + 3)  # whatever the scale of the features
        assert float(tokens.square().mean().sqrt()) == pytest.approx(rms, rel=0.1)


def test_a_new_projector_is_a_function_of_its_seed() -> None:
    first, second = make_projector().state_dict(), make_projector().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("r", [1, 2, 3, 6])
def test_unshuffle_equals_idefics3s_bit_for_bit(features: torch.Tensor, r: int) -> None:
    connector = Idefics3Connector(
        Idefics3Config(
            scale_factor=r,
            vision_config={"hidden_size": WIDTH},
            text_config={"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1},
        )
    )
    stock = connector.pixel_shuffle(features, r)
    assert torch.equal(pixel_unshuffle(features, SIDE, r), stock)
    assert stock.shape == (3, (SIDE // r) ** 2, r * r * WIDTH)


def test_unshuffle_gathers_each_neighbourhood_row_by_row() -> None:
    patches = torch.arange(16.0).view(1, 16, 1)  # 4 x 4, numbered row by row
    tokens = pixel_unshuffle(patches, 4, 2)[0].tolist()
    assert tokens == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("r", [4, 5, 7])
def test_a_scale_factor_that_does_not_divide_the_grid_is_refused_with_those_that_do(r: int) -> None:
    with pytest.raises(ConfigError, match=r"use one of \[1, 2, 3, 6\]"):
        make_projector(scale_factor=r)


def test_two_trained_blocks_equal_two_stock_siglip_layers(features: torch.Tensor) -> None:
    projector = make_projector()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    config = SiglipVisionConfig(hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=MLP)
    config._attn_implementation = "sdpa"
    ours = stock = features
    for block in projector.blocks:
        layer = SiglipEncoderLayer(config).eval()
        layer.load_state_dict(block.state_dict())  # strict: the parameter names are the same too
        ours, stock = block(ours), layer(stock, attention_mask=None)
    assert not torch.allclose(ours, features, atol=0.1)  # the blocks do something
    torch.testing.assert_close(ours, stock, rtol=0, atol=0)


def test_attention_stays_within_a_tile(features: torch.Tensor) -> None:
    projector = make_projector()
    together = projector(features)
    alone = torch.cat([projector(features[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
