"""Dialogue formats, packing, the loss on answers, the command line of fine-tuning, and chat."""
import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import sft
import toy
from model import IGNORE, PRESETS, ModelConfig, Transformer, with_vocab
from pretrain import InputError, lm_loss, preset_of
from sft import PackedDialogs, Settings, fit, fit_context, messages_of, pack, read_dialogs
from tokenizer import TOY_SYMBOLS, Tokenizer

HERE = Path(__file__).resolve().parent.parent
TEXT = "\n\n".join(f"The {a} {b} has {i} eggs. It likes the {b}. " * 4 for i in range(30) for a, b in [("old", "fox"), ("red", "hen")])
HELLO = [{"role": "user", "content": "Hello?\nYou"}, {"role": "assistant", "content": "Hi."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = toy.documents(toy.World(0), "encyclopedia", range(500))
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 512, TOY_SYMBOLS)


# ---- formats


@pytest.mark.parametrize("row", [
    {"messages": HELLO},
    {"conversations": [{"from": "human", "value": "Hello?\nYou"}, {"from": "gpt", "value": "Hi."}]},
    {"instruction": "Hello?", "input": "You", "output": "Hi."},
    {"instruction": "Hello?\nYou", "input": "", "output": "Hi."},
    {"prompt": "Hello?\nYou", "response": "Hi."},
    {"prompt": HELLO[:1], "completion": "Hi."},
])
def test_every_format_gives_the_same_messages(tmp_path, row):
    assert messages_of(row) == HELLO
    assert messages_of(row | {"system": "Be kind."}) == [{"role": "system", "content": "Be kind."}, *HELLO]
    (tmp_path / "a.json").write_text(json.dumps([row, row], indent=2))
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps([row, row]).encode()))
    for name in ("a.json", "b.jsonl", "c.json.gz"):
        assert [messages for _, messages in read_dialogs(str(tmp_path / name))] == [HELLO, HELLO]


