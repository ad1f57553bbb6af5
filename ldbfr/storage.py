"""Objects by URI: a local path, `file:///path` (percent-decoded), or `s3://bucket/key` (taken literally).

The same calls mean the same on a disk and in a bucket: folders are implied by keys, a listing is in the order of the
keys' characters, a write is seen whole or not at all. S3 goes through boto3 (imported on first use), which takes its
credentials and AWS_ENDPOINT_URL from the environment. Every failure is a StorageError that names the URI.
"""

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ldbfr.errors import StorageError

_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".ldbfr-", ".tmp"
_COPY_PIECE = 1 << 20
_BODY_ATTEMPTS = 3  # botocore retries requests, but not a response that breaks off

_timeout: ContextVar[float | None] = ContextVar("timeout", default=None)

_LOCAL_REASONS = {
    errno.ENOENT: "there is no such file; check the path",
    errno.EACCES: "permission denied; give this user access, or name another place",
    errno.EPERM: "the file system does not allow it; give this user access, or name another place",
    errno.EROFS: "the file system is read-only; name another place",
    errno.ENOSPC: "the disk is full; free some space, or name another place",
    errno.EDQUOT: "the disk quota is used up; free some space, or name another place",
    errno.EISDIR: "this is a folder, expected a file; name a file in it",
    errno.ENOTDIR: "a file stands where a folder is needed; move it, or name another place",
    errno.EEXIST: "a file stands where a folder is needed; move it, or name another place",
    errno.ENAMETOOLONG: "the name is too long for this file system; use a shorter one",
    errno.ENOTSUP: "the file system has no hard links, which create-if-absent needs; name another place",
}
_S3_NO_ACCESS = (
    "access denied; check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the bucket's policy"
)
_S3_REASONS = {
    "NoSuchKey": "there is no such object; check the key",
    "404": "there is no such object or bucket; check both names",
    "NoSuchBucket": "there is no such bucket; create it, or check its name and AWS_ENDPOINT_URL",
    "AccessDenied": _S3_NO_ACCESS,
    "403": _S3_NO_ACCESS,
    "InvalidAccessKeyId": _S3_NO_ACCESS,
    "SignatureDoesNotMatch": _S3_NO_ACCESS,
    "InvalidRange": "it ends before the bytes asked for; it was cut short or replaced, copy or make it again",
    "ExpiredToken": "the credentials have expired; renew them",
}


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing."""

    uri: str
    key: str
    """Path relative to the listed root, '/' between its parts."""
    size: int
    """Bytes."""


def is_local(uri: str) -> bool:
    """Whether the URI names a path on this machine; StorageError for an unknown scheme."""
    return _scheme(uri) != "s3"


def local_path(uri: str) -> Path:
    """The path that a local URI names; StorageError if it is not local."""
    scheme = _scheme(uri)
    if scheme == "":
        return Path(uri)
    host, slash, path = uri[len("file://") :].partition("/")
    if scheme == "s3" or host not in ("", "localhost") or not slash:
        raise StorageError(f"{uri}: not a path on this machine, expected a path or file:///path; copy it here first")
    return Path(unquote("/" + path))


def join(uri: str, *parts: str) -> str:
    """The URI of an object below `uri`; each part is a relative key, such as "faces/0001.png".

    A part with an empty, '.' or '..' segment is refused with a StorageError: it could lead out of `uri`, or name the
    same file as another key. A file:// URI comes back as a plain path.
    """
    segments = [segment for part in parts for segment in part.split("/")]
    if any(segment in ("", ".", "..") or "\0" in segment for segment in segments):
        raise StorageError(
            f"{'/'.join(parts)!r} cannot be joined to {uri}: expected a relative key without empty, '.' or '..' "
            "segments; rename the object"
        )
    if is_local(uri):
        return os.path.join(local_path(uri), *segments)
    bucket, key = _bucket_and_key(uri)
    return "s3://" + "/".join(part for part in (bucket, key.rstrip("/"), *segments) if part)


def list_objects(uri: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
    """Every object below `uri`, or the object that `uri` itself names, in the order of their keys.

    With `start_after`, only those whose keys come after it, whether it is there or not; what lies before is not walked.

    The listing is streamed: at most a folder, or a page of 1,000 objects, is held at a time. Where nothing is, nothing
    comes (a bucket cannot tell an empty folder from a missing one). Symbolic links are followed; sockets, devices and
    unfinished writes are left out. A dangling link is listed, with size 0: reading it says what is wrong.
    StorageError if a folder or bucket cannot be listed, or contains itself through a link.
    """
    return _list_local(uri, start_after) if is_local(uri) else _list_s3(uri, start_after)


def exists(uri: str) -> bool:
    """Whether there is an object (a folder is none). A bucket that does not exist has no objects."""
    if is_local(uri):
        with _local_errors(uri, "look up"):
            return local_path(uri).is_file()
    return _s3_size(uri) is not None


def size_of(uri: str) -> int | None:
    """Bytes of an object; None where there is none."""
    if not is_local(uri):
        return _s3_size(uri)
    with _local_errors(uri, "look up"):
        path = local_path(uri)
        return path.stat().st_size if path.is_file() else None


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """The whole content of an object; StorageError, before it is read, if it is larger than `max_bytes`."""
    if is_local(uri):
        with _local_errors(uri, "read"), local_path(uri).open("rb") as file:
            _check_size(uri, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()
    bucket, key = _object_location(uri)
    with _s3(uri, "read") as client:
        return _read_s3_body(client, uri, bucket, key, max_bytes)


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes of an object from byte `start` on; StorageError if the object ends before."""
    if start < 0 or length < 0:
        raise StorageError(f"{uri}: {length} bytes from byte {start} on asked for, expected no negative numbers")
    if is_local(uri):
        with _local_errors(uri, "read"), local_path(uri).open("rb") as file:
            file.seek(start)
            data = file.read(length)
    else:
        bucket, key = _object_location(uri)
        wanted = f"bytes={start}-{start + length - 1}" if length else None  # a range of none cannot be asked for
        with _s3(uri, "read") as client:
            data = _read_s3_body(client, uri, bucket, key, None, wanted) if wanted else b""
    if len(data) != length:
        raise StorageError(
            f"{uri}: bytes {start:,} to {start + length:,} asked for, but it ends before; "
            "it was cut short or replaced, copy or make it again"
        )
    return data


