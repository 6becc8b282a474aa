#!/usr/bin/env python
"""Prepare a corpus under ``data/NAME``: fetch or take it, verify every byte, name its files as configs/ do.

``python scripts/get_data.py list`` shows what there is. Parallel corpora become train, valid and test, with
the language as ending and one tokenised sentence a line, beside README.txt (licence, origin, what is missing)
and manifest.json (sizes and digests). The table of origins is corpora.py; number_words.py makes the demo.

Nothing is taken on trust: a file whose SHA-256 is not the expected one is refused, and the existing folder
stays as it is until its successor is complete. Exit status: 0 done or nothing to do, 1 failure, 2 wrong use, 130
interrupted.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

# Before all that takes long to import.
import interruption

# isort: split
try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError:
    print("get_data.py needs typer and rich: pip install '.[demo]'", file=sys.stderr)
    raise SystemExit(2) from None

import number_words
import subwords
from corpora import CORPORA, NAMES, Corpus, Origin
from corpus_files import (
    DataError,
    Raw,
    address,
    check_parallel,
    choose,
    discard,
    drop_blank_pairs,
    exclusive,
    fetch,
    locate,
    place,
    publish,
    recover,
    renew,
    squeeze_spaces,
    verify_prepared,
    write_manifest,
)
from typer_program import run_app

#: Seed of the demo corpus unless told otherwise.
SEED = 1234
#: Training pairs of the demo corpus unless told otherwise.
SIZE = number_words.Sizes().train

#: Size of the demo corpus, for the lists.
_DEMO_MB = "1.8"
#: Its source and target.
_DEMO_LANGUAGES = ("de", "en")

_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _progress(*columns: object) -> Progress:
    """A progress bar on standard error, shown on a terminal only."""
    text = TextColumn("{task.description}")
    return Progress(text, BarColumn(), *columns, console=_err, disable=not _err.is_terminal)


def say(message: str) -> None:
    """Print a line for the user, on standard error."""
    _err.print(message)


# ------------------------------------------------------------------------------------------- the contents


def download(corpus: Corpus, folder: Path, mirror: str | None) -> None:
    """Fetch the files of ``corpus`` that are not in ``folder`` yet, and verify each.

    Raises:
        DataError: the corpus has no verified origin, or a file cannot be had as expected.
    """
    if not corpus.fetchable:
        raise DataError(f"{corpus.name} {corpus.note}")
    # It may be a link to where there is room, but not to nowhere.
    if not folder.is_dir():
        renew(folder)
    origins = [file.origin for file in corpus.files if file.origin]
    try:
        _fetch_all(origins, folder, mirror)
    finally:
        # Nothing came, so there is nothing to go on with.
        if not any(folder.iterdir()):
            discard(folder)


def _fetch_all(origins: list[Origin], folder: Path, mirror: str | None) -> None:
    """Fetch files one after the other, with a progress bar for each."""
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


def assemble(corpus: Corpus, raw: Raw, stage: Path, accept_undigested: bool) -> None:
    """Make the prepared files in ``stage`` from the raw ones.

    Raises:
        DataError: a raw file is missing or not the expected one, or the sides of a part differ in length.
    """
    for file, path in choose(raw, corpus, accept_undigested):
        place(file, path, stage / file.output, raw.called(path))
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
        DataError: there are not so many numbers, or num2words is not installed.
    """
    sizes = number_words.Sizes(train=size)
    try:
        parts = number_words.make(seed, sizes)
    except ValueError as error:
        raise DataError(f"--size {size}: {error}") from error
    try:
        _spell_out(parts, stage, sizes.total())
    except ImportError as error:
        raise DataError("the demo corpus needs num2words: pip install '.[demo]'") from error
    (stage / "README.txt").write_text(
        f"demo: German number words to English number words, made with seed {seed}.\n"
        "State: complete; no number of valid or test is in train.\n"
        "Licence: none needed, the text is computed.\n",
        encoding="utf-8",
    )


