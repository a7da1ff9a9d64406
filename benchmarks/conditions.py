"""Under what conditions a benchmark ran: what every result states beside its figures."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


def conditions(device: str = "cpu", **settings: Any) -> dict[str, Any]:
    """Hardware, versions, commit, and the benchmark's own settings as JSON-able data."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "settings": {"device": device, **{name: _plain(value) for name, value in settings.items()}},
    }


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Path) else value  # a path says where, not what


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """None outside a checkout, as on a machine that got the sources alone."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or None
