#!/usr/bin/env python
"""Train the word language model of Zaremba et al. 2014 with structured dropout, and measure its perplexity.

    python scripts/get_data.py ptb
    python scripts/zaremba_main.py configs/zaremba_medium.yaml --mode nr_rh_st
    torchrun --nproc_per_node 2 scripts/zaremba_main.py configs/zaremba_large.yaml

It is also the example of how to use the library: :class:`LanguageModel` is all that differs from a PyTorch program.

After each epoch the run folder holds a checkpoint, from which ``--resume`` continues to the same numbers, bit by bit on
the same machine and threads, as if nothing had happened; and ``log.csv``, which benchmarks/learning_curves.py draws.
Valid and test are read in ``evaluation_batch_size`` columns, without dropout, the hidden state carried from sequence to
sequence.

Several processes share the columns of a batch and average their gradients. Structured dropout drops the same units for
the whole batch, so all of them draw the same patterns, and N processes train as one would, to rounding. Random dropout
is each process's own, or columns of different processes would lose the same units.

A model that this machine cannot hold is refused, a checkpoint that is not whole is left as it is.

Exit status: 0 done, 1 the loss is no longer finite, 2 wrong use or a file that cannot be read or written, 130
interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

# Before all that takes long to import.
import interruption

# isort: split
try:
    # Not all are used here, but all in the files beside this one.
    import pydantic  # noqa: F401
    import rich  # noqa: F401
    import typer
    import yaml  # noqa: F401

    import sd_plugin  # noqa: F401
except ImportError:
    print("zaremba_main.py needs sd-plugin, pydantic, typer, rich and PyYAML: pip install '.[demo]'", file=sys.stderr)
    raise SystemExit(2) from None

import torch
from data_parallel import Processes, Variables, joined
from language_model_data import Corpus, columns, read_corpus, sequences
from machine_limits import check_fits, check_threads, memory
from thread_limits import bound_torch
from torch import Tensor, nn
from training_display import EpochDisplay, perplexity
from training_run import DivergenceError, Run, say, warn
from training_settings import Settings, parse_changes, read_settings
from training_state import RunFolder, fault_of
from typer_program import run_app
from user_input import reason_of, shown

from sd_plugin import (
    FusedCrossEntropyLoss,
    StructuredDropout,
    StructuredDropoutLSTM,
    StructuredLinear,
    UsageError,
    stats,
)
from sd_plugin._environment import TARGETS_VARIABLE, VARIABLE, read_switch
from sd_plugin.lstm import MODES

State = tuple[Tensor, Tensor]


class LanguageModel(nn.Module):
    """Embedding, LSTM layers and projection onto the vocabulary, with dropout before, between and after the layers.

    Mode ``random``, the baseline, is built of PyTorch's own modules. In the others each of them has a counterpart of
    this library, with the same arguments, parameters and ``state_dict``.
    """

    def __init__(self, vocabulary: int, settings: Settings) -> None:
        super().__init__()
        hidden, layers, p = settings.hidden_size, settings.num_layers, settings.dropout
        self.embedding = nn.Embedding(vocabulary, hidden)
        if settings.mode == "random":
            self.input_dropout = nn.Dropout(p)
            self.lstm = nn.LSTM(hidden, hidden, layers, dropout=p)
            self.output_dropout = nn.Dropout(p)
            self.projection = nn.Linear(hidden, vocabulary)
            self.loss = nn.CrossEntropyLoss(reduction="sum")
        else:
            # Drops the same units for the whole batch and new ones at each time step; the LSTM's products skip them.
            self.input_dropout = StructuredDropout(p, site="embedding")
            # Drops between its layers like that, and in nr_rh_st also inside the products with the state before.
            self.lstm = StructuredDropoutLSTM(
                *(hidden, hidden, layers),
                dropout=p,
                recurrent_dropout=p if settings.mode == "nr_rh_st" else 0.0,
                mode=settings.mode,
            )
            self.output_dropout = StructuredDropout(p, site="output")
            # Skips what output_dropout has just dropped: it needs no word about that, the tensor carries a hint.
            self.projection = StructuredLinear(hidden, vocabulary)
            # Never holds the log-softmax, which is as large as the logits.
            self.loss = FusedCrossEntropyLoss(reduction="sum")
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -settings.init_range, settings.init_range)

    def forward(self, words: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The loss of predicting ``targets``, and the state to go on with.

        Args:
            words, targets: numbers of words, int64 ``[T, B]``.
            state: (h, c), each ``[layers, B, H]``; None is zero.

        Returns:
            The loss summed over all words, in nats, and (h, c).
        """
        y, state = self.lstm(self.input_dropout(self.embedding(words)), state)
        logits = self.projection(self.output_dropout(y))
        return self.loss(logits.flatten(0, 1), targets.flatten()), state


