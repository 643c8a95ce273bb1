#!/usr/bin/env python3
"""Checks that each module's own test file covers at least 95 % of its lines.

    python3 tests/coverage_each.py [MODULE …]

Needs coverage and pytest. Prints a line a module; the exit code is 1 if one falls short.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

HERE = Path(__file__).resolve().parent.parent
AT_LEAST = 95.0


def covered(module: str, work: Path) -> float:
    """The share of a module's lines, in percent, that its own test file runs."""
    data = f"--data-file={work / module}"
    python = [sys.executable, "-m", "coverage"]
    test = f"tests/test_{module.strip('_')}.py"
    command = [*python, "run", data, f"--include=backup/{module}.py", "-m", "pytest", "-q", test]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout)
        raise SystemExit(f"{test} does not pass")
    report = work / f"{module}.json"
    subprocess.run([*python, "json", "-q", data, "-o", str(report)], cwd=HERE, check=True)
    return float(json.loads(report.read_text(encoding="utf-8"))["totals"]["percent_covered"])


def main(modules: List[str]) -> int:
    short = 0
    with tempfile.TemporaryDirectory() as work:
        for module in modules or sorted(path.stem for path in (HERE / "backup").glob("*.py")):
            percent = covered(module, Path(work))
            short += percent < AT_LEAST
            print(f"{module:12} {percent:6.1f} %{'' if percent >= AT_LEAST else '  too little'}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
