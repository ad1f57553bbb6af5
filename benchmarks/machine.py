"""What a benchmark's numbers were measured on."""

from __future__ import annotations

from ldbfr.evaluation.machine import cpu, machine

__all__ = ["cpu", "machine"]
