"""The scripts in examples/ are sound shell, and every command of this package in them parses."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from llama3v import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
JOBS = sorted(EXAMPLES.glob("*.yaml"))


def commands(script: str) -> list[list[str]]:
    """Arguments of every llama3v command, alone or under torchrun; shell variables stand for themselves."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words = [] if line.lstrip().startswith("#") else shlex.split(line)
        if "llama3v" in words and any(verb in words for verb in cli.VERBS):
            arguments = words[words.index("llama3v") + 1 :]
            found.append([word for word in arguments if word not in ("$@", "&")])
    return found


def checked(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert commands(script)
    for arguments in commands(script):
        plain = [re.sub(r"\$\(\(.*\)\)/\$GPUS", "1/8", word).replace("$PRICE", "20") for word in arguments]
        verb, options = cli.parse(plain)
        if verb in ("pretrain", "sft"):
            assert options.rows_per_step % 8 == 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_shell_and_its_commands_parse(path: Path) -> None:
    checked(path.read_text())


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_jobs_commands_parse(path: Path) -> None:
    job = yaml.safe_load(path.read_text())
    assert job["resources"]["use_spot"] is True
    checked(job["run"])


def test_there_is_one_for_each_way_to_run() -> None:
    names = {path.name for path in [*SCRIPTS, *JOBS]}
    assert names == {"one_gpu.sh", "eight_gpus.sh", "two_nodes.sh", "spot.sky.yaml"}
