"""The verb `export`: a trained model in a stock form, checked before it is called done."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama3v.config import ExportConfig
from llama3v.errors import CheckpointError


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a trained model in a stock form that other programs load without this package.

    The directory appears whole or not at all: it is written beside `config.out`, checked, and renamed.

    Returns:
        the summary that also lies in the directory as summary.json: format, form, sizes, warnings, and under "check"
        the largest differences between the export and this package.

    Raises:
        ConfigError: a package that the format needs is not installed.
        CheckpointError: no model there, no stock form for it, an export that disagrees, or an `out` that holds
            something else.
    """
    from llama3v.exporters import formats

    refuse_foreign(config.out, "export")
    formats.require_packages(config)
    with appearing(config.out) as directory:
        summary: dict[str, Any] = {"verb": "export", "model": str(config.model)}
        summary |= formats.write(config, directory)
        (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{config.out}: {formats.in_words(summary)}")
    for warning in summary["warnings"]:
        print(f"note: {warning}")
    return summary


def refuse_foreign(out: Path, verb: str) -> None:
    """What a verb wrote may be replaced by itself, and an empty directory filled; nothing else is touched.

    Raises CheckpointError.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; give --out a directory")
    if any(out.iterdir()) and not _is_from(verb, out):
        raise CheckpointError(f"{out} is not empty and holds no earlier {verb}; give another --out")


def _is_from(verb: str, directory: Path) -> bool:
    try:
        return json.loads((directory / "summary.json").read_text()).get("verb") == verb
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write into; it takes the name `out` when the body succeeds, else it vanishes."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
