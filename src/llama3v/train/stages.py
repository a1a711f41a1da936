"""What trains: one function of the model, the stage and the policy, printed as a table before step 1.

    pretrain                 projector
    sft, projector+llm       projector and LLM
    sft, llm                 LLM
    sft, seed                vision top and projector, as the first Llama 3-V was described

Where the LLM has LoRA adapters (model/lora.py), these train in its place.

The trunk of the vision tower never trains: its output is what the cache holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from llama3v.errors import ConfigError
from llama3v.model.frozen import element_count
from llama3v.model.lora import has_lora

if TYPE_CHECKING:
    from rich.table import Table

Stage = Literal["pretrain", "sft"]
PRETRAIN_POLICY = "projector"

# policy -> the parts that train
_TRAINS: dict[str, tuple[str, ...]] = {
    PRETRAIN_POLICY: ("projector",),
    "projector+llm": ("projector", "llm"),
    "llm": ("llm",),
    "seed": ("top", "projector"),
}


@dataclass(frozen=True)
class Rule:
    """Parameters whose names match `pattern` (shell wildcards); `learning_rate` None freezes them. The first match wins."""

    pattern: str
    learning_rate: float | None


@dataclass(frozen=True)
class Line:
    """One rule with what it matched in a model."""

    pattern: str
    learning_rate: float | None
    names: tuple[str, ...]
    parameters: int

    @property
    def tensors(self) -> int:
        return len(self.names)


def what_trains(
    model: nn.Module,
    stage: Stage,
    policy: str = PRETRAIN_POLICY,
    *,
    learning_rate: float,
    llm_learning_rate: float | None = None,
) -> list[Line]:
    """Say for every parameter of the model whether it trains and how fast; nothing is changed yet (see `apply`).

    Args:
        model: has `.vision`, `.projector` and `.llm`.
        policy: of `sft`; stage `pretrain` trains the projector.
        learning_rate: of the projector and the vision top. llm_learning_rate: of the LLM, where it trains.

    Raises:
        ConfigError: unknown policy; a pattern that matches nothing; a parameter that no rule names; policy `seed`
            where the cache's cut leaves no vision top; adapters under a policy that freezes the LLM.
    """
    if stage == "pretrain":
        policy = PRETRAIN_POLICY
    if policy not in _TRAINS or (stage == "sft" and policy == PRETRAIN_POLICY):
        raise ConfigError(f"unknown policy {policy!r}; use projector+llm, llm or seed")
    trains = _TRAINS[policy]
    top = _top_patterns(model)
    if policy == "seed" and not top:
        depth = getattr(model.vision, "depth", 0)
        raise ConfigError(
            f"policy seed trains the vision top, but this model's cut is {depth} of {depth} layers, so its top is empty; "
            f"encode with --cut {max(depth - 4, 0)}, say, and pretrain with the same --cut"
        )
    llm_rate = learning_rate if llm_learning_rate is None else llm_learning_rate
    rules = [Rule(pattern, learning_rate if "top" in trains else None) for pattern in top]
    if _trunk_names(model):
        rules.append(Rule("vision.*", None))
    rules.append(Rule("projector.*", learning_rate if "projector" in trains else None))
    if has_lora(model.llm):  # type: ignore[arg-type]
        if "llm" not in trains:
            raise ConfigError(f"policy {policy} freezes the LLM, which has adapters to train; use projector+llm or llm")
        rules += [Rule("llm.*.lora_?.*", llm_rate), Rule("llm.*", None)]
    else:
        rules.append(Rule("llm.*", llm_rate if "llm" in trains else None))
    lines = match(rules, model)
    _refuse_trunk(lines, model)
    return lines


def match(rules: Sequence[Rule], model: nn.Module) -> list[Line]:
    """Give every parameter to the first rule that names it; a rule or a parameter left over is a ConfigError."""
    matched: dict[Rule, list[str]] = {rule: [] for rule in rules}
    sizes = {name: element_count(parameter) for name, parameter in model.named_parameters()}
    unnamed = []
    for name in sizes:
        rule = next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)
        if rule is None:
            unnamed.append(name)
        else:
            matched[rule].append(name)
    if unnamed:
        raise ConfigError(
            f"{len(unnamed)} parameters are named by no rule of what trains, e.g. {unnamed[0]}; add a rule"
        )
    for rule, names in matched.items():
        if not names:
            raise ConfigError(f"the pattern {rule.pattern!r} of what trains matches no parameter; correct or remove it")
    return [
        Line(rule.pattern, rule.learning_rate, tuple(names), sum(sizes[name] for name in names))
        for rule, names in matched.items()
    ]


def apply(lines: Sequence[Line], model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Set `requires_grad` as the table says and return AdamW's parameter groups.

    Norms and biases (everything with fewer than two dimensions) get no weight decay. Each group carries its peak
    learning rate as `peak` and its parameters' `names`, in the model's order.
    """
    parameters = dict(model.named_parameters())
    groups = []
    for line in lines:
        for name in line.names:
            parameters[name].requires_grad_(line.learning_rate is not None)
        if line.learning_rate is None:
            continue
        for decay, wanted in ((weight_decay, True), (0.0, False)):
            names = [name for name in line.names if (parameters[name].dim() >= 2) is wanted]
            if names:
                groups.append(
                    {
                        "params": [parameters[name] for name in names],
                        "names": names,
                        "lr": line.learning_rate,
                        "peak": line.learning_rate,
                        "weight_decay": decay,
                    }
                )
    return groups


def as_table(lines: Sequence[Line], title: str) -> "Table":
    """The table that is printed before step 1."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("parameters named")
    for heading in ("tensors", "parameters", "learning rate"):
        table.add_column(heading, justify="right")
    for line in lines:
        frozen = line.learning_rate is None
        rate = "frozen" if frozen else f"{line.learning_rate:g}"
        style = "dim" if frozen else "bold green"
        table.add_row(line.pattern, f"{line.tensors:,}", f"{line.parameters:,}", rate, style=style)
    return table


def _refuse_trunk(lines: Sequence[Line], model: nn.Module) -> None:
    """ConfigError where anything below the cut would train: the cached features would not be this model's any more."""
    trunk = _trunk_names(model)
    for line in lines:
        below = trunk.intersection(line.names)
        if line.learning_rate is not None and below:
            raise ConfigError(
                f"{min(below)} lies below the cut, and its output is what the cache holds, so it cannot train; "
                "encode with a lower --cut, and pretrain with the same"
            )


def _trunk_names(model: nn.Module) -> set[str]:
    return {f"vision.{name}" for name in model.vision.trunk_parameters()}  # type: ignore[operator, union-attr]


def _top_patterns(model: nn.Module) -> list[str]:
    """Patterns of the layers above the cut, e.g. vision.layers.24.*; none where the top is empty."""
    trunk = _trunk_names(model)
    names = [name for name, _ in model.named_parameters() if name.startswith("vision.") and name not in trunk]
    patterns: dict[str, None] = {}
    for name in names:
        pattern = ".".join(name.split(".")[:3]) + ".*"
        shared = any(fnmatchcase(other, pattern) for other in trunk)
        patterns[name if shared or not fnmatchcase(name, pattern) else pattern] = None
    return list(patterns)
