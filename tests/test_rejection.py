"""Rejection sampling: the combined reward, best of N, the pool, versions, and the curves of Figures 7 and 8."""
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from model import ModelConfig, Transformer
from pretrain import fingerprint, load_model, save_model
from reward import RewardModel, score_rows
from rlhf import (best_of_n, best_of_n_kl, best_scored, choose_threshold, combine_rewards, combined, merge_pools, pick, pool_rows,
                  toy_prompts)
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
CONFIG = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden=48, vocab_size=400, max_seq_len=256)


# ---- the reward


def test_the_combined_reward_is_the_safety_score_of_tagged_prompts_and_of_answers_below_the_threshold():
    safety, helpfulness = np.array([0.9, 0.9, 0.14, 0.15, 0.02]), np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    tagged = np.array([True, False, False, False, True])
    assert combine_rewards(safety, helpfulness, tagged).tolist() == [0.9, 0.2, 0.14, 0.4, 0.02]  # 0.15 itself is not below


def test_the_threshold_is_the_highest_that_is_precise_enough():
    rng = np.random.default_rng(0)
    for _ in range(50):
        is_unsafe = rng.random(60) < 0.4
        safety = np.round(rng.normal(0.5 - 0.3 * is_unsafe, 0.2), 1)  # with ties
        threshold, precision, recall = choose_threshold(safety, is_unsafe)
        below = safety < threshold
        assert np.isclose(is_unsafe[below].mean(), precision) and np.isclose(below[is_unsafe].mean(), recall)
        higher = [is_unsafe[safety <= s].mean() for s in np.unique(safety) if s >= threshold]
        assert precision < 0.89 or all(p < 0.89 for p in higher)
        possible = [is_unsafe[safety <= s].mean() for s in np.unique(safety)]
        assert precision >= 0.89 or np.isclose(precision, max(possible))


# ---- best of N


@pytest.mark.parametrize("case", json.loads((HERE / "golden" / "best_of_n.json").read_text()), ids=lambda c: f"{c['kind']} {c['n']}")
def test_the_best_of_n_agrees_with_exact_fractions(case):
    if case["kind"] == "kl_bound":
        assert np.isclose(best_of_n_kl(case["n"]), case["kl_bound"], rtol=1e-10)
    elif case["kind"] == "exact_kl":
        p = np.array(case["probabilities"])
        q = best_of_n(p, np.array(case["scores"]), case["n"])
        assert np.allclose(q, case["best_of_n_probabilities"], rtol=1e-9, atol=1e-15)
        assert np.isclose(np.sum(q[q > 0] * np.log(q[q > 0] / p[q > 0])), case["kl"], rtol=1e-10, atol=1e-12)
        assert case["kl"] <= best_of_n_kl(case["n"]) + 1e-12
    else:
        sample = np.array([case["sample"]])
        assert np.isclose(best_scored(sample, sample, case["n"])[0], case["without_replacement"], rtol=1e-10)


def test_the_best_of_n_with_ties_is_what_enumerating_all_draws_gives():
    p, scores = np.array([0.5, 0.2, 0.2, 0.1]), np.array([1.0, 3.0, 3.0, 2.0])
    expected = np.zeros(4)
    for draw in product(range(4), repeat=3):
        best = max(scores[i] for i in draw)
        winners = [i for i in draw if scores[i] == best]
        for i in winners:
            expected[i] += np.prod(p[list(draw)]) / len(winners)
    assert np.allclose(best_of_n(p, scores, 3), expected)


def test_the_value_at_the_best_of_n_is_the_mean_over_all_choices_of_n():
    rng = np.random.default_rng(1)
    scores, values = rng.integers(0, 4, (3, 6)).astype(float), rng.random((3, 6))  # many ties: the earlier sample wins
    for n in range(1, 7):
        expected = [np.mean([values[row, max(chosen, key=lambda i: (scores[row, i], -i))] for chosen in combinations(range(6), n)])
                    for row in range(3)]
        assert np.allclose(best_scored(scores, values, n), expected)


# ---- the pool


def test_an_answer_that_was_cut_off_never_wins_and_of_equal_scores_the_earliest_does():
    rows = [{"number": 0, "response_ids": [[5, 6], [7, 2], [8, 2], [9, 2]], "safety": [0.9] * 4, "helpfulness": [0.99, 0.5, 0.7, 0.7]},
            {"number": 1, "response_ids": [[5, 6]] * 4, "safety": [0.9] * 4, "helpfulness": [0.9] * 4}]
    scores = combined(rows, [{"unsafe": False}, {}], 0.15, eos_id=2)
    assert scores[0].tolist() == [-math.inf, 0.5, 0.7, 0.7]
    assert pick(scores, "best", 0)[0] == 2
    assert not np.isfinite(scores[1]).any()


