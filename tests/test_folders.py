"""A model in a folder is the experiment that its content says, whatever the folder is called; NAME=FOLDER says more."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small
import torch
from safetensors.torch import save_file
from test_models import config_of
from transformers import LlamaConfig, LlamaForCausalLM

import pruners
from analysis import compare, rows
from experiments import cells, estimate, models, papers, protocols
from experiments.__main__ import main
from experiments.models import catalogue
from experiments.models.catalogue import CATALOGUE
from experiments.papers import embedded, flap, headlines, llm_pruner, perp, wanda_sparsegpt
from experiments.spec import Table
from experiments.store import records
from experiments.store.described import digest
from slurm.__main__ import main as slurm

needs_shared = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"needs the trained model in {small.MODEL}")
TINY = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}


@pytest.fixture
def shallow(tmp_path):
    """Makes a folder of that name whose random model has so many blocks."""

    def make(name: str, blocks: int, **changes) -> str:
        LlamaForCausalLM(LlamaConfig(**TINY | {"num_hidden_layers": blocks} | changes)).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def published_shape(tmp_path):
    """Makes a folder with the configuration of a catalogue model and no weights worth the name."""

    def make(name: str, folder: str = "") -> str:
        place = tmp_path / (folder or name)
        config_of(name).save_pretrained(place)
        save_file({"x": torch.zeros(1)}, place / "model.safetensors")
        return str(place)

    return make


@pytest.fixture
def copy(tmp_path):
    """A copy of the small trained model that a test may spoil, by a change of its configuration or its whole text."""

    def make(change=None, text: str | None = None, name: str = "model") -> Path:
        folder = tmp_path / name
        shutil.copytree(small.MODEL, folder)
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)
        config = json.loads((folder / "config.json").read_text())
        if change:
            change(config)
        (folder / "config.json").write_text(json.dumps(config) if text is None else text)
        return folder

    return make


@pytest.fixture
def toy(monkeypatch):
    """The small trained model's shape in the catalogue, from a Hub that nobody reaches."""
    made = catalogue.Model("toy", "nobody/toy", parameters=260_032, positions=256, blocks=5, heads=8)
    monkeypatch.setitem(CATALOGUE, "toy", made)
    return made


def blocks(model: str, share: float = 0.2) -> tuple[int, int]:
    return tuple(llm_pruner.method("Element^1 (Block)", model, share).attention_blocks)


@pytest.mark.parametrize(
    ("name", "at_20", "at_50"),
    [("llama-7b", (4, 30), (3, 31)), ("llama-13b", (4, 38), (3, 39)), ("llama-2-13b", (4, 38), (3, 39)),
     ("llama-30b", (4, 58), (3, 59)), ("opt-13b", (4, 38), (3, 39)), ("smollm2-135m", (4, 28), (3, 29)),
     ("tinyllama-1.1b", (4, 18), (3, 21)), ("llama-65b", (4, 78), (3, 79))],
)  # fmt: skip
def test_llm_pruner_spares_blocks_at_both_ends_of_any_model(name, at_20, at_50, published_shape):
    for model in (name, published_shape(name, "anything"), f"{name}={published_shape(name, 'it')}"):
        assert (blocks(model), blocks(model, 0.5)) == (at_20, at_50)


def test_depth_is_the_folders_own_whatever_it_is_called(shallow):
    assert blocks(shallow("llama-7b", 40)) == (4, 38)
    table = papers.find("llm_pruner.llama_13b")
    (run,) = (run for run in table.runs(shallow("llama-13b", 60)) if getattr(run.method, "seed", 0) and not run.recovery
              and run.method.importance == "element1" and run.method.granularity == "block")  # fmt: skip
    assert run.method.attention_blocks == run.method.mlp_blocks == (4, 58)


def test_tables_of_single_blocks_have_the_models_own(shallow):
    assert len(papers.find("llm_pruner.layer_sensitivity").runs(shallow("deep", 34))) == 1 + 34
    with pytest.raises(ValueError, match="has 130 blocks and this table rows for 128"):
        papers.find("llm_pruner.layer_sensitivity").runs(shallow("deeper", 130))
    run, dense = papers.find("llm_pruner.stablelm").runs(shallow("middle", 12))
    assert dense.method is None
    assert run.method.attention_blocks == (3, 11)


def test_embedded_tables_spare_blocks_of_other_models_too(shallow):
    folder = shallow("twelve", 12)
    ranges = {
        table.name: {run.method.attention_blocks for run in table.runs(folder) if hasattr(run.method, "mlp_blocks")}
        for table in (embedded.demo, headlines.flap, headlines.llm_pruner)
    }
    assert ranges == {"embedded.demo": {(4, 8)}, "embedded.flap": {(0, 12)}, "embedded.llm_pruner": {(4, 10)}}


