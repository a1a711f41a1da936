"""The fold: an export computes, in stock transformers, what this package computes.

What runs in a process that cannot import llama3v is the export's own check (exporters/check.py): features, visual
tokens and logits in fp32, greedy tokens, and token ids through the directory's chat template.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from llama3v.config import ExportConfig
from llama3v.errors import CheckpointError
from llama3v.exporters import check
from llama3v.exporters.verbs import export
from llama3v.model.fold import POSITION_BORDER, padded_positions
from llama3v.model.llama3v import Llama3VForConditionalGeneration, build_model, load_model, save_model
from llama3v.model.prompt import Renderer, Turn
from llama3v.model.slicing import Grid
from llama3v.model.tiles import make_tiles, to_pixels

pytestmark = pytest.mark.timeout(900)  # each export starts a process that imports torch: minutes on a busy machine


@dataclass
class Exported:
    model: Llama3VForConditionalGeneration
    directory: Path
    summary: dict
    renderer: Renderer


def make_llm(directory: Path, tokenizer, *, tied: bool) -> Path:
    """A random Llama whose embedding has 7 rows more than the tokenizer has tokens, as padded vocabularies do."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def export_one(vision: Path, tokenizer, work: Path, *, r: int, cut: int, tied: bool, form: str, fmt: str) -> Exported:
    """Build a model whose every weight differs from its start, save it, and export it with the check."""
    llm = make_llm(work / "llm", tokenizer, tied=tied)
    model, tokenizer = build_model(str(vision), str(llm), cut=cut, scale_factor=r, max_tiles=4, prompt_format=fmt)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*model.projector.parameters(), *model.vision.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    save_model(model, tokenizer, work / "model")
    summary = export(ExportConfig(out=work / "stock", model=str(work / "model"), form=form))
    model, tokenizer = load_model(work / "model")
    renderer = Renderer(tokenizer, fmt, model.tokens_per_tile, model.config.image_token_id)
    return Exported(model, work / "stock", summary, renderer)


@pytest.fixture(scope="module")
def chatml_tokenizer(tiny_tokenizer):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def smolvlm(tiny_vision_dir, tiny_tokenizer, tmp_path_factory) -> Exported:
    """r = 3, SmolVLM form, tied embeddings, cut below the last layer."""
    options = {"r": 3, "cut": 1, "tied": True, "form": "smolvlm", "fmt": "llama3"}
    return export_one(tiny_vision_dir, tiny_tokenizer, tmp_path_factory.mktemp("smolvlm"), **options)


@pytest.fixture(scope="module")
def idefics3(tiny_vision_dir, chatml_tokenizer, tmp_path_factory) -> Exported:
    """r = 1, Idefics3 form, untied embeddings, ChatML."""
    options = {"r": 1, "cut": 2, "tied": False, "form": "idefics3", "fmt": "chatml"}
    return export_one(tiny_vision_dir, chatml_tokenizer, tmp_path_factory.mktemp("idefics3"), **options)


@pytest.fixture(params=["smolvlm", "idefics3"])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("side", range(2, 33))
def test_padded_positions_are_exact_in_stock_transformers_for_every_grid(side: int) -> None:
    config = Idefics3VisionConfig(
        hidden_size=1, num_attention_heads=1, image_size=side + POSITION_BORDER, patch_size=1, num_channels=1
    )
    embeddings = Idefics3VisionEmbeddings(config)
    numbers = torch.arange(1.0, side * side + 1).view(-1, 1)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(padded_positions(numbers, side))
        found = embeddings(torch.zeros(1, 1, side, side), torch.ones(1, side, side, dtype=torch.bool))
    assert torch.equal(found[0], numbers)


def test_features_and_logits_are_bit_equal_without_our_package(exported: Exported) -> None:
    result = exported.summary["check"]
    assert result["cases"] == ["text", "one_tile", "two_images"]
    assert (result["features"], result["visual_tokens"], result["logits"]) == (0.0, 0.0, 0.0)
    assert result["template_gives_our_ids"]


@torch.no_grad()
def test_the_auto_class_loads_every_tensor_and_no_random_one(exported: Exported) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(exported.directory, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[exported.summary["form"]] + (
        "ForConditionalGeneration"
    )
    assert model.config.image_token_id == exported.model.config.image_token_id
    shared = model.lm_head.weight is model.get_input_embeddings().weight
    assert shared == exported.model.config.tie_word_embeddings


@torch.no_grad()
def test_reserved_tokens_cannot_win_greedy_decoding(exported: Exported) -> None:
    head = load_file(exported.directory / "model.safetensors")["lm_head.weight"]
    known = exported.model.config.text_config.vocab_size
    assert len(head) > known
    hidden = torch.randn(2000, head.shape[1], generator=torch.Generator().manual_seed(0))
    towards = head[known:] - head[:known].mean(0) + head[known:]  # also states that point at them
    logits = torch.cat([hidden, towards, -hidden]) @ head.T
    assert (logits[:, known:].max(dim=1).values < logits[:, :known].max(dim=1).values).all()


def test_every_token_keeps_its_id_and_image_takes_the_first_new_one(exported: Exported) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported.directory)
    before = exported.renderer._plain.get_vocab()
    after = tokenizer.get_vocab()
    assert before.items() <= after.items()
    assert after["<image>"] == exported.model.config.image_token_id == exported.model.config.text_config.vocab_size
    config = json.loads((exported.directory / "config.json").read_text())
    assert max(after.values()) + 1 == config["text_config"]["vocab_size"]
    assert config["text_config"]["rope_theta"] == 500000.0  # for MLX
    assert "lm_head.weight" in load_file(exported.directory / "model.safetensors")  # also where it is tied


