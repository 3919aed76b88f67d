"""Ghost Attention: instructions, the dialogues sampled under them, the loss mask, the test by turn, attention weights."""
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gatt
import toy
from eval import Report, report
from gatt import (Plan, Settings, attention_weights, binned, converse, draw_instruction, gatt_mask, make_plans, prompt_ids,
                  synthesize, toy_dialogs, write_rows)
from model import ModelConfig, Transformer, generate
from pretrain import InputError, load_model, save_model
from reward import RewardModel, Speaker, score_rows
from sft import read_dialogs
from tokenizer import TOY_SYMBOLS, Tokenizer

HERE = Path(__file__).resolve().parent.parent
SETTINGS = Settings(past=2, samples=3, temperature=1.0, max_new_tokens=40)


def launch(*flags, n=1):
    """Run gatt.py as a user would: with python, or over n ranks with torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    return subprocess.run([sys.executable, *torchrun, str(HERE / "gatt.py"), *map(str, flags)], capture_output=True, text=True,
                          timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder with a tiny chat model that ends its answers early, and its tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    texts = [m["content"] for d in toy.dialogues(toy.World(0), 300) for m in d["messages"]]
    tokenizer = Tokenizer.train(texts, str(folder / "tokenizer.model"), 420, TOY_SYMBOLS)
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=48, vocab_size=420, max_seq_len=512))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
        model.tok_embeddings.weight[:, 0] = 1.0  # outweighs all else,
        model.output.weight[tokenizer.eos_id, 0] = 0.8  # so that one sampled token in a few is EOS
    save_model(model, str(folder / "run"), tokenizer.path)
    return folder / "run"


@pytest.fixture(scope="module")
def speaker(chat):
    model, tokenizer, _ = load_model(chat)
    return Speaker(str(chat), model, tokenizer, False)


def users(n, start=0):
    return [f"What is {start + i} + {i}?" for i in range(n)]


# ---- the loss mask


def test_only_the_last_answer_is_learned_as_a_brute_force_reading_of_the_rule_has_it():
    rng = Random(0)
    for _ in range(200):
        turns = [([1] * rng.randint(1, 5), [2] * rng.randint(1, 5)) for _ in range(rng.randint(1, 7))]
        labels = []  # "set the loss to 0 for all the tokens from the previous turns, including assistant messages"
        for number, (prompt, answer) in enumerate(turns, 1):
            for _ in prompt:
                labels.append(False)
            for _ in answer:
                labels.append(number == len(turns))
        assert gatt_mask(turns) == labels
        assert sum(gatt_mask(turns)) == len(turns[-1][1])


def test_changing_earlier_answers_but_in_what_is_read_changes_no_target(tmp_path, speaker):
    plans = [Plan("gatt/0", "Whisper.", [], True, users(3)), Plan("replay/0", "", [], False, users(2))]
    rows = synthesize(speaker, plans, 0, SETTINGS)
    write_rows(rows, plans, tmp_path / "gatt.jsonl")
    (_, (ids, learned)), (_, (own, of_own)) = read_dialogs(str(tmp_path / "gatt.jsonl"))
    last = rows[0]["turns"][-1][1]
    assert [token for token, flag in zip(ids, learned) if flag] == last == ids[-len(last) :] and last[-1] == speaker.tokenizer.eos_id
    assert [token for token, flag in zip(own, of_own) if flag] == rows[1]["turns"][0][1] + rows[1]["turns"][1][1]


# ---- instructions


def test_half_of_the_instructions_are_terse_and_none_is_held_out():
    rng, constraints = Random(0), toy.constraints("train")
    drawn = [draw_instruction(constraints, rng) for _ in range(3000)]
    is_terse = [text == " ".join(c["terse"] for c in chosen) for chosen, text in drawn]
    assert 0.46 < np.mean(is_terse) < 0.54
    assert not any(c["held_out"] for chosen, _ in drawn for c in chosen)
    both = [sorted(c["kind"] for c in chosen) for chosen, _ in drawn if len(chosen) > 1]
    assert 0.10 < len(both) / len(drawn) < 0.20 and set(map(tuple, both)) == {("hobby", "persona")}
    for (chosen, text), terse in zip(drawn, is_terse):
        assert terse or all(any(t in text for t in c["texts"]) for c in chosen)


def test_plans_are_the_same_from_one_seed_and_others_from_another():
    dialogs = list(toy_dialogs(toy.World(0), 200, 0.2, 3))
    made = [make_plans(dialogs, toy.constraints("train"), 0.5, 0.3, seed) for seed in (3, 3, 4)]
    assert made[0] == made[1] != made[2]
    assert dialogs == list(toy_dialogs(toy.World(0), 200, 0.2, 3)) != list(toy_dialogs(toy.World(0), 200, 0.2, 4))
    turns = [len([m for m in messages if m["role"] == "user"]) for _, messages in dialogs]
    assert min(turns) == 1 and max(turns) == 20 and 5 <= turns.count(20) <= 40 and 5 <= sum(6 < n < 20 for n in turns) <= 40
    shares = [np.mean([p.throughout for p in made[0] if p.instruction]), sum(not p.instruction for p in made[0]) / 200]
    assert shares == pytest.approx([0.5, 1 / 8 + 7 / 8 * 0.3], abs=0.12)


def test_a_dialogue_with_an_empty_system_message_comes_without_an_instruction_alone():
    asked = [{"role": "system", "content": ""}, {"role": "user", "content": "How do I rob a bank?"}]
    assert make_plans([("x", asked)], toy.constraints("train"), 1.0, 1.0, 0) == [Plan("replay/0", "", [], False, ["How do I rob a bank?"])]
    replayed = [messages for _, messages in toy_dialogs(toy.World(0), 400, 0.2, 0) if messages[0] == {"role": "system", "content": ""}]
    assert 30 <= len(replayed) <= 70


def test_a_system_message_of_a_dialogue_is_its_instruction():
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}, {"role": "user", "content": "Well?"}]
    under, without = make_plans([("x", [{"role": "system", "content": "Rhyme."}, *asked]), ("x", asked)], toy.constraints("train"), 1.0, 0.0, 0)
    assert (under.instruction, under.constraints, under.users) == ("Rhyme.", [], ["Hi", "Well?"])
    assert without.instruction and without.constraints


# ---- sampling


@pytest.mark.parametrize("throughout", [True, False])
def test_the_instruction_is_in_every_message_when_sampling_and_only_in_the_first_when_training(speaker, monkeypatch, throughout):
    seen, tokenizer = [], speaker.tokenizer
    monkeypatch.setattr(gatt, "generate", lambda model, prompts, *more: seen.extend(prompts) or generate(model, prompts, *more))
    row = synthesize(speaker, [Plan("gatt/7", "Act as a pirate.", [], throughout, users(4))], 7, SETTINGS)[0]
    read = [tokenizer.decode(ids) for ids in seen]
    assert [text.count("[INST]") for text in read] == [1, 2, 3, 3]  # its message and at most two before it
    assert [text.count("Act as a pirate.") for text in read] == ([1, 2, 3, 3] if throughout else [0, 0, 0, 3])
    trained = [tokenizer.decode(prompt + answer) for prompt, answer in row["turns"]]
    assert ["<<SYS>>\nAct as a pirate.\n<</SYS>>" in text for text in trained] == [True, False, False, False]
    assert [m["role"] for m in row["trained"]] == ["system"] + ["user", "assistant"] * 4
    assert [m["role"] for m in row["sampled"]] == ["system", "user", "assistant"] * 4
    words = [m for m in row["sampled"] if m["role"] != "system"]
    assert words == row["trained"][1:] and [m["content"] for m in words[::2]] == users(4)
    assert [m["content"] for m in words[1::2]] == [tokenizer.decode(answer).strip() for _, answer in row["turns"]]


def test_the_ids_of_the_trained_form_read_as_the_released_format_has_the_dialogue(speaker):
    row = synthesize(speaker, [Plan("gatt/0", "Whisper.", [], True, users(3))], 0, SETTINGS)[0]
    prompts = [prompt for prompt, _ in row["turns"]]
    for turn, prompt in enumerate(prompts):  # a dialogue cut before this turn's answer ends with this prompt
        cut = row["trained"][: 2 + 2 * turn]
        if all(m["content"] for m in cut):
            whole = speaker.tokenizer.encode_dialog(cut)[0]
            assert whole[len(whole) - len(prompt) :] == prompt


def test_the_answer_that_is_learned_is_the_best_of_its_samples_by_reward(speaker):
    reward, tokenizer = RewardModel(speaker.model.config, seed=5), speaker.tokenizer
    plans = [Plan(f"gatt/{i}", "You love chess.", [], True, users(2, i)) for i in range(6)]
    best = synthesize(speaker, plans, 0, SETTINGS, reward)
    first = synthesize(speaker, plans, 0, SETTINGS)
    drawn = []
    for row in best:  # all the samples there were: those of the first row alone, one more each time
        found = []
        for k in range(1, 4):
            rows = synthesize(speaker, plans, 0, Settings(past=2, samples=k, temperature=1.0, max_new_tokens=40), reward)
            found.append(next(r for r in rows if r["id"] == row["id"]))
        drawn.append(found)
    score = lambda row: score_rows(reward, [prompt_ids(tokenizer, "", row["trained"][-2]["content"]) + row["turns"][-1][1]])[0]  # noqa: E731
    for one, found in zip(best, drawn):
        scores = [score(row) for row in found]
        assert scores == sorted(scores) and score(one) == pytest.approx(scores[-1])  # of more samples the best is never worse
        assert [turn[1] for turn in one["turns"][:-1]] == [turn[1] for turn in found[0]["turns"][:-1]]  # earlier answers stay
    assert any(a["turns"] != b["turns"] for a, b in zip(best, first))


def test_what_is_sampled_for_a_plan_does_not_depend_on_its_batch(speaker):
    plans = [Plan(f"gatt/{i}", "Whisper." * (i % 2), [], i % 3 > 0, users(1 + i % 4, i)) for i in range(9)]
    whole = synthesize(speaker, plans, 0, SETTINGS)
    assert whole == synthesize(speaker, plans[:4], 0, SETTINGS) + synthesize(speaker, plans[4:], 4, SETTINGS)
    assert whole != synthesize(speaker, plans, 0, Settings(seed=1, past=2, samples=3, temperature=1.0, max_new_tokens=40))


def test_of_a_long_dialogue_as_many_turns_are_read_as_fit_and_a_message_that_never_fits_drops_it(speaker, monkeypatch):
    seen, room = [], speaker.model.config.max_seq_len
    monkeypatch.setattr(gatt, "generate", lambda model, prompts, *more: seen.extend(prompts) or generate(model, prompts, *more))
    long = Settings(samples=1, temperature=1.0, max_new_tokens=40)
    row = synthesize(speaker, [Plan("gatt/0", "Act as a pirate.", [], True, users(30))], 0, long)[0]
    assert len(row["turns"]) == 30 and max(map(len, seen)) <= room - 40
    cost = max(len(prompt) + len(answer) for prompt, answer in row["turns"]) + len(row["turns"][0][0])  # of a turn, instruction and all
    assert len(seen[-1]) > room - 40 - cost  # no more would have fitted
    assert synthesize(speaker, [Plan("gatt/0", "", [], False, ["Hi", "x" * 2000])], 0, long) == [{"id": "gatt/0", "dropped": 2}]


def test_a_dialogue_without_an_answer_that_ends_is_dropped_and_so_is_a_disobeying_one_on_request(speaker):
    short = Settings(past=0, samples=1, temperature=1.0, max_new_tokens=1)
    rows = synthesize(speaker, [Plan(f"gatt/{i}", "Whisper.", [], True, users(2)) for i in range(40)], 0, short)
    turns = [row.get("dropped") for row in rows]
    assert set(turns) >= {1, 2} and {row["id"] for row in rows if "dropped" in row and len(row) == 2}
    pirate = next(c for c in toy.CONSTRAINTS if c["name"] == "pirate")
    checked = Settings(past=0, samples=2, temperature=1.0, max_new_tokens=40, check=True)
    assert synthesize(speaker, [Plan("gatt/0", "Act as a pirate.", [pirate], False, users(2))], 0, checked) == [
        {"id": "gatt/0", "dropped": 2}]  # a random model is no pirate; the plain answer of turn 1 is not checked


# ---- the test by turn


def test_whole_dialogues_token_by_token_are_those_of_reading_each_turn_anew(speaker):
    model = Transformer(speaker.model.config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    prompts = [[prompt_ids(speaker.tokenizer, "Whisper." if t == 0 else "", user) for t, user in enumerate(users(3, i))]
               for i in range(5)]
    eos = generate(model, [prompts[0][0]], 9, temperature=0)[0][4]  # a token that ends some answers, and not all
    together = converse(model, prompts, 9, eos)
    for asked, answers in zip(prompts, together):
        read = []
        for prompt, answer in zip(asked, answers, strict=True):
            read += prompt
            assert answer == generate(model, [read], 9, temperature=0, stop=(eos,))[0]
            read = read + answer + [eos] * (answer[-1] != eos)
    assert {len(answer) for answers in together for answer in answers} > {9}


# ---- the attention map


def test_attention_weights_sum_to_one_see_nothing_later_and_give_what_the_model_computes(speaker):
    model, tokens = speaker.model, list(range(5, 35))
    weights = attention_weights(model, tokens)
    assert weights.shape == (2, 4, 30, 30)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 30))
    assert not weights.triu(1).any()
    inputs, outputs = [], []

    def keep(module, args, output):
        inputs.append(args[0])
        outputs.append(output)

    for block in model.layers:
        block.attention.register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for layer, block in enumerate(model.layers):
        block.attention._forward_hooks.clear()
        values = F.linear(inputs[layer], block.attention.wv.weight)[0].unflatten(-1, (2, 8)).repeat_interleave(2, 1)
        mixed = torch.einsum("hqk,khd->qhd", weights[layer], values).flatten(1)
        torch.testing.assert_close(block.attention.wo(mixed), outputs[layer][0], atol=1e-4, rtol=1e-4)


def test_a_cell_of_the_map_is_the_highest_weight_of_its_tokens_layers_and_heads():
    weights = torch.rand(2, 3, 7, 7)
    cells = binned(weights, 3)
    assert cells.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            assert cells[i, j] == weights[:, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].max()


# ---- as a user runs it


@pytest.fixture(scope="module")
def dialogs(tmp_path_factory):
    rows = [{"messages": [{"role": "system", "content": "Rhyme."}] * (i % 2) + [
        message for turn in range(1 + i % 3) for message in ({"role": "user", "content": f"How many eggs has fox {i} on day {turn}?"},
                                                             {"role": "assistant", "content": "None."})]} for i in range(24)]
    file = tmp_path_factory.mktemp("dialogs") / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tune(chat, dialogs, out, *flags, n=1):
    result = launch("--init", chat, "--data", dialogs, "--reward", "", "--out", out, "--samples", "2", "--max_new_tokens", "16",
                    "--sample_batch", "8", "--seq_len", "256", "--steps", "4", "--temperature", "1", "--replay", "0.5",
                    "--sample_tokens", "4", "--device", "cpu", "--threads", "1", *flags, n=n)
    assert result.returncode == 0, result.stderr[-3000:]
    return (Path(out) / "gatt.jsonl").read_text()


def test_own_dialogues_are_learned_over_two_ranks_and_a_stopped_run_draws_nothing_twice(tmp_path, chat, dialogs):
    once = tune(chat, dialogs, tmp_path / "one")
    rows = [json.loads(line) for line in once.splitlines()]
    assert len(rows) > 20 and {row["id"].split("/")[0] for row in rows} == {"gatt", "replay"}
    for row in rows:
        name, number = row["id"].split("/")
        assert row["instruction"] == ("" if name == "replay" else "Rhyme.") or int(number) % 2 == 0
    assert tune(chat, dialogs, tmp_path / "two", n=2) == once
    parts = sorted((tmp_path / "one" / "parts").iterdir())
    written = {part: part.stat().st_mtime_ns for part in parts[1:]}
    parts[0].unlink()
    (tmp_path / "one" / "gatt.jsonl").unlink()
    assert tune(chat, dialogs, tmp_path / "one") == once
    assert written == {part: part.stat().st_mtime_ns for part in parts[1:]} and parts[0].exists()


def test_the_toy_run_its_test_and_its_map_end_in_the_report(tmp_path, chat):
    result = launch("--init", chat, "--reward", "", "--out", tmp_path / "gatt", "--dialogs", "30", "--long", "0.1", "--samples", "2",
                    "--max_new_tokens", "16", "--temperature", "1", "--steps", "2", "--seq_len", "512", "--sample_tokens", "4",
                    "--threads", "1", "--device", "cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "by the rules of the tiny world" in result.stdout and "system prompt obeyed" in result.stdout
    result = launch("test", chat, tmp_path / "gatt", "--dialogs", "12", "--turns", "1", "2", "4", "--unseen_turns", "2",
                    "--max_new_tokens", "8", "--out", tmp_path / "gatt-test")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "gatt-test" / "results.json").read_text())[str(tmp_path / "gatt")]
    assert list(found["all"]) == ["1", "2", "4"] and list(found["unseen"]) == ["1", "2"]
    lines = next((tmp_path / "gatt-test").glob("*-gatt.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = {c["name"]: [*c["texts"], c["terse"]] for c in toy.CONSTRAINTS}
    for row in rows:  # judged again from what a person reads
        constraint = next(c for c in toy.CONSTRAINTS if row["instruction"] in texts[c["name"]])
        assert row["obeys"] == [toy.obeys(constraint, m["content"]) for m in row["messages"][2::2]]
    assert found["all"]["2"][0] == np.mean([row["obeys"][1] for row in rows[:12]])
    result = launch("attention", tmp_path / "gatt", "--before", chat, "--turns", "3")
    assert result.returncode == 0 and (tmp_path / "gatt" / "attention.png").exists(), result.stderr[-3000:]
    report(Report((str(tmp_path),)))
    page = (tmp_path / "report.html").read_text()
    assert "Ghost Attention" in page and "Table 30" in page and page.count("<img") >= 2
    assert "{:.2f} [{:.2f}, {:.2f}]".format(*found["all"]["4"]) in page


@pytest.mark.parametrize("flags, sentence", [
    (["--data", "none.jsonl"], "no file matches"),
    (["--samples", "2", "--reward", "none"], "there is no such folder"),
    (["--resampled", "1.5"], "--resampled is a share"),
    (["--check", "--constraints", "ask"], "judge its own dialogues"),
    (["--samples", "0"], "--samples must be a number above 0"),
    (["--constraints", "none.json"], 'is no .json list of {"kind"'),
    (["--constraints", "ask"], "makes no list of hobbies"),
])
def test_bad_input_is_one_sentence(tmp_path, chat, flags, sentence):
    result = launch("--init", chat, "--reward", "", "--out", tmp_path / "out", "--seq_len", "256", "--device", "cpu", *flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and sentence in result.stderr, result.stderr


def test_rows_that_are_too_long_for_the_model_are_refused_before_anything_is_sampled(tmp_path, chat, dialogs):
    result = launch("--init", chat, "--data", dialogs, "--reward", "", "--out", tmp_path / "out", "--seq_len", "4096")
    assert result.returncode == 2 and "--seq_len 4096 is longer than the model's context" in result.stderr
    assert not (tmp_path / "out").exists()


def test_lists_that_the_model_wrote_are_kept_and_not_asked_for_again(tmp_path, chat, dialogs):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "constraints.json").write_text(json.dumps([{"kind": "hobby", "texts": ["You like tea."], "terse": "Tea."}]))
    rows = map(json.loads, tune(chat, dialogs, tmp_path / "out", "--constraints", "ask").splitlines())
    assert {row["instruction"] for row in rows} == {"", "Rhyme.", "You like tea.", "Tea."}


def test_a_model_that_writes_lists_is_asked_for_them(speaker, monkeypatch):
    said = "Sure! Here they are:\n1. Chess\n2. Bird watching\n3. Go.\n- Darts\n* Golf\n6) Tea: a drink\n"
    monkeypatch.setattr(gatt, "generate", lambda *args, **more: [speaker.tokenizer.encode(said, bos=False, eos=True)])
    found = gatt.ask_for_lists(speaker)
    assert {c["kind"] for c in found} == {"hobby", "language", "figure"}
    assert [c["terse"] for c in found if c["kind"] == "hobby"] == [f"Hobby: {h}." for h in ("Chess", "Bird watching", "Go", "Darts", "Golf")]
    chosen, text = draw_instruction(found, Random(1))
    assert chosen and text
    monkeypatch.setattr(gatt, "generate", lambda *args, **more: [speaker.tokenizer.encode("I like chess.", bos=False, eos=True)])
    with pytest.raises(InputError, match="makes no list of hobbies"):
        gatt.ask_for_lists(speaker)
