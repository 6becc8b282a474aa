"""OpenNMT-py, unmodified, by its own programs and the files of ``configs/``; BLEU by sacrebleu."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from ..job import Job, Outcome, Step, System, attempts, is_whole, report
from ..results import Point

#: Steps between two checkpoints: what is lost at most when a run is killed.
_SAVE_EVERY = 1_000
#: Steps between two lines of its log, unless the configuration says otherwise.
_REPORT_EVERY = 50


class OpenNMT(System):
    repeated = "the steps since the last checkpoint, with other batches and random numbers"

    def problem(self, job: Job) -> str | None:
        if not Path(job.program("onmt_train")).exists():
            return "OpenNMT-py is not installed: see 'In your own OpenNMT-py' in README.md, or pip install '.[opennmt]'"
        every = int(_config(job)["valid_steps"])
        if job.length > every and job.length % every:
            return f"--steps {job.length}: beyond {every:,} it must be a multiple of that, where the host validates"
        return None

    def steps(self, job: Job) -> list[str]:
        # A vocabulary that does not come with the corpus has to be made.
        made = [] if _config(job)["src_vocab"].startswith("data/") else ["vocabulary"]
        scored = [f"{step}-{at}" for at in self._evaluated(job) for step in ("translate", "score")]
        return [*made, "train", *scored]

    def _evaluated(self, job: Job) -> list[int]:
        """The steps whose checkpoints translate the test set: those of the configuration, and the last."""
        every = int(_config(job)["save_checkpoint_steps"])
        return [*range(every, job.length, every), job.length]

    def step(self, job: Job, name: str) -> Step:
        if name == "vocabulary":
            return Step([job.program("onmt_build_vocab"), *_named(job), "-n_sample", "-1"])
        if name == "train":
            return self._training(job)
        kind, _, at = name.partition("-")
        source, target = (_config(job)["data"]["valid"][key].replace("/valid.", "/test.") for key in _SIDES)
        if kind == "translate":
            command = [job.program("onmt_translate"), "-model", f"{_config(job)['save_model']}_step_{at}.pt"]
            command += ["-src", source, "-output", f"hypotheses.{at}.txt"]
            return Step([*command, "-gpu", "0"] if job.on_gpu else command)
        # The text is tokenised already.
        command = [job.program("sacrebleu"), target, "-i", f"hypotheses.{at}.txt", "--tokenize", "none"]
        return Step([*command, "--width", "2"])

    def _training(self, job: Job) -> Step:
        config, length = _config(job), job.length
        every = math.gcd(_SAVE_EVERY, int(config["save_checkpoint_steps"]))
        command = [job.program("onmt_train"), *_named(job), "-seed", str(job.seed)]
        command += ["-save_checkpoint_steps", str(min(every, length))]
        if not job.full:
            validated = min(int(config["valid_steps"]), length)
            command += ["-train_steps", str(length), "-valid_steps", str(validated)]
            if validated % int(config.get("report_every", _REPORT_EVERY)):
                command += ["-report_every", str(validated)]
        if job.on_gpu:
            command += ["-world_size", "1", "-gpu_ranks", "0"]
        for at, path in reversed(_checkpoints(job)):
            if is_whole(path):
                return Step([*command, "-train_from", str(path.relative_to(job.folder))], at)
        return Step(command)

    def curve(self, job: Job) -> list[Point]:
        log = _Log.read(job.read_log("train"))
        points: list[Point] = []
        before = 0.0
        for at in sorted(log.valid):
            clock = log.clock[at]
            point: Point = {"step": at, "seconds": clock - before, "train_perplexity": log.train[at]}
            points.append(point | {"valid_perplexity": log.valid[at], "test_bleu": _bleu(job, at)})
            before = clock
        return points

    def progress(self, job: Job) -> tuple[int, str]:
        log, (_, told) = _Log.read(job.read_log("train")), super().progress(job)
        return max(log.train, default=0), told

    def outcome(self, job: Job) -> Outcome:
        text, curve = job.read_log("train"), self.curve(job)
        last = curve[-1]
        if last["step"] != job.length or last["test_bleu"] is None:
            raise ValueError("the training has no score at its last step")
        told = report(text)
        names = ("train_perplexity", "valid_perplexity", "test_bleu")
        return Outcome(
            length=job.length,
            metrics={name: value for name in names if (value := last[name]) is not None},
            seconds=sum(point["seconds"] or 0.0 for point in curve),
            skipped=told.skipped if told else None,
            hints_lost=told.hints_lost if told else None,
            backend=told.backend if told else "stock",
            notes=[f"BLEU: {_score(job, job.length)['signature']}"],
        )

    def tidy(self, job: Job, finished: bool) -> None:
        # The newest may be half written, so that the one before it is needed too.
        for at, path in _checkpoints(job)[: -1 if finished else -2]:
            if finished or at not in self._evaluated(job):
                path.unlink(missing_ok=True)


_SIDES = ("path_src", "path_tgt")


def _config(job: Job) -> dict[str, Any]:
    assert job.row.config is not None, job.row.name
    read: dict[str, Any] = yaml.safe_load((job.source / job.row.config).read_text(encoding="utf-8"))
    return read


def _named(job: Job) -> list[str]:
    return ["-config", str(job.source / str(job.row.config))]


def _checkpoints(job: Job) -> list[tuple[int, Path]]:
    """Steps and files of the checkpoints that are there, in order."""
    model = job.folder / _config(job)["save_model"]
    found = [(int(path.stem.rpartition("_")[2]), path) for path in model.parent.glob(f"{model.name}_step_*.pt")]
    return sorted(found)


def _score(job: Job, at: int) -> dict[str, Any]:
    """What sacrebleu wrote of a checkpoint's translation; empty if nothing."""
    text = job.read_log(f"score-{at}")
    start = text.rfind("\n{")
    return json.loads(text[start : text.rindex("}") + 1]) if start >= 0 and "}" in text[start:] else {}


def _bleu(job: Job, at: int) -> float | None:
    score = _score(job, at)
    return float(score["score"]) if score else None


class _Log:
    """The log of onmt_train: by step, perplexities and the seconds that training took until then.

    What was repeated after an interruption replaces what it repeats.
    """

    def __init__(self) -> None:
        self.train: dict[int, float] = {}
        self.valid: dict[int, float] = {}
        self.clock: dict[int, float] = {}

    @classmethod
    def read(cls, text: str) -> _Log:
        log = cls()
        for since, written in attempts(text):
            log._forget_after(since)
            start = max(log.clock.values(), default=0.0)
            at = since
            for line in written.splitlines():
                if match := re.search(r"Step (\d+)/ *\d+; .*ppl: *([\d.]+|nan|inf);.* (\d+) sec;", line):
                    at = int(match[1])
                    log.train[at], log.clock[at] = float(match[2]), start + int(match[3])
                elif (match := re.search(r"Validation perplexity: ([\d.]+)", line)) and at in log.clock:
                    log.valid[at] = float(match[1])
        return log

    def _forget_after(self, step: int) -> None:
        for kept in (self.train, self.valid, self.clock):
            for at in [at for at in kept if at > step]:
                del kept[at]
