"""salesforce/awd-lstm-lm, unmodified, by scripts/awd_main.py."""

from __future__ import annotations

import re
from typing import NamedTuple

from sd_plugin.errors import UsageError
from sd_plugin.patches._checkout import commit_of
from sd_plugin.patches.awd_lstm import CHECKOUT

from ..job import Job, Outcome, Step, System, attempts, is_whole, locate, report
from ..results import Point

_SAVED = "model.pt"
#: The paper's: dropouts of input, words, between layers, of the output and of the recurrent weight.
_SETTINGS = {"batch_size": 20, "dropouti": 0.4, "dropoute": 0.1, "dropouth": 0.25, "dropout": 0.4, "wdrop": 0.5}


class Epoch(NamedTuple):
    """An epoch as the host prints it; ``saved``: its model was the best so far; ``switched``: ASGD follows."""

    number: int
    seconds: float
    perplexity: float
    saved: bool
    switched: bool


class AwdLstm(System):
    repeated = (
        "the epochs since the best one, from whose model the host resumes without its optimizer, without the epochs "
        "that decide on the switch to ASGD, and with other random numbers"
    )

    def problem(self, job: Job) -> str | None:
        try:
            locate(CHECKOUT)
        except UsageError as error:
            return str(error)
        return None

    def steps(self, job: Job) -> list[str]:
        return ["train"]

    def step(self, job: Job, name: str) -> Step:
        command = job.script("awd_main.py")
        if job.row.mode != "random":
            command.append(f"--sd={job.row.mode}")
        command += ["--data", f"data/{job.row.data}", "--seed", str(job.seed), "--save", _SAVED]
        command += [word for key, value in _SETTINGS.items() for word in (f"--{key}", str(value))]
        if not job.on_gpu:
            # The host's flag is the wrong way round: it switches CUDA off.
            command.append("--cuda")
        saved = [epoch.number for epoch in self._epochs(job) if epoch.saved]
        since = saved[-1] if saved and is_whole(job.folder / _SAVED) else 0
        command += ["--epochs", str(job.length - since)]
        if since:
            command += ["--resume", _SAVED]
        return Step(command, since, {CHECKOUT.variable: str(locate(CHECKOUT))})

    def curve(self, job: Job) -> list[Point]:
        return [
            {"epoch": epoch.number, "seconds": epoch.seconds, "valid_perplexity": epoch.perplexity}
            for epoch in self._epochs(job)
        ]

    def _epochs(self, job: Job) -> list[Epoch]:
        """Those that count: what was repeated replaces what it repeats."""
        found: list[Epoch] = []
        for since, text in attempts(job.read_log("train")):
            found = [epoch for epoch in found if epoch.number <= since]
            for part in text.split("| end of epoch")[1:]:
                match = re.match(r" +(\d+) \| time: *([\d.]+)s \| .*valid ppl +([\d.]+)", part)
                if match:
                    flags = "\nSaving" in part, "Switching to ASGD" in part
                    found.append(Epoch(since + int(match[1]), float(match[2]), float(match[3]), *flags))
        return found

    def outcome(self, job: Job) -> Outcome:
        text, epochs = job.read_log("train"), self._epochs(job)
        test = re.findall(r"End of training \| .* test ppl +([\d.]+)", text)
        saved = [epoch for epoch in epochs if epoch.saved]
        if not test or not saved:
            raise ValueError("the host printed no test perplexity")
        switch = next((epoch.number for epoch in epochs if epoch.switched), None)
        notes = [f"switched to ASGD after epoch {switch}" if switch else "the switch to ASGD was not reached"]
        told = report(text)
        return Outcome(
            length=epochs[-1].number,
            metrics={"valid_perplexity": saved[-1].perplexity, "test_perplexity": float(test[-1])},
            seconds=sum(epoch.seconds for epoch in epochs),
            skipped=told.skipped if told else None,
            hints_lost=told.hints_lost if told else None,
            backend=told.backend if told else "stock",
            notes=notes,
            versions={"awd-lstm-lm": commit_of(locate(CHECKOUT))},
        )
