"""What the validations of a stage have found, from their files: RUN/<stage>/validation/step-00001000.json."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection
from typing import Literal

from ldbfr.errors import StorageError
from ldbfr.storage import join, list_objects, read_bytes

log = logging.getLogger(__name__)

FOLDER = "validation"


def result_uri(stage_uri: str, step: int, suffix: str) -> str:
    """Where a validation's file of a kind ("json", "png") lies."""
    return join(stage_uri, FOLDER, f"step-{step:08d}.{suffix}")


def read_validations(stage_uri: str) -> dict[int, dict[str, float]]:
    """The metrics of every validated step, in the order of steps; a damaged file is passed over with a warning.

    Args:
        stage_uri: RUN/<stage>, local or in a bucket.

    Raises:
        StorageError: the folder or bucket cannot be listed.
    """
    results = {}
    for entry in list_objects(join(stage_uri, FOLDER)):
        match = re.fullmatch(r"step-(\d+)\.json", entry.key)
        if match is None:
            continue
        try:
            results[int(match[1])] = parse(read_bytes(entry.uri), int(match[1]))
        except (StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("validation passed over: %s is damaged (%r)", entry.uri, error)
    return dict(sorted(results.items()))


def parse(data: bytes, step: int) -> dict[str, float]:
    """The metrics of a validation's file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no such file, or another step's.
    """
    content = json.loads(data)
    if content["step"] != step:
        raise ValueError(f"it is of step {content['step']}")
    return {str(name): float(value) for name, value in content["metrics"].items() if math.isfinite(value)}


def best_step(
    stage_uri: str, score: tuple[str, Literal["max", "min"]], among: Collection[int] | None = None
) -> int | None:
    """The validated step that did best, of equal ones the latest; None where none has the metric.

    Args:
        stage_uri: RUN/<stage>, local or in a bucket.
        score: name of the metric, and whether more ("max") or less ("min") of it is better.
        among: steps that count, such as those whose checkpoint is still there; all if None.

    Raises:
        StorageError: the folder or bucket cannot be listed.
    """
    name, direction = score
    sign = 1 if direction == "max" else -1
    found = read_validations(stage_uri).items()
    scored = [
        (sign * values[name], step) for step, values in found if name in values and (among is None or step in among)
    ]
    return max(scored)[1] if scored else None
