"""Times evaluation on the embedded model against the plain ways of doing it, in the same run.

    python -m tests.bench_eval [--data-dir FOLDER] [--documents N]     about ten minutes on one core

Perplexity: tokens/s against a loop over windows, one at a time, with the window's logits held.  Zero-shot: documents
per CPU second of requests that share what they begin with, beside every request by itself and lm-eval's
`simple_evaluate` at batch 1 and 8, by turns on the same documents.  FOLDER (default: $PRUNING_DATA_DIR) holds `tasks/`;
without one the tasks come from the Hub.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tabulate import tabulate

from eval.perplexity import perplexity
from eval.tasks import load, task_manager
from eval.zero_shot import zero_shot
from experiments import models, protocols
from experiments.data import corpora
from experiments.measures import zero_shot as measure
from tests.bench import made_by

MODEL, CORPUS, WINDOW, WINDOWS = "smollm2-135m", "embedded/wiki", 512, 8
DOCUMENTS = 10  # of each task
REPEATS = 3  # perplexity: the fastest counts; zero-shot: the median of the ratios of each turn


Answers = dict[tuple[str, int], tuple[list[float], float]]  # log-likelihoods and accuracy by task and document


def plain_perplexity(model: Any, tokens: torch.Tensor) -> float:
    losses = []
    with torch.no_grad():
        for window in tokens.view(WINDOWS, WINDOW):
            losses.append(model(window[None], labels=window[None], use_cache=False).loss.double())
    return float(torch.stack(losses).mean().exp())


def plain_zero_shot(model: Any, tokenizer: Any, sources: dict[str, Any], documents: int, batch: int) -> Answers:
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    tasks = [task for group in load(sources, limit=documents)[0].values() for task in group.values()]
    index = task_manager(next(iter(sources)))  # lm-eval's own of all its tasks takes ten seconds to read
    found = simple_evaluate(scorer, tasks=tasks, task_manager=index, limit=documents, bootstrap_iters=0)
    return {
        (task, sample["doc_id"]): ([nats for nats, _ in sample["filtered_resps"]], sample["acc"])
        for task in sources
        for sample in found["samples"][task]
    }


def our_zero_shot(model: Any, tokenizer: Any, sources: dict[str, Any], documents: int) -> Answers:
    found = zero_shot(model, tokenizer, sources, limit=documents)
    return {(row["task"], row["document"]): (row["answers"], row["acc"]) for row in found.samples}


def zero_shot_apart(*asked: Any) -> Answers:
    with mock.patch("eval.requests.sharing.why_apart", return_value="as before"):
        return our_zero_shot(*asked)


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
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of each task")
    parser.add_argument("--results", type=Path, default=Path("results/bench"))
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    sources, missing = measure.documents(dict(protocols.zero_shot("llm_pruner").metrics), args.data_dir)
    logging.disable(logging.WARNING)
    model, tokenizer = models.load(MODEL)
    tokens = corpora.token_ids(CORPUS, tokenizer)[: WINDOWS * WINDOW]
    print(f"{MODEL}, {torch.get_num_threads()} threads, {REPEATS} times", flush=True)
    plain_s, ours_s = _perplexities(model, tokens)
    kept: dict[str, Any] = {"model": MODEL, "threads": torch.get_num_threads(), "perplexity": plain_s / ours_s}
    row = ("perplexity, tokens/s", tokens.numel() / plain_s, tokens.numel() / ours_s, plain_s / ours_s)
    print(tabulate([row], ("", "plain", "here", "times faster"), floatfmt=".2f"), flush=True)
    if sources:
        told = _zero_shots(model, tokenizer, sources, args.documents)
        print(tabulate(told, ("zero-shot", "documents/CPU s", "here: times faster"), floatfmt=".2f"))
        kept |= {"documents": args.documents, "zero_shot": {name: ratio for name, _, ratio in told}}
    kept |= {"missing": list(missing), "made_by": made_by()}
    (args.results / "evaluation.json").write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join(f"{task}: {entry['reason']}" for task, entry in missing.items()))


def _perplexities(model: Any, tokens: torch.Tensor) -> tuple[float, float]:
    plain_s, plain = fastest(lambda: plain_perplexity(model, tokens))
    ours_s, ours = fastest(lambda: perplexity(model, tokens, WINDOW))
    assert abs(plain - ours.perplexity) < 1e-3 * plain, (plain, ours)
    return plain_s, ours_s


def _zero_shots(model: Any, tokenizer: Any, sources: dict[str, Any], documents: int) -> list[tuple[str, float, float]]:
    """By way of asking: documents per CPU second, and how many times that it is here, medians over the turns."""
    load(sources, limit=documents)  # reads lm-eval's index and makes the documents: work that all ways would do once
    ways: Mapping[str, Callable[..., Answers]] = {
        "here": our_zero_shot,
        "every request by itself": zero_shot_apart,
        "lm-eval, batch 1": partial(plain_zero_shot, batch=1),
        "lm-eval, batch 8": partial(plain_zero_shot, batch=8),
    }
    seconds = {name: REPEATS * [0.0] for name in ways}
    for turn, task in product(range(REPEATS), sources):
        found = {}
        for name, way in ways.items():
            start = time.process_time()
            found[name] = way(model, tokenizer, {task: sources[task]}, documents)
            seconds[name][turn] += time.process_time() - start
        for other in found.values():
            _check_equal(found["here"], other)
    ratios = {n: median(o / h for o, h in zip(each, seconds["here"], strict=True)) for n, each in seconds.items()}
    return [(name, documents * len(sources) / median(seconds[name]), ratios[name]) for name in ways]


def _check_equal(here: Answers, other: Answers) -> None:
    assert here.keys() == other.keys()
    for document, (nats, right) in here.items():
        assert right == other[document][1], document
        assert max(abs(a - b) for a, b in zip(nats, other[document][0], strict=True)) < 1e-4, document


if __name__ == "__main__":
    main()
