"""What one cluster wants to hear: a TOML file under slurm/profiles, or anywhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pruners.suggest import unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "profiles"
SECRET = re.compile(r"\w*(token|secret\w*|passw\w*|_key|apikey|credentials?)\s*=", re.IGNORECASE)
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
}


class ProfileError(ValueError):
    """A profile that cannot be used, said in one sentence."""


class Profile(BaseModel):
    """One cluster, or one partition of it.  Without `gres` jobs run on processors alone.

    `teraflops` is what a job sustains (not the data sheet's peak); `gpu_memory_gb` what one accelerator holds;
    `memory_gb` and `hours` the most that a job may ask for; cells of one model keep company in a job of up to
    `packed_hours`; `parallel` how many jobs of an array run at once;
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
    gpu_memory_gb: float | None = Field(None, gt=0)
    teraflops: float = Field(gt=0)
    cpus: int = Field(8, ge=1)
    memory_gb: float | None = Field(None, gt=0)
    hours: float = Field(24.0, gt=0)
    packed_hours: float = Field(2.0, ge=0)
    parallel: int = Field(8, ge=1)
    warning_seconds: int = Field(120, ge=1)
    requeues: int = Field(5, ge=0)
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    options: dict[str, str | int | bool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _gpu_memory_is_known(self) -> Profile:
        if (self.gres is None) != (self.gpu_memory_gb is None):
            raise ValueError("gres and gpu_memory_gb belong together: name both for accelerators, neither without.")
        return self

    @field_validator("options")
    @classmethod
    def _leave_ours_alone(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        if taken := OURS & {name.replace("_", "-") for name in options}:
            raise ValueError(f"{', '.join(sorted(taken))} is set from the job itself; leave it out of options.")
        return options

    @model_validator(mode="after")
    def _no_secrets(self) -> Profile:
        lines = [*self.setup, *(f"{name}={value}" for name, value in self.environment.items()), self.python or ""]
        for line in lines:
            if found := SECRET.search(line):
                raise ValueError(
                    f"{found[0].rstrip(' =')} looks like a secret, and profiles and batch scripts are files that "
                    "others may read; export it in the shell you submit from, which jobs inherit."
                )
        return self


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Profile:
    """The profile of that name, or of the TOML file at that path.

    Raises LookupError for an unknown name and ProfileError, naming file and key, for one that cannot be used.
    """
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise LookupError(f"{unknown('profile', name, names())} The path of a TOML file would do, too.")
    try:
        return Profile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise ProfileError(f"{path}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return unknown("key", key, Profile.model_fields)
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
