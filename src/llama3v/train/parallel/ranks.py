"""The processes of one run (*ranks*): who they are, and what they tell one another.

There are two ways to wait for others, and both end in bounded time where one of them is dead or hangs:

- `any`, `sum`, `add`, `gather`: all ranks call them in step, and who does not answer within the time limit is lost;
- `on_main`: the first rank works (prepares data, writes a file) for as long as that takes, and the others wait while
  its heart beats.
"""

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llama3v.errors import ConfigError, Llama3VError, RankError

T = TypeVar("T")

BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.02
LAST_WORD_SECONDS = 3.0
"""How long ranks that lost one another wait for each other's last word, to tell who is missing."""

LEAVE_SECONDS = 30.0
"""How long rank 0 waits at the end of a run for the others, at most; on a busy machine one may be seconds behind."""


@dataclass
class Ranks:
    """This process among the others. With `count` 1 every method returns what it was given, at once.

    Attributes:
        number: from 0; rank 0 (*main*) writes metrics, summary and model.
        local: number on this machine, which is also the number of its GPU.
        patience: seconds without an answer, or a heartbeat, after which another rank is lost.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    patience: float = 600.0
    name: str = "loop"
    group: Any = None
    store: Any = None
    _turns: int = field(default=0, repr=False)

    @property
    def is_main(self) -> bool:
        return self.number == 0

    @property
    def alone(self) -> bool:
        return self.count == 1

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere."""
        return bool(self.sum([int(flag)])[0])

    def sum(self, values: Sequence[int]) -> list[int]:
        """Sums over the ranks, value by value."""
        if self.alone:
            return list(values)
        return self.add(torch.tensor(values, dtype=torch.int64)).tolist()

    def summed(self, numbers: dict[str, float]) -> dict[str, float]:
        """Sums over the ranks, name by name."""
        if self.alone:
            return numbers
        totals = self.add(torch.tensor(list(numbers.values()), dtype=torch.float64)).tolist()
        return dict(zip(numbers, totals, strict=True))

    def of_main(self, number: float) -> float:
        """Rank 0's number, for what every rank measured for itself and all must agree on."""
        return self.summed({"number": number if self.is_main else 0.0})["number"]

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; every rank has the same bits then."""
        if not self.alone:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of the ranks."""
        values: list[Any] = [value] * self.count
        if not self.alone:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, everywhere; the others wait, as long as rank 0 is alive.

        What `work` raises is raised on rank 0, and a RankError on the others.
        """
        if self.alone:
            return work()
        self._turns += 1
        done, beat = (f"{self.name}/{self._turns}/{what}" for what in ("done", "beat"))
        if not self.is_main:
            return self._wait_for_main(done, beat)
        try:
            with _beating(self.store, beat):
                result = work()
        except BaseException:
            self.store.set(done, pickle.dumps((False, None)))
            raise
        self.store.set(done, pickle.dumps((True, result)))
        return result

    def beside(self, name: str) -> "Ranks":
        """The same ranks for use in another thread, in step with nothing but themselves."""
        if self.alone:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.patience))
        return Ranks(self.number, self.count, self.local, self.patience, name, group, self.store)

    def leave(self) -> None:
        """After the run's last collective. Rank 0 goes last: without torchrun the store lies in it."""
        if self.alone:
            return
        left, deadline = self.store.add("left", 1), time.monotonic() + min(self.patience, LEAVE_SECONDS)
        while self.is_main and left < self.count and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            left = self.store.add("left", 0)
        dist.destroy_process_group()

    def _wait_for_main(self, done: str, beat: str) -> Any:
        heard, since = -1, time.monotonic()
        while not self.store.check([done]):
            beats = self.store.add(beat, 0)
            if beats != heard:
                heard, since = beats, time.monotonic()
            elif time.monotonic() - since > self.patience:
                raise RankError(f"process 0 of {self.count} is dead or hangs: {self._no_answer}")
            time.sleep(LOOK_SECONDS)
        whole, result = pickle.loads(self.store.get(done))
        if not whole:
            raise RankError("process 0 could not go on; its message says why")
        return result

    @property
    def _no_answer(self) -> str:
        return f"no answer within {self.patience:g} s. {RESUME}"