@pytest.mark.parametrize("count", [5, 6])
def test_a_model_of_which_all_blocks_are_spared_is_refused_by_its_own_cell_alone(shallow, count):
    folder = shallow("shallow", count, num_attention_heads=4)
    assert len(embedded.demo.runs(folder)) == 14
    model = LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=count))
    with pytest.raises(ValueError, match=rf"the model's {count} blocks"):
        pruners.prune(model, replace(llm_pruner.method("Random", folder, 0.2)), None)


def test_flap_removes_the_released_share_of_the_models_own_heads(published_shape):
    removed = {
        model: [flap.heads_removed(structure, model) for structure in ("UL-MM", "AL-MM", "AL-AM")]
        for model in ("llama-7b", "llama-13b", published_shape("llama-30b", "thirty"))
    }
    assert list(removed.values()) == [[384, 380, None], [600, 594, None], [1200, 1158, None]]
    assert all(heads % models.find(model).blocks == 0 for model, (heads, *_) in removed.items())


def test_a_folder_of_65b_is_asked_as_many_documents_and_has_as_many_cells(published_shape):
    folder = published_shape("llama-65b", "large")
    for table in ("baselines.zero_shot", "perp.zero_shot"):
        keys = {run.measures[0].key for run in papers.find(table).runs(folder)}
        assert keys == {f"mean.{table.partition('.')[0].replace('baselines', 'wanda')}@0shot[:2000]"}
    asked = papers.runs(papers.find("baselines.perplexity"), folder, tasks=["wanda"])
    assert {run.measures[-1].key for run in asked} == {"mean.wanda@0shot[:2000]"}
    of_catalogue = [run for run in flap.perplexity.runs() if run.model == "llama-65b"]
    assert len(flap.perplexity.runs(folder)) == len(of_catalogue) == 13
    assert len(flap.perplexity.runs(published_shape("vicuna-13b", "smaller"))) == 17


