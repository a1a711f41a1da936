"""`llama3v serve` as LiteLLM and LangChain use it, unmodified.

Both pull other versions than this package's tests have. LLAMA3V_CLIENTS_PYTHON names the interpreter of an environment with
`pip install openai litellm langchain-openai`; without it the one that runs the tests is tried.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra llama3v[serve]")

from llama3v.engines.torch import TorchEngine
from tests.serving import png, running

SCRIPT = Path(__file__).parents[2] / "examples/serve/clients.py"
PYTHON = os.environ.get("LLAMA3V_CLIENTS_PYTHON", sys.executable)


@pytest.mark.slow  # importing LiteLLM or LangChain takes up to 20 seconds
@pytest.mark.parametrize(("client", "module"), [("litellm", "litellm"), ("langchain", "langchain_openai")])
def test_a_client_gets_answers_streams_pictures_and_errors(
    tiny_model_dir: Path, tmp_path: Path, client: str, module: str
) -> None:
    found = subprocess.run(
        [PYTHON, "-c", f"import sys, importlib.util; sys.exit(importlib.util.find_spec({module!r}) is None)"],
        check=False,
    )
    if found.returncode:
        pytest.skip(f"{module} is not installed; LLAMA3V_CLIENTS_PYTHON may name an environment that has it")
    picture = tmp_path / "photo.png"
    picture.write_bytes(png(1, (84, 42)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    engine = TorchEngine(tiny_model_dir, device="cpu", conversations=2)
    with running(engine) as server:
        command = [PYTHON, str(SCRIPT), str(picture), "--url", f"{server.address}/v1", "--client", client]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert server.idle()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all came as it should" in done.stdout
    assert "no such model" in done.stdout
