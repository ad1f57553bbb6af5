"""List what is in a tar, tar.gz, zip or parquet file, without holding it: headers are read, images are passed over."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from ldbfr import storage
from ldbfr.errors import InputError
from ldbfr.inputs.entries import Container, Entry
from ldbfr.inputs.sources import BAD_NAME, image_key, is_image, printable
from ldbfr.tables import arrow

if TYPE_CHECKING:
    import pyarrow

HEADER_BUFFER = 2**17
"""Bytes read at a time while headers are looked for: small members come along, large ones are jumped over."""
STREAM_BUFFER = 2**22
"""Bytes read at a time of what has to be read through."""
URI_COLUMNS = ("uri", "url", "path", "file", "file_name", "filename", "image", "image_uri", "image_path")

_ZIP_HEADER = 30
_DAMAGE = (
    *(tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError),
    *(NotImplementedError, ValueError, struct.error),  # zipfile's, of a directory that makes no sense
)


Stream = Iterator[tuple[int, Callable[[], bytes | None]]]
"""Of what can only be read forward: where each image is, and a call that reads it before the next is asked for."""


class Stretch(NamedTuple):
    """Of a parquet file: from here, that many rows must be read from their start on."""

    rows: int


class ObjectFile(io.RawIOBase):
    """An object as a seekable file that is read by ranges."""

    def __init__(self, uri: str, size: int) -> None:
        self.uri, self.size, self.position = uri, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; the new position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or what the object still has; how many bytes."""
        length = min(len(buffer), max(0, self.size - self.position))
        if length:
            buffer[:length] = storage.read_range(self.uri, self.position, length)
        self.position += length
        return length


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

    def entry(self, member: str, **where: Any) -> Entry:
        """The entry of a member; refused if its name is unusable or was there before."""
        path = "/".join(part for part in member.split("/") if part not in ("", "."))  # as `tar cf x.tar .` has them
        key = image_key(self.container.prefix, path)
        name = printable(f"{self.container.uri}/{member}")
        refused = where.pop("refused", None)
        if key is None:
            refused = BAD_NAME
        elif key in self.seen:
            refused = "repeated name: an earlier member of the archive has it too; rename one of them"
        else:
            self.seen.add(key)
        return Entry(name, key or name, self.container.kind, self.container.uri, **where, refused=refused)


def list_archive(container: Container, column: str | None = None) -> Iterator[Entry | Stretch | None]:
    """The images of an archive, in its own order, as they are found; None for every member that is no image.

    Args:
        container: the archive.
        column: of a parquet file with several that may be meant.

    Raises:
        InputError: the archive is damaged; what came before can be used.
        StorageError: it cannot be read.
    """
    if container.kind == "parquet":
        yield from list_parquet(container, column)
    elif container.kind == "zip":
        yield from list_zip(container)
    else:
        yield from list_tar(container)


# ---- tar ----


