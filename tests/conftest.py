"""Tests import the files that stand beside their folder, and draw the same random numbers in every run."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
