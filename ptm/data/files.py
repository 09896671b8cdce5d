"""The files that a pattern names: as they lie, compressed, or members of zip archives; what is compressed is decompressed once.

Sources keep byte offsets, and so read plain bytes: a compressed file is copied into the user's cache folder, under a name that follows from
its path, size and time of change, and never from a name within an archive.
"""

import bz2
import contextlib
import dataclasses
import fnmatch
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from stat import S_ISLNK
from typing import IO

from ptm.fields import ConfigError

MEGABYTE = 1 << 20
# Text rarely gets 20 times smaller. More than this is a file that was made to fill disks, or one that a person should look at first.
MOST_EXPANSION = 250
ALWAYS_ALLOWED = 64 * MEGABYTE
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError, UnicodeDecodeError)  # what the decompressors raise, the last of names of members


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a source: where its plain bytes are, its path as a user knows it, and the file on disk that they come from."""

    path: str
    place: str  # folder/a.tsv, folder/a.tsv.gz, folder/archive.zip/a.tsv
    origin: str  # folder/a.tsv, folder/a.tsv.gz, folder/archive.zip


def cache_folder() -> str:
    """The project's folder among the user's caches, which may not exist yet."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "ptm")


def listed(pattern: str) -> list[str]:
    """What a pattern finds on disk; one that is a path finds that, whatever characters it has."""
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    return [path for path in found if os.path.exists(path)]  # glob gives also links to nothing, and FILE/ for the pattern FILE/**


def _archives(pattern: str) -> tuple[list[str], list[str]]:
    """(zip archives that a pattern goes through, its parts below them); (nothing, nothing) for a pattern that goes through none."""
    parts = pattern.split("/")
    for number, part in enumerate(parts[:-1], 1):
        if part.lower().endswith(".zip"):
            return [path for path in listed("/".join(parts[:number])) if os.path.isfile(path)], parts[number:]
    return [], []


def _fits(member: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a member's name are those of a pattern, as glob has it: * within a part, ** over parts, hidden names by their dot alone."""
    if not pattern:
        return not member
    if pattern[0] == "**" and _fits(member, pattern[1:]):
        return True
    if not member or member[0].startswith(".") and not pattern[0].startswith("."):
        return False
    return _fits(member[1:], pattern) if pattern[0] == "**" else fnmatch.fnmatchcase(member[0], pattern[0]) and _fits(member[1:], pattern[1:])


def stamps(pattern: str) -> tuple[tuple[str, int, int], ...]:
    """(path, size, time of change) of whatever on disk a pattern leads to; equal stamps stand for equal records."""
    places = {*listed(pattern), *_archives(pattern)[0]}
    return tuple((os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in sorted(places))


def find(pattern: str, kind: str) -> tuple[File, ...]:
    """The files that a pattern of a source of that kind names, sorted. Raises ConfigError if there is none, or one cannot be decompressed."""
    files = []
    for path in listed(pattern):
        if os.path.isfile(path):
            if path.lower().endswith(".zip"):
                held = ", ".join(info.filename for info in _members(path)[:20])
                raise ConfigError(f"data source {kind}:{pattern} is an archive; name what is to be read of it, as {path}/MEMBER or {path}/*. It holds: {held}.")
            files.append(File(_plain_copy(path), path, path))
    archives, inner = _archives(pattern)
    for archive in archives:
        left = MOST_EXPANSION * os.path.getsize(archive) + ALWAYS_ALLOWED  # members may share their bytes, so the limit of each is none of all
        for info in _members(archive):
            if _fits(info.filename.split("/"), inner):
                _check_member(archive, info)
                files.append(File(_plain_copy(archive, info), f"{archive}/{info.filename}", archive))
                left -= os.path.getsize(files[-1].path)
                if left < 0:
                    raise grown(archive, MOST_EXPANSION * os.path.getsize(archive) + ALWAYS_ALLOWED)
    if not files:
        held = f"; {archives[0]} holds: {', '.join(info.filename for info in _members(archives[0])[:20])}" if archives else ""
        unset = re.search(r"\$(\w+)", pattern)
        hint = f"; set the environment variable {unset[1]} to the folder that is meant" if unset else ""
        raise ConfigError(
            f"data source {kind}:{pattern} matches no file (working directory {os.getcwd()}); give an existing file or a glob such as {kind}:corpus/*{held}{hint}."
        )
    return tuple(sorted(files, key=lambda file: file.place))


def _members(archive: str) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(archive) as opened:
            return [info for info in opened.infolist() if not info.filename.endswith("/")]  # is_dir() takes no empty name
    except BROKEN as error:
        raise ConfigError(f"{archive} cannot be read as a zip archive ({error}); fetch it again.") from None


def _check_member(archive: str, info: zipfile.ZipInfo) -> None:
    """Refuses a member that no archive of text has: a name that leads out of it, a link, a method whose blocks cannot be bounded."""
    parts = re.split(r"[/\\]", info.filename)
    if not all(parts) or ".." in parts:
        raise ConfigError(f"{archive} has a member named {info.filename!r}; allowed: names below the archive. Fetch it from whom you trust.")
    if S_ISLNK(info.external_attr >> 16):
        raise ConfigError(f"{archive}/{info.filename} is a link; name the file that it leads to.")
    if info.compress_type not in METHODS:
        raise ConfigError(f"{archive}/{info.filename} is compressed by method {info.compress_type}; allowed: stored and deflated. Write the archive anew.")


def _plain_copy(origin: str, member: zipfile.ZipInfo | None = None) -> str:
    """Where the plain bytes of a file or of a member of an archive are: the file itself, or a copy made now or by an earlier start."""
    name = origin if member is None else member.filename
    opener = OPENERS.get(os.path.splitext(name)[1].lower())
    if member is None and opener is None:
        return origin
    stat = os.stat(origin)
    key = json.dumps([os.path.abspath(origin), None if member is None else member.filename, stat.st_size, stat.st_mtime_ns])
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", os.path.basename(name))[-60:]
    folder, digits = os.path.join(cache_folder(), "files"), hashlib.sha256(key.encode()).hexdigest()[:24]
    for path in glob.glob(os.path.join(glob.escape(folder), f"{digits}-*-{readable}")):
        if f"{digits}-{os.path.getsize(path)}-{readable}" == os.path.basename(path):  # one that was emptied or cut off is made again
            return path
    size = stat.st_size if member is None else member.compress_size
    what = origin if member is None else f"{origin}/{member.filename}"
    with contextlib.ExitStack() as stack:
        blocks = _blocks(stack, origin, member, opener, most=MOST_EXPANSION * size + ALWAYS_ALLOWED, what=what)
        return _write(blocks, folder, f"{digits}-{{}}-{readable}", what)


def _blocks(stack: contextlib.ExitStack, origin: str, member: zipfile.ZipInfo | None, opener, *, most: int, what: str) -> Iterator[bytes]:
    """The plain content, block by block; at most `most` bytes of it."""
    total = 0
    try:
        stream: IO[bytes] | str = origin
        if member is not None:
            stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(origin)).open(member))
        if opener is not None:
            stream = stack.enter_context(opener(stream))
        while block := stream.read(MEGABYTE):
            total += len(block)
            if total > most:
                raise grown(what, most)
            yield block
    except BROKEN as error:
        raise ConfigError(f"{what} cannot be decompressed ({str(error) or type(error).__name__}); fetch it again.") from None


