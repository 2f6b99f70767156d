"""What does a block keep for its backward pass, and what does it compute a second time?"""

from dataclasses import dataclass

import torch
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

GROUPED_GEMMS = {torch.ops.aten._grouped_mm.default, torch.ops.aten._scaled_grouped_mm.default}


class Selective(SelectiveAC):
    """Saves what attention, all-to-alls and the choice of experts return, and every second matmul.

    A matmul in the shape of the router's gate is repeated. saves_experts: also what the grouped GEMMs return;
    otherwise the experts are computed a second time. In Large (F = D = 3072, K = 4) they return 3 x 2 bytes
    x K x D = 74 kB a token and layer: 0.6 GB for a row of 8,192.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        saves_experts: bool = False

    def get_save_ops(self) -> set:
        return super().get_save_ops() | (GROUPED_GEMMS if self.config.saves_experts else set())


CHECKPOINTING = {
    "full": FullAC.Config(),
    "selective": Selective.Config(),
    "selective_experts": Selective.Config(saves_experts=True),
}
