"""Recovering quality after pruning while keeping the sparsity."""

from __future__ import annotations

from pruners.retrain.adapters import LoRA, LoRAPrune, MaskLoRA, ScaleLoRA
from pruners.retrain.finetune import Retrained, finetune
from pruners.retrain.held_out import held_out_loss
from pruners.retrain.rates import RateChoice, choose_rate
from pruners.retrain.reconstruct import Reconstruction
from pruners.retrain.schedule import Diverged
from pruners.retrain.trainable import Trainable

__all__ = [
    "Diverged",
    "LoRA",
    "LoRAPrune",
    "MaskLoRA",
    "RateChoice",
    "Reconstruction",
    "Retrained",
    "ScaleLoRA",
    "Trainable",
    "choose_rate",
    "finetune",
    "held_out_loss",
]
