"""Draws the README's picture: the load of every expert at the end of two runs, balanced and not.

    python -m benchmarks.heatmap [docs/heatmap.svg]       (2 minutes on 2 cores)

Both runs are `experiment=synthetic`, 400 steps; the load is that of the last tenth of the steps.
"""

import sys
import tempfile
from html import escape
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import train
from trainer.balance.trace import Trace
from trainer.config import load

CELL, GAP, TOP, LEFT = 12, 40, 46, 52  # [px]
STOPS = (
    (0.0, (22, 27, 58)),
    (0.1, (69, 39, 118)),
    (0.5, (58, 123, 168)),
    (1.0, (94, 190, 150)),
    (2.5, (247, 209, 61)),
    (6.0, (220, 50, 47)),
)  # load in even shares -> colour; 1 is balanced


def loads(balance: str, run_dir: Path) -> Tensor:
    """(M, E) Load of each expert in even shares over the last tenth of a run."""
    settings = ["experiment=synthetic", f"balance={balance}", f"run_dir={run_dir}", "balance.trace=trace"]
    config = load(settings)
    if (code := train.train(config)) not in (train.OK, train.COLLAPSED):
        raise SystemExit(f"the run with {settings} was stopped, exit code {code}; start again")
    counts_SME = torch.stack([stats.counts_ME for stats in Trace(run_dir / config.name / "trace")])
    counts_ME = counts_SME[-len(counts_SME) // 10 :].sum(0).double()
    return counts_ME / counts_ME.mean(-1, keepdim=True)


def colour(share: float) -> str:
    share = min(share, STOPS[-1][0])
    below = max(i for i, (at, _) in enumerate(STOPS[:-1]) if at <= share)
    (low, first), (high, last) = STOPS[below : below + 2]
    part = (share - low) / (high - low)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(first, last, strict=True))


def text(x: float, y: float, content: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(content)}</text>'


def panel(left: float, title: str, load_ME: Tensor) -> list[str]:
    lost = int((load_ME < 0.1).sum())
    parts = [text(left, 16, title, bold=True)]
    parts.append(text(left, 34, f"{lost} of {load_ME.numel()} experts collapsed"))
    for m, load_E in enumerate(load_ME.tolist()):
        for e, share in enumerate(load_E):
            x, y = left + e * CELL, TOP + m * 2 * CELL
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{2 * CELL - 1}" fill="{colour(share)}">'
                f"<title>layer {m}, expert {e}: {share:.2f} even shares</title></rect>"
            )
    return parts


def drawn(panels: dict[str, Tensor]) -> str:
    layers, experts = next(iter(panels.values())).shape
    width = LEFT + len(panels) * (experts * CELL + GAP)
    height = TOP + layers * 2 * CELL + 40
    parts = [text(LEFT - 8, TOP + (m * 2 + 1.3) * CELL, f"layer {m}", anchor="end") for m in range(layers)]
    for i, (title, load_ME) in enumerate(panels.items()):
        parts += panel(LEFT + i * (experts * CELL + GAP), title, load_ME)
    y = TOP + layers * 2 * CELL + 14
    for i, (share, _) in enumerate(STOPS):
        x = LEFT + i * 62
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour(share)}"/>')
        parts.append(text(x + 16, y + 10, f"{share:g}{'+' if i == len(STOPS) - 1 else ''}"))
    parts.append(text(LEFT + len(STOPS) * 62, y + 10, "load of an expert, in even shares"))
    style = "font: 12px system-ui, sans-serif; fill: #6b7280"
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">'
    return "\n".join([head, *parts, "</svg>", ""])


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/heatmap.svg")
    with tempfile.TemporaryDirectory() as directory:
        panels = {
            "balance=smebu": loads("smebu", Path(directory)),
            "balance=none": loads("none", Path(directory)),
        }
    out.write_text(drawn(panels))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
