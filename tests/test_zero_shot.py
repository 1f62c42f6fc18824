"""lm-eval's tasks on local documents: against log-likelihoods worked out by hand, resumed, halved and refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pruners
from eval import json_lines
from eval import zero_shot as zs
from eval.answers import AnswerStore, read_samples, write_samples
from eval.scorer import Scorer, fingerprint
from experiments import models, protocols
from experiments.data import eval_tasks
from pruners.retrain.trainable import untie

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is absent")
SEVEN = tuple(dict(protocols.zero_shot("llm_pruner").metrics))


def sources(*tasks: str) -> dict:
    return {task: eval_tasks.changes(task, DATA) for task in tasks}


@pytest.fixture(scope="module")
def stories():
    folder = DATA / "models/stories260K/hf"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def seven(stories):
    return zs.zero_shot(*stories, sources(*SEVEN), limit=5)


def log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """Nats of `answer` after `prompt`, token by token in float64."""
    tokens, before = tokenizer.encode(prompt + answer), len(tokenizer.encode(prompt))
    with torch.no_grad():
        logs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logs[i - 1, tokens[i]]) for i in range(before, len(tokens)))


def test_all_seven_tasks_give_both_accuracies(seven):
    assert tuple(seven.tasks) == SEVEN
    assert seven.missing == {}
    for task in seven.tasks.values():
        assert task.documents == 5
        assert set(task.metrics) == set(task.standard_errors) == {"acc", "acc_norm"}
        assert task.metrics["acc"] == pytest.approx(sum(task.per_document["acc"]) / 5)


@pytest.mark.parametrize(("task", "file"), [("arc_easy", "arc_easy_test"), ("openbookqa", "openbookqa_test")])
def test_accuracy_equals_a_hand_computation(stories, seven, task, file):
    documents = [json.loads(line) for line in (DATA / f"tasks/{file}.jsonl").read_text().splitlines()[:5]]
    found = [sample for sample in seven.samples if sample["task"] == task]
    for document, sample in zip(documents, found, strict=True):
        prompt = document.get("question_stem") or f"Question: {document['question']}\nAnswer:"
        choices = document["choices"]["text"]
        nats = torch.tensor([log_likelihood(*stories, prompt, f" {choice}") for choice in choices])
        gold = document["choices"]["label"].index(document["answerKey"])
        assert sample["answers"] == pytest.approx(nats.tolist(), abs=2e-3)
        assert sample["acc"] == (nats.argmax() == gold)
        assert sample["acc_norm"] == ((nats / torch.tensor([len(c) for c in choices])).argmax() == gold)


def test_batching_moves_no_answer(stories, seven):
    one_by_one = zs.zero_shot(*stories, sources("piqa", "boolq"), limit=5, batch_size=1)
    packed = [sample for sample in seven.samples if sample["task"] in one_by_one.tasks]
    for sample, other in zip(sorted(packed, key=str), sorted(one_by_one.samples, key=str), strict=True):
        assert sample["answers"] == pytest.approx(other["answers"], abs=1e-4)
        assert {**sample, "answers": None} == {**other, "answers": None}
    assert one_by_one.apart == "a batch size of 1 was requested"
    assert seven.apart is None


def test_a_broken_off_evaluation_resumes_to_the_same_bits(stories, seven, tmp_path):
    def stop_after_half(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    asked: list[int] = []
    arguments = {"limit": 5, "resume": tmp_path / "answers.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        zs.zero_shot(*stories, sources(*SEVEN), **arguments, progress=stop_after_half)
    hook = stories[0].register_forward_hook(lambda module, inputs, output: asked.append(1))
    resumed = zs.zero_shot(*stories, sources(*SEVEN), **arguments)
    again = len(asked)
    hook.remove()
    assert resumed == seven
    assert resumed.samples == seven.samples
    stored = (tmp_path / "answers.jsonl").read_text().count("batch")
    assert 1 < again < 0.6 * stored + 3  # the fingerprint, and two that tell whether requests can share a row


def test_out_of_memory_halves_the_batches(stories, monkeypatch):
    model, tokenizer = stories
    sizes, forward = [], model.forward

    def little_memory(tokens, **kwargs):
        sizes.append(len(tokens))
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return forward(tokens, **kwargs)

    expected = zs.zero_shot(model, tokenizer, sources("piqa"), limit=8, batch_size=1)
    monkeypatch.setattr(model, "forward", little_memory)
    found = zs.zero_shot(model, tokenizer, sources("piqa"), limit=8, batch_size=16)
    assert found.tasks["piqa"].metrics == expected.tasks["piqa"].metrics
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[3:]) == 2


def test_no_more_memory_for_one_request_is_an_error(stories, monkeypatch):
    def no_memory(tokens, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(stories[0], "forward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        zs.zero_shot(*stories, sources("piqa"), limit=2)


def test_a_task_without_documents_does_not_stop_the_others(stories, tmp_path):
    broken = {**sources("piqa")["piqa"], "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "no.jsonl")}}}
    found = zs.zero_shot(*stories, {"rte": broken, **sources("piqa")}, limit=2)
    assert list(found.tasks) == ["piqa"]
    assert "its documents cannot be read" in found.missing["rte"]
    assert "no.jsonl" in found.missing["rte"]


QUESTION = {"goal": "Tom saw a", "sol1": "dog", "sol2": "cat", "label": 0}


def piqa(folder: Path, content: bytes) -> dict:
    """Where the documents of piqa come from, with these bytes as their file."""
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks/piqa_validation.jsonl").write_bytes(content)
    return {"piqa": eval_tasks.changes("piqa", folder)}


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n", b"\xef\xbb\xbf\n\r\n"])
def test_a_byte_order_mark_and_blank_lines_are_read_over(stories, tmp_path, monkeypatch, before):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "nothing is kept here")
    found = zs.zero_shot(*stories, piqa(tmp_path, before + lines(QUESTION) + b"\n" + lines(QUESTION)))
    assert found.missing == {}
    assert found.tasks["piqa"].documents == 2
    assert not (tmp_path / "nothing is kept here").exists()


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([QUESTION, QUESTION | {"goal": None}], "record 2 has no 'goal'"),
        ([QUESTION | {"sol1": 5}], "record 1 has no text: its 'sol1' is a number"),
        ([QUESTION | {"sol1": ["a"]}], "record 1 has no text: its 'sol1' is a list"),
        ([QUESTION | {"goal": "\ud800"}], "record 1 has half of a surrogate pair"),
        ([QUESTION, QUESTION | {"label": "LONG"}], "record 2 has a number that is too long to be read"),
        ([QUESTION | {"label": None}], "record 1 has null as 'label', where a number or a text must be"),
        ([QUESTION | {"label": 0.5}], "record 1 has 0.5 as 'label', where a number or a text must be"),
        ([QUESTION, QUESTION | {"label": "zz"}], "record 2 has \"zz\" as 'label', and record 1 has a number"),
        ([["a"]], "record 1 is not an object but a list"),
        ([], "holds no record"),
    ],
)
def test_what_a_task_cannot_ask_is_named_with_its_file_and_record(tmp_path, records, said):
    with pytest.raises(ValueError, match=said) as error:
        piqa(tmp_path, lines(*records).replace(b'"LONG"', b"9" * 5000))
    assert str(tmp_path / "tasks/piqa_validation.jsonl") in str(error.value)


@pytest.mark.parametrize("content", [b"no JSON", b"[" * 100_000, b'{"goal": "gr\xf6"}'])
def test_a_task_file_of_something_else_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"piqa_validation\.jsonl"):
        piqa(tmp_path, content)


@pytest.mark.parametrize("label", ["zz", 2, -1, "5"])
def test_an_answer_that_is_none_of_the_choices_is_no_wrong_answer(stories, tmp_path, label):
    first = QUESTION if isinstance(label, int) else QUESTION | {"label": "dog"}
    asked = piqa(tmp_path, lines(first, QUESTION | {"label": label}))
    told = f"its document 2 has the answer {label!r}, which is not one of its 2 choices"
    assert zs.zero_shot(*stories, asked).missing == {"piqa": told}
    assert zs.zero_shot(*stories, asked, limit=1).missing == {}


def first_of(task: str) -> dict:
    """The first real document of a task."""
    files = eval_tasks.changes(task, DATA)["dataset_kwargs"]["data_files"]
    return json_lines.read(Path(next(iter(files.values()))))[0]


MISSHAPEN = [
    ("hellaswag", {"endings": ["", "b", "c", "d"]}),
    ("hellaswag", {"endings": []}),
    ("hellaswag", {"endings": [1, 2, 3, 4]}),
    ("hellaswag", {"endings": None}),
    ("winogrande", {"answer": "3"}),
    ("arc_easy", {"choices": {"text": ["a", None, "c", "d"], "label": ["A", "B", "C", "D"]}}),
    ("arc_easy", {"choices": {"text": [1, 2, 3, 4], "label": ["A", "B", "C", "D"]}}),
    ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B", "C", "D"]}, "answerKey": "B"}),
    ("arc_easy", {"choices": {"text": [], "label": []}}),
    ("arc_easy", {"choices": None}),
    ("boolq", {"label": 2}),
    ("piqa", {"label": 10**30}),
    ("piqa", {"more": 10**30}),
]


CASES = [(place, *case) for case in MISSHAPEN for place in (0, 1)]
# an option may be empty, and the columns are those of the first document
HARMLESS = [(1, *MISSHAPEN[0]), (1, *MISSHAPEN[-1])]


@pytest.mark.parametrize(("place", "task", "change"), [case for case in CASES if case not in HARMLESS], ids=str)
def test_a_misshapen_document_takes_its_own_task_alone_out(stories, tmp_path, place, task, change):
    good = first_of(task)
    records = [good, good]
    records[place] = good | change
    changes = dict(eval_tasks.changes(task, DATA))
    splits = changes["dataset_kwargs"]["data_files"]
    path = tmp_path / "documents.jsonl"
    path.write_bytes(lines(*records))
    changes["dataset_kwargs"] = {"data_files": dict.fromkeys(splits, str(path))}
    found = zs.zero_shot(*stories, {task: changes, **sources("piqa" if task != "piqa" else "boolq")}, limit=2)
    assert list(found.missing) == [task]
    assert len(found.tasks) == 1


def test_an_answer_longer_than_the_model_is_told(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=32)).eval()  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models/stories260K/hf")
    with pytest.raises(ValueError, match=r"The answer ' once once .* and the model takes 1 to 32 at once"):
        zs.zero_shot(model, tokenizer, piqa(tmp_path, lines(QUESTION | {"sol1": 60 * "once "})))


def test_perplexity_tasks_of_lm_eval_run_too(stories):
    found = zs.zero_shot(*stories, sources("wikitext"), limit=1).tasks["wikitext"]
    assert found.metrics["word_perplexity"] > found.metrics["byte_perplexity"] > 1
    assert found.standard_errors == {}


def test_a_cut_model_answers_as_the_masked_one(stories):
    windows = torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for cut in (False, True):
        model = AutoModelForCausalLM.from_pretrained(DATA / "models/stories260K/hf").eval()
        pruners.prune(model, pruners.Flap(ratio=0.5), windows, cut=cut)
        found.append(zs.zero_shot(model, stories[1], sources("piqa"), limit=6).samples)
    for masked, sliced in zip(*found, strict=True):
        assert masked["answers"] == pytest.approx(sliced["answers"], abs=1e-3)


def test_documents_that_do_not_fit_are_counted(stories):
    model, tokenizer = stories
    scorer = Scorer(model, tokenizer)
    assert scorer.max_length == model.config.max_position_embeddings == 512
    found = zs.zero_shot(model, tokenizer, sources("boolq"), limit=5).tasks["boolq"]
    lengths = [
        len(tokenizer.encode(json.loads(line)["passage"])) for line in first_lines("boolq_validation.jsonl.gz", 5)
    ]
    assert found.truncated == sum(length > 480 for length in lengths) > 0


def first_lines(name: str, count: int) -> list[str]:
    return gzip.decompress((DATA / "tasks" / name).read_bytes()).decode().splitlines()[:count]


def test_the_commit_of_documents_from_the_hub_is_found():
    address = f"hf://datasets/baber/piqa@{'ab' * 20}/data/validation.parquet"
    hub, local = (SimpleNamespace(info=SimpleNamespace(download_checksums={url: {}})) for url in (address, "/tmp/piqa"))
    assert zs._revision(SimpleNamespace(eval_docs=hub)) == "ab" * 20
    assert zs._revision(SimpleNamespace(eval_docs=local)) is None


@pytest.mark.parametrize(
    ("tasks", "limit", "message"),
    [({"hela_swag": {}}, 2, "hellaswag"), ({"piqa": {}}, 0, "at least 1; got 0")],
)
def test_bad_input_is_one_clear_sentence(stories, tasks, limit, message):
    with pytest.raises((LookupError, ValueError), match=message):
        zs.zero_shot(*stories, tasks, limit=limit)


def test_a_tokenizer_of_another_model_is_refused(stories):
    small = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))  # fmt: skip
    with pytest.raises(ValueError, match="512 tokens and the model 100 embeddings"):
        zs.zero_shot(small, stories[1], sources("piqa"), limit=1)


def test_a_model_that_gives_nan_is_refused():
    folder = DATA / "models/stories260K/hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="log-likelihoods are NaN"):
        zs.zero_shot(model, tokenizer, sources("piqa"), limit=1)


def test_samples_are_kept_in_the_same_bytes(seven, tmp_path):
    for name in ("one", "two"):
        write_samples(seven.samples, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_samples(tmp_path / "one") == seven.samples


def test_answers_survive_a_torn_line(tmp_path):
    store = AnswerStore(tmp_path / "answers", "model")
    store.put("a", [(-1.25, True)])
    store.put("b", [(-0.1, False), (float("-inf"), False)])
    text = (tmp_path / "answers").read_bytes()
    (tmp_path / "answers").write_bytes(text[:-5])
    torn = AnswerStore(tmp_path / "answers", "model")
    assert torn.get("a") == [(-1.25, True)]
    assert torn.get("b") is None
    torn.put("b", [(-0.1, False), (float("-inf"), False)])
    assert (tmp_path / "answers").read_bytes() == text


def test_answers_of_another_model_or_with_changed_digits_are_not_believed(tmp_path):
    AnswerStore(tmp_path / "answers", "model").put("a", [(-1.25, True)])
    edited = (tmp_path / "answers").read_text().replace("1.25", "1.24")
    (tmp_path / "answers").write_text(edited)
    assert len(AnswerStore(tmp_path / "answers", "model")) == 0
    AnswerStore(tmp_path / "answers", "model").put("a", [(-1.25, True)])
    assert len(AnswerStore(tmp_path / "answers", "another model")) == 0


def test_every_weight_and_its_place_is_in_a_models_fingerprint(stories):
    model = AutoModelForCausalLM.from_pretrained(DATA / "models/stories260K/hf").eval()
    untie(model)  # so that the embeddings of other tokens reach no logit of the sample
    embeddings = model.get_input_embeddings().weight.data
    found = [fingerprint(model)]
    assert fingerprint(model) == found[0]
    embeddings[[300, 301]] = embeddings[[301, 300]]
    found.append(fingerprint(model))
    embeddings[400, 0] += 1e-6
    found.append(fingerprint(model))
    assert len(set(found)) == 3


def test_samples_may_hold_any_character(tmp_path):
    samples = [{"answers": ["a\u2028b\u2029c\x85d\x0be\nf"]}, {"answers": [""]}]
    write_samples(samples, tmp_path / "samples")
    assert read_samples(tmp_path / "samples") == samples


def test_all_seven_tasks_run_on_the_embedded_model():
    try:
        model, tokenizer = models.load("smollm2-135m")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    found = zs.zero_shot(model, tokenizer, sources(*SEVEN), limit=1)
    assert tuple(found.tasks) == SEVEN
    assert {task.truncated for task in found.tasks.values()} == {0}
