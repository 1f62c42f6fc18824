"""The papers' claims as statements that numbers can contradict.

A tolerance that a claim leaves open ("on par", "matches") is written out as a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.claims.judge import Better, Claim, Ours, Place, on_ours, on_paper
from analysis.rows import COST, Folders

EMBEDDED, EMBEDDED_KEY = ("smollm2-135m",), "embedded/wiki@512[:128]"
AT_128, AT_2048, AT_4096 = (f"wikitext2/test@{window}" for window in (128, 2048, 4096))
LLAMA = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")
LLAMA_2 = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
OPT = ("opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b")
OPT_SMALL = ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b")


def stand_in(table: str) -> tuple[Place, ...]:
    return (Place(f"embedded.{table}", EMBEDDED, EMBEDDED_KEY),)


def over(left: str, right: str, *settings: str, factor: float = 1.0, or_equal: bool = False) -> tuple[Better, ...]:
    """One method better than another, at each of these settings."""
    return tuple(Better((left, setting), (right, setting), factor, or_equal) for setting in settings)


FLAP_PPL = (Place("flap.perplexity", LLAMA, AT_128),)
FLAP_MEAN = (Place("flap.zero_shot", LLAMA[:1], "mean.flap@0shot", "score"),)
FLAP_COUNTS = (Place("flap.speed", LLAMA[:1], "efficiency", "parameters"),)
FLAP_SPEED = (Place("flap.speed", LLAMA[:1], "efficiency@1x128+128", "tokens_per_second"),)
GBLM_PPL = (Place("gblm.perplexity", LLAMA[:3] + LLAMA_2, AT_2048),)
GBLM_MEAN = (Place("gblm.zero_shot", LLAMA[:3], "mean.gblm@0shot", "score"),)
WANDA_PPL = (Place("baselines.perplexity", LLAMA, AT_2048), Place("baselines.perplexity", LLAMA_2, AT_4096))
PERP_MAGNITUDE = (Place("perp.magnitude", OPT, AT_2048),)
PERP_MASKS = (Place("perp.masks", OPT, AT_2048),)
PERP_RECONSTRUCTION = (Place("perp.reconstruction", OPT, AT_2048),)
PERP_SHARES = (Place("perp.magnitude", OPT, COST, "trained_share"),)
PRUNER_PPL = tuple(
    Place(f"llm_pruner.{name}", (model,), key)
    for name, model in (("llama_7b", "llama-7b"), ("llama_13b", "llama-13b"), ("vicuna_7b", "vicuna-7b-v0"))
    for key in (AT_128, "ptb/validation@128")
)
PRUNER_MEAN = tuple(
    Place(f"llm_pruner.{name}", (model,), "mean.llm_pruner@0shot", "score")
    for name, model in (("llama_7b", "llama-7b"), ("llama_13b", "llama-13b"), ("vicuna_7b", "vicuna-7b-v0"))
)
ELEMENT1, ELEMENT2 = "Element^1 (Block)", "Element^2 (Block)"
GBLM = "GBLM-Pruner (l1)"
SMALL = "Magnitude + norms, biases"
MASKLORA = "Magnitude + MaskLoRA, norms, biases"
TERMS = ("|W|*||G||_1 (gradient term only)", "|W|*||G||_2 (gradient term only)")
PATTERNS = "mask patterns, block 0"
FULL_METRIC = "|W|*||X||_2 + alpha*|W|*||G||_1, alpha=100 (final)"

CLAIMS = (
    Claim("flap-wanda", "FLAP", "FLAP's perplexity is below Wanda-sp's at 20 % and 50 % for every LLaMA.",
          over("FLAP", "Wanda-sp", "20 %", "50 %"), FLAP_PPL),
    Claim("flap-wanda-30", "FLAP", "FLAP's perplexity is below Wanda-sp's at 30 % for every LLaMA.",
          over("FLAP", "Wanda-sp", "30 %"), FLAP_PPL),
    Claim("flap-pruner", "FLAP", "Without retraining, FLAP's perplexity is below LLM-Pruner's.",
          over("FLAP", "LLM-Pruner", "20 %", "50 %"), FLAP_PPL, stand_in("flap")),
    Claim("flap-tuned", "FLAP", "FLAP's perplexity without retraining is below LLM-Pruner's after LoRA.",
          tuple(Better(("FLAP", s), ("LLM-Pruner", f"{s}, tuned")) for s in ("20 %", "50 %")), FLAP_PPL),
    Claim("flap-accuracy", "FLAP", "Without retraining, FLAP's mean accuracy is above LLM-Pruner's.",
          over("FLAP", "LLM-Pruner", "20 %", "50 %"), FLAP_MEAN),
    Claim("flap-accuracy-wanda", "FLAP", "FLAP's mean accuracy is above Wanda-sp's.",
          over("FLAP", "Wanda-sp", "20 %", "50 %"), FLAP_MEAN),
    Claim("flap-faster", "FLAP", "FLAP's models decode faster than LLM-Pruner's.",
          over("FLAP", "LLM-Pruner", "20 %", "50 %"), FLAP_SPEED),
    Claim("flap-smaller", "FLAP", "At 20 % FLAP's model (5.07 B in units of 1,024^3) is smaller than LLM-Pruner's "
          "5,422,977,024 parameters.",
          (Better(("FLAP", "20 %"), 5_422_977_024.0),), FLAP_COUNTS),
    Claim("flap-bias", "FLAP", "Bias compensation lowers the perplexity.",
          over("FLAP", "FLAP without bias", "20 %", "50 %"),
          (Place("flap.bias_compensation", LLAMA[:1], AT_128),), stand_in("flap")),
    Claim("flap-structure", "FLAP", "One threshold for the model (AL-AM) is better than equal block shares (UL-UM).",
          over("WIFV AL-AM", "WIFV UL-UM", "50 %"), (Place("flap.structures", LLAMA[:1], AT_128),)),
    Claim("flap-fair", "FLAP", "FLAP's perplexity is below Wanda-sp's when both use the same calibration windows.",
          over("FLAP", "Wanda-sp", "20 %", "50 %"), (Place("flap.same_calibration", LLAMA[:1], AT_128),),
          stand_in("flap")),
    Claim("gblm-wanda", "GBLM-Pruner", "GBLM-Pruner's perplexity is below Wanda's at 50 % for every model.",
          over(GBLM, "Wanda", "50 %"), GBLM_PPL, stand_in("gblm")),
    Claim("gblm-sparsegpt", "GBLM-Pruner", "Without a weight update, its perplexity is below SparseGPT's at 50 %.",
          over(GBLM, "SparseGPT", "50 %"), GBLM_PPL, stand_in("gblm")),
    Claim("gblm-magnitude", "GBLM-Pruner", "GBLM-Pruner's perplexity is below magnitude pruning's at 50 %.",
          over(GBLM, "Magnitude", "50 %"), GBLM_PPL, stand_in("gblm")),
    Claim("gblm-two-four", "GBLM-Pruner", "GBLM-Pruner's perplexity is below Wanda's at 2:4.",
          over(GBLM, "Wanda", "2:4"), GBLM_PPL, stand_in("gblm")),
    Claim("gblm-accuracy", "GBLM-Pruner", "GBLM-Pruner's mean accuracy is above Wanda's and SparseGPT's.",
          over(GBLM, "Wanda", "50 %") + over(GBLM, "SparseGPT", "50 %"), GBLM_MEAN),
    Claim("gblm-terms", "GBLM-Pruner", "Gradients and activations together are better than gradients alone.",
          tuple(Better((FULL_METRIC, "50 %"), (term, "50 %")) for term in TERMS),
          (Place("gblm.metric_ablation", LLAMA_2[:1], AT_2048),)),
    Claim("gblm-alpha", "GBLM-Pruner", "A gradient weight of 100 is better than both ends of the sweep.",
          tuple(Better(("GBLM-Pruner alpha=100", "50 %"), (f"GBLM-Pruner alpha={end}", "50 %"))
                for end in ("0.001", "100000")), (Place("gblm.alpha", LLAMA_2[:1], AT_2048),)),
    Claim("gblm-patterns", "GBLM-Pruner", "GBLM's masks keep or remove whole columns more often than chance.",
          (Better((GBLM, "50 %"), 1.0),),
          (Place("gblm.patterns", LLAMA_2[:1], PATTERNS, "column_dispersion"),),
          (Place("embedded.gblm", EMBEDDED, PATTERNS, "column_dispersion"),)),
    Claim("gblm-patterns-wanda", "GBLM-Pruner", "GBLM-Pruner's masks have more column structure than Wanda's masks.",
          over(GBLM, "Wanda", "50 %"), (Place("gblm.patterns", LLAMA_2[:1], PATTERNS, "column_dispersion"),),
          (Place("embedded.gblm", EMBEDDED, PATTERNS, "column_dispersion"),)),
    Claim("wanda-magnitude", "Wanda", "Wanda's perplexity is below magnitude pruning's at 50 %, 4:8 and 2:4.",
          over("Wanda", "Magnitude", "50 %", "4:8", "2:4"), WANDA_PPL, stand_in("gblm"),
          over("Wanda", "Magnitude", "50 %", "2:4")),
    Claim("wanda-sparsegpt", "Wanda", "Wanda is on par with SparseGPT at 50 % (within 5 %).",
          over("Wanda", "SparseGPT", "50 %", factor=1.05, or_equal=True), WANDA_PPL, stand_in("gblm")),
    Claim("wanda-group", "Wanda", "Comparing weights within an output is better than within a layer (LLaMA-7B).",
          (Better(("Wanda", "50 %, group (output,1)"), ("Wanda", "50 %, group layer")),),
          (Place("baselines.comparison_group", LLAMA[:1], AT_2048),)),
    Claim("wanda-group-opt", "Wanda", "Comparing weights within an output is better than within a layer (OPT).",
          (Better(("Wanda", "50 %, per output"), ("Wanda", "50 %, per layer")),),
          (Place("baselines.opt_groups", OPT_SMALL, AT_2048),)),
    Claim("wanda-samples", "Wanda", "With one calibration window Wanda is better than SparseGPT.",
          over("Wanda", "SparseGPT", "50 %, 1 samples"),
          (Place("baselines.calibration_size", LLAMA[:1], AT_2048),
           Place("baselines.calibration_size", LLAMA_2[:1], AT_4096))),
    Claim("sparsegpt-large", "SparseGPT", "OPT-66B loses almost nothing at 50 % (perplexity within 1 %).",
          (Better(("SparseGPT", "50 %"), ("Dense", ""), 1.01, or_equal=True),),
          (Place("baselines.sparsegpt", ("opt-66b",), AT_2048),)),
    Claim("perp-share", "PERP", "Biases and norms are at most 0.05 % of the parameters of OPT-2.7B to 30B.",
          (Better((SMALL, "50 %"), 0.0005, or_equal=True),), PERP_SHARES,
          (Place("embedded.perp", EMBEDDED, COST, "trained_share"),)),
    Claim("perp-full", "PERP", "Retraining biases and norms matches retraining everything (within 5 %).",
          over(SMALL, "Magnitude + all weights", "50 %", "60 %", factor=1.05, or_equal=True), PERP_MAGNITUDE,
          stand_in("perp"),
          tuned=True),
    Claim("perp-masklora", "PERP", "Magnitude pruning with MaskLoRA retraining is better than Wanda without.",
          (Better((MASKLORA, "50 %"), ("Wanda", "50 %")),), PERP_MASKS,
          stand_in("perp"),
          (Better(("Magnitude + MaskLoRA, norms", "50 %"), ("Wanda", "50 %")),),
          tuned=True),
    Claim("perp-sparsegpt", "PERP", "Magnitude pruning with MaskLoRA retraining matches SparseGPT (within 5 %).",
          (Better((MASKLORA, "50 %"), ("SparseGPT", "50 %"), 1.05, or_equal=True),), PERP_MASKS,
          stand_in("perp"),
          (Better(("Magnitude + MaskLoRA, norms", "50 %"), ("SparseGPT", "50 %"), 1.05, or_equal=True),),
          tuned=True),
    Claim("perp-reconstruction", "PERP", "Reconstruction lowers the perplexity of Wanda and SparseGPT.",
          tuple(Better((f"{name} + reconstruction (MaskLoRA, norms, biases)", "50 %"), (name, "50 %"))
                for name in ("Wanda", "SparseGPT")), PERP_RECONSTRUCTION,
          stand_in("perp"),
          tuple(Better((f"{name} + reconstruction (MaskLoRA, norms)", "50 %"), (name, "50 %"))
                for name in ("Wanda", "SparseGPT")),
          tuned=True),
    Claim("perp-minutes", "PERP", "Retraining OPT-30B's biases and norms takes minutes on one GPU (under an hour).",
          (Better((SMALL, "50 %"), 1.0),), (Place("perp.magnitude", OPT[-1:], COST, "retraining_hours"),)),
    Claim("pruner-hours", "LLM-Pruner", "Recovery of LLaMA-7B on 50,000 samples takes three hours at most.",
          tuple(Better((name, "20 %, tuned"), 3.0, or_equal=True) for name in (ELEMENT1, ELEMENT2)),
          (Place("llm_pruner.llama_7b", LLAMA[:1], COST, "retraining_hours"),)),
    Claim("pruner-keeps", "LLM-Pruner", "Pruned by 20 % and tuned, LLaMA-7B keeps 94.97 % of its accuracy.",
          (Better((ELEMENT2, "20 %, tuned"), ("Dense", ""), 0.9497, or_equal=True),), PRUNER_MEAN[:1]),
    Claim("pruner-l2", "LLM-Pruner", "Element^1 is better than L2 in perplexity.",
          over(ELEMENT1, "L2", "20 %"), PRUNER_PPL, stand_in("llm_pruner")),
    Claim("pruner-l2-accuracy", "LLM-Pruner", "Element^1 is better than L2 in accuracy.",
          over(ELEMENT1, "L2", "20 %"), PRUNER_MEAN),
    Claim("pruner-random", "LLM-Pruner", "Element^1 is better than random.",
          over(ELEMENT1, "Random", "20 %"), PRUNER_PPL, stand_in("llm_pruner")),
    Claim("pruner-channel", "LLM-Pruner", "Pruning blocks is better than pruning channels of the whole model.",
          over(ELEMENT1, "Channel", "20 %"), PRUNER_PPL),
    Claim("pruner-tuning", "LLM-Pruner", "Recovery by LoRA lowers the perplexity of the pruned model.",
          (Better((ELEMENT1, "20 %, tuned"), (ELEMENT1, "20 %")),), PRUNER_PPL),
    Claim("pruner-dependency", "LLM-Pruner", "Pruning coupled weights independently of each other ruins the model.",
          (Better((ELEMENT1, "20 %"), ("w/o dependency", "20 %"), 0.01),),
          (Place("llm_pruner.dependency", LLAMA[:1], AT_128),)),
    Claim("pruner-local", "LLM-Pruner", "Ranking groups within each block is better than over all blocks.",
          over("Element^1 - local", "Element^1 - global", "20 %"),
          tuple(Place("llm_pruner.global_local", LLAMA[:1], key) for key in (AT_128, "ptb/validation@128"))),
    Claim("pruner-share", "LLM-Pruner", "The paper's 20 % removes 19 % of LLaMA-7B's parameters or more.",
          (Better((ELEMENT1, "20 %"), ("Dense", ""), 0.81, or_equal=True),),
          (Place("llm_pruner.statistics", LLAMA[:1], "efficiency", "parameters"),)),
)  # fmt: skip


def frame(root: Folders, claims: Sequence[Claim] = CLAIMS, data_dir: Path | None = None) -> pd.DataFrame:
    """A row a claim with its three answers; with `data_dir` records of other texts than lie there answer nothing."""
    ours = Ours(root, data_dir)
    return pd.DataFrame(
        [
            {
                "Claim": claim.name,
                "Paper": claim.paper,
                "Statement": claim.sentence,
                "Paper's numbers": str(on_paper(claim)),
                "Ours": str(on_ours(claim, ours)),
                "Ours beyond noise": str(on_ours(claim, ours, noise=True)),
            }
            for claim in claims
        ]
    )
