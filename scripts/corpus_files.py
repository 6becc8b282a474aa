"""Files that either arrive whole and verified or not at all: fetching, unpacking, checking, publishing.

Everything is written below hidden working folders beside the destination (``.NAME.download`` and
``.NAME.staging``), flushed to the disk, and renamed when it is complete. Whatever interrupts a run leaves
those folders at most: partly fetched files are continued, a half assembled folder is thrown away.
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import lzma
import os
import platform
import shutil
import ssl
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from corpora import Corpus, File, Origin
from whole_file import sync

#: Bytes read at a time.
CHUNK = 1 << 18
#: Seconds without a byte after which a connection counts as broken.
TIMEOUT = 30
#: How many broken connections in a row, without a byte gained, make a download fail.
PATIENCE = 3
#: Name of the list of files, sizes and digests in a prepared folder.
MANIFEST = "manifest.json"

#: Called with the number of bytes that are done.
Progress = Callable[[int], None]


class DataError(Exception):
    """What went wrong, in one line for the user."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in lower-case hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(folder: Path, on_wait: Callable[[], None]) -> tuple[int, list[Path]]:
    """Make ``folder`` if need be and lock it; the descriptor that holds it, and the folders made, inmost first."""
    while True:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_open_at(descriptor, folder):
            return descriptor, made
        # The run that held it had made it, failed, and removed it.
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold ``folder`` against other runs, which share its working folders. If killed, the system lets go.

    Args:
        folder: made if it does not exist, with its parents; of these, what is empty afterwards is removed again.
        on_wait: called if another run holds it, before waiting for that run to end.
    """
    descriptor, made = _lock(folder, on_wait)
    try:
        yield
    finally:
        # Before letting go, so that a waiting run sees that its folder is gone.
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------- fetching


def _receive(url: str, part: Path, size: int, progress: Progress) -> None:
    """Ask the server for what ``part`` still lacks and append it; start anew if it only sends whole files.

    Raises:
        DataError: the server answers with a file of another size, or refuses.
        OSError, http.client.HTTPException: the connection broke; what came is in ``part``.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        announced = response.headers.get("Content-Length")
        if announced is not None and have + int(announced) != size:
            raise DataError(f"{url}: the server has {have + int(announced)} bytes, not the expected {size}")
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            while have <= size and (chunk := response.read(CHUNK)):
                file.write(chunk)
                have += len(chunk)
                progress(have)


