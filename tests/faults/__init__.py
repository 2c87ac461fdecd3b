"""Faults put in on purpose: kills, full disks, damaged files, missing permissions. See docs/faults.md."""

import sys
from pathlib import Path

# Helpers of the tests, wherever this package is started from.
sys.path.append(str(Path(__file__).resolve().parents[1]))
