"""Calls that a dependency is about to drop fail in the tests, whether it warns or only logs."""

from __future__ import annotations

import warnings

import pytest
import transformers
from conftest import tiny
from packaging.version import Version


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_warning_of_that_kind_is_an_error(kind):
    with pytest.raises(kind, match="goes soon"):
        warnings.warn("this goes soon", kind, stacklevel=1)


def test_what_transformers_only_logs_is_one_too():
    logger = transformers.utils.logging.get_logger("transformers.models.llama")
    with pytest.raises(DeprecationWarning, match="goes in 7"):
        logger.warning_once("`this` is deprecated and goes in 7")
    logger.warning_once("this stays")


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="named so since transformers 5.24")
def test_the_cache_by_its_old_name_is_one(windows):
    output = tiny("opt")(windows, use_cache=True)
    with pytest.raises(DeprecationWarning, match="Use `cache` instead"):
        _ = output.past_key_values
