"""Whether a machine has what the work takes: memory, disk, shared memory, GPUs that torch can use."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldbfr.doctor.findings import Finding, ok, problem, warning
from ldbfr.weights import cache_folder

GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK, NO_DISK = 4 * GIB, 10 * GIB, GIB
LITTLE_SHARED = 2 * GIB
FULL = 0.95
"""The share of a disk from which Ray writes no objects to it any more (its `local_fs_capacity_threshold`)."""
FEW_FILES = 4_096
DRIVER_FILE = Path("/proc/driver/nvidia/version")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_machine() -> Iterator[Finding]:
    """Memory, disks, and what Ray needs of the system."""
    yield judge_memory(memory_bytes(), os.cpu_count() or 1)
    for name, place in (("disk: cache", cache_folder()), ("disk: temporary", Path(tempfile.gettempdir()))):
        folder = existing(place)
        usage = shutil.disk_usage(folder)
        yield judge_disk(name, folder, usage.free, usage.total)
    if importlib.util.find_spec("ray") is None:
        yield ok("ray", "not installed: everything but jobs/ and serve/ works; pip install 'ldbfr[ray]' for these")
        return
    if Path("/dev/shm").is_dir():
        yield judge_shared_memory(shutil.disk_usage("/dev/shm").free)
    yield judge_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def existing(place: Path) -> Path:
    """A folder, or the nearest one above it that is there already."""
    return next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())


def memory_bytes() -> int:
    """Of this machine, or of this container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        try:
            total = min(total, int(Path(path).read_text("ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def judge_memory(total: int, cores: int) -> Finding:
    """Main memory."""
    what = f"{gib(total)} and {cores} cores"
    if total < LITTLE_MEMORY:
        return warning("memory", what, f"a process with a model takes 1.5 GiB: have {gib(LITTLE_MEMORY)} at least")
    return ok("memory", what)


def judge_disk(name: str, folder: Path, free: int, total: int) -> Finding:
    """Room on the disk of a folder."""
    what = f"{gib(free)} of {gib(total)} free at {folder}"
    if free < NO_DISK:
        return problem(name, what, "free some space, or move it: LDBFR_CACHE for the cache, TMPDIR for temporary files")
    if free < LITTLE_DISK:
        return warning(name, what, "free some space: data from a bucket takes up to --cache-gb, 50 GB by itself")
    if free < (1 - FULL) * total:
        return warning(name, what, f"Ray writes no objects to a disk that is over {FULL:.0%} full: free some space")
    return ok(name, what)


def judge_shared_memory(free: int) -> Finding:
    """Where Ray keeps its objects."""
    what = f"{gib(free)} free at /dev/shm"
    if free < LITTLE_SHARED:
        advice = (
            "Ray uses the disk instead, which is slow: docker run --shm-size=4g, or an emptyDir of medium Memory there"
        )
        return warning("shared memory", what, advice)
    return ok("shared memory", what)


def judge_open_files(most: int) -> Finding:
    """How many files and connections a process may have."""
    what = "no limit" if most == resource.RLIM_INFINITY else f"{most:,} at most"
    if most != resource.RLIM_INFINITY and most < FEW_FILES:
        return warning("open files", what, "many actors need more: ulimit -Hn 65536, or LimitNOFILE of the service")
    return ok("open files", what)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB"


# ---- GPUs ----


@dataclass(frozen=True)
class Gpu:
    """What torch says of a GPU, and whether it computes on it.

    Args:
        name: its model.
        total: bytes of its memory.
        free: of these.
        capability: of computing, such as (9, 0).
        bf16: whether it has bfloat16.
        error: what a small product on it ended with; "" when it was right.
    """

    name: str
    total: int
    free: int
    capability: tuple[int, int]
    bf16: bool
    error: str = ""


@dataclass(frozen=True)
class GpuFacts:
    """The GPUs, and what stands between them and torch.

    Args:
        gpus: those that torch can use.
        build: the CUDA or ROCm version that torch was built for; "" of a CPU build.
        driver: version of the driver; "" where there is none.
        hidden: CUDA_VISIBLE_DEVICES, where it is set.
    """

    gpus: tuple[Gpu, ...]
    build: str
    driver: str
    hidden: str | None = None


def gpu_facts() -> GpuFacts:
    """Of this machine."""
    import torch

    build = torch.version.cuda or getattr(torch.version, "hip", None) or ""
    gpus = tuple(look_at(number) for number in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    return GpuFacts(gpus, build, driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def look_at(number: int) -> Gpu:
    """One GPU; a product of two small matrices shows whether this torch has programs for it."""
    import torch

    about = torch.cuda.get_device_properties(number)
    capability = torch.cuda.get_device_capability(number)
    try:
        ones = torch.ones(64, 64, device=f"cuda:{number}")
        wrong = (ones @ ones - 64).abs().max().item()
        error = f"64 x 64 ones multiplied are wrong by {wrong}" if wrong else ""
        free = torch.cuda.mem_get_info(number)[0]
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError as failure:  # torch's own errors of CUDA are of this kind
        error, free, bf16 = str(failure).splitlines()[0], 0, False
    return Gpu(about.name, about.total_memory, free, capability, bf16, error)


def driver_version() -> str:
    """Of NVIDIA's driver."""
    try:
        words = DRIVER_FILE.read_text("utf-8").split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def check_gpus(needed: int = 0, what_for: str = "") -> Iterator[Finding]:
    """The GPUs of this machine; see `judge_gpus`."""
    yield from judge_gpus(gpu_facts(), needed, what_for)


def judge_gpus(facts: GpuFacts, needed: int = 0, what_for: str = "") -> Iterator[Finding]:
    """Whether each GPU can be used, and is large enough.

    Args:
        facts: about them.
        needed: bytes that the work takes; 0 for no particular work.
        what_for: what that work is.
    """
    if not facts.gpus:
        yield no_gpu(facts)
        return
    for number, gpu in enumerate(facts.gpus):
        name = f"GPU {number}"
        what = (
            f"{gpu.name}, {gib(gpu.free)} of {gib(gpu.total)} free, driver {facts.driver}, torch for CUDA {facts.build}"
        )
        if gpu.error:
            capability = ".".join(map(str, gpu.capability))
            advice = f"take a torch that has programs for compute capability {capability}, or another GPU"
            yield problem(name, f"{what}: {gpu.error}", advice)
        elif gpu.total < needed:
            advice = "take a larger GPU, more --workers, or --set training.STAGE.gradient_accumulation=4"
            yield problem(name, f"{what}; {what_for} takes {gib(needed)}", advice)
        elif gpu.free < max(needed, gpu.total // 2):
            yield warning(name, what, "others use this GPU: nvidia-smi names them")
        elif not gpu.bf16:
            yield warning(name, f"{what}; without bfloat16", "train with --set training.STAGE.precision=fp32")
        else:
            yield ok(name, f"{what}, bf16" + (f"; {what_for} takes {gib(needed)}" if needed else ""))


def no_gpu(facts: GpuFacts) -> Finding:
    """Why torch sees none."""
    if not facts.driver:
        return ok("GPU", "none: everything runs on the CPU")
    if not facts.build:
        advice = "install torch from an index that has CUDA builds (constraints.txt says which)"
        return problem("GPU", f"driver {facts.driver} is here, but this torch is a CPU build", advice)
    if facts.hidden is not None and facts.hidden.strip() in ("", "-1", "NoDevFiles"):
        return warning("GPU", f"CUDA_VISIBLE_DEVICES={facts.hidden!r} hides all of them", "unset it")
    advice = "run nvidia-smi: if it lists a GPU, update the driver or take a torch for an older CUDA; else --gpus all"
    return problem("GPU", f"driver {facts.driver} is here, but torch for CUDA {facts.build} cannot use it", advice)