def fetch_file(uri: str, target: Path) -> None:
    """Copy an object to a local file, in pieces; the file takes its name only when it is whole."""
    if is_local(uri):
        _copy_local(local_path(uri), target)
        return
    bucket, key = _object_location(uri)
    with _local_errors(str(target), "write"), _partial_beside(target) as partial:
        with partial.open("xb") as file, _s3(uri, "read") as client:
            client.download_fileobj(bucket, key, file)
        os.replace(partial, target)


def put_file(source: Path, uri: str) -> None:
    """Create or replace an object from a local file, in pieces; a reader sees the old content or all of the new."""
    if is_local(uri):
        _copy_local(source, local_path(uri))
        return
    bucket, key = _object_location(uri)
    with _local_errors(str(source), "read"), _s3(uri, "write") as client:
        client.upload_file(str(source), bucket, key)


def write_bytes(uri: str, data: bytes) -> None:
    """Create or replace an object; a reader sees the old content or all of the new. Folders are made as needed."""
    if is_local(uri):
        target = local_path(uri)
        with _local_errors(uri, "write"), _temporary_beside(target, data) as temporary:
            os.replace(temporary, target)
        return
    bucket, key = _object_location(uri)
    with _s3(uri, "write") as client:
        client.put_object(Bucket=bucket, Key=key, Body=data)


def create_bytes(uri: str, data: bytes) -> bool:
    """Create an object if there is none; True for the one caller that did, however many try at once.

    On S3 the winner is told False if the server's answer was lost and the request repeated. Whoever must know for sure
    writes something unique and reads it back.
    """
    if is_local(uri):
        return _create_local(uri, data)
    bucket, key = _object_location(uri)
    with _s3(uri, "create") as client:
        try:
            client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except client.exceptions.ClientError as error:
            if _client_error_code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                return False
            raise
    return True


def delete(uri: str) -> None:
    """Remove an object; nothing happens where there is none."""
    if is_local(uri):
        with _local_errors(uri, "delete"):
            local_path(uri).unlink(missing_ok=True)
        return
    bucket, key = _object_location(uri)
    with _s3(uri, "delete") as client:
        client.delete_object(Bucket=bucket, Key=key)


