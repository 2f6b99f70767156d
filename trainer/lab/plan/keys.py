"""What do keys and values cost that come from the other ranks of a row (context parallelism)?

Traces are of whole rows; these bytes follow from the row's length alone (trainer/model/context.py).
"""

from collections import Counter
from functools import cache

from trainer.config import Config
from trainer.lab.plan.layout import Layout
from trainer.lab.plan.watch import Sent
from trainer.model.context import Cut
from trainer.program import StepSettings

ALIVE = 3  # of a layer that runs backward: what was fetched, its gradients, and what travels [estimate]


class Keys:
    """Of a microbatch. sent: by phase, as Watch counts it; kept: [bytes] at most beside a rank's own."""

    def __init__(self, config: Config, layout: Layout, now: StepSettings) -> None:
        m, num_bytes = config.model, 4 if config.dtype == "float32" else 2
        token = 2 * m.num_kv_heads * m.head_dim * num_bytes * layout.micro_batch
        num_global = m.num_layers // m.global_every
        near, far = (
            token * most_fetched(layout.cp, now.seq_len, m.window, kind) for kind in (m.window, None)
        )
        every = (m.num_layers - num_global) * near + num_global * far
        is_repeated = layout.policy != "none"
        self.kept = ALIVE * max(near, far if num_global else 0) if is_repeated else every
        self.sent = Counter[Sent]()
        # a rank's own share of an all-to-all does not travel, and is counted
        whole = every * layout.cp / max(1, layout.cp - 1)
        for phase, passes in (("forward", 1), ("backward", 1 + is_repeated)):
            if whole:
                self.sent[Sent(phase, "all-to-all", layout.cp, 1, "keys")] = passes * whole


@cache
def most_fetched(size: int, length: int, window: int, kind: int | None) -> int:
    """[tokens] of a row, by the rank that fetches most, in one pass of one layer."""
    if size == 1:
        return 0
    cuts = [Cut(size=size, rank=rank, window=window) for rank in range(size)]
    return max(sum(cut.exchange(length, kind).receive_counts) for cut in cuts)