RESUME = "The same command resumes from the newest checkpoint; `torchrun --max-restarts 3` runs it by itself"


def join(patience: float) -> Ranks:
    """Find the other processes of this run, if torchrun started any.

    Args:
        patience: see `Ranks`.

    Raises:
        ConfigError: half of what torchrun sets is in the environment. RankError: the others do not come.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set; start several processes with "
            "`torchrun --nproc-per-node N -m llama3v ...`, or unset WORLD_SIZE for one"
        )
    local, limit = int(os.environ["LOCAL_RANK"]), timedelta(seconds=patience)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    try:
        # torchrun's store, which outlives a rank
        store, number, count = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=number, world_size=count, timeout=limit)
    except RuntimeError as error:
        raise RankError(f"the {count} processes of this run did not find one another: {_first_line(error)}") from error
    return Ranks(number, count, local, patience, store=dist.PrefixStore("llama3v", store))


@contextmanager
def joined(patience: float) -> Iterator[Ranks]:
    """`join`, and leave in good order. The loss of another rank, wherever it shows, becomes a RankError that says which;
    and when this one leaves with an error of its own, it tells the others."""
    ranks = join(patience)
    try:
        yield ranks
    except Llama3VError as error:
        _leave_word(ranks, "" if isinstance(error, RankError) else str(error))
        raise
    except RuntimeError as error:
        if ranks.alone or not means_lost(error):
            raise
        raise lost(ranks, error) from error
    except SystemExit:  # after a checkpoint that all of them agreed on
        ranks.leave()
        raise
    ranks.leave()


def means_lost(error: RuntimeError) -> bool:
    """Whether a collective failed, and not the computation."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def lost(ranks: Ranks, error: RuntimeError) -> RankError:
    """What is known of who is missing."""
    _leave_word(ranks, "")
    words = _last_words(ranks)
    if words is None:
        return RankError(f"process 0 of {ranks.count} is dead or hangs ({_first_line(error)}). {RESUME}")
    reasons = [f"process {number} of {ranks.count} stopped: {word}" for number, word in words.items() if word]
    silent = [str(number) for number in range(ranks.count) if number not in words]
    if silent:
        which = f"process {silent[0]}" if len(silent) == 1 else f"processes {', '.join(silent)}"
        verb = "is dead or hangs" if len(silent) == 1 else "are dead or hang"
        reasons.append(
            f"{which} of {ranks.count} {verb}: no answer within {ranks.patience:g} s, or its connection broke"
        )
    return RankError(f"{'; '.join(reasons) or _first_line(error)}. {RESUME}")


def _leave_word(ranks: Ranks, word: str) -> None:
    if ranks.alone:
        return
    try:
        ranks.store.set(f"word/{ranks.number}", word)
    except RuntimeError:  # nobody is left to keep it
        return


def _last_words(ranks: Ranks) -> dict[int, str] | None:
    """Rank -> what it left, where it left something in time; None where the store is gone."""
    deadline, words = time.monotonic() + LAST_WORD_SECONDS, {ranks.number: ""}
    try:
        while len(words) < ranks.count and time.monotonic() < deadline:
            for number in range(ranks.count):
                if number not in words and ranks.store.check([f"word/{number}"]):
                    words[number] = ranks.store.get(f"word/{number}").decode()
            time.sleep(LOOK_SECONDS)
    except RuntimeError:
        return None
    return words


@contextmanager
def _beating(store: Any, key: str) -> Iterator[None]:
    """Count up `key` in a thread, so that others see that this process lives."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            store.add(key, 1)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _first_line(error: BaseException) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return first.partition(". This is typically")[0]  # gloo's guess at the reason: we say what is known
