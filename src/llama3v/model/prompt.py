"""The one place where turns and images become token ids: training, evaluation and chat all call it.

A prompt is built out of segments that are tokenised one by one (as Meta's reference ``ChatFormat`` does), so
the places of visual tokens and of supervised text are known while writing, never found by re-tokenising.
The text of a turn is encoded with special tokens off: a literal ``<|eot_id|>`` in it stays plain text.

No torch and no transformers here.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer

from llama3v.errors import PromptError

if TYPE_CHECKING:
    from llama3v.model.slicing import Grid

Role = Literal["system", "user", "assistant"]

IGNORED = -100  # label of a token without loss: PyTorch's and Hugging Face's convention
IMAGE_TOKEN = "<image>"  # the name under which exports reserve image_token_id


@dataclass(frozen=True)
class Turn:
    """One message. ``images`` are indices into the sample's images; only a user turn owns images."""

    role: Role
    text: str
    images: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageSlot:
    """The token positions ``start .. start + length`` that hold one tile's visual tokens."""

    image: int
    tile: int
    """0 is the overview, then the slices row by row."""
    start: int
    length: int


@dataclass(frozen=True)
class Rendered:
    """A prompt as token ids, with its image slots and its supervised spans (half-open token ranges)."""

    ids: list[int]
    slots: list[ImageSlot]
    spans: list[tuple[int, int]]

    def labels(self) -> list[int]:
        """The id where a token has loss, else -100. Unshifted: the model shifts, as in Hugging Face."""
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


@dataclass(frozen=True)
class _Format:
    """How one family of models writes a turn: control tokens by name, and the text between them."""

    begin: str | None
    before_role: str
    after_role: tuple[str | None, str]  # a control token, if any, then text
    end_of_turn: str
    after_turn: str
    other_stops: tuple[str, ...]

    @property
    def control_names(self) -> tuple[str, ...]:
        names = (self.begin, self.before_role, self.after_role[0], self.end_of_turn)
        return tuple(name for name in names if name is not None)


_FORMATS = {
    # Meta, "Llama 3 | Model cards and prompt formats", and ChatFormat in meta-llama/llama3 llama/tokenizer.py
    "llama3": _Format(
        begin="<|begin_of_text|>",
        before_role="<|start_header_id|>",
        after_role=("<|end_header_id|>", "\n\n"),
        end_of_turn="<|eot_id|>",
        after_turn="",
        other_stops=("<|end_of_text|>", "<|eom_id|>"),
    ),
    # The chat template of SmolLM2-Instruct, less its default system turn
    "chatml": _Format(
        begin=None,
        before_role="<|im_start|>",
        after_role=(None, "\n"),
        end_of_turn="<|im_end|>",
        after_turn="\n",
        other_stops=("<|endoftext|>",),
    ),
}


def detect_format(tokenizer: Any) -> Literal["llama3", "chatml"]:
    """Read off the special tokens how a model's turns are written.

    A tokenizer with both sets (some fine-tunes of Llama 3 speak ChatML) is decided by its chat template.
    Raises PromptError when neither set is there, or when both are and no template decides.
    """
    backend = _backend_of(tokenizer)
    found = [
        name
        for name, form in _FORMATS.items()
        if all(backend.token_to_id(control) is not None for control in form.control_names)
    ]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    decided = found if len(found) == 1 else [name for name in found if _FORMATS[name].before_role in template]
    if len(decided) == 1:
        return "llama3" if decided[0] == "llama3" else "chatml"
    wanted = " or ".join(f"{name} ({' '.join(form.control_names)})" for name, form in _FORMATS.items())
    what = "could be either" if found else "has neither set of control tokens"
    raise PromptError(
        f"expected a tokenizer for {wanted}, but this one {what}; "
        "use an instruction-tuned model or give --prompt-format"
    )