CONVERSATIONS = {
    "one image": ([Turn("user", "What is it?", (0,))], [Grid(1, 1)]),
    "slices": ([Turn("system", "Be brief."), Turn("user", "  Read\n\nthis. ", (0, 1))], [Grid(3, 2), Grid(1, 4)]),
    "turns": (
        [Turn("user", "\nOne,\ntwo", (0,)), Turn("assistant", " A dog. "), Turn("user", "And 3 < 5, here?", (1,))],
        [Grid(2, 1), Grid(1, 1)],
    ),
    "text": ([Turn("user", "¿Qué? 12 345, …")], []),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_chat_template_gives_our_ids(exported: Exported, name: str) -> None:
    turns, grids = CONVERSATIONS[name]
    tokenizer = AutoTokenizer.from_pretrained(exported.directory)
    text = tokenizer.apply_chat_template(check.Case(tuple(turns), tuple(grids)).messages(), tokenize=False)
    ids = tokenizer(text.replace("<image>", "<image>" * exported.model.tokens_per_tile))["input_ids"]
    assert ids == exported.renderer.render(turns, grids).ids
    if not grids:  # content may be a plain string
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text


def picture(width: int = 150, height: int = 100):
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_idefics3_processor_makes_our_overview_and_our_ids_within_its_framing(idefics3: Exported) -> None:
    if Version(transformers.__version__) < Version("5.23"):
        pytest.importorskip("torchvision", reason="before 5.23 this processor needs torchvision")
    processor = AutoProcessor.from_pretrained(idefics3.directory)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[picture()], return_tensors="pt")
    tiles = make_tiles(picture(), idefics3.model.vision.tile_size, max_tiles=0)
    ours = to_pixels(tiles.pixels, idefics3.model.vision.mean, idefics3.model.vision.std)
    torch.testing.assert_close(inputs["pixel_values"], ours.unsqueeze(0), rtol=0, atol=1e-6)
    framing = set(processor.tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>"]))
    found = [token for token in inputs["input_ids"][0].tolist() if token not in framing]
    rendered = idefics3.renderer.render([Turn("user", "What is it?", (0,))], [Grid(1, 1)], generate=True)
    assert found == rendered.ids
    assert len(processor.tokenizer) == idefics3.model.config.image_token_id + 4  # loading it added nothing


def test_the_smolvlm_processor_gives_exactly_our_ids_for_slices(smolvlm: Exported) -> None:
    for module in ("torchvision", "num2words"):
        pytest.importorskip(module, reason="the SmolVLM processor needs torchvision and num2words")
    processor = AutoProcessor.from_pretrained(smolvlm.directory)
    turns, grids = [Turn("user", "What is it?", (0,))], [Grid(2, 1)]
    text = processor.apply_chat_template(check.Case(tuple(turns), tuple(grids)).messages(), add_generation_prompt=True)
    side = smolvlm.model.vision.tile_size
    inputs = processor(text=text, images=[[picture(side, side)] * 3], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == smolvlm.renderer.render(turns, grids, generate=True).ids
    assert inputs["pixel_values"].shape == (1, 3, 3, side, side)


def test_the_check_refuses_an_export_that_computes_something_else(smolvlm: Exported, monkeypatch) -> None:
    expected = check.reference_outputs(smolvlm.model, AutoTokenizer.from_pretrained(smolvlm.directory))
    same = {f"{case}.{key}": value for case, results in expected.items() for key, value in results.items()}
    same |= {f"{case}.template_ids": results["ids"] for case, results in expected.items()}
    found: dict = {}
    monkeypatch.setattr(check, "_run_stock", lambda *_: dict(found))

    found = same
    assert check.compare(expected, smolvlm.directory, 1)["logits"] == 0.0
    for key, reason in (("features", "features differ"), ("logits", "logits differ")):
        for wrong in (1.01 * same[f"one_tile.{key}"], same[f"one_tile.{key}"] * torch.nan):
            found = same | {f"one_tile.{key}": wrong}
            with pytest.raises(CheckpointError, match=reason):
                check.compare(expected, smolvlm.directory, 1)
    found = same | {"text.greedy": same["text.greedy"] + 1}
    with pytest.raises(CheckpointError, match="answers the check 'text'"):
        check.compare(expected, smolvlm.directory, 1)
    found = same | {"text.template_ids": same["text.ids"][:, 1:]}
    assert not check.compare(expected, smolvlm.directory, 1)["template_gives_our_ids"]
