"""Which commit of a Hub repository a name such as `main` stands for: that commit is loaded and recorded.

What was downloaded before stays what the name stands for until it is downloaded anew or removed: a table that is half
done goes on with the same weights whatever was pushed since.  Only for a repository that was never downloaded is the
Hub asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import constants

from experiments.data import eval_tasks

TIMEOUT_S = 10
CONVERSION = "Adding `safetensors` variant of this model"  # the title of the Hub's own conversions
CONVERTER = "SFconvertbot"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # for differences to another model alone
TOKENIZER = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
PARTS = ("configuration", "tokenizer", "weights")  # of a model's repository
COMMIT = re.compile(r"[0-9a-f]{40}")


def model_commit(repository: str, revision: str = "main") -> str | None:
    """The commit that holds the weights as safetensors: that of the name, or of the Hub's conversion of it.

    None where it was never downloaded and the Hub does not answer.
    """
    if COMMIT.fullmatch(revision):
        return revision
    if found := _downloaded_weights(repository, revision):
        return found
    asked = _asked_weights(repository, revision)
    return asked[1] if asked else _downloaded("model", repository, revision)


def data_commit(repository: str, revision: str) -> str | None:
    """The commit of a data set's branch; None where it was never downloaded and the Hub does not answer."""
    if COMMIT.fullmatch(revision):
        return revision
    return _downloaded("dataset", repository, revision) or _asked_data(repository, revision)


def configuration(repository: str, revision: str) -> Path:
    """A folder with the config.json and tokenizer_config.json of a model; ValueError where they cannot be had."""
    import httpx
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repository, "config.json", revision=revision)
    except (httpx.HTTPError, OSError) as error:
        raise ValueError(f"The configuration of {repository} could not be downloaded from the Hub: {error}") from error
    return Path(path).parent


def refusal(repository: str) -> str:
    """Why nothing can be had of a repository, to complete "as a model of the Hub ..."."""
    if not reachable():
        return "it was never downloaded and the Hub does not answer"
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(repository, timeout=TIMEOUT_S)
    except GatedRepoError:
        return "it is gated: accept its licence on its page and run `hf auth login`"
    except RepositoryNotFoundError:
        return "it does not exist, or is private: check its name, or run `hf auth login`"
    except (httpx.HTTPError, OSError) as error:
        return f"it cannot be reached ({error})"
    return "it holds no weights as safetensors"


def is_cached(repository: str, file: str, revision: str | None, kind: str = "model") -> bool:
    """Whether a file of the Hub was downloaded at that commit or branch; `kind` is model or dataset."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file, revision=revision, repo_type=kind), str)


def downloaded(repository: str, revision: str, pickled: bool = False) -> Path:
    """The folder of that commit, with its configuration and its safetensors weights, fetched where they are not here.

    `pickled` takes those of torch.save where it has no others.  Raises OSError where the Hub refuses.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    files = [single for single, _ in _kinds(pickled)]
    for _, index in _kinds(pickled):
        with suppress(EntryNotFoundError):
            files = [index, *_shards(Path(hf_hub_download(repository, index, revision=revision)))]
            break
    wanted = ["config.json", "generation_config.json", *files]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))


def _kinds(pickled: bool) -> list[tuple[str, str]]:
    return [WEIGHTS, PICKLED] if pickled else [WEIGHTS]


def absent(repository: str, revision: str, pickled: bool = False) -> list[str]:
    """Which of a model's PARTS were not downloaded, or not whole, at a commit that is known without the Hub."""
    commit = revision if COMMIT.fullmatch(revision) else _downloaded_weights(repository, revision)
    if commit is None and pickled:
        commit = _downloaded("model", repository, revision)
    place = _place("model", repository) / "snapshots" / str(commit)
    there = {
        "configuration": (place / "config.json").is_file(),
        "tokenizer": any(path.is_file() for pattern in TOKENIZER[:3] for path in place.glob(pattern)),
        "weights": any(_is_whole(place, *kind) for kind in _kinds(pickled)),
    }
    return [part for part in PARTS if not there[part]]


def _is_whole(place: Path, single: str, index: str) -> bool:
    there = (place / single).is_file() or (place / index).is_file()
    return there and all((place / file).is_file() for file in _shards(place / index))


def fetch(repository: str, revision: str, pickled: bool = False) -> None:
    """Download a model's parts by the name of the revision, or of the Hub's conversion of it, which then stand for
    their commit without the Hub.

    Raises OSError, or what the Hub's client raises, where it refuses.
    """
    from huggingface_hub import snapshot_download

    asked = None if COMMIT.fullmatch(revision) else _asked_weights(repository, revision)
    name = asked[0] if asked else revision
    downloaded(repository, name, pickled)
    snapshot_download(repository, revision=name, allow_patterns=list(TOKENIZER))
    if lacking := absent(repository, revision, pickled):
        raise OSError(f"it has no readable {' and no '.join(lacking)}")


def reachable() -> bool:
    """Whether anything new can be downloaded."""
    return not constants.HF_HUB_OFFLINE and eval_tasks.hub_reachable()


def _place(kind: str, repository: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)


def _downloaded(kind: str, repository: str, revision: str) -> str | None:
    try:
        found = (_place(kind, repository) / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return found if COMMIT.fullmatch(found) else None


def _downloaded_weights(repository: str, revision: str) -> str | None:
    """Of the name itself, else the only conversion that is here with its configuration."""
    snapshots = _place("model", repository) / "snapshots"
    commit = _downloaded("model", repository, revision)
    if commit and _has_weights(snapshots / commit):
        return commit
    converted = {found for found in _conversions(repository) if _has_weights(snapshots / found)}
    whole = {found for found in converted if (snapshots / found / "config.json").is_file()}
    return whole.pop() if len(whole) == 1 else None


def _conversions(repository: str) -> Iterator[str]:
    requests = _place("model", repository) / "refs" / "refs" / "pr"
    for path in requests.glob("*"):
        if found := _downloaded("model", repository, f"refs/pr/{path.name}"):
            yield found


def _shards(index: Path) -> list[str]:
    """The files of weights that an index names; none where there is no index."""
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} does not say which file holds which weight; remove it and fetch it again."
        ) from error


def _has_weights(snapshot: Path) -> bool:
    return any((snapshot / name).is_file() for name in WEIGHTS)


@cache
def _asked_weights(repository: str, revision: str) -> tuple[str, str | None] | None:
    """Its name on the Hub and its commit, as the Hub tells now, asked once a process."""
    if not reachable():
        return None
    from huggingface_hub import HfApi
    from transformers.safetensors_conversion import previous_pr

    api = HfApi()
    try:
        info = api.model_info(repository, revision=revision, timeout=TIMEOUT_S)
        if revision != "main" or any(file.rfilename in WEIGHTS for file in info.siblings or ()):
            return revision, info.sha
        request = previous_pr(api, repository, CONVERSION, token=None)  # type: ignore[arg-type]  # the saved login
        if request is None or request.author != CONVERTER:
            return revision, info.sha
        reference = str(request.git_reference)
        return reference, api.model_info(repository, revision=reference, timeout=TIMEOUT_S).sha
    except refusals():
        return None


@cache
def _asked_data(repository: str, revision: str) -> str | None:
    if not reachable():
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repository, revision=revision, timeout=TIMEOUT_S).sha
    except refusals():
        return None


def refusals() -> tuple[type[Exception], ...]:
    """What a Hub that does not answer, or refuses, raises: its package changes its HTTP client between versions, and
    the client's own errors are a base of its error."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)
