"""How long a stranger waits: `make demo` from a clean clone to the model's first answer, and `forge --help`.

The clone is made of HEAD in a temporary folder, with an environment of its own; package caches are off, so that
everything is downloaded. Goals: under 600 s, and under 0.3 s.

    python bench/startup.py            both; about 6 minutes
    python bench/startup.py --quick    `forge --help` alone, 20 times, in seconds
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO_GOAL_S, HELP_GOAL_S = 600.0, 0.3


def timed(command: list[str], **options: Any) -> float:
    """Wall-clock seconds of a command that must succeed."""
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.monotonic() - began


def demo_s() -> dict[str, float]:
    """Seconds of `make venv` and of `make demo` after it, and of a second `make demo`, in a fresh clone."""
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1"}
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as folder:
        subprocess.run(["git", "clone", "-q", str(ROOT), f"{folder}/clone"], check=True)
        clone = {"cwd": f"{folder}/clone", "env": environment}
        return {
            "install": timed(["make", "venv"], **clone),
            "demo": timed(["make", "demo"], **clone),
            "second_demo": timed(["make", "demo"], **clone),
        }


def main() -> None:
    """Prints one JSON object as the last line."""
    quick = "--quick" in sys.argv[1:]
    helps = [timed([sys.executable, "-m", "forge_ray.cli", "--help"], cwd=ROOT) for _ in range(20)]
    ours: dict[str, Any] = {"help_median_s": round(statistics.median(helps), 4)}
    if not quick:
        ours |= {f"{name}_s": round(value, 1) for name, value in demo_s().items()}
    value = ours["help_median_s"] if quick else round(ours["install_s"] + ours["demo_s"], 1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    print(
        json.dumps(
            {
                "name": "startup",
                "value": value,
                "goal": HELP_GOAL_S if quick else DEMO_GOAL_S,
                "met": ours["help_median_s"] < HELP_GOAL_S and (quick or value < DEMO_GOAL_S),
                "ours": ours,
                "peers": {},
                "spread": {"help_s": [round(min(helps), 4), round(max(helps), 4)]},
                "versions": {name: metadata.version(name) for name in ("ray", "torch", "transformers")},
                "host": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
                "commit": commit.stdout.strip(),
            }
        )
    )


if __name__ == "__main__":
    main()
