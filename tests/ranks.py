"""Runs of several ranks in child processes, as torchrun starts them: gloo on one machine."""

import socket
from typing import Any

from training import start


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of `count` processes on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start_ranks(verb: str, options: Any, count: int = 2, environment: dict[str, str] | None = None) -> list[Any]:
    """A process for each rank; with a count of 1, one that knows nothing of others. All print to one log."""
    if count == 1:
        return [start(verb, options, environment)]
    return [start(verb, options, {**own, **(environment or {})}) for own in environments(count)]


def join(processes: list[Any], seconds: float = 120) -> list[int]:
    """Exit codes; what does not end in time is killed, and fails the test by its code."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