def _fetch_part(url: str, part: Path, size: int, progress: Progress) -> None:
    """Fill ``part`` up to ``size`` bytes, going on after broken connections while each gains something."""
    fruitless = 0
    while (have := part.stat().st_size if part.exists() else 0) < size:
        reason = "the connection ended early"
        try:
            _receive(url, part, size, progress)
        except urllib.error.HTTPError as error:
            raise DataError(f"{url}: {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
        gained = (part.stat().st_size if part.exists() else 0) > have
        fruitless = 0 if gained else fruitless + 1
        if fruitless == PATIENCE:
            raise DataError(f"{url}: {reason} (tried {PATIENCE} times; run again to continue)")


def fetch(url: str, target: Path, size: int, sha256: str, progress: Progress) -> None:
    """Fetch a file, continuing an interrupted attempt, and put it at ``target`` once it is verified.

    Args:
        url: http or https address.
        target: where to put it; while incomplete it is ``target`` + ".part" beside it.
        size: expected size in bytes.
        sha256: expected digest in lower-case hexadecimal.
        progress: told how many bytes are there.

    Raises:
        DataError: unreachable, or other bytes than expected; then nothing is kept of them.
        OSError: the file cannot be written.
    """
    if target.exists() and target.stat().st_size == size and sha256_of(target) == sha256:
        progress(size)
        return
    part = target.with_name(target.name + ".part")
    continued = part.exists()
    _fetch_part(url, part, size, progress)
    if part.stat().st_size == size and sha256_of(part) == sha256:
        sync(part)
        part.replace(target)
        return
    found = sha256_of(part)
    part.unlink()
    if continued:
        # The bytes of the earlier attempt may be at fault, not the server's.
        fetch(url, target, size, sha256, progress)
        return
    raise DataError(f"{url}: wrong digest: SHA-256 {found} instead of {sha256}")


def address(origin: Origin, mirror: str | None) -> str:
    """Where to fetch a file: at its origin, or under the same name at a mirror."""
    url = f"{mirror.rstrip('/')}/{origin.name}" if mirror else origin.url
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: the address of a mirror starts with http:// or https://")
    return url


# ---------------------------------------------------------------------------------------------- unpacking


def _candidates(corpus: Corpus, file: File) -> tuple[str, ...]:
    """Names under which a file may be found below a folder or an archive."""
    names = [file.member] if file.origin is None else [file.member, file.origin.name]
    return tuple(dict.fromkeys(name for stem in names for name in (f"{corpus.name}/{stem}", stem)))


def unpack(archive: Path, corpus: Corpus, folder: Path) -> None:
    """Unpack from a tar archive the files that belong to ``corpus``, and no other.

    Args:
        archive: a tar file, plain or compressed with xz, gzip or bzip2.
        corpus: says which members are wanted.
        folder: an empty folder that receives them.

    Raises:
        DataError: damaged, no archive, or with members that point out of the folder; or this Python cannot tell.
    """
    if not hasattr(tarfile, "data_filter"):  # nor has it FilterError
        raise DataError(
            f"{archive}: Python {platform.python_version()} cannot unpack archives safely; 3.10.12, 3.11.4 and later "
            "can. Unpack it yourself and give the folder instead"
        )
    wanted = {name for file in (*corpus.files, *corpus.undigested) for name in _candidates(corpus, file)}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                safe = tarfile.data_filter(member, str(folder))
                if str(PurePosixPath(safe.name)) in wanted and safe.isreg():
                    tar.extract(member, folder, filter="data")
    except tarfile.FilterError as error:
        raise DataError(f"{archive}: refused, not a safe archive: {error}") from error
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        # tarfile lists on further lines what each kind of compression had to say.
        reason = str(error).partition("\n")[0].rstrip(":")
        raise DataError(f"{archive}: damaged or truncated archive: {reason}") from error


@dataclass(frozen=True)
class Raw:
    """Where the raw files of a corpus are.

    Attributes:
        root: the folder that has them, at the top or below ``NAME/``.
        archive: what they were unpacked from; None if ``root`` is a folder that the user knows.
    """

    root: Path
    archive: Path | None = None

    def called(self, path: Path) -> str:
        """``path`` in words that still mean something when the folder of the unpacked files is gone."""
        return f"{self.archive}: {path.relative_to(self.root)}" if self.archive else str(path)


def locate(source: Path, corpus: Corpus, scratch: Path) -> Raw:
    """Find a corpus's raw files, unpacking an archive if ``source`` is or holds one.

    Args:
        source: an archive; or a folder with ``NAME.tar.xz`` (or .tar.gz, .tgz, .tar), or with the raw files.
        corpus: what is looked for.
        scratch: an empty folder for what is unpacked.

    Raises:
        DataError: the archive is unusable.
    """
    endings = (".tar.xz", ".tar.gz", ".tgz", ".tar")
    archives = [source, *(source / (corpus.name + ending) for ending in endings)]
    archive = next((path for path in archives if path.is_file()), None)
    if archive is None:
        return Raw(source)
    unpack(archive, corpus, scratch)
    return Raw(scratch, archive)


def choose(raw: Raw, corpus: Corpus, accept_undigested: bool) -> list[tuple[File, Path]]:
    """Pair every file of a corpus with a raw file.

    Args:
        raw: where to look.
        corpus: what is looked for.
        accept_undigested: take the files of which no verified digest is known instead of those that have one.

    Raises:
        DataError: a file is missing.
    """
    replaced = {file.output: file for file in corpus.undigested} if accept_undigested else {}
    found: list[tuple[File, Path]] = []
    for file in corpus.files:
        file = replaced.get(file.output, file)
        paths = [raw.root / name for name in _candidates(corpus, file)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            if raw.archive:
                what = f"{'all of ' if found else ''}{corpus.name}"
                reason = f"{raw.archive} holds no {file.member}: it is not {what}"
            else:
                reason = f"neither {corpus.name}.tar.xz nor {file.member} in {raw.root}"
            raise DataError("; ".join(filter(None, (reason, corpus.note))))
        found.append((file, path))
    return found


# ----------------------------------------------------------------------------------------------- checking


def count_lines(path: Path) -> int:
    """Number of line ends, as ``wc -l`` counts."""
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(CHUNK), b""))


def place(file: File, path: Path, target: Path, called: str) -> None:
    """Copy a raw file to its place after checking its bytes.

    Args:
        file: what it must be: the prepared file, or what the origin serves.
        path: the raw file.
        target: where the prepared file goes.
        called: what a message calls the raw file.

    Raises:
        DataError: it is neither of the two; or, without a known digest, it has too few or too many lines.
    """
    shutil.copyfile(path, target)
    if file.sha256 is None:
        if count_lines(target) != file.lines:
            raise DataError(f"{called}: {count_lines(target):,} lines instead of {file.lines:,}")
        return
    found = sha256_of(target)
    origin = file.origin
    if origin and found == origin.sha256 and found != file.sha256:
        with target.open("ab") as out:
            out.write(origin.completed_by)
        found = sha256_of(target) if origin.completed_by else file.sha256
    if found != file.sha256:
        raise DataError(f"{called}: wrong digest: SHA-256 {found} instead of {file.sha256}")


