"""List what is in a tar, tar.gz, zip or parquet file, without holding it: headers are read, images are passed over."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import IO, Any, cast

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.inputs.entries import Container, Entry, Other
from ldbfr.inputs.entries import Stretch as Stretch
from ldbfr.inputs.keys import BAD_NAME, image_key, is_image, printable
from ldbfr.inputs.objects import HEADER_BUFFER, STREAM_BUFFER, Stream
from ldbfr.inputs.objects import ObjectFile as ObjectFile
from ldbfr.inputs.parquet import list_parquet

LONGEST_NAME = 4_096
"""Characters of a member's name, as of a path's on Linux."""
MOST_HEADER = 2**24
"""Bytes of a tar member's headers: what they claim is read into memory."""

_ZIP_HEADER, _ZIP_END = 30, 22
_DAMAGE = (
    *(tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError),
    *(NotImplementedError, ValueError, struct.error),  # zipfile's, of a directory that makes no sense
    *(OverflowError, RecursionError),  # tarfile's, of an absurd size, and of header upon header
)


@contextmanager
def open_archive(container: Container) -> Iterator[IO[bytes]]:
    """The bytes of an archive; for a tar.gz the tar inside, which can only go forward.

    Raises:
        InputError: it is not a readable archive of its kind.
    """
    sequential = container.kind == "tar.gz"
    raw = ObjectFile(container.uri, container.size)
    with noticed_damage(container), io.BufferedReader(raw, STREAM_BUFFER if sequential else HEADER_BUFFER) as buffered:
        if sequential:
            with gzip.GzipFile(fileobj=buffered) as tar:
                yield cast(IO[bytes], tar)
        else:
            yield buffered


@contextmanager
def noticed_damage(container: Container) -> Iterator[None]:
    """Turns what the readers of archives raise into an InputError."""
    try:
        yield
    except _DAMAGE as error:
        raise InputError(
            f"{printable(container.uri)} is not a readable {container.kind} file ({error}); copy it again or leave it "
            "out"
        ) from error


class Names:
    """Turns names of members into keys, and finds those that come twice."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.seen: set[str] = set()

    def entry(self, member: str, **where: Any) -> Entry | Other:
        """The entry of a member; refused if its name is unusable or was there before."""
        short = member if len(member) <= LONGEST_NAME else f"{member[:100]}..."
        name = printable(f"{self.container.uri}/{short}")
        path = "/".join(part for part in short.split("/") if part not in ("", "."))  # as `tar cf x.tar .` has them
        key = image_key(self.container.prefix, path) if short == member else None
        if not is_image(member):
            return Other(name, key or name)
        refused = where.pop("refused", None)
        if short != member:
            refused = f"bad name: {len(member):,} characters, expected at most {LONGEST_NAME:,}; rename the file"
        elif key is None:
            refused = BAD_NAME
        elif key in self.seen:
            refused = "repeated name: an earlier member of the archive has it too; rename one of them"
        else:
            self.seen.add(key)
        return Entry(name, key or name, self.container.kind, self.container.uri, **where, refused=refused)


def list_archive(container: Container, column: str | None = None) -> Iterator[Entry | Stretch | Other]:
    """The images of an archive, in its own order, as they are found; and its other files.

    Args:
        container: the archive.
        column: of a parquet file with several that may be meant.

    Raises:
        InputError: the archive is damaged; what came before can be used.
        StorageError: it cannot be read.
    """
    if not container.size and not storage.exists(container.uri):  # an empty buffer would be called damaged
        raise InputError(f"{printable(container.uri)}: there is no such archive; check the place")
    if container.kind == "parquet":
        yield from list_parquet(container, column)
    elif container.kind == "zip":
        yield from list_zip(container)
    else:
        yield from list_tar(container)


# ---- tar ----


class _Headers:
    """A tar file of which the headers alone are read; in the end, `last` is the block that ended it.

    tarfile reads whatever length a header claims, a negative one as all there is.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.last, self.left = file, b"", MOST_HEADER

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        self.left -= size
        self.last = self.file.read(size)
        return self.last

    def seek(self, offset: int) -> int:
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()


