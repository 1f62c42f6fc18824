"""Generates the README's results, report and figures from the records that the repository keeps.

Those are of the embedded models: whatever else was run in this checkout moves nothing, so a test can say whether README
still tells what the records do.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from analysis.claims import statements
from analysis.compare import cells
from analysis.figures import perplexity
from analysis.pages import report
from analysis.rows import Row, declared
from analysis.tables import grid
from analysis.tables.grid import Pivot, Verdict
from analysis.tables.markdown import marked
from experiments.papers import TABLES, find
from experiments.store import atomic, records

KEPT = {"embedded.gblm": "GBLM-Pruner", "embedded.flap": "FLAP", "embedded.llm_pruner": "LLM-Pruner",
        "embedded.perp": "PERP"}  # fmt: skip
REHEARSAL = "embedded.demo"  # its records are of whoever runs it, and in no repository
FOLDER = "embedded"  # under results: the report and the figures
BEGIN, END = "<!-- results: by `python -m analysis readme`, not by hand -->", "<!-- end of results -->"
TABLES_BEGIN, TABLES_END = "<!-- tables: by `python -m analysis readme`, not by hand -->", "<!-- end of tables -->"
PAPERS = {"flap": "FLAP", "gblm": "GBLM-Pruner", "perp": "PERP", "llm_pruner": "LLM-Pruner",
          "baselines": "Wanda and SparseGPT", "embedded": "The embedded models"}  # fmt: skip
WORDS = {"holds": "hold", "holds so far": "hold so far", "fails": "fail", "undecided": "undecided"}
READING = (
    "Mean perplexity on SmolLM2-135M-Instruct (4-bit GGUF weights, widened; here in bfloat16, where `prune` and "
    "`compare` take its own format, float32), small enough for two CPU cores; lower is better. ± is half the 95 % "
    "interval of the mean over three seeds, of calibration or of whatever the method draws; without ± it is one run, "
    "because the method draws nothing. Bold: better than every other method by a 95 % interval of the "
    "paired difference, "
    "except the dense model. The papers' models are 20 to 500 times as large and lose less: compare directions, not "
    "values."
)
REPORT = "[The report]({}), one HTML page to download and open, shows the protocol and provenance of every number."
HEAD = "**{}:** {} (`{}`)"
NONE = "{}: no records yet; `python -m experiments run {}` makes them."
CLAIMS = """**{count} claims of the papers** (`python -m analysis claims`; the report lists each with its verdicts). By
the papers' own numbers: {printed}. By ours, where a comparison counts only if its
95 % interval leaves no doubt: {noisy}."""


def written(root: Path) -> dict[Path, str]:
    """Every file that this chore makes, with its text: README beside `root`, and those under `root`/embedded.

    Raises ValueError where README has no place for the results.
    """
    readme = root.parent / "README.md"
    with _kept(root) as place:
        found = {name: made for name in KEPT if (made := _rows(name, place))}
        told = _section(found, grid.judged(statements.CLAIMS, place), root.name)
        texts = {readme: replaced(readme, told, commands())}
        if found:
            texts[root / FOLDER / "report.html"] = report.html(place, Path(root.name))
    return {**texts, **{root / FOLDER / f"{name}.svg": _figure(name, made) for name, made in found.items()}}


def write(root: Path) -> list[Path]:
    made = written(root)
    for path, text in made.items():
        atomic.write(path, text)
    return list(made)


def commands() -> str:
    """By paper, what each of its tables is called here."""
    parts = []
    for prefix, paper in PAPERS.items():
        named = {name: table for name, table in TABLES.items() if name.partition(".")[0] == prefix}
        lines = [(table.title, f"`{name}`") for name, table in named.items()]
        frame = pd.DataFrame(lines, columns=["table", "NAME"])
        listed = marked(frame, pd.DataFrame(), ["table", "NAME"])
        parts.append(f"<details><summary>{paper}: {len(named)} tables</summary>\n\n{listed}\n\n</details>")
    return "\n\n".join(parts)


def replaced(readme: Path, told: str, tables: str) -> str:
    """README with these texts between their marks; ValueError unless each mark stands there once."""
    if not readme.is_file():
        raise ValueError(f"There is no {readme} for the results beside it; name the results folder of a checkout.")
    text = readme.read_text(encoding="utf-8")
    for begin, end, new in ((BEGIN, END, told), (TABLES_BEGIN, TABLES_END, f"{tables}\n")):
        if [text.count(mark) for mark in (begin, end)] != [1, 1]:
            raise ValueError(
                f"{readme} must have each of these lines once, around the generated parts: {begin} and {end}"
            )
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{new}\n{end}{rest.partition(end)[2]}"
    return text


@contextmanager
def _kept(root: Path) -> Iterator[Path]:
    """A results folder with the tables alone whose records the repository has."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "runs").mkdir()
        for table in TABLES:
            if table.startswith("embedded.") and table != REHEARSAL:
                records.folder(Path(name), table).symlink_to(records.folder(root, table).resolve())
        yield Path(name)


