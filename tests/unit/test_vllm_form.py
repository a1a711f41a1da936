"""`export --program vllm`: what vLLM's own model code expects of a checkpoint, held to without vLLM.

Expectations out of vLLM's source, vllm/model_executor/models: idefics3.py and smolvlm.py (names, image_seq_len,
_validate_pixel_values, get_image_repl), idefics2_vision_model.py (positions), llama.py (names).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from llama3v.config import ExportConfig
from llama3v.errors import CheckpointError, ConfigError
from llama3v.exporters.verbs import export
from llama3v.model.fold import require_exact_positions
from llama3v.model.llama3v import load_model


@pytest.fixture(scope="module", params=["smolvlm", pytest.param("idefics3", marks=pytest.mark.slow)])
def exported(request, tiny_model_dir: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vllm") / "out"
    config = ExportConfig(out=out, model=str(tiny_model_dir), program="vllm", form=request.param)
    check = export(config)["check"]  # stock transformers agrees with this form, too
    assert check["features"] < 1e-4
    return out


def expected_names(config: dict) -> set[str]:
    """Parameters of vLLM's modules before it stacks q, k, v and gate, up."""
    both = ("weight", "bias")
    tower = "model.vision_model"
    names = {f"{tower}.embeddings.patch_embedding.{kind}" for kind in both}
    names |= {f"{tower}.embeddings.position_embedding.weight", "model.connector.modality_projection.proj.weight"}
    names |= {f"{tower}.post_layernorm.{kind}" for kind in both}
    layer = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"] + [
        f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")
    ]
    for number in range(config["vision_config"]["num_hidden_layers"]):
        names |= {f"{tower}.encoder.layers.{number}.{part}.{kind}" for part in layer for kind in both}
    names |= {"model.text_model.embed_tokens.weight", "model.text_model.norm.weight", "lm_head.weight"}
    layer = ["input_layernorm", "post_attention_layernorm"] + [f"self_attn.{p}_proj" for p in "qkvo"]
    layer += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    for number in range(config["text_config"]["num_hidden_layers"]):
        names |= {f"model.text_model.layers.{number}.{part}.weight" for part in layer}
    return names


def test_the_weights_have_the_names_and_shapes_that_vllm_loads(exported: Path, tiny_model_dir: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    weights = load_file(exported / "model.safetensors")
    assert set(weights) == expected_names(config)
    vision, text = config["vision_config"], config["text_config"]
    side = vision["image_size"] // vision["patch_size"]
    positions = weights["model.vision_model.embeddings.position_embedding.weight"]
    assert positions.shape == (side**2, vision["hidden_size"])
    model, _ = load_model(tiny_model_dir)
    assert torch.equal(positions, model.state_dict()["vision.embeddings.position_embedding.weight"])
    inputs = vision["hidden_size"] * config["scale_factor"] ** 2
    assert weights["model.connector.modality_projection.proj.weight"].shape == (text["hidden_size"], inputs)
    assert weights["lm_head.weight"].shape == (text["vocab_size"], text["hidden_size"])


def test_the_processor_makes_tiles_of_the_size_and_number_of_tokens_that_vllm_checks(exported: Path) -> None:
    config, processor = (json.loads((exported / f"{name}.json").read_text()) for name in ("config", "processor_config"))
    vision, images = config["vision_config"], processor["image_processor"]
    size, most = images["size"]["longest_edge"], images["max_image_size"]["longest_edge"]
    assert size == most == vision["image_size"]  # else pixel values of another shape than (3, image_size, image_size)
    assert not images["do_image_splitting"]
    side = vision["image_size"] // vision["patch_size"]
    assert processor["image_seq_len"] == side**2 // config["scale_factor"] ** 2
    form = config["model_type"]
    assert processor["processor_class"] == {"smolvlm": "SmolVLMProcessor", "idefics3": "Idefics3Processor"}[form]
    assert config["architectures"] == [processor["processor_class"].replace("Processor", "ForConditionalGeneration")]


def test_the_tokens_that_vllm_writes_around_an_image_are_known(exported: Path) -> None:
    config, tokens = (json.loads((exported / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert tokenizer.token_to_id("<image>") == config["image_token_id"] < config["text_config"]["vocab_size"]
    if config["model_type"] == "smolvlm":  # read from the processor: nothing stands around an image
        framing = tokens["extra_special_tokens"]
        assert (framing["fake_image_token"], framing["global_image_token"]) == ("", "")
    else:
        assert {"<fake_token_around_image>", "<global-img>"} <= set(tokenizer.get_vocab())


def test_positions_that_vllm_would_round_are_refused() -> None:
    require_exact_positions(27)  # SigLIP so400m at 384 pixels
    wrong = [side for side in range(2, 65) if not _is_exact(side)]
    assert wrong
    with pytest.raises(CheckpointError, match="positions of their neighbours"):
        require_exact_positions(wrong[0])


def _is_exact(side: int) -> bool:
    try:
        require_exact_positions(side)
    except CheckpointError:
        return False
    return True


def test_options_of_other_formats_are_refused() -> None:
    for options in ({"program": "vllm", "format": "gguf"}, {"weights": "int4"}, {"weights": "int4", "format": "gguf"}):
        with pytest.raises(ConfigError, match="has no meaning for --format"):
            ExportConfig(out=Path("out"), **options)  # type: ignore[arg-type]