@needs_shared
@pytest.mark.parametrize(
    ("change", "length"),
    [(lambda c: None, 512), (lambda c: c.update(n_positions=c.pop("max_position_embeddings") // 2), 256),
     (lambda c: c.update(max_seq_len=c.pop("max_position_embeddings") // 2), 256),
     (lambda c: c.update(seq_length=c.pop("max_position_embeddings") // 4), 128),
     (lambda c: c.pop("max_position_embeddings") and c.update(x=1), 512)],
    ids=["max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "tokenizer"],
)  # fmt: skip
def test_the_context_length_is_the_folders_own_by_one_rule(copy, change, length):
    folder = str(copy(change))
    assert wanda_sparsegpt.windows(folder).length == protocols.length(folder) == length
    (run,) = {run.windows.length for run in perp.llama.runs(folder) if run.windows}
    assert run == length


@needs_shared
def test_a_folder_that_tells_no_context_length_is_asked_for_it_where_it_is_needed(copy):
    folder = copy(lambda config: config.pop("max_position_embeddings"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    for asked in (wanda_sparsegpt.windows, wanda_sparsegpt.read, protocols.length):
        with pytest.raises(
            ValueError, match=r"gives no context length.*set max_position_embeddings in its config\.json"
        ):
            asked(str(folder))
    assert len(flap.perplexity.runs(str(folder))) == 17


@needs_shared
@pytest.mark.parametrize(
    ("text", "complaint"),
    [("[]", "must hold a JSON object and holds []"), ("null", "holds null"), ("3", "holds 3"), ('"x"', 'holds "x"'),
     ("{", "cannot be read (Expecting property name"), ("[" * 200_000, "cannot be read (maximum recursion depth")],
    ids=["list", "null", "number", "text", "broken", "deep"],
)  # fmt: skip
def test_a_configuration_that_is_no_object_is_refused_in_a_sentence(copy, text, complaint):
    with pytest.raises(ValueError, match="is not a model folder") as refusal:
        models.find(copy(text=text))
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


@needs_shared
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"max_position_embeddings": None}, "max_position_embeddings as a positive integer; got null"),
     ({"max_position_embeddings": "512"}, 'got "512"'), ({"max_position_embeddings": -1}, "got -1"),
     ({"max_position_embeddings": True}, "got true"),
     ({"num_attention_heads": 7}, "not a multiple of the number of attention heads (7)"),
     ({"num_hidden_layers": "five"}, "expected int, got str"), ({"num_hidden_layers": 0}, "without decoder blocks"),
     ({"dtype": "float9"}, 'gives dtype as "float9"; use one of float32'), ({"dtype": 3}, "gives dtype as 3"),
     ({"model_type": "nothing"}, "`nothing`"), ({"model_type": "t5"}, "does not describe a language model"),
     ({"model_type": "nothing", "auto_map": {"AutoConfig": "x.Y"}}, "needs custom code (auto_map)"),
     ({"vocab_size": -1}, "describe a language model"), ({"rope_parameters": "x"}, "describe a language model")],
    ids=str,
)  # fmt: skip
def test_a_configuration_of_no_model_is_refused_in_a_sentence(copy, changes, complaint):
    with pytest.raises(ValueError, match=r"The config\.json of ") as refusal:
        models.find(copy(lambda config: config.update(changes)))
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


@needs_shared
def test_a_pipe_for_a_configuration_is_not_waited_for(copy):
    folder = copy()
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        models.find(folder)


@needs_shared
def test_a_folder_without_a_tokenizer_says_where_to_get_one(copy):
    folder = copy()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer .*save_pretrained"):
        models.load(folder)


@needs_shared
@pytest.mark.parametrize("text", ["{", "{}", "null", "[]"])
def test_a_broken_tokenizer_is_named(copy, text):
    folder = copy()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"The tokenizer files of .*model are damaged or of another version"
    ) as refusal:
        models.load(folder)
    assert "\n" not in str(refusal.value)


@needs_shared
def test_what_is_known_of_a_folder_follows_its_content(copy):
    folder = copy()
    assert (models.find(folder).blocks, models.find(folder).parameters) == (5, 260_032)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert models.find(folder).blocks == 4
    assert estimate.parameters_of(str(folder)) == models.find(folder).parameters < 260_032


@needs_shared
def test_a_folder_that_is_a_model_of_the_catalogue_brings_what_is_known_of_it(toy):
    named = f"toy={small.MODEL}"
    found = models.find(named)
    assert (found.name, found.positions, found.dtype, found.hub) == ("toy", 256, "float16", None)
    assert found.folder == small.MODEL
    assert models.commit(named) is None
    assert models.load(named, "float32")[0].num_parameters() == 260_032
    assert models.identity(named) == {**models.identity(str(small.MODEL)), "catalogue": "toy"}


def test_a_named_folder_has_the_gate_and_limits_of_its_model(published_shape):
    named = f"llama-65b={published_shape('llama-65b', 'here')}"
    found, real = models.find(named), CATALOGUE["llama-65b"]
    assert (found.dense, found.tolerance, found.positions) == (real.dense, real.tolerance, real.positions)
    table = papers.find("baselines.zero_shot")
    assert {run.measures for run in table.runs(named)} == {run.measures for run in table.runs("llama-65b")}


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [("llama-13b={seven}", r"is not llama-13b: it has 32 blocks and llama-13b has 40"),
     ("llama-7b={mistral}", r"is not llama-7b: it has 7,241,732,096 parameters and llama-7b has 6,738,415,616"),
     ("llama-7b=", r"'llama-7b=' names no folder; give llama-7b=FOLDER"),
     ("llama-7b=/nowhere/at/all", r"names the folder /nowhere/at/all, which is not there"),
     ("llama-7={seven}", r"Unknown catalogue model 'llama-7'\. Did you mean llama-7b.*NAME=FOLDER says which")],
)  # fmt: skip
def test_a_folder_that_is_not_what_it_is_said_to_be_is_refused(published_shape, asked, complaint):
    folders = {"seven": published_shape("llama-7b", "a"), "mistral": published_shape("mistral-7b", "b")}
    with pytest.raises(ValueError, match=complaint):
        models.find(asked.format(**folders))


@needs_shared
def test_a_named_folder_a_plain_one_and_the_hubs_are_three_records(toy, copy):
    folder = copy(name="toy")
    run = small.table().runs()[1]
    ids = {replace(run, model=model).id(models.identity(model)) for model in ("toy", str(folder), f"toy={folder}")}
    assert len(ids) == 3
    assert {replace(run, model=model).model_name for model in ("toy", str(folder), f"toy={folder}")} == {"toy"}


@needs_shared
def test_the_present_folder_has_a_name(copy, monkeypatch):
    folder = copy()
    monkeypatch.chdir(folder)
    run = small.table().runs()[0]
    names = {replace(run, model=model).spec()["model"]["name"] for model in (".", "./", "../model", str(folder))}
    assert names == {"model"}
    ids = {replace(run, model=model).id(models.identity(model)) for model in (".", str(folder))}
    assert len(ids) == 1
    assert catalogue.called("/") == "/"


def made(table: Table, model: str, root: Path, identity: dict[str, str], value: float) -> None:
    """A record of every cell of the table on that model, with this perplexity."""
    for run in table.runs(model):
        spec = run.spec(identity)
        plain = small.record(run)
        measured = {key: {**numbers, "perplexity": value} for key, numbers in plain.measures.items()}
        records.write(records.Record(**plain.model_dump() | {"id": digest(spec), "table": table.name, "spec": spec,
                                                             "measures": measured}), root)  # fmt: skip


def shown(table: Table, root: Path, model: str | None = None) -> set[tuple[float | None, bool]]:
    """Our perplexities of LLaMA-7B's dense cell and whether the paper's stands beside each."""
    found = compare.cells(table, rows.rows(table, root, model))
    return {(cell.ours, cell.published is not None) for cell in found if cell.model == "llama-7b" and cell.is_dense}


def test_a_named_folder_stands_in_the_papers_column_and_a_plain_one_never(tmp_path, published_shape):
    table, folder = papers.find("gblm.perplexity"), published_shape("llama-7b")
    plain = models.identity(folder)
    made(table, folder, tmp_path / "r", plain, 5.0)
    with pytest.raises(LookupError):
        rows.rows(table, tmp_path / "r")
    assert shown(table, tmp_path / "r", folder) == {(5.0, False)}
    made(table, f"llama-7b={folder}", tmp_path / "r", {**plain, "catalogue": "llama-7b"}, 6.0)
    assert shown(table, tmp_path / "r") == shown(table, tmp_path / "r", f"llama-7b={folder}") == {(6.0, True)}
    assert shown(table, tmp_path / "r", folder) == {(5.0, False)}
    made(table, "llama-7b", tmp_path / "r", models.identity("llama-7b"), 7.0)
    assert shown(table, tmp_path / "r") == {(7.0, True)}  # the catalogue's own go first
    assert shown(table, tmp_path / "r", f"llama-7b={folder}") == {(6.0, True)}


def test_two_folders_that_are_one_model_are_told_apart_by_their_folder(tmp_path, published_shape):
    table, folder = papers.find("gblm.perplexity"), published_shape("llama-7b")
    for print, value in (("a" * 64, 5.0), ("b" * 64, 6.0)):
        made(table, f"llama-7b={folder}", tmp_path / "r", {"fingerprint": print, "catalogue": "llama-7b"}, value)
    with pytest.raises(ValueError, match=r"2 different models named llama-7b; choose one .*--model llama-7b=FOLDER"):
        rows.rows(table, tmp_path / "r")


@needs_shared
def test_commands_take_a_named_folder(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(papers.TABLES, "tiny", small.table())
    data, named = small.data(tmp_path / "data"), f"toy={small.MODEL}"
    words = ["tiny", "--model", named, "--dtype", "float32", "--results", str(tmp_path / "r")]
    assert main(["show", *words]) == 0
    assert " toy " in capsys.readouterr().out
    assert main(["run", *words, "--data-dir", str(data), "--method", "dense"]) == 0
    (record,) = records.load(tmp_path / "r", "tiny").values()
    assert (record.spec["model"]["name"], record.spec["model"]["catalogue"]) == ("toy", "toy")
    assert main(["run", "tiny", "--model", f"toy={tmp_path}", "--results", str(tmp_path / "r")]) == 2
    assert "is not a model folder" in capsys.readouterr().err


@needs_shared
def test_a_job_takes_the_folder_with_its_whole_path(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(papers.TABLES, "tiny", small.table())
    monkeypatch.chdir(small.MODEL.parent)
    data, found = small.data(tmp_path / "data"), []
    from slurm import launch

    monkeypatch.setattr(launch, "launch", lambda plan, *rest: found.append(plan.arguments["model"]) or iter(()))
    for model in ("toy=hf", "hf", "toy"):
        words = ["submit", "tiny", "--model", model, "--executor", "debug", "--results", str(tmp_path / "r")]
        assert slurm([*words, "--data-dir", str(data)]) == 0
    assert found == [f"toy={small.MODEL}", str(small.MODEL), "toy"]


def test_a_cell_on_another_model_has_the_words_of_its_row(published_shape):
    folder = published_shape("llama-13b", "thirteen")
    for name in ("flap.perplexity", "llm_pruner.llama_13b", "flap.structures"):
        table = papers.find(name)
        assert all(cell.label for cell in cells.cells(table.runs(folder), table))
