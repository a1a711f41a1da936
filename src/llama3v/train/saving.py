"""Checkpoints beside the training: the tensors are copied at once, and written, digested and flushed in a thread."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from llama3v.train.checkpoint import Checkpoints
from llama3v.train.parallel.ranks import Ranks
from llama3v.train.saved_tensors import is_sharded, snapshot


class Saver:
    """One save at a time; training goes on while it is written, and is told of its failure at the next call.

    With several ranks, each writes its part where the tensors are sharded; otherwise rank 0 writes all, and `save` does
    nothing on the others.
    """

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks) -> None:
        self._checkpoints, self._ranks = checkpoints, ranks
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[Any]] | None = None
        self.committed: int | None = None
        """Steps of the newest checkpoint that this has seen whole on the disk."""

    def save(
        self, step: int, state: Mapping[str, Any], weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        """Begin to write a checkpoint, after the one before it is written. Raises what `Checkpoints.save` does."""
        self._finish()
        if not self._ranks.is_main and not any(is_sharded(tensor) for tensor in weights.values()):
            return
        copies = snapshot(weights), snapshot(optimizer)
        self._writing = step, self._pool.submit(self._checkpoints.save, step, dict(state), *copies)

    def look(self) -> None:
        """Take note of a save that has ended. Raises what `Checkpoints.save` does."""
        if self._writing is not None and self._writing[1].done():
            self._finish()

    def wait(self) -> None:
        """Until nothing is being written any more, on any rank."""
        self._ranks.on_main(self._finish)
        self._finish()

    def close(self) -> None:
        """Let go of the thread, after whatever it is writing."""
        self._pool.shutdown()

    def _finish(self) -> None:
        if self._writing is None:
            return
        step, future = self._writing
        self._writing = None
        future.result()
        self.committed = step
