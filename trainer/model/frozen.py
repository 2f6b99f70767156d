"""Which parameters are trained? `train_only` names parts of the model; all others stay as they are.

A frozen parameter has no gradient, so nothing is reduced over ranks for it, and no optimizer knows it. The
backward pass still goes through all layers: it is where routed tokens are counted, and the balancing rule
moves the biases of all layers, which are no parameters.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from trainer.config import atoms_of
from trainer.model.afmoe import Afmoe


def train_only(model: Afmoe, names: Sequence[str]) -> None:
    """Freezes all other parameters. Raises: ValueError if nothing is left to train."""
    freeze(model, names)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"train_only={list(names)}: this model has no such parameter; name another part")


def freeze(model: Afmoe, names: Sequence[str]) -> None:
    """All parameters but these, of which a part of a model may have none."""
    atoms = atoms_of(names)
    for atom, parameter in parts(model):
        parameter.requires_grad_(atom in atoms)
    if not model.tok_embeddings.weight.requires_grad:
        model.tok_embeddings.register_forward_hook(begin_backward)


def begin_backward(embedding: nn.Module, _: Any, x_BLD: Tensor) -> Tensor:
    """The backward pass ends here, below the first layer, and not above the last frozen one."""
    return x_BLD.requires_grad_() if embedding.training else x_BLD


def parts(model: Afmoe) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, once, and what part of the model it is."""
    yield "embedding", model.tok_embeddings.weight
    yield "final_norm", model.norm.weight
    yield "head", model.lm_head.weight
    for layer in model.layers.values():
        side = "local" if layer.attention.local else "global"
        for name, parameter in layer.named_parameters():
            yield f"{side}_{kind_of(name)}", parameter


def kind_of(name: str) -> str:
    """Of a parameter by its name in its layer."""
    module = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
    if module.startswith("attention."):
        return "attention"
    if module.startswith("moe.router."):
        return "router"
    if module.startswith("moe."):
        return "experts"
    return "ffn" if module.startswith("feed_forward.") else "norms"
