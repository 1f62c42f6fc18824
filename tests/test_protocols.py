"""The papers' protocols by name, and the window counts that tell a wrong text or tokenizer."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from experiments import protocols
from experiments.data import corpora, eval_tasks

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
needs_data = pytest.mark.skipif(not (SHARED / "data").exists(), reason="../shared/data is absent")
TOKENS = {"llama": 341_469, "opt": 287_645}


def keys(name: str, positions: int | None = None) -> list[str]:
    return [measure.key for measure in protocols.perplexity(name, positions)]


def test_protocol_keys():
    assert keys("llm_pruner") == ["wikitext2/test@128", "ptb/validation@128"]
    assert keys("flap") == ["wikitext2/test@128"]
    assert keys("gblm") == ["wikitext2/test@2048"]
    assert keys("sparsegpt") == ["wikitext2/test@2048", "ptb/test@2048", "c4/validation@2048[:256]"]


@pytest.mark.parametrize(("positions", "window"), [(2048, 2048), (4096, 4096), (131_072, 4096)])
def test_wanda_and_perp_read_windows_of_the_models_own_length(positions, window):
    assert keys("wanda", positions) == keys("perp", positions) == [f"wikitext2/test@{window}"]


def test_conventions_differ_as_the_papers_do():
    llm_pruner, flap, wanda, gblm = (
        dict(protocols.zero_shot(n).metrics) for n in ("llm_pruner", "flap", "wanda", "gblm")
    )
    assert flap == llm_pruner
    assert set(wanda) - set(llm_pruner) == {"rte"}
    assert set(llm_pruner) - set(wanda) == {"piqa"}
    assert set(wanda.values()) == {"acc"}
    assert [t for t, m in llm_pruner.items() if m == "acc_norm"] == ["hellaswag", "arc_challenge", "openbookqa"]
    assert len(gblm) == 6


def test_a_limited_accuracy_has_another_key_than_a_full_one():
    assert protocols.zero_shot("wanda").keys[0] == "boolq.acc@0shot"
    assert protocols.zero_shot("wanda", limit=100).keys[0] == "boolq.acc@0shot[:100]"
    assert protocols.zero_shot("wanda", parameters=65_285_660_672).key == "mean.wanda@0shot[:2000]"
    assert protocols.zero_shot("llm_pruner", parameters=65_285_660_672).key == "mean.llm_pruner@0shot"
    assert protocols.tasks("lambada_openai").keys == ("lambada_openai.acc@0shot",)


def test_windows_of_the_model_s_own_length_end_at_4096():
    for name in ("wanda", "perp"):
        lengths = [protocols.perplexity(name, positions)[0].window for positions in (2048, 4096, 131_072)]
        assert lengths == [2048, 4096, 4096]


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="llm_pruner"):
        protocols.perplexity("llm-pruner")
    with pytest.raises(ValueError, match="wanda"):
        protocols.zero_shot("wanda_sp")
    with pytest.raises(ValueError, match="give its positions"):
        protocols.perplexity("wanda")


@needs_data
@pytest.mark.parametrize(
    ("tokenizer", "window", "windows"),
    [("llama", 2048, 166), ("llama", 4096, 83), ("llama", 128, 2667), ("opt", 2048, 140)],
)
def test_window_counts_of_wikitext2_test(tokenizer, window, windows, streams):
    assert len(streams[tokenizer]) == TOKENS[tokenizer]
    assert len(streams[tokenizer]) // window == windows


@pytest.fixture(scope="module")
def streams():
    from transformers import AutoTokenizer

    folder = SHARED / "data/tokenizers"
    return {
        name: corpora.token_ids("wikitext2/test", AutoTokenizer.from_pretrained(folder / name), SHARED / "data")
        for name in TOKENS
    }


def rows(path: Path, *contents: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))


def test_a_folder_swaps_only_the_documents(tmp_path):
    rows(tmp_path / "tasks/piqa_validation.jsonl", {"goal": "", "sol1": "", "sol2": "", "label": 0})
    swapped = eval_tasks.changes("piqa", tmp_path)
    assert set(swapped) == {"dataset_path", "dataset_name", "dataset_kwargs", "training_split"}
    assert eval_tasks.changes("piqa", None) == {}
    assert list(eval_tasks.provenance("piqa", tmp_path)["sha256"]) == ["piqa_validation.jsonl"]


def test_a_missing_file_and_a_missing_column_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tasks/rte_validation\.jsonl"):
        eval_tasks.changes("rte", tmp_path)
    rows(tmp_path / "tasks/rte_validation.jsonl", {"premise": "", "label": 0})
    with pytest.raises(ValueError, match="columns label, premise; the task needs sentence1, sentence2"):
        eval_tasks.changes("rte", tmp_path)


def test_the_hub_is_reachable_where_something_answers(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers HEAD with an error, which is an answer
    threading.Thread(target=server.handle_request, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for endpoint, reachable in ((address, True), ("http://127.0.0.1:9", False)):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        eval_tasks.hub_reachable.cache_clear()
        assert eval_tasks.hub_reachable() is reachable
    eval_tasks.hub_reachable.cache_clear()
    server.server_close()


@needs_data
def test_hellaswag_reads_all_documents_where_they_are():
    files = eval_tasks.changes("hellaswag", SHARED / "data")["dataset_kwargs"]["data_files"]
    assert files["validation"].endswith("hellaswag_validation_full_reconstructed.jsonl.gz")
