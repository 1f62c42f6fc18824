"""Finds secrets in the lines of a batch script, which others may read."""

from __future__ import annotations

import re

from experiments.store.redaction import BARE, HARMLESS, NAME, OF_HEADER, TOKENS

REFERENCE = re.compile(
    r"['\"]*(?:(?:\$\w+|\$\{\w+\}|\$\((?:cat\s|<)[^()]*\)|`cat\s[^`]*`|\*+)['\"]*)*"
)  # no secret is written
PART = r"(?:\$\([^()]*\)|\$\{[^}]*\}|`[^`]*`|`(?![^`]*`)|[^\s'\";|&,})`])"  # each begins unlike the others
VALUE = rf"(?P<value>['\"]?{PART}*(?:['\"]+{PART}+)*)"
NAMED = rf"(?P<name>(?<![\w-])(?i:{NAME.pattern}))"
CLIENTS = (
    "wandb|hf|huggingface-cli|hf-cli|comet|neptune|clearml|modelscope|kaggle|dvc|aim|mlflow|gh|glab|cog|runpodctl|vault"
)
PRINTED = rf"\b(?:echo|printf)\s+(?:-\w+\s+|['\"]?%s(?:\\n)?['\"]?\s+)*{VALUE}['\"]?"
KEPT = (
    r"['\"]?(?:\S*/)?\.?[\w-]*(?i:token|secrets?|passw(?:or)?d|credentials|netrc|pgpass|api_?key)(?:\.\w+)?['\"]?"
    r"(?=[\s;&|<>]|$)"
)
PASSING = re.compile(r"--(?:host|username|registry|cloud|base-url)[=\s]+\S+")
KINDS: tuple[tuple[str, str], ...] = (
    ("{name}", rf"{NAMED}['\"]?\]?\s*(?:\+=|[=:])\s*{VALUE}"),
    ("{name}", rf"\b(?:set|setenv|set-env|config|put)\b[^|;&]*?\s{NAMED}\s+(?!=){VALUE}"),
    ("{name}", rf"(?P<name>--(?:[\w-]+[-_])?(?:token|password|passwd|passphrase|pass|secret|api[-_]?key|key|auth"
               rf"|credentials?))[=\s]\s*{VALUE}"),
    ("{name}", rf"(?P<name>(?i:authorization|{OF_HEADER}|private-token|api-key|cookie))['\"]?\s*[:=]\s*"
               rf"['\"]?(?:(?i:bearer|basic|token|digest)\s+)?{VALUE}"),
    ("{name}", rf"(?P<name>(?i:bearer))\s+{VALUE}"),
    ("an address with a password", rf"://[^\s/:@'\"]*:(?!\s|\d+/){VALUE}@"),
    ("an address with a password", rf"(?i:proxy)['\"]?\s*\+?[=\s]\s*['\"]?[^\s/:@'\"]+:(?!//){VALUE}@"),
    ("an address with a password", BARE.pattern.replace("<password>", "<value>")),
    ("an address with a token", r"\bhttps?://(?P<value>[^\s/:@'\"]+)@"),
    ("{name}", rf"(?P<name>\b(?:{CLIENTS})\s(?:[^|;&]*\s)?login)(?:\s+-[\w-]+)*\s+(?!-){VALUE}"),
    ("{name}", r"(?P<name>\blogin)\s+(?P<value>[A-Za-z0-9_-]{20,})"),
    ("{name}", r"(?P<name>\blogin)\(\s*(?:\w+\s*=\s*)?['\"](?P<value>[^'\"]+)"),
    ("what is piped into login", rf"{PRINTED}\s*\|[^;&]*\blogin\b"),
    ("what login reads", rf"\blogin\b[^|;&]*<<<\s*{VALUE}"),
    ("what is written to a file of secrets", rf"{PRINTED}\s*(?:>>?|\|\s*tee(?:\s+-a)?\s)\s*{KEPT}"),
    ("what is written to a file of secrets", rf"(?:>>?|\btee)\s*{KEPT}\s*<<<\s*{VALUE}"),
    ("{name} of .netrc", rf"\blogin\s+\S+\s+(?P<name>password)\s+{VALUE}"),
    ("{name}", rf"(?P<name>\bcurl\b(?:(?!&&)[^|;])*\s(?:-[A-Za-z]*[uU]|--(?:proxy-)?user))\s*['\"]?[^\s:'\"]+:{VALUE}"),
    ("{name}", rf"(?P<name>\blftp\s(?:[^|;&]*\s)?(?:-u|--user))[=\s]*['\"]?[^\s,'\"]+,{VALUE}"),
    ("{name}", rf"(?P<name>\b(?:smb\w+|rpcclient)\s(?:[^|;&]*\s)?(?:-U|--user))[=\s]*['\"]?[^\s%'\"]+%{VALUE}"),
    ("{name}", rf"(?P<name>\bsshpass\s+-p)\s*{VALUE}"),
    ("{name}", rf"(?P<name>\blogin\b[^|;&]*?\s-p)\s*{VALUE}"),  # docker, podman, az
    ("{name}", rf"(?P<name>\b(?:mysql|mysqldump|mariadb)\s(?:[^|;&]*\s)?-p)(?!\s|$){VALUE}"),
    ("a private key", r"(?P<value>-----BEGIN [A-Z ]*PRIVATE KEY)"),
    ("a token", rf"(?P<value>{TOKENS.pattern})"),
)  # fmt: skip
PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in KINDS)


def found(line: str) -> str | None:
    """What in this line of shell looks like a secret, without the secret; None where nothing does.

    A value that the shell fills in, as in `--token $HF_TOKEN`, is none.
    """
    line = PASSING.sub("", line)
    for kind, pattern in PATTERNS:
        for match in pattern.finditer(line):
            told = match.groupdict()
            name = (told.get("name") or "").strip()
            if not REFERENCE.fullmatch(told["value"].strip()) and not _harmless(name):
                return kind.format(name=" ".join(name.split()))
    return None


def _harmless(name: str) -> bool:
    return HARMLESS.search(name) is not None
