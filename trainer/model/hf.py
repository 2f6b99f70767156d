"""What are our tensors called in `transformers`' AfmoeForCausalLM, on disk?

One table, read in both directions. On disk each expert has its own matrices (`experts.3.up_proj.weight`); we
hold all experts of a layer in one tensor, so to_hf gives views of it. All other tensors are only renamed.
`places` is the table for one model: an export writes what it lists, an import reads it.

Letters: D model dim, F expert hidden dim, E experts.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model.afmoe import afmoe_config

WHOLE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
BIAS = "moe.expert_bias_E"  # always float32: rounded to bfloat16 it would move as far as the rules move it
# of a layer: ours -> theirs
LAYER = {
    "attention.qkv_linear.wq.weight": "self_attn.q_proj.weight",
    "attention.qkv_linear.wk.weight": "self_attn.k_proj.weight",
    "attention.qkv_linear.wv.weight": "self_attn.v_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.gate.weight": "self_attn.gate_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_mlp_layernorm.weight",
    "post_ffn_norm.weight": "post_mlp_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "moe.router.gate.weight": "mlp.router.gate.weight",
    BIAS: "mlp.expert_bias",
    "moe.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "moe.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "moe.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
EXPERTS = {
    "moe.routed_experts.inner_experts.w1_EFD": "mlp.experts.{}.gate_proj.weight",
    "moe.routed_experts.inner_experts.w2_EDF": "mlp.experts.{}.down_proj.weight",
    "moe.routed_experts.inner_experts.w3_EFD": "mlp.experts.{}.up_proj.weight",
}

# of a configuration: ours -> theirs
KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "num_dense_layers",
    "ffn_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "window": "sliding_window",
    "global_every": "global_attn_every_n_layers",
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size",
    "num_shared_experts": "num_shared_experts",
    "route_scale": "route_scale",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
# what others may vary, and we cannot
FIXED = {
    "model_type": "afmoe",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "mup_enabled": True,
    "attention_bias": False,
    "rope_type": "default",
    "score_func": "sigmoid",
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
}
# of these: transformers takes another value where a config.json has none
SAID = ("model_type", "mup_enabled")


class Place(NamedTuple):
    """Where a tensor on disk is among ours."""

    name: str  # ours
    expert: int | None  # of a stack (E, ., .); None: the whole tensor
    shape: tuple[int, ...]  # on disk


class Problem(NamedTuple):
    """What a reader of an exported model does not do as our model does."""

    is_fatal: bool  # transformers does not load it: an export is refused
    text: str


def export_problems(model: ModelConfig) -> list[Problem]:
    """Which readers will not compute our model from an export of this shape, and what helps."""
    problems = list[Problem]()
    has_experts = model.num_dense_layers < model.num_layers
    if has_experts and not model.num_shared_experts:
        text = (
            "model.num_shared_experts=0: transformers' AfmoeForCausalLM has shared experts in every MoE "
            "layer, so it does not load an export; train with model.num_shared_experts=1 or more"
        )
        problems.append(Problem(True, text))
    if has_experts and not rows_are_aligned(model):
        text = (
            f"model.dim={model.dim} and model.expert_dim={model.expert_dim} are not both multiples of 8, "
            "which transformers' grouped experts need in bfloat16 (4 in float32): an export is right, and is "
            "to be loaded with experts_implementation='eager'"
        )
        problems.append(Problem(False, text))
    if not every_4th_is_global(model):
        text = (
            f"model.global_every={model.global_every}: llama.cpp takes every 4th layer for a global one and "
            "computes another model from an export; transformers reads the pattern"
        )
        problems.append(Problem(False, text))
    if model.window == 1 and model.global_every > 1:
        text = (
            "model.window=1: transformers' generate attends to other tokens when it has a cache; an export "
            "is right, and is to be read with use_cache=False"
        )
        problems.append(Problem(False, text))
    return problems


def every_4th_is_global(model: ModelConfig) -> bool:
    """Which llama.cpp takes for granted."""
    ours, theirs = (
        [not (i + 1) % every for i in range(model.num_layers)] for every in (model.global_every, 4)
    )
    return ours == theirs


def rows_are_aligned(model: ModelConfig) -> bool:
    return are_aligned(model.dim, model.expert_dim)


def are_aligned(dim: int, expert_dim: int) -> bool:
    """Whether grouped GEMMs in bfloat16 take the experts' rows: multiples of 16 bytes."""
    return dim % 8 == 0 == expert_dim % 8


