"""Zaremba's language models, by scripts/zaremba_main.py, which resumes to the same bits."""

from __future__ import annotations

import csv
import json

from ..job import Job, Outcome, Step, System, report
from ..results import Point

#: The program's run folder, in that of the job.
_RUN = "model"


class Zaremba(System):
    """The baseline runs on this library's dense kernels, or on PyTorch's own if the job says ``stock``."""

    def steps(self, job: Job) -> list[str]:
        return ["train"]

    def step(self, job: Job, name: str) -> Step:
        assert job.row.config is not None, job.row.name
        program = "reproduction/dense_baseline.py" if self._dense(job) else "zaremba_main.py"
        command = [*job.script(program), str(job.source / job.row.config), "--mode", job.row.mode]
        command += ["--data", f"data/{job.row.data}", "--out", _RUN, "--seed", str(job.seed)]
        command += ["--threads", str(job.threads)]
        if job.on_gpu:
            command += ["--device", "cuda"]
        if not job.full:
            command += ["--epochs", str(job.length)]
        if not (job.folder / _RUN / "checkpoint.pt").exists():
            return Step(command)
        return Step([*command, "--resume"], since=len(self.curve(job)))

    def curve(self, job: Job) -> list[Point]:
        path = job.folder / _RUN / "log.csv"
        if not path.exists():
            return []
        names = ("epoch", "seconds", "learning_rate", "train_perplexity", "valid_perplexity")
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: float(line[name]) for name in names} for line in csv.DictReader(file)]

    def outcome(self, job: Job) -> Outcome:
        result = json.loads((job.folder / _RUN / "result.json").read_text(encoding="utf-8"))
        curve = self.curve(job)
        # None if only the test was left to do when the last process began.
        told = report(job.read_log("train"))
        if told is not None:
            backend, lost = told.backend, told.hints_lost
        else:
            backend, lost = None if self._dense(job) or job.row.mode != "random" else "stock", None
        dense = ["random dropout on this library's dense kernels, not PyTorch's own"] if self._dense(job) else []
        return Outcome(
            length=int(result["epoch"]),
            metrics={f"{part}_perplexity": result[f"{part}_perplexity"] for part in ("train", "valid", "test")},
            seconds=sum(point["seconds"] or 0.0 for point in curve),
            skipped=None if job.row.mode == "random" else result["skipped"],
            hints_lost=lost,
            backend=backend,
            notes=dense,
        )

    def _dense(self, job: Job) -> bool:
        return job.row.mode == "random" and not job.stock
