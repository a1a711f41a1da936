"""What trains is decided in one place, for every parameter, and mistakes are errors at the start."""

import pytest
from torch import nn

from llama3v.errors import ConfigError
from llama3v.train import stages
from llama3v.train.stages import Rule, match, what_trains


class _Tower(nn.Module):
    def __init__(self, depth: int, cut: int) -> None:
        super().__init__()
        self.depth, self.cut = depth, cut
        self.embeddings = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def trunk_parameters(self):
        top = tuple(f"layers.{index}." for index in range(self.cut, self.depth))
        return {n: p for n, p in self.named_parameters() if not (top and n.startswith(top))}


class _Model(nn.Module):
    def __init__(self, depth: int = 12, cut: int = 12) -> None:
        super().__init__()
        self.vision = _Tower(depth, cut)
        self.projector = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.llm = nn.Linear(4, 6)


def trained_parts(model):
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("stage", "policy", "parts"),
    [
        ("pretrain", "projector", {"projector"}),
        ("sft", "projector+llm", {"projector", "llm"}),
        ("sft", "llm", {"llm"}),
        ("sft", "seed", {"vision", "projector"}),
    ],
)
def test_each_policy_trains_its_parts_and_freezes_the_rest(stage, policy, parts):
    model = _Model(cut=10)
    lines = what_trains(model, stage, policy, learning_rate=1e-3, llm_learning_rate=1e-5)
    groups = stages.apply(lines, model)
    assert trained_parts(model) == parts
    in_groups = [name for group in groups for name in group["names"]]
    assert sorted(in_groups) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    rates = {name: group["peak"] for group in groups for name in group["names"]}
    assert all(rate == (1e-5 if name.startswith("llm") else 1e-3) for name, rate in rates.items())


def test_seed_trains_the_layers_above_the_cut_and_no_other():
    model = _Model(depth=12, cut=10)
    stages.apply(what_trains(model, "sft", "seed", learning_rate=1e-3), model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("vision.")}
    # layer 1 is below the cut although "vision.layers.1" begins like "vision.layers.10"
    assert trained == {f"vision.layers.{i}.{kind}" for i in (10, 11) for kind in ("weight", "bias")}


def test_seed_with_an_empty_top_is_an_error_that_says_to_encode_with_a_cut():
    with pytest.raises(ConfigError, match="--cut 8"):
        what_trains(_Model(depth=12, cut=12), "sft", "seed", learning_rate=1e-3)


def test_every_parameter_is_named_once_and_counted():
    model = _Model(cut=10)
    lines = what_trains(model, "pretrain", learning_rate=1e-3)
    names = [name for line in lines for name in line.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(line.parameters for line in lines) == sum(p.numel() for p in model.parameters())


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"adapter\.\*"):
        match([Rule("adapter.*", 1e-3), Rule("*", None)], _Model())


def test_a_parameter_that_no_rule_names_is_an_error():
    with pytest.raises(ConfigError, match=r"llm\.weight"):
        match([Rule("vision.*", None), Rule("projector.*", 1e-3)], _Model())


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ConfigError, match="everything"):
        what_trains(_Model(), "sft", "everything", learning_rate=1e-3)


def test_norms_and_biases_get_no_weight_decay():
    model = _Model()
    groups = stages.apply(what_trains(model, "pretrain", learning_rate=1e-3), model, weight_decay=0.1)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert decayed == {"projector.0.weight"}


def test_the_table_shows_every_rule():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(stages.as_table(what_trains(_Model(cut=11), "pretrain", learning_rate=1e-3), "What trains"))
    text = console.export_text()
    for word in ("vision.layers.11.*", "vision.*", "projector.*", "llm.*", "frozen", "0.001"):
        assert word in text


def test_tied_weights_are_counted_once(tiny_model_dir):
    from llama3v.model.llama3v import load_model

    model, _ = load_model(tiny_model_dir)
    lines = what_trains(model, "sft", "projector+llm", learning_rate=1e-3, llm_learning_rate=1e-4)
    assert sum(line.parameters for line in lines) == sum(p.numel() for p in model.parameters())
