"""Pieces of prompts that share the passes of a model (engines/batched.py), on a model that only writes down what it reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3v.engines.batched import BatchedCaches
from llama3v.engines.prefix import Prompt
from llama3v.engines.turns import FairLock
from llama3v.errors import CheckpointError
from llama3v.model.prompt import ImageSlot, Rendered

IMAGE = 99


class Recorder:
    """A Group whose logits say what it has read: the last token, and how many places stand before it."""

    piece_tokens = 8
    block = 2
    worth_copying = 4

    def __init__(self, conversations: int) -> None:
        self.held: list[list[Any]] = [[] for _ in range(conversations)]
        self.passes: list[list[tuple[int, int]]] = []
        self.fails: set[int] = set()

    def read_singles(self, members: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        self.passes.append([(member, 1) for member in members])
        if self.fails & set(members):
            raise CheckpointError("broken")
        return np.stack([self._read(member, [token]) for member, token in zip(members, tokens, strict=True)])

    def read_piece(self, member: int, new: Any) -> np.ndarray:
        self.passes.append([(member, len(new))])
        if member in self.fails:
            raise CheckpointError("broken")
        return self._read(member, [float(row[0]) for row in new] if isinstance(new, np.ndarray) else list(new))

    def _read(self, member: int, new: list[Any]) -> np.ndarray:
        self.held[member] += new
        return np.array([self.held[member][-1], len(self.held[member])], np.float32)

    def forget(self, member: int, keep: int) -> None:
        del self.held[member][keep:]

    def copy(self, source: int, target: int, keep: int) -> None:
        self.held[target] = self.held[source][:keep]


class _Seen:
    def __init__(self, key: str, rows: int) -> None:
        self.key, self._rows = key, rows

    def visual_tokens(self) -> np.ndarray:
        return np.arange(self._rows, dtype=np.float32)[:, None] + 0.5


def prompt(*runs: int | list[int], key: str = "a") -> Prompt:
    """A prompt of texts (ids) and of tiles (numbers of visual tokens) of one image."""
    ids: list[int] = []
    slots = []
    length = next((run for run in runs if isinstance(run, int)), 0)
    for run in runs:
        if isinstance(run, int):
            slots.append(ImageSlot(0, len(slots), len(ids), run))
            ids += [IMAGE] * run
        else:
            ids += run
    return Prompt(Rendered(ids, slots, []), [_Seen(key, length * len(slots))] if slots else [])  # type: ignore[list-item]


def read_all(caches: BatchedCaches, asked: list[tuple[object, Prompt]]) -> dict[int, Any]:
    """Steps until every prompt is read: what was found for each."""
    found: dict[int, Any] = {}
    while len(found) < len(asked):
        waiting = [number for number in range(len(asked)) if number not in found]
        for number, logits in zip(waiting, caches.read_together([asked[n] for n in waiting]), strict=True):
            if logits is not None:
                found[number] = logits.copy() if isinstance(logits, np.ndarray) else logits
    return found


texts = st.lists(st.integers(0, 9), min_size=1, max_size=14)
shapes = st.tuples(texts, st.integers(1, 13), texts, st.integers(0, 3))


@given(st.lists(shapes, min_size=1, max_size=3))
def test_no_piece_is_longer_than_allowed_or_leaves_one_token_of_a_run(asked: list[Any]) -> None:
    group = Recorder(3)
    caches = BatchedCaches(group, 3)
    prompts = [
        prompt(first, *[part for _ in range(tiles) for part in (rows, [7])], last, key=str(number))
        for number, (first, rows, last, tiles) in enumerate(asked)
    ]
    found = read_all(caches, [(object(), each) for each in prompts])
    for number, each in enumerate(prompts):
        assert found[number].tolist() == [each.ids[-1], len(each.ids)]
        place, left_over = 0, False
        for length in [length for taken in group.passes for member, length in taken if member == number]:
            kinds = [isinstance(cell, tuple) for cell in each.cells]
            assert len(set(kinds[place : place + length])) == 1
            assert length <= Recorder.piece_tokens
            alone = (place == 0 or kinds[place - 1] != kinds[place]) and (
                place + 1 == len(kinds) or kinds[place + 1] != kinds[place]
            )
            assert length > 1 or alone
            same_run = place > 0 and kinds[place - 1] == kinds[place]
            assert not (same_run and left_over)  # only whole blocks stand before the last piece of a run
            left_over = length % Recorder.block != 0
            place += length
        assert place == len(each.ids)


def test_single_tokens_of_all_conversations_are_one_pass_after_the_pieces() -> None:
    group = Recorder(3)
    caches = BatchedCaches(group, 3)
    talks = [(object(), prompt([1, 2, number])) for number in range(2)]
    read_all(caches, talks)
    for _, each in talks:
        each.push(5)
    del group.passes[:]
    found = caches.read_together([*reversed(talks), (object(), prompt([7, 2, 3, 4]))])
    assert group.passes == [[(2, 4)], [(0, 1), (1, 1)]]
    assert [row.tolist() for row in found if isinstance(row, np.ndarray)] == [[5, 4], [5, 4], [4, 4]]


def test_an_image_that_a_neighbour_has_read_is_copied_and_not_read() -> None:
    group = Recorder(2)
    caches = BatchedCaches(group, 2)
    first, second = prompt([1, 2], 6, [3, 4]), prompt([1, 2], 6, [8, 9])
    read_all(caches, [(object(), first)])
    del group.passes[:]
    owner = object()
    assert caches.begin(owner, second) == 8
    found = read_all(caches, [(owner, second)])
    assert group.passes == [[(1, 2)]]
    assert found[0].tolist() == [9, 10]
    assert group.held[1] == [*group.held[0][:8], 8, 9]


def test_a_prompt_that_is_known_is_read_again_from_its_last_two_tokens() -> None:
    """One alone would be another kernel's work than the run that it ends."""
    group = Recorder(2)
    caches = BatchedCaches(group, 2)
    one, two = object(), object()
    read_all(caches, [(one, prompt([1, 2, 3, 4]))])
    caches.end(one)
    assert caches.begin(two, prompt([1, 2, 3, 4])) == 2


