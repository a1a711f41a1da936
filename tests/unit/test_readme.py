"""What README and the documents name exists: commands, their options, files, Python names, and the test command."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import llama3v
from llama3v import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FIRST_COMMAND = "pip install -c constraints.txt . && llama3v quickstart"
TEST_COMMAND = "pip install -c constraints.txt -e '.[dev]' && pytest"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(document, command) of every llama3v command line in a bash block, continuation lines joined."""
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                found += [
                    (document.name, part.strip()) for part in line.split("&&") if part.strip().startswith("llama3v ")
                ]
    return found


def links() -> list[tuple[Path, str]]:
    return [
        (document, target)
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text())
        if "://" not in target
    ]


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_and_the_test_command_stand_in_readme_in_this_order() -> None:
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert FIRST_COMMAND in lines
    assert TEST_COMMAND in lines
    assert lines.index(FIRST_COMMAND) < lines.index(TEST_COMMAND)


def test_ci_runs_readmes_test_command() -> None:
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize(("document", "command"), commands())
def test_a_command_in_the_documents_parses(document: str, command: str) -> None:
    verb, _ = cli.parse(shlex.split(command)[1:])
    assert verb in cli.VERBS


def test_readme_names_every_verb() -> None:
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(table))) == set(cli.VERBS)


def test_options_named_in_the_documents_exist() -> None:
    known = {
        f"--{name.replace('_', '-')}"
        for options in cli.VERBS.values()
        for name in vars(options)["__dataclass_fields__"]
    }
    known |= {"--help", "--version", "--no-check", "--no-controls"}
    foreign = {"--check", "--config", "--json", "--mmproj", "--parts", "--shape"}  # of others' programs and benchmarks
    foreign |= {"--image", "--limit-mm-per-prompt"}  # of mlx-vlm and vLLM
    foreign |= {"--nproc-per-node", "--max-restarts", "--logdir"}  # of torchrun and tensorboard
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text()))
        assert named <= known | foreign, f"{document.name} names options that do not exist: {named - known - foreign}"


@pytest.mark.parametrize(("document", "target"), links())
def test_a_link_in_the_documents_leads_somewhere(document: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = document.parent / path if path else document
    assert file.exists(), f"{document.name} links to {target}, which does not exist"
    assert not anchor or anchor in anchors(file), f"{document.name} links to {target}: no such heading"


def test_python_in_the_documents_imports() -> None:
    """Syntax, imported names, and attributes of `llama3v`; the code itself needs models."""
    for document in DOCUMENTS:
        for block in blocks(document, "python"):
            compile(block, document.name, "exec")
            for module, names in re.findall(r"^from (llama3v[\w.]*) import (.+)$", block, flags=re.MULTILINE):
                for name in names.split(", "):
                    assert hasattr(importlib.import_module(module), name), f"{document.name}: {module}.{name}"
            assert set(re.findall(r"\bllama3v\.(\w+)\(", block)) <= set(llama3v.__all__)


def test_readme_says_that_this_is_an_independent_implementation() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "independent implementation" in text
    assert "uses none of that project's code or weights" in text


def test_the_quickstarts_figures_in_the_readme_are_those_of_the_results_files() -> None:
    idle, mean = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("quickstart-idle", "quickstart")
    )
    mean = mean["mean"]
    text = " ".join((ROOT / "README.md").read_text().split())
    shares = [f"{mean[name]:.0%}" for name in ("accuracy_right_image", "accuracy_wrong_image", "accuracy_blind")]
    assert f"[{idle['seconds'] / 60:.1f} minutes](benchmarks/results/quickstart-idle.json)" in text
    assert f"{mean['seconds'] / 60:.1f} beside other work; {shares[0]} of the held-out questions" in text
    assert f"with the right picture, {shares[1]} with a wrong one, {shares[2]} blind" in text
