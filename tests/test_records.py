"""Records are whole, exact and distrusted as soon as anything about them is off."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small

import pruners
from experiments.recovery import Retraining
from experiments.spec import Run
from experiments.store import atomic, checksummed_json, records
from pruners.retrain import LoRA, MaskLoRA, Trainable

RUN = Run("smollm2-135m", pruners.Wanda(sparsity=0.5), small.WINDOWS, (small.PPL,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return records.write(small.record(RUN, measures={"ptb/test@64[:4]": {"perplexity": 0.1 + 0.2}}), tmp_path)


def test_a_record_comes_back_bit_for_bit(path, tmp_path):
    found = records.load(tmp_path, "tiny")
    assert list(found) == [path.stem]
    assert found[path.stem].measures == {"ptb/test@64[:4]": {"perplexity": 0.1 + 0.2}}
    assert found[path.stem].spec == RUN.spec({"package": "made-up", "version": "1"})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_record_is_reported_and_ignored(path, tmp_path, caplog, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole.rstrip()))])
    assert records.load(tmp_path, "tiny") == {}
    assert str(path) in caplog.text
    assert "truncated" in caplog.text


def test_a_record_that_is_no_text_is_reported_and_ignored(path, tmp_path, caplog):
    path.write_bytes(b"\xa8" + path.read_bytes())
    assert records.load(tmp_path, "tiny") == {}
    assert "it is not text, so it was damaged" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("0.30000000000000004", "0.3", "checksum"),
        ('"schema_version": 1', f'"schema_version": {"1" * 5000}', "it is not complete JSON"),
        ('"schema_version": 1', '"schema_version": NaN', "it holds NaN"),
        ('"sparsity": 0.5', '"sparsity": 0.6', "checksum"),
        ('"schema_version": 1', '"schema_version": 2', "checksum"),
    ],
)
def test_a_hand_edited_record_is_reported_and_ignored(path, tmp_path, caplog, old, new, reason):
    small.edit(path, old, new)
    assert records.load(tmp_path, "tiny") == {}
    assert reason in caplog.text
    assert not records.exists(tmp_path, "tiny", path.stem)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema_version": 2}, "schema version 2 and this program reads 1"),
        ({"id": "0123456789"}, "not the digest of its spec"),
        ({"surprise": 1}, "surprise: extra inputs are not permitted"),
        ({"cost": {"seconds": {}}}, "cost.peak_bytes: field required"),
    ],
)
def test_even_a_sealed_record_must_fit_the_schema_and_its_own_spec(path, changes, reason):
    content = {**records.read(path).model_dump(exclude={"sha256"}), **changes}
    path.write_text(checksummed_json.dumps(content))
    with pytest.raises(records.BadRecordError, match=reason):
        records.read(path)


class OwnLoRA(LoRA):
    pass


@pytest.mark.parametrize(
    ("adapters", "structure", "after", "sparsity"),
    [
        (LoRA(merge=True), None, 0.1, 0.1),
        (OwnLoRA(merge=True), None, 0.1, 0.1),
        (LoRA(), None, 0.5, 0.5),
        (MaskLoRA(), None, 0.5, 0.5),
        (LoRA(merge=True), {"heads": [4, 3]}, 0.0, 0.5),  # what is gone cannot be filled
    ],
)
def test_the_sparsity_is_that_of_the_measured_model(adapters, structure, after, sparsity):
    recovery = Retraining(Trainable(adapters=adapters), small.WINDOWS, steps=1, learning_rate=1e-3)
    achieved = {"asked": 0.5, "sparsity": 0.5, "structure": structure, "recovery": {"sparsity": after}}
    record = small.record(replace(RUN, recovery=recovery), achieved=achieved)
    assert record.sparsity == sparsity
    assert ("filled" in record.sparsity_told) == (sparsity != 0.5)


def test_a_record_under_another_name_is_not_trusted(path, tmp_path):
    path.rename(path.with_name("0123456789.json"))
    assert records.load(tmp_path, "tiny") == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path, value):
    with pytest.raises(ValueError, match=r"measures\.x\.perplexity is NaN or infinite"):
        records.write(small.record(RUN, measures={"x": {"perplexity": value}}), tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_file_that_cannot_be_trusted_is_kept_aside_when_its_cell_runs_again(path, tmp_path):
    path.write_text("by hand")
    records.write(small.record(RUN), tmp_path)
    assert records.exists(tmp_path, "tiny", path.stem)
    assert path.with_name(path.name + ".ignored").read_text() == "by hand"


def test_a_full_disk_leaves_the_old_record_and_nothing_half_written(path, tmp_path):
    before = path.read_bytes()
    with small.full_disk(), pytest.raises(atomic.StorageError, match=r"Cannot write .*file too large.*--results"):
        records.write(small.record(RUN), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_results_folder_without_permission_is_one_sentence(tmp_path):
    as_root = os.geteuid() == 0
    tmp_path.chmod(0o500)
    try:
        if as_root:
            os.seteuid(65534)
        with pytest.raises(atomic.StorageError, match=r"permission denied; allow yourself to write there, or choose"):
            atomic.check_writable(tmp_path / "runs")
    finally:
        if as_root:
            os.seteuid(0)
        tmp_path.chmod(0o700)


def test_a_failure_is_kept_apart_and_forgotten_once_the_cell_is_done(tmp_path):
    records.write_failure(small.failure(RUN, "Out of memory."), tmp_path)
    assert records.load(tmp_path, "tiny") == {}
    assert [f.message for f in records.load_failures(tmp_path, "tiny").values()] == ["Out of memory."]
    records.write(small.record(RUN), tmp_path)
    assert records.load_failures(tmp_path, "tiny") == {}
