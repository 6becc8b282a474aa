#!/usr/bin/env python
"""Prepare a corpus under ``data/NAME``: fetch or take it, verify every byte, name its files as configs/ do.

``python scripts/get_data.py list`` shows what there is. Parallel corpora become train, valid and test, with
the language as ending and one tokenised sentence a line, beside README.txt (licence, origin, what is missing)
and manifest.json (sizes and digests). The table of origins is corpora.py; number_words.py makes the demo.

Nothing is taken on trust: a file whose SHA-256 is not the expected one is refused, and the existing folder
stays as it is until its successor is complete. Exit status: 0 done or nothing to do, 1 failure, 2 wrong use.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import number_words
import typer
from corpora import CORPORA, NAMES, Corpus
from corpus_files import (
    DataError,
    address,
    check_parallel,
    choose,
    drop_blank_pairs,
    exclusive,
    fetch,
    locate,
    place,
    publish,
    recover,
    squeeze_spaces,
    sync,
    verify_prepared,
    write_manifest,
)
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

#: Seed of the demo corpus unless told otherwise.
SEED = 1234
#: Training pairs of the demo corpus unless told otherwise.
SIZE = number_words.Sizes().train

#: Size of the demo corpus, for the lists.
_DEMO_MB = "1.8"

_err = Console(stderr=True, soft_wrap=True, highlight=False)


def _progress(*columns: object) -> Progress:
    """A progress bar on standard error, shown on a terminal only."""
    text = TextColumn("{task.description}")
    return Progress(text, BarColumn(), *columns, console=_err, disable=not _err.is_terminal)


def say(message: str) -> None:
    """Print a line for the user, on standard error."""
    _err.print(message, markup=False)


# ------------------------------------------------------------------------------------------- the contents


def download(corpus: Corpus, folder: Path, mirror: str | None) -> None:
    """Fetch the files of ``corpus`` that are not in ``folder`` yet, and verify each.

    Raises:
        DataError: the corpus has no verified origin, or a file cannot be had as expected.
    """
    if not corpus.fetchable:
        raise DataError(f"{corpus.name} {corpus.note}")
    folder.mkdir(exist_ok=True)
    origins = [file.origin for file in corpus.files if file.origin]
    with _progress(DownloadColumn(), TimeRemainingColumn()) as bar:
        for origin in origins:
            task = bar.add_task(origin.name, total=origin.size)
            fetch(
                address(origin, mirror),
                folder / origin.name,
                origin.size,
                origin.sha256,
                lambda done, task=task: bar.update(task, completed=done),
            )


def assemble(corpus: Corpus, root: Path, stage: Path, accept_undigested: bool) -> None:
    """Make the prepared files in ``stage`` from the raw ones below ``root``.

    Raises:
        DataError: a raw file is missing or not the expected one, or the sides of a part differ in length.
    """
    for file, path in choose(root, corpus, accept_undigested):
        place(file, path, stage / file.output)
    changes = []
    if corpus.languages:
        check_parallel(stage, corpus.languages)
        if corpus.drops_blank_pairs and (dropped := drop_blank_pairs(stage, corpus.languages)):
            changes.append(f"{dropped:,} training pairs with a blank side were left out")
        if squeezed := squeeze_spaces(stage, corpus.languages):
            changes.append(f"surplus spaces were removed from {squeezed:,} lines")
    readme = describe(corpus, accept_undigested)
    if changes:
        readme += f"Changed after verification: {'; '.join(changes)}.\n"
    (stage / "README.txt").write_text(readme, encoding="utf-8")


def describe(corpus: Corpus, accept_undigested: bool) -> str:
    """What README.txt says of every copy of a corpus."""
    if accept_undigested:
        state = "NOT VERIFIED: the training text has the right number of lines, but no digest of it is known"
    elif corpus.partial:
        state = f"PARTIAL: {corpus.partial}. Results on it must say so"
    else:
        state = "complete; every file verified by its SHA-256"
    origins = sorted({file.origin.url.rsplit("/", 1)[0] for file in corpus.files if file.origin})
    origin = f"Origin: {origins[0]}/" if origins else f"This corpus {corpus.note}."
    return f"{corpus.name}: {corpus.title}\nState: {state}.\nLicence: {corpus.licence}.\n{origin}\n"


def make_demo(stage: Path, seed: int, size: int) -> None:
    """Write the demo corpus, German to English number words with ``size`` training pairs, to ``stage``.

    Raises:
        DataError: there are not so many numbers.
    """
    sizes = number_words.Sizes(train=size)
    try:
        parts = number_words.make(seed, sizes)
    except ValueError as error:
        raise DataError(f"--size {size}: {error}") from error
    with _progress() as bar:
        task = bar.add_task("number words", total=2 * sizes.total())
        for part, numbers in parts.items():
            for language, words in (("de", number_words.german), ("en", number_words.english)):
                lines = []
                for number in numbers:
                    lines.append(words(number) + "\n")
                    bar.advance(task)
                (stage / f"{part}.{language}").write_text("".join(lines), encoding="utf-8")
    (stage / "README.txt").write_text(
        f"demo: German number words to English number words, made with seed {seed}.\n"
        "State: complete; no number of valid or test is in train.\n"
        "Licence: none needed, the text is computed.\n",
        encoding="utf-8",
    )


def train_sentencepiece(folder: Path, languages: tuple[str, str], size: int, prefix: Path) -> None:
    """Train one subword model on both sides of the training text.

    Args:
        folder: a prepared corpus.
        languages: its two languages.
        size: number of pieces.
        prefix: the model becomes ``prefix`` + ".model".

    Raises:
        DataError: the text cannot be cut into that many pieces.
    """
    import sentencepiece  # here, because every other use of this script does without

    try:
        sentencepiece.SentencePieceTrainer.train(
            input=[str(folder / f"train.{language}") for language in languages],
            model_prefix=str(prefix),
            vocab_size=size,
            character_coverage=1.0,
            num_threads=1,  # the model must not depend on the machine
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        # Its message begins with the C++ source line and the failed assertion, bracketed.
        reason = str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1]
        raise DataError(f"--sentencepiece {size}: {reason}") from error


# ------------------------------------------------------------------------------------------ the procedure


def _held(out: Path) -> contextlib.AbstractContextManager[None]:
    """The folder of corpora, to ourselves."""
    return exclusive(out, on_wait=lambda: say(f"waiting for another run to be done with {out}"))


@contextlib.contextmanager
def _staging(out: Path, name: str) -> Iterator[Path]:
    """An empty working folder, gone afterwards unless it was renamed."""
    stage = out / f".{name}.staging"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def prepare(
    name: str,
    out: Path,
    source: Path | None = None,
    mirror: str | None = None,
    force: bool = False,
    seed: int = SEED,
    size: int = SIZE,
    accept_undigested: bool = False,
) -> bool:
    """Bring ``out/name`` into being, or see that it is there and unchanged.

    Args:
        name: one of :data:`corpora.NAMES`.
        out: the folder that holds the corpora; made if it does not exist.
        source: where the raw text lies on this machine; None fetches it.
        mirror: address of a folder that serves the origin's files under their names.
        force: replace ``out/name`` whatever it is, once the new one is complete.
        seed, size: of the demo corpus: see :func:`make_demo`; the others take none.
        accept_undigested: see :func:`corpus_files.choose`.

    Returns:
        Whether anything was done.

    Raises:
        DataError: the reason why it was not prepared; ``out/name`` is then as it was.
        OSError: likewise, the file system refused.
    """
    final = out / name
    recipe = {"seed": seed, "size": size} if name == "demo" else {"unverified train": accept_undigested}
    out.mkdir(parents=True, exist_ok=True)
    with _held(out):
        recover(final)
        if final.exists() and not force:
            verify_prepared(final, recipe)
            return False
        with _staging(out, name) as stage:
            ready = stage / name
            ready.mkdir()
            if name == "demo":
                make_demo(ready, seed, size)
            else:
                _from_raw(CORPORA[name], out, stage, ready, source, mirror, accept_undigested)
            write_manifest(ready, recipe)
            publish(ready, final)
        shutil.rmtree(_downloads(out, name), ignore_errors=True)
    return True


def _downloads(out: Path, name: str) -> Path:
    """Where fetched files wait; it outlives an interrupted run, so that the next one can go on."""
    return out / f".{name}.download"


def _from_raw(
    corpus: Corpus,
    out: Path,
    stage: Path,
    ready: Path,
    source: Path | None,
    mirror: str | None,
    accept_undigested: bool,
) -> None:
    """Get the raw files, from ``source`` or the network, and assemble them in ``ready``."""
    if accept_undigested and not corpus.undigested:
        raise DataError(f"--accept-unverified-train is for {_with_undigested()}: all of {corpus.name} is verified")
    if source is None:
        root = _downloads(out, corpus.name)
        download(corpus, root, mirror)
    else:
        scratch = stage / "raw"
        scratch.mkdir()
        root = locate(source, corpus, scratch)
    assemble(corpus, root, ready, accept_undigested)


def _with_undigested() -> str:
    return ", ".join(corpus.name for corpus in CORPORA.values() if corpus.undigested)


def add_sentencepiece(name: str, out: Path, size: int, force: bool) -> bool:
    """Put ``spm.model`` with ``size`` pieces into a prepared corpus.

    Returns:
        Whether a model was trained; False if one of this size is there.

    Raises:
        DataError: the corpus is not parallel, or another model is there and ``force`` is not given.
    """
    import sentencepiece  # here, because every other use of this script does without

    languages = ("de", "en") if name == "demo" else CORPORA[name].languages
    if languages is None:
        raise DataError(f"--sentencepiece is for parallel corpora, not {name}")
    model = out / name / "spm.model"
    if model.exists() and not force:
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
        except RuntimeError as error:
            raise DataError(f"{model} is damaged; --force replaces it") from error
        if pieces == size:
            return False
        raise DataError(f"{model} has {pieces} pieces, not {size}; --force replaces it")
    with _held(out), _staging(out, name) as stage:
        train_sentencepiece(out / name, languages, size, stage / "spm")
        sync(stage / "spm.model")
        (stage / "spm.model").replace(model)
    return True


# --------------------------------------------------------------------------------------- the command line


def _table() -> Table:
    """What the script can prepare."""
    table = Table("name", "MB", "what", "licence", "how")
    for corpus in CORPORA.values():
        how = "fetched or --from" if corpus.fetchable else f"--from only; {corpus.partial}"
        table.add_row(corpus.name, f"{corpus.size / 1e6:.1f}", corpus.title, corpus.licence, how)
    table.add_row("demo", _DEMO_MB, "German to English number words", "none needed", "made here")
    return table


def _help() -> str:
    """The help text: the corpora with size and licence, a line each."""
    lines = ["Prepare a corpus under OUT/NAME, every file verified. NAME is one of", "\b"]
    lines += [f"{c.name:<14} {c.size / 1e6:5.1f} MB  {c.licence}" for c in CORPORA.values()]
    lines += [
        f"{'demo':<14} {_DEMO_MB:>5} MB  made here, no licence needed",
        f"{'list':<14} a table of all these",
    ]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=_help())
def main(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", help="Archive, or folder with NAME.tar.xz or the raw files."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the corpora live.")] = Path("data"),
    mirror: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Fetch the origin's files from below this address instead."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the demo corpus.")] = SEED,
    size: Annotated[int, typer.Option(metavar="N", help="Training pairs of the demo corpus.")] = SIZE,
    sentencepiece: Annotated[
        int | None,
        typer.Option(metavar="SIZE", min=1, help="Also train NAME/spm.model with so many pieces."),
    ] = None,
    accept_unverified_train: Annotated[
        bool,
        typer.Option(
            "--accept-unverified-train",
            help="iwslt14-de-en: take all 160,239 pairs, of which no digest is known.",
        ),
    ] = False,
) -> None:
    if name == "list":
        Console().print(_table())
        return
    if name not in NAMES:
        say(f"unknown corpus {name!r}; choose one of {', '.join(NAMES)}, or list")
        raise typer.Exit(2)
    if source is not None and mirror is not None:
        say("--from takes the text from this machine and --mirror from another: give one of them")
        raise typer.Exit(2)
    final = out / name
    try:
        done = prepare(name, out, source, mirror, force, seed, size, accept_unverified_train)
        say(f"{final} is ready" if done else f"{final} is complete, nothing to do")
        if done and name in CORPORA and CORPORA[name].partial and not accept_unverified_train:
            say(f"note: {name} is partial: {CORPORA[name].partial}")
        if sentencepiece is not None:
            trained = add_sentencepiece(name, out, sentencepiece, force)
            say(f"{final / 'spm.model'} {'is ready' if trained else 'is there, nothing to do'}")
    except DataError as error:
        say(f"get_data: {error}")
        raise typer.Exit(1) from error
    except OSError as error:
        where = error.filename or final
        say(f"get_data: cannot prepare {name}: {where}: {error.strerror or error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
