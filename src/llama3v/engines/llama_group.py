"""Many conversations in one llama.cpp context: read in the same passes, each to the very numbers that it gets alone.

The library's result for a token depends, in the last bits, on what else is in the pass, because other kernels run: a product
of a matrix with one vector is not computed like one with two, with four vectors like one with three (k-quants), nor attention
of one token of a conversation like that of two. Greedy answers would then change, now and then, with the neighbours. So

- a pass of single tokens has two at least; where there is only one, another conversation gets a token that is taken back;
- it has as many at most as give the numbers of two: that is tried when the group is made;
- more than one token of a conversation is a pass of its own, cut and continued at multiples of `BLOCK` (batched.py);
- the conversations of a pass are neighbours (2, 3, 4), else the library cuts it; gaps are filled as above;
- attention is not fused (llama_api.py), and a conversation's cache is its own (not "unified"), so places have an order.

For weights whose kernels do not differ (q8_0) a single token stays alone: that is tried, too.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from llama3v.engines.llama_api import SHARED_BATCH, Llama
from llama3v.errors import CheckpointError

PADDING = 0  # any token
BLOCK = 4  # vectors that ggml's products with repacked weights take at a time


class LlamaGroup:
    """See Group (batched.py).

    Args:
        llm: with as many sequences as there are conversations, two at least.

    Attributes:
        pads_single_tokens: whether a token that is alone in its pass gets a neighbour.
        most_singles: conversations in a pass of single tokens, at most.
    """

    block = BLOCK
    piece_tokens = SHARED_BATCH // BLOCK * BLOCK
    worth_copying = 32  # the library copies the whole cache, which takes about as long as a pass

    def __init__(self, llm: Llama, conversations: int) -> None:
        self._llm = llm
        self._lengths = [0] * conversations
        self.pads_single_tokens, self.most_singles = self._try_widths()

    def read_singles(self, members: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See Group."""
        given = dict(zip(members, tokens, strict=True))
        found = []
        for part in self._parts(members):
            together = self._with_padding(part)
            found.append(self._pass_of_singles(part, together, [given.get(member, PADDING) for member in together]))
        return np.concatenate(found)

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
            return self._pass_of_singles([member], together, rows)[0]
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
        return logits[[together.index(member) for member in members]]  # a copy: the next pass writes over them

    def forget(self, member: int, keep: int) -> None:
        """See Group."""
        self._lengths[member] = keep
        self._llm.forget(keep, sequence=member)

    def copy(self, source: int, target: int, keep: int) -> None:
        """See Group."""
        self._llm.forget(sequence=target)
        self._llm.copy(source, target)
        self.forget(target, keep)

    def _parts(self, members: Sequence[int]) -> list[list[int]]:
        """Conversations, in rising order, by the passes that they share."""
        parts: list[list[int]] = []
        for member in members:
            if parts and member - parts[-1][0] < self.most_singles:
                parts[-1].append(member)
            else:
                parts.append([member])
        return parts

    def _with_padding(self, members: Sequence[int]) -> list[int]:
        """The conversations of a pass: these, and those that fill it up."""
        first, last = min(members), max(members)
        if first == last and self.pads_single_tokens:
            return [first, first + 1] if first + 1 < len(self._lengths) else [first - 1, first]
        return list(range(first, last + 1))

    def _try_widths(self) -> tuple[bool, int]:
        """Whether a single token needs a neighbour, and how many can share a pass, for the same numbers as two."""
        everybody = range(len(self._lengths))
        for member in everybody:
            self.read_piece(member, [1, 2, 3])
        found = [self._tried(width) for width in range(1, len(everybody) + 1)]
        for member in everybody:
            self.forget(member, 0)
        of_two = found[1][:, :1]
        alone, *more = (bool((logits == of_two).all()) for logits in found)
        most = 1 + len(list(itertools.takewhile(bool, more)))
        return most > 1 and not alone, most

    def _tried(self, width: int) -> np.ndarray:
        """Logits [tokens, width, vocabulary] of the same few tokens in conversations that hold the same."""
        together = list(range(width))
        places = [self._lengths[member] for member in together]
        found = []
        for token in (4, 5):
            found.append(self._llm.decode([token] * width, places, together).copy())
            for member, place in zip(together, places, strict=True):
                self._llm.forget(place, sequence=member)
        return np.stack(found)