class Training:
    """A model in training: what a checkpoint holds, and one epoch after the other."""

    def __init__(self, settings: Settings, corpus: Corpus, processes: Processes) -> None:
        self.settings, self.processes = settings, processes
        self.vocabulary = len(corpus.words)
        self.text = {
            part: processes.share(
                columns(text, settings.batch_size if part == "train" else settings.evaluation_batch_size)
            )
            for part, text in corpus.parts.items()
        }
        self.steps = (len(self.text["train"]) - 1) // settings.sequence_length
        if self.steps == 0:
            raise UsageError(f"train has too few words for {settings.batch_size} columns of sequence_length + 1")
        self._check_memory()
        torch.manual_seed(settings.seed)
        self.model = LanguageModel(self.vocabulary, settings).to(processes.device)
        if settings.mode == "random" and processes.rank > 0:
            # Far from the seeds that people give: 1, 2, 3.
            torch.manual_seed(settings.seed + 1_000_003 * processes.rank)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.learning_rate)
        self.parallel = processes.wrap(self.model)
        self.epoch = 0

    def _check_memory(self) -> None:
        """Raise UsageError if the model and its largest step cannot be held."""
        hidden, layers, vocabulary = self.settings.hidden_size, self.settings.num_layers, self.vocabulary
        parameters = layers * 8 * hidden * (hidden + 1) + (2 * hidden + 1) * vocabulary
        name = f"a model with hidden_size {hidden} and num_layers {layers}"
        # All that is kept of a layer beside its parameters is some Python objects, of 4 KiB at least.
        check_fits(name, 4 * parameters + 4096 * layers, memory())
        if self.processes.device.type == "cuda":
            available, where = torch.cuda.get_device_properties(self.processes.device).total_memory, "this GPU"
        else:
            available, where = memory(), "this machine"
        words = max(min(self.settings.sequence_length, len(text) - 1) * text.shape[1] for text in self.text.values())
        # A gradient for each parameter, and scores of all words of the vocabulary at each word of a step.
        needed = 4 * (2 * parameters + words * vocabulary)
        check_fits(f"{name}, its gradients and a step of {words:,} words", needed, available, where)

    def train(self, display: EpochDisplay) -> float:
        """Train for the next epoch; its perplexity."""
        self.epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_of(self.epoch)
        self.model.train()
        state = None
        # On the device: to read it in every step would have every step wait.
        nats = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        # Every sequence of the same length, as in Zaremba's program: a few words at the end are not trained on.
        for words, targets in sequences(self.text["train"], self.settings.sequence_length, whole=True):
            loss, state = self.parallel(words, targets, state)
            nats += loss.detach()
            self._descend(loss)
            # The values go on, the gradient ends here.
            state = (state[0].detach(), state[1].detach())
            display.step(nats, targets.numel())
        scored = self.steps * self.settings.sequence_length * self.settings.batch_size
        return perplexity(self.processes.sum(nats).item(), scored)

    def _descend(self, loss: Tensor) -> None:
        """A step of the optimizer, for a loss summed over time and this process's columns."""
        self.optimizer.zero_grad()
        # Zaremba's loss is a mean over time and a sum over columns, but processes' gradients are averaged.
        (loss * (self.processes.count / self.settings.sequence_length)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, part: str) -> float:
        """The perplexity of ``valid`` or ``test``."""
        self.model.eval()
        state, scored = None, 0
        nats = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for words, targets in sequences(self.text[part], self.settings.sequence_length):
            # With more processes than columns, some have none.
            if targets.numel():
                loss, state = self.model(words, targets, state)
                nats, scored = nats + loss, scored + targets.numel()
        total = self.processes.sum(torch.stack([nats, nats.new_tensor(scored)]))
        return perplexity(*total.tolist())

    def skipped(self) -> tuple[int, int]:
        """Multiply-adds that this process skipped so far, and those of an epoch if it skipped none.

        Counted are the products of the LSTM and the projection, forward, of the input's gradient and of the weights'.
        """
        hidden, layers = self.settings.hidden_size, self.settings.num_layers
        words = self.steps * self.settings.sequence_length * self.settings.batch_size // self.processes.count
        whole = 3 * words * (layers * 8 * hidden * hidden + hidden * self.vocabulary)
        return sum(site.skipped for site in stats.sites().values()), whole

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on exactly: only tensors and plain values. All processes must call it."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.processes.gather(self._random()),
        }

    def _random(self) -> dict[str, Tensor]:
        """The states of this process's generators, uint8."""
        device = self.processes.device
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return states

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            ValueError and others: it does not hold what it must, in words; this training can then no longer be used.
        """
        if fault := fault_of(state["model"], self.model.state_dict()):
            raise ValueError(f"model: {fault}")
        if fault := self._optimizer_fault(state["optimizer"]):
            raise ValueError(f"optimizer: {fault}")
        if len(state["random"]) != self.processes.count:
            raise ValueError(f"random: of {len(state['random'])} processes, and must be of {self.processes.count}")
        random = state["random"][self.processes.rank]
        if fault := fault_of(random, self._random()):
            raise ValueError(f"random: {fault}")
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.processes.device)

    def _optimizer_fault(self, state: dict[str, Any]) -> str | None:
        """How the state of an optimizer differs from this one's, in anything but the learning rate."""
        groups, ours = state.get("param_groups"), self.optimizer.state_dict()["param_groups"]
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            return "it has no param_groups"
        if len(groups) != len(ours):
            return f"it has {len(groups)} param_groups"
        for group, our in zip(groups, ours, strict=True):
            # Another version of torch may have other options, which are None or False if we do not use them.
            for key in {**group, **our}.keys() - {"lr"}:
                value = group.get(key)
                if type(value) not in (int, float, bool, list, type(None)) or (value or None) != (our.get(key) or None):
                    return f"{shown(key)} is {shown(value)}, and must be {shown(our.get(key))}"
        # SGD without momentum remembers nothing; some versions say so for each parameter.
        entries = state.get("state")
        if not isinstance(entries, dict) or any(
            entry not in ({}, {"momentum_buffer": None}) for entry in entries.values()
        ):
            return "it has a state, which SGD without momentum has not"
        return None


