"""kill -9 and restart: clients get a clean end, and nothing stale or torn comes out of the cache on disk."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra llama3v[serve]")

from llama3v.engines.torch import TorchEngine
from llama3v.feature_cache.commit import CRASH_EXIT_CODE, CRASH_VARIABLE
from llama3v.server.vision_store import VisionStore, fingerprint_of
from tests.serving import image_part, png, running, text_part

KEY = "ab" * 32
TOKENS = np.arange(24, dtype=np.float32).reshape(6, 4)


def stored(root: Path, max_bytes: int = 10**6) -> VisionStore:
    return VisionStore(root, "f" * 32, max_bytes)


def filled(root: Path) -> Path:
    """The file of KEY."""
    store = stored(root)
    store.write(KEY, TOKENS)
    store.close()
    return root / ("f" * 32) / f"{KEY}.safetensors"


def test_what_was_kept_is_there_after_a_restart_bit_for_bit(tmp_path: Path) -> None:
    filled(tmp_path)
    assert np.array_equal(stored(tmp_path).read(KEY, 6), TOKENS)
    assert VisionStore(tmp_path, "0" * 32, 10**6).read(KEY, 6) is None  # of another tower


@pytest.mark.parametrize("step", ["created", "half-written", "written", "synced", "renamed", "directory-synced"])
def test_a_kill_while_it_is_written_leaves_all_of_it_or_nothing(tmp_path: Path, step: str) -> None:
    program = (
        "import numpy as np, pathlib, sys\n"
        "from llama3v.server.vision_store import VisionStore\n"
        "store = VisionStore(pathlib.Path(sys.argv[1]), 'f' * 32, 10**6)\n"
        f"store._write({KEY!r}, np.arange(24, dtype=np.float32).reshape(6, 4))\n"
    )
    environment = os.environ | {CRASH_VARIABLE: f"vision-{step}"}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False, timeout=120)
    assert done.returncode == CRASH_EXIT_CODE
    found = stored(tmp_path).read(KEY, 6)
    assert (found is not None) == (step in ("renamed", "directory-synced"))
    assert found is None or np.array_equal(found, TOKENS)
    assert not list(tmp_path.glob("*/*.tmp*"))  # the next start has cleaned up


def test_no_flipped_bit_and_no_torn_file_is_ever_served(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = stored(tmp_path).read(KEY, 6)
        assert found is None or np.array_equal(found, TOKENS)  # a bit of the header's padding changes nothing
        path.write_bytes(whole[:place])
        assert stored(tmp_path).read(KEY, 6) is None
        assert not path.exists()  # and it is gone


def test_a_file_under_another_pictures_name_is_not_served(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.rename(path.with_name("cd" * 32 + ".safetensors"))
    store = stored(tmp_path)
    assert store.read("cd" * 32, 6) is None
    filled(tmp_path)
    assert store.read(KEY, 5) is None  # a picture that is cut in another way


def test_what_was_used_the_longest_ago_makes_room(tmp_path: Path) -> None:
    store = stored(tmp_path, max_bytes=1000)
    for number in range(10):
        store._write(f"{number:064x}", TOKENS)
    kept = sorted(tmp_path.glob("*/*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in kept) <= 1000
    assert kept[-1].stem == f"{9:064x}"


def test_fingerprints_differ_with_the_tower_and_with_the_engine() -> None:
    found = {fingerprint_of(name, TOKENS + change) for name in ("torch", "mlx") for change in (0, 1e-6)}
    assert len(found) == 4


def test_a_restarted_server_answers_about_a_known_picture_without_its_tower(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [image_part(png(1, (84, 42))), text_part("What is it?")]
    answers = []
    for _ in range(2):
        engine = TorchEngine(tiny_model_dir, device="cpu")
        with running(engine, vision_cache_dir=tmp_path / "kept") as server:
            answer = server.chat(content, max_tokens=8).json()
            answers.append((answer["choices"][0]["message"]["content"], answer["timings"]["images_cached"]))
    assert [known for _, known in answers] == [0, 1]
    assert answers[0][0] == answers[1][0]
