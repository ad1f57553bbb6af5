"""Where the result for an input goes: a function of the input's key and the format alone, one-to-one.

So no listing is needed to name an output, a second run writes the same files, and no two inputs meet in one file.
"""

from __future__ import annotations

from typing import Literal

from ldbfr.images import FORMAT_OF_SUFFIX, SUFFIX_OF_FORMAT, ImageFormat
from ldbfr.inputs.keys import is_image

OutputFormat = Literal["same", "png", "jpeg", "webp"]
OutputLayout = Literal["files", "tar", "parquet"]

WORK_FOLDER = "_ldbfr"
"""The run's plan, records and lock."""
FIRST_STAGE_FOLDER = "_first-stage"
SIDE_BY_SIDE_FOLDER = "_side-by-side"
MANIFEST_FOLDER = "manifest"
"""A parquet dataset, one row for every input."""
SHARDS_FOLDER = "shards"
"""Results as tar or parquet files, where they are no files of their own."""
REPORT_FILE = "report.html"
_OURS = (WORK_FOLDER, FIRST_STAGE_FOLDER, SIDE_BY_SIDE_FOLDER, MANIFEST_FOLDER, SHARDS_FOLDER, REPORT_FILE)


def suffix_of(key: str) -> str:
    """From the last dot of the name on, be it the name's first character too; "" if there is none."""
    name = key.rpartition("/")[2]
    return name[name.rindex(".") :] if "." in name else ""


def format_of_output(key: str, format: OutputFormat) -> ImageFormat:
    """The format in which the result for an input is written; "same" is PNG for inputs of formats not written."""
    if format != "same":
        return format
    return FORMAT_OF_SUFFIX.get(suffix_of(key).lower(), "png")


def output_key(key: str, format: OutputFormat) -> str:
    """The result's key, relative to the output: the input's own folders and name.

    A name whose suffix is not that of the format gets one more: a.jpg as PNG is a.jpg.png, so that a.png and a.jpg both
    survive. So does a name that another input could be converted to. A first folder named like one of the run's own
    files gets an underscore.
    """
    first, slash, rest = _with_suffix(key, format).partition("/")
    return f"{first}_/{rest}" if slash and first.rstrip("_") in _OURS else first + slash + rest


def _with_suffix(key: str, format: OutputFormat) -> str:
    written = format_of_output(key, format)
    suffix = suffix_of(key)
    if FORMAT_OF_SUFFIX.get(suffix.lower()) == written:
        stem = key.removesuffix(suffix)
        if not is_image(stem) or _with_suffix(stem, format).lower() != key.lower():
            return key
    return key + SUFFIX_OF_FORMAT[written]
