"""What a training step of a model computes (plan/flops.py), read off the model and off what trains in it."""

from torch import nn

from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.plan.flops import Part, TrainingWork, encoder_layer_weights, llama_layer_weights


def work_of(model: Llama3VForConditionalGeneration, *, live_trunk: bool) -> TrainingWork:
    """The work of a step of this model, as its parameters' `requires_grad` stand.

    Args:
        live_trunk: whether the tower below the cut runs in training (modes pixels and stream). Of towers that are no
            transformers, that part is not counted.
    """
    tower, projector, text = model.vision, model.projector, model.config.text_config
    layer = encoder_layer_weights(tower.width, tower.mlp_size)
    top, blocks = tower.depth - tower.cut, len(projector.blocks)
    patches = tower.grid_side**2
    projector_trains = _trained(projector) > 0
    llm_trains = _trained(model.llm) > 0
    above = top * bool(_trained(tower)) + blocks * projector_trains
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    llm_layer = llama_layer_weights(
        text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads, head_size
    )
    head = model.get_output_embeddings()
    head_weights = text.vocab_size * text.hidden_size
    head_trained = head_weights if _trained(head) else 0
    embedding_trained = 0 if text.tie_word_embeddings else _trained(model.get_input_embeddings())
    llm_trained = _trained(model.llm) - head_trained - embedding_trained  # adapters included, where it has any
    last = projector.linear.weight.numel() + sum(weight.numel() for weight in projector.after.parameters())
    gradient_in_llm = llm_trains or projector_trains or above > 0
    return TrainingWork(
        llm=Part(
            llm_layer * text.num_hidden_layers,
            text.num_attention_heads * head_size * text.num_hidden_layers,
            llm_trained,
            gradient_in_llm,
        ),
        head=Part(head_weights, 0, head_trained, gradient_in_llm),
        blocks=Part(layer * (top + blocks), tower.width * (top + blocks), layer * above, above > 0),
        linear=Part(last, 0, last * projector_trains, above > 0),
        trunk=_trunk(model, layer) if live_trunk else Part(0),
        patches=patches,
        visual_tokens=projector.tokens_per_tile,
    )


def _trunk(model: Llama3VForConditionalGeneration, layer: int) -> Part:
    tower = model.vision
    if tower.kind != "siglip":
        return Part(0)
    embedding = 3 * tower.geometry["patch_size"] ** 2 * tower.width
    return Part(layer * tower.cut + embedding, tower.width * tower.cut)


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