def grown(what: str, most: int) -> ConfigError:
    """The error of a file that becomes larger than text does when it is decompressed."""
    return ConfigError(
        f"{what} becomes more than {MOST_EXPANSION} times larger (over {most >> 20} MiB) when it is decompressed, and text does not;"
        " if it is sound, decompress it yourself and name the plain file."
    )


def _write(blocks: Iterator[bytes], folder: str, name: str, what: str) -> str:
    """A new file, there as a whole or not at all, whoever else writes it; its size goes into its `name`. Returns its path."""
    temporary = None
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            temporary = file.name
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            path = os.path.join(folder, name.format(file.tell()))
        os.replace(temporary, path)
        temporary = None
        return path
    except OSError as error:
        raise ConfigError(f"{what} cannot be decompressed into {folder} ({error}); make room there, or name another place by XDG_CACHE_HOME.") from None
    finally:
        if temporary is not None:
            os.unlink(temporary)


def names(files: Sequence[File]) -> list[str]:
    """What records call their files: base names where they differ, otherwise paths below the common folder; the same, compressed or not."""
    plain = [os.path.splitext(file.place)[0] if os.path.splitext(file.place)[1].lower() in OPENERS else file.place for file in files]
    bases = [os.path.basename(place) for place in plain]
    if len(set(bases)) == len(bases):
        return bases
    for places in (plain, [file.place for file in files]):
        root = os.path.commonpath([os.path.dirname(os.path.abspath(place)) for place in places])
        below = [os.path.relpath(os.path.abspath(place), root).replace(os.sep, "/") for place in places]
        if len(set(below)) == len(below):
            break
    return below


def digests(files: Sequence[File]) -> list[tuple[str, int, str]]:
    """(name, bytes, sha256 of the first and last megabyte) of the files on disk that the records come from; of members, of their archives."""
    by_origin = {file.origin: digest(file.origin) for file in files}
    return [(name, *by_origin[file.origin]) for name, file in zip(names(files), files)]


def digest(path: str) -> tuple[int, str]:
    """(bytes, sha256 of the first and last megabyte) of a file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        content = hashlib.sha256(file.read(MEGABYTE))
        file.seek(max(MEGABYTE, size - MEGABYTE))
        content.update(file.read(MEGABYTE))
    return size, content.hexdigest()
