"""Profiles of clusters: the examples load, and what is wrong with one is said in one sentence."""

from __future__ import annotations

import pytest

from slurm import profile
from slurm.profile import ProfileError


def write(folder, *lines: str) -> str:
    path = folder / "mine.toml"
    path.write_text("\n".join(("teraflops = 1", *lines)))
    return str(path)


@pytest.mark.parametrize("name", profile.names())
def test_every_profile_that_comes_along_can_be_used(name):
    assert profile.load(name).teraflops > 0


def test_the_two_examples_and_the_default_are_there():
    assert set(profile.names()) == {"container", "gpu_partition", "processors"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('partion = "gpu"', "Unknown key 'partion'. Did you mean partition or"),
        ('hours = "long"', "hours: Input should be a valid number"),
        ("parallel = 0", "parallel: Input should be greater than or equal to 1"),
        ('gres = "gpu:1"', "gres and gpu_memory_gb belong together"),
        ("setup = [", "is not TOML"),
        ('options = {time = "1:00"}', "time is set from the job itself"),
        ('environment = {HF_TOKEN = "hf_x"}', "HF_TOKEN looks like a secret"),
        ('setup = ["export WANDB_API_KEY=1"]', "WANDB_API_KEY looks like a secret"),
    ],
)
def test_what_is_wrong_with_a_profile_is_one_sentence(tmp_path, line, said):
    with pytest.raises(ProfileError) as error:
        profile.load(write(tmp_path, line))
    assert said in str(error.value)
    assert "mine.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_variable_that_only_sounds_like_a_secret_is_let_through(tmp_path):
    path = write(tmp_path, 'environment = {TOKENIZERS_PARALLELISM = "false"}')
    assert profile.load(path).environment == {"TOKENIZERS_PARALLELISM": "false"}


def test_an_unknown_profile_names_the_nearest():
    with pytest.raises(LookupError, match="Did you mean gpu_partition"):
        profile.load("gpu_partion")