def _rows(name: str, root: Path) -> list[Row]:
    """Empty where nothing is done yet, failures or not."""
    table = find(name)
    made = declared(table, root, table.runs())
    return made if any(row.record for row in made) else []


def _section(found: dict[str, list[Row]], judged: Sequence[Verdict], folder: str) -> str:
    parts = [f"{READING} {REPORT.format(f'{folder}/{FOLDER}/report.html')}"] if found else []
    parts += [_table(name, found.get(name, []), folder) for name in KEPT]
    return "\n\n".join([*parts, _claims(judged)]) + "\n"


def _table(name: str, made: Sequence[Row], folder: str) -> str:
    table = find(name)
    head = HEAD.format(KEPT[name], table.title[0].lower() + table.title[1:], name)
    if not made:
        return NONE.format(head, name)
    pivots = grid.pivots(cells(table, made))
    shown = [_pivot(pivot) for pivot in pivots]
    under = f"{_protocols(pivots, made)}; {_calibration(made)}; {_origin(made)} [Figure]({folder}/{FOLDER}/{name}.svg)."
    return "\n\n".join([head, *shown, under])


def _pivot(pivot: Pivot) -> str:
    return marked(pivot.text(), pivot.bold())


def _protocols(pivots: Sequence[Pivot], made: Sequence[Row]) -> str:
    """E.g. 65,536 tokens as `embedded/wiki@512[:128]`."""
    tokens = {pivot.key: measured["tokens"] for pivot in pivots for row in made if (measured := row.measure(pivot.key))}
    return ", ".join(f"{count:,} tokens as `{key}`" for key, count in tokens.items())


def _calibration(made: Sequence[Row]) -> str:
    """E.g. calibrated on 16 x 256 tokens of embedded/c4."""
    texts = [row.run.windows for row in made if row.run.windows]
    return f"calibrated on {_listed(f'{text.count} x {text.length} tokens of {text.corpus}' for text in texts)}"


def _origin(made: Sequence[Row]) -> str:
    done = [row.record.made_by for row in made if row.record]
    dated = sum(row.is_dated for row in made)
    older = f", {dated} of them by an earlier version of the code" if dated else ""
    commits = _listed((by.commit or "no commit")[:10] + (" with changes" if by.dirty else "") for by in done)
    places = _listed(f"{by.dtype} on {by.device}, torch {by.packages['torch']}" for by in done)
    return f"{len(done)} of {len(made)} cells{older}; {places}; commit {commits}."


def _claims(judged: Sequence[Verdict]) -> str:
    return CLAIMS.format(
        count=len(judged),
        printed=_counts((one.paper.verdict for one in judged), "whose numbers are not at hand"),
        noisy=_counts((one.noisy.verdict for one in judged), "not run yet"),
    )


def _counts(verdicts: Iterable[str], otherwise: str) -> str:
    counted = Counter(verdicts)
    said = [f"{counted[verdict]} {words}" for verdict, words in WORDS.items() if counted[verdict]]
    said += [f"{counted['no numbers']} {otherwise}"] if counted["no numbers"] else []
    return ", ".join([*said, f"{counted['no cells']} without a cell here"] if counted["no cells"] else said)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _figure(name: str, made: Sequence[Row]) -> str:
    key = grid.pivots(cells(find(name), made))[0].key
    return report.svg(perplexity.perplexity(find(name), made, key))
