"""The whole model: the splice, images and turns, saving and loading, and generation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from llama3v.errors import CheckpointError, PromptError
from llama3v.model.llama3v import (
    Llama3VConfig,
    Llama3VForConditionalGeneration,
    build_model,
    load_llm,
    load_model,
    save_model,
)
from llama3v.model.prompt import Renderer, Turn
from llama3v.model.slicing import Grid

ONE, THREE = Grid(1, 1), Grid(2, 1)  # grids of 1 and of 1 + 2 tiles


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Llama3VForConditionalGeneration:
    """The shared model with a projector that is not at its starting point."""
    model, _ = load_model(tiny_model_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def renderer(model: Llama3VForConditionalGeneration, tiny_tokenizer) -> Renderer:
    return Renderer(tiny_tokenizer, "llama3", model.tokens_per_tile, model.config.image_token_id)


def prompt(renderer: Renderer, grids: list[Grid], text: str = "What is on the table?") -> torch.Tensor:
    turn = Turn("user", text, tuple(range(len(grids))))
    return torch.tensor([renderer.render([turn], grids, generate=True).ids])


def random_pixels(tiles: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tiles, 3, 42, 42, generator=torch.Generator().manual_seed(seed))


def greedy(model, ids: torch.Tensor, **inputs) -> torch.Tensor:
    mask = inputs.pop("attention_mask", torch.ones_like(ids))
    answer = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, **inputs
    )
    return answer[:, ids.shape[1] :]


def save_llm(directory: Path, tokenizer, **options) -> Path:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def test_the_splice_puts_each_visual_token_at_its_slot_and_leaves_text_alone(model, renderer) -> None:
    ids, pixels = prompt(renderer, [ONE, THREE]), random_pixels(4)
    features = model.vision.trunk(pixels)
    embeddings = model.embed(ids, features)
    slots = ids[0] == model.config.image_token_id
    assert torch.equal(embeddings[0, slots], model.visual_tokens(features).flatten(0, 1))
    assert torch.equal(embeddings[0, ~slots], model.get_input_embeddings()(ids[0, ~slots]))


@pytest.mark.parametrize(("grids", "tiles"), [([ONE], 0), ([ONE], 2), ([], 1), ([THREE], 2)])
def test_the_splice_refuses_slots_and_features_that_do_not_match(model, renderer, grids, tiles) -> None:
    ids = prompt(renderer, grids)
    pixels = random_pixels(tiles) if tiles else None
    with pytest.raises(PromptError, match=r"image slots but the images give \d+ visual tokens"):
        model(input_ids=ids, pixel_values=pixels)


def test_pixels_and_features_together_are_refused(model, renderer) -> None:
    pixels = random_pixels(1)
    with pytest.raises(PromptError, match="not both"):
        model(input_ids=prompt(renderer, [ONE]), pixel_values=pixels, features=model.vision.trunk(pixels))
    with pytest.raises(PromptError, match="input_ids or inputs_embeds"):
        model(pixel_values=pixels)


@torch.no_grad()
def test_cached_features_give_the_logits_and_the_answer_of_pixels(model, renderer) -> None:
    ids, pixels = prompt(renderer, [ONE, THREE]), random_pixels(4)
    features = model.vision.trunk(pixels)
    from_pixels, from_features = model(input_ids=ids, pixel_values=pixels), model(input_ids=ids, features=features)
    assert torch.equal(from_pixels.logits, from_features.logits)
    assert torch.equal(greedy(model, ids, pixel_values=pixels), greedy(model, ids, features=features))


@torch.no_grad()
def test_text_alone_is_the_llm_alone(model, renderer) -> None:
    ids = prompt(renderer, [])
    assert torch.equal(model(input_ids=ids).logits, model.llm(input_ids=ids).logits)
    assert torch.equal(greedy(model, ids), greedy(model.llm, ids))


@torch.no_grad()
def test_logits_depend_on_every_image_and_on_their_order(model, renderer) -> None:
    ids, pixels = prompt(renderer, [ONE, THREE]), random_pixels(4)
    logits = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
    for index in range(4):
        other = pixels.clone()
        other[index] = random_pixels(1, seed=9)[0]
        assert not torch.allclose(model(input_ids=ids, pixel_values=other).logits[0, -1], logits, atol=1e-4)
    assert not torch.allclose(model(input_ids=ids, pixel_values=pixels.flip(0)).logits[0, -1], logits, atol=1e-4)


@torch.no_grad()
def test_images_of_several_turns_go_to_their_own_turns(model, renderer) -> None:
    turns = [Turn("user", "Here.", (0,)), Turn("assistant", "A dog."), Turn("user", "And here?", (1,))]
    rendered = renderer.render(turns, [ONE, ONE], generate=True)
    features = model.vision.trunk(random_pixels(2))
    embeddings = model.embed(torch.tensor([rendered.ids]), features)
    visual = model.visual_tokens(features)
    for slot in rendered.slots:
        assert torch.equal(embeddings[0, slot.start : slot.start + slot.length], visual[slot.image])


def test_the_loss_is_the_mean_over_labelled_tokens_and_reaches_the_projector(model, renderer) -> None:
    turns = [Turn("user", "What is it?", (0,)), Turn("assistant", "A dog.")]
    rendered = renderer.render(turns, [ONE])
    ids, labels = torch.tensor([rendered.ids]), torch.tensor([rendered.labels()])
    output = model(input_ids=ids, pixel_values=random_pixels(1), labels=labels)
    right = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])  # ignores -100
    torch.testing.assert_close(output.loss, right)
    gradient = torch.autograd.grad(output.loss, model.projector.linear.weight)[0]
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_generation_with_and_without_the_kv_cache_gives_the_same_tokens(model, renderer) -> None:
    ids, pixels = prompt(renderer, [THREE]), random_pixels(3)
    cached = greedy(model, ids, pixel_values=pixels, use_cache=True)
    assert torch.equal(cached, greedy(model, ids, pixel_values=pixels, use_cache=False))
    step_by_step = ids
    for _ in range(8):  # and by hand, without `generate`
        logits = model(input_ids=step_by_step, pixel_values=pixels).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        step_by_step = torch.cat([step_by_step, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, step_by_step[:, ids.shape[1] :])


@torch.no_grad()
def test_a_left_padded_batch_answers_as_each_prompt_alone(model, renderer) -> None:
    prompts = [
        (prompt(renderer, [ONE, THREE]), random_pixels(4, seed=1)),
        (prompt(renderer, [], "Name three colours, and a fourth one."), random_pixels(0)),
        (prompt(renderer, [ONE], "What?"), random_pixels(1, seed=2)),
    ]
    length = max(ids.shape[1] for ids, _ in prompts)
    pad = model.generation_config.pad_token_id
    rows = [torch.nn.functional.pad(ids, (length - ids.shape[1], 0), value=pad) for ids, _ in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(ids), (length - ids.shape[1], 0)) for ids, _ in prompts]
    batch = greedy(
        model,
        torch.cat(rows),
        attention_mask=torch.cat(masks),
        pixel_values=torch.cat([pixels for _, pixels in prompts]),
    )
    for row, (ids, pixels) in zip(batch, prompts, strict=True):
        alone = greedy(model, ids, pixel_values=pixels if len(pixels) else None)
        assert torch.equal(row, alone[0])


@torch.no_grad()
def test_several_answers_to_one_prompt_all_see_its_tiles_in_order(model, renderer) -> None:
    ids, pixels = prompt(renderer, [THREE]), random_pixels(3)
    alone = greedy(model, ids, pixel_values=pixels)
    beams = greedy(model, ids, pixel_values=pixels, num_beams=2, num_return_sequences=2)
    by_hand = greedy(model, ids.repeat(2, 1), pixel_values=pixels.repeat(2, 1, 1, 1))
    assert torch.equal(by_hand, alone.repeat(2, 1))
    features = model.vision.trunk(pixels)
    assert torch.equal(beams, greedy(model, ids, features=features, num_beams=2, num_return_sequences=2))
    expanded = model._expand_inputs_for_generation(expand_size=2, input_ids=ids, pixel_values=pixels)[1]
    assert torch.equal(expanded["pixel_values"], pixels.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_changes_no_bit(tiny_vision_dir: Path, tiny_tokenizer, tmp_path: Path, tied: bool) -> None:
    llm = save_llm(tmp_path / "llm", tiny_tokenizer, tie_word_embeddings=tied)
    model, tokenizer = build_model(str(tiny_vision_dir), str(llm), cut=1, scale_factor=3, max_tiles=2)
    save_model(model, tokenizer, tmp_path / "model")
    again, tokenizer_again = load_model(tmp_path / "model")
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    shared = again.llm.lm_head.weight is again.llm.model.embed_tokens.weight
    assert shared == tied
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert ("llm.lm_head.weight" in saved) == (not tied)
    assert again.config.vision_config == model.config.vision_config
    assert (again.config.scale_factor, again.config.max_tiles, again.config.prompt_format) == (3, 2, "llama3")
    assert tokenizer_again.get_vocab() == tiny_tokenizer.get_vocab()
    with torch.no_grad():
        ids = torch.tensor([[0, 5, 6, model.config.image_token_id, 7]])
        inputs = {"input_ids": ids, "pixel_values": random_pixels(1)}
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_parameters_have_the_names_that_the_stages_and_the_fold_rely_on(model) -> None:
    names = set(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"vision", "projector", "llm"}
    block = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"] + [
        f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")
    ]
    expected = {f"projector.blocks.{n}.{part}.{end}" for n in (0, 1) for part in block for end in ("weight", "bias")}
    expected |= {"projector.norm.weight", "projector.norm.bias", "projector.linear.weight"}
    assert {name for name in names if name.startswith("projector.")} == expected


def test_the_auto_classes_find_the_model(tiny_model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir)
    assert type(config) is Llama3VConfig
    assert config.image_token_id == config.text_config.vocab_size
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    assert type(model) is Llama3VForConditionalGeneration


def test_the_same_seed_builds_the_same_model(tiny_vision_dir: Path, tiny_llm_dir: Path) -> None:
    models = [build_model(str(tiny_vision_dir), str(tiny_llm_dir), seed=seed)[0] for seed in (0, 0, 1)]
    weights = [model.projector.linear.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_is_not_a_model_directory_is_refused_in_one_line(
    tiny_model_dir: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    weights = load_file(file)
    del weights["projector.linear.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for directory, reason in (
        (tmp_path / "absent", "no Llama 3-V at"),
        (tmp_path / "damaged", "lacks 1 tensors, such as projector.linear.weight"),
        (tmp_path / "broken", "not valid JSON"),
        (tiny_llm_dir, "holds a 'llama' model.*llama3v pretrain --llm"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_model(directory)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_llm_is_refused(tiny_model_dir: Path, tmp_path: Path, tiny_tokenizer) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    extra = {"id": len(tiny_tokenizer), "content": "<extra>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append(extra | flags)
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_model(tmp_path / "model")


def test_an_absent_llm_is_refused_in_one_line(tmp_path: Path) -> None:
    for name, reason in ((tmp_path / "absent", "cannot be loaded"), (tmp_path / "absent.gguf", "no GGUF file")):
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_llm(str(name))
        assert "\n" not in str(caught.value)