BAD = {
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
    "two users": ({"messages": [HELLO[0], HELLO[0]]}, "expected assistant"),
    "empty answer": ({"instruction": "x", "output": " "}, "empty answer"),
    "forbidden tag": ({"prompt": "[INST] x", "response": "y"}, "[INST]"),
    "no answer": ({"messages": HELLO[:1]}, "no answer"),
    "no text": ({"prompt": "x", "response": 7}, "both of them text"),
    "no row": ([1, 2], "no JSON object"),
    "no format": ({"text": "x"}, "instruction"),
    "no list": ({"conversations": 3}, "no list"),
    "half a character": ({"prompt": "\ud83d", "response": "y"}, "surrogates"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_named_by_file_and_line_or_left_out_and_counted(tmp_path, what):
    row, word = BAD[what]
    rows = [{"messages": HELLO}, row, {"messages": HELLO}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "list.json").write_text("[\n" + json.dumps(rows[0], indent=1) + ",\n" + ",\n".join(json.dumps(r) for r in rows[1:]) + "\n]")
    second = json.dumps(rows[0], indent=1).count("\n") + 3
    for name, line in (("rows.jsonl", 2), ("list.json", second)):
        with pytest.raises(InputError) as error:
            list(read_dialogs(str(tmp_path / name)))
        assert str(error.value).startswith(f"{tmp_path / name}, line {line}: ") and word in str(error.value)
        bad = []
        assert [m for _, m in read_dialogs(str(tmp_path / name), bad)] == [HELLO, HELLO] and len(bad) == 1


@pytest.mark.parametrize("content, word", [("", "empty"), ('[{"prompt": "x"', "line 1: this list is not whole JSON"), ("nonsense", "not JSON")])
def test_a_file_that_is_no_json_is_refused(tmp_path, content, word):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=word):
        list(read_dialogs(str(tmp_path / "a.json")))


# ---- packing


def test_a_long_dialogue_is_cut_between_turns_and_its_last_answer_keeps_its_eos(tokenizer):
    turns = [tokenizer.encode_turn("[INST] What? [/INST]", f"Answer {i}.") for i in range(4)]
    sizes = [len(tokens) for tokens, _ in turns]
    assert fit(turns, sum(sizes))[0] == [t for tokens, _ in turns for t in tokens]
    for room in (sum(sizes[:3]), sum(sizes) - 1):
        tokens, flags = fit(turns, room)
        assert len(tokens) == len(flags) == sum(sizes[:3]) and tokens[-1] == tokenizer.eos_id and flags[-1]
    assert fit(turns, sizes[0] - 1) == ([], [])


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_best_fit_of_the_longest_first_as_a_plain_loop_finds_it(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, 200).tolist()
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        enough = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if not enough:
            rows.append([])
            room.append(60)
            enough = [len(rows) - 1]
        best = min(enough, key=lambda r: room[r])
        rows[best].append(i)
        room[best] -= lengths[i]
    found = pack(lengths, 60)
    assert sorted(i for row in found for i in row) == list(range(200))
    assert sorted(sum(lengths[i] for i in row) for row in found) == sorted(60 - r for r in room)


def dialogs_of(tokenizer, n):
    encoded = [tokenizer.encode_dialog(d["messages"]) for d in toy.dialogues(toy.World(0), n)]
    return {"tokens": np.concatenate([np.array(t, np.int32) for t, _ in encoded]), "is_answer": np.concatenate([f for _, f in encoded]),
            "ends": np.cumsum([len(t) for t, _ in encoded])}, encoded


def test_the_tiny_worlds_dialogues_fill_their_rows(tokenizer):
    dialogs, _ = dialogs_of(tokenizer, 1000)
    assert PackedDialogs(dialogs, np.ones(1000), 1, 512, 0, True).efficiency > 0.97


@pytest.mark.parametrize("weight, times", [(1.0, {2}), (2.0, {4}), (0.5, {0, 1, 2})])
def test_every_answer_token_is_a_target_as_often_as_its_dialogue_is_read_and_a_prompt_never(tokenizer, weight, times):
    dialogs, encoded = dialogs_of(tokenizer, 60)
    dialogs["tokens"] = np.arange(len(dialogs["tokens"])) + 1000  # every token is its own, so that counting is easy
    rows = PackedDialogs(dialogs, np.full(60, weight), 2, 512, 3, True)
    _, targets, _ = rows.batch(range(rows.n_rows + 1), rows.n_rows + 1)
    seen = Counter((targets[targets != IGNORE] - 1000).tolist())
    counts = [seen[i] for i, flag in enumerate(dialogs["is_answer"]) if flag]
    assert set(counts) <= times and sum(counts) == sum(seen.values())
    assert abs(np.mean(counts) - 2 * weight) < 0.3
    assert sum(flags[0] for _, flags in encoded) == 0  # a dialogue's first token is a prompt's: nothing predicts it


def test_a_document_among_the_dialogues_is_learned_whole(tokenizer):
    tokens, flags = sft.encode_document(tokenizer, "The old fox has 3 eggs.")
    dialogs = {"tokens": np.array(tokens), "is_answer": np.array(flags), "ends": np.array([len(tokens)])}
    inputs, targets, _ = PackedDialogs(dialogs, np.ones(1), 1, 64, 0, True).batch(range(1), 1)
    assert targets[0][targets[0] != IGNORE].tolist() == tokens[1:] and inputs[0, : len(tokens)].tolist() == tokens
    assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id


@pytest.fixture(scope="module")
def model():
    return Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=64, vocab_size=512), seed=1)


def test_logits_of_a_packed_dialogue_are_those_of_the_dialogue_alone(tokenizer, model):
    dialogs, encoded = dialogs_of(tokenizer, 12)
    rows = PackedDialogs(dialogs, np.ones(12), 1, 512, 0, True)
    inputs, _, documents = rows.batch(range(1), 1)
    assert len(rows.members[0]) > 3
    with torch.no_grad():
        apart, plain = model(inputs, documents=documents)[0], model(inputs)[0]
        for number, dialog in enumerate(rows.members[0]):
            place = documents[0] == number
            alone = model(torch.tensor([encoded[dialog][0]]))[0]
            torch.testing.assert_close(apart[place], alone, atol=1e-5, rtol=0)
            assert number == 0 or (plain[place] - alone).abs().max() > 1e-3  # without isolation they differ


