"""What numbers were measured on."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path

from ebt_megatron.core.files import write_whole
from ebt_megatron.core.version import installed_version

MACHINE = "machine.json"  # in a run directory: where its training last began


def machine() -> dict[str, str]:
    """The processor, or the GPU, the versions that matter, and today's date (UTC)."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = f"{names[0]} x {len(names)}" if names else model
    if torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    return {
        "machine": model,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ebt-megatron": installed_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def record_machine(folder: Path, ranks: int, modules: Path | None = None) -> None:
    """Write machine.json: this machine, how many ranks train, and where the run's own modality is imported from."""
    own = {} if modules is None else {"modules": str(modules)}
    write_whole(folder / MACHINE, json.dumps(machine() | {"ranks": str(ranks)} | own, indent=1) + "\n")