class _LastRead:
    """A file that remembers the last bytes read: at the end of a listing, the block that ended it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.last = file, b""

    def read(self, size: int = -1) -> bytes:
        self.last = self.file.read(size)
        return self.last

    def seek(self, offset: int) -> int:
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()


def list_tar(container: Container) -> Iterator[Entry | None]:
    """The images of a tar or tar.gz file.

    tarfile takes a damaged header, or the end of the file, for the end of the archive; so the end mark is checked.
    """
    names = Names(container)
    compressed = container.kind == "tar.gz"
    with open_archive(container) as file:
        watched = _LastRead(file)
        for number, member in enumerate(tar_members(watched)):
            if member.isdir() or not is_image(member.name):
                yield None
                continue
            refused = None
            if member.issym() or member.islnk():
                refused = f"link: the archive holds only a link to {member.linkname!r}; pack the file itself"
            elif not member.isreg() or member.issparse():
                refused = "not a plain file: the archive holds it in a special form; pack it as a plain file"
            where = number if compressed else member.offset_data
            yield names.entry(member.name, place=where, span=member.size, size=member.size, refused=refused)
        if watched.last != bytes(tarfile.BLOCKSIZE):
            found = "ends without its end mark" if not watched.last else "a header in it is damaged"
            raise tarfile.ReadError(f"{found}, so the rest is lost")
        while data := file.read(2**20):
            if data.count(0) != len(data):
                raise tarfile.ReadError("data follow its end mark, as when two archives are joined")


def tar_members(file: Any) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, without keeping them; each one's data must be read before the next is asked for."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            yield member


def tar_values(container: Container) -> Stream:
    """The members of a tar.gz, by their number."""
    with open_archive(container) as file:

        def read(size: int) -> bytes:
            with noticed_damage(container):
                return file.read(size)

        for number, member in enumerate(tar_members(file)):
            yield number, partial(read, member.size)


# ---- zip ----


def list_zip(container: Container) -> Iterator[Entry | None]:
    """The images of a zip file, in the order of their bytes."""
    names = Names(container)
    with open_archive(container) as file, zipfile.ZipFile(file) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        ends = [*(member.header_offset for member in members), archive.start_dir]
        for member, (start, end) in zip(members, pairwise(ends), strict=True):
            if member.is_dir() or not is_image(member.filename):
                yield None
                continue
            refused = None
            if member.flag_bits & 1:
                refused = "encrypted: it needs a password; pack it without one"
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                refused = f"packing: zip method {member.compress_type}, expected stored or deflate; pack it so"
            yield names.entry(
                member.filename,
                place=start,
                span=min(max(0, end - start), _ZIP_HEADER + 2**17 + member.compress_size),
                size=member.file_size,
                packing=member.compress_type,
                checksum=member.CRC,
                refused=refused,
            )


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


# ---- parquet ----


@contextmanager
def open_parquet(container: Container, column: str | None) -> Iterator[tuple[pyarrow.parquet.ParquetFile, str, bool]]:
    """A parquet file, its column with images, and whether that holds bytes (else URIs).

    Pages are read as needed; a writer may have put a whole row group into one, which then has to fit into memory.

    Raises:
        InputError: it is not readable, or no column, or more than one, may be meant.
    """
    pa = arrow()
    raw = ObjectFile(container.uri, container.size)
    try:
        with pa.parquet.ParquetFile(io.BufferedReader(raw, HEADER_BUFFER), buffer_size=2**20, pre_buffer=False) as file:
            name, is_bytes = image_column(file.schema_arrow, column, printable(container.uri))
            yield file, name, is_bytes
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{printable(container.uri)} is not a readable parquet file ({error}); copy it again or leave it out"
        ) from error


def image_column(schema: pyarrow.Schema, wanted: str | None, name: str) -> tuple[str, bool]:
    """The column with images and whether it holds bytes: binary, or a struct with a binary `bytes`; else URIs.

    Without `wanted`, the only column of bytes, or else the only one of text with a usual name.
    """
    pa = arrow()

    def is_binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found: dict[str, tuple[str, bool]] = {}
    for field in schema:
        if is_binary(field.type):
            found[field.name] = (field.name, True)
        elif pa.types.is_struct(field.type) and any(f.name == "bytes" and is_binary(f.type) for f in field.type):
            found[field.name] = (f"{field.name}.bytes", True)
        elif pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            found[field.name] = (field.name, False)
    candidates = [column for column, is_bytes in found.values() if is_bytes] or [
        column for column, (_, is_bytes) in found.items() if not is_bytes and column.lower() in URI_COLUMNS
    ]
    if wanted is None and len(candidates) == 1:
        return next(value for value in found.values() if value[0] == candidates[0])
    if wanted not in found:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        given = "none given" if wanted is None else repr(wanted)
        raise InputError(
            f"{name}: --column {given}, expected the one with the images' bytes or URIs among {columns}; name it"
        )
    return found[wanted]


def list_parquet(container: Container, column: str | None) -> Iterator[Entry | Stretch]:
    """The rows of a parquet file; those with URIs become entries of the files that they name."""
    with open_parquet(container, column) as (file, name, is_bytes):
        row = 0
        for group in range(file.num_row_groups):
            if is_bytes:
                rows = file.metadata.row_group(group).num_rows
                yield Stretch(rows)
                for place in range(row, row + rows):
                    yield _row_entry(container, place)
                row += rows
                continue
            for batch in file.iter_batches(row_groups=[group], columns=[name]):
                for value in batch.column(0).to_pylist():
                    yield _uri_entry(container, row, value)
                    row += 1


def parquet_values(container: Container, column: str | None, first: int) -> Stream:
    """The images from row `first` on, by row."""
    with open_parquet(container, column) as (file, name, _):
        start = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start + rows > first:
                row = start
                for batch in file.iter_batches(batch_size=8, row_groups=[group], columns=[name]):
                    values = batch.column(0)
                    values = values.field("bytes") if arrow().types.is_struct(values.type) else values
                    for value in values:
                        if row >= first:
                            yield row, value.as_py
                        row += 1
            start += rows


def _row_entry(container: Container, row: int) -> Entry:
    return Entry(f"{printable(container.uri)}/{row}", f"{container.prefix}/{row:09d}", "parquet", container.uri, row)


def _uri_entry(container: Container, row: int, value: str | None) -> Entry:
    """The entry of a file that a row names, relative to the parquet file's folder if it is not absolute."""
    key = f"{container.prefix}/{row:09d}"
    if not value:
        name = f"{printable(container.uri)}/{row}"
        return Entry(name, key, "file", container.uri, refused="empty: the row names no file; fill it in")
    folder = container.uri.rpartition("/")[0]
    uri = value if "://" in value or value.startswith("/") or not folder else f"{folder}/{value}"
    return Entry(printable(uri), key, "file", uri)
