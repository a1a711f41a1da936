"""Named ways to a trained model. Each docstring states the command, the hardware, the time, the dollars and the score.

`quickstart` is also a verb. The others are option sets of `pretrain` and `sft`: `llama3v pretrain --recipe llama3_8b --help`
shows what one says. Options that are given beside `--recipe` replace the recipe's. A recipe is a file here with two
dictionaries, PRETRAIN and SFT, and a name in config/train.py.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, get_args

from llama3v.config import Recipe

NAMES: tuple[str, ...] = get_args(Recipe)
STAGES = {"pretrain": "PRETRAIN", "sft": "SFT"}


def options_of(recipe: str, verb: str) -> dict[str, Any]:
    """What a recipe sets of `PretrainConfig` (verb `pretrain`) or `SftConfig` (`sft`), its own name included."""
    return {"recipe": recipe, **getattr(import_module(f"{__name__}.{recipe}"), STAGES[verb])}


def text_of(recipe: str) -> str:
    """What a recipe says about itself."""
    return (import_module(f"{__name__}.{recipe}").__doc__ or "").strip()


def asked_for(arguments: Sequence[str]) -> str | None:
    """The recipe that a command line names, if it names one that exists for its verb."""
    if not arguments or arguments[0] not in STAGES:
        return None
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--recipe":
            name = value or (arguments[place + 1] if place + 1 < len(arguments) else "")
            return name if name in NAMES else None  # what else it is, the parser says
    return None


def expanded(arguments: Sequence[str]) -> list[str]:
    """A command line with its recipe's options before its own, so that its own win."""
    recipe = asked_for(arguments)
    if recipe is None:
        return list(arguments)
    verb, *own = arguments
    return [verb, *as_arguments(options_of(recipe, verb)), *own]


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as they are written on a command line."""
    arguments = []
    for name, value in options.items():
        option = _option(name)
        if value is True:
            arguments.append(option)
        else:
            arguments += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    return arguments


def replaced(config: Any, verb: str) -> dict[str, tuple[Any, Any]]:
    """Option -> (what the config has, what its recipe says), where the two differ."""
    recipe = options_of(config.recipe, verb) if config.recipe else {}
    return {name: (getattr(config, name), value) for name, value in recipe.items() if getattr(config, name) != value}


def in_words(config: Any, verb: str) -> str:
    """One line: which recipe a run follows, and where it does not."""
    own = [f"{_option(name)} {value} (recipe: {before})" for name, (value, before) in replaced(config, verb).items()]
    return f"recipe {config.recipe}" + (f", with your {', '.join(own)}" if own else ", as it is")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