def test_the_loss_of_a_batch_is_that_of_a_loop_over_answer_tokens_in_float64(tokenizer, model):
    dialogs, encoded = dialogs_of(tokenizer, 20)
    rows = PackedDialogs(dialogs, np.ones(20), 1, 512, 0, True)
    loss, count, _ = lm_loss(model, rows.batch(range(rows.n_rows), rows.n_rows + 1))
    double = Transformer(model.config).double()
    double.load_state_dict(model.state_dict())
    total, n = 0.0, 0
    with torch.no_grad():
        for tokens, flags in encoded:
            logits = double(torch.tensor([tokens]))[0].double()
            for t in range(1, len(tokens)):
                if flags[t]:
                    total -= torch.log_softmax(logits[t - 1], 0)[tokens[t]].item()
                    n += 1
    assert count == n
    assert abs(loss.item() / n - total / n) < 1e-5


def test_the_gradient_through_the_loss_of_prompt_tokens_is_exactly_zero(tokenizer, model):
    dialogs, _ = dialogs_of(tokenizer, 6)
    batch = PackedDialogs(dialogs, np.ones(6), 1, 512, 0, True).batch(range(1), 1)
    kept = []
    handle = model.norm.register_forward_hook(lambda module, args, h: (h.retain_grad(), kept.append(h))[1])
    lm_loss(model, batch)[0].backward()
    handle.remove()
    learns = batch[1] != IGNORE
    assert kept[0].grad[~learns].abs().max() == 0 and kept[0].grad[learns].abs().sum(-1).min() > 0


def test_a_batch_without_an_answer_has_loss_zero_and_no_gradient(tokenizer, model):
    dialogs, _ = dialogs_of(tokenizer, 3)
    rows = PackedDialogs(dialogs, np.ones(3), 1, 512, 0, True)
    loss, count, _ = lm_loss(model, rows.batch(range(100, 102), 2))
    model.zero_grad()
    loss.backward()
    assert loss == 0 and count == 0 and all(p.grad.abs().max() == 0 for p in model.parameters())


# ---- the survey


def test_a_model_that_answers_as_the_annotators_do_surveys_well_and_silence_badly():
    world = toy.World(0)
    rng = random.Random(0)
    parts = {"all": toy.prompts(world, 40, split="test"), "fact": toy.every(world, "fact", "test"), "sum": toy.every(world, "sum", "test"),
             "howto": toy.every(world, "howto", "test"), "border": toy.borderline_prompts(world, "test"),
             **{f"unsafe {i}": toy.every(world, "unsafe", "test") for i in range(3)},
             "system": [p | {"constraint": c} for c in toy.CONSTRAINTS for p in toy.prompts(world, 3, split="test")]}
    best = {}
    for how in ("good", "silent"):
        answers = []
        for part, prompts in parts.items():
            for prompt in prompts:
                text = toy.answer(world, prompt, rng)
                if prompt["kind"] == "unsafe":
                    text = toy.refusal(prompt["category"], rng, 2)
                if "constraint" in prompt:
                    text = toy.apply(prompt["constraint"], text)
                answers.append(sft.Answer(part, prompt, text if how == "good" else "", how == "good"))
        best[how] = {name: mean for name, (mean, _, _) in sft.survey(answers, world).items()}
    wanted = {"right form": 1, "facts never asked in training": 1, "sums": 1, "system prompt obeyed": 1, "refuses the unsafe": 1, "violations": 0,
              "refuses the borderline": 0, "refuses the harmless": 0}
    assert {name: best["good"][name] for name in wanted} == wanted
    assert best["good"]["true helpfulness"] > 0.7 and best["silent"]["true helpfulness"] == 0 and best["silent"]["right form"] == 0


# ---- settings


