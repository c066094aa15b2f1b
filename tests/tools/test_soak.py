"""tools/soak works, and tells what it has done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).resolve().parents[2] / "tools" / "soak.py"


def test_a_short_soak(tmp_path: Path) -> None:
    folder = tmp_path / "soak"
    result = subprocess.run([sys.executable, str(SOAK), "--actions", "10", "--seconds", "15", "--seed", "3",
                             "--folder", str(folder)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("seed 3") and "well: " in result.stdout
    assert not folder.exists()
