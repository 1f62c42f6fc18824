"""A dataclass's fields as options of a command line, by tyro: names, types, defaults and help are the class's own."""

from __future__ import annotations

import inspect
import io
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Annotated, Any

import tyro

from experiments.own import meanings
from pruners.interface.checks import Rule
from pruners.interface.suggest import UsageError, unknown

Options = dict[str, Any]


def parse(
    kind: type[Any],
    words: Sequence[str],
    what: str,
    *,
    skip: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    otherwise: Mapping[str, Any] | None = None,
) -> tuple[Options, list[str]]:
    """The fields that the words give, by name, and the words that are none of its options.

    `skip` are fields that are no options, `names` other names for some, `otherwise` defaults that are not the class's.
    UsageError for a value that is of no such type or out of range; `what` names the thing whose options they are.
    """
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            form = _form(kind, skip, names or {}, otherwise or {})
            made, rest = tyro.cli(form, args=list(words), return_unknown_args=True, prog=what)
    except SystemExit:
        raise UsageError(f"{what}: {_first_sentence(told.getvalue())}") from None
    given = {f.name: getattr(made, f.name) for f in fields(made)}
    hints = typing.get_type_hints(kind, include_extras=True)
    try:
        for name, value in given.items():
            if value is not None and (rules := _rules(hints[name])):
                rules[0].checked(f"--{_called(name, names or {})}", value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what}: {error}") from None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}, rest


def help_of(
    kind: type[Any],
    what: str,
    *,
    skip: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    otherwise: Mapping[str, Any] | None = None,
) -> str:
    """What the class says of itself and of each option."""
    told = io.StringIO()
    with redirect_stdout(told), suppress(SystemExit):
        tyro.cli(_form(kind, skip, names or {}, otherwise or {}), args=["--help"], prog=what)
    return told.getvalue()


def refuse(rest: Sequence[str], known: Mapping[str, Sequence[str]]) -> None:
    """UsageError for the first word that nobody knows; `known` maps what has options to its options' names."""
    if not rest:
        return
    asked, every = rest[0].partition("=")[0], {f"--{name}": what for what, names in known.items() for name in names}
    if not asked.startswith("--"):
        raise UsageError(f"{rest[0]!r} does not belong to any option; see --help.")
    raise UsageError(unknown(f"option of {' or '.join(known)}", asked, every))


def names_of(kind: type[Any], *, skip: Collection[str] = (), names: Mapping[str, str] | None = None) -> list[str]:
    return [_called(f.name, names or {}) for f in fields(kind) if f.name not in skip]


def in_options(message: str, kind: type[Any], names: Mapping[str, str]) -> str:
    """What the class says of its fields, `granularity='block'` or `batch_size`, as options."""

    def told(found: re.Match[str]) -> str:
        name, _, given = found[0].partition("=")
        if name not in {f.name for f in fields(kind)}:
            return found[0].removesuffix("=")
        value = "" if given == "True" else given.strip("'")
        return f"--{_called(name, names)} {value}".rstrip()

    return re.sub(r"\b(?:[a-z]+(?:_[a-z]+)+\b|[a-z]+(?==))(?:=(?:'\w+'|\w+(?:\.\w+)?)?)?", told, message)


def _called(name: str, names: Mapping[str, str]) -> str:
    return names.get(name, name.replace("_", "-"))


def _filled_in(kind: type[Any]) -> dict[str, str]:
    """The default, in words, of fields that are None until the class fills them in by what the others say."""
    if any(f.default is MISSING and f.default_factory is MISSING for f in fields(kind)):
        return {}
    made = kind()
    filled = {f.name: getattr(made, f.name) for f in fields(kind) if f.default is None}
    return {
        name: f"(default: {value}, or what another option implies)"
        for name, value in filled.items()
        if value is not None
    }


def _form(kind: type[Any], skip: Collection[str], names: Mapping[str, str], otherwise: Mapping[str, Any]) -> type[Any]:
    """A class of the same fields without the project's rules, which the real class applies afterwards."""
    hints, filled_in = typing.get_type_hints(kind, include_extras=True), _filled_in(kind)
    defaults = {f.name: otherwise.get(f.name, f.default) for f in fields(kind) if f.name not in skip}
    made: Any = make_dataclass(
        kind.__name__,
        [
            (name, _option(kind, name, hints[name], names.get(name), filled_in.get(name)), _default(defaults[name]))
            for name in sorted(defaults, key=lambda name: defaults[name] is not MISSING)
        ],
    )
    own = (sys.modules[kind.__module__].__doc__, kind.__doc__ if _is_said(kind) else None)
    said = [meanings.ABOUT[kind]] if kind in meanings.ABOUT else own
    made.__doc__ = "\n\n".join(inspect.cleandoc(text) for text in said if text)
    return made


def _option(kind: type[Any], field_name: str, hint: Any, name: str | None, default: str | None) -> Any:
    about = meanings.of(kind, field_name) or _words(hint)
    return Annotated[_plain(hint), tyro.conf.arg(name=name, help=about, help_behavior_hint=default)]


def _is_said(kind: type[Any]) -> bool:
    """Whether the class has words of its own; a dataclass without gets its signature."""
    return bool(kind.__doc__) and not str(kind.__doc__).startswith(f"{kind.__name__}(")


def _default(value: Any) -> Any:
    return field() if value is MISSING else field(default=value)


def _plain(hint: Any) -> Any:
    """The type without rules."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _plain(inner[0])
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_plain(part) for part in inner)]  # noqa: UP007  (made at run time)
    return hint


def _words(hint: Any) -> str:
    """What the rule of a field says."""
    found = [rule for rule in _rules(hint) if rule.words]
    return found[0].words if found else ""


def _rules(hint: Any) -> list[Rule]:
    own = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Rule)]
    return own + [rule for part in typing.get_args(hint) for rule in _rules(part) if not isinstance(part, Rule)]


def _first_sentence(box: str) -> str:
    """Of tyro's framed complaint, whose title stands in the frame, or above a line of dashes without UTF-8."""
    blocks: list[list[str]] = [[]]
    for line in (line.strip("│| ").strip() for line in box.splitlines()):
        if not line or set(line) <= set("─╭╮╰╯- ") or line.startswith(("╭", "╰")):
            blocks.append([])
        else:
            blocks[-1].append(line)
    said = [" ".join(block) for block in blocks if block] or ["these words are not understood"]
    return _in_words(re.sub(r"\{None\}\|", "", next((text for text in said if ":" in text), said[0])))


def _in_words(complaint: str) -> str:
    """What is no number, without the words of tyro's own machinery."""
    kinds = {
        r"no type matching FLOAT .*instantiated from \[(?:'(.*)'|\"(.*)\")\]\.?": "a number, such as 0.5",
        r"could not convert string to float: '(.*)'": "a number, such as 0.5",
        r"invalid literal for int\(\) with base 10: '(.*)'": "a whole number",
        r"Could not find valid parse for arguments: \[(.*)\]": "several numbers",
    }
    for form, kind in kinds.items():
        if found := re.fullmatch(rf"Error parsing (--\S+): {form}", complaint):
            option, *given = filter(None, found.groups())
            return f"{option} is {kind}; got {''.join(given)!r}."
    return complaint