def our_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of our state dict, from the model built on the meta device."""
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape)
            for name, tensor in afmoe_config(model, flex=False).build().state_dict().items()
        }


def places(model: ModelConfig) -> dict[str, Place]:
    """{name on disk: its place} of every tensor on disk, layer by layer."""
    ours = our_shapes(model)
    return {
        theirs: Place(name, expert, ours[name] if expert is None else ours[name][1:])
        for name, expert, theirs in _names(ours)
    }


def refuse_misfits(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """state: {name: what has a shape}. Raises: ValueError naming every tensor that is missing, unknown or
    mis-shaped.
    """
    _refuse(_misfits(state, expected))


def to_hf(state_dict: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our state dict (whole plain tensors) under the names on disk. dtypes stay: cast afterwards, all but the
    biases.

    Raises: ValueError naming every tensor that is missing, unknown, mis-shaped, or a bias not in float32.
    """
    ours = our_shapes(model)
    cast = [
        name for name, tensor in state_dict.items() if name.endswith(BIAS) and tensor.dtype != torch.float32
    ]
    _refuse(
        _misfits(state_dict, ours)
        + [f"{name}: {state_dict[name].dtype}, must be torch.float32" for name in cast]
    )
    return {
        theirs: state_dict[name] if expert is None else state_dict[name][expert]
        for name, expert, theirs in _names(ours)
    }


def from_hf(hf_state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of to_hf. dtypes stay, but the biases become float32.

    Raises: ValueError naming every tensor that is missing, unknown or mis-shaped.
    """
    on_disk = places(model)
    refuse_misfits(hf_state, {theirs: place.shape for theirs, place in on_disk.items()})
    parts: dict[str, list[Tensor]] = {}
    for theirs, (name, _, _) in on_disk.items():
        parts.setdefault(name, []).append(
            hf_state[theirs].float() if name.endswith(BIAS) else hf_state[theirs]
        )
    stacked = {place.name for place in on_disk.values() if place.expert is not None}
    return {name: torch.stack(tensors) if name in stacked else tensors[0] for name, tensors in parts.items()}


def hf_config(model: ModelConfig, *, max_position_embeddings: int) -> dict:
    """The arguments of transformers' AfmoeConfig."""
    m = model
    return {
        "architectures": ["AfmoeForCausalLM"],
        "vocab_size": m.vocab_size,
        "hidden_size": m.dim,
        "intermediate_size": m.ffn_dim,
        "moe_intermediate_size": m.expert_dim,
        "num_hidden_layers": m.num_layers,
        "num_dense_layers": m.num_dense_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": 0.5 / m.dim**0.5,
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.top_k,
        "num_shared_experts": m.num_shared_experts,
        "route_scale": m.route_scale,
        "global_attn_every_n_layers": m.global_every,
        "sliding_window": m.window,
        "layer_types": [
            "sliding_attention" if (i + 1) % m.global_every else "full_attention" for i in range(m.num_layers)
        ],
        "mup_enabled": True,  # embedding output times sqrt(D), arXiv:2602.17004, eq. 39
    }


def config_misfits(theirs: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """What a config.json says, or leaves out, that is not this model: "model.dim=128, but
    hidden_size=256".
    """
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    said = {**theirs, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    # since transformers 5; published checkpoints are older
    if "rope_theta" in (theirs.get("rope_parameters") or {}):
        said["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    layers = said.get("layer_types")
    if layers is not None and len(layers) == model.num_layers:  # transformers then looks at nothing else
        same = layers == hf_config(model, max_position_embeddings=0)["layer_types"]
        said[KEYS["global_every"]] = model.global_every if same else f"another, by layer_types={layers}"
    own = [
        (f"model.{key}", getattr(model, key), name, said.get(name, "<not there>"))
        for key, name in KEYS.items()
    ]
    fixed = [
        (name, must, said.get(name, "<not there>" if name in SAID else must)) for name, must in FIXED.items()
    ]
    wrong = [f"{name}={value}, but an AFMoE here has {must}" for name, must, value in fixed if must != value]
    return [f"{key}={must}, but {name}={value}" for key, must, name, value in own if must != value] + wrong


def _names(ours: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int | None, str]]:
    """(our name, expert or None, name on disk) of every tensor on disk; a KeyError is a module without a name
    there.
    """
    for name, shape in ours.items():
        if name in WHOLE:
            yield name, None, WHOLE[name]
            continue
        _, layer, rest = name.split(".", 2)
        if rest in EXPERTS:
            yield from ((name, e, f"model.layers.{layer}.{EXPERTS[rest].format(e)}") for e in range(shape[0]))
        else:
            yield name, None, f"model.layers.{layer}.{LAYER[rest]}"


def _misfits(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    missing = [
        f"{name}: missing, must be {tuple(shape)}" for name, shape in expected.items() if name not in state
    ]
    unknown = [
        f"{name}: unknown, has {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name not in expected
    ]
    both = [
        (name, tuple(state[name].shape), tuple(shape)) for name, shape in expected.items() if name in state
    ]
    return (
        missing + unknown + [f"{name}: has {has}, must be {must}" for name, has, must in both if has != must]
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join([f"{len(problems)} tensors do not fit the model:", *sorted(problems)]))