def list_tar(container: Container) -> Iterator[Entry | Other]:
    """The images of a tar or tar.gz file.

    tarfile takes a damaged header, or the end of the file, for the end of the archive; so the end mark is checked.
    """
    names = Names(container)
    compressed = container.kind == "tar.gz"
    with open_archive(container) as file:
        headers = _Headers(file)
        for number, member in enumerate(tar_members(headers)):
            if member.isdir():
                continue
            refused = None
            if member.issym() or member.islnk():
                refused = f"link: the archive holds only a link to {member.linkname[:200]!r}; pack the file itself"
            elif not member.isreg() or member.issparse():
                refused = "not a plain file: the archive holds it in a special form; pack it as a plain file"
            where = number if compressed else member.offset_data
            yield names.entry(member.name, place=where, span=member.size, size=member.size, refused=refused)
        if headers.last != bytes(tarfile.BLOCKSIZE):
            found = "ends without its end mark" if not headers.last else "a header in it is damaged"
            raise tarfile.ReadError(f"{found}, so the rest is lost")
        while data := file.read(2**20):
            if data.count(0) != len(data):
                raise tarfile.ReadError("data follow its end mark, as when two archives are joined")


def tar_members(file: _Headers) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, without keeping them; each one's data must be read before the next is asked for."""
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            if member.size < 0 or archive.offset < member.offset_data:  # tarfile would go back, and never end
                raise tarfile.ReadError(f"a member claims {member.size:,} bytes")
            file.left = MOST_HEADER
            yield member


def tar_values(container: Container) -> Stream:
    """The members of a tar.gz, by their number."""
    with open_archive(container) as file:

        def read(size: int) -> bytes:
            with noticed_damage(container):
                if len(data := file.read(size)) != size:
                    raise tarfile.ReadError("it ends within a member")
                return data

        for number, member in enumerate(tar_members(_Headers(file))):
            yield number, partial(read, member.size)


# ---- zip ----


def list_zip(container: Container) -> Iterator[Entry | Other]:
    """The images of a zip file, in the order of their bytes."""
    names = Names(container)
    with open_archive(container) as file, zipfile.ZipFile(file) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        if (count := _zip_count(file, container.size)) not in (len(members) % 2**16, 2**16 - 1):  # the last: see zip64
            raise zipfile.BadZipFile(f"its directory has {len(members):,} members, expected {count:,}")
        ends = [*(member.header_offset for member in members), archive.start_dir]
        for member, (start, end) in zip(members, pairwise(ends), strict=True):
            if member.filename.endswith("/"):
                continue
            refused = None
            if member.flag_bits & 1:
                refused = "encrypted: it needs a password; pack it without one"
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                refused = f"packing: zip method {member.compress_type}, expected stored or deflate; pack it so"
            elif end - start < _ZIP_HEADER + member.compress_size:
                refused = "overlap: its bytes are those of another member, or not there; pack the archive again"
            yield names.entry(
                member.filename,
                place=start,
                span=min(max(0, end - start), _ZIP_HEADER + 2**17 + member.compress_size),
                size=member.file_size,
                packing=member.compress_type,
                checksum=member.CRC,
                refused=refused,
            )


def _zip_count(file: IO[bytes], size: int) -> int:
    """How many members the end of a zip says there are, which zipfile does not compare."""
    file.seek(max(0, size - 2**16 - _ZIP_END))
    end = file.read()
    (count,) = struct.unpack_from("<H", end, end.rindex(b"PK\5\6") + 10)
    return int(count)


def unpack_zip(entry: Entry, data: bytes) -> bytes:
    """The image in the bytes of a member, header included; InputError unless it is whole."""
    try:
        name_length, extra_length = struct.unpack_from("<HH", data, _ZIP_HEADER - 4)
        packed = memoryview(data)[_ZIP_HEADER + name_length + extra_length :]
        if entry.packing == zipfile.ZIP_DEFLATED:
            image = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.size + 1)
        else:
            image = bytes(packed[: entry.size])
    except (struct.error, zlib.error) as error:
        raise InputError(f"{entry.name}: the member is damaged ({error}); copy the archive again") from error
    if data[:4] != b"PK\3\4" or len(image) != entry.size or zlib.crc32(image) != entry.checksum:
        raise InputError(f"{entry.name}: the member is damaged (its checksum differs); copy the archive again")
    return image
