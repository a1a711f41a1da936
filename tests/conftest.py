"""Fixtures that every tier shares: a tiny tokenizer, a random tower, a random LLM and a model of both.

They have the shapes of the real thing at a size that loads in milliseconds; nothing in them is trained.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before torch is there. Test processes share the cores, and on models this small threads only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Tile 42 px, patch 14 px: 3x3 patches, so scale factor 3 gives 1 visual token per tile and 1 gives 9.
TILE_SIZE = 42
VISION_WIDTH = 32

LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
SENTENCES = (
    "The red square is left of the blue circle.",
    "What is on the table? There are three green triangles and one large star.",
    "Describe the image. A photograph of a dog that runs over the grass.",
    "user assistant system",
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A process per core and at most four; none where single files are named, and for slow tests, which fill all cores.

    PYTEST_XDIST_AUTO_NUM_WORKERS or -n gives another number; -n0 runs all tests in pytest's own process.
    """
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    if config.option.markexpr != "not slow" or all(Path(name.split("::")[0]).is_file() for name in config.args):
        return 0
    return min(4, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens with Llama 3's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(LLAMA3_SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
    )


@pytest.fixture(scope="session")
def tiny_vision_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SigLIP vision tower: 42 px tiles, 3x3 patches, width 32, 3 layers."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    directory = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=TILE_SIZE,
        patch_size=14,
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    SiglipVisionModel(config).eval().save_pretrained(directory)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": TILE_SIZE, "width": TILE_SIZE},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


@pytest.fixture(scope="session")
def tiny_llm_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama (hidden 32, 2 layers, 512 positions) saved with `tiny_tokenizer`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("llm")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,  # tied and untrained, it would repeat its last token for ever
        initializer_range=0.3,  # lively enough that the answer depends on the picture
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).eval().save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_vision_dir: Path, tiny_llm_dir: Path) -> Path:
    """A Llama 3-V of `tiny_vision_dir` and `tiny_llm_dir`: scale factor 3, at most 4 slices."""
    from llama3v.model.llama3v import build_model, save_model

    directory = tmp_path_factory.mktemp("model")
    model, tokenizer = build_model(str(tiny_vision_dir), str(tiny_llm_dir), scale_factor=3, max_tiles=4)
    save_model(model, tokenizer, directory)
    return directory
