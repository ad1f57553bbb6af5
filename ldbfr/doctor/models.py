"""Whether weights and the face detector's file are here and whole."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ldbfr.doctor.findings import Finding, ok, problem, warning
from ldbfr.errors import WeightsError
from ldbfr.weights import cache_folder, find_weights, manifest_digest, read_manifest, sha256_of


def check_weights(reference: str) -> Finding:
    """Weights by name or folder: every file against the manifest's SHA-256."""
    try:
        folder = find_weights(reference)
        manifest = read_manifest(folder)
    except WeightsError as error:
        return problem(
            "weights", str(error), f"copy the folder again, or install ldbfr again if {reference} came with it"
        )
    files = manifest["files"].values()
    size = sum(int(file["size"]) for file in files)
    what = f"{reference}: {len(files)} files, {size / 1e6:.1f} MB, all as in the manifest"
    return ok("weights", f"{what}, digest {manifest_digest(manifest)[:12]}, in {folder}")


def check_detector() -> Finding:
    """The face detector's file, which whole photos need; nothing is downloaded."""
    from ldbfr.faces.detection import DETECTOR_FILE, YuNet

    named, cached = os.environ.get(DETECTOR_FILE.variable), cache_folder() / DETECTOR_FILE.name
    path = named or str(cached)
    if not named and not cached.is_file():
        if os.environ.get("LDBFR_OFFLINE", "0") not in ("", "0"):
            return problem(
                "face detector", "not here, and LDBFR_OFFLINE forbids downloads", DETECTOR_FILE.how_to_supply()
            )
        what = "not here yet: the first whole photo downloads it; aligned faces do without"
        return warning("face detector", what, DETECTOR_FILE.how_to_supply())
    if not named and sha256_of(cached) != DETECTOR_FILE.sha256:
        return warning("face detector", f"{cached} is not the published file", "delete it; it is downloaded again")
    try:
        YuNet(path)
    except WeightsError as error:
        return problem(
            "face detector", str(error), f"unset ${DETECTOR_FILE.variable}, or name the published file in it"
        )
    return ok("face detector", path)


def training_need(preset: str) -> tuple[int, str]:
    """Bytes of a GPU that the hungriest stage of a preset takes with one worker, and what that is.

    Raises:
        ConfigError: there is no such preset.
    """
    from ldbfr.config import load_preset
    from ldbfr.training.plan import plan_stage
    from ldbfr.training.stages import STAGE_NAMES

    settings = load_preset(preset)
    need = {name: int(plan_stage(settings, name, (1, 1)).workers[0].memory.total) for name in STAGE_NAMES}
    stage = max(need, key=lambda name: need[name])
    return need[stage], f"training {stage} of {preset} by one worker"


def check_all_models(weights: str) -> Iterator[Finding]:
    """Weights and detector."""
    yield check_weights(weights)
    yield check_detector()
