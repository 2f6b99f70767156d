"""What is logged, in which unit, and where does it go?

metrics.jsonl has one JSON object per step (docs/reference.md lists the names and units), experts.jsonl the
load of every expert in coarse bins (trainer/history.py), alarms.jsonl what the guard said. A tracker (Weights
& Biases, TensorBoard) gets the same values; its failure is reported once and never stops a run. The terminal
shows a progress bar, or a line every `interval` steps where it is not interactive.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.balance import Experts
from trainer.history import ExpertHistory
from trainer.records import StepLog

# beside metrics.jsonl
EVALUATIONS, EXPERTS, ALARMS = "evaluations.jsonl", "experts.jsonl", "alarms.jsonl"
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """`histograms` may be missing: then none are made."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def histograms(self, values: dict[str, Tensor], step: int) -> None: ...
    def alert(self, text: str, step: int) -> None: ...
    def finish(self) -> None: ...


class WandbTracker:
    """Weights & Biases. mode: online | offline; offline runs lie in <run>/wandb (`wandb sync` uploads
    them). A run that goes on after a restart has the same id, its name.
    """

    def __init__(self, run_directory: Path, config: dict[str, Any], *, project: str, mode: str = "online"):
        import wandb

        self.run = wandb.init(
            project=project,
            name=run_directory.name,
            id=run_directory.name,
            resume="allow",
            dir=run_directory,
            config=config,
            mode=mode,  # type: ignore[arg-type]  # wandb names the valid ones in its own error
            settings=wandb.Settings(init_timeout=10, console="off", silent=True),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def histograms(self, values: dict[str, Tensor], step: int) -> None:
        import wandb

        self.run.log({name: wandb.Histogram(x.tolist()) for name, x in values.items()}, step=step)

    def alert(self, text: str, step: int) -> None:
        self.run.alert(title="expert balance", text=text)

    def finish(self) -> None:
        self.run.finish()


class TensorboardTracker:
    """TensorBoard event files in <run>/tensorboard."""

    def __init__(self, run_directory: Path, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run_directory / "tensorboard")
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def histograms(self, values: dict[str, Tensor], step: int) -> None:
        for name, x in values.items():
            self.writer.add_histogram(name, x, step)

    def alert(self, text: str, step: int) -> None:
        self.writer.add_text("alarm", text, step)

    def finish(self) -> None:
        self.writer.close()


def batch_heterogeneity(loss_U: Tensor, targets_U: Tensor) -> float:
    """[nats] How much worse than the mean the worst microbatch of a step is (arXiv:2602.17004, eq. 40).

    loss_U: summed over the targets of each of U microbatches; those without a target do not count.
    """
    mean_U = (loss_U / targets_U)[targets_U > 0]
    return (mean_U.max() - mean_U.mean()).item() if len(mean_U) else 0.0


class Window:
    """The last values of loss and gradient norm, and how heavy their tails are: kurtosis is 3 for a Gaussian,
    and large where a few steps stand out. Its state belongs in a checkpoint."""

    SIZE, LEAST = 256, 16  # [steps] kept, and before anything is said

    def __init__(self) -> None:
        self.values_2W = torch.zeros(2, self.SIZE, dtype=torch.float64)
        self.seen = torch.zeros((), dtype=torch.int64)

    def add(self, *, loss: float, grad_norm: float) -> dict[str, float]:
        self.values_2W[:, self.seen % self.SIZE] = torch.tensor([loss, grad_norm], dtype=torch.float64)
        self.seen += 1
        if self.seen < self.LEAST:
            return {}
        return {
            "loss_kurtosis": kurtosis(self.applied_2W[0]),
            "grad_norm_kurtosis": kurtosis(self.applied_2W[1]),
        }

    @property
    def applied_2W(self) -> Tensor:
        """Loss and gradient norm of the steps that it has, in no order."""
        return self.values_2W[:, : self.seen]

    def state_dict(self) -> dict[str, Tensor]:
        return {"values_2W": self.values_2W, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.values_2W.copy_(state["values_2W"])
        self.seen.copy_(state["seen"])


def kurtosis(values_W: Tensor) -> float:
    """The fourth central moment over the squared variance; 0 if all are equal."""
    off_W = values_W - values_W.mean()
    variance = off_W.square().mean()
    return (off_W.pow(4).mean() / variance.square()).item() if variance > 0 else 0.0


class MetricsLog:
    """Where rank 0 sends each step's metrics. `start_tracker`: None, or makes the tracker."""

    def __init__(
        self,
        path: Path,
        *,
        steps: int,
        interval: int,
        after_step: int = 0,
        start_tracker: Callable[[], Tracker] | None = None,
        histograms: int | None = None,
    ):
        """after_step: the step that the run resumes from; later lines of an interrupted run are dropped.
        histograms [steps]: how often the tracker gets those of load and bias; None: never.
        """
        self.lines = StepLog(path, after_step=after_step)
        self.evaluations = StepLog(path.with_name(EVALUATIONS), after_step=after_step)
        self.alarms = StepLog(path.with_name(ALARMS), after_step=after_step)
        self.experts = ExpertHistory(path.with_name(EXPERTS), after_step=after_step)
        self.steps, self.interval, self.histograms = steps, interval, histograms
        self.tracker = self._guarded(start_tracker) if start_tracker else None
        # the bar is drawn on stdout and takes over what is printed to stderr
        self.bar = _Bar(steps, after_step) if sys.stdout.isatty() and sys.stderr.isatty() else None

    def write(self, metrics: dict[str, float], *, alarms: Sequence[str] = ()) -> None:
        """alarms: of the guard; printed and passed on to the tracker."""
        step = int(metrics["step"])
        self.lines.add(metrics)
        if self.tracker is not None:
            tracker = self.tracker
            self._guarded(lambda: tracker.log(metrics, step))
            self._guarded(lambda: [tracker.alert(text, step) for text in alarms])
        for text in alarms:
            self.alarms.add({"step": step, "text": text})
            log.warning("guard: %s", text)
        if self.bar is not None:
            self.bar.update(step, summary(metrics))
        elif step == 1 or step % self.interval == 0 or step == self.steps:
            print(f"step {step}/{self.steps}  {summary(metrics)}", flush=True)

    def write_evaluation(self, result: dict[str, Any]) -> None:
        """A line of evaluations.jsonl and one of the terminal; the tracker gets eval/<name>/<number>."""
        self.evaluations.add(result)
        name, step, numbers = result["evaluation"], result["step"], scalars(result)
        if self.tracker is not None:
            tracker, tracked = self.tracker, {f"eval/{name}/{key}": value for key, value in numbers.items()}
            self._guarded(lambda: tracker.log(tracked, step))
        shown = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
        print(f"step {step}/{self.steps}  {name}: {shown}", flush=True)

    def watch(self, step: int, experts: Experts) -> None:
        """A watcher of the Balancer, for experts.jsonl and the tracker's histograms."""
        load_ME, bias_ME, gain_M = experts
        gain = None if gain_M is None else gain_M.numpy()
        self.experts.add(step, load_ME=load_ME.numpy(), bias_ME=bias_ME.numpy(), gain_M=gain)
        if self.histograms and step % self.histograms == 0 and hasattr(self.tracker, "histograms"):
            tracker, values = self.tracker, {"load": load_ME, "bias": bias_ME}
            named = {
                f"balance/{name}/{m}": x_E for name, x_ME in values.items() for m, x_E in enumerate(x_ME)
            }
            self._guarded(lambda: tracker.histograms(named, step))

    @property
    def records(self) -> tuple[StepLog | ExpertHistory, ...]:
        return self.lines, self.evaluations, self.alarms, self.experts

    def rewind(self, step: int) -> None:
        """The run went back to this step: lines of later ones are dropped."""
        for record in self.records:
            record.rewind(step)

    def close(self) -> None:
        for record in self.records:
            record.close()
        if self.bar is not None:
            self.bar.close()
        if self.tracker is not None:
            self._guarded(self.tracker.finish)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """A tracker may be down; the run goes on without it."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001  # whatever a third party raises
            log.warning("tracking stopped, metrics.jsonl goes on: %s: %s", type(error).__name__, error)
            self.tracker = None
            return None


def summary(metrics: dict[str, float]) -> str:
    loss = f"loss {metrics['loss']:.3f}" if "loss" in metrics else "not applied"
    text = f"{loss}  {metrics['tokens_per_s']:,.0f} tokens/s"
    if "balance/max_violation" in metrics:
        text += f"  MaxVio {metrics['balance/max_violation']:.2f}"
    return text


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that stand by themselves: those in lists and tables do not."""
    return {key: value for key, value in result.items() if isinstance(value, float) and key != "seconds"}


class _Bar:
    def __init__(self, steps: int, completed: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.progress = Progress(*columns, refresh_per_second=4)
        self.task = self.progress.add_task("", total=steps, completed=completed)
        self.progress.start()

    def update(self, step: int, text: str) -> None:
        self.progress.update(self.task, completed=step, description=text)

    def close(self) -> None:
        self.progress.stop()
