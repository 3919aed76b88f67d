"""A sample of tests/faults.py, which crashes a run at every file operation: here a few operations and one moment of each stage."""
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("stage, operations", [
    ("pretrain", ["36", "38", "41", "52"]), ("sft", ["3", "14", "20", "33"]), ("collect", ["8", "26"]), ("reward", ["20", "41"]),
    ("rlhf", ["7", "40"]), ("ppo", ["33"]), ("distill", ["12"]),
    ("tasks", ["3", "7", "12"]), ("judge", ["9", "16"]), ("gatt", ["12"])])
def test_a_run_killed_in_the_middle_goes_on_to_bit_identical_weights(stage, operations):
    faults = Path(__file__).parent / "faults.py"
    result = subprocess.run([sys.executable, str(faults), stage, "--only", *operations, "--random_kills", "1"],
                            capture_output=True, text=True, timeout=1500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(operations) + 1} crashes survived" in result.stdout
