"""What a failed write says of the others."""

from __future__ import annotations

import errno
from typing import Literal

from ldbfr.errors import StorageError

_ABOUT_ONE_NAME = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
_ASKS_FOR_PATIENCE = ("RequestTimeTooSkewed", "RequestTimeout", "TooManyRequests", "SlowDown")


def scope(error: StorageError) -> Literal["one", "all", "later"]:
    """What a failed write says of the others: nothing, that they will fail too, or that they may succeed later."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return "one" if cause.errno in _ABOUT_ONE_NAME else "all"
    answer = getattr(cause, "response", None)
    if isinstance(answer, dict):  # botocore's ClientError
        code = str(answer.get("Error", {}).get("Code"))
        if code == "KeyTooLongError":
            return "one"
        if code in _ASKS_FOR_PATIENCE:
            return "later"
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 500)
        return "all" if 400 <= status < 500 and status != 429 else "later"
    return "one" if cause is None or isinstance(cause, ValueError) else "later"