def test_the_hyper_parameters_are_those_of_the_size_of_the_parent():
    for name in ("toy", "toy-l", "7b", "13b", "70b"):
        assert preset_of(with_vocab(PRESETS[name], 999)) == name
    paper = Settings.BY_PRESET["70b"]
    assert (paper["lr"], paper["batch_size"], paper["seq_len"], paper["epochs"], Settings.weight_decay) == (2e-5, 64, 4096, 2, 0.1)


# ---- chat


def test_the_oldest_turns_go_when_the_context_is_full_and_the_system_prompt_stays(tokenizer):
    system = [{"role": "system", "content": "Be kind."}]
    talk = [m for i in range(5) for m in ({"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."})]
    asked = [*system, *talk, {"role": "user", "content": "Last?"}]
    whole = tokenizer.encode_dialog(asked)[0]
    assert fit_context(tokenizer, asked, len(whole)) == (whole, 0)
    tokens, dropped = fit_context(tokenizer, asked, len(whole) - 1)
    assert dropped == 1 and tokens == tokenizer.encode_dialog(system + talk[2:] + asked[-1:])[0]
    with pytest.raises(InputError, match="shorten"):
        fit_context(tokenizer, asked, 5)


def test_the_default_system_prompt_is_the_released_one():
    assert len(sft.DEFAULT_SYSTEM) == 507 and len(sft.DEFAULT_SYSTEM.split()) == 79
    if model := os.environ.get("LLAMA_TOKENIZER"):
        assert len(Tokenizer(model).encode(sft.DEFAULT_SYSTEM, False, False)) == 116


# ---- the command line


def launch(script, *flags, n=1, stdin=""):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    return subprocess.run([sys.executable, *torchrun, str(HERE / script), *map(str, flags)], capture_output=True, text=True, input=stdin,
                          timeout=1500, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "farm.txt").write_text(TEXT)
    result = launch("pretrain.py", "--preset", "toy-s", "--data", folder / "farm.txt", "--out", folder / "base", "--vocab_size", 340,
                    "--seq_len", 64, "--steps", 5, "--sample_tokens", 0)
    assert result.returncode == 0, result.stderr
    return folder / "base"


def losses(out):
    return [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["loss"] is not None]


def test_a_file_of_dialogues_trains_by_its_name_alone_the_same_on_two_ranks_and_the_model_talks_in_a_pipe(tmp_path, base):
    rows = [{"instruction": "What has eggs?", "output": f"The old fox has {i} eggs."} for i in range(45)]
    rows += [{"conversations": [{"from": "human", "value": "Eggs?"}, {"from": "gpt", "value": "Yes."}]}, {"prompt": "No answer"}]
    (tmp_path / "chat.json").write_text(json.dumps(rows, indent=1))
    flags = ["--init", base, "--data", tmp_path / "chat.json", "--seq_len", 128, "--batch_size", 4, "--epochs", 3, "--steps", 6]
    refused = launch("sft.py", *flags, "--out", tmp_path / "one")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"chat.json, line {json.dumps(rows[:-1], indent=1).count(chr(10)) + 1}" in refused.stderr
    for n, out in ((1, "one"), (2, "two")):
        result = launch("sft.py", *flags, "--out", tmp_path / out, "--skip_bad_rows", n=n)
        assert result.returncode == 0, result.stderr
        assert "46 dialogues" in result.stdout and "1 bad rows left out" in result.stdout
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one[-1] < one[0]
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-4
    said = launch("sft.py", "chat", tmp_path / "one", "--temperature", 0, "--max_new_tokens", 8,
                  stdin="Hi\n/system Be kind.\nHi\n[INST]\n/reset\nHi\n/nonsense\n")
    assert said.returncode == 0 and "Traceback" not in said.stderr
    answers = said.stdout.splitlines()
    assert len(answers) == 3 and answers[0] == answers[2]
    assert "under: Be kind." in said.stderr and "carries the tag [INST]" in said.stderr


def test_a_missing_base_model_is_named_with_the_command_that_makes_it(tmp_path):
    result = launch("sft.py", "--init", tmp_path / "pretrain", "--out", tmp_path / "out")
    assert result.returncode == 2 and "make it with `python pretrain.py`" in result.stderr and "Traceback" not in result.stderr
