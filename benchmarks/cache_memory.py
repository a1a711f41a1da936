"""A process that reads a whole cache, shuffled, under a limit on its memory, and reports how its memory grew.

python -m benchmarks.cache_memory ROOT LIMIT_BYTES
"""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path


def measure(root: Path, limit: int) -> dict[str, int]:
    """{read, grown} in bytes. `limit` (0: none) is what the process may take beside its imports.

    Raises:
        CalledProcessError: it needed more.
    """
    command = [sys.executable, "-m", "benchmarks.cache_memory", str(root), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


def read_all(root: Path, limit: int) -> dict[str, int]:
    import torch  # noqa: F401 (before memory is counted)

    from llama3v.feature_cache.reader import CacheReader

    with CacheReader(root) as reader:
        records = list(reader.records())
        random.Random(0).shuffle(records)
        reader.read(records[0].key)
        if limit:
            allowed = _status("VmData") + limit
            resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
        first, highest, read = 0, 0, 0
        for number, record in enumerate(records):
            read += reader.read(record.key).nbytes
            if number <= len(records) // 10:
                first = max(first, _status("RssAnon"))
            highest = max(highest, _status("RssAnon"))
    return {"read": read, "grown": highest - first}


def _status(field: str) -> int:
    """Bytes, of this process, by the kernel's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) << 10


if __name__ == "__main__":
    print(json.dumps(read_all(Path(sys.argv[1]), int(sys.argv[2]))))