def check_parallel(folder: Path, languages: tuple[str, str]) -> None:
    """See that train, valid and test have as many lines in one language as in the other.

    Raises:
        DataError: naming both files and their numbers of lines.
    """
    for part in ("train", "valid", "test"):
        counts = [count_lines(folder / f"{part}.{language}") for language in languages]
        if counts[0] != counts[1]:
            names = " and ".join(f"{part}.{language}" for language in languages)
            raise DataError(f"{folder.name}: {names} differ in length: {counts[0]:,} and {counts[1]:,} lines")


def squeeze_spaces(folder: Path, languages: tuple[str, str]) -> int:
    """Leave single spaces between words and none around a line.

    OpenNMT-py cuts at each space, and cannot read a vocabulary with the empty word that two in a row make
    (Multi30k has one such line).

    Returns:
        How many lines were changed.
    """
    changed = 0
    for name in (f"{part}.{language}" for part in ("train", "valid", "test") for language in languages):
        before = (folder / name).read_bytes().split(b"\n")
        after = [b" ".join(filter(None, line.split(b" "))) for line in before]
        if after != before:
            changed += sum(old != new for old, new in zip(before, after, strict=True))
            (folder / name).write_bytes(b"\n".join(after))
    return changed


def drop_blank_pairs(folder: Path, languages: tuple[str, str]) -> int:
    """Remove from the training text the pairs with a blank side: there is nothing to learn from them.

    Returns:
        How many pairs were removed.
    """
    paths = [folder / f"train.{language}" for language in languages]
    sides = [path.read_bytes().split(b"\n")[:-1] for path in paths]
    kept = [pair for pair in zip(*sides, strict=True) if all(line.strip() for line in pair)]
    if len(kept) < len(sides[0]):
        for path, side in zip(paths, zip(*kept, strict=True), strict=True):
            path.write_bytes(b"\n".join(side) + b"\n")
    return len(sides[0]) - len(kept)


# --------------------------------------------------------------------------------------------- publishing


def write_manifest(folder: Path, recipe: dict[str, object]) -> None:
    """Write the list of a prepared folder's files, sizes, digests and lines.

    Args:
        folder: the folder, otherwise complete.
        recipe: what determines its contents besides the files, such as the seed of a made corpus.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {
            "size": path.stat().st_size,
            "sha256": sha256_of(path),
            "lines": count_lines(path),
        }
    text = json.dumps({"recipe": recipe, "files": files}, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def verify_prepared(folder: Path, recipe: dict[str, object]) -> None:
    """See that a prepared folder is what an earlier run left there, made by the same recipe.

    Raises:
        DataError: naming the first difference. Files that the manifest does not list are nobody's business.
    """
    remedy = "--force replaces it"
    try:
        files, made_by = _read_manifest(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder} exists but this script did not make it; {remedy}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, IsADirectoryError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged; {remedy}") from error
    if made_by != recipe:
        given = [", ".join(f"{key} {value}" for key, value in r.items()) for r in (made_by, recipe)]
        raise DataError(f"{folder} was made with other options ({given[0]}, not {given[1]}); {remedy}")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder} lacks {name}; {remedy}")
        if path.stat().st_size != size or sha256_of(path) != sha256:
            raise DataError(f"{path} was changed since it was prepared; {remedy}")


def _read_manifest(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, object]]:
    """Size and digest of every file, and the recipe.

    Raises:
        OSError: it is not there. ValueError, KeyError, TypeError, OverflowError, RecursionError: it is not what
            :func:`write_manifest` writes.
    """
    manifest = json.loads(path.read_text(encoding="utf-8"))
    files, recipe = manifest["files"], manifest["recipe"]
    if not isinstance(files, dict) or not isinstance(recipe, dict):
        raise TypeError("the files and the recipe are tables")
    found = {}
    for name, facts in files.items():
        # It would be another folder's file, or the folder itself.
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is no file of the folder")
        found[name] = (int(facts["size"]), str(facts["sha256"]))
    return found, recipe


def discard(path: Path) -> None:
    """Remove whatever has that name, if anything: a folder with all that is in it, a file, or a link.

    What a link leads to is the user's: it stays.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def renew(folder: Path) -> None:
    """Make ``folder`` an empty one, whatever has that name."""
    discard(folder)
    folder.mkdir()


def recover(final: Path) -> None:
    """Bring back what :func:`publish` had set aside when it was killed between its two renames."""
    aside = _aside(final)
    if os.path.lexists(aside):
        if os.path.lexists(final):
            discard(aside)
        else:
            aside.rename(final)


def publish(stage: Path, final: Path) -> None:
    """Give a complete folder its name, replacing what has that name, once everything is on the disk.

    If that is a link, to a larger disk for instance, then the folder takes the place of the link.
    """
    for path in stage.iterdir():
        sync(path)
    sync(stage)
    aside = _aside(final)
    if os.path.lexists(final):
        final.rename(aside)
    stage.rename(final)
    sync(final.parent)
    discard(aside)


def _aside(final: Path) -> Path:
    """The name of what is being replaced."""
    return final.with_name(f".{final.name}.replaced")
