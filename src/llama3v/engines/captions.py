"""`llama3v caption`: one image, or all images of folders, resumable."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama3v import __version__
from llama3v.config import CaptionConfig
from llama3v.data.ledger import Ledger
from llama3v.data.sources.folder import IMAGE_SUFFIXES
from llama3v.engines.base import Engine
from llama3v.engines.terminal import decode_named, messages, open_engine, printable, write, write_summary
from llama3v.errors import ConfigError, DataError, ImageError
from llama3v.model.prompt import Turn
from llama3v.model.tiles import image_key, read_image_file

BATCH = 8  # images that are captioned together


def caption(config: CaptionConfig, engine: Engine | None = None) -> dict[str, Any]:
    """Caption an image, several, or every image under folders; captions go to stdout.

    One image: its caption. More: one line each, "name<TAB>caption". With `config.out`, captions.jsonl there gets
    {"file_name", "text", "key", "prompt", "model"} per image as soon as it is known, and what it already holds for an
    image and prompt is kept. A bad image goes to ledger.jsonl there, and to stderr; alone, it is an error.

    Args:
        engine: runs the model; default: a TorchEngine of `config.model`, loaded when the first image needs it.

    Returns the summary, which is also `config.out`/summary.json ("kept" counts images that needed no new caption: they
    had one, or equal another image). Raises ImageError for a single bad image, DataError
    where there is no image to caption, ConfigError where captions.jsonl is of another model.
    """
    files = list(_files(config.inputs))
    if not files:
        raise DataError(f"{', '.join(config.inputs)}: expected images ({' '.join(IMAGE_SUFFIXES)}), found none")
    job = _Job(config, engine)
    with job.progress:
        task = job.progress.add_task("", total=len(files), left_out="")
        for start in range(0, len(files), BATCH):
            job.caption(files[start : start + BATCH])
            note = f"{job.left_out} left out" if job.left_out else ""
            job.progress.update(task, completed=min(start + BATCH, len(files)), left_out=note)
    return job.finish(len(files))


class _Job:
    """One run of the verb: what is known so far, and where it goes."""

    def __init__(self, config: CaptionConfig, engine: Engine | None) -> None:
        self.config = config
        self.engine = engine
        self.alone = len(config.inputs) == 1 and not Path(config.inputs[0]).is_dir()
        self.made = self.kept = self.left_out = 0
        self.started = time.perf_counter()
        self.store = CaptionFile(config)
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
        keys: list[tuple[str, str]] = []  # (name, key)
        pictures: dict[str, Any] = {}  # key -> picture, of those that have no caption yet
        for name, path in files:
            try:
                data = read_image_file(path)
                key = image_key(data)
                if key in self.store.captions or key in pictures:
                    self.kept += 1
                else:
                    pictures[key] = decode_named(data, str(path))
                keys.append((name, key))
            except ImageError as error:
                self._leave_out(name, error)
        texts = self._answer(list(pictures.values()))
        self.store.captions.update(zip(pictures, texts, strict=True))
        self.made += len(texts)
        for name, key in keys:
            self.store.note(name, key)
            self._show(name, self.store.captions[key])

    def finish(self, images: int) -> dict[str, Any]:
        if self.left_out == images:
            raise DataError(f"none of the {images} images could be read; the reasons stand above")
        if self.left_out:
            where = f"; reasons in {self.ledger.path}" if self.ledger is not None else ""
            messages().print(escape(f"{self.left_out} of {images} images left out{where}"))
        config = self.config
        summary = {
            "verb": "caption",
            "version": __version__,
            "model": config.model,
            "prompt": config.prompt,
            "max_new_tokens": config.max_new_tokens,
            "images": images,
            "captioned": self.made,
            "kept": self.kept,
            "left_out": self.left_out,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        return write_summary(config.out, summary)

    def _answer(self, pictures: list[Any]) -> list[str]:
        if not pictures:
            return []
        self.engine = self.engine or open_engine(self.config.model, quiet=not self.progress.disable)
        turns = [Turn("user", self.config.prompt, (0,))]
        questions = [(turns, [picture]) for picture in pictures]
        answers = self.engine.answer_batch(questions, max_new_tokens=self.config.max_new_tokens)
        return [" ".join(answer.split()) for answer in answers]  # a caption is one line

    def _leave_out(self, name: str, error: ImageError) -> None:
        if self.alone:
            raise error
        self.left_out += 1
        if self.ledger is not None:
            self.ledger.leave_out(name, str(error))
        self.progress.console.print(escape(printable(f"left out: {error}")))

    def _show(self, name: str, text: str) -> None:
        line = text if self.alone else f"{name}\t{text}"
        if sys.stdout.isatty() and not self.progress.disable:
            self.progress.console.print(printable(line), markup=False)  # above the bar, on the same screen
        else:
            write(line + "\n")


class CaptionFile:
    """captions.jsonl: a growing list of captions, by image and prompt; only in memory without `config.out`."""

    def __init__(self, config: CaptionConfig) -> None:
        self.captions: dict[str, str] = {}  # key of the image -> its caption for this prompt
        self._prompt = config.prompt
        # one directory by any of its names is one model
        self._model = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
        self._path = None if config.out is None else config.out / "captions.jsonl"
        self._listed: set[tuple[str, str]] = set()  # (name, key)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._read(self._path)

    def note(self, name: str, key: str) -> None:
        """Write the caption of an image, unless it stands there."""
        if self._path is None or (name, key) in self._listed:
            return
        row = {
            "file_name": name,
            "text": self.captions[key],
            "key": key,
            "prompt": self._prompt,
            "model": self._model,
        }
        with self._path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
        self._listed.add((name, key))

    def _read(self, path: Path) -> None:
        """Take what is there; a last line that a kill cut short is removed."""
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                name, key, prompt, text, model = (
                    row[field] for field in ("file_name", "key", "prompt", "text", "model")
                )
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path} line {number}: expected a caption of ours ({error}); move the file away"
                ) from error
            if model != self._model:
                raise ConfigError(f"{path} holds captions by {model}, not by {self._model}; choose another --out")
            if prompt == self._prompt:
                self.captions[key] = text
                self._listed.add((name, key))


def _files(inputs: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of every image: files as they are named, folders in the order of their relative paths."""
    for text in inputs:
        root = Path(text)
        if not root.is_dir():
            yield text, root
            continue
        found: list[str] = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            images = (name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
            found += [(Path(folder) / name).relative_to(root).as_posix() for name in images]
        yield from ((name, root / name) for name in sorted(found))
