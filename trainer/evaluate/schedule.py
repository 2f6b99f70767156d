"""When is the model evaluated, and where do the results go?

`evaluate` in the configuration names objects. Each has an `interval`, makes its rows once (`parts`, on rank
0, before the first step: what cannot be read is refused there), and reads its numbers from their sums
(`result`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from trainer.evaluate.kernel import Measured, measure
from trainer.evaluate.rows import Part
from trainer.evaluate.sets import Material
from trainer.run.state import Run


class Evaluation(Protocol):
    """interval: [steps]; at_start: also before the first step. best: the number by which two checkpoints are
    compared, less is better (`checkpoint.keep_best`). One that asks something else of the model than what
    `measure` asks has a method `ask` of the same arguments and meaning.
    """

    interval: int
    at_start: bool
    best: str

    def parts(self, material: Material) -> list[Part]:
        """The rows. On rank 0. Raises: ConfigError, ValueError, OSError."""
        ...

    def result(self, measured: Sequence[Measured]) -> dict[str, Any]:
        """JSON; its numbers that are no part of a list or a dict are shown and tracked."""
        ...


class Evaluations:
    """Those of a run, in the order of their names.

    before: results that evaluations.jsonl has already. keep_best: the name of the evaluation whose best
    checkpoint is kept, or None.
    """

    def __init__(
        self,
        named: Mapping[str, Evaluation],
        parts: Mapping[str, list[Part]],
        *,
        before: Sequence[dict[str, Any]] = (),
        keep_best: str | None = None,
    ) -> None:
        self.named, self.parts, self.keep_best = dict(sorted(named.items())), parts, keep_best
        self.results = list(before)

    def due(self, run: Run, *, at_start: bool = False) -> list[str]:
        """The names of those that are to be made at this step and were not. at_start: of this process."""
        made = {(result["step"], result["evaluation"]) for result in self.results}
        return [
            name
            for name, one in self.named.items()
            if (run.step, name) not in made and self._is_due(one, run, at_start=at_start)
        ]

    def _is_due(self, one: Evaluation, run: Run, *, at_start: bool) -> bool:
        at_interval = run.step > 0 and run.step % one.interval == 0
        return at_interval or run.step == run.last_step or (at_start and one.at_start)

    def make(
        self,
        run: Run,
        names: Sequence[str],
        *,
        report: Callable[[dict[str, Any]], None] = lambda result: None,
        heartbeat: Callable[[str], None] = lambda phase: None,
    ) -> bool:
        """Makes these evaluations; `report` hears of each result. Collective.

        Returns False if some rank was told to stop meanwhile (`run.stop.agreed`); the evaluation that it
        interrupted has no result.
        """
        for name in names:
            start_s, measured = time.perf_counter(), list[Any]()
            ask = getattr(self.named[name], "ask", measure)
            for part in self.parts[name]:
                sums = ask(run, part, heartbeat=lambda name=name: heartbeat(f"evaluating {name}"))
                if sums is None:
                    return False
                measured.append(sums)
            result = {"step": run.step, "tokens": run.tokens, "evaluation": name}
            result |= self.named[name].result(measured)
            self.results.append(result)
            run.checkpoints.best = self.best_step()
            report(result | {"seconds": time.perf_counter() - start_s})
        return True

    def best_step(self) -> int | None:
        """The step with the best result of `keep_best`, the earliest of equals; None: there is none."""
        if self.keep_best is None:
            return None
        number = self.named[self.keep_best].best
        ranked = [
            (result[number], result["step"])
            for result in self.results
            if result["evaluation"] == self.keep_best and result["step"] > 0
        ]
        return min(ranked)[1] if ranked else None

    def rewind(self, run: Run) -> None:
        """The run went back to the step where it is now."""
        self.results = [result for result in self.results if result["step"] <= run.step]
        run.checkpoints.best = self.best_step()
