"""Nonsense for retraining, measures and the dataclasses of tables: one short sentence that names the argument."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pruners
from eval import efficiency, generation, intervals, latency, patterns, semi_structured
from eval.perplexity import perplexity
from eval.zero_shot import zero_shot
from experiments import spec
from experiments.recovery import Documents, Instructions, Retraining
from experiments.settings import Settings
from pruners.retrain import (
    LoRA,
    LoRAPrune,
    MaskLoRA,
    Reconstruction,
    ScaleLoRA,
    Trainable,
    finetune,
    held_out_loss,
)
from tests.conftest import tiny
from tests.test_refusals import _without_the_tests_own_checks, refused, unchanged  # noqa: F401  (a fixture)

KIND = "llama multi-head"
NAN, INF = float("nan"), float("inf")
NORMS = Trainable(norms=True)
WHOLE = "is (None or )?a whole number"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stepz": 3}, "Unknown argument of finetune 'stepz'. Did you mean steps"),
        ({"steps": 0}, f"steps {WHOLE}"),
        ({"steps": "2"}, f"steps {WHOLE}.* got '2'"),
        ({"steps": None}, f"steps {WHOLE}.* got None"),
        ({"learning_rate": 0}, "learning_rate is a positive number"),
        ({"learning_rate": NAN}, "learning_rate is a positive number.* got nan"),
        ({"learning_rate": INF}, "learning_rate is a positive number"),
        ({"learning_rate": "1e-3"}, "learning_rate is a positive number.* got '1e-3'"),
        ({"batch_size": 0}, f"batch_size {WHOLE}"),
        ({"batch_size": True}, f"batch_size {WHOLE}"),
        ({"warmup": -1}, "warmup is a finite number"),
        ({"warmup": NAN}, "warmup is a finite number"),
        ({"clip": 0}, "clip is a positive number"),
        ({"clip": None}, "clip is a positive number"),
        ({"seed": None}, f"seed {WHOLE}"),
        ({"seed": -1}, f"seed {WHOLE}"),
        ({"micro_batch_size": 0}, f"micro_batch_size {WHOLE}"),
        ({"precision": 16}, "precision is .*text"),
        ({"precision": "float8"}, "precision is float32 or bfloat16; got 'float8'"),
        ({"checkpointing": "yes"}, "checkpointing is True or False"),
        ({"folder": 3}, "folder is .*path of a folder"),
        ({"folder": __file__}, "folder is .*path of a folder"),
        ({"save_every": 0}, f"save_every {WHOLE}"),
        ({"stop": 0}, "stops after 1 to 2"),
        ({"stop": "1"}, f"stop {WHOLE}"),
        ({"progress": 3}, "progress is .*function"),
        ({"watch": "loss"}, "watch is .*function"),
    ],
    ids=str,
)
def test_settings_of_retraining(windows, settings, said):
    model = tiny(KIND)
    before = copy.deepcopy(model.state_dict())
    training = {"steps": 2, "learning_rate": 1e-3, **settings}
    refused(said, lambda: finetune(model, NORMS, windows, **training))
    unchanged(model, before)


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (None, "Examples are a LongTensor .* got None"),
        (3, "Examples are a LongTensor .* got 3"),
        ("text", "Examples are a LongTensor .* got 'text'"),
        ({"input_ids": [3, 4]}, "Examples are a LongTensor .* got "),
        (torch.zeros(2, 8), r"Examples are a LongTensor .* got a tensor of torch\.float32 \[2, 8\]"),
        (torch.zeros(8, dtype=torch.long), r"got a tensor of torch\.int64 \[8\]"),
        (torch.zeros(2, 8, dtype=torch.long, device="meta"), "without values"),
        ([[3, 4, 5]], "example 0 is .*list"),
        ([{"ids": [3, 4, 5]}], r"Example 0 has no `input_ids`; it has \['ids'\]"),
        ([{"input_ids": "text"}], "`input_ids` of example 0 are whole numbers"),
        ([{"input_ids": None}], "`input_ids` of example 0 are whole numbers"),
        ([{"input_ids": [3.0, 4.5]}], r"`input_ids` of example 0 are whole numbers.* got torch\.float32"),
        ([{"input_ids": [[3, 4]]}], "`input_ids` of example 0 are whole numbers"),
        ([{"input_ids": [3, 4, 5], "labels": None}], "`labels` of example 0 are whole numbers"),
        ([{"input_ids": [3, 4, -5]}], "Token -5 of example 0 is outside the model's vocabulary of 96"),
        ([{"input_ids": [3, 4, 5], "labels": [3, 4, 96]}], "Token 96 of the labels of example 0 is outside"),
        ([{"input_ids": [3, 4, 5], "labels": [3, 4, -5]}], "Token -5 of the labels of example 0 is outside"),
        (torch.full((1, 8), -1), "Token -1 of example 0 is outside"),
    ],
)
def test_examples(examples, said):
    model = tiny(KIND)
    before = copy.deepcopy(model.state_dict())
    refused(said, lambda: finetune(model, NORMS, examples, steps=1, learning_rate=1e-3))
    refused(said, lambda: held_out_loss(model, examples))
    unchanged(model, before)


def test_examples_can_be_read_once(windows):
    training = {"steps": 1, "learning_rate": 1e-3}
    listed, read = tiny(KIND), tiny(KIND)
    finetune(listed, NORMS, list(windows), **training)
    finetune(read, NORMS, iter(windows), **training)
    unchanged(read, listed.state_dict())


@pytest.mark.parametrize("trainable", [None, "norms", Trainable, MaskLoRA()])
def test_what_is_no_trainable(windows, trainable):
    training = {"steps": 1, "learning_rate": 1e-3}
    refused(r"trainable is a pruners\.retrain\.Trainable", lambda: finetune(tiny(KIND), trainable, windows, **training))
    refused(r"trainable is a pruners\.retrain\.Trainable", lambda: Reconstruction(trainable))
    refused(r"trainable is a pruners\.retrain\.Trainable", lambda: Retraining(trainable, TEXT, **training))


@pytest.mark.parametrize("given", [None, "gpt", nn.Linear(2, 2), torch.nn.DataParallel(nn.Linear(2, 2))])
def test_models_to_train(windows, given):
    refused("PreTrainedModel; got", lambda: finetune(given, NORMS, windows, steps=1, learning_rate=1e-3))
    refused("PreTrainedModel; got", lambda: held_out_loss(given, windows))


def test_training_in_inference_mode(windows):
    with torch.inference_mode():
        refused(r"torch\.inference_mode", lambda: finetune(tiny(KIND), NORMS, windows, steps=1, learning_rate=1e-3))


def test_the_default_dtype_does_not_move_training(windows):
    models = tiny(KIND), tiny(KIND)
    reports = []
    for model, dtype in zip(models, (torch.float32, torch.float16), strict=True):
        torch.set_default_dtype(dtype)
        try:
            what = Trainable(norms=True, adapters=MaskLoRA(rank=2))
            reports.append(finetune(model, what, windows, steps=3, learning_rate=1e-3))
        finally:
            torch.set_default_dtype(torch.float32)
    assert reports[0].losses == reports[1].losses
    unchanged(models[1], models[0].state_dict())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Trainable(norms="yes"), "norms is True or False"),
        (lambda: Trainable(biases=1), "biases is True or False"),
        (lambda: Trainable(adapters="lora"), "adapters is .*MaskLoRA.* got 'lora'"),
        (lambda: Trainable(adapters=MaskLoRA), "adapters is .*got the class MaskLoRA itself"),
        (lambda: MaskLoRA(rank=2.5), "rank is a whole number"),
        (lambda: MaskLoRA(rank="4"), "rank is a whole number"),
        (lambda: MaskLoRA(rank=True), "rank is a whole number"),
        (lambda: ScaleLoRA(rank=None), "rank is a whole number"),
        (lambda: MaskLoRA(alpha=NAN), "alpha is a positive number.* got nan"),
        (lambda: LoRAPrune(alpha=0), "alpha is a positive number"),
        (lambda: LoRA(alpha="16"), "alpha is a positive number"),
        (lambda: LoRA(dropout=1.0), "dropout is a probability"),
        (lambda: LoRA(dropout=NAN), "dropout is a probability"),
        (lambda: LoRA(merge="yes"), "merge is True or False"),
        (lambda: MaskLoRA(targets="q_proj"), "targets is None or a tuple of texts"),
        (lambda: MaskLoRA(targets=("q_proj", 3)), "targets is None or a tuple of texts"),
        (lambda: Reconstruction(NORMS, steps=0), "steps is a whole number"),
        (lambda: Reconstruction(NORMS, learning_rate=NAN), "learning_rate is a positive number"),
        (lambda: Reconstruction(NORMS, batch_size=0), "batch_size is a whole number"),
        (lambda: Reconstruction(NORMS, warmup=-0.1), "warmup is a finite number"),
        (lambda: Reconstruction(NORMS, seed="0"), "seed is a whole number"),
    ],
)
def test_what_is_to_be_trained(make, said):
    refused(said, make)


TEXT = spec.Windows("c4/train", 4, 32)
TRAINING = {"steps": 4, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: spec.Windows("c4/train", 4, 32, seed=None), "Windows: seed is a whole number.* got None"),
        (lambda: spec.Windows("c4/train", 4, 32, seed=-1), "Windows: seed is a whole number"),
        (lambda: spec.Windows("c4/train", 0, 32), "Windows: count is a whole number"),
        (lambda: spec.Windows("c4/train", 4, "32"), "Windows: length is a whole number"),
        (lambda: spec.Windows("c4/train", 4, 1.5), "Windows: length is a whole number"),
        (lambda: spec.Windows("", 4, 32), "Windows: corpus is text"),
        (lambda: spec.Windows(None, 4, 32), "Windows: corpus is text"),
        (lambda: spec.Windows("c4/train", 4, 32, sampling="docs"), "Unknown sampling 'docs'"),
        (lambda: spec.Perplexity("ptb/test", 64, limit=-1), "Perplexity: limit is None or a whole number.* got -1"),
        (lambda: spec.Perplexity("ptb/test", 64, limit=0), "Perplexity: limit is None or a whole number"),
        (lambda: spec.Perplexity("ptb/test", 1), "Perplexity: window is a whole number, 2 or more"),
        (lambda: spec.Perplexity("ptb/test", None), "Perplexity: window is a whole number"),
        (lambda: spec.ZeroShot(None, "piqa"), "ZeroShot: metrics is a tuple of pairs"),
        (lambda: spec.ZeroShot(None, ("piqa",)), "ZeroShot: metrics is a tuple of pairs"),
        (lambda: spec.ZeroShot(None, (("piqa", None),)), "ZeroShot: metrics is a tuple of pairs"),
        (lambda: spec.ZeroShot("", ()), "ZeroShot: convention is None or text"),
        (lambda: spec.ZeroShot(None, (("piqa", "acc"),), limit=-5), "ZeroShot: limit is None or a whole number"),
        (lambda: spec.ZeroShot(None, (("piqa", "acc"),), examples=-1), "ZeroShot: examples is a whole number"),
        (lambda: spec.Efficiency(batch_sizes=(0,)), "Efficiency: batch_sizes is a tuple of whole numbers"),
        (lambda: spec.Efficiency(batch_sizes=1), "Efficiency: batch_sizes is a tuple of whole numbers"),
        (lambda: spec.Efficiency(lengths="64"), "Efficiency: lengths is a tuple of whole numbers"),
        (lambda: spec.Efficiency(new_tokens=0), "Efficiency: new_tokens is a whole number"),
        (lambda: spec.Efficiency(repetitions=None), "Efficiency: repetitions is a whole number"),
        (lambda: spec.Efficiency(semi_structured="no"), "Efficiency: semi_structured is True or False"),
        (lambda: spec.Generation(new_tokens=-1), "Generation: new_tokens is a whole number"),
        (lambda: spec.Generation(seed=1.5), "Generation: seed is a whole number"),
        (lambda: spec.MaskPatterns(block=-1), "MaskPatterns: block is a whole number"),
        (lambda: spec.Run("", None, None, ()), "Run: model is text"),
        (lambda: spec.Run("llama-7b", pruners.Wanda, None, ()), "Run: method is made .* got the class Wanda itself"),
        (lambda: spec.Run("llama-7b", "wanda", None, ()), "Run: method is made .* got 'wanda'"),
        (lambda: spec.Run("llama-7b", None, "c4", ()), "Run: windows is None or the calibration Windows"),
        (lambda: spec.Run("llama-7b", None, None, "ppl"), "Run: measures is a tuple"),
        (lambda: spec.Run("llama-7b", None, None, (), "float9"), "Unknown dtype 'float9'"),
        (lambda: spec.Run("llama-7b", None, None, (), torch.float16), "Unknown dtype"),
        (lambda: Documents("c4/train", 4, 0), "Documents: length is a whole number"),
        (lambda: Instructions("alpaca/train", held_out=-1), "Instructions: held_out is a whole number"),
        (lambda: Instructions("alpaca/train", seed=None), "Instructions: seed is a whole number"),
        (lambda: Retraining(NORMS, "c4", **TRAINING), "Retraining: text is the Windows, Documents or Instructions"),
        (lambda: Retraining(NORMS, TEXT, steps=0, learning_rate=1e-3), "Retraining: steps is a whole number"),
        (lambda: Retraining(NORMS, TEXT, steps=4, learning_rate=NAN), "Retraining: learning_rate is a positive number"),
        (lambda: Retraining(NORMS, TEXT, **TRAINING, stop=5), "stops after 1 to 4"),
        (lambda: Settings(root=3), "Settings: root is a path"),
        (lambda: Settings(root=""), "Settings: root is a path"),
        (lambda: Settings(batch_size=0), "Settings: batch_size is a whole number"),
        (lambda: Settings(device=""), "Settings: device is None or text"),
        (lambda: Settings(device=3), "Settings: device is None or text"),
        (lambda: Settings(dense_gate="no"), "Settings: dense_gate is True or False"),
    ],
)
def test_dataclasses_of_tables(make, said):
    refused(said, make)


def test_a_text_is_a_folders_path():
    assert Settings(root="text", data_dir="data", device="cpu") == Settings(Path("text"), "cpu", data_dir=Path("data"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_ids": [3, 4, 5] * 20}, r"LongTensor of token ids; got .*\(list\)"),
        ({"token_ids": np.arange(60)}, r"LongTensor of token ids; got .*\(ndarray\)"),
        ({"token_ids": torch.ones(60)}, r"LongTensor of token ids; got torch\.float32"),
        ({"token_ids": torch.ones(60, dtype=torch.int32)}, r"got torch\.int32.*token_ids\.long\(\)"),
        ({"token_ids": torch.full((60,), -1)}, "Token -1 is outside the model's vocabulary of 96"),
        ({"token_ids": torch.full((60,), 96)}, "Token 96 is outside the model's vocabulary of 96"),
        ({"window": 0}, "window of two or more tokens"),
        ({"window": "16"}, "window is a whole number"),
        ({"window": 16.0}, "window is a whole number"),
        ({"batch_size": 0}, "batch_size is a whole number"),
        ({"batch_size": -1}, "batch_size is a whole number"),
        ({"progress": 1}, "progress is .*function"),
        ({"model": None}, "The model must be a loaded transformers model; got None"),
        ({"model": nn.Linear(2, 2)}, "The model must be a transformers model; got a torch"),
        ({"model": tiny(KIND).model}, "LlamaModel has no head"),
        ({"model": tiny(KIND).to("meta")}, "meta device"),
        ({"windows": 16}, "Unknown argument of perplexity 'windows'. Did you mean window"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_perplexity(change, said):
    asked = {"model": tiny(KIND), "token_ids": torch.arange(60), "window": 16, **change}
    refused(said, lambda: perplexity(**asked))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: efficiency.efficiency(m, batch_sizes=(0,)), "batch_sizes is a tuple of whole numbers"),
        (lambda m: efficiency.efficiency(m, batch_sizes=1), "batch_sizes is a tuple of whole numbers"),
        (lambda m: efficiency.efficiency(m, lengths=("8",)), "lengths is a tuple of whole numbers"),
        (lambda m: efficiency.efficiency(m, lengths=(8,), new_tokens=0), "new_tokens is a whole number"),
        (lambda m: efficiency.efficiency(m, lengths=(8,), repetitions=0), "repetitions is a whole number"),
        (lambda m: efficiency.efficiency(m, repetition=3), "Did you mean repetitions"),
        (lambda m: efficiency.efficiency("m"), "The model must be a loaded transformers model"),
        (lambda m: efficiency.efficiency(copy.deepcopy(m).to("meta")), "meta device"),
        (lambda m: efficiency.macs(m, 0), "tokens is a whole number"),
        (lambda m: efficiency.counts(m, "64"), "macs_tokens is a whole number"),
        (lambda m: latency.measure(m, 0, 8, 4, 1), "batch is a whole number"),
        (lambda m: latency.measure(m, 1, 8, 4, 0), "repetitions is a whole number"),
        (lambda m: semi_structured.probe(m, tokens=0), "tokens is a whole number"),
        (lambda m: patterns.mask_patterns(m, "0"), "block is a whole number"),
        (lambda m: patterns.mask_patterns(m, 0, side=0), "side is a whole number"),
        (lambda m: patterns.mask_patterns(None, 0), "The model must be a loaded transformers model"),
        (lambda m: generation.Sampling(temperature=0), "temperature is a positive number"),
        (lambda m: generation.Sampling(temperature=NAN), "temperature is a positive number"),
        (lambda m: generation.Sampling(top_k=-1), "top_k is a whole number"),
        (lambda m: generation.Sampling(top_p=1.5), "top_p is a share above 0"),
        (lambda m: generation.Sampling(seed=None), "seed is a whole number"),
        (lambda m: generation.generate(m, None), "The tokenizer must be a loaded transformers tokenizer.* got None"),
        (lambda m: generation.generate(m, None, prompts="one text"), "prompts is a tuple or list of texts"),
        (lambda m: generation.generate(m, None, prompts=(3,)), "prompts is a tuple or list of texts"),
        (lambda m: generation.generate(m, None, new_tokens=0), "new_tokens is a whole number"),
        (lambda m: generation.generate(m, None, sampling="greedy"), "sampling is an eval.generation.Sampling"),
        (
            lambda m: zero_shot(m, None, {"piqa": {}}),
            "The tokenizer must be a loaded transformers tokenizer.* got None",
        ),
        (lambda m: zero_shot(m, None, "piqa"), "tasks is a mapping"),
        (lambda m: zero_shot(m, None, ["piqa"]), "tasks is a mapping"),
        (lambda m: zero_shot(m, None, {"piqa": None}), r"tasks\['piqa'\] is a mapping"),
        (lambda m: zero_shot(m, None, {"piqa": {}}, limit="3"), "limit is None or a whole number"),
        (lambda m: zero_shot(m, None, {"piqa": {}}, limit=0), "at least 1; got 0"),
        (lambda m: zero_shot(m, None, {"piqa": {}}, batch_size="auto"), "batch_size is None or a whole number"),
        (lambda m: zero_shot(m, None, {"piqa": {}}, examples=-1), "at least 0; got -1"),
        (lambda m: zero_shot(m, None, {"piqa": {}}, examples=None), "examples is a whole number"),
        (lambda m: zero_shot(m, None, {"piqa": {}}, resume=3), "resume is None or the path of a file"),
        (lambda m: zero_shot(m, None, {"piqa": {}}, num_fewshot=3), "Unknown argument of zero_shot 'num_fewshot'"),
        (lambda m: zero_shot(None, None, {"piqa": {}}), "The model must be a loaded transformers model"),
    ],
)
def test_measures(call, said):
    refused(said, lambda: call(tiny(KIND)))


def test_counting_needs_no_values():
    assert efficiency.efficiency(tiny(KIND).to("meta"), batch_sizes=())["macs"] > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: intervals.mean_over_tasks([1, 0]), "maps each task"),
        (lambda: intervals.mean_over_tasks({"piqa": ["right", "wrong"]}), "each a number"),
        (lambda: intervals.mean_over_tasks({"piqa": None}), "one score a document"),
        (lambda: intervals.mean_over_tasks({"piqa": [1, 0]}, seed=None), "seed is a whole number"),
        (lambda: intervals.mean_over_tasks({"piqa": [1, 0]}, seed=-1), "seed is a whole number"),
        (lambda: intervals.mean_over_tasks({"piqa": [1, 0]}, resamples=0), "resamples is a whole number"),
        (lambda: intervals.mean_over_tasks({"piqa": [1, 0]}, resamples="9"), "resamples is a whole number"),
        (lambda: intervals.mean_difference([1], [0]), "two mappings"),
        (lambda: intervals.perplexity_interval([1.0, NAN]), "NaN"),
        (lambda: intervals.perplexity_interval("text"), "each a number"),
        (lambda: intervals.mcnemar("ab", [1, 0]), "each a number"),
        (lambda: intervals.half_width([1.0]), "two values or more"),
        (lambda: intervals.half_width([1.0, 2.0], draws=0), "draws above 0"),
        (lambda: intervals.holm([0.5, 1.5]), r"lie in \[0, 1\]"),
        (lambda: intervals.holm([NAN]), "NaN"),
    ],
)
def test_intervals(call, said):
    refused(said, call)