def test_the_random_control_takes_any_finished_answer_whatever_its_score():
    scores = np.tile([-np.inf, 0.1, 0.5, 0.9], (3000, 1))
    counts = Counter(pick(scores, "random", 0).tolist())
    assert set(counts) == {1, 2, 3} and all(900 < n < 1100 for n in counts.values())


def test_of_two_answers_to_one_prompt_the_pool_keeps_the_better_and_of_equal_ones_the_newer():
    row = lambda name, score, version: {"id": name, "score": score, "version": version}  # noqa: E731
    old, new = [row("a", 0.9, 1), row("b", 0.5, 1), row("c", 0.2, 1)], [row("a", 0.4, 2), row("b", 0.5, 2), row("d", 0.1, 2)]
    assert {r["id"]: r["version"] for r in merge_pools([old, new])} == {"a": 1, "b": 2, "c": 1, "d": 2}
    assert {r["id"]: r["version"] for r in merge_pools([old, new], by_score=False)} == {"a": 2, "b": 2, "c": 1, "d": 2}


def test_a_pool_is_learned_in_the_ids_that_were_sampled_and_only_its_answers_are(tmp_path):
    (tmp_path / "pool.jsonl").write_text(json.dumps({"prompt_ids": [1, 9, 9], "response_ids": [7, 7, 2], "response": "other"}) + "\n")
    (_, (ids, is_answer)), = pool_rows(tmp_path / "pool.jsonl")
    assert ids == [1, 9, 9, 7, 7, 2] and is_answer == [False] * 3 + [True] * 3


def test_prompts_are_distinct_and_a_quarter_of_them_is_unsafe():
    prompts = toy_prompts(toy.World(0), 200, seed=3)
    assert len({prompt["id"] for prompt in prompts}) == 200 and sum(prompt["unsafe"] for prompt in prompts) == 50
    assert prompts == toy_prompts(toy.World(0), 200, seed=3) != toy_prompts(toy.World(0), 200, seed=4)


def test_equal_rows_are_scored_once_and_alike():
    model = RewardModel(CONFIG).eval()
    rows = [[1, 5, 6], [1, 7], [1, 5, 6], [1, 5, 6, 7], [1, 7]]
    each = np.array([score_rows(model, [row])[0] for row in rows])
    assert np.allclose(score_rows(model, rows), each, atol=1e-6)


