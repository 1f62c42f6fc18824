"""What is measured on a model: one function per measure class, each giving values by protocol key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import rates, spec
from experiments.data import corpora, tokens
from experiments.data.tokens import Tokenizer
from experiments.measures import asked, zero_shot
from experiments.measures.zero_shot import Values
from pruners.lazy import Tensor
from pruners.run import ranks

Progress = Callable[[int, int], None]
WHOLE_TEST_SET_TOKENS = 300_000
TASK_DOCUMENTS, DOCUMENT_TOKENS = 3_000, 200  # of a usual task, all choices together
GROUPS = {"mmlu": (57, 14_042)}  # tasks and documents
GSM8K_PROBLEMS = 1_319
STEP_TOKENS = 20  # decoding one token takes about as long as a prefill of so many


@dataclass(frozen=True)
class Subject:
    """The model under measurement, how to run it and where to keep its answers; nothing here moves a number.

    `identity` tells the model from any other, as `models.identity` does.
    """

    model: Any
    tokenizer: Tokenizer
    batch_size: int
    data_dir: Path | None
    place: zero_shot.Place
    identity: Mapping[str, str] = field(default_factory=dict)


def measure(what: Any, subject: Subject, progress: Progress | None = None) -> Values:
    """Values by protocol key, plain JSON; TypeError for a measure nobody knows."""
    kind = _kind(what)
    if kind.shared:
        return kind.measure(what, subject, progress)
    return ranks.here().first(lambda: kind.measure(what, subject, progress))


def work_tokens(what: Any) -> int:
    """Roughly how many tokens go through the model, for estimates of the time left."""
    return _kind(what).work(what)


def code_of(what: Any) -> tuple[str, ...]:
    """The modules that compute a measure."""
    return _kind(what).code


def corpora_of(what: Any) -> list[str]:
    """The corpora that a measure reads, by name."""
    return list(getattr(what, "corpora", ())) or ([what.corpus] if hasattr(what, "corpus") else [])


def lacking(measured: Mapping[str, Mapping[str, Any]], data_dir: Path | None) -> bool:
    """Whether something that a finished cell could not be measured on is here now."""
    return any(zero_shot.obtainable(value, data_dir) for value in measured.values())


def missing(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The tasks that a record lacks, each with the reason."""
    return {task: about["reason"] for value in measured.values() for task, about in value.get("missing", {}).items()}


def _perplexity(what: spec.Perplexity, subject: Subject, progress: Progress | None) -> Values:
    from eval.intervals import perplexity_interval
    from eval.perplexity import perplexity

    stream = tokens.stream(what.corpus, subject.tokenizer, subject.data_dir)
    if what.limit:
        stream = _head(stream, what)
    result = perplexity(subject.model, stream, what.window, batch_size=subject.batch_size, progress=progress)
    interval = perplexity_interval(result.nll_per_window)
    return {
        what.key: {
            "perplexity": result.perplexity,
            "standard_error": result.standard_error,
            "low": interval.low,
            "high": interval.high,
            "windows": result.windows,
            "tokens": result.tokens,
            "token_sha256": result.token_sha256,
            "nll_per_window": list(result.nll_per_window),
        }
    }


def _head(stream: Tensor, what: spec.Perplexity) -> Tensor:
    assert what.limit is not None
    wanted = what.limit * what.window
    if len(stream) < wanted:
        raise ValueError(
            f"{what.key} needs {wanted:,} tokens and {what.corpus} has {len(stream):,}; use at most "
            f"{len(stream) // what.window} windows."
        )
    return stream[:wanted]


def _zero_shot(what: spec.ZeroShot, subject: Subject, progress: Progress | None) -> Values:
    return zero_shot.measure(
        what, subject.model, subject.tokenizer.inner, subject.data_dir, subject.place, progress=progress
    )


def _efficiency(what: spec.Efficiency, subject: Subject, progress: Progress | None) -> Values:
    """The counts, and the first shape's medians beside them for the table's columns."""
    from eval import semi_structured
    from eval.efficiency import efficiency

    found = efficiency(
        subject.model, what.batch_sizes, what.lengths, what.new_tokens, what.repetitions, progress=progress
    )
    runs = found.get("timing", {}).get("runs", [])
    bound = {"decode_bound_s": found["timing"]["decode_bound_s"]} if runs else {}
    first = {stage: runs[0][f"{stage}_s"] for stage in ("prefill", "decode")} if runs else {}
    medians = {f"{stage}_s": spread["median"] for stage, spread in first.items()}
    quartiles = {f"{stage}_{q}_s": spread[q] for stage, spread in first.items() for q in ("q1", "q3")}
    if runs:
        to_bound = runs[0]["decode_to_bound"]
        medians["decode_to_bound"] = to_bound["median"]
        medians["tokens_per_second"] = what.batch_sizes[0] / medians["decode_s"]
        quartiles |= {f"decode_to_bound_{q}": to_bound[q] for q in ("q1", "q3")}
    sparse = {"semi_structured": semi_structured.probe(subject.model)} if what.semi_structured else {}
    return {what.key: {**found, **medians, **quartiles, **bound, **sparse}}


