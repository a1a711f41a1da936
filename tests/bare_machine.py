"""A machine with little installed, for tests: a directory with links to some packages and what they require, and nothing else."""

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def link_packages(directory: Path, wanted: tuple[str, ...], without: tuple[str, ...]) -> list[str]:
    """Fill `directory`, to be the only one beside the standard library in which Python looks for packages.

    Args:
        wanted: names of distributions; their requirements come with them (not those of extras).
        without: distributions that are left out, whoever requires them.

    Returns the names of the distributions that are there.
    """
    found = _with_requirements(wanted, without)
    for package in found.values():
        for name in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            place = Path(str(package.locate_file(name)))
            if place.exists() and not (directory / name).exists():
                (directory / name).symlink_to(place)
    return sorted(found)


def _with_requirements(wanted: tuple[str, ...], without: tuple[str, ...]) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    names = list(wanted)
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found or name in without:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # required on another system or Python only
            continue
        requirements = [text for text in found[name].requires or [] if "extra ==" not in text]
        names += [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in requirements]
    return found