@contextmanager
def impatient(seconds: float) -> Iterator[None]:
    """Within it, this thread's S3 requests are not repeated and fail after so many seconds without an answer.

    For who knows better what to do then: ordinarily, a request is repeated for up to minutes.
    """
    before = _timeout.set(seconds)
    try:
        yield
    finally:
        _timeout.reset(before)


def _scheme(uri: str) -> str:
    """'' for a plain path, 'file' or 's3'."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    scheme = match[1].lower() if match else ""
    if not uri or scheme not in ("", "file", "s3"):
        raise StorageError(f"{uri!r}: unsupported URI, expected a local path, file:///path or s3://bucket/key")
    return scheme


def _check_size(uri: str, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise StorageError(f"{uri}: {size:,} bytes, expected at most {max_bytes:,}; shrink it or raise the limit")


# ---- local files ----


@contextmanager
def _local_errors(uri: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _LOCAL_REASONS.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(f"cannot {action} {uri}: {reason}") from error
    except ValueError as error:  # a null character, or one that the file system cannot encode
        raise StorageError(f"cannot {action} {uri!r}: {error}; rename the object") from error


@contextmanager
def _partial_beside(target: Path) -> Iterator[Path]:
    """A name for an unfinished file in the target's folder (so on the same file system); gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}"
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _temporary_beside(target: Path, data: bytes) -> Iterator[Path]:
    """A finished, synced file in the target's folder; gone afterwards."""
    with _partial_beside(target) as temporary:
        if not _write_nameless(temporary, data):
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        yield temporary


def _write_nameless(path: Path, data: bytes) -> bool:
    """Write a file that gets its name last, so that who is killed meanwhile leaves none; False where there are none."""
    if not hasattr(os, "O_TMPFILE"):
        return False
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):  # of some file systems, NFS among them
            return False
        raise
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
        try:  # the directory's descriptor is not looked at, but makes Python follow the link
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)
        except FileNotFoundError:  # no /proc
            return False
    return True


def _copy_local(source: Path, target: Path) -> None:
    with _local_errors(str(source), "read"):
        data = source.open("rb")
    with data, _local_errors(f"{source} to {target}", "copy"), _partial_beside(target) as partial:
        with partial.open("xb") as file:
            shutil.copyfileobj(data, file, _COPY_PIECE)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)


def _create_local(uri: str, data: bytes) -> bool:
    target = local_path(uri)
    with _local_errors(uri, "create"):
        if target.exists():
            return False
        with _temporary_beside(target, data) as temporary:
            try:
                os.link(temporary, target)  # unlike a rename, this fails where a file is
            except FileExistsError:
                return False
    return True


def _list_local(uri: str, after: str | None) -> Iterator[ObjectInfo]:
    root = local_path(uri)
    with _local_errors(uri, "list"):
        if root.is_dir():
            yield from _walk(str(root), "", frozenset(), after)
        elif root.is_file() and (after is None or root.name > after):
            yield ObjectInfo(str(root), root.name, root.stat().st_size)