def identity_of(settings: Settings, corpus: Corpus, processes: Processes) -> dict[str, Any]:
    """What must be equal for a training to be the same one: all that has a part in its numbers."""
    # When to stop changes no epoch before, and the text may have been moved.
    identity = settings.model_dump(exclude={"epochs", "data"})
    return {**identity, "text": corpus.digest()[:16], "processes": processes.count, "device": processes.device.type}


def train_and_test(
    settings: Settings, name: str, folder: RunFolder, resume: bool, stop: int, processes: Processes
) -> None:
    """Train until epoch ``stop`` is done, then test.

    Raises:
        UsageError, OSError, DivergenceError: why not.
    """
    if settings.batch_size % processes.count:
        raise UsageError(f"batch_size {settings.batch_size} cannot be shared equally by {processes.count} processes")
    corpus = read_corpus(Path(settings.data))
    training = Training(settings, corpus, processes)
    run = Run(name, training, folder, identity_of(settings, corpus, processes))
    if resume:
        run.resume()
    if training.epoch > stop:
        if processes.leads:
            say(f"nothing to do: {folder.checkpoint} is of epoch {training.epoch}, and epoch {stop} is to be the last")
        return
    if processes.leads:
        if corpus.note:
            warn(f"note: {corpus.note}")
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        say(
            f"{name}, {settings.mode}: {parameters:,} parameters, {training.vocabulary:,} words, "
            f"{training.steps:,} steps an epoch; {processes.device}, {torch.get_num_threads()} threads"
            + (f"; resumed after epoch {training.epoch}" if resume else "")
            + (", the last" if training.epoch == stop else "")
        )
    while training.epoch < stop:
        run.epoch(stop)
    run.finish()


def _fail(reason: BaseException | str, status: int) -> typer.Exit:
    """Print one line of what went wrong; the exit to raise."""
    if _leads():
        warn(f"error: {reason if isinstance(reason, str) else reason_of(reason)}")
    return typer.Exit(status)


def _leads() -> bool:
    """Of several processes, which meet the same error, one says it."""
    try:
        return Variables.read().RANK == 0
    except UsageError:
        return True


def _is_out_of_memory(error: Exception) -> bool:
    """Torch has no class for it on a CPU."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "allocate memory" in str(error)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="configs/zaremba_medium.yaml or another such file.")],
    mode: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODES)}.  [default: CONFIG's]")] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the text.  [default: CONFIG's]")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run folder.  [default: run/CONFIG_MODE]")] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after epoch N; --resume goes on another time.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run folder's checkpoint.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads of each process.  [default: PyTorch's]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed.  [default: CONFIG's]")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of CONFIG; may be repeated.")
    ] = None,
) -> None:
    """Train a language model with structured dropout, and measure its perplexity."""
    folder = None
    try:
        interruption.is_raised()
        if read_switch(os.environ).replaces("torch"):
            # Mode random, the baseline, would be structured without a word.
            raise UsageError(f"{TARGETS_VARIABLE} names torch, and {VARIABLE} would patch this program: unset it")
        given = {"mode": mode, "data": data, "seed": seed}
        named = {key: value for key, value in given.items() if value is not None}
        settings = read_settings(config, {**parse_changes(changes or []), **named})
        stop = settings.epochs if epochs is None else epochs
        if stop > settings.epochs:
            told = shown(stop)
            raise UsageError(
                f"--epochs {told}: the schedule ends after {settings.epochs}; --set epochs={told} extends it"
            )
        folder = RunFolder(out or Path("run") / f"{config.stem}_{settings.mode}")
        if threads is not None:
            check_threads(threads)
            torch.set_num_threads(threads)
        elif (note := bound_torch()) and _leads():
            warn(f"note: {note}")
        with joined(device) as processes, folder.held(resume, processes.leads):
            train_and_test(settings, config.stem, folder, resume, stop, processes)
    except (UsageError, OSError) as error:
        raise _fail(error, 2) from None
    except DivergenceError as error:
        raise _fail(error, 1) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise _fail(f"out of memory: {reason_of(error)}", 2) from None
    except KeyboardInterrupt:
        interruption.is_over()
        saved = folder is not None and folder.checkpoint.exists()
        kept = "--resume continues after the last finished epoch" if saved else "no epoch was finished"
        raise _fail(f"interrupted; {kept}", interruption.STATUS) from None


if __name__ == "__main__":
    run_app(app, "zaremba_main.py")
