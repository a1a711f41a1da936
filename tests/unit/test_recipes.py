"""A recipe is a named set of options: found from the command line, valid, and always second to what the user gives."""

import pytest

from llama3v import cli, recipes
from llama3v.config import PretrainConfig, SftConfig

OWN = {
    "pretrain": ["--data", "captions.json", "--cache", "cache", "--out", "out"],
    "sft": ["--data", "talk.json", "--model", "runs/stage1", "--cache", "cache", "--out", "out"],
}
BOTH = [(name, verb) for name in recipes.NAMES for verb in recipes.STAGES]


@pytest.mark.parametrize(("name", "verb"), BOTH)
def test_a_recipe_sets_what_it_says_and_is_a_valid_run(name, verb):
    found, options = cli.parse([verb, "--recipe", name, *OWN[verb]])
    assert found == verb
    assert isinstance(options, PretrainConfig if verb == "pretrain" else SftConfig)
    for option, value in recipes.options_of(name, verb).items():
        assert getattr(options, option) == value, option
    assert recipes.replaced(options, verb) == {}


@pytest.mark.parametrize("order", ["before", "after"])
def test_what_the_user_gives_replaces_the_recipe_wherever_it_stands(order):
    own = ["--learning-rate", "0.5", "--max-tiles=2"]
    recipe = ["--recipe", "llama3_8b"]
    arguments = [*own, *recipe] if order == "before" else [*recipe, *own]
    _, options = cli.parse(["sft", *arguments, *OWN["sft"]])
    assert (options.learning_rate, options.max_tiles) == (0.5, 2)
    assert recipes.replaced(options, "sft") == {"learning_rate": (0.5, 2e-5), "max_tiles": (2, 6)}


def test_the_help_of_a_verb_says_what_its_recipe_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--recipe=llama3_8b_lora_24gb", "--help"])
    shown = capsys.readouterr().out
    for line in recipes.text_of("llama3_8b_lora_24gb").splitlines():
        assert not line.startswith("    ") or line in shown


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_recipe_states_its_commands_and_what_is_known_of_cost_and_score(name):
    text = recipes.text_of(name)
    for verb in recipes.STAGES:
        assert f"{verb} --recipe {name}" in " ".join(text.split())
    assert "measured" in text


@pytest.mark.parametrize("name", recipes.NAMES)
def test_the_commands_of_a_recipe_parse(name):
    import shlex

    for line in recipes.text_of(name).replace("\\\n", " ").splitlines():
        words = shlex.split(line) if line.startswith("    ") else []
        if "llama3v" in words:
            arguments = words[words.index("llama3v") + 1 :]
            assert cli.parse(arguments)[0] == arguments[0]


def test_an_unknown_recipe_is_refused_with_the_ones_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sft", "--recipe", "llama4", *OWN["sft"]])
    assert "llama3_8b_lora_24gb" in capsys.readouterr().err
