"""How do the runs of a study that kept their checkpoints do on files that none of them was trained on? [nats]

    triquetra ablate study=rsdb run_dir=runs/ablate keep_checkpoints=true
    python -m benchmarks.held_out runs/ablate/rsdb '.*[gk]\\.py'

The files of the Python library whose names match; all runs see the same rows, in which each file has about as
many tokens. Means and differences to the study's reference as in the study's own tables.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.data import PythonSource, StreamConfig, TokenStream
from trainer.lab.ablate import table
from trainer.lab.ablate.programs import PROGRAMS
from trainer.lab.ablate.study import Job, jobs_of, load_study
from trainer.lab.ablate.workers import FINISHED, record_of
from trainer.lab.intervals import estimate
from trainer.run.build import build
from trainer.run.recover import resume

ROWS, TOKENS = 16, 65_536
NAME = "held-out loss"


def held_out_loss(job: Job, *, match: str) -> float:
    """It is kept in the job's directory."""
    kept, key = job.directory / "held_out.json", f"{match} {TOKENS}"
    if kept.exists() and key in (known := json.loads(kept.read_text())):
        return known[key]
    run = build(job.config)
    if (found := run.checkpoints.newest_good()) is None:
        raise SystemExit(f"{job.directory} has no checkpoint: run the study with keep_checkpoints=true")
    resume(run, found)
    source, seq_len = PythonSource(match), job.config.seq_len
    # all files open
    sizes = StreamConfig(seq_len=seq_len, global_batch=ROWS, num_streams=1, seed=0, buffer=len(source))
    rows = TokenStream(sizes, source=source, tokenizer=run.stream.tokenizer)
    run.model.lm_head.z_loss_weight = 0.0
    loss, targets = 0.0, 0
    with torch.no_grad():
        for _ in range(TOKENS // (ROWS * seq_len)):
            (batch,) = rows.next_step(ROWS)
            loss += run.model(batch.tokens_BL, batch.positions_BL, batch.labels_BL).item()
            targets += int((batch.labels_BL >= 0).sum())
    run.stream.close()
    dist.destroy_process_group()
    kept.write_text(json.dumps({key: loss / targets}))
    return loss / targets


def main() -> None:
    directory, match = Path(sys.argv[1]), sys.argv[2]
    study = load_study(directory.name)
    results: table.Results = {}
    for job in jobs_of(study, PROGRAMS["train"], directory):
        record = record_of(job)
        if record is not None and record["outcome"] in FINISHED:
            results[job.arm, job.seed] = {**record, "values": {NAME: held_out_loss(job, match=match)}}
    references = sys.argv[3:] or [study.reference]
    lines = []
    for arm in study.arms:
        found = list(table.values_of(results, arm, NAME).values())
        changes = [
            table.paired(results, arm, reference, NAME) if arm != reference else None
            for reference in references
        ]
        cells = ["" if e is None else str(e) + (" *" if e.excludes_zero else "") for e in changes]
        lines.append([f"`{arm}`", str(len(found)), table.cell(estimate(found), of=len(found)), *cells])
    print(table.grid(["arm", "seeds", NAME, *(f"to `{reference}`" for reference in references)], lines))


if __name__ == "__main__":
    main()