class Renderer:
    """Turns and images -> token ids, image slots and supervised spans.

    Args:
        tokenizer: a Hugging Face fast tokenizer or a ``tokenizers.Tokenizer``; it is copied, never changed.
        format: "llama3" or "chatml" (see ``detect_format``).
        tokens_per_tile: visual tokens of one tile.
        image_token_id: the id that fills image slots; not an id of the tokenizer's text.
        own: nobody else encodes with the tokenizer, so it need not be copied, which takes as long as reading it.

    Raises PromptError where the tokenizer lacks a control token, or ``image_token_id`` is another token's.
    """

    def __init__(
        self, tokenizer: Any, format: str, tokens_per_tile: int, image_token_id: int, *, own: bool = False
    ) -> None:
        if format not in _FORMATS:
            raise PromptError(f"expected a prompt format out of {', '.join(_FORMATS)}, found {format!r}")
        if tokens_per_tile < 1:
            raise PromptError(f"expected 1 or more visual tokens per tile, found {tokens_per_tile}")
        backend = _backend_of(tokenizer)
        owner = backend.id_to_token(image_token_id)
        if owner not in (None, IMAGE_TOKEN):
            raise PromptError(
                f"expected image_token_id {image_token_id} to be free, found {owner!r} in the tokenizer; "
                "use an id past the LLM's vocabulary"
            )
        self.format = format
        self.tokens_per_tile = tokens_per_tile
        self.image_token_id = image_token_id
        self._form = _FORMATS[format]
        self._plain, controls = _plain(backend, own)
        self._forbidden = frozenset([*controls.values(), image_token_id])
        for name in self._form.control_names:
            if name not in controls:
                raise PromptError(
                    f"expected the control token {name} of the {format} format, found none in the tokenizer; "
                    "use an instruction-tuned model or another --prompt-format"
                )
        self._control = {name: controls[name] for name in self._form.control_names}
        self._fixed: dict[str, list[int]] = {}  # ids of the few strings that the format itself writes
        stops = (self._form.end_of_turn, *self._form.other_stops)
        self.stop_ids: tuple[int, ...] = tuple(controls[name] for name in stops if name in controls)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain.encode_special_tokens = True  # a pickled tokenizer forgets this switch

    def render(self, turns: Sequence[Turn], grids: Sequence["Grid"] = (), *, generate: bool = False) -> Rendered:
        """Render a conversation.

        Args:
            turns: the messages; images are numbered in order of appearance, each owned by one turn.
            grids: the slicing grid of every image.
            generate: end with the assistant's header, to be continued; the last turn must be the user's.

        Raises PromptError where turns and images do not fit together.
        """
        _check(turns, grids, generate)
        out = Rendered([], [], [])
        if self._form.begin is not None:
            out.ids.append(self._control[self._form.begin])
        for turn in turns:
            self._header(out, turn.role)
            for image in turn.images:
                self._visual_block(out, image, grids[image])
            start = len(out.ids)
            out.ids.extend(self._text(turn.text.strip()))
            out.ids.append(self._control[self._form.end_of_turn])
            if turn.role == "assistant":
                out.spans.append((start, len(out.ids)))
            out.ids.extend(self._piece(self._form.after_turn))
        if generate:
            self._header(out, "assistant")
        return out

    @property
    def begin_id(self) -> int | None:
        """The token with which every prompt begins, if this format has one."""
        return None if self._form.begin is None else self._control[self._form.begin]

    def name_of(self, control: int) -> str:
        """How the tokenizer writes a token, such as one of `stop_ids`."""
        return str(self._plain.id_to_token(control))

    def length(self, turns: Sequence[Turn], grids: Sequence["Grid"] = ()) -> int:
        """Tokens of the rendered conversation, visual tokens included."""
        return len(self.render(turns, grids).ids)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text alone, as a turn would hold it. PromptError where it is no Unicode."""
        return self._text(text)

    def _header(self, out: Rendered, role: Role) -> None:
        control, text = self._form.after_role
        out.ids.append(self._control[self._form.before_role])
        out.ids.extend(self._piece(role))
        if control is not None:
            out.ids.append(self._control[control])
        out.ids.extend(self._piece(text))

    def _visual_block(self, out: Rendered, image: int, grid: "Grid") -> None:
        """Rows of tiles, "," between columns, a line break after each row; the overview is its own row."""
        rows = [1] if grid.columns * grid.rows == 1 else [1] + [grid.columns] * grid.rows
        tile = 0
        for columns in rows:
            for column in range(columns):
                if column > 0:
                    out.ids.extend(self._piece(","))
                out.slots.append(ImageSlot(image, tile, len(out.ids), self.tokens_per_tile))
                out.ids.extend([self.image_token_id] * self.tokens_per_tile)
                tile += 1
            out.ids.extend(self._piece("\n"))

    def _piece(self, text: str) -> list[int]:
        if text not in self._fixed:
            self._fixed[text] = self._text(text)
        return self._fixed[text]

    def _text(self, text: str) -> list[int]:
        """Ids of plain text; whatever it spells, none of them is a control token or the image token."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"expected Unicode text, found a lone surrogate at character {error.start}; mend the text's encoding"
            ) from None
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if not self._forbidden.isdisjoint(ids):
            raise PromptError(
                "expected plain text, but this tokenizer reads a special token in it; "
                "use the model's original tokenizer.json"
            )
        return ids


def _backend_of(tokenizer: Any) -> Tokenizer:
    """The ``tokenizers.Tokenizer`` itself, out of a Hugging Face wrapper if need be."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise PromptError(
            f"expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}; convert it first"
        )
    return backend


def _plain(backend: Tokenizer, own: bool) -> tuple[Tokenizer, dict[str, int]]:
    """A tokenizer that reads no special token in text, and the ids of its control tokens by name.

    A private copy unless it is our own, because the switches (special parsing, truncation, padding) are state of the
    tokenizer: another user of a shared one could flip them between two calls.
    """
    added = backend.get_added_tokens_decoder()
    controls = {token.content: id for id, token in added.items() if token.special or _looks_like_control(token.content)}
    if not all(added[id].special for id in controls.values()):
        backend = _with_flags(backend)
    elif not own:
        backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "encode the names of special tokens as text"
    return backend, controls


def _looks_like_control(name: str) -> bool:
    """A token written ``<|...|>`` counts as control even where the file forgot to flag it special (converted ones do)."""
    return name == IMAGE_TOKEN or re.fullmatch(r"<\|.*\|>", name) is not None


def _with_flags(backend: Tokenizer) -> Tokenizer:
    """A copy in which all control tokens are flagged special: the switch covers flagged tokens only."""
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] or _looks_like_control(token["content"])
    return Tokenizer.from_str(json.dumps(content))


def _check(turns: Sequence[Turn], grids: Sequence["Grid"], generate: bool) -> None:
    if not turns:
        raise PromptError("expected at least one turn, found none")
    for number, turn in enumerate(turns, start=1):
        if turn.role not in ("system", "user", "assistant"):
            raise PromptError(f"turn {number}: expected the role system, user or assistant, found {turn.role!r}")
        if turn.images and turn.role != "user":
            raise PromptError(f"turn {number}: only a user turn can own images, found them in a {turn.role} turn")
    if generate and turns[-1].role != "user":
        raise PromptError(f"expected the user's turn before an answer, found the {turns[-1].role}'s")
    # in order of appearance, each once: so features stacked image by image are in the order of the slots
    owned = [image for turn in turns for image in turn.images]
    if owned != list(range(len(grids))):
        raise PromptError(
            f"expected the turns to own the images 0 .. {len(grids) - 1} in order, each once, found {owned}"
            if grids
            else f"expected no images, found the turns owning {owned}"
        )
