"""Are our weights, renamed, what transformers reads and writes, and is everything else refused by name?

Expected names come from transformers itself: `revert_weight_conversion` is what its save_pretrained applies.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AfmoeConfig, AfmoeForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.afmoe.modeling_afmoe import AfmoeTokenChoiceRouter

from trainer.config import CONFIG_DIR, ModelConfig
from trainer.model.afmoe import afmoe_config
from trainer.model.hf import from_hf, hf_config, to_hf
from trainer.model.router import Gate, Router

SHAPE = ModelConfig(
    vocab_size=61,
    dim=32,
    num_layers=3,
    num_dense_layers=1,
    ffn_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    window=6,
    global_every=2,
    num_experts=4,
    top_k=2,
    expert_dim=24,
    num_shared_experts=1,
    route_scale=2.448,
    rope_theta=5_000.0,
    norm_eps=1e-4,
)
UP, BIAS = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.2.mlp.expert_bias"


def shapes(model: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(afmoe_config(model, flex=False).build().state_dict())


def random_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in shapes(SHAPE).items()}
    return {
        name: tensor if name.endswith("expert_bias_E") else tensor.to(dtype) for name, tensor in state.items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(dtype):
    state = random_state(dtype)
    assert equal(from_hf(to_hf(state, SHAPE), SHAPE), state)


def test_round_trip_through_transformers_and_the_disk(tmp_path):
    """to_hf -> file -> from_pretrained -> save_pretrained -> file -> from_hf, bit for bit, nothing missing or
    unused.
    """
    state = random_state()
    save_file(to_hf(state, SHAPE), tmp_path / "model.safetensors")
    AfmoeConfig(**hf_config(SHAPE, max_position_embeddings=64)).save_pretrained(tmp_path)
    hf, info = AfmoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    hf.save_pretrained(tmp_path / "theirs")
    on_disk = load_file(tmp_path / "theirs" / "model.safetensors")
    assert equal(on_disk, to_hf(state, SHAPE))
    assert equal(from_hf(on_disk, SHAPE), state)


@pytest.mark.parametrize("name", ["nano", "mini", "large"])
def test_names_and_shapes_of_save_pretrained(name):
    """Every tensor of the published sizes (42,423 for Large), on the meta device."""
    model = ModelConfig(**OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml"))
    with torch.device("meta"):
        hf = AfmoeForCausalLM(AfmoeConfig(**hf_config(model, max_position_embeddings=4096)))
        theirs = revert_weight_conversion(hf, hf.state_dict())
    ours = to_hf(shapes(model), model)
    assert {n: tuple(t.shape) for n, t in ours.items()} == {n: tuple(t.shape) for n, t in theirs.items()}


def test_config_says_the_shape():
    """Read back from transformers' own attributes; the layer types by hand for global_every=2."""
    config = AfmoeConfig(**hf_config(SHAPE, max_position_embeddings=64))
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (config.hidden_size, config.intermediate_size, config.moe_intermediate_size) == (32, 48, 24)
    assert (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.sliding_window,
    ) == (4, 2, 16, 6)
    assert (
        config.num_experts,
        config.num_experts_per_tok,
        config.num_shared_experts,
        config.num_dense_layers,
    ) == (4, 2, 1, 1)
    assert (config.route_scale, config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (
        2.448,
        1e-4,
        5_000.0,
    )
    assert config.mup_enabled and not config.tie_word_embeddings and config.max_position_embeddings == 64


def test_a_bias_rounded_by_others_becomes_float32():
    """transformers saves a bfloat16 model with bfloat16 biases; ours are float32 again, the same values."""
    hf_state = to_hf(random_state(), SHAPE)
    hf_state[BIAS] = hf_state[BIAS].bfloat16()
    assert equal({"": from_hf(hf_state, SHAPE)["layers.2.moe.expert_bias_E"]}, {"": hf_state[BIAS].float()})


def test_an_exported_bias_is_of_sigmoid_scores():
    """transformers' router chooses the experts that ours does. By hand: scores .99 and .8 (logits 4.6, 1.4),
    biases -.3 and 0;
    0.69 < 0.8 among scores, but 4.3 > 1.4 among logits. The model has no other kind of bias that could be
    exported."""
    model = replace(SHAPE, dim=2, num_experts=2, top_k=1)
    logits = torch.tensor([[0.99, 0.8]]).logit()
    gate = Gate.Config(in_features=2, out_features=2)
    ours = Router.Config(num_experts=2, top_k=1, route_scale=model.route_scale, gate=gate).build()
    theirs = AfmoeTokenChoiceRouter(AfmoeConfig(**hf_config(model, max_position_embeddings=64)))
    ours.gate.weight.data.copy_(torch.eye(2))
    theirs.gate.weight.data.copy_(torch.eye(2))
    bias_E = torch.tensor([-0.3, 0.0])
    _, gates, ids = theirs(logits[None], bias_E)
    routing = ours(logits[None], bias_E)
    assert routing.ids_BLK.tolist() == [ids.tolist()] == [[[1]]] and routing.gates_BLK.tolist() == [
        gates.tolist()
    ]


def refused(convert: Callable, state: dict[str, Tensor]) -> list[str]:
    with pytest.raises(ValueError) as error:
        convert(state, SHAPE)
    first, *lines = str(error.value).splitlines()
    assert first == f"{len(lines)} tensors do not fit the model:"
    return lines


def test_from_hf_refuses_by_name():
    """A file that does not fit would otherwise be loaded in part, and the rest would stay random."""
    good = to_hf(random_state(), SHAPE)
    missing = {name: tensor for name, tensor in good.items() if name != UP}
    assert refused(from_hf, missing) == [f"{UP}: missing, must be (24, 32)"]
    ninth = UP.replace("experts.2", "experts.9")
    assert refused(from_hf, good | {ninth: good[UP]}) == [f"{ninth}: unknown, has (24, 32)"]
    assert refused(from_hf, good | {UP: good[UP].T}) == [f"{UP}: has (32, 24), must be (24, 32)"]


def test_from_hf_lists_everything_at_once():
    """Another architecture's file: each of its tensors and each of ours is named."""
    good = to_hf(random_state(), SHAPE)
    other = {name.replace("model.layers", "layers"): tensor for name, tensor in good.items()}
    num_layer_tensors = sum(name.startswith("model.layers") for name in good)
    lines = refused(from_hf, other | {"lm_head.weight": torch.zeros(60, 32)})
    assert (
        sum(": missing" in line for line in lines)
        == sum(": unknown" in line for line in lines)
        == num_layer_tensors
    )
    assert [line for line in lines if re.search("has .* must", line)] == [
        "lm_head.weight: has (60, 32), must be (61, 32)"
    ]


def test_to_hf_refuses_by_name():
    good, experts = random_state(), "layers.1.moe.routed_experts.inner_experts.w2_EDF"
    missing = {name: tensor for name, tensor in good.items() if name != "norm.weight"}
    assert refused(to_hf, missing) == ["norm.weight: missing, must be (32,)"]
    assert refused(to_hf, good | {"step": torch.zeros(1)}) == ["step: unknown, has (1,)"]
    assert refused(to_hf, good | {experts: good[experts][:3]}) == [
        f"{experts}: has (3, 32, 24), must be (4, 32, 24)"
    ]
    cast = good | {"layers.2.moe.expert_bias_E": torch.zeros(4).bfloat16()}
    assert refused(to_hf, cast) == ["layers.2.moe.expert_bias_E: torch.bfloat16, must be torch.float32"]
