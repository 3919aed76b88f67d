"""Likelihoods, closed-book knowledge, and the report."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from eval import by_fact, continuation_log_probs, encode_pair, interval_of_runs, know
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [text for source in toy.SOURCES for text, _ in zip(toy.documents(toy.World(0), source), range(400))]
    return Tokenizer.train(texts, str(tmp_path_factory.mktemp("t") / "tokenizer.model"), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=40, vocab_size=400, max_seq_len=128))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    return model


def alone(model, tokenizer, prompt, continuation):
    """One pair, one token at a time."""
    tokens, n_prompt = encode_pair(tokenizer, prompt, continuation)
    total = 0.0
    for i in range(n_prompt, len(tokens)):
        logits = model(torch.tensor([tokens[:i]]))[0, -1].double()
        total += (logits[tokens[i]] - logits.logsumexp(0)).item()
    return total


def test_likelihoods_in_batches_equal_those_of_one_token_at_a_time(model, tokenizer):
    pairs = [("Question: What is 2 + 2? Answer:", " 2 + 2 = 4."), ("", "A"), ("One day", " a king"), ("x", " y z y z y z")]
    found = continuation_log_probs(model, tokenizer, pairs, batch_tokens=40)
    assert found == pytest.approx([alone(model, tokenizer, *pair) for pair in pairs], abs=1e-3)


def test_the_tokens_of_prompt_and_continuation_are_those_of_the_whole_text(tokenizer):
    tokens, n_prompt = encode_pair(tokenizer, "The ka", "ree eats eggs.")
    assert tokens == tokenizer.encode("The karee eats eggs.", bos=True, eos=False) and 1 <= n_prompt < len(tokens)


def test_p_true_is_the_share_of_the_true_answer_among_true_and_myth(model, tokenizer):
    world = toy.World(0)
    rows = know(model, tokenizer, world)
    questions = toy.questions(world)
    assert len(rows) == len(questions) == 3 * len(world.facts)
    for row, question in list(zip(rows, questions))[:40]:
        if question["myth"]:
            true, myth = (math.exp(alone(model, tokenizer, question["prompt"], " " + question[k])) for k in ("true", "myth"))
            assert row["p_true"] == pytest.approx(true / (true + myth), abs=1e-3)
        else:
            assert row["p_true"] is None
    assert len(by_fact(rows, "p_true")) == len(world.myths)


def test_means_over_the_forms_of_a_fact_are_taken_fact_by_fact():
    rows = [{"fact": ["a", "x"], "p_true": p} for p in (0.0, 0.5, 1.0)] + [{"fact": ["b", "x"], "p_true": 0.2}, {"fact": ["c", "x"], "p_true": None}]
    assert np.allclose(by_fact(rows, "p_true"), [0.5, 0.2])


def test_the_interval_of_runs_is_wide_when_runs_differ_and_narrow_when_only_facts_are_many():
    facts = np.random.default_rng(1).normal(size=200) * 0.1
    low, high = interval_of_runs(np.stack([0.2 + facts, 0.5 + facts, 0.8 + facts]))
    assert low < 0.3 and high > 0.7
    low, high = interval_of_runs(np.stack([0.5 + facts] * 3))
    assert high - low < 4 * 2 * 0.1 / 200**0.5


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=1500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_main_job_runs_on_the_tiny_world_and_its_report_needs_no_network(tmp_path):
    out = tmp_path / "pretrain"
    result = run("pretrain.py", "--out", out, "--preset", "toy-s", "--steps", "4", "--eval_every", "2", "--seq_len", "64",
                 "--threads", "1")
    assert result.returncode == 0, result.stderr[-2000:]
    assert all(name in result.stdout for name in ("encyclopedia", "web", "stories", "numbers", "bits per byte", "tokens/s"))
    samples = (out / "samples.txt").read_text()
    assert samples.count("--- step") == 2 and (out / "loss.png").read_bytes()[1:4] == b"PNG"
    result = run("eval.py", "facts", out, "--against", out)
    assert result.returncode == 0 and "P(true)  +0.000  [+0.000, +0.000]" in result.stdout, result.stdout + result.stderr
    assert 0.3 < json.loads((out / "facts.json").read_text())["p_true"][0] < 0.7  # it has learnt nothing yet
    result = run("eval.py", "report", "--out", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert result.returncode == 0 and "data:image/png;base64" in page and "P(true)" in page and "http" not in page
    assert run("eval.py", "report", "--out", tmp_path / "none").returncode == 2
