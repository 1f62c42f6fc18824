"""Times evaluation on the embedded model against the plain ways of doing it, in the same run.

    python -m tests.bench_eval --data-dir FOLDER     about four minutes on two cores

Perplexity: tokens/s against a loop over windows, one at a time, with the window's logits held.  Zero-shot: documents/s
against lm-eval called directly with batch size 1, on the same documents.  FOLDER holds `tasks/`; without it the tasks
come from the Hub.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tabulate import tabulate

from eval.perplexity import perplexity
from eval.tasks import load
from eval.zero_shot import zero_shot
from experiments import models, protocols
from experiments.data import corpora
from experiments.measures import zero_shot as measure

MODEL, CORPUS, WINDOW, WINDOWS = "smollm2-135m", "embedded/wiki", 512, 8
DOCUMENTS = 10  # of each task
REPEATS = 3  # the fastest counts


def plain_perplexity(model: Any, tokens: torch.Tensor) -> float:
    losses = []
    with torch.no_grad():
        for window in tokens.view(WINDOWS, WINDOW):
            losses.append(model(window[None], labels=window[None], use_cache=False).loss.double())
    return float(torch.stack(losses).mean().exp())


def plain_zero_shot(model: Any, tokenizer: Any, sources: dict[str, Any]) -> dict[str, float]:
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    tasks = {name: task for group in load(sources)[0].values() for name, task in group.items()}
    found = evaluate(scorer, {"tasks": tasks}, limit=DOCUMENTS, bootstrap_iters=0)
    return {task: found["results"][task]["acc,none"] for task in sources}


def fastest(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of several runs, and what the last one gave."""
    times, result = [], None
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    sources, missing = measure.documents(dict(protocols.zero_shot("llm_pruner").metrics), parser.parse_args().data_dir)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = models.load(MODEL)
    tokens = corpora.token_ids(CORPUS, tokenizer)[: WINDOWS * WINDOW]
    rows = [("perplexity, tokens/s", tokens.numel(), *_perplexities(model, tokens))]
    if sources:
        documents = DOCUMENTS * len(sources)
        rows.append(("zero-shot, documents/s", documents, *_zero_shots(model, tokenizer, sources)))
    table = [(name, work / plain, work / ours, plain / ours) for name, work, plain, ours in rows]
    print(f"{MODEL}, {torch.get_num_threads()} threads, fastest of {REPEATS}")
    print(tabulate(table, ("", "plain", "here", "times faster"), floatfmt=".2f"))
    print("\n".join(f"{task}: {entry['reason']}" for task, entry in missing.items()))


def _perplexities(model: Any, tokens: torch.Tensor) -> tuple[float, float]:
    plain_s, plain = fastest(lambda: plain_perplexity(model, tokens))
    ours_s, ours = fastest(lambda: perplexity(model, tokens, WINDOW))
    assert abs(plain - ours.perplexity) < 1e-3 * plain, (plain, ours)
    return plain_s, ours_s


def _zero_shots(model: Any, tokenizer: Any, sources: dict[str, Any]) -> tuple[float, float]:
    load(sources)  # reads lm-eval's index and makes the documents' caches: work that both ways would do once
    plain_s, plain = fastest(lambda: plain_zero_shot(model, tokenizer, sources))
    ours_s, ours = fastest(lambda: zero_shot(model, tokenizer, sources, limit=DOCUMENTS))
    assert plain == {task: ours.tasks[task].metrics["acc"] for task in sources}
    return plain_s, ours_s


if __name__ == "__main__":
    main()
