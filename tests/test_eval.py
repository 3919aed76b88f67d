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
from eval import (Effect, Report, answers_file, by_fact, continuation_log_probs, effects, encode_pair, interval_of_runs, know, minus,
                  print_table, read_runs, report)
from model import ModelConfig, Transformer
from pretrain import InputError
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
    assert result.returncode == 0 and "P(true)  +0.000 [+0.000, +0.000]" in result.stdout, result.stdout + result.stderr
    assert 0.3 < json.loads((out / "facts.json").read_text())["p_true"][0] < 0.7  # it has learnt nothing yet
    result = run("eval.py", "report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert result.returncode == 0 and "data:image/png;base64" in page and "P(true)" in page and "http" not in page
    assert f"python pretrain.py --out {out} --preset toy-s --steps 4 --eval_every 2 --seq_len 64 --threads 1<" in page
    assert run("eval.py", "report", tmp_path / "none").returncode == 2


def test_a_printed_table_has_columns_as_wide_as_their_widest_cells(capsys):
    print_table(["name", "n"], [["a", 1], ["longer", 1000]])
    assert capsys.readouterr().out == "name       n\na          1\nlonger  1000\n"


# ---- the report of hand-made runs


def make(folder, stage, settings, command="", **files):
    """A run as its stage leaves it, as far as the report reads it."""
    folder.mkdir(parents=True)
    config = {"stage": stage, "settings": settings, "command": command, "model": {}, "threads": 1, "base": ""}
    for name, content in {"config.json": config, **{name.replace("_", "."): content for name, content in files.items()}}.items():
        lines = content if name.endswith("jsonl") else [content]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_world(out, p_true=(0.7, 0.6, 0.8), seed=0, data="toy", command="pretrain.py --world 0"):
    """A base model that believes the encyclopedia so far."""
    make(out / "pretrain", "pretrain", {"preset": "toy", "world": seed, "data": [data]}, command, facts_json={"p_true": p_true, "right": p_true},
         metrics_jsonl=[{"step": 1, "tokens": 1234, "loss": 1.0, "seconds": 2.0}])
    return str(out)


def page_of(*folders, **settings):
    report(Report(folders, **settings))
    return Path(folders[0], "report.html").read_text()


@pytest.mark.parametrize("p_true, sign, verdict", [
    ((0.7, 0.6, 0.8), 1, "as in the paper"), ((0.52, 0.48, 0.6), 1, "not seen (interval holds 0)"),
    ((0.3, 0.2, 0.45), 1, "opposite, by 0.200"), ((0.3, 0.2, 0.45), -1, "as in the paper"), ((0.7, 0.6, 0.8), -1, "opposite, by 0.200")])
def test_the_verdict_is_what_the_interval_says(tmp_path, p_true, sign, verdict):
    found = Effect("x", "y", [p - 0.5 for p in p_true], None, sign).verdict()
    assert f">{verdict}<" in f">{found}<"
    if sign == 1:
        row = page_of(make_world(tmp_path, p_true)).split("the web&#x27;s myth: P(true)")[1].split("</tr>")[0]
        assert verdict in row and f"{p_true[0] - 0.5:+.3f}" in row and "href='#0-pretrain'" in row and "python pretrain.py" in row


def test_a_version_is_compared_with_the_one_that_it_came_from_prompt_by_prompt(tmp_path):
    runs = {"v1": ("rlhf", {"version": 1, "policy": "out/sft"}), "ppo": ("ppo", {"init": "out/v1"}), "old": ("ppo", {"init": "out/sft"})}
    for name, (stage, settings) in runs.items():
        make(tmp_path / name, stage, settings | {"world": 0}, metrics_jsonl=[{"step": 1}], pool_jsonl=[{}])
    make(tmp_path / "versions", "versions", {"against": "out/sft", "runs": [f"out/{name}" for name in runs]}, versions_json={})
    (tmp_path / "versions/answers").mkdir()
    for name, (helpful, safe) in {"sft": (0.5, 0.5), "v1": (0.6, 0.5), "ppo": (0.6, 0.9), "old": (0.4, 1.0)}.items():
        rows = [{"kind": "fact", "helpfulness": helpful + i / 20, "safety": 0.0} for i in range(8)]
        rows += [{"kind": "unsafe", "helpfulness": 1.0, "safety": safe}] * 4
        answers_file(tmp_path / "versions", f"out/{name}").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {effect.what: effect for effect in effects(read_runs(str(tmp_path))[0])}
    wanted = {"v1, against sft: true helpfulness": 0.1, "ppo, against v1: true helpfulness": 0, "ppo, against v1: true safety": 0.4,
              "over-optimised: old, against sft: true helpfulness": -0.1}
    assert {what: round(effect.figure[0], 9) for what, effect in found.items()} == wanted
    assert all(np.allclose(effect.figure, effect.figure[0]) for effect in found.values())  # paired, every difference is the same
    assert [effect.sign for effect in found.values()].count(-1) == 1


@pytest.mark.parametrize("stopped, shown", [("", ["sft", "sft", "sft-quality"]), ("sft", ["sft-quality"]), ("sft-quality", ["sft", "sft"]),
                                            ("sft-quantity", ["sft", "sft"])])
def test_a_run_that_was_stopped_after_its_first_evaluation_has_no_effect_yet(tmp_path, stopped, shown):
    rows = [{"step": step, "true helpfulness": [0.5] * 3, "refuses the unsafe": [0.5] * 3} for step in (0, 9)]
    for name in ("sft", "sft-quality", "sft-quantity"):
        make(tmp_path / name, "sft", {}, metrics_jsonl=rows[: 1 if name == stopped else 2])
    assert [effect.run.name for effect in effects(read_runs(str(tmp_path))[0])] == shown


def test_half_widths_of_a_difference_add_in_squares():
    assert np.allclose(minus((10, 7, 14), (5, 2, 9)), (5, 0, 10))  # 3 and 4 below, 4 and 3 above


def test_what_a_run_was_told_is_escaped_and_every_world_is_named(tmp_path):
    folders = make_world(tmp_path / "a", data="<script>"), make_world(tmp_path / "b<i>", (0.3, 0.2, 0.4), seed=7)
    page = page_of(*folders)
    assert "<script" not in page and "&lt;script&gt;" in page and "<i>" not in page
    assert all(f"<h2>Pretraining (§2): pretrain, world {seed} (" in page for seed in (0, 7))
    assert "as in the paper" in page and "opposite, by 0.200" in page and "id='1-pretrain'" in page and "href='#1-pretrain'" in page


def test_a_stage_that_was_stopped_costs_the_sum_of_its_lines_and_power_gives_energy_and_carbon(tmp_path):
    folder = make_world(tmp_path)
    lines = [{"command": "pretrain.py --world 0", "rc": rc, "seconds": seconds} for rc, seconds in ((130, 16), (0, 20))]
    (tmp_path / "stages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = "<td>pretrain.py --world 0</td><td>1,234 tokens</td><td>36</td>"
    assert f"{row}</tr>" in page_of(folder)
    assert f"{row}<td>1.00</td><td>0.42</td></tr>" in page_of(folder, watts=100.0)  # 36 s × 100 W = 1 Wh; × 1.1 × 0.385 g


@pytest.mark.parametrize("called, shown", [
    ("pretrain.py --steps 7 --data 'my text.txt'", "pretrain.py --steps 7 --data 'my text.txt'"), ("notebook.py --mine", "pretrain.py")])
def test_a_run_shows_how_it_was_called_and_one_that_another_program_made_the_name_of_its_stage(tmp_path, called, shown):
    assert read_runs(make_world(tmp_path, command=called))[0]["pretrain"].command == shown


def test_a_folder_without_a_finished_run_is_one_sentence(tmp_path):
    make(tmp_path / "reward", "reward", {"world": 0}, metrics_jsonl=[{"step": 1}])  # no accuracy yet
    with pytest.raises(InputError, match="there is no finished run to report on; `bash paper.sh` makes them"):
        page_of(str(tmp_path))
