"""Reinforcement learning from human feedback (§3.2.3): a chat model and two reward models in, a better chat model out.

    python rlhf.py --version 1                    # rejection sampling; out/rlhf-v1
    python rlhf.py ppo --version 2                # PPO from out/rlhf-v2; out/rlhf-v2-ppo

Read it in this order: the reward of §3.2.3, rejection sampling, PPO.
"""
import sys
from random import Random

import numpy as np

import toy
from pretrain import Ranks, build, command_line, parent_of
from reward import RewardModel

# ---------------------------------------------------------------------------------------------- the reward


def combine_rewards(safety: np.ndarray, helpfulness: np.ndarray, is_safety: np.ndarray, threshold: float = 0.15) -> np.ndarray:
    """R_c of §3.2.3: the safety score if the prompt is tagged unsafe or that score is below the threshold, else helpfulness.

    safety, helpfulness: (answers,) scores in (0, 1), after a sigmoid. is_safety: (answers,) bool, whether the prompt of
    an answer is likely to draw unsafe ones. threshold: 0.15 in the paper, with precision .89 and recall .55.
    """
    return np.where(is_safety | (safety < threshold), safety, helpfulness)


def load_reward(folder: str, settings, ranks: Ranks) -> RewardModel:
    """A reward model, sharded over the ranks and frozen."""
    parent = parent_of(folder)
    model = build(parent.config, settings, ranks, RewardModel)
    parent.fill(model)
    return model.eval().requires_grad_(False)


def toy_prompts(world: toy.World, n: int, seed: int, split: str = "train", unsafe: float = 0.25) -> list[dict]:
    """n prompts of the tiny world, of which a share is unsafe, with or without an attack (our choice)."""
    n_unsafe = round(unsafe * n)
    found = toy.prompts(world, n - n_unsafe, seed, split) + toy.prompts(world, n_unsafe, seed, split, ["unsafe"])
    Random(f"{seed}/rlhf").shuffle(found)
    return found


# ---------------------------------------------------------------------------------------------- rejection sampling


# ---------------------------------------------------------------------------------------------- PPO


# ---------------------------------------------------------------------------------------------- the command line

COMMANDS = {}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        command_line(*COMMANDS[sys.argv.pop(1)])
