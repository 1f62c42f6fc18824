"""Keeps passwords and tokens out of whatever is written down: records, failures, tables, logs, scripts, the screen.

Two kinds are known: what looks like a secret wherever it stands, and the secrets of this process's own environment.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
SHORTEST = 4  # a shorter secret would blot out ordinary words
NAME = re.compile(
    r"(?:\w{0,64}?(?:(?:token|passphrase|(?:api|account|access|secret|private)key|_key|credentials?)\d{0,3}"
    r"|secret\w{0,64}|passw\w{0,64}|(?<!by)(?<!com)(?<!tres)pass|_auth|_pat|_pwd)"
    r"|\w{0,64}?(?:token|api_?key|access_key|credentials?|passphrase|_pat)_"  # as HF_TOKEN_READ, but not token_id
    r"(?!(?:\w{1,64}_)?(?:url|endpoint|ids?|types?|limit|count|len|length|size|budget|sha256|cache|root|home|mode|helper"
    r"|provider|backend|format|version|ttl|threshold|dim|dropout|embeddings?|vocab|prob|weight|rate)(?!\w))\w{1,64}"
    r"|(?-i:KEY|AUTH|PAT))",
    re.IGNORECASE,
)
HARMLESS = re.compile(
    r"_(?:FILE|PATH|DIR|SOCK|NAME)$|DISABLE|ENABLE|IMPLICIT|^(?:MAX|NUM|N|PAD|EOS|BOS|UNK)_|PUBLIC_KEY$|_PER_",
    re.IGNORECASE,
)
TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|npm_\w{20,}|pypi-[\w-]{20,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|hooks\.slack\.com/services/[\w/]{20,}|discord(?:app)?\.com/api/webhooks/[\w/-]{20,})"
)
USERINFO = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<who>[^\s/?#'\"<>]+)@", re.IGNORECASE)
BARE = re.compile(  # an address without a scheme
    r"(?<![\w./%+@:-])[\w.%+-]+:(?P<password>(?![\d.]+@)[^\s/'\"<>,;]{2,256})@(?=[\w.-]{1,253}:\d{2,5}(?!\w))"
)
OF_HEADER = r"x-(?:[a-z0-9]+-){0,4}(?:token|secret|password|(?:api|access)-?key)"  # as X-Vault-Token
COOKIES = re.compile(
    r"(?P<name>\b(?:set-)?cookie['\"]?\s*:\s*['\"]?)(?P<value>[^\s'\",;]+(?:;\s*[^\s'\",;=]+=[^\s'\",;]*)*)",
    re.IGNORECASE,
)
HEADER = re.compile(
    r"(?P<name>\b(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token|digest)\s+)?"
    r"|\bbearer\s+|\b(?:" + OF_HEADER + r"|private-token|api-key)['\"]?\s*:\s*['\"]?)"
    r"(?P<value>[^\s'\",;]+)",
    re.IGNORECASE,
)
GIVEN = re.compile(  # in any text: NAME=value of an environment, a parameter of an address, a plain word for a password
    r"(?P<start>\b[A-Z][A-Z0-9_]*\s*\+?=\s*|(?:[?&]|\bX-Amz-)[\w-]+=|\b(?:password|passwd|secret|api_?key|access_token|AccountKey|SharedAccessKey)['\"]?\s*[:=]\s*)"
    r"(?P<value>['\"]?[^\s'\",;&]+(?:['\"]+[\w$][^\s'\",;&]*)*)"
)


def redacted(text: str) -> str:
    """`text` with every password, token and other secret as ***; applied twice it changes nothing more."""
    return _redacted(text, _own())


def cleaned(value: Any, compared: Collection[str] = ()) -> Any:
    """Plain JSON with every text in it redacted; what stands under a name of `compared`, which a program will compare
    letter by letter, only of what looks like a secret, for a password may be a word or a few digits of a digest."""
    return _cleaned(value, _own(), compared)


def _redacted(text: str, own: list[str]) -> str:
    for secret in own:
        text = text.replace(secret, HIDDEN)
    text = USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = BARE.sub(f"{HIDDEN}@", text)
    text = COOKIES.sub(rf"\g<name>{HIDDEN}", text)
    text = HEADER.sub(rf"\g<name>{HIDDEN}", text)
    text = GIVEN.sub(lambda found: f"{found['start']}{HIDDEN}" if _is_secret(found["start"]) else found[0], text)
    return TOKENS.sub(HIDDEN, text)


def _cleaned(value: Any, own: list[str], compared: Collection[str]) -> Any:
    if isinstance(value, str):
        return _redacted(value, own)
    if isinstance(value, dict):
        return {key: _cleaned(item, [] if key in compared else own, compared) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item, own, compared) for item in value]
    return value


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Meanwhile what any logger of the process says is redacted before a handler sees it."""
    before = logging.getLogRecordFactory()

    def made(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = before(*arguments, **options)
        try:
            record.msg, record.args = redacted(record.getMessage()), ()
        except (TypeError, ValueError):  # a message that does not fit its arguments: logging reports it by itself
            return record
        if record.exc_info:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(made)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


def secret_name(name: str) -> bool:
    """Whether a variable or option of that name holds a secret, by the looks of it."""
    return NAME.fullmatch(name) is not None and not HARMLESS.search(name)


def _own() -> list[str]:
    """Secrets of the environment in every form in which they may be met, longest first."""
    found = set()
    for name, value in os.environ.items():
        if secret_name(name) and len(value) >= 2 * SHORTEST and not (value[0] == "/" and os.path.exists(value)):
            found.add(value)
        for password in _passwords(value):
            forms = {password, unquote(password)}
            forms |= {escape(form, safe="") for form in list(forms) for escape in (quote, quote_plus)}
            found |= {form for form in forms if len(form) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def _passwords(value: str) -> Iterator[str]:
    """Of the addresses in a variable, with a scheme or without."""
    for address in re.split(r"[\s,;|]+(?=[a-z][a-z0-9+.-]*://)|\s+", value):
        if found := re.search(r"://[^\s:]*:(?P<password>\S*)@", address) or BARE.search(address):
            yield found["password"]


def _is_secret(start: str) -> bool:
    """Of what stands before a value: `NAME = `, `&name=` or `"name": `."""
    name = start.strip("?&'\"=:+ ").replace("-", "_")
    return secret_name(name) or name.lower() in ("key", "auth", "sig", "signature", "x_amz_signature")
