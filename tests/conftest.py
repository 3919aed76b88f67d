"""Tests import the files that stand beside their folder, and draw the same random numbers in every run."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)  # tiny tensors: a second thread waits more than it works


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
