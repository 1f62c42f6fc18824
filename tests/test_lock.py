"""The lock names every package of the environment that `make` builds, within the ranges, for every Python."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10.12", "3.11.7", "3.12.3", "3.13.1")
FILES = ("requirements.txt", "requirements-dev.txt", "requirements-embedded.txt")
INSTALLER = "pip"  # of Python itself, which `make` leaves as `python -m venv` puts it there


def requirements(name: str) -> list[Requirement]:
    lines = ((ROOT / name).read_text()).splitlines()
    return [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]


def locked(python: str) -> dict[str, Requirement]:
    """The pins that hold on Linux under that Python; fails where one package has two."""
    here = {"python_version": python.rpartition(".")[0], "python_full_version": python, "sys_platform": "linux"}
    here |= {"platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
    found: dict[str, Requirement] = {}
    for pin in requirements("requirements.lock"):
        if pin.marker is None or pin.marker.evaluate(here | {"extra": ""}):
            assert found.setdefault(canonicalize_name(pin.name), pin) is pin
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("file", FILES)
def test_every_requirement_is_pinned_within_its_range(file, python):
    pins = locked(python)
    for asked in requirements(file):
        if asked.marker is None or asked.marker.evaluate({"python_version": python.rpartition(".")[0]}):
            (pin,) = pins[canonicalize_name(asked.name)].specifier
            assert pin.operator == "=="
            assert asked.specifier.contains(pin.version, prereleases=True)


def test_every_installed_package_is_the_pinned_one():
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("not in the environment that `make` builds from the lock")
    pins = locked(".".join(map(str, sys.version_info[:3])))
    installed = {canonicalize_name(found.metadata["Name"]): found.version for found in distributions()}
    others = {name: v for name, v in installed.items() if name != INSTALLER}
    wrong = {name: v for name, v in others.items() if name not in pins or not pins[name].specifier.contains(v, True)}
    assert not wrong
    assert len(others) > 100


@pytest.mark.parametrize("python", PYTHONS)
def test_what_builds_a_package_from_source_is_pinned(python):
    assert "setuptools" in locked(python)


def test_the_lock_names_no_host_and_no_folder():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "@ " not in text
    assert "--" not in text
