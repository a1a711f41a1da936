"""schemathesis over the gateway's OpenAPI document: whatever it makes up, no 5xx and no answer that the document does not have.

    pip install schemathesis
    python scripts/fuzz_api.py                 (a few minutes; other arguments go on to schemathesis)

Serves a tiny model of random weights on a free port of this machine meanwhile.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> int:
    """Serve, run, and give back schemathesis' exit code."""
    program = shutil.which("schemathesis")
    if program is None:
        print("schemathesis is not installed: pip install schemathesis", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from llama3v.engines.torch import TorchEngine
    from llama3v.model.llama3v import build_model, save_model
    from tests.serving import running

    assets = ROOT / "src/llama3v/assets"
    with tempfile.TemporaryDirectory() as folder:
        built = build_model(str(assets / "siglip-scenes"), str(assets / "llama-scenes"), scale_factor=3, max_tiles=4)
        save_model(*built, Path(folder))
        engine = TorchEngine(folder, device="cpu", conversations=2)
        with running(engine, max_new_tokens=4) as server:
            command = [program, "run", f"{server.address}/openapi.json", "--checks", CHECKS, *sys.argv[1:]]
            done = subprocess.run(command, check=False).returncode
            print(f"nothing is left over: {server.idle()}")
            return done or int(not server.idle())


if __name__ == "__main__":
    sys.exit(main())
