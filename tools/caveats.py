"""Why a published cell cannot be compared with ours (`caveat`), and what a reader of it should know (`note`)."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def caveat(paper: str, table: str, row: Row) -> str:
    """Empty where the cell can be compared."""
    method, metric, source = row["method"], row["metric"], row["source"]
    reasons = {
        "FLAP copied it from LLM-Pruner's paper": "quoted" in method,
        "LLM-Pruner copied it from LLaMA's paper, which prompts otherwise": "numbers of the LLaMA paper" in method,
        "superseded: of the first arXiv version": "superseded" in row["table"],
        "the paper states neither ratio nor importance": paper == "llm_pruner" and table == "table 7",
        "it equals neither tuned row of table 16": paper == "llm_pruner"
        and table == "table 8"
        and method == "LLM-Pruner",
        "its accuracies are of step 200 and its perplexity of another": _mixed(paper, table, row),
        "4.10 elsewhere: a slip": "4.77" in source and row["value"] == "4.77",
        "magnitude on OPT differs between the papers": "magnitude cells disagree" in source and method == "Magnitude",
        "time and memory belong to the paper's machine": metric in _HARDWARE
        or (metric == "GPU memory" and paper != "llm_pruner"),
        "the paper gives its parameters alone, neither importance nor blocks": paper == "llm_pruner"
        and table == "table 9"
        and "LLM-Pruner" in method
        and metric != "#params",
        "no released code prunes ChatGLM's heads or names its blocks: here MLPs of all blocks": paper == "llm_pruner"
        and table == "table 5"
        and "Dense" not in method,
        "neither its batch size nor its alpha is known here": paper == "wanda"
        and table == "table 6"
        and "LoRA" in method,
        "another group's rerun, not of the paper": paper == "reruns" or "user reproduction" in source,
        "the window is not known": "perplexity" in metric and row["seq_len"] in ("", "unknown"),
        "a setting is presumed": "presumed" in row["setting"] and paper != "gblm",
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def note(paper: str, table: str, row: Row) -> str:
    dataset, source = row["dataset"], row["source"]
    facts = {
        "the paper says validation split, its code reads test": "code: test split" in dataset,
        "the model is presumed": "presumed" in row["model"],
        "the norm is presumed to be l1": "norm not stated" in source or row["method"] == "GBLM-Pruner",
        "printed in units of 1024^3": "1024^3" in row["unit"],
        "FLAP prints 10.81 and LLM-Pruner 11.58 for one model": row["value"] in ("10.81", "11.58"),
        "the harness of 2023 tokenised prompt and answer apart": paper in ("llm_pruner", "flap") and row["unit"] == "%",
        "FLAP prints 37.18 and LLM-Pruner 37.12 for one cell": "37.18" in row["value"],
        "acc_norm is inferred from the dense mean": paper == "gblm" and row["unit"] == "%",
        "neither its prompt nor how it weights the subjects is known here": paper == "wanda" and "MMLU" in dataset,
        "allocated after loading, 32 to 144 MiB more than 2 bytes a parameter": row["metric"] == "GPU memory"
        and paper == "llm_pruner",
        "neither the prompt's length nor the number of new tokens is known here": paper == "flap"
        and row["metric"] == "inference speed",
        "calibrated on C4, FLAP on WikiText-2": paper == "flap" and row["method"] == "Wanda-sp",
    }
    return "; ".join(fact for fact, holds in facts.items() if holds)


_HARDWARE = (
    "latency", "speedup", "inference speed", "wall-clock", "pruning time", "recovery time", "metric time",
    "running memory", "weight memory",
)  # fmt: skip


def _mixed(paper: str, table: str, row: Row) -> bool:
    tuned = row["method"] == "Element^1 (Block)" and "w/ LoRA" in row["setting"]
    return paper == "llm_pruner" and table == "table 1" and tuned
