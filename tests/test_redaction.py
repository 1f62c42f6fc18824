"""A password or token never reaches what is written down or shown."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_table as small

import analysis.__main__ as analysis
from experiments import cli, errors, papers
from experiments.store import checksummed_json, records, redaction

ROOT = Path(__file__).resolve().parents[1]
SECRET = "Pa55word"
FORMS = [
    f"https://user:{SECRET}@mirror.example.org/path",
    f"https://:{SECRET}@mirror.example.org",
    f"https://{SECRET}@mirror.example.org",
    f"postgres://user:{SECRET}@host/base",
    f"url='http://user:x@{SECRET}@host'",
    f"Authorization: Bearer {SECRET}",
    f"{{'authorization': 'Bearer {SECRET}'}}",
    f"Proxy-Authorization: Basic {SECRET}",
    f"X-Api-Key: {SECRET}",
    f"Cookie: session={SECRET}",
    f"{{'set-cookie': 'token={SECRET}; path=/'}}",
    f"Cookie: id=5; session={SECRET}; theme=dark",
    f"HF_TOKEN={SECRET}",
    f"HF_TOKEN_READ={SECRET}",
    f"HF_TOKEN2={SECRET}",
    f"X-Vault-Token: {SECRET}",
    f"AccountName=a;AccountKey={SECRET}",
    f"https://hooks.slack.com/services/T0/B0/{3 * SECRET}",
    f"WANDB_API_KEY_TEAM={SECRET}",
    f"TOKEN_HF={SECRET}",
    f"HF_TOKEN+={SECRET}",
    f'HF_TOKEN="$PREFIX"{SECRET}',
    f"user:{SECRET}@proxy:3128",
    f"user:x@{SECRET}@proxy.example.org:80",
    f"X-Amz-Security-Token={SECRET}",
    f"X-Amz-Security-Token: {SECRET}",
    f"https://host/file?X-Amz-Security-Token={SECRET}&page=2",
    f"WANDB_API_KEY = '{SECRET}'",
    f"https://host/file?access_token={SECRET}&page=2",
    f"https://host/file?page=2&X-Amz-Signature={SECRET}",
    f'{{"password": "{SECRET}"}}',
    f"hf_{3 * SECRET}",
    f"ghp_{3 * SECRET}",
]
PLAIN = [
    "https://huggingface.co/datasets/a/b@main",
    "hf://datasets/a/b@0c0ffee/train.parquet",
    "wikitext2/test@128[:16]: 16 windows, 2,048 tokens; tokens 0c0ffee",
    "pad_token=<pad>, tokens=5, key=value",
    "git@github.com:a/b.git",
    "me@example.org wrote to http://host:8080/a",
    "the bearer",
    '{"token_sha256": "abab"}',
    "MAX_TOKENS=512",
    "TOKEN_COUNT=512 TOKEN_TYPE_IDS=0 TOKENIZERS_PARALLELISM=false TOKENIZER_PATH=x",
    "TOKEN_EMBEDDINGS=32000 TOKEN_DROPOUT=0.1 TIKTOKEN_RS_CACHE=/x",
    "loss:0.5@step:1000, 10:30@node1:22, cuda:0@node:12345, test_b[x:y@z:12]",
    "image:24.01@sha256:0c0ffee0c0ffee",
    "['HF_HOME=/scratch/x'] at 12:30, a:b",
]


@pytest.mark.parametrize("text", FORMS)
def test_every_form_of_a_secret_is_hidden(text):
    hidden = redaction.redacted(f"before {text} after")
    assert SECRET not in hidden
    assert hidden.startswith("before ")
    assert hidden.endswith(" after")
    assert redaction.redacted(hidden) == hidden


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays_as_it_is(text):
    assert redaction.redacted(text) == text


def test_the_secrets_of_the_environment_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:sl/sh%40sign@proxy:3128")
    monkeypatch.setenv("MY_SERVICE_TOKEN", "abcd-1234-efgh")
    text = "sl/sh%40sign and sl/sh@sign and sl%2Fsh%40sign and abcd-1234-efgh"
    assert redaction.redacted(text) == "*** and *** and *** and ***"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", "/Pa55word/Pa55word+", "/Pa55word/Pa55word+"),
        ("WANDB_API_KEY_TEAM", "Pa55word", "Pa55word"),
        ("PIP_EXTRA_INDEX_URL", "https://a:first@b/simple https://c:Pa55word@d/simple", "Pa55word"),
        ("PIP_EXTRA_INDEX_URL", "https://a:first@b/simple,https://c:Pa55word@d/simple", "Pa55word"),
        ("PIP_EXTRA_INDEX_URL", "https://a:Pa55word@b/simple https://c:second@d/simple", "Pa55word"),
        ("http_proxy", "a:Pa55word@proxy:3128", "Pa55word"),
        ("VAULT_SECRET_ID", "Pa55word", "Pa55word"),
        ("HF_TOKEN2", "Pa55word", "Pa55word"),
    ],
)
def test_what_a_variable_holds_is_hidden(monkeypatch, name, value, secret):
    monkeypatch.setenv(name, value)
    assert redaction.redacted(f"it is {secret} there") == "it is *** there"


@pytest.mark.parametrize("name", ["SSL_KEY", "HF_TOKEN_FILE", "TOKEN_COUNT", "TOKENIZERS_PARALLELISM"])
def test_a_path_and_a_number_of_tokens_are_no_secrets(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, str(tmp_path))
    assert redaction.redacted(f"it is {tmp_path} there") == f"it is {tmp_path} there"


def test_logs_are_without_secrets(caplog):
    with redaction.quiet_logs():
        logging.getLogger("urllib3").warning("Retrying %s", FORMS[0])
        try:
            raise OSError(FORMS[0])
        except OSError:
            logging.getLogger("anyone").exception("failed")
    assert SECRET not in caplog.text
    assert "Retrying https://***@mirror.example.org/path" in caplog.text


def test_an_error_is_told_and_kept_without_secrets():
    with pytest.raises(OSError, match="403") as caught:
        raise OSError(f"403 Client Error for url: {FORMS[0]}")
    assert errors.sentence(caught.value) == "403 Client Error for url: https://***@mirror.example.org/path"
    assert SECRET not in "".join(errors.last_lines(caught.value))


def test_sealed_files_are_without_secrets_and_stay_whole():
    text = checksummed_json.dumps({"measures": {"a": [{"missing": {"piqa": FORMS[0]}}]}, "data": FORMS[9], "n": 1.5})
    assert SECRET not in text
    assert checksummed_json.loads(text)["measures"]["a"][0]["missing"]["piqa"] == "https://***@mirror.example.org/path"


@pytest.mark.parametrize("password", ["tiny", "{digest}"])
def test_a_password_that_is_a_table_s_name_or_a_part_of_a_digest_spoils_no_record(tmp_path, monkeypatch, password):
    digest = "ab12cd34" * 8
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{password.format(digest=digest[2:8])}@proxy:3128")
    made = small.record(small.table().runs()[0], data={"ptb/test": {"files": {"a": digest}}}, code={"method": digest},
                        achieved={"asked": 0.5, "sparsity": 0.5, "told": "it is tiny " + digest})  # fmt: skip
    found = records.read(records.write(made, tmp_path))
    assert (found.table, found.data, found.code) == (made.table, made.data, made.code)
    assert "***" in found.achieved["told"]
    assert list(records.load(tmp_path, "tiny")) == [made.id]


def test_a_password_that_is_a_year_leaves_the_time_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_PROXY", "http://me:2030@proxy:80")
    made = small.record(small.table().runs()[0])
    made = made.model_copy(update={"made_by": made.made_by.model_copy(update={"at": "2030-01-01T00:00:00+00:00"})})
    assert records.read(records.write(made, tmp_path)).made_by == made.made_by


def test_a_password_that_is_an_executor_or_a_job_leaves_what_was_sent(monkeypatch):
    monkeypatch.setenv("MY_PROXY", "http://me:slurm@proxy:80")
    sent = {"executor": "slurm", "after": ["slurm_1"], "collected": {"a": "slurm"}, "same": ["--method", "slurm"]}
    assert sent.items() <= checksummed_json.loads(checksummed_json.dumps(sent)).items()


def test_a_failure_of_an_earlier_version_is_shown_without_secrets(tmp_path, monkeypatch, capsys):
    table = small.table()
    monkeypatch.setitem(papers.TABLES, "tiny", table)
    failure = small.failure(table.runs()[0], "refused").model_dump() | {"message": f"refused: {FORMS[0]}"}
    path = records.folder(tmp_path, "tiny") / f"{failure['id']}.error.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({**failure, "sha256": checksummed_json.seal(failure)}, indent=1, ensure_ascii=False) + "\n"
    )
    (found,) = records.load_failures(tmp_path, "tiny").values()
    assert found.message == "refused: https://***@mirror.example.org/path"


def test_a_password_in_the_hubs_address_goes_nowhere(tmp_path):
    address = "http://user:SECRETPASS@127.0.0.1:9"
    told = {"HF_ENDPOINT": address, "https_proxy": address, "HF_TOKEN": "hf_SECRETPASSSECRETPASSSECRETPASS",
            "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    command = ["-m", "experiments", "run", "embedded.demo", "--model", "opt-125m", "--method", "dense"]
    ran = subprocess.run(
        [sys.executable, *command, "--results", str(tmp_path / "results"), "--debug"],
        cwd=ROOT, env={**os.environ, **told}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == cli.EXIT_FAILED
    assert list(tmp_path.rglob("*.error.json"))
    assert analysis.main(["table", "embedded.demo", "--model", "opt-125m", "--results", str(tmp_path / "results")]) == 0
    assert "SECRETPASS" not in ran.stdout + ran.stderr
    written = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert {".md", ".csv", ".tex", ".json"} <= {path.suffix for path in written}
    assert not [path for path in written if b"SECRETPASS" in path.read_bytes()]