# ---- a version, as a user runs it


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random weights: a chat model (out/sft), a base to fine-tune, two reward models, all of one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    texts = [m["content"] for d in toy.dialogues(toy.World(0), 300) for m in d["messages"]]
    tokenizer = Tokenizer.train(texts, str(folder / "tokenizer.model"), 400)
    chat = Transformer(CONFIG)
    with torch.no_grad():
        chat.output.weight[tokenizer.eos_id] += 0.5 * chat.norm.weight  # ends its answers sooner or later
    save_model(chat, str(folder / "sft"), tokenizer.path)
    for seed, name in enumerate(("helpfulness", "harmlessness")):
        save_model(RewardModel(CONFIG, seed), str(folder / name), tokenizer.path)
    (folder / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": f"What does the fox eat on day {i}?", "unsafe": i % 4 == 0}) + "\n" for i in range(12)))
    return folder


def launch(models, *flags, n=1):
    """Run rlhf.py as a user would: with python, or over n ranks with torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    return subprocess.run([sys.executable, *torchrun, str(HERE.parent / "rlhf.py"), *map(str, flags)], capture_output=True, text=True,
                          timeout=600, cwd=models, env=os.environ | {"OMP_NUM_THREADS": "1"})


RUN = ["--policy", "sft", "--init", "sft", "--helpfulness", "helpfulness", "--harmlessness", "harmlessness", "--threshold", "0.15",
       "--prompts", "prompts.jsonl", "--n_samples", "6", "--max_new_tokens", "48", "--sample_batch", "4", "--temperature", "1",
       "--data", "pool", "--steps", "2", "--batch_size", "2", "--sample_tokens", "0", "--threads", "1"]


def pool(folder, name="pool"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_version_learns_the_best_finished_answer_to_each_prompt_and_draws_nothing_twice(models):
    result = launch(models, *RUN, "--out", "one/rlhf-v1")
    assert result.returncode == 0, result.stderr
    out, best = models / "one" / "rlhf-v1", {}
    eos = Tokenizer(str(models / "tokenizer.model")).eos_id
    for row in (row for part in sorted((out / "parts").glob("*.json")) for row in json.loads(part.read_text())):
        scores = [s if row["number"] % 4 == 0 or s < 0.15 else h for h, s in zip(row["helpfulness"], row["safety"])]
        finished = [(score, ids) for score, ids in zip(scores, row["response_ids"]) if ids[-1] == eos]
        if finished:
            best[tuple(row["prompt_ids"])] = max(finished, key=lambda one: one[0])
    assert len(best) > 3
    assert {tuple(row["prompt_ids"]): (row["score"], row["response_ids"]) for row in pool(out)} == best
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    again = launch(models, *RUN, "--out", "one/rlhf-v1")
    assert again.returncode == 0 and before == {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}


def test_two_ranks_draw_the_same_pool_as_one(models):
    result = launch(models, *RUN, "--out", "two/rlhf-v1", n=2)
    assert result.returncode == 0, result.stderr
    if not (models / "one" / "rlhf-v1").exists():
        launch(models, *RUN, "--out", "one/rlhf-v1")
    one, two = (pool(models / name / "rlhf-v1") for name in ("one", "two"))
    assert [row["response_ids"] for row in one] == [row["response_ids"] for row in two]
    assert np.allclose([row["score"] for row in one], [row["score"] for row in two], atol=1e-6)


def test_a_rank_that_has_nothing_to_draw_holds_nobody_up(models):
    out, few = models / "few" / "rlhf-v1", ["--sample_batch", "12", "--out", "few/rlhf-v1"]
    drawn = []
    for missing in ([], ["pool.jsonl"], ["pool.jsonl", "parts/answers-00000.json"]):  # one batch for two ranks, none, one again
        for name in missing:
            (out / name).unlink()
        result = launch(models, *RUN, *few, n=2)
        assert result.returncode == 0, result.stderr
        drawn.append(pool(out))
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_version_without_the_best_answers_of_an_earlier_one_is_refused(models):
    result = launch(models, *RUN, "--version", "2", "--out", "lost/rlhf-v2")
    assert result.returncode == 2 and "lost/rlhf-v1/best.jsonl" in result.stderr and "--pool last" in result.stderr


def test_a_later_version_mixes_in_the_best_of_the_earlier_ones_rescored_by_the_newest_reward_models(models):
    launch(models, *RUN, "--out", "many/rlhf-v1")
    other = ["--version", "2", "--helpfulness", "harmlessness", "--harmlessness", "helpfulness"]  # "newest" models: swapped
    (models / "new.jsonl").write_text('{"prompt": "Where does the hen live?"}\n{"prompt": "Who are you?"}\n')
    for flags, versions in ((["--out", "many/rlhf-v2"], {1, 2}), (["--pool", "last", "--out", "many/last"], {2})):
        result = launch(models, *RUN, *other, "--prompts", "new.jsonl", *flags)
        assert result.returncode == 0, result.stderr
        assert {row["version"] for row in pool(models / flags[-1])} == versions
    first = {row["id"]: row for row in pool(models / "many" / "rlhf-v1", "best")}
    for row in pool(models / "many" / "rlhf-v2"):
        if row["version"] == 1:
            old = first[row["id"]]
            assert row["response_ids"] == old["response_ids"]
            assert np.isclose(row["helpfulness"], old["safety"]) and np.isclose(row["safety"], old["helpfulness"])
            assert row["rewards"] == ["harmlessness", "helpfulness"] and row["temperature"] == 1.0


def test_the_curves_rise_in_reward_and_pay_no_more_than_the_bound(models):
    result = launch(models, "curves", "sft", "--helpfulness", "helpfulness", "--harmlessness", "harmlessness", "--n_prompts", "5",
                    "--n_samples", "4", "--temperatures", "0.7", "1.0", "--max_new_tokens", "48", "--threads", "1", "--out", "curves")
    assert result.returncode == 0, result.stderr
    for one in json.loads((models / "curves" / "curves.json").read_text()):
        highest = [mean for mean, _, _ in one["max"]]
        assert one["n"] == [1, 2, 4] and highest == sorted(highest)
        assert all(0 <= kl <= bound + 1e-12 for kl, bound in zip(one["kl"], one["bound"]))
    assert (models / "curves" / "best-of-n.png").stat().st_size > 5000


def test_versions_are_compared_prompt_by_prompt_and_a_model_never_beats_itself(models):
    other = Transformer(CONFIG, seed=5)
    if not (models / "other").exists():
        save_model(other, str(models / "other"), str(models / "tokenizer.model"))
    result = subprocess.run([sys.executable, str(HERE.parent / "eval.py"), "versions", "other", "sft", "--against", "sft",
                             "--helpfulness", "helpfulness", "--harmlessness", "harmlessness", "--general", "harmlessness",
                             "--n_prompts", "30", "--max_new_tokens", "8", "--threads", "1", "--out", "versions"],
                            capture_output=True, text=True, timeout=600, cwd=models)
    assert result.returncode == 0, result.stderr
    found = json.loads((models / "versions" / "versions.json").read_text())["runs"]
    answers = {name: [json.loads(line) for line in (models / "versions" / "answers" / f"{name}.jsonl").read_text().splitlines()]
               for name in ("other", "sft")}
    world = toy.World(0)
    truth = {name: [toy.helpfulness(world, prompt, row["answer"]) for prompt, row in zip(toy.prompts(world, 30, 0, "test"), rows)]
             for name, rows in answers.items()}
    assert np.isclose(found["other"]["gain"][0], np.mean(truth["other"]) - np.mean(truth["sft"]))
    assert all([row["helpfulness"] for row in rows[:30]] == truth[name] for name, rows in answers.items())
    assert found["sft"]["gain"] == [0, 0, 0] and found["sft"]["wins, helpfulness"]["truth"][3] == 30  # ties
    assert found["other"]["wins, harmlessness"]["reward models"] == found["other"]["wins, harmlessness"]["general reward model"]
    history = [json.loads(line) for line in (models / "versions" / "history.jsonl").read_text().splitlines()]
    assert [line["run"] for line in history] == ["sft", "other"]


def test_a_model_keeps_its_fingerprint_when_only_threads_and_intervals_change(models):
    shutil.copytree(models / "sft", models / "same")
    path = models / "same" / "config.json"
    record = json.loads(path.read_text()) | {"settings": {"lr": 1e-3, "eval_every": 5}}

    def after(settings=None, **changes):
        path.write_text(json.dumps(record | changes | {"settings": record["settings"] | (settings or {})}))
        return fingerprint(models / "same")

    before = after()
    assert after({"eval_every": 9}, threads=7) == before
    assert after({"lr": 2e-3}) != before and after(data={"farm": "other"}) != before


@pytest.mark.parametrize("flags, sentence", [
    (["--helpfulness", "nowhere"], "nowhere: there is no such folder"),
    (["--select", "worst"], "--select is best or random"),
    (["--version", "0"], "must be a number above 0"),
    (["--prompts", "bad.jsonl"], 'bad.jsonl, line 2: needs a "prompt"'),
    (["--prompts", "none.jsonl"], "none.jsonl"),
])
def test_bad_input_gets_one_sentence(models, flags, sentence):
    (models / "bad.jsonl").write_text('{"prompt": "Hello?"}\n{"question": "Hello?"}\n')
    result = launch(models, *RUN, "--out", "bad", *flags)
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr


def test_if_no_answer_ends_one_sentence_says_so_and_nothing_is_left_to_trip_over(models):
    chat, tokenizer, _ = load_model(models / "sft")
    with torch.no_grad():
        chat.output.weight[tokenizer.eos_id] = 0  # greedy, of 400 logits one is above 0
    save_model(chat, str(models / "endless-sft"), tokenizer.path)
    result = launch(models, *RUN, "--policy", "endless-sft", "--out", "endless", "--temperature", "0")
    assert result.returncode == 2 and "none of 72 answers came to an end in 48 tokens" in result.stderr, result.stderr
    assert not (models / "endless" / "pool.jsonl").exists() and not (models / "endless" / "best.jsonl").exists()


def test_what_chooses_the_threshold_is_asked_for_before_the_samples_and_may_not_change_on_the_way(models):
    flags = [flag for flag in RUN if flag not in ("--threshold", "0.15")]
    result = launch(models, *flags, "--out", "early", "--safety_test", "nowhere.jsonl")
    assert result.returncode == 2 and "nowhere.jsonl: there is no such file" in result.stderr
    assert not list(models.glob("early/parts/*"))


def test_bad_rows_beside_the_pool_are_left_out_if_that_is_asked_for(models):
    (models / "mixed.jsonl").write_text('{"prompt": "Hello?", "response": "Hello."}\n{"prompt": "Who?"}\n')
    flags = ["--data", "pool", "mixed.jsonl", "--steps", "1"]
    strict = launch(models, *RUN, *flags, "--out", "strict")
    assert strict.returncode == 2 and "mixed.jsonl, line 2" in strict.stderr and not list(models.glob("strict/parts/*"))
    lenient = launch(models, *RUN, *flags, "--skip_bad_rows", "--out", "lenient")
    assert lenient.returncode == 0 and "1 bad rows left out" in lenient.stdout, lenient.stderr
