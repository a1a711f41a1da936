"""The arithmetic of work agrees with what PyTorch counts, and with figures that others published."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama3v.plan.flops import Part, encoder_layer_weights, llama_layer_weights
from llama3v.train.gemm import gemm_rate
from llama3v.train.work import work_of

SAMPLE = 24  # tokens
TILES = 2


@pytest.fixture
def model(tiny_model_dir) -> Iterator[torch.nn.Module]:  # type: ignore[no-untyped-def]
    from llama3v.model.llama3v import load_model

    model, _ = load_model(tiny_model_dir)
    model.requires_grad_(False)
    model.llm.set_attn_implementation("eager")  # the counter knows plain matrix products everywhere
    return model


def counted(model) -> tuple[int, dict[str, int]]:  # type: ignore[no-untyped-def]
    """What PyTorch counts of one step on one sample, all of it supervised; and the sample's counts."""
    visual = TILES * model.tokens_per_tile
    ids = torch.randint(10, 300, (1, SAMPLE), generator=torch.Generator().manual_seed(0))
    ids[0, 1 : 1 + visual] = model.config.image_token_id
    features = torch.randn(TILES, model.vision.grid_side**2, model.vision.width)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, features=features).logits
        logits.sum().backward()
    counts = {"visual_tokens": visual, "text_tokens": SAMPLE - visual, "supervised_tokens": SAMPLE, "tiles": TILES}
    return counter.get_total_flops(), {**counts, "attention_pairs": SAMPLE**2}  # eager attends in full


@pytest.mark.parametrize("what", ["projector", "llm", "projector and llm"])
def test_the_formula_counts_what_pytorch_counts(model, what) -> None:  # type: ignore[no-untyped-def]
    model.projector.requires_grad_("projector" in what)
    model.llm.requires_grad_("llm" in what)
    found, counts = counted(model)
    # the gradient of the very first matrix's input is not needed, which the formula does not tell apart
    assert work_of(model, live_trunk=False).flops(counts) == pytest.approx(found, rel=0.08)


def test_a_frozen_llm_costs_four_operations_per_weight_and_a_trained_one_six() -> None:
    assert Part(1000, gradient_passes=True).flops(1) == 4000
    assert Part(1000, trained=1000, gradient_passes=True).flops(1) == 6000
    assert Part(1000).flops(1) == 2000


def test_the_weights_of_known_models_come_out() -> None:
    # Llama 3 8B has 8,030,261,248 parameters, of which embedding and head are 2 x 128256 x 4096 and norms 65 x 4096
    assert 32 * llama_layer_weights(4096, 14336, 32, 8, 128) == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    # SigLIP so400m at 384 pixels: about 0.67 TFLOP a tile for its 27 layers
    tower = Part(27 * encoder_layer_weights(1152, 4304), 27 * 1152)
    assert tower.flops(729, 729**2) == pytest.approx(0.67e12, rel=0.02)


def test_the_rate_of_matrix_products_is_measured_without_touching_the_random_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert 1e8 < gemm_rate(torch.device("cpu"), bf16=False) < 1e14
    assert torch.equal(before, torch.get_rng_state())
