"""The profile of one cluster or partition: a TOML file under slurm/profiles, or anywhere."""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from pruners.interface.suggest import UsageError, unknown
from slurm import secrets

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "profiles"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
ONE_CARD = re.compile(r"(?<![^,])(gpu(?::(?!\d+(?:,|$))[^:,]+)?)(?::1)?(?![^,])")  # among what gres names
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True)]
OURS = {
    "array",
    "job-name",
    "output",
    "error",
    "open-mode",
    "signal",
    "requeue",
    "time",
    "mem",
    "gres",
    "cpus-per-task",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "tasks-per-node",
    "ntasks-per-gpu",
    "no-requeue",
}
SINGLE = {"nodes", "ntasks", "ntasks-per-node", "tasks-per-node"}  # of which a job has one, whatever it runs
KEYS = {"partition", "account", "qos", "constraint"}  # of the profile, which are options of sbatch, too


class ProfileError(ValueError):
    """A profile that cannot be used, said in one sentence."""


class Profile(BaseModel):
    """One cluster, or one partition of it.  Without `gres` jobs run on CPUs alone.

    `gres` names one accelerator and `cards` says how many of them a node has, which one cell may share (without `gres`,
    how many processes); `teraflops` is what one sustains (not the data sheet's peak), `gpu_memory_gb` what it holds;
    `card` is a word of its name in records, whose times then tell how many hours are asked for; `cpus` are those of one
    process; `memory_gb` and `hours` the most that a job may ask for, and with `whole_memory` it asks for all memory of
    its node; cells of one model keep company in a job of up to `packed_hours`; `parallel` how many jobs of an array run
    at once;
    `warning_seconds` how long before its time limit a job is told to put itself back into the queue, and `requeues`
    how often in a row it may do so without finishing a cell; `python` the command that starts Python in a job, such
    as a container's; `options` further options of sbatch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    card: str | None = None
    cards: Count = Field(1, ge=1, le=1000)
    gpu_memory_gb: Number | None = Field(None, gt=0, le=100_000)
    teraflops: Number = Field(
        ge=1e-9,
        le=1e6,
        description="the throughput that one GPU sustains in 16-bit formats, e.g. teraflops = 60 for an A100, or 0.1 "
        "for 8 cores",
    )
    cpus: Count = Field(8, ge=1, le=10_000)
    memory_gb: Number | None = Field(None, gt=0, le=1e6)
    whole_memory: bool = Field(False, strict=True)
    hours: Number = Field(24.0, gt=0, le=10_000)
    packed_hours: Number = Field(2.0, ge=0, le=1e6)
    parallel: Count = Field(8, ge=1, le=1e6)
    warning_seconds: Count = Field(120, ge=1, le=100_000)
    requeues: Count = Field(5, ge=0, le=1e6)
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    options: dict[str, str | int | bool] = Field(default_factory=dict)
    _times: dict[str, float] = PrivateAttr(default_factory=dict)
    _weights: str = PrivateAttr("auto")

    @model_validator(mode="after")
    def _gpu_memory_is_known(self) -> Profile:
        if (self.gres is None) != (self.gpu_memory_gb is None):
            lacking = (
                'gres = "gpu:1", the name of one GPU at the site'
                if self.gres is None
                else "gpu_memory_gb = 80, the memory of one GPU in GB"
            )
            raise ValueError(
                f"gres and gpu_memory_gb belong together: set both for GPUs, or neither; add e.g. {lacking}, "
                "or leave out the other."
            )
        return self

    @model_validator(mode="after")
    def _one_card_is_named(self) -> Profile:
        if self.cards > 1 and self.gres is not None and len(re.findall(ONE_CARD, self.gres)) != 1:
            raise ValueError(
                f'gres: {self.gres!r} does not name one GPU, as "gpu:a100:1" does; cards counts the GPUs of a node.'
            )
        return self

    @property
    def least_hours(self) -> float:
        """Of a job that is not to be warned before it begins."""
        return 2 * self.warning_seconds / 3600

    def gres_of(self, cards: int) -> str | None:
        """What names so many cards of a node."""
        if self.gres is None or cards == 1:
            return self.gres
        return re.sub(ONE_CARD, lambda found: f"{found[1]}:{cards}", self.gres)

    def after(self, ids: Sequence[str]) -> Profile:
        """For jobs that begin when these have ended, well or not."""
        if not ids:
            return self
        waits = ",".join(filter(None, [str(self.options.get("dependency", "")), f"afterany:{':'.join(ids)}"]))
        return self.model_copy(update={"options": {**self.options, "dependency": waits}})

    def with_times(self, times: Mapping[str, float]) -> Profile:
        """Where cells of these kinds are known to take so many times the estimate, on the safe side."""
        told = self.model_copy()
        told._times = dict(times)
        return told

    def with_weights(self, home: str) -> Profile:
        """For jobs that are told where the weights are: `auto`, `device`, `host` or `disk`."""
        told = self.model_copy()
        told._weights = home
        return told

    @property
    def weights(self) -> str:
        return self._weights

    def times(self, kind: str, otherwise: float) -> float:
        return self._times.get(kind, otherwise)

    @field_validator("options")
    @classmethod
    def _leave_ours_alone(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name in options:  # which sbatch takes by their first letters, too
            word = name.replace("_", "-")
            if word in SINGLE and str(options[name]) == "1":
                continue
            if taken := sorted(ours for ours in OURS if ours.startswith(word)):
                raise ValueError(f"{taken[0]} is set by the job itself; leave it out of options.")
            if taken := sorted(key for key in KEYS if key.startswith(word)):
                raise ValueError(
                    f"{taken[0]} is a key of the profile itself; set it there, and leave it out of options."
                )
        return options

    @model_validator(mode="after")
    def _warns_in_time(self) -> Profile:
        if (seconds := 60 * math.ceil(60 * self.hours)) <= self.warning_seconds:
            raise ValueError(
                f"hours = {self.hours:g} lets a job run for {seconds} seconds, and its warning comes "
                f"{self.warning_seconds} seconds before its end; give more hours or fewer warning_seconds."
            )
        return self

    @model_validator(mode="after")
    def _one_line_each(self) -> Profile:
        """What stands in a line of the script must not end it; an empty word would ask for nothing."""
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"environment: {name!r} is not a valid variable name (letters, digits and _).")
        for name in self.options:
            if not OPTION.fullmatch(name):
                raise ValueError(
                    f"options: {name!r} is not an option of sbatch (letters, digits and -, without the --)."
                )
        for name, text in self._words():
            if any(unicodedata.category(letter) == "Cc" for letter in text):
                raise ValueError(f"{name} holds a line break or another control character; give it in one line.")
            if not text.strip() and not name.startswith(("options.", "environment.")):
                raise ValueError(f"{name} is empty; leave the key out instead.")
        if any("\0" in line for line in self.setup):
            raise ValueError("setup holds a NUL character, which no shell reads.")
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> Profile:
        lines = [line for text in self.setup for line in text.splitlines()]
        lines += [f"{name.rpartition('.')[2]}={text}" for name, text in self._words()]
        for line in lines:
            if found := secrets.found(line):
                raise ValueError(
                    f"{found} looks like a secret, and others may read profiles and batch scripts; export it "
                    "in the shell you submit from, which jobs inherit."
                )
        return self

    def _words(self) -> Iterator[tuple[str, str]]:
        """Every text but the lines of `setup`, with the name of its key."""
        for name in ("partition", "account", "qos", "constraint", "gres", "card", "python"):
            if (text := getattr(self, name)) is not None:
                yield name, text
        yield from ((f"environment.{name}", text) for name, text in self.environment.items())
        yield from ((f"options.{name}", str(value)) for name, value in self.options.items())


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Profile:
    """The profile of that name, or of the TOML file at that path.

    Raises UsageError for an unknown name and ProfileError, naming file and key, for one that cannot be used.
    """
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"{unknown('profile', name, names())} The path of a TOML file works as well.")
    try:
        return Profile.model_validate(tomllib.loads(path.read_bytes().decode("utf-8-sig")))
    except OSError as error:
        raise ProfileError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8.") from error
    except RecursionError:
        raise ProfileError(f"{path} is nested too deeply to be a profile.") from None
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise ProfileError(f"{path}: {_first(error)}") from error
    except ValueError as error:  # the one that tomllib leaves as it is
        raise ProfileError(f"{path} holds a number of thousands of digits; give a shorter one.") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return unknown("key", key, Profile.model_fields)
    if first["type"] == "missing":
        return f"{key} is missing; set {Profile.model_fields[key].description}."
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