def readings(group: Recorder, member: int, length: int) -> list[str]:
    """Of each place of a conversation, how it was read last: alone, in a whole block, or left over after the blocks."""
    found: list[str] = []
    for taken in group.passes:
        for who, count in taken:
            if who == member:
                whole = count // Recorder.block * Recorder.block
                found += ["alone"] if count == 1 else ["block"] * whole + ["left over"] * (count - whole)
    return found[-length:]


runs = st.lists(
    st.one_of(st.integers(1, 7), st.lists(st.integers(0, 1), min_size=1, max_size=11)), min_size=1, max_size=5
)


@given(runs, runs)
def test_what_a_cache_has_is_used_only_where_the_prompt_alone_is_read_by_the_same_kernels(
    first: Any, second: Any
) -> None:
    """One picture and then text, two pictures: what stands between them is read alone there, and with the text here."""
    cold, warm = Recorder(1), Recorder(1)
    read_all(BatchedCaches(cold, 1), [(object(), mixed(second))])
    caches, owner = BatchedCaches(warm, 1), object()
    read_all(caches, [(owner, mixed(first))])
    caches.end(owner)
    before = readings(warm, 0, len(warm.held[0]))
    del warm.passes[:]
    asker = object()
    kept = caches.begin(asker, mixed(second))
    read_all(caches, [(asker, mixed(second))])
    length = len(mixed(second).cells)
    assert before[:kept] + readings(warm, 0, length - kept) == readings(cold, 0, length)
    assert warm.held == cold.held


def mixed(runs: list[int | list[int]]) -> Prompt:
    """Runs that follow one another as they come, texts joined with texts and visual tokens with visual tokens."""
    return prompt_of_tiles([run if isinstance(run, list) else [IMAGE] * run for run in runs])


def prompt_of_tiles(parts: list[list[int]]) -> Prompt:
    ids = [token for part in parts for token in part]
    places = [place for place, token in enumerate(ids) if token == IMAGE]
    slots = [ImageSlot(0, number, place, 1) for number, place in enumerate(places)]
    return Prompt(Rendered(ids, slots, []), [_Seen("a", len(slots))] if slots else [])  # type: ignore[list-item]


def test_more_conversations_than_caches_wait_for_one_and_are_not_mixed_up() -> None:
    group = Recorder(2)
    caches = BatchedCaches(group, 2)
    talks = [(object(), prompt([1, 2, 3, number])) for number in range(5)]
    found = caches.read_together(talks)
    assert [None if row is None else row.tolist() for row in found] == [[0, 4], [1, 4], None, None, None]
    for owner, each in talks[:2]:
        each.push(7)
        assert caches.begin(owner, each) == 4
    assert [row is None for row in caches.read_together(talks[::-1])] == [True, True, True, False, False]
    for owner, _ in talks[:2]:
        caches.end(owner)
    assert [row.tolist() for row in caches.read_together(talks[2:]) if isinstance(row, np.ndarray)] == [[2, 4], [3, 4]]


def test_the_failure_of_one_is_its_own() -> None:
    group = Recorder(3)
    caches = BatchedCaches(group, 3)
    talks = [(object(), prompt([1, 2, number])) for number in range(3)]
    read_all(caches, talks)
    for _, each in talks:
        each.push(6)
    group.fails = {1}
    found = caches.read_together(talks)
    assert isinstance(found[1], CheckpointError)
    assert [found[0].tolist(), found[2].tolist()] == [[6, 4], [6, 4]]  # type: ignore[union-attr]
    assert [len(held) for held in group.held] == [4, 0, 4]
    assert isinstance(caches.read_together([talks[1]])[0], CheckpointError)


def test_an_interrupt_leaves_no_half_read_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Recorder(2)
    caches = BatchedCaches(group, 2)
    talk = (object(), prompt([1, 2, 3]))

    def interrupted(member: int, new: Any) -> np.ndarray:
        group.held[member] += [0]
        raise KeyboardInterrupt

    monkeypatch.setattr(group, "read_piece", interrupted)
    with pytest.raises(KeyboardInterrupt):
        caches.read_together([talk])
    monkeypatch.undo()
    assert group.held == [[], []]
    assert read_all(caches, [talk])[0].tolist() == [3, 3]
    assert isinstance(caches.lock, FairLock)
