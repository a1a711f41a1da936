"""A process that reads a whole cache, shuffled, under a limit on its memory, and reports how its memory grew.

python -m benchmarks.cache_memory ROOT LIMIT_BYTES ROUNDS
"""

import json
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama3v.feature_cache.reader import CacheReader

TOGETHER = 3
"""Records that are read by one `read_many`."""


def measure(root: Path, limit: int, rounds: int = 3) -> dict[str, int]:
    """{read, grown} in bytes. `limit` (0: none) is what the process may take beside its imports.

    Raises:
        CalledProcessError: it needed more.
    """
    command = [sys.executable, "-m", "benchmarks.cache_memory", str(root), str(limit), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


def read_all(root: Path, limit: int, rounds: int) -> dict[str, int]:
    import torch  # noqa: F401 (before memory is counted)

    from llama3v.feature_cache.reader import CacheReader

    with CacheReader(root) as reader:
        keys = list(reader.keys())
        if limit:
            allowed = _status("VmData") + limit
            resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
        total = rounds * sum(record.bytes for record in reader.records())
        first, highest, read = 0, 0, 0
        for count in _sizes(reader, keys, rounds):
            read += count
            if read <= total // 10:
                first = max(first, _status("RssAnon"))
            highest = max(highest, _status("RssAnon"))
    return {"read": read, "grown": highest - first}


def _sizes(reader: "CacheReader", keys: list[str], rounds: int) -> Iterator[int]:
    """Bytes of what is read, in all ways there are, in turn for a few records: by one, ahead by threads, several at once."""
    chance = random.Random(0)
    for _ in range(rounds):
        chance.shuffle(keys)
        for start in range(0, len(keys), 3 * TOGETHER):
            one, each, many = (keys[start + place * TOGETHER :][:TOGETHER] for place in range(3))
            yield from (reader.read(key).nbytes for key in one)
            yield from (features.nbytes for features in reader.read_each(each))
            if many:
                yield reader.read_many(many).nbytes


def _status(field: str) -> int:
    """Bytes, of this process, by the kernel's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) << 10


if __name__ == "__main__":
    print(json.dumps(read_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
