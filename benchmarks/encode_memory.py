"""Peak memory of listing a data set and of a whole encode pass, each at two sizes: flat, or not. Part of encode.py."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import row

HAS_PEAK_MEMORY = Path("/proc/self/status").is_file()  # Linux

# A child's peak, in KiB. (ru_maxrss would start from what its parent had.)
_PEAK = """
from pathlib import Path
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
"""

_LISTING = """
import sys
from llama3v.data.sources import open_source
source = open_source(sys.argv[1])
rows = sum(1 for _ in source)
assert len(source.digest) == 32
print(rows, peak())
"""

_ENCODING = """
import sys
from pathlib import Path
import llama3v
config = llama3v.EncodeConfig(data=sys.argv[1], vision=sys.argv[2], cache=Path(sys.argv[3]), max_tiles=0, shard_mb=1)
print(llama3v.encode(config)["encoded"], peak())
"""


def peak_mib(code: str, *arguments: str) -> tuple[int, float]:
    """(count that the child printed, MiB at its peak)."""
    done = subprocess.run([sys.executable, "-c", _PEAK + code, *arguments], capture_output=True, text=True, check=True)
    count, peak = done.stdout.split()[-2:]
    return int(count), int(peak) / 2**10


def measure_listing(few: int, many: int) -> dict[str, Any]:
    """Peak memory of listing a LLaVA JSONL, at two sizes."""
    peaks = []
    with tempfile.TemporaryDirectory() as temporary:
        for rows in (few, many):
            path = Path(temporary) / f"{rows}.jsonl"
            with path.open("w") as file:
                for number in range(rows):
                    conversation = [
                        {"from": "human", "value": "<image>\nWhat is in this picture, and where was it taken?"},
                        {"from": "gpt", "value": f"Photograph number {number}, of a street at night in the rain."},
                    ]
                    entry = {
                        "id": f"{number:09}",
                        "image": f"{number % 1000:03}/{number:09}.jpg",
                        "conversations": conversation,
                    }
                    file.write(json.dumps(entry) + "\n")
            listed, peak = peak_mib(_LISTING, str(path))
            assert listed == rows
            peaks.append(peak)
    return row(f"listing {many:,} rows of LLaVA JSONL: peak memory beside {few:,} rows", peaks[1], peaks[0], limit=1024,
               unit="MiB", note="the limit is the aim: 1 GiB")  # fmt: skip


def measure_encoding(few: int, many: int) -> dict[str, Any]:
    """Peak memory of a whole pass with a tiny tower, at two sizes."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        image_size=42, patch_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    peaks = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        SiglipVisionModel(config).save_pretrained(root / "tower")
        for images in (few, many):
            folder = root / f"{images} images"
            folder.mkdir()
            for number in range(images):
                pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:06}.png", compress_level=1)
            encoded, peak = peak_mib(_ENCODING, str(folder), str(root / "tower"), str(root / f"cache {images}"))
            assert encoded == images
            peaks.append(peak)
    return row(f"encode pass over {many:,} images: peak memory beside {few:,} images", peaks[1], peaks[0], unit="MiB",
               note="torch itself is most of it")  # fmt: skip
