"""Many conversations in one llama.cpp context: read in the same passes, each to the very numbers that it gets alone.

The library's result for a token depends, in the last bits, on what else is in the pass, because other kernels run: a product
of a matrix with one vector is not computed like one with two, nor attention of one token of a conversation like that of two.
Greedy answers would then change, now and then, with the neighbours. So

- a pass of single tokens has two at least; where there is only one, another conversation gets a token that is taken back;
- more than one token of a conversation is a pass of its own;
- the conversations of a pass are neighbours (2, 3, 4), else the library cuts it; gaps are filled as above;
- attention is not fused (llama_api.py), and a conversation's cache is its own (not "unified"), so places have an order.

For weights whose kernels do not differ (q8_0) a single token stays alone: that is tried when the group is made.
"""

from collections.abc import Sequence

import numpy as np

from llama3v.engines.llama_api import SHARED_BATCH, Llama
from llama3v.errors import CheckpointError

PADDING = 0  # any token


class LlamaGroup:
    """See Group (batched.py).

    Args:
        llm: with as many sequences as there are conversations, two at least.
    """

    piece_tokens = SHARED_BATCH
    worth_copying = 32  # the library copies the whole cache, which takes about as long as a pass

    def __init__(self, llm: Llama, conversations: int) -> None:
        self._llm = llm
        self._lengths = [0] * conversations
        self.pads_single_tokens = True
        self.pads_single_tokens = not self._one_is_read_like_two()

    def read_singles(self, members: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See Group."""
        given = dict(zip(members, tokens, strict=True))
        together = self._with_padding(members)
        return self._pass_of_singles(members, together, [given.get(member, PADDING) for member in together])

    def read_piece(self, member: int, new: Sequence[int] | np.ndarray) -> np.ndarray:
        """See Group."""
        if isinstance(new, np.ndarray) and not np.isfinite(new).all():
            raise CheckpointError(  # and it would harm others: in attention, what is masked is multiplied by zero
                "expected numbers from the vision tower, found NaN or infinity; its weights are damaged, use another "
                "checkpoint"
            )
        if len(new) == 1:
            together = self._with_padding([member])
            rows = np.zeros((len(together), self._llm.hidden), np.float32)
            rows[together.index(member)] = new[0]
            return self._pass_of_singles([member], together, rows)[0].copy()
        places = np.arange(self._lengths[member], self._lengths[member] + len(new), dtype=np.int32)
        logits = self._llm.decode(new, places, member, places == places[-1])[0].copy()
        self._lengths[member] += len(new)
        return logits

    def _pass_of_singles(
        self, members: Sequence[int], together: list[int], new: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        places = [self._lengths[member] for member in together]
        # logits of the padding, too: the last layer and the head take only tokens whose logits are wanted
        try:
            logits = self._llm.decode(new, places, together)
        except BaseException:  # nobody knows how far it came
            for member in together:
                self.forget(member, self._lengths[member])
            raise
        for member in together:
            if member in members:
                self._lengths[member] += 1
            else:
                self._llm.forget(self._lengths[member], sequence=member)
        return logits if len(members) == len(together) else logits[[together.index(member) for member in members]]

    def forget(self, member: int, keep: int) -> None:
        """See Group."""
        self._lengths[member] = keep
        self._llm.forget(keep, sequence=member)

    def copy(self, source: int, target: int, keep: int) -> None:
        """See Group."""
        self._llm.forget(sequence=target)
        self._llm.copy(source, target)
        self.forget(target, keep)

    def _with_padding(self, members: Sequence[int]) -> list[int]:
        """The conversations of a pass: these, and those that fill it up."""
        first, last = min(members), max(members)
        if first == last and self.pads_single_tokens:
            return [first, first + 1] if first + 1 < len(self._lengths) else [first - 1, first]
        return list(range(first, last + 1))

    def _one_is_read_like_two(self) -> bool:
        """Whether this model's kernels give a single token the same logits as two in one pass."""
        found = []
        for padded in (True, False):
            self.pads_single_tokens = padded
            self.read_piece(0, [1, 2, 3])
            found.append(np.concatenate([self.read_singles([0], [token]).copy() for token in (4, 5, 6)]))
            self.forget(0, 0)
        return bool(np.array_equal(found[0], found[1]))
