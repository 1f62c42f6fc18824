"""Makes analysis/published/*.csv, the papers' own values as tidy tables, from a folder of transcribed ones.

    python -m tools.import_published FOLDER

FOLDER holds flap.csv, gblm_pruner.csv, perp.csv, llm_pruner.csv, wanda.csv, sparsegpt.csv and reruns_by_others.csv
with the columns of SOURCE, each cell as its source prints it.  Names of models, settings and protocols become this
project's; values become base units (a count, a perplexity, a fraction) beside the half of their last printed digit.
What makes a cell unfit to be compared stands in `caveat`.  Nothing is added that FOLDER does not say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.published import FOLDER, Published, refuse_duplicates
from experiments.protocols import LARGE_LIMITS, TASK_SETS
from experiments.store import atomic
from tools.caveats import caveat, note

SOURCE = (
    "paper", "table", "model", "method", "setting", "dataset", "metric", "value", "unit", "seq_len", "source",
    "confidence",
)  # fmt: skip
PAPERS = {
    "flap": "flap", "gblm_pruner": "gblm", "perp": "perp", "llm_pruner": "llm_pruner", "wanda": "wanda",
    "sparsegpt": "sparsegpt", "reruns_by_others": "reruns",
}  # fmt: skip
MORE = "gblm_more"  # a second reading of some of GBLM-Pruner's cells, and reruns by others
TASKS = {"BoolQ": "boolq", "PIQA": "piqa", "RTE": "rte", "HellaSwag": "hellaswag", "WinoGrande": "winogrande",
         "ARC-e": "arc_easy", "ARC-c": "arc_challenge", "OBQA": "openbookqa"}  # fmt: skip
WORDS = {  # of LLM-Pruner, which names one method in many ways
    "Dense (own evaluation)": "Dense", "Block (Element^1)": "Element^1 (Block)", "Block": "Element^1 (Block)",
    "Channel (Element^1)": "Channel", "Taylor param_first": "Element^1 (Block)", "w/ dependency": "Element^1 (Block)",
    "ALL": "Element^1 (Block)", "LLM-Pruner": "Element^1 (Block)", "LLaMA-5.4B, Alpaca 50k": "Element^1 (Block)",
    "LLaMA-3B by LLM-Pruner, Alpaca-tuned": "Element^1 (Block), 3.6B parameters",
}  # fmt: skip
MEANS = ("Average-7", "BoolQ,RTE,HellaSwag,WinoGrande,ARC-e,OBQA", "BoolQ,RTE,HellaSwag,WinoGrande,ARC-e,ARC-c,OBQA")
UNITS = {"ppl": Decimal(1), "%": Decimal("0.01"), "B": Decimal(10**9), "G": Decimal(10**9), "MiB": Decimal(2**20),
         "MB": Decimal(10**6)}  # fmt: skip
GIBI = "looks like units of 1024^3"
METRICS = {"#params": "parameters", "#MACs": "macs", "GPU memory": "memory_bytes", "latency": "latency_s",
           "inference speed": "tokens_per_second", "trainable parameters": "trainable_share"}  # fmt: skip
EVIDENCE = {
    "high": "read in the source",
    "medium": "quoted elsewhere",
    "derived": "computed from public configurations",
}
LARGE = ("65b", "70b")
COUNTS = "efficiency"  # of one sequence of 64 tokens, as both papers count
SPEED = "efficiency@1x128+128"  # FLAP's table 4 says neither


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.publish", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", type=Path, default=FOLDER, help="default: analysis/published")
    asked = parser.parse_args(arguments)
    for source, paper in PAPERS.items():
        text = tidy(asked.folder / f"{source}.csv", paper, asked.folder / f"{MORE}.csv").to_csv(index=False)
        atomic.write(asked.target / f"{paper}.csv", text)
    return 0


def tidy(path: Path, paper: str, more: Path | None = None) -> pd.DataFrame:
    """One published table; raises ValueError for columns that SOURCE does not have and for a cell that occurs twice.

    A cell of GBLM-Pruner that `more` confirms has the table, model and source that are told there; what it tells of
    others' reruns stands among those.
    """
    rows = _rows(path)
    if more and paper in ("gblm", "reruns"):
        rows = [*_confirmed(rows, _rows(more))] if paper == "gblm" else [*rows, *_reruns(_rows(more))]
    cells = [_cell(row, paper) for row in rows]
    refuse_duplicates(cells, path)
    return pd.DataFrame([asdict(cell) for cell in cells])


def _rows(path: Path) -> list[dict[Any, Any]]:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(frame.columns) != SOURCE:
        raise ValueError(f"{path} has the columns {', '.join(frame.columns)}; expected {', '.join(SOURCE)}.")
    return frame.to_dict("records")


def _reruns(more: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
    return [row for row in more if "rerun" in row["paper"]]


def _confirmed(rows: list[dict[Any, Any]], more: list[dict[Any, Any]]) -> Iterator[dict[Any, Any]]:
    """With the table, model and source that a second reading tells of a value; ValueError where that has no cell."""
    second = {row["value"]: row for row in more if row not in _reruns(more)}
    for row in rows:
        found = second.pop(row["value"], None) if row["table"].startswith("Table 4") else None
        told = {name: found[name] for name in ("table", "model", "setting", "seq_len")} if found else {}
        yield {**row, **told, **({"source": f"{row['source']}; {found['source']}"} if found else {})}
    if second:
        raise ValueError(f"No cell of Table 4 has the values {', '.join(second)} that {MORE}.csv confirms.")


def _cell(row: dict[Any, Any], paper: str) -> Published:
    model, method, table = _model(row["model"]), _method(row["method"], paper), _table(row["table"])
    value, rounding = _value(row["value"], row["unit"])
    return Published(
        paper=paper,
        table=table,
        model=model,
        method=method,
        setting=_setting(row["setting"]),
        dataset=row["dataset"],
        metric=_metric(row, paper),
        value=value,
        rounding=rounding,
        printed=f"{row['value']} {row['unit']}".strip(),
        protocol=_protocol(row, paper, model),
        source=row["source"],
        evidence=EVIDENCE[row["confidence"]],
        caveat=caveat(paper, table, row),
        note=note(paper, table, row),
    )


def _table(text: str) -> str:
    """`table 1` of `Table 1 (LLaMA-7B, 20%)`; the words themselves where they name no table, or a superseded one."""
    found = re.match(r"Table (\d+)\b(?! of arXiv v1)(?! \(context)", text)
    if text.startswith("repo more_results"):
        return "more results"
    return f"table {found[1]}" if found else text


def _model(text: str) -> str:
    name = re.sub(r" \((?:presumed|lmsys/vicuna-7b-delta-v0)\)$", "", text).lower().replace("llama-1-", "llama-")
    name = re.sub(r"^llama-3b by llm-pruner.*", "llama-7b", name)  # what it was pruned from
    name = re.sub(r"^vicuna-7b$", "vicuna-7b-v0", name)  # the catalogue's vicuna-7b is v1.3
    name = re.sub(r"^stablelm-3b \((.*)\), alpaca-tuned$", r"\1", name)
    return name.replace("tinyllama_v1.1", "tinyllama-1.1b").replace("llama-7b / vicuna-7b", "llama-7b")


def _method(text: str, paper: str) -> str:
    text = re.sub(r" \((?:quoted from|as quoted by).*\)$|, as quoted by FLAP\)", "", text)
    text = re.sub(r"\*? \(w/ LoRA$", "", text)
    text = re.sub(r", LoRA step \d+$", "", text)
    if paper == "gblm" and text == "GBLM-Pruner":
        return "GBLM-Pruner (l1)"
    return WORDS.get(text, text) if paper == "llm_pruner" else text


def _setting(text: str) -> str:
    """`20 %`, `20 %, tuned`, `2:4`, `50 %, group (output,1)`; empty for dense."""
    text = re.sub(r"^0%(?: pruned, no tuning)?$|^-$", "", text)
    text = re.sub(
        r"^unstructured |^per-output-row comparison, unstructured |; alpha swept.*$|, LLaMA-2-7B presumed.*$", "", text
    )
    text = re.sub(
        r" of parameters(?=,)|, no tuning|, bias compensation|(?<=%) pruned|, w/o tune| \(presumed\)", "", text
    )
    text = re.sub(r", (?:w/ (?:LoRA )?tune|LoRA-tuned)$", ", tuned", text)
    text = re.sub(r"^Alpaca LoRA tune$", "tuned", text)
    text = re.sub(r"^pruned to 8[0-9.]+% of parameters$|^25% groups$", "25% of the groups", text)
    text = re.sub(r"^pruning ratio and importance not stated in the table$", "not stated; 20% here", text)
    return re.sub(r"(\d)%", r"\1 %", text).replace("comparison group", "group")


def _metric(row: dict[str, Any], paper: str) -> str:
    metric = row["metric"]
    if "accuracy" in metric or metric in ("acc", "acc_norm"):
        return "score"
    if paper == "llm_pruner" and metric == "GPU memory":  # of the model after loading
        return "weight_bytes"
    metric = re.sub(r" \((minimum|maximum) of 5\)", r", \1 of 5 seeds", metric)
    return METRICS.get(metric, re.sub(r" (mean|std) over 5 seeds", r", \1 of 5 seeds", metric))


def _protocol(row: dict[str, Any], paper: str, model: str) -> str:
    """The key that this project gives the measurement; empty where the source does not say enough for one."""
    if _metric(row, paper) == "score":
        return _accuracy_key(row, paper, model)
    if row["metric"] in ("#params", "#MACs") or _metric(row, paper) == "weight_bytes":
        return COUNTS
    if row["metric"] == "inference speed" and paper == "flap":
        return SPEED
    window = re.match(r"\d+", row["seq_len"])
    if not row["metric"].startswith("perplexity") or not window:
        return ""
    return f"{_corpus(row['dataset'], paper)}@{window[0]}" + ("[:256]" if row["dataset"].startswith("C4") else "")


def _corpus(dataset: str, paper: str) -> str:
    if dataset.startswith("C4"):
        return "c4/validation"
    if dataset == "PTB":
        return "ptb/test" if paper == "sparsegpt" else "ptb/validation"
    return "wikitext2/test"


def _accuracy_key(row: dict[str, Any], paper: str, model: str) -> str:
    limit = LARGE_LIMITS.get(paper) if model.endswith(LARGE) else None
    head = f"[:{limit}]" if limit else ""
    if model == "chatglm-6b":
        head = "+marks"
    metric = "acc_norm" if row["metric"] == "acc_norm" else "acc"
    if few_shot := re.fullmatch(r"MMLU (\d+)-shot", row["dataset"]):
        return f"mmlu.{metric}@{few_shot[1]}shot{head}"
    if row["dataset"] in TASKS:
        return f"{TASKS[row['dataset']]}.{metric}@0shot{head}"
    if row["dataset"] == "Average-6":
        return f"mean.{paper}_chatglm@0shot{head}"
    whole = (
        row["dataset"] in ("Average-7", "BoolQ,RTE,HellaSwag,WinoGrande,ARC-e,OBQA") or row["dataset"].count(",") == 6
    )
    return f"mean.{paper}@0shot{head}" if whole and paper in TASK_SETS else ""


def _value(printed: str, unit: str) -> tuple[float | None, float | None]:
    """Value and half of its last digit in base units; None where a range or words are printed."""
    try:
        number = Decimal(printed)
    except InvalidOperation:
        return None, None
    if not number.is_finite():
        return None, None
    scale = Decimal(2**30) if GIBI in unit else UNITS.get(unit.removesuffix(" of parameters"), Decimal(1))
    exponent = number.as_tuple().exponent
    half = Decimal(5).scaleb(int(exponent) - 1)
    return float(number * scale), float(half * scale)


if __name__ == "__main__":
    sys.exit(main())
