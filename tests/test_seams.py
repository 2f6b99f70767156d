"""Does torchtitan's low-precision seam reach our experts, and do masked labels leave the router losses as
strong as they were?

Expected values come from torchtitan's own functions, from the same model without the change, or from losses
written out by hand in float64.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torchtitan.components.quantization.utils import swap_token_dispatcher
from torchtitan.models.common.moe import GroupedExperts

from tests.models import CPU, GQA, LENGTH, assert_close, build, one_moe, tokens_of
from trainer.balance import Balancer, LossWeights, router_loss
from trainer.model.afmoe import Afmoe, afmoe_config, moe_layers
from trainer.model.init import initialize
from trainer.model.loss import IGNORE
from trainer.model.moe import Experts, MoE

# -- low precision ----------------------------------------------------------------------------------------


class HalvedExperts(Experts):
    """What a converter of torchtitan makes of experts: the same class with another grouped GEMM."""

    @dataclass(kw_only=True, slots=True)
    class Config(Experts.Config):  # its owner, the class that it builds, is this one
        pass

    calls = 0

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        HalvedExperts.calls += 1
        return 0.5 * super()._grouped_mm(A=A, B_t=B_t, offs=offs)


def converted(config: Afmoe.Config) -> int:
    """Exchanges the experts as torchtitan's MXFP8GroupedExpertsConverter.convert does. Returns how many."""
    places = list(config.traverse(GroupedExperts.Config))
    for _, old, parent, attribute in places:
        new = HalvedExperts.Config(
            dim=old.dim, hidden_dim=old.hidden_dim, num_experts=old.num_experts, dtype=old.dtype
        )
        setattr(parent, attribute, new)
    return len(places)


