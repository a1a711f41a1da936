"""The files of `llama3v caption`: images in, captions.jsonl, captions.csv and sidecars out."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llama3v.config import CaptionConfig
from llama3v.data.sources.folder import IMAGE_SUFFIXES
from llama3v.engines.terminal import STDIN
from llama3v.errors import ConfigError, DataError


class CaptionFile:
    """captions.jsonl: a growing list of captions, by image, prompt and detail; only in memory without `config.out`."""

    def __init__(self, config: CaptionConfig) -> None:
        self.captions: dict[str, str] = {}  # key of the image -> its caption for this prompt and detail
        self._prompt, self._detail = config.prompt, config.detail
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
            "detail": self._detail,
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
            if (prompt, row.get("detail", "high")) == (self._prompt, self._detail):
                self.captions[key] = text
                self._listed.add((name, key))


def images_of(inputs: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of every image: files as they are named, folders in the order of their relative paths."""
    for text in inputs:
        root = Path(text)
        if text == STDIN or not root.is_dir():
            yield text, root
            continue
        found: list[str] = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            images = (name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
            found += [(Path(folder) / name).relative_to(root).as_posix() for name in images]
        yield from ((name, root / name) for name in sorted(found))


def write_csv(path: Path, captions: Iterable[tuple[str, str]]) -> None:
    """file_name,text: a file that is complete as soon as it is there."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("file_name", "text"))
    rows.writerows(captions)
    _replace(path, text.getvalue())


def sidecar_of(image: Path) -> Path:
    """Where the caption of an image stands beside it: photo.jpg -> photo.txt."""
    return image.with_suffix(".txt")


def read_sidecar(image: Path) -> str | None:
    """The caption that stands beside an image, or None; an empty file is none."""
    try:
        text = sidecar_of(image).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{sidecar_of(image)} is no text; move it away, or leave --sidecar away") from error
    except (FileNotFoundError, ValueError):  # ValueError: no name of a file, which reading the image will say
        return None
    except OSError as error:
        raise DataError(f"{sidecar_of(image)} cannot be read ({error.strerror})") from error
    return " ".join(text.split()) or None


def write_sidecar(image: Path, caption: str) -> None:
    """Write the caption beside the image. Raises DataError where the folder cannot be written."""
    try:
        _replace(sidecar_of(image), caption + "\n")
    except OSError as error:
        raise DataError(f"{sidecar_of(image)} cannot be written ({error.strerror}); use --out instead") from error


def refuse_shared_sidecars(files: Iterable[tuple[str, Path]]) -> None:
    """DataError where two images would have one sidecar: a.jpg and a.png."""
    owners: dict[Path, str] = {}
    for name, path in files:
        other = owners.setdefault(sidecar_of(path), name)
        if other != name:
            raise DataError(f"{other} and {name} would share {sidecar_of(path).name}; rename one, or use --out instead")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # Names of files may hold bytes that are no UTF-8: they are written as they are
    temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
    temporary.replace(path)