def _generation(what: spec.Generation, subject: Subject, progress: Progress | None) -> Values:
    from eval.generation import Sampling, generate

    model, tokenizer = subject.model, subject.tokenizer.inner
    sampling = Sampling(seed=what.seed)
    rows = [c.to_dict() for c in generate(model, tokenizer, new_tokens=what.new_tokens, sampling=sampling,
                                          progress=progress)]  # fmt: skip
    return {what.key: {**{name: _mean(rows, name) for name in ("distinct_2", "repeated_4")}, "continuations": rows}}


def _mask_patterns(what: spec.MaskPatterns, subject: Subject, progress: Progress | None) -> Values:
    from eval.patterns import mask_patterns

    return {what.key: mask_patterns(subject.model, what.block)}


def _open_answers(what: asked.OpenAnswers, subject: Subject, progress: Progress | None) -> Values:
    from eval.greedy import solved

    problems = list(corpora.records(what.problems, subject.data_dir)[: what.limit])
    examples = list(corpora.records(what.solved, subject.data_dir)[: what.examples]) if what.examples else []
    return {what.key: solved(subject.model, subject.tokenizer.inner, problems, examples, what.new_tokens, progress)}


def _open_answers_work(what: asked.OpenAnswers) -> int:
    problems = min(what.limit or GSM8K_PROBLEMS, GSM8K_PROBLEMS)
    return problems * (DOCUMENT_TOKENS * (1 + what.examples) + STEP_TOKENS * what.new_tokens)


def _unmeasured(what: Any, subject: Subject, progress: Progress | None) -> Values:
    raise TypeError(
        f"{what.key} cannot be measured on a finished model; experiments.run measures it while it makes the cell."
    )


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return fmean(known) if known else None


def _perplexity_work(what: spec.Perplexity) -> int:
    return what.window * what.limit if what.limit else WHOLE_TEST_SET_TOKENS


def _zero_shot_work(what: spec.ZeroShot) -> int:
    """Takes an example in the prompt to be as long as a document with all its choices, which is rather long."""
    documents = sum(_documents(task, what.limit) for task in dict(what.metrics))
    return documents * DOCUMENT_TOKENS * (1 + what.examples)


def _documents(task: str, limit: int | None) -> int:
    tasks, documents = GROUPS.get(task, (1, TASK_DOCUMENTS))
    return min(tasks * limit, documents) if limit else documents


def _efficiency_work(what: spec.Efficiency) -> int:
    shapes = [
        batch * (2 * length + STEP_TOKENS * what.new_tokens) for batch in what.batch_sizes for length in what.lengths
    ]
    return (what.repetitions + 2) * sum(shapes)


def _generation_work(what: spec.Generation) -> int:
    return 8 * STEP_TOKENS * what.new_tokens


@dataclass(frozen=True)
class Kind:
    """How a class of measures is taken, its rough work in tokens, and the modules that compute it; `shared` where the
    ranks of a launch take it together, else rank 0 does alone."""

    measure: Callable[[Any, Subject, Progress | None], Values]
    work: Callable[[Any], int]
    code: tuple[str, ...]
    shared: bool = False


KINDS = {
    spec.Perplexity: Kind(_perplexity, _perplexity_work, ("eval.perplexity", "eval.intervals"), shared=True),
    spec.ZeroShot: Kind(_zero_shot, _zero_shot_work, ("eval.zero_shot",), shared=True),
    spec.Efficiency: Kind(_efficiency, _efficiency_work, ("eval.efficiency", "eval.semi_structured")),
    spec.Generation: Kind(_generation, _generation_work, ("eval.generation",), shared=True),
    spec.MaskPatterns: Kind(_mask_patterns, lambda what: 0, ("eval.patterns",)),
    asked.OpenAnswers: Kind(_open_answers, _open_answers_work, ("eval.greedy",), shared=True),
    asked.DenseAnswers: Kind(_unmeasured, lambda what: 32 * STEP_TOKENS * what.new_tokens, ("eval.greedy",)),
    asked.MaskSample: Kind(_unmeasured, lambda what: 0, ("eval.mask_sample",)),
    asked.Costs: Kind(_unmeasured, lambda what: 0, ()),
    rates.RateGrid: Kind(_unmeasured, lambda what: 0, ("pruners.retrain.rates",)),
}


def _kind(what: Any) -> Kind:
    try:
        return KINDS[type(what)]
    except KeyError:
        raise TypeError(f"{what!r} is not a measure; known are {[kind.__name__ for kind in KINDS]}.") from None