def _spell_out(parts: dict[str, list[int]], stage: Path, total: int) -> None:
    """Write the ``total`` numbers of all parts in words, a file for each part and language."""
    with _progress() as bar:
        task = bar.add_task("number words", total=2 * total)
        for part, numbers in parts.items():
            for language, words in zip(_DEMO_LANGUAGES, (number_words.german, number_words.english), strict=True):
                lines = []
                for number in numbers:
                    lines.append(words(number) + "\n")
                    bar.advance(task)
                (stage / f"{part}.{language}").write_text("".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------------------ the procedure


@contextlib.contextmanager
def _staging(out: Path, name: str) -> Iterator[Path]:
    """An empty working folder, gone afterwards unless it was renamed."""
    stage = out / f".{name}.staging"
    renew(stage)
    try:
        yield stage
    finally:
        with contextlib.suppress(OSError):
            discard(stage)


class Done(NamedTuple):
    """What :func:`prepare` made; the rest was there already, or was not asked for."""

    corpus: bool
    model: bool


def prepare(
    name: str,
    out: Path,
    source: Path | None = None,
    mirror: str | None = None,
    force: bool = False,
    seed: int = SEED,
    size: int = SIZE,
    accept_undigested: bool = False,
    pieces: int | None = None,
) -> Done:
    """Bring ``out/name`` into being, or see that it is there and unchanged.

    Args:
        name: one of :data:`corpora.NAMES`.
        out: the folder that holds the corpora; made if it does not exist.
        source: where the raw text lies on this machine; None fetches it.
        mirror: address of a folder that serves the origin's files under their names.
        force: replace ``out/name`` whatever it is, once the new one is complete. If ``pieces`` is given, then
            only what needs it: an intact corpus stays, its sentencepiece model is replaced.
        seed, size: of the demo corpus: see :func:`make_demo`; the others take none.
        accept_undigested: see :func:`corpus_files.choose`.
        pieces: size of the sentencepiece model that a parallel corpus shall have; None asks for none.

    Raises:
        DataError: the reason why it was not prepared; ``out/name`` is then as it was.
        OSError: likewise, the file system refused.
    """
    final = out / name
    recipe = {"seed": seed, "size": size} if name == "demo" else {"unverified train": accept_undigested}
    if pieces is not None:
        subwords.library()  # before a long download
    with exclusive(out, on_wait=lambda: say(f"waiting for another run to be done with {out}")):
        recover(final)
        if _stays(final, recipe, force, pieces):
            return Done(False, pieces is not None and _set_model(name, out, pieces, force))
        with _staging(out, name) as stage:
            ready = stage / name
            ready.mkdir()
            if name == "demo":
                make_demo(ready, seed, size)
            else:
                _from_raw(CORPORA[name], out, stage, ready, source, mirror, accept_undigested)
            # The manifest does not list the model, which may be replaced later.
            write_manifest(ready, recipe)
            if pieces is not None:
                subwords.train(ready, _languages(name), pieces, stage).replace(ready / subwords.MODEL)
            publish(ready, final)
        with contextlib.suppress(OSError):
            discard(_downloads(out, name))
    return Done(True, pieces is not None)


def _stays(final: Path, recipe: dict[str, object], force: bool, pieces: int | None) -> bool:
    """Whether the corpus is there and shall not be replaced.

    Raises:
        DataError: it is not what ``recipe`` makes, and ``force`` is not given.
    """
    if not os.path.lexists(final) or (force and pieces is None):
        return False
    try:
        verify_prepared(final, recipe)
    except DataError:
        if not force:
            raise
        return False
    return True


def _languages(name: str) -> tuple[str, str]:
    """The (source, target) of a parallel corpus."""
    languages = _DEMO_LANGUAGES if name == "demo" else CORPORA[name].languages
    assert languages is not None, name
    return languages


def _set_model(name: str, out: Path, pieces: int, force: bool) -> bool:
    """Put a sentencepiece model into a prepared corpus.

    Returns:
        Whether one was trained; False if one of this size is there.

    Raises:
        DataError: another model is there and ``force`` is not given, or none of this size can be had.
    """
    model = out / name / subwords.MODEL
    if model.exists() and not force:
        try:
            found = subwords.library().SentencePieceProcessor(model_file=str(model)).vocab_size()
        except RuntimeError as error:
            raise DataError(f"{model} is damaged; --force replaces it") from error
        if found == pieces:
            return False
        raise DataError(f"{model} has {found} pieces, not {pieces}; --force replaces it")
    with _staging(out, name) as stage:
        subwords.train(out / name, _languages(name), pieces, stage).replace(model)
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
    if source is None:
        raw = Raw(_downloads(out, corpus.name))
        download(corpus, raw.root, mirror)
    else:
        scratch = stage / "raw"
        scratch.mkdir()
        raw = locate(source, corpus, scratch)
    assemble(corpus, raw, ready, accept_undigested)


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


#: The names that an option is for, where it is not for all.
_TAKERS = {
    "--from": tuple(CORPORA),
    "--mirror": tuple(corpus.name for corpus in CORPORA.values() if corpus.fetchable),
    "--seed": ("demo",),
    "--size": ("demo",),
    "--sentencepiece": (*(corpus.name for corpus in CORPORA.values() if corpus.languages), "demo"),
    "--accept-unverified-train": tuple(corpus.name for corpus in CORPORA.values() if corpus.undigested),
    "--force": NAMES,
}


def _misuse(name: str, out: Path, options: dict[str, object]) -> str | None:
    """Why a command line makes no sense, in one line; None if it does.

    Args:
        name: NAME, which may be "list".
        out: where the corpora live.
        options: the others by name; None or False if not given.
    """
    if name not in (*NAMES, "list"):
        return f"unknown corpus {name!r}; choose one of {', '.join(NAMES)}, or list"
    given = [option for option, value in options.items() if value is not None and value is not False]
    for option in given:
        if name not in _TAKERS[option]:
            return f"{option} has no effect on {name}: it is for {', '.join(_TAKERS[option])}"
    if "--from" in given and "--mirror" in given:
        return "--from takes the text from this machine and --mirror from another: give one of them"
    source = options["--from"]
    # Said even where the corpus is complete and needs no text: a mistyped path must not look right.
    if isinstance(source, Path) and not source.exists():
        return f"--from {source}: no such file or folder"
    if out.exists() and not out.is_dir():
        return f"--out: {out} is not a folder"
    return None


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
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what is there; with --sentencepiece, an intact corpus stays."),
    ] = False,
    # None unless given: for another corpus even the default's value would be a mistake.
    seed: Annotated[int | None, typer.Option(help=f"Seed of the demo corpus.  [default: {SEED}]")] = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Training pairs of the demo corpus.  [default: {SIZE}]"),
    ] = None,
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
    interruption.is_raised()
    options = {
        "--from": source,
        "--mirror": mirror,
        "--force": force,
        "--seed": seed,
        "--size": size,
        "--sentencepiece": sentencepiece,
        "--accept-unverified-train": accept_unverified_train,
    }
    if reason := _misuse(name, out, options):
        say(f"get_data: {reason}")
        raise typer.Exit(2)
    if name == "list":
        Console(markup=False, emoji=False).print(_table())
        return
    demo = {"seed": SEED if seed is None else seed, "size": SIZE if size is None else size}
    final = out / name
    try:
        done = prepare(
            name, out, source, mirror, force, **demo, accept_undigested=accept_unverified_train, pieces=sentencepiece
        )
    except DataError as error:
        say(f"get_data: {error}")
        raise typer.Exit(1) from error
    except OSError as error:
        where = error.filename or final
        say(f"get_data: cannot prepare {name}: {where}: {error.strerror or error}")
        raise typer.Exit(1) from error
    say(f"{final} is ready" if done.corpus else f"{final} is complete, nothing to do")
    if done.corpus and name in CORPORA and CORPORA[name].partial and not accept_unverified_train:
        say(f"note: {name} is partial: {CORPORA[name].partial}")
    if sentencepiece is not None:
        say(f"{final / subwords.MODEL} {'is ready' if done.model else 'is there, nothing to do'}")


if __name__ == "__main__":
    run_app(app, "get_data.py")
