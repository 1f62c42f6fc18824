"""Parameters and multiply-accumulates against closed formulas; timings against what must hold of any."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import pruners
from eval import latency, semi_structured
from eval.efficiency import NO_SPEED_UP, TWO_FOUR, bytes_per_step, counts, decoder_blocks, efficiency, macs, speed_note
from pruners import anatomy
from tests.conftest import hollow
from tests.families import tiny

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_7B = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
            "num_attention_heads": 32}  # fmt: skip


def llama(device: str = "cpu", **changes) -> LlamaForCausalLM:
    config = LlamaConfig(**{"max_position_embeddings": 256, **SMALL, **changes})
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def llama_macs(c: LlamaConfig, tokens: int) -> int:
    """Projections, both attention products over whole [tokens, tokens] scores, and the head."""
    head = c.hidden_size // c.num_attention_heads
    groups = c.num_key_value_heads * head
    block = c.hidden_size * (2 * c.hidden_size + 2 * groups + 3 * c.intermediate_size)
    scores = 2 * c.hidden_size * tokens
    return tokens * (c.num_hidden_layers * (block + scores) + c.hidden_size * c.vocab_size)


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_macs_equal_the_closed_formula(heads, device):
    model = llama(device, num_key_value_heads=heads)
    assert macs(model, 64) == llama_macs(model.config, 64)
    assert macs(model, 100) == llama_macs(model.config, 100)


def test_llama_7b_on_the_meta_device():
    found = counts(llama("meta", **LLAMA_7B).half())
    assert found.parameters == 6_738_415_616
    assert found.decoder_parameters == 6_738_415_616 - 2 * 32_000 * 4096 - 4096
    assert found.weight_bytes == 2 * found.parameters
    assert found.nonzero_parameters is None
    assert found.macs == pytest.approx(424.02e9, rel=1e-3)  # as LLM-Pruner publishes


def test_attention_is_counted_whatever_kernel_the_model_uses():
    assert len({macs(llama(attn_implementation=kind), 64) for kind in ("eager", "sdpa")}) == 1


def test_opt_counts_its_biases_and_positions():
    config = OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                       word_embed_proj_dim=32, max_position_embeddings=80)  # fmt: skip
    found = counts(OPTForCausalLM(config))
    assert found.decoder_parameters == 2 * (4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32)
    assert found.parameters == found.decoder_parameters + 96 * 32 + 82 * 32 + 2 * 32
    assert found.macs == 64 * (2 * (4 * 32 * 32 + 2 * 32 * 64 + 2 * 32 * 64) + 32 * 96)


def test_a_block_that_was_cut_counts_as_it_is():
    model = llama()
    before = counts(model)
    mlp = decoder_blocks(model)[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = torch.nn.Parameter(linear.weight[:50].clone())
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :50].clone())
    after = counts(model)
    assert before.parameters - after.parameters == 3 * 38 * 32
    assert before.macs - after.macs == 64 * 3 * 38 * 32
    assert before.weight_bytes - after.weight_bytes == 4 * 3 * 38 * 32


def test_what_pruning_cuts_out_is_gone_from_every_count():
    windows = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(0))
    masked, cut = llama(), llama()
    for model, how in ((masked, False), (cut, True)):
        pruners.prune(model, pruners.Flap(ratio=0.4), windows, cut=how)
    assert counts(cut).nonzero_parameters == counts(masked).nonzero_parameters
    assert counts(cut).parameters < counts(masked).parameters
    assert counts(cut).macs < counts(masked).macs
    assert counts(cut).weight_bytes == 4 * counts(cut).parameters


def test_zeros_are_parameters_but_not_nonzero_ones():
    model = llama()
    before = counts(model)
    decoder_blocks(model)[0].mlp.up_proj.weight.data[:44] = 0
    after = counts(model)
    assert after.parameters == before.parameters
    assert before.nonzero_parameters - after.nonzero_parameters == 44 * 32


def test_tied_embeddings_count_once_and_are_read_in_every_step():
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert counts(untied).parameters - counts(tied).parameters == 96 * 32
    assert bytes_per_step(tied) == bytes_per_step(untied) == counts(tied).weight_bytes


def test_a_step_need_not_read_experts_that_no_token_takes():
    model = tiny("mixtral")
    experts = [p for block in anatomy.blocks(model) for p in block.experts.parameters()]
    every, used = len(experts[0]), model.config.num_experts_per_tok
    idle = sum(4 * p.numel() for p in experts) * (every - used) // every
    others = counts(model).weight_bytes - 4 * model.get_input_embeddings().weight.numel()
    assert bytes_per_step(model) == others - idle < others


def test_reports_say_which_zeros_bring_no_speed():
    model = llama()
    assert speed_note(model) is None
    weights = [m.weight.data for m in decoder_blocks(model).modules() if isinstance(m, torch.nn.Linear)]
    for weight in weights:
        weight.unflatten(1, (-1, 4))[..., :2] = 0
    assert speed_note(model) == TWO_FOUR
    weights[0][0, :4] = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert speed_note(model) == NO_SPEED_UP


def test_timings_carry_device_dtype_shape_and_bound():
    found = efficiency(llama(), batch_sizes=(1, 2), lengths=(8, 16), new_tokens=3, repetitions=3)
    timing = found["timing"]
    assert [(run["batch"], run["length"]) for run in timing["runs"]] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert (timing["dtype"], timing["device"][:4]) == ("torch.float32", "cpu:")
    assert timing["decode_bound_s"] == pytest.approx(bytes_per_step(llama()) / timing["bandwidth_bytes_per_s"])
    for run in timing["runs"]:
        assert 0 < run["decode_s"]["q1"] <= run["decode_s"]["median"] <= run["decode_s"]["q3"]
        assert run["prefill_tokens_per_s"] == pytest.approx(run["batch"] * run["length"] / run["prefill_s"]["median"])
        scale = run["reference"]["bytes"] / bytes_per_step(llama())
        for name in ("median", "q1", "q3"):
            assert run["decode_to_bound"][name] == pytest.approx(run["decode_to_reference"][name] * scale)
        assert 1 <= run["attempts"] <= latency.ATTEMPTS
        assert run["noisy"] == (latency._moved(run) > latency.STEADY)
        assert run["peak_bytes"] > counts(llama()).weight_bytes


def test_no_shapes_give_the_counts_alone():
    assert "timing" not in efficiency(llama(), batch_sizes=())


class Machine:
    """A reference of a machine that gets slower by `growth` with every copy; what it works on takes four copies."""

    def __init__(self, growth):
        self.bytes, self.growth, self.pace = 2, growth, 1.0

    def seconds(self):
        self.pace *= self.growth
        return self.pace


def measured(machine):
    return latency._alternately(lambda: 4 * machine.pace * (1 + machine.growth) / 2, machine, 5)


def test_a_slow_machine_moves_the_seconds_and_not_the_ratio():
    slow, steady = Machine(1.5), Machine(1.0)
    for machine, spread in ((slow, pytest.approx(4 * 1.5**3 * 1.25)), (steady, 4.0)):
        seconds, told = measured(machine)
        assert sorted(seconds)[2] == spread
        assert told["decode_to_reference"]["median"] == pytest.approx(4.0)
        assert told["decode_to_reference"]["q1"] == pytest.approx(told["decode_to_reference"]["q3"])


def test_decoding_is_timed_again_while_the_reference_moves():
    growths = iter([1.5, 1.2, 1.0, 1.3])
    _, told = latency._steadiest(lambda: measured(Machine(next(growths))))
    assert (told["attempts"], told["noisy"]) == (3, False)
    growths = iter([1.5, 1.2, 1.3])
    seconds, told = latency._steadiest(lambda: measured(Machine(next(growths))))
    assert (told["attempts"], told["noisy"]) == (latency.ATTEMPTS, True)
    assert seconds == measured(Machine(1.2))[0]
    assert latency._steadiest(lambda: measured(Machine(1.0)))[1]["attempts"] == 1


def test_decoding_sees_one_token_at_a_time(monkeypatch):
    monkeypatch.setattr(latency, "STEADY", float("inf"))
    model, lengths = llama(), []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    latency.measure(model, batch=1, length=12, new_tokens=4, repetitions=1)
    runs = latency.WARM_UP + 1
    assert lengths == [12] * (runs + 1) + [1] * 4 + [12] + [1] * 4 * (runs - 1)


def test_every_decoding_begins_where_the_prompt_ends(monkeypatch):
    monkeypatch.setattr(latency, "STEADY", float("inf"))
    model, places = llama(), []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: places.append((args + tuple(kwargs.values()))[1][0, -1].item()), with_kwargs=True
    )
    latency.measure(model, batch=1, length=12, new_tokens=2, repetitions=3)
    assert [place for place in places if place != 11] == [12, 13] * (latency.WARM_UP + 3)


def test_a_prompt_longer_than_the_models_positions_is_refused():
    with pytest.raises(
        ValueError, match="250 tokens and 16 new tokens are longer than the model's context length, 256"
    ):
        efficiency(llama(), lengths=(250,), new_tokens=16)


def test_the_semi_structured_probe_says_why_it_did_not_run():
    assert "need a CUDA device; this is cpu" in semi_structured.probe(llama())["skipped"]


def test_a_model_without_anything_left_in_its_blocks_has_no_zeros_worth_a_note():
    model = hollow("opt", "nothing anywhere")
    assert speed_note(model) is None
    assert macs(model) > 0
