"""ChatGLM-6B's model: the authors' values, the formulas again in another form, generation with every cache."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

from pruners.chatglm import ChatGLMConfig, ChatGLMForCausalLM, read_tokens
from tests.chatglm import GOLDEN, ODD, golden, odd, prompts
from tests.conftest import needs_shared

CASES = json.loads((GOLDEN / "cases.json").read_text()) if GOLDEN.is_dir() else {}
TOLERANCE = {"atol": 2e-5, "rtol": 0.0}
MADE = [name for name, case in CASES.items() if case.get("mask_and_positions", "").startswith("made")]


@pytest.fixture(scope="module")
def values():
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def model():
    return golden()


def of(case, values):
    return {key.rpartition("/")[2]: value for key, value in values.items() if key.startswith(f"{case}/")}


@needs_shared
@pytest.mark.parametrize("case", MADE)
def test_the_authors_logits(case, values, model):
    given = of(case, values)
    hidden, positions = read_tokens(given["input_ids"], model.config)
    assert_close(hidden, given["attention_mask"])
    assert_close(positions, given["position_ids"])
    with torch.no_grad():
        found = model(given["input_ids"], labels=given.get("labels"), output_hidden_states=True)
    assert_close(found.logits, given["logits"], **TOLERANCE)
    if "hidden_states" in given:
        assert_close(torch.stack(found.hidden_states), given["hidden_states"], **TOLERANCE)
    if "loss" in CASES[case]:
        assert float(found.loss) == pytest.approx(CASES[case]["loss"], abs=2e-5)
    if "log_likelihoods" in CASES[case]:
        assert "labels" not in given  # tests/test_chatglm_tasks.py scores them


@needs_shared
@pytest.mark.parametrize("given", ["the mask of the published tokenizer", "a mask of tokens"])
def test_the_authors_left_padding(given, values, model):
    case = of("tiny/left_padded", values)
    real = ~case["attention_mask"][:, 0].diagonal(dim1=1, dim2=2)
    if given == "a mask of tokens":
        hidden, positions = read_tokens(case["input_ids"], model.config, real.long())
        assert_close(hidden, case["attention_mask"])
        assert_close(positions, case["position_ids"])
        inputs = {"attention_mask": real.long()}
    else:
        inputs = {"attention_mask": case["attention_mask"], "position_ids": case["position_ids"]}
    with torch.no_grad():
        logits = model(case["input_ids"], **inputs).logits
    assert_close(logits[real], case["logits"][real], **TOLERANCE)


@needs_shared
@pytest.mark.parametrize("cached", [True, False])
def test_the_authors_greedy_tokens(cached, values, model):
    case = of("tiny/greedy", values)
    found = model.generate(
        case["input_ids"], max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cached, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert found.sequences[:, case["input_ids"].shape[1] :].tolist() == case["generated"].tolist()
    assert_close(torch.stack(found.logits, 1), case["logits"], **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 6_173_286_400),
        ({"tie_word_embeddings": False}, 6_707_929_088),
        ({"vocab_size": 150_528, "bos_token_id": 150_004, "eos_token_id": 150_005}, 6_255_206_400),
    ],
)
def test_parameters_of_the_published_sizes(changes, parameters):
    config = ChatGLMConfig(**changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, ChatGLMForCausalLM)
    assert model.num_parameters() == parameters
    assert (config.mask_token_id, config.gmask_token_id) == (config.bos_token_id - 4, config.bos_token_id - 3)
    assert sum(p.numel() for p in model.transformer.layers[0].parameters()) == 201_379_840


def by_the_formulas(model, tokens):
    """Logits [tokens, vocabulary] of one sequence: head by head and pair by pair, as the formulas are written."""
    config, weights = model.config, model.state_dict()
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    c, m = tokens.index(config.bos_token_id), tokens.index(config.gmask_token_id)
    places = [(t, 0) if t < c else (m, t - c + 1) for t in range(len(tokens))]
    frequencies = [float(torch.tensor(10_000.0 ** (-2 * j / (size / 2))).half()) for j in range(size // 4)]

    def turned(vector, place):
        out = vector.clone()
        for half, p in enumerate(place):
            for j, f in enumerate(frequencies):
                at = half * size // 2 + j
                u, v = vector[at], vector[at + size // 4]
                out[at] = u * math.cos(p * f) - v * math.sin(p * f)
                out[at + size // 4] = v * math.cos(p * f) + u * math.sin(p * f)
        return out

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["transformer.word_embeddings.weight"][tokens]
    for layer in range(config.num_layers):
        name = f"transformer.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm")
        qkv = linear(h, f"{name}.attention.query_key_value")
        mixed = []
        for n in range(heads):
            q, k, v = qkv[:, 3 * size * n : 3 * size * (n + 1)].split(size, 1)
            q, k = (
                torch.stack([turned(row, place) for row, place in zip(part, places, strict=True)]) for part in (q, k)
            )
            scores = q @ k.T / math.sqrt(size)
            for t in range(len(tokens)):
                for j in range(len(tokens)):
                    if j > t and j >= c:
                        scores[t, j] = -math.inf
            mixed.append(scores.softmax(1) @ v)
        x = math.sqrt(56) * h + linear(torch.cat(mixed, 1), f"{name}.attention.dense")
        h = norm(x, f"{name}.post_attention_layernorm")
        inner = linear(h, f"{name}.mlp.dense_h_to_4h")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = math.sqrt(56) * h + linear(inner, f"{name}.mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("shape", [{}, {"num_attention_heads": 5, "num_layers": 1}, {"num_attention_heads": 1}])
@torch.no_grad()
def test_odd_shapes_follow_the_formulas(shape):
    model, tokens = odd(**shape), prompts(2)
    for row, logits in zip(tokens.tolist(), model(tokens).logits, strict=True):
        assert_close(logits, by_the_formulas(model, row), **TOLERANCE)


def generated(model, tokens, mask=None, **how):
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True} | how
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **how)


def left_padded(tokens, lengths):
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, : tokens.shape[1] - length] = 0
    return tokens.masked_fill(mask == 0, 3), mask


@pytest.mark.parametrize("how", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_is_the_same_with_every_cache(how):
    model = odd()
    tokens, mask = left_padded(prompts(answer=0), [8, 5, 3])
    found, plain = generated(model, tokens, mask, **how), generated(model, tokens, mask)
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert_close(torch.stack(found.logits), torch.stack(plain.logits), **TOLERANCE)


def test_padding_changes_nothing():
    model = odd()
    tokens, mask = left_padded(prompts(answer=0), [8, 5, 3])
    together = generated(model, tokens, mask)
    for row, length in enumerate((8, 5, 3)):
        alone = generated(model, tokens[row : row + 1, -length:])
        assert together.sequences[row, 8:].tolist() == alone.sequences[0, length:].tolist()
        for one, other in zip(together.logits, alone.logits, strict=True):
            assert_close(one[row], other[0], **TOLERANCE)


def test_beams_are_the_same_with_and_without_the_cache():
    model, how = odd(), {"num_beams": 3, "output_logits": False}
    tokens, mask = left_padded(prompts(answer=0), [8, 5, 4])
    found = [generated(model, tokens, mask, use_cache=cached, **how).sequences.tolist() for cached in (True, False)]
    assert found[0] == found[1]


@torch.no_grad()
def test_one_token_at_a_time():
    model = odd()
    tokens, mask = left_padded(prompts(), [13, 10, 9])
    whole = model(tokens, attention_mask=mask).logits
    cache = DynamicCache(config=model.config)
    parts = [model(tokens[:, :8], attention_mask=mask[:, :8], cache=cache).logits]
    for at in range(8, tokens.shape[1]):
        parts.append(model(tokens[:, at : at + 1], attention_mask=mask[:, : at + 1], cache=cache).logits)
    real = mask.bool()
    assert_close(torch.cat(parts, 1)[real], whole[real], **TOLERANCE)


@torch.no_grad()
def test_a_cropped_cache_goes_on_from_there():
    model, tokens = odd(), prompts()
    cache = DynamicCache(config=model.config)
    model(tokens, cache=cache)
    cache.crop(10 - tokens.shape[1])
    assert_close(model(tokens[:, 10:], cache=cache).logits, model(tokens).logits[:, 10:], **TOLERANCE)


@torch.no_grad()
def test_right_padding_and_later_tokens_change_nothing_before_them():
    model, tokens = odd(), prompts()
    short = model(tokens[:, :10]).logits
    assert_close(model(F.pad(tokens[:, :10], (0, 4), value=3)).logits[:, :10], short, **TOLERANCE)
    assert_close(model(tokens).logits[:, :10], short, **TOLERANCE)
    changed = tokens.clone()
    changed[:, 0] += 1  # the prompt, which sees all of itself
    assert (model(changed).logits[:, 1:6] - model(tokens).logits[:, 1:6]).abs().amax() > 1e-2


def test_gradient_checkpointing_gives_the_same_gradients():
    tokens, found = prompts(), []
    for checkpointing in (False, True):
        model = odd().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.24
            (enable or model.gradient_checkpointing_enable)()
        model(tokens, labels=tokens).loss.backward()
        found.append(model.transformer.layers[0].attention.query_key_value.weight.grad)
    assert_close(found[0], found[1])


@torch.no_grad()
def test_half_precision_makes_the_whole_angle_table_in_half_precision():
    from pruners.chatglm.modeling_chatglm import rotary_table

    positions = torch.tensor([[[2047], [1]]])
    half, single = (rotary_table(positions, 128, dtype)[0] for dtype in (torch.float16, torch.float32))
    frequencies = (1.0 / 10_000 ** (torch.arange(0, 64, 2) / 64)).half()
    assert_close(half[0, 0, 0, 0], (torch.tensor(2047.0).half() * frequencies).cos())
    assert_close(single[0, 0, 0, 0], (2047 * frequencies.float()).cos())
    model = odd().bfloat16()
    assert model(prompts()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "told"),
    [([[20, 21, 22]], "Sequence 0 has no <sop>"), ([[5, 20, 8, 21], [20, 21, 8, 22]], r"Sequence 1 has no \[gMASK\]")],
)
def test_a_sequence_without_its_marks_is_refused(tokens, told):
    with pytest.raises(ValueError, match=told):
        odd()(torch.tensor(tokens))


def test_what_does_not_fit_is_refused():
    model, tokens = odd(), prompts()
    with pytest.raises(ValueError, match=r"position_ids is \[1, 13\]; ChatGLM's are \[batch, 2, tokens\]"):
        model(tokens, position_ids=torch.arange(13)[None])
    with pytest.raises(ValueError, match=r"attention_mask is \[3, 5\] and the tokens so far are \[3, 13\]"):
        model(tokens, attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="with inputs_embeds give both yourself"):
        model(inputs_embeds=torch.zeros(1, 3, 60))
    cache = DynamicCache(config=model.config)
    hidden, positions = read_tokens(tokens, model.config)
    model(tokens, attention_mask=hidden, position_ids=positions, cache=cache)
    with pytest.raises(ValueError, match="The cache holds 13 tokens and does not know which"):
        model(tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match="leave position_ids out"):
        model.generate(tokens, position_ids=positions)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"padded_vocab_size": 65_024}, "ChatGLM2 or a later model"),
        ({"quantization_bit": 4}, "unquantised weights"),
        ({"pre_seq_len": 128}, "P-tuning prefix"),
        ({"position_encoding_2d": False}, "position_encoding_2d false"),
        ({"num_attention_heads": 7}, "is not divisible by num_attention_heads 7"),
        ({"num_attention_heads": 6}, "needs a multiple of 4"),
        ({"num_attention_heads": 0}, "is not divisible by num_attention_heads 0"),
        ({"eos_token_id": [9, 10]}, "ends with one token"),
    ],
)
def test_another_architecture_of_the_name_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        ChatGLMConfig(**(ODD | changes))


def test_the_end_of_an_answer_may_be_a_list_of_one():
    assert ChatGLMConfig(**(ODD | {"eos_token_id": [9]})).eos_token_id == 9
