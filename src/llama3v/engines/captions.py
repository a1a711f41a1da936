"""`llama3v caption`: one image, or all images of folders, resumable."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama3v import __version__
from llama3v.config import CaptionConfig, Detail
from llama3v.data.ledger import Ledger
from llama3v.data.sources.folder import IMAGE_SUFFIXES
from llama3v.engines.base import BatchEngine, Room
from llama3v.engines.caption_files import (
    CaptionFile,
    images_of,
    read_sidecar,
    refuse_shared_sidecars,
    write_csv,
    write_sidecar,
)
from llama3v.engines.terminal import (
    STDIN,
    at_detail,
    decode_named,
    messages,
    open_engine,
    printable,
    read_image,
    write,
    write_summary,
)
from llama3v.errors import DataError, ImageError
from llama3v.model.prompt import Turn
from llama3v.model.tiles import image_key, read_image_file

TOGETHER: dict[Detail, int] = {"low": 32, "high": 8}
"""Images that are captioned together: of one tile each, or of several. An interruption loses no more than these."""
PATIENCE = 60.0  # seconds; where a batch takes longer, the next is smaller


def caption(config: CaptionConfig, engine: BatchEngine | None = None) -> dict[str, Any]:
    """Caption an image, several, or every image under folders; captions go to stdout.

    One image: its caption. More: one line each, "name<TAB>caption"; with `config.json` one object at the end, which is
    the summary with "captions". With `config.out`, captions.jsonl there gets {"file_name",
    "text", "key", "prompt", "detail", "model"} per image as soon as it is known, and what it already holds for an
    image, prompt and detail is kept. A bad image goes to ledger.jsonl there, and to stderr; alone, it is an error.

    Args:
        engine: runs the model; default: that of `config.model`, loaded when the first image needs it.

    Returns the summary, which is also `config.out`/summary.json ("kept" counts images that needed no new caption: they
    had one, or equal another image). Raises ImageError for a single bad image, DataError
    where there is no image to caption, ConfigError where captions.jsonl is of another model.
    """
    files = list(images_of(config.inputs))
    if not files:
        raise DataError(f"{', '.join(config.inputs)}: expected images ({' '.join(IMAGE_SUFFIXES)}), found none")
    if config.sidecar:
        refuse_shared_sidecars(files)
    job = _Job(config, engine)
    with job.progress:
        task = job.progress.add_task("", total=len(files), left_out="")
        start, together = 0, TOGETHER[config.detail]
        while start < len(files):
            began = time.perf_counter()
            job.caption(files[start : start + together])
            start += together
            note = f"{job.left_out} left out" if job.left_out else ""
            job.progress.update(task, completed=min(start, len(files)), left_out=note)
            if time.perf_counter() - began > PATIENCE:
                together = max(1, together // 2)
    return job.finish(len(files))


class _Job:
    """One run of the verb: what is known so far, and where it goes."""

    def __init__(self, config: CaptionConfig, engine: BatchEngine | None) -> None:
        self.config = config
        self.engine = engine
        self.alone = len(config.inputs) == 1 and not Path(config.inputs[0]).is_dir()
        self.made = self.kept = self.left_out = 0
        self.started = time.perf_counter()
        self.store = CaptionFile(config)
        self.captions: list[tuple[str, str]] = []  # (name, caption) of this run's images, in their order
        self.faults: list[tuple[str, str]] = []  # (name, reason)
        self.ledger = Ledger(config.out / "ledger.jsonl") if config.out is not None else None
        console = messages()
        self.progress = Progress(
            TextColumn("Captions"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[left_out]}"),
            console=console,
            transient=True,
            disable=self.alone or not console.is_terminal,
            redirect_stdout=False,  # stdout is for captions, also while the bar is shown on stderr
        )

    def caption(self, files: Sequence[tuple[str, Path]]) -> None:
        """Caption a few files (name, path) in one batch; equal images are captioned once."""
        keys: list[tuple[str, Path, str]] = []  # (name, path, key)
        pictures: dict[str, Any] = {}  # key -> picture, of those that have no caption yet
        for name, path in files:
            if self.config.sidecar and (text := read_sidecar(path)):
                self.kept += 1
                self._show(name, text)
                continue
            try:
                data = read_image(name) if name == STDIN else read_image_file(path)
                key = image_key(data)
                if key in self.store.captions or key in pictures:
                    self.kept += 1
                else:
                    pictures[key] = decode_named(data, "stdin" if name == STDIN else str(path))
                keys.append((name, path, key))
            except ImageError as error:
                self._leave_out(name, error)
        texts = self._answer(list(pictures.values()))
        self.store.captions.update(zip(pictures, texts, strict=True))
        self.made += len(texts)
        for name, path, key in keys:
            self.store.note(name, key)
            if self.config.sidecar:
                write_sidecar(path, self.store.captions[key])
            self._show(name, self.store.captions[key])

    def finish(self, images: int) -> dict[str, Any]:
        if self.left_out == images:
            raise DataError(f"none of the {images} images could be read; the reasons stand above")
        if self.left_out:
            where = f"; reasons in {self.ledger.path}" if self.ledger is not None else ""
            messages().print(escape(f"{self.left_out} of {images} images left out{where}"))
        config = self.config
        if config.out is not None and config.format == "csv":
            write_csv(config.out / "captions.csv", self.captions)
        summary = {
            "verb": "caption",
            "version": __version__,
            "model": config.model,
            "prompt": config.prompt,
            "max_new_tokens": config.max_new_tokens,
            "detail": config.detail,
            "images": images,
            "captioned": self.made,
            "kept": self.kept,
            "left_out": self.left_out,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        if config.json:
            write(json.dumps(summary | {"captions": self._objects()}) + "\n")
        return write_summary(config.out, summary)

    def _objects(self) -> list[dict[str, str]]:
        """Every image with its caption, or with the reason why it has none."""
        captions = [{"file_name": name, "text": text} for name, text in self.captions]
        return captions + [{"file_name": name, "error": reason} for name, reason in self.faults]

    def _answer(self, pictures: list[Any]) -> list[str]:
        if not pictures:
            return []
        self.engine = self.engine or open_engine(
            self.config.model, self.config, room=self._room(), quiet=not self.progress.disable
        )
        turns = [Turn("user", self.config.prompt, (0,))]
        questions = [(turns, [at_detail(picture, self.config.detail, self.engine)]) for picture in pictures]
        answers = self.engine.answer_batch(questions, max_new_tokens=self.config.max_new_tokens)
        return [" ".join(answer.split()) for answer in answers]  # a caption is one line

    def _room(self) -> Room:
        config = self.config
        return Room(1, len(config.prompt.encode("utf-8", "replace")), config.max_new_tokens, config.detail == "high")

    def _leave_out(self, name: str, error: ImageError) -> None:
        if self.alone:
            raise error
        self.left_out += 1
        self.faults.append((name, str(error)))
        if self.ledger is not None:
            self.ledger.leave_out(name, str(error))
        self.progress.console.print(escape(printable(f"left out: {error}")))

    def _show(self, name: str, text: str) -> None:
        self.captions.append((name, text))
        if self.config.json:
            return
        line = text if self.alone else f"{name}\t{text}"
        if sys.stdout.isatty() and not self.progress.disable:
            self.progress.console.print(printable(line), markup=False)  # above the bar, on the same screen
        else:
            write(line + "\n")
