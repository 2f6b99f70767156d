"""Draws the losses of `study=lr_transfer` over the learning rate, one line for each width, from that at 2e-2
of the same seed.

triquetra ablate study=lr_transfer
python -m benchmarks.lr_transfer runs/ablate/lr_transfer docs/studies/lr_transfer.svg      (needs matplotlib)
"""

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "triquetra"  # the same file each time
from matplotlib import pyplot  # noqa: E402

REFERENCE = 2e-2


def losses(directory: Path) -> dict[int, dict[float, list[float]]]:
    """By width and learning rate, one for each seed: the mean over the last tenth of the steps, as the
    study's table has it.
    """
    found = defaultdict(lambda: defaultdict(list))
    for job in sorted(directory.glob("d*-s*")):
        width, rate = re.fullmatch(r"d(\d+)_(\S+)-s\d+", job.name).groups()
        steps = [json.loads(line)["loss"] for line in (job / "metrics.jsonl").read_text().splitlines()]
        found[int(width)][float(rate)].append(statistics.mean(steps[-max(1, len(steps) // 10) :]))
    return found


def main() -> None:
    directory, out = (Path(argument) for argument in sys.argv[1:3])
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for width, by_rate in sorted(losses(directory).items()):
        rates = sorted(by_rate)
        by_rate = {
            r: [loss - start for loss, start in zip(by_rate[r], by_rate[REFERENCE], strict=True)]
            for r in rates
        }
        means = [statistics.mean(by_rate[rate]) for rate in rates]
        print(
            f"d = {width}: "
            + ", ".join(f"{rate:g}: {mean:+.3f}" for rate, mean in zip(rates, means, strict=True))
        )
        (line,) = axes.plot(rates, means, marker="o", label=f"d = {width}")
        color = line.get_color()
        axes.fill_between(
            rates, [min(by_rate[r]) for r in rates], [max(by_rate[r]) for r in rates], color=color, alpha=0.2
        )
        axes.plot(
            rates[means.index(min(means))],
            min(means),
            marker="o",
            markersize=12,
            fillstyle="none",
            color=color,
        )
    axes.set(xscale="log", xlabel="Muon's peak learning rate", ylabel="loss, from that at 2e-2 [nats]")
    axes.set_title("Circled: the best rate of a width")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