def routed(moe: MoE, x_BLD: Tensor) -> Tensor:
    """The output of the routed experts alone."""
    routing = moe.router(x_BLD, moe.expert_bias_E)
    counts_E = torch.bincount(routing.ids_BLK.flatten(), minlength=GQA.num_experts)
    return moe.routed_experts(x_BLD, routing.gates_BLK, routing.ids_BLK, counts_E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_override_of_the_grouped_matmul_is_used(dtype):
    """By hand: silu(g / 2) * u / 2 through the down projection, halved again; on a CPU in float32, too, where
    the experts have a loop of their own."""
    config = afmoe_config(GQA, flex=False)
    assert converted(config) == GQA.num_layers - GQA.num_dense_layers
    with torch.device("meta"):
        model = config.build()
    initialize(model, device=CPU, seed=0)
    experts = moe_layers(model)[0].routed_experts.inner_experts
    experts.dtype, HalvedExperts.calls = dtype, 0
    x_RD = torch.randn(10, GQA.dim, generator=torch.Generator().manual_seed(1))
    out_RD = experts(x_RD, torch.tensor([3, 0, 2, 5, 0, 0, 0, 0]))
    assert HalvedExperts.calls == 3
    expected = []
    for x, e in zip(x_RD, [0] * 3 + [2] * 2 + [3] * 5, strict=True):
        gate, up = experts.w1_EFD[e] @ x / 2, experts.w3_EFD[e] @ x / 2
        expected.append(experts.w2_EDF[e] @ (torch.nn.functional.silu(gate) * up) / 2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close({"out": out_RD}, {"out": torch.stack(expected)}, relative=tolerance)


def test_the_loop_and_the_seam_agree():
    """Output and gradients to 1e-6: single rows and sums in place may differ in the last bit."""

    class Same(Experts):
        @dataclass(kw_only=True, slots=True)
        class Config(Experts.Config):
            pass

        def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
            return torch._grouped_mm(A, B_t, offs=offs)

    experts = one_moe(GQA).routed_experts.inner_experts
    seam = Same.Config(dim=GQA.dim, hidden_dim=GQA.expert_dim, num_experts=GQA.num_experts).build()
    seam.load_state_dict(experts.state_dict())
    x_RD = torch.randn(40, GQA.dim, generator=torch.Generator().manual_seed(1))
    results = []
    for module in (experts, seam):
        x = x_RD.clone().requires_grad_()
        out_RD = module(x, torch.tensor([9, 0, 4, 12, 1, 5, 2, 7]))
        out_RD.square().sum().backward()
        results.append({"out": out_RD, "x": x.grad} | {n: p.grad for n, p in module.named_parameters()})
    assert_close(results[0], results[1], relative=1e-6)


def test_a_swapped_dispatcher_is_refused():
    """The exchange is torchtitan's own function, which its converters call."""
    config = afmoe_config(GQA, flex=False)
    for layer in config.layers[GQA.num_dense_layers :]:
        swap_token_dispatcher(layer.moe.routed_experts, pad_multiple=32)
    with (
        torch.device("meta"),
        pytest.raises(TypeError, match="token_dispatcher=TorchAOTokenDispatcher.Config: .* gathers"),
    ):
        config.build()


# -- masked labels ----------------------------------------------------------------------------------------

EVERY_LOSS = LossWeights(sequence=0.1, switch=0.2, batch=0.3, z=0.05)


def step_gradients(
    model: Afmoe, tokens_BL: Tensor, labels_BL: Tensor, *, label_share: float
) -> dict[str, Tensor]:
    """Of one optimizer step of two microbatches, divided by the number of targets as the loop divides."""
    Balancer(moe_layers(model), None, steps=1).set(rate=1.0, loss_weights=EVERY_LOSS, label_share=label_share)
    model.zero_grad()
    for tokens, labels in zip(tokens_BL, labels_BL, strict=True):
        model(tokens[None], None, labels[None]).backward()
    num_targets = (labels_BL != IGNORE).sum()
    return {name: p.grad / num_targets for name, p in model.named_parameters()}


def test_masked_labels_leave_the_router_losses_as_strong_as_they_were():
    """80 % of the labels are withheld, unevenly: the router losses' part of the gradient is that of the step
    without a mask (2e-5 relative), and five times as large without the factor. That part is the gradient of
    the step minus the gradient of the same step with a factor of 0."""
    tokens_BL, labels_BL = tokens_of(GQA, 2, LENGTH), tokens_of(GQA, 2, LENGTH, seed=3)
    masked_BL = labels_BL.clone()
    masked_BL.flatten()[: int(0.8 * labels_BL.numel()) + 1] = IGNORE
    share = (masked_BL != IGNORE).sum().item() / labels_BL.numel()

    def router_part(labels: Tensor, label_share: float) -> dict[str, Tensor]:
        model = build(GQA, loss_weights=EVERY_LOSS)
        whole = step_gradients(model, tokens_BL, labels, label_share=label_share)
        bare = step_gradients(model, tokens_BL, labels, label_share=0.0)
        return {name: whole[name] - bare[name] for name in whole if name.endswith("router.gate.weight")}

    whole = router_part(labels_BL, 1.0)
    assert share < 0.2 and all(gradient.norm() > 0 for gradient in whole.values())
    assert_close(router_part(masked_BL, share), whole, relative=2e-5)
    times = {name: gradient / share for name, gradient in whole.items()}
    assert_close(router_part(masked_BL, 1.0), times, relative=2e-5)


def test_a_step_without_masks_is_bit_for_bit_what_it_was():
    """The factor is 1 unless it is set: the attached loss starts its gradient with exactly 1."""
    layer = one_moe(GQA, loss_weights=EVERY_LOSS)
    x_BLD = torch.randn(2, 10, GQA.dim, generator=torch.Generator().manual_seed(4))
    moe_gradient = torch.autograd.grad(layer(x_BLD).sum(), layer.router.gate.weight)[0]
    layer.eval()  # nothing is attached
    routing = layer.router(x_BLD, layer.expert_bias_E)
    loss = router_loss(
        EVERY_LOSS, routing.scores_BLE, routing.logits_BLE, routing.ids_BLK, layer.load_E, None
    )
    counts_E = torch.bincount(routing.ids_BLK.flatten(), minlength=GQA.num_experts)
    out_BLD = layer.routed_experts(x_BLD, routing.gates_BLK, routing.ids_BLK, counts_E)
    total = (out_BLD + layer.shared_experts(x_BLD)).sum() + loss
    expected = torch.autograd.grad(total, layer.router.gate.weight)[0]
    torch.testing.assert_close(moe_gradient, expected, rtol=1e-6, atol=1e-7)
    assert layer.label_share == 1
