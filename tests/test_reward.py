"""Losses, the reward model, comparisons, collecting them, and training on them."""
import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from eval import Report, report
from model import ModelConfig, Transformer
from pretrain import InputError, Ranks, load_model, parse, save_model
from reward import (MARGINS, RATINGS, Pair, RewardModel, Settings, accuracy, batch_at, collate, encode_pairs, held_out,
                    margin_ranking_loss, measure, mix, pair_ids, read_pairs, reward_loss, safety_loss, score_rows, trend,
                    training_data, win_rate)
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent.parent
TINY = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=48, vocab_size=300, max_seq_len=64)


def launch(*flags, n=1, stdin=""):
    """Run reward.py as a user would: with python, or over n ranks with torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    return subprocess.run([sys.executable, *torchrun, str(HERE / "reward.py"), *map(str, flags)], capture_output=True, text=True,
                          input=stdin, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder with the random weights of a tiny chat model, and its tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    world = toy.World(0)
    texts = [m["content"] for d in toy.dialogues(world, 300) for m in d["messages"]]
    tokenizer = Tokenizer.train(texts, str(folder / "tokenizer.model"), 400)
    config = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden=48, vocab_size=400, max_seq_len=256)
    save_model(Transformer(config), str(folder / "run"), tokenizer.path)
    return folder / "run"


@pytest.fixture(scope="module")
def tokenizer(chat):
    return Tokenizer(str(chat / "tokenizer.model"))


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


# ---- losses


def golden():
    return json.loads((HERE / "tests/golden/margin_loss.json").read_text())["cases"]


@pytest.mark.parametrize("case", golden(), ids=lambda case: case["name"])
def test_the_ranking_loss_and_its_gradients_are_those_of_trl(case):
    chosen, rejected = (torch.tensor(case[side], dtype=torch.double, requires_grad=True) for side in ("chosen", "rejected"))
    loss = margin_ranking_loss(chosen, rejected, torch.tensor(case["margin"] or [0.0] * len(chosen), dtype=torch.double))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-10)
    assert chosen.grad.tolist() == pytest.approx(case["grad_chosen"], abs=1e-10)
    assert rejected.grad.tolist() == pytest.approx(case["grad_rejected"], abs=1e-10)


def test_gradients_of_both_losses_are_finite_differences():
    chosen, rejected, margin = torch.randn(3, 5, dtype=torch.double)
    labels = torch.tensor([1.0, -1, 0, 1, -1], dtype=torch.double)
    assert torch.autograd.gradcheck(lambda c, r: margin_ranking_loss(c, r, margin), (chosen.requires_grad_(), rejected.requires_grad_()))
    assert torch.autograd.gradcheck(lambda r: safety_loss(r, labels), (chosen,))


def test_a_shift_of_all_scores_changes_no_ranking_loss():
    chosen, rejected, margin = torch.randn(3, 50, dtype=torch.double)
    shifted = margin_ranking_loss(chosen + 7, rejected + 7, margin)
    assert shifted.item() == pytest.approx(margin_ranking_loss(chosen, rejected, margin).item(), abs=1e-12)


def test_chosen_and_rejected_swapped_give_the_mirrored_loss():
    chosen, rejected, margin = torch.randn(3, 50, dtype=torch.double)
    difference = margin_ranking_loss(chosen, rejected, margin) - margin_ranking_loss(rejected, chosen, -margin)
    assert difference.item() == pytest.approx((rejected - chosen + margin).mean().item(), abs=1e-12)  # log σ(x) - log σ(-x) = x


def test_margins_are_those_of_table_27():
    rows = {name: [margins.get(rating, 0) for rating in RATINGS] for name, margins in MARGINS.items()}
    assert rows == {"none": [0, 0, 0, 0], "small": [1, 2 / 3, 1 / 3, 0], "large": [3, 2, 1, 0]}


def test_the_safety_loss_is_the_cross_entropy_of_labelled_answers_and_0_of_others():
    scores, labels = torch.randn(6), torch.tensor([1.0, 1, -1, -1, 0, 0])
    by_hand = torch.nn.functional.binary_cross_entropy(torch.sigmoid(scores[:4]), torch.tensor([1.0, 1, 0, 0]), reduction="sum")
    assert safety_loss(scores, labels).item() == pytest.approx(by_hand.item() / 6, abs=1e-6)
    assert safety_loss(scores, torch.zeros(6)).item() == 0


# ---- the model


def ragged(n=5, longest=20, vocab=300):
    return [torch.randint(3, vocab, (int(torch.randint(2, longest, ())),)).tolist() for _ in range(n)]


def test_a_padded_batch_scores_as_each_row_alone_whatever_the_padding_holds():
    model, rows = RewardModel(TINY).eval(), ragged()
    alone = torch.cat([model(torch.tensor([row]), torch.tensor([len(row)])) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    for filling in (0, 2, 299):
        tokens = torch.tensor([row + [filling] * (25 - len(row)) for row in rows])
        assert torch.allclose(model(tokens, lengths), alone, atol=1e-6)
    assert np.allclose(score_rows(model, rows, batch_tokens=30), alone.detach().numpy(), atol=1e-6)


def test_the_score_is_the_head_on_the_last_real_token():
    model, rows, seen = RewardModel(TINY).eval(), ragged(), []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = torch.tensor([row + [1] * (25 - len(row)) for row in rows])
    scores = model(tokens, torch.tensor([len(row) for row in rows]))
    by_hand = [seen[0][i, len(row) - 1] @ model.output.weight[0] + model.output.bias[0] for i, row in enumerate(rows)]
    assert torch.allclose(scores, torch.stack(by_hand), atol=1e-6)


def test_the_head_is_drawn_with_deviation_1_over_root_dim_plus_1_and_the_body_is_the_language_models():
    wide = ModelConfig(dim=2048, n_layers=1, n_heads=1, n_kv_heads=1, ffn_hidden=8, vocab_size=8)
    with torch.no_grad():
        drawn = torch.cat([RewardModel(wide, seed).output.weight[0] for seed in range(4)])
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(2049), rel=0.05)
    model, language_model = RewardModel(TINY, seed=3), Transformer(TINY, seed=3)
    assert model.output.bias.item() == 0
    weights = model.state_dict()
    assert {name for name in language_model.state_dict()} | {"output.bias"} == set(weights)
    assert all(torch.equal(weights[name], p) for name, p in language_model.state_dict().items() if name != "output.weight")


# ---- comparisons

PLAIN = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go.", "rating": "better", "safety": "both safe"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Sing."}]
FORMATS = {
    "plain": (PLAIN, ([{"role": "user", "content": "Hi"}], "Hello.", "Go.", "better")),
    "messages, no rating": ({"prompt": TURNS, "chosen": "La.", "rejected": "No."}, (TURNS, "La.", "No.", None)),
    "anthropic": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sing.\n\nAssistant: La.",
                   "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sing.\n\nAssistant: No."}, (TURNS, "La.", "No.", None)),
    "two speeches in a row": ({"chosen": "\n\nHuman: Sing.\n\nAssistant: La.\n\nAssistant: La.", "rejected": "\n\nHuman: Sing.\n\nAssistant: "},
                              (TURNS[2:], "La.\n\nLa.", "", None)),
    "llama-factory": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."},
                                         {"from": "human", "value": "Sing."}], "chosen": {"from": "gpt", "value": "La."},
                       "rejected": {"from": "gpt", "value": "No."}}, (TURNS, "La.", "No.", None)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_every_known_format_is_read_to_the_same_comparison(tmp_path, name, ending):
    row, wanted = FORMATS[name]
    pairs, dropped = read_pairs((write(tmp_path / f"pairs{ending}", [row, row]),))
    assert [tuple(pair[key] for key in ("prompt", "chosen", "rejected", "rating")) for pair in pairs] == [wanted, wanted]
    assert not dropped


def test_of_scored_responses_every_two_with_different_scores_make_a_pair(tmp_path):
    file = write(tmp_path / "s.jsonl", [{"prompt": "Hi", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 1, 2.5]}])
    found = Counter((pair["chosen"], pair["rejected"]) for pair in read_pairs((file,))[0])
    assert found == Counter([("b", "a"), ("b", "c"), ("b", "d"), ("d", "a"), ("d", "c")])


def test_pairs_with_the_unsafe_answer_chosen_and_pairs_of_equal_answers_are_dropped_and_counted(tmp_path):
    rows = [PLAIN, PLAIN | {"safety": "excluded"}, PLAIN | {"rejected": "Hello."}, PLAIN | {"safety": "excluded"}]
    pairs, dropped = read_pairs((write(tmp_path / "p.jsonl", rows),))
    assert len(pairs) == 1 and dropped == {"chosen unsafe, other safe": 2, "equal answers": 1}


@pytest.mark.parametrize("row, complaint", [
    ([1], "no JSON object"),
    ({"prompt": "Hi", "chosen": "Hello."}, '"rejected" must both be text'),
    (PLAIN | {"rating": "much better"}, "rating 'much better' is unknown"),
    (PLAIN | {"safety": "safe"}, "safety label 'safe' is unknown"),
    (PLAIN | {"prompt": TURNS[:2]}, "must end with a message of the user"),
    (PLAIN | {"prompt": [{"role": "bot", "content": "Hi"}]}, "message 0 has the role 'bot'"),
    (PLAIN | {"prompt": 3}, 'message 0 is no object with "role" and "content"'),
    ({"chosen": 1}, 'has no "prompt"'),
    ({"chosen": "Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}, "a transcript begins with"),
    ({"chosen": "\n\nHuman: Ho\n\nAssistant: No.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}, "differ before their last answers"),
    ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1]}, "as long a list of numbers"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, complaint):
    file = write(tmp_path / "p.jsonl", [PLAIN, row])
    with pytest.raises(InputError, match=re.escape(f"{file}, line 2: ") + ".*" + re.escape(complaint)):
        read_pairs((file,))


def test_what_is_no_json_is_named_too(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(PLAIN) + "\n{")
    with pytest.raises(InputError, match="p.jsonl, line 2: is not JSON"):
        read_pairs((str(tmp_path / "p.jsonl"),))


def test_a_pair_in_ids_is_the_dialogue_in_chat_format_with_eos_last(tokenizer):
    pair = {"prompt": TURNS, "chosen": "La.", "rejected": "No [INST]."}
    prompt, (chosen, rejected) = pair_ids(pair, tokenizer)
    whole, is_answer = tokenizer.encode_dialog([*TURNS, {"role": "assistant", "content": "La."}])
    assert prompt + chosen == whole and chosen[-1] == tokenizer.eos_id
    assert tokenizer.decode(rejected).strip() == "No [ INST]."  # nobody poses as another speaker
    assert all(is_answer[len(prompt):]) and not is_answer[len(prompt) - 1]


def test_sampled_ids_are_kept_and_ids_of_another_tokenizer_refused(tokenizer):
    pair = {"prompt": TURNS, "chosen": "a", "rejected": "b", "prompt_ids": [1, 5], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2]}
    assert pair_ids(pair, tokenizer) == ([1, 5], [[7, 2], [8, 9, 2]])
    with pytest.raises(InputError, match="400, outside the vocabulary of 400"):
        pair_ids(pair | {"chosen_ids": [400]}, tokenizer)


def test_an_empty_answer_is_scored_on_its_eos_and_long_ones_have_a_defined_fate(tokenizer):
    pairs = [{"prompt": TURNS, "chosen": "La.", "rejected": "", "rating": None, "safety": None},
             {"prompt": TURNS, "chosen": "La. " * 60, "rejected": "No.", "rating": None, "safety": None},
             {"prompt": TURNS[:2] * 9 + TURNS[2:], "chosen": "La.", "rejected": "No, no.", "rating": "better", "safety": "chosen safe"}]
    kept, encoded, dropped = encode_pairs(pairs, tokenizer, 60, "large")
    assert kept == [pairs[0], pairs[2]] and dropped == 1  # an answer that fills the context can't be judged
    assert encoded[0].rejected[-1] == tokenizer.eos_id and len(encoded[0].rejected) < len(encoded[0].chosen)
    assert encoded[1].length == 60 and encoded[1].margin == 2 and encoded[1].labels == (1, -1)
    prompt, (chosen, rejected) = pair_ids(pairs[2], tokenizer)  # a long dialogue loses the same beginning for both
    assert encoded[1].chosen == (prompt + chosen)[-60 + len(rejected) - len(chosen):]
    assert encoded[1].rejected == (prompt + rejected)[-60:]


@pytest.mark.parametrize("kind, own, rest, share", [("helpfulness", 600, 2000, 0.5), ("helpfulness", 600, 200, 0.25),
                                                    ("safety", 900, 2000, 0.1), ("joint", 600, 200, 0.25)])
def test_the_mixes_are_those_of_the_paper(kind, own, rest, share):
    found = mix(kind, ["own"] * own, list(range(rest)), seed=0)
    assert len(found) / (own + len(found)) == share and len(set(found)) == len(found)  # nothing twice


def test_held_out_comparisons_share_no_prompt_with_the_others():
    pairs = [{"prompt": [{"role": "user", "content": f"{i // 2}"}]} for i in range(2000)]
    train, test = held_out(pairs)
    prompts = [{pair["prompt"][0]["content"] for pair in part} for part in (train, test)]
    assert not prompts[0] & prompts[1] and 50 <= len(test) <= 150 and len(train) + len(test) == 2000


def test_what_is_mixed_in_from_the_rest_holds_no_held_out_prompt_either(tmp_path):
    for name in ("own", "rest"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({
            "prompt": [{"role": "user", "content": f"{i}"}], "chosen": "yes", "rejected": "no"}) + "\n" for i in range(400)))
    settings = parse(Settings, ["--preset", "toy", "--data", str(tmp_path / "own.jsonl"), "--rest", str(tmp_path / "rest.jsonl")])
    own, mixed_in, tested = training_data(settings)
    asked = [{pair["prompt"][0]["content"] for pair in part} for part in (own, mixed_in, tested)]
    assert len(asked[1]) > 300 and len(asked[2]) > 5 and not asked[2] & (asked[0] | asked[1])


# ---- batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_sees_every_pair_once_and_ranks_do_equally_many_forward_passes(world_size):
    pairs = [Pair([i + 1, 1], [i + 1] * (i % 7 + 1), 0.0, (0, 0)) for i in range(50)]
    seen = Counter()
    for step in range(math.ceil(50 / 16)):
        batches = [batch_at(pairs, step, 16, 3, 0, Ranks(rank, world_size, None, None, 1)) for rank in range(world_size)]
        assert len({len(batch) for batch in batches}) == 1
        for tokens, _, _, margins, n in (micro for batch in batches for micro in batch):
            assert n in (0, len(margins))
            seen.update(tokens[:int(n), 0].tolist())
    assert seen == Counter(range(1, 51))


def test_a_batch_without_real_pairs_adds_nothing():
    model = RewardModel(TINY)
    loss, n, logs = reward_loss(model, collate([]), 1.0)
    loss.backward()
    assert loss.item() == n.item() == 0 and not any(value.item() for value in logs.values())
    assert not any(p.grad is not None and p.grad.abs().sum() for p in model.parameters())


def test_the_loss_of_a_batch_is_the_sum_over_its_pairs_each_alone():
    model = RewardModel(TINY)
    pairs = [Pair(*ragged(2), margin, labels) for margin, labels in [(1.0, (1, -1)), (0.0, (0, 0)), (2 / 3, (-1, -1))]]
    whole, n, _ = reward_loss(model, collate(pairs), 0.5)
    alone = sum(reward_loss(model, collate([pair]), 0.5)[0] for pair in pairs)
    assert n == 3 and whole.item() == pytest.approx(alone.item(), abs=1e-5)


# ---- measures


def test_win_rate_leaves_ties_out_and_has_a_defined_answer_without_a_decision():
    rate, low, high, ties = win_rate(np.array([3.0, 1, 2, 5, 0]), np.array([1.0, 1, 3, 4, -1]))
    assert rate == 0.75 and 0 <= low <= rate <= high <= 1 and ties == 1
    assert win_rate(np.ones(3), np.ones(3)) == (0.5, 0, 1, 3)


def test_equal_scores_count_as_wrong_and_groups_are_counted_apart():
    pairs = [PLAIN | {"safety": "chosen safe"}, PLAIN, PLAIN | {"rating": "slightly better", "safety": "both unsafe"}, PLAIN]
    scores = np.array([[2.0, -1], [1, 1], [0, 1], [2, 1]])
    found = measure(scores, pairs, np.array([[3, 2], [2, 3], [2, 2], [9, 1]]))
    assert {group: values[:2] for group, values in found["accuracy"].items()} == {
        "all": [4, 0.5], "better": [3, 2 / 3], "slightly better": [1, 0.0], "chosen safe": [1, 1.0], "both safe": [2, 0.5],
        "both unsafe": [1, 0.0]}
    assert found["longer"] == 2.5 / 4 and found["recall"] == 1 / 3  # of -1, 0 and 1, one is below 0


def test_the_interval_of_accuracy_knows_that_pairs_of_one_prompt_are_alike():
    right = np.repeat(np.random.default_rng(0).random(40) < 0.7, 25)
    together, apart = accuracy(right, [f"{i // 25}" for i in range(1000)]), accuracy(right, [f"{i}" for i in range(1000)])
    assert together[0] == pytest.approx(apart[0])
    assert together[2] - together[1] > 3 * (apart[2] - apart[1])


def test_the_trend_is_the_correlation_and_is_found_only_where_there_is_one():
    rng = np.random.default_rng(1)
    level = rng.integers(4, size=2000)
    right = rng.random(2000) < 0.5 + 0.1 * level
    z, p = trend(right, level)
    assert z == pytest.approx(np.corrcoef(right, level)[0, 1] * math.sqrt(2000), rel=1e-9) and p < 1e-6
    assert trend(rng.random(2000) < 0.6, level)[1] > 0.01


# ---- training and collecting, as a user runs them


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Comparisons with a simple rule: of two lists of colours, the one with red is better, and safe."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)

    def row(i):
        answers = [" ".join(rng.choice(["blue", "pink", "grey"], size=rng.integers(2, 6))) for _ in range(2)]
        return {"prompt": f"Colours {i}?", "chosen": f"{answers[0]} red.", "rejected": f"{answers[1]}.",
                "rating": RATINGS[i % 4], "safety": "chosen safe"}
    return {name: write(folder / f"{name}.jsonl", [row(i) for i in range(n)]) for name, n in
            [("helpfulness", 300), ("helpfulness-test", 60), ("safety", 300), ("safety-test", 60)]}


def train(chat, files, out, *flags, n=1):
    result = launch("--init", chat, "--data", files["helpfulness"], "--rest", files["safety"], "--out", out, "--lr", "5e-3",
                    "--batch_size", "24", "--seq_len", "128", "--device", "cpu", "--threads", "1", *flags, n=n)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return metrics, load_model(out, RewardModel)[0], result.stdout


def test_a_model_learns_a_simple_rule_and_two_ranks_learn_the_same(tmp_path, chat, files):
    one, model, said = train(chat, files, tmp_path / "one")
    two, other, _ = train(chat, files, tmp_path / "two", n=2)
    assert len(one) == len(two) and one[-1]["accuracy/all"] > 0.9 and "helpfulness 50%, rest 50%" in said
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-4)
    for name, p in model.state_dict().items():
        assert torch.allclose(p, other.state_dict()[name], atol=1e-3), name
    tokenizer = Tokenizer(str(tmp_path / "one" / "tokenizer.model"))
    _, pairs, _ = encode_pairs(read_pairs((files["helpfulness-test"],))[0], tokenizer, 256, "none")
    scores = score_rows(model, [row for pair in pairs for row in (pair.chosen, pair.rejected)])
    assert abs(scores.mean()) < 1e-4  # centred on the held-out answers, in the checkpoint itself


def test_the_safety_loss_gives_scores_their_zero_and_eval_finds_what_training_found(tmp_path, chat, files):
    flags = ["--kind", "safety", "--data", files["safety"], "--rest", files["helpfulness"], "--steps", "10"]
    found = [train(chat, files, tmp_path / weight, *flags, "--safety_aux", weight) for weight in ("0", "1")]
    assert found[0][1].output.bias.item() != 0  # centred
    measured = [json.loads((tmp_path / weight / "accuracy.json").read_text()) for weight in ("0", "1")]
    assert measured[1]["recall"] > 0.9
    result = launch("eval", tmp_path / "0", tmp_path / "1", "--helpfulness", files["helpfulness-test"], "--safety",
                    files["safety-test"], "--out", tmp_path / "eval")
    assert result.returncode == 0, result.stderr[-3000:]
    again = json.loads((tmp_path / "eval" / "rewards.json").read_text())
    for run, wanted in zip(("0", "1"), measured):  # the plain model of the checkpoint measures what the sharded one did
        assert again[f"{tmp_path / run} on safety"]["accuracy"]["all"] == wanted["accuracy"]["all"]
    assert {"scores.png", "calibration.png", "scaling.png"} <= {path.name for path in (tmp_path / "eval").iterdir()}
    report(Report((str(tmp_path),)))
    page = (tmp_path / "report.html").read_text()
    for measures in (*measured, *(again[f"{tmp_path / '0'} on {test}"] for test in ("helpfulness", "safety"))):
        assert f"{100 * measures['accuracy']['all'][1]:.1f} [" in page.replace(" % [", " [")  # as the tables and the text say it
    assert all(text in page for text in ("Table 8", "90.4", "Figure 27", "Figure 29", "Figure 6")) and page.count("<img") == 3


def test_a_missing_file_is_a_sentence_with_the_command_that_makes_it(tmp_path, chat):
    result = launch("--init", chat, "--data", tmp_path / "none.jsonl", "--seq_len", "128", "--out", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "there is no such file" in result.stderr and "python reward.py collect" in result.stderr


def sampled(chat, out, *flags, n=1):
    result = launch("collect", "--a", chat, "--b", chat, "--axis", "safety", "--safety_pairs", "12", "--test_pairs", "5", "--batch_size", "4",
                    "--max_new_tokens", "6", "--device", "cpu", "--threads", "1", "--out", out, *flags, n=n)
    assert result.returncode == 0, result.stderr[-3000:]
    return [(Path(out) / name).read_text() for name in ("safety.jsonl", "safety-test.jsonl")]


def test_collected_pairs_are_the_same_over_two_ranks_and_after_a_stop(tmp_path, chat, tokenizer):
    once = sampled(chat, tmp_path / "one")
    assert sampled(chat, tmp_path / "two", n=2) == once
    (tmp_path / "one" / "parts" / "safety-00004.json").unlink()
    (tmp_path / "one" / "safety.jsonl").unlink()
    assert sampled(chat, tmp_path / "one") == once
    rows = [json.loads(line) for line in once[0].splitlines()]
    assert len(rows) > 6
    for row in rows:
        assert tokenizer.decode(row["chosen_ids"]).strip() == row["chosen"] != row["rejected"]
        assert row["chosen_by"] != row["rejected_by"] and row["safety"] in ("chosen safe", "both safe", "both unsafe")


def test_a_person_compares_in_the_terminal_and_goes_on_after_a_stop(tmp_path, chat):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}, {"prompt": "What is this?"}, {"prompt": "Sing."}])
    run = lambda answers: launch("collect", "--a", chat, "--axis", "safety", "--b", chat, "--annotator", "person", "--prompts", prompts,  # noqa: E731
                                 "--out", tmp_path / "out", "--max_new_tokens", "5", "--device", "cpu", stdin=answers)
    first = run("2\n1\nyes\n1\n1\n4\n")  # the second comparison is left unfinished; "yes" is asked again
    assert first.returncode == 0 and "1 of 3 comparisons are kept" in first.stdout, first.stderr
    second = run("1\n4\n4\n1\n2\n2\n")
    assert "2 of 3" in second.stdout and "3 of 3" in second.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "safety.jsonl").read_text().splitlines()]
    assert [(row["rating"], row["safety"]) for row in rows] == [("significantly better", "chosen safe"), ("better", "both safe")]
    assert "1 dropped (chosen unsafe, other safe)" in second.stdout
