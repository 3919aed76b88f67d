"""Copying is a feature: files that stand alone are carried into an empty folder, equations into a namespace with torch alone."""
import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent


def test_model_tokenizer_and_tiny_world_work_each_alone_in_an_empty_folder(tmp_path):
    scripts = {
        "model": "from model import *; m = Transformer(PRESETS['toy-s']); print(len(generate(m, [[1, 2, 3]], 5)[0]))",
        "tokenizer": "from tokenizer import *; print(len(dialog_turns([{'role': 'user', 'content': 'Hi'}])) + 4)",
        "toy": "import toy; print(len(toy.PREPROMPTS[0].split()) and 5)",
    }
    for name, script in scripts.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / f"{name}.py", folder)
        result = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
        assert result.stdout == "5\n", result.stderr


def copied(file: str, *names: str) -> dict:
    """Functions of a file and nothing else of it, in a namespace with numpy and torch."""
    tree = ast.parse((ROOT / f"{file}.py").read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in wanted} == set(names)
    namespace = {"torch": torch, "F": F, "Tensor": torch.Tensor, "np": np, "math": importlib.import_module("math"), "Sequence": list}
    exec(compile(ast.Module(wanted, []), file, "exec"), namespace)
    return namespace


ROWS = torch.arange(12.0).view(3, 4).sin()  # three answers of four tokens
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
EQUATIONS = [  # file, function and those that it calls, arguments
    ("reward", ["margin_ranking_loss"], (ROWS[0], ROWS[1], ROWS[2].abs())),
    ("reward", ["safety_loss"], (ROWS[0], torch.tensor([1, -1, 0, 1]))),
    ("rlhf", ["combine_rewards"], (np.array([0.1, 0.9]), np.array([0.8, 0.7]), np.array([False, True]))),
    ("rlhf", ["whiten"], (ROWS, MASK)),
    ("rlhf", ["token_rewards"], (ROWS[:, 0], ROWS, ROWS.cos(), MASK, 0.1)),
    ("rlhf", ["gae"], (ROWS, ROWS.cos(), MASK, 1.0, 0.95)),
    ("rlhf", ["ppo_loss"], (ROWS, ROWS.cos(), ROWS.exp(), MASK, 0.2)),
    ("rlhf", ["value_loss"], (ROWS, ROWS.cos(), ROWS.exp(), MASK, 0.2)),
    ("rlhf", ["best_of_n_kl"], (16,)),
    ("gatt", ["gatt_mask"], ([([1, 2], [3, 4]), ([5], [6, 7])],)),
    ("pretrain", ["cosine_schedule"], (7, 20, 3)),
    ("eval", ["pass_at_k"], (10, 3, 2)),
    ("eval", ["gwet_ac"], (np.array([[1, 1, 2], [3, 3, 3], [2, 1, 2]]), [1, 2, 3], "linear")),
]


@pytest.mark.parametrize("file, names, arguments", EQUATIONS, ids=lambda value: str(value[0]) if isinstance(value, list) else "")
def test_an_equation_copied_alone_gives_what_it_gives_in_its_file(file, names, arguments):
    alone, at_home = copied(file, *names)[names[0]], getattr(importlib.import_module(file), names[0])
    torch.testing.assert_close(alone(*arguments), at_home(*arguments), rtol=0, atol=0)