def _walk(
    folder: str, prefix: str, ancestors: frozenset[tuple[int, int]], after: str | None = None
) -> Iterator[ObjectInfo]:
    with _local_errors(folder, "list"):
        identity = os.stat(folder)
        this = (identity.st_dev, identity.st_ino)
        if this in ancestors:
            raise StorageError(f"cannot list {folder}: this link leads to a folder that contains it; remove the link")
        with os.scandir(folder) as entries:
            # A folder sorts as "name/", so that whole keys come in order, as S3 gives them.
            names = [(entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in entries]
        for name, entry in sorted(names, key=itemgetter(0)):
            key = prefix + name
            if after is not None and key <= after and not (name.endswith("/") and after.startswith(key)):
                continue
            try:
                info = entry.stat()
            except FileNotFoundError:
                yield ObjectInfo(entry.path, prefix + entry.name, 0)
                continue
            if stat.S_ISDIR(info.st_mode):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", ancestors | {this}, after)
            elif stat.S_ISREG(info.st_mode) and not _is_temporary(entry.name):
                yield ObjectInfo(entry.path, prefix + entry.name, info.st_size)


def _is_temporary(name: str) -> bool:
    return name.startswith(_TEMPORARY_PREFIX) and name.endswith(_TEMPORARY_SUFFIX)


# ---- S3 ----


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not bucket:
        raise StorageError(f"{uri}: no bucket in it, expected s3://bucket/key")
    return bucket, key


def _object_location(uri: str) -> tuple[str, str]:
    bucket, key = _bucket_and_key(uri)
    if not key or key.endswith("/"):
        raise StorageError(f"{uri}: names a folder, expected an object; use s3://bucket/key")
    return bucket, key


@lru_cache(maxsize=4)
def _s3_client(process: int, timeout: float | None = None) -> Any:
    """One client for all threads of a process; `process` is its id, since a fork must not share connections."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=timeout or 10,
        read_timeout=timeout or 60,
        retries={"mode": "standard", "total_max_attempts": 1 if timeout else 5},
        max_pool_connections=32,
    )
    return boto3.session.Session().client("s3", config=config)  # boto3's default session is not thread-safe


@contextmanager
def _s3(uri: str, action: str) -> Iterator[Any]:
    """The client, with its failures turned into StorageError."""
    try:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer import exceptions as transfer  # type: ignore[import-untyped]
    except ImportError as error:
        raise StorageError(f"cannot {action} {uri}: S3 needs boto3; pip install 'ldbfr[s3]'") from error
    replaced = getattr(transfer, "S3DownloadFailedError", transfer.RetriesExceededError)  # older ones do not notice
    try:
        yield _s3_client(os.getpid(), _timeout.get())
    except Boto3Error as error:  # what moves a file in pieces wraps the failure of a piece
        cause = error.__cause__ or error.__context__ or error
        raise StorageError(f"cannot {action} {uri}: {_s3_reason(cause)}") from error
    except (transfer.RetriesExceededError, replaced) as error:
        raise StorageError(f"cannot {action} {uri}: {_s3_reason(getattr(error, 'last_exception', error))}") from error
    except (BotoCoreError, ClientError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise StorageError(f"cannot {action} {uri}: {_s3_reason(error)}") from error


def _s3_reason(error: BaseException) -> str:
    from botocore import exceptions

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    if isinstance(error, exceptions.ClientError):
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"))  # a proxy gives no code
        known = _S3_REASONS.get(_client_error_code(error)) or _S3_REASONS.get(status)
        return known or f"{error}; look it up in the logs of {endpoint}"
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run with a role that has them"
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return f"the endpoint {endpoint} cannot be reached ({error}); check AWS_ENDPOINT_URL and the network"
    return f"{error}; check the URI and AWS_ENDPOINT_URL ({endpoint})"


def _client_error_code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _s3_size(uri: str) -> int | None:
    """Bytes of an object, None where there is none."""
    bucket, key = _object_location(uri)
    with _s3(uri, "look up") as client:
        try:
            return int(client.head_object(Bucket=bucket, Key=key)["ContentLength"])
        except client.exceptions.ClientError as error:
            if _client_error_code(error) not in ("404", "NoSuchKey", "NotFound"):
                raise
    return None


def _read_s3_body(
    client: Any, uri: str, bucket: str, key: str, max_bytes: int | None, byte_range: str | None = None
) -> bytes:
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    attempt = 1
    while True:
        response = client.get_object(Bucket=bucket, Key=key, **({"Range": byte_range} if byte_range else {}))
        with closing(response["Body"]) as body:
            _check_size(uri, response["ContentLength"], max_bytes)
            try:
                return bytes(body.read())
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if attempt == _BODY_ATTEMPTS:
                    raise
        attempt += 1


def _list_s3(uri: str, after: str | None = None) -> Iterator[ObjectInfo]:
    bucket, key = _bucket_and_key(uri)
    prefix = key.rstrip("/") + "/" if key.rstrip("/") else ""
    found = False
    start = {"StartAfter": prefix + after} if after else {}
    with _s3(uri, "list") as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **start):
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # a console's marker of an empty folder
                    found = True
                    yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Key"][len(prefix) :], item["Size"])
    if found or not key or key.endswith("/"):
        return
    if after is not None:  # all objects may lie before it: only the whole listing tells whether there is a folder
        first = next(_list_s3(uri), None)
        if first is not None and first.uri == uri and first.key > after:
            yield first
    elif (size := _s3_size(uri)) is not None:
        yield ObjectInfo(uri, key.rsplit("/", 1)[-1], size)
