"""Names of what benchmarks make, so that whoever started them can clean up, and nobody else."""

from __future__ import annotations

import os
import uuid

__all__ = ["lab_name"]


def lab_name() -> str:
    """A new name for a lab or a namespace, after ``bench`` or what PRISM_BENCH_PREFIX says."""
    return f"{os.environ.get('PRISM_BENCH_PREFIX', 'bench')}-{uuid.uuid4().hex[:6]}"
