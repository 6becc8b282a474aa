"""achernodub/targer, unmodified, by scripts/ner_main.py."""

from __future__ import annotations

import csv
import json
import shutil

from sd_plugin.errors import UsageError
from sd_plugin.patches._checkout import commit_of
from sd_plugin.patches.targer import CHECKOUT

from ..job import Job, Outcome, Step, System, locate, report
from ..results import Point

_RUN = "ner"


class Targer(System):
    repeated = "the whole training: the host cannot resume one"

    def problem(self, job: Job) -> str | None:
        try:
            locate(CHECKOUT)
        except UsageError as error:
            return str(error)
        if shutil.which("perl") is None:
            return "no perl is installed, by which the host scores: install it, for example apt-get install perl"
        return None

    def steps(self, job: Job) -> list[str]:
        return ["train"]

    def step(self, job: Job, name: str) -> Step:
        # Left by a process that was killed.
        shutil.rmtree(job.folder / _RUN, ignore_errors=True)
        command = [*job.script("ner_main.py"), f"--sd={job.row.mode}", "--data", f"data/{job.row.data}"]
        command += ["--run-dir", _RUN, "--epoch-num", str(job.length), "--seed-num", str(job.seed)]
        if job.on_gpu:
            command += ["--gpu", "0"]
        return Step(command, 0, {CHECKOUT.variable: str(locate(CHECKOUT))})

    def curve(self, job: Job) -> list[Point]:
        path = job.folder / _RUN / "epochs.csv"
        if not path.exists():
            return []
        points: list[Point] = []
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                # The host evaluates before the first epoch, too.
                if int(line["epoch"]):
                    point: Point = {"epoch": int(line["epoch"]), "seconds": float(line["training_s"])}
                    point |= {"train_loss": float(line["train_loss"]), "train_f1": float(line["train_f1"])}
                    points.append(point | {"valid_f1": float(line["dev_f1"]), "test_f1": float(line["test_f1"])})
        return points

    def outcome(self, job: Job) -> Outcome:
        result = json.loads((job.folder / _RUN / "result.json").read_text(encoding="utf-8"))
        curve, told = self.curve(job), report("\n".join(result["report"]))
        vectors = result["vectors"]
        return Outcome(
            length=int(curve[-1]["epoch"] or 0),
            # Of the tagger that was best on valid, by the host's own conlleval.
            metrics={
                "valid_f1": result["scores"]["dev"]["conlleval"],
                "test_f1": result["scores"]["test"]["conlleval"],
            },
            seconds=sum(point["seconds"] or 0.0 for point in curve),
            skipped=told.skipped if told else None,
            hints_lost=told.hints_lost if told else None,
            backend=told.backend if told else None,
            notes=["random word vectors, where the paper has GloVe's"] if vectors.startswith("random") else [],
            versions={"targer": commit_of(locate(CHECKOUT))},
        )
