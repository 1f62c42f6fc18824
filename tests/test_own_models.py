"""`experiments prune`: a model of one's own, with what README says of it."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

import pytest
import small_table as small
from own_work import SHORT, needs_model, prune
from transformers import AutoModelForCausalLM, MambaConfig

import pruners
from analysis import frame
from analysis.__main__ import main as analysis
from analysis.pages import provenance
from analysis.rows import Row
from analysis.tables import frames
from experiments import labels
from experiments.__main__ import main
from experiments.models import folders
from experiments.own import defaults, meanings, options, saved
from experiments.own import prune as own
from experiments.recovery import Retraining
from experiments.spec import Run, Windows
from experiments.store import records
from pruners.__main__ import main as pruners_main
from pruners.interface.suggest import UsageError
from pruners.retrain import LoRA, Reconstruction, Trainable


@needs_model
def test_one_command_prunes_measures_and_keeps_a_model_that_plain_transformers_opens(where, tmp_path, capsys):
    kept = tmp_path / "kept"
    assert prune(f"--method wanda --sparsity 0.5 {SHORT} --save {kept}", where) == 0
    told = capsys.readouterr()
    assert "Calibration: c4/train 2 x 32 documents, seed 0" in told.err
    known = records.load(tmp_path / "results", "adhoc").values()
    found = {record.spec["method"] and record.spec["method"]["name"]: record for record in known}
    assert set(found) == {None, "wanda"}
    for record in found.values():
        assert f"{record.measures['ptb/test@64[:4]']['perplexity']:.2f} [" in told.out
    model = AutoModelForCausalLM.from_pretrained(kept)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    card = (kept / "README.md").read_text()
    assert "Wanda(sparsity=0.5" in card
    assert found["wanda"].id in card
    assert f"| {found[None].measures['ptb/test@64[:4]']['perplexity']:.2f} [" in card
    assert str(tmp_path) not in card


@needs_model
def test_a_card_has_the_dense_value_of_each_measure_whichever_run_took_it(where, tmp_path):
    for key in ("ptb/test@64[:4]", "ptb/test@32[:4]"):
        assert prune(f"--method magnitude --measure {key} --save {tmp_path / key[9:11]}", where) == 0
    dense = [r for r in records.load(tmp_path / "results", "adhoc").values() if r.spec["method"] is None]
    for record in dense:
        ((key, value),) = record.measures.items()
        card = (tmp_path / key[9:11] / "README.md").read_text()
        assert f"| {key} | {saved.shown(value)} |" in card


def test_a_card_takes_no_dense_value_of_another_text(tmp_path):
    plain, pruned = (Run("llama-7b", method, small.WINDOWS, (small.PPL,)) for method in (None, pruners.Wanda()))
    of_other = {key: {**value, "token_sha256": "cd" * 32} for key, value in small.record(plain).measures.items()}
    for record in (small.record(plain, measures=of_other), small.record(replace(plain, quantised=True))):
        records.write(record, tmp_path)
    assert saved._dense(small.record(pruned), tmp_path) == {}
    records.write(record := small.record(plain), tmp_path)
    assert saved._dense(small.record(pruned), tmp_path) == record.measures


@needs_model
def test_the_text_that_retraining_reads_is_printed_and_on_the_card(where, tmp_path, capsys):
    kept = tmp_path / "kept"
    words = f"--method magnitude --recover norms --steps 3 --held-out ptb/test --measure ptb/test@64[:4] --save {kept}"
    assert prune(words, where) == 0
    read = "c4/train 6 x 512 tokens, best step by ptb/test 32 x 512 tokens"
    told = capsys.readouterr().err
    assert re.search(rf"Recovery: .*\(3 steps, learning rate 0.0005\) on {read}\n", told)
    assert f"Calibration: none. Retraining: {read}.\n" in (kept / "README.md").read_text()


@needs_model
def test_what_is_kept_is_never_written_over_and_a_finished_cell_is_kept_later(where, tmp_path, capsys):
    asked = f"--method magnitude --sparsity 0.5 --measure ptb/test@64[:4] --save {tmp_path / 'kept'}"
    assert prune(asked.partition(" --save")[0], where) == 0
    assert prune(asked, where) == 0
    assert (tmp_path / "kept/config.json").is_file()
    card = (tmp_path / "kept/README.md").read_text()
    capsys.readouterr()
    assert prune(asked, where) == 0  # it is all there
    assert f"model: {tmp_path / 'kept'}" in capsys.readouterr().err
    assert prune(asked.replace("0.5", "0.4"), where) == 2
    assert "already holds a model, of the record" in capsys.readouterr().err
    assert (tmp_path / "kept/README.md").read_text() == card
    (tmp_path / "kept/README.md").write_text("Mine.")
    assert prune(asked, where) == 0
    (tmp_path / "kept/record.json").unlink()
    (tmp_path / "kept/README.md").write_text(card)  # as an earlier version said it
    assert prune(asked, where) == 0
    (tmp_path / "kept/README.md").unlink()
    assert prune(asked, where) == 2
    assert "already exists and is not empty" in capsys.readouterr().err


@needs_model
def test_a_model_that_cannot_be_written_costs_no_number(where, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pruners.checkpoint, "save", full)
    assert prune(f"--method magnitude --sparsity 0.5 --measure ptb/test@64[:4] --save {tmp_path / 'kept'}", where) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert len(records.load(tmp_path / "results", "adhoc")) == 2
    assert not (tmp_path / "kept").exists()


def test_what_cannot_be_kept_is_refused_before_any_work(tmp_path):
    beside = Retraining(Trainable(adapters=LoRA()), Windows("c4/train", 2, 8), 1, 1e-3)
    with pytest.raises(ValueError, match="LoRA that stays beside"):
        saved.check(Run("m", None, None, (), recovery=beside), tmp_path / "new")
    with pytest.raises(ValueError, match=r"LLM\.int8 models cannot be saved"):
        saved.check(Run("m", None, None, (), quantised=True), tmp_path / "new")


@needs_model
@pytest.mark.parametrize(
    ("method", "recovery"),
    [
        ("flap --ratio 0.3 --metric IFV", ""),
        ("sparsegpt --pattern 2:4", ""),
        ("wanda --sparsity 0.5", "--recover masklora --steps 2 --learning-rate 1e-3 --train-batch-size 1"),
        ("wanda --sparsity 0.5", "--recover norms --steps 3 --learning-rate 1e-2 --held-out ptb/test --check-every 2"),
        ("magnitude --sparsity 0.5", "--reconstruct norms --steps 2"),
        ("random --sparsity 0.5 --seed 3", ""),
    ],
)
def test_methods_and_recovery_are_told_by_their_own_options(method, recovery, where, tmp_path):
    asked = SHORT if "random" not in method else "--measure ptb/test@64[:4]"
    assert prune(f"--method {method} {recovery} {asked}", where) == 0
    (record,) = [r for r in records.load(tmp_path / "results", "adhoc").values() if r.spec["method"]]
    spec = {**record.spec["method"], **(record.spec.get("recovery") or {})}
    words = shlex.split(f"{method.partition(' ')[2]} {recovery}")
    told = dict(zip(words[::2], words[1::2], strict=True))
    for option, value in told.items():
        name = {"--train-batch-size": "batch_size"}.get(option, option.removeprefix("--").replace("-", "_"))
        if name == "held_out":
            assert spec["keep"] == "best"
            assert (spec[name]["corpus"], spec[name]["count"], spec[name]["sampling"]) == (value, 32, "stream")
            assert record.achieved["recovery"]["kept_step"] in (2, 3)
        elif name not in ("recover", "reconstruct"):
            assert str(spec[name]) == str(type(spec[name])(value)), name


@needs_model
@pytest.mark.parametrize("how", ["--recover", "--reconstruct"])
def test_a_model_whose_pruned_weights_were_filled_is_nowhere_said_to_be_sparse(how, where, tmp_path, capsys):
    kept = tmp_path / "kept"
    words = f"--method wanda --sparsity 0.5 {how} lora --steps 2 {SHORT} --save {kept}"
    assert prune(words, where) == 0
    weight = AutoModelForCausalLM.from_pretrained(kept).model.layers[0].mlp.up_proj.weight
    assert (weight == 0).sum() == 0
    told, filled = capsys.readouterr(), "0.0000 (merging LoRA filled pruned weights)"
    assert f"sparsity {filled}" in told.err
    assert re.search(f"sparsity of the pruned weights +{re.escape(filled)}", told.out)
    assert f"pruned weights: {filled} (requested: 0.5000)" in (kept / "README.md").read_text()
    results = tmp_path / "results"
    assert set(frame(results).sparsity) == {0.0}
    (record,) = [r for r in records.load(results, "adhoc").values() if r.spec["method"]]
    run = Run(str(small.MODEL), pruners.Wanda(sparsity=0.5), None, ())
    row = Row("Wanda", "50 %", run, record, None)
    assert frames.text([row])["Sparsity"][0] == "0.00 %"
    assert frames.numbers([row])["sparsity"][0] == 0
    assert provenance.origins([row])[record.id]["Sparsity"] == {"requested": 0.5, "achieved": 0.0}


@needs_model
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method wandaa", "Unknown method 'wandaa'. Did you mean wanda"),
        ("--method wanda --ratio 0.5", "Unknown option of --method wanda '--ratio'"),
        ("--method wanda --sparsity abc", "--sparsity"),
        ("--method wanda --sparsity 1.5", "sparsity is the share removed"),
        ("--method wanda --sparsity 0.5 --pattern 2:4 --steps 3", "'--steps'"),
        ("--method wanda --sparsity 0.5 stray", "'stray' does not belong to any option"),
        ("--method magnitude --sparsity 0.5 --nsamples 3", "uses no calibration text; leave out --nsamples."),
        ("--method magnitude --sampling stream", "uses no calibration text; leave out --sampling."),
        ("--method magnitude --recover norms --seqlen 64 --nsamples 3 --sampling first",
         "--recover reads its corpus and length alone; leave out --nsamples, --sampling."),
        ("--method magnitude --seed 0", "Nothing is drawn here"),
        ("--method wanda --sampling first --seed 3", "leave out --seed."),
        ("--method wanda --sparsity 0.5 --recover nothing", "Unknown choice of what to train (--recover) 'nothing'"),
        ("--method wanda --sparsity 0.5 --recover norms --reconstruct norms", "give one of the two"),
        ("--method wanda --sparsity 0.5 --held-out ptb/test", "--held-out chooses between the steps of --recover"),
        ("--method wanda --sparsity 0.5 --reconstruct norms --held-out ptb/test", "the steps of --recover"),
        ("--method wanda --sparsity 0.5 --recover norms --held-out c4/train", "is the text that is trained on"),
        ("--method wanda --sparsity 0.5 --recover norms --check-every 3", "give --held-out, too"),
        ("--method wanda --sparsity 0.5 --recover norms --held-out nowhere/test", "nowhere/test"),
        (
            "--method wanda --measure ptb/test@513",
            "Perplexity ptb/test@513 takes 513 tokens at once, and the context le",
        ),
        ("--method wanda --calibration c4/train --seqlen 513", "Calibration on c4/train takes 513 tokens at once"),
        ("--method wanda --reconstruct full", "--reconstruct full would train what is no part of a decoder block"),
        (
            "--method wanda --reconstruct head",
            "choose weights, biases, norms, biases+norms, lora, loraprune, scalelora",
        ),
        (
            "--method wanda --reconstruct norms --granularity matrix",
            "drop norms here, or use --granularity attention_m",
        ),
        ("--method wanda --reconstruct lora --reference --inputs dense", "drop --reference, or --granularity and --in"),
        ("--method wanda --recover norms --reference --micro-batch-size 4", "multiple of the --micro-batch-size of 4"),
        ("--method wanda --recover masklora --steps 0", "--recover: --steps is a whole number, 1 or more; got 0."),
        ("--method wanda --recover norms --train-batch-size 0", "--recover: --train-batch-size is a whole number, 1"),
        ("--method wanda --recover norms --stop 0", "--recover: --stop is a whole number, 1 or more; got 0."),
        ("--method wanda --recover norms --learning-rate 0", "--recover: --learning-rate is a positive number"),
        ("--method wanda --reconstruct norms --steps 0", "--reconstruct: --steps is a whole number, 1 or more"),
        ("--method sparsegpt --block-size 0", "--method sparsegpt: --block-size is a whole number, 1 or more; got 0."),
        ("--method wanda --sparsity 50%", "--method wanda: --sparsity is a number, such as 0.5; got '50%'."),
        ("--method gblm --alpha y", "--method gblm: --alpha is a number, such as 0.5; got 'y'."),
        ("--method sparsegpt --block-size 1.5", "--method sparsegpt: --block-size is a whole number; got '1.5'."),
        ("--method llm_pruner --mlp-blocks a b", "--method llm_pruner: --mlp-blocks is several numbers; got"),
        ("--method wanda --sparsity 0.5 --measure ppl", "is not a protocol key"),
        ("--method wanda --sparsity 0.5 --limit 3", "--limit applies to the documents of --tasks"),
        ("--method wanda --sparsity 0.5 --calibration nowhere/train", "nowhere/train"),
        ("--method wanda --recover norms --calibration own/text --seqlen 32", "Retraining on own/text cannot be: the "),
        ("--method wanda --recover norms --steps 2 --held-out own/text", "Retraining on own/text cannot be"),
        ("--method magnitude --measure own/text@64", "Perplexity own/text@64 cannot be: the dense model writes own/t"),
        ("--method wanda --sparsity 0.5 --calibration wikitext2/train", "the Hub does not answer: wikitext2/train"),
        ("--method wanda --sparsity 0.5 --plugin README.md", "README.md is not a Python file"),
        ("--sparsity 0.5", "prune needs a MODEL and a --method NAME"),
        ("--method llm_pruner --attention-blocks 4 30", "attention_blocks=(4, 30) is not a half-open range within the"),
        ("--method flap --ratio 0.3 --reference", "does not support grouped-query attention"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(words, said, where, capsys, tmp_path):
    if "--measure" not in words:
        words += " --measure ptb/test@64[:4]"
    if "magnitude" not in words and "--calibration" not in words:
        words += " --calibration c4/train --nsamples 2 --seqlen 32"
    assert prune(words, where) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "results/runs").exists()


@needs_model
def test_retraining_after_a_method_without_calibration_reads_the_corpus_that_is_named(where, tmp_path, capsys):
    words = "--recover norms --steps 2 --calibration c4/train --seqlen 64 --measure ptb/test@64[:4]"
    assert prune(f"--method magnitude {words}", where) == 0
    assert "Recovery: norms (2 steps, learning rate 0.0005) on c4/train" in capsys.readouterr().err
    (recovery,) = [r.spec["recovery"] for r in records.load(tmp_path / "results", "adhoc").values() if r.spec["method"]]
    assert (recovery["text"]["corpus"], recovery["text"]["length"]) == ("c4/train", 64)


def test_blocks_that_are_typed_are_taken_though_the_class_has_the_same_by_default():
    asked = Namespace(method="llm_pruner", model="opt-125m", seed=0)
    method, _ = own._method(asked, ["--attention-blocks", "4", "30"])
    assert (method.attention_blocks, method.mlp_blocks) == ((4, 30), (4, 10))


@needs_model
def test_what_fails_on_the_dense_model_is_not_tried_on_the_pruned_one(where, tmp_path, capsys):
    words = SHORT.replace("ptb/test@64[:4]", "ptb/test@64[:999999]")
    assert prune(f"--method wanda --sparsity 0.5 {words}", where) == 1
    assert capsys.readouterr().err.count("failed:") == 1
    (failure,) = records.load_failures(tmp_path / "results", "adhoc").values()
    assert failure.spec["method"] is None


@needs_model
def test_a_place_that_cannot_be_written_is_refused_before_any_work(where, tmp_path, capsys):
    assert prune(f"--method wanda --sparsity 0.5 {SHORT} --save /proc/nowhere/model", where) == 1
    told = capsys.readouterr().err
    assert "Cannot write /proc/nowhere" in told
    assert "--results" not in told
    assert not (tmp_path / "results/runs").exists()


def test_every_hyperparameter_has_a_meaning():
    kinds = [*pruners.METHODS.values(), Retraining, Reconstruction]
    silent = [(kind, f.name) for kind in kinds for f in fields(kind) if not meanings.of(kind, f.name)]
    alone = {"keep", "held_out", "check_every"}  # of tables
    assert {name for _, name in silent} <= {"seed", "trainable", "text", *alone}  # the first are options of their own


def test_every_method_and_recovery_explains_its_options(capsys):
    for name in [*pruners.METHODS, "retraining", "reconstruction"]:
        assert main(["prune", "--help", name]) == 0
        assert "--" in capsys.readouterr().out
    assert main(["prune", "--help", "flap"]) == 0
    told = capsys.readouterr().out
    assert "--heads-removed" in told
    assert "An et al. 2024" in told
    assert main(["prune", "--help", "nobody"]) == 2
    capsys.readouterr()
    assert main(["prune", "--help", "masklora"]) == 2
    assert "see --help retraining and --help reconstruction." in capsys.readouterr().err
    assert main(["prune", "--help", "head"]) == 2
    assert "see --help retraining." in capsys.readouterr().err
    assert main(["prune", "--help"]) == 0


def test_help_tells_the_default_that_is_meant(capsys):
    for name, option, default in (
        ("wanda", "sparsity", 0.5),
        ("wanda", "pattern", None),
        ("flap", "ratio", 0.2),
        ("retraining", "steps", 1000),
    ):
        assert main(["prune", "--help", name]) == 0
        about = " ".join(capsys.readouterr().out.split()).rpartition(f" --{option} ")[2].partition(" --")[0]
        assert f"(default: {default}" in about
    assert main(["prune", "--help", "retraining"]) == 0
    told = capsys.readouterr().out
    assert "(required)" not in told
    assert told.endswith(f"WHAT: {', '.join(defaults.TRAINABLE)}\n")
    assert main(["prune", "--help", "reconstruction"]) == 0
    assert capsys.readouterr().out.endswith(
        "WHAT: weights, biases, norms, biases+norms, lora, loraprune, scalelora, masklora\n"
    )


def test_the_defaults_are_the_papers():
    for name in pruners.METHODS:
        windows = defaults.windows(name, "llama-7b")
        own = defaults.WINDOWS.get(name)
        assert windows == own or (windows.corpus, windows.count, windows.length) == ("c4/train", 128, 2048)
    assert defaults.hyperparameters("llm_pruner", "llama-7b")["mlp_blocks"] == (4, 30)
    assert defaults.hyperparameters("llm_pruner", "opt-125m")["mlp_blocks"] == (4, 10)


@needs_model
def test_a_model_of_few_blocks_has_a_default_too_and_what_was_asked_stands_beside(where, capsys):
    words = "--method llm_pruner --calibration c4/train --nsamples 2 --seqlen 32 --measure ptb/test@64[:4]"
    assert defaults.hyperparameters("llm_pruner", str(small.MODEL))["mlp_blocks"] == (0, 5)
    assert prune(f"{words} --ratio 0.3", where) == 0
    assert re.search(r"^sparsity requested +0\.3000", capsys.readouterr().out, re.M)


@needs_model
def test_weights_and_biases_takes_the_cells_of_one_model(where, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert prune(f"--method wanda --sparsity 0.5 {SHORT} --wandb", where) == 0
    assert len(list((tmp_path / "results/wandb").glob("offline-run-*"))) == 2


def test_a_model_without_attention_heads_is_told_in_a_sentence(tmp_path):
    MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a 'mamba' model, which has no attention heads; only decoders with"):
        folders.shape(tmp_path)


@needs_model
@pytest.mark.parametrize(
    ("method", "said"),
    [("wanda --pattern 2:7", "2:7 needs rows of a multiple of 7 weights"), ("gblm --pattern 5:9", "a multiple of 9")],
)
def test_a_pattern_that_divides_no_width_is_refused_before_anything_is_measured(where, tmp_path, capsys, method, said):
    assert prune(f"--method {method} {SHORT}", where) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@needs_model
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("magnitude --settings 2:7", "magnitude 2:7: failed: 2:7 needs rows"),
        (f"wanda --settings 2:7 {SHORT}", "wanda 2:7: failed: 2:7 needs rows"),
    ],
)
def test_a_cell_that_does_not_work_on_the_model_costs_no_dense_measure(method, said, where, capsys, monkeypatch):
    measured: list[object] = []
    monkeypatch.setattr("experiments.run.pass_dense_gate", measured.append)
    words = ["--methods", *method.split(), "--measure", "ptb/test@64[:4]"]
    assert main(["compare", str(small.MODEL), *words, *where]) == 1
    assert said in capsys.readouterr().err.lower()
    assert len(measured) == 1  # the dense model's own cell


def test_an_unknown_option_is_never_passed_over():
    with pytest.raises(UsageError, match=r"Unknown option of a or b '--sparsty'\. Did you mean --sparsity"):
        options.refuse(["--sparsty", "1"], {"a": ["sparsity"], "b": ["steps"]})


def test_what_the_model_writes_is_drawn_by_its_seed_however_it_is_sampled():
    drawn = [Run("m", pruners.Wanda(), Windows("own/text", 4, 32, seed, "first"), ()) for seed in (1, 2)]
    assert [labels.seed(run) for run in drawn] == [1, 2]
    assert labels.seed(Run("m", pruners.Wanda(), Windows("c4/train", 4, 32, 1, "first"), ())) is None


def test_a_rehearsal_is_told_from_what_it_rehearses():
    run = Run("m", pruners.Flap(), Windows("c4/train", 4, 32), ())
    assert labels.distinct([run, replace(run, rehearsal=True)], 2 * [("FLAP", "20 %")]) == [
        ("FLAP", "20 %"),
        ("FLAP, rehearsal", "20 %"),
    ]


def readme_says() -> tuple[list[str], dict[str, str]]:
    """The commands of README's section, and its files by name."""
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Your own work")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(sh|python)\n(.*?)```", section, flags=re.S)
    commands = [line for kind, block in blocks if kind == "sh" for line in block.replace("\\\n", "").splitlines()]
    commands = [line for line in commands if "slurm" not in line]  # needs a cluster
    files = [block for kind, block in blocks if kind == "python"]
    return commands, dict(zip(("ria.py", "mine.py"), files, strict=True))


@needs_model
def test_readme_s_own_work_runs_as_it_stands_but_for_model_and_texts(where, tmp_path, monkeypatch, capsys):
    commands, files = readme_says()
    small_ones = {"smollm2-135m": str(small.MODEL), "embedded/c4": "c4/train", "embedded/wiki": "ptb/test"}
    small_ones |= {"wiki@512": "wiki@64", "512, limit": "64, limit", "=256": "=32", "seqlen 256": "seqlen 32"}

    def smaller(text: str) -> str:
        for ours, theirs in reversed(small_ones.items()):
            text = text.replace(ours, theirs)
        return text

    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(smaller(text))
    mains = {"experiments": main, "pruners": pruners_main, "analysis": analysis}
    for command in commands:
        _, _, package, *words = shlex.split(smaller(command))
        own = {"experiments": where, "analysis": where[:2], "pruners": ["--family", "llama"]}[package]
        assert mains[package]([*words, *own]) == 0, command
    assert (tmp_path / "pruned/smollm2-wanda/config.json").is_file()
    assert len(records.load(tmp_path / "results", "mine")) == 6
    assert "| RIA " in (tmp_path / "results/compare.md").read_text()
