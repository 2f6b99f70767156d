"""A small model in which everything matters, and how near two sets of tensors must be."""

import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model.afmoe import Afmoe, afmoe_config, moe_layers
from trainer.model.init import initialize
from trainer.model.moe import MoE

CPU = torch.device("cpu")

# two layers per key-value head, heads wider than the model, a window shorter than the rows
GQA = ModelConfig(
    vocab_size=61,
    dim=32,
    num_layers=5,
    num_dense_layers=1,
    ffn_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    window=6,
    num_experts=8,
    top_k=3,
    expert_dim=24,
    num_shared_experts=1,
    route_scale=2.448,
)

LENGTH = 24


@torch.no_grad()
def build(shape: ModelConfig, **extra) -> Afmoe:
    """A model in which everything matters: spread routing scores, random biases, norm gains away from 1."""
    with torch.device("meta"):
        model = afmoe_config(shape, flex=False, **extra).build()
    initialize(model, device=CPU, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("expert_bias_E"):
            tensor.copy_(0.2 * noise)
        elif tensor.ndim == 1:
            tensor.mul_(1 + 0.3 * noise)
        elif "router" in name:
            tensor.mul_(3)  # scores from 0.05 to 0.95
    return model.train()


def tokens_of(shape: ModelConfig, *size: int, seed: int = 2) -> Tensor:
    return torch.randint(shape.vocab_size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float) -> None:
    """Each tensor by itself: |actual - expected| <= relative |expected|, so a zero must be a zero."""
    assert actual.keys() == expected.keys()
    errors = {name: float((actual[name] - e).norm()) for name, e in expected.items()}
    assert not {
        name: error for name, error in errors.items() if not error <= relative * float(expected[name].norm())
    }


def one_moe(shape: ModelConfig, **extra) -> MoE:
    return moe_layers(build(shape, **extra))[0]
