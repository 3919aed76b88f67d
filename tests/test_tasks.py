"""Benchmarks, the sandbox for programs of models, perplexity of any text, curves of several runs."""
import gzip
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from eval import (COMMANDS, MMLU_FIELDS, TASKS, Item, Tasks, bare_words, choose, continuation_log_probs, encode_pair, last_number,
                  mmlu_field, multiple_choice, pass_at_k, read_items, run_code, score, with_examples)
from model import ModelConfig, Transformer, generate, save_hf
from pretrain import InputError, command_line
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden" / "multiple_choice.json").read_text())


def tiny_model(**more):
    """Weights from a formula, so that the golden figures need no generator of random numbers."""
    model = Transformer(ModelConfig(**dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=40, vocab_size=400, max_seq_len=1024) | more))
    with torch.no_grad():
        for n, p in enumerate(model.parameters(), 1):
            if p.ndim > 1:
                p.copy_(torch.sin(n * torch.arange(p.numel(), dtype=torch.double) ** 1.5).view_as(p) * 0.5)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [text for source in toy.SOURCES for text, _ in zip(toy.documents(toy.World(0), source), range(400))]
    return Tokenizer.train(texts, str(tmp_path_factory.mktemp("t") / "tokenizer.model"), 400)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """The model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_hf(model, folder)
    (folder / "tokenizer.model").write_bytes(Path(tokenizer.path).read_bytes())
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(name, *argv):
    """A command of eval.py; its exit code."""
    try:
        command_line(*COMMANDS[name], [*map(str, argv), *["--device", "cpu", "--threads", "1"] * (name == "tasks")])
    except SystemExit as stop:
        return stop.code
    return 0


# ---------------------------------------------------------------------------------------------- multiple choice


@pytest.mark.parametrize("name", [name for name in GOLDEN if name in TASKS])
def test_the_likelihood_of_each_choice_is_that_of_lm_evaluation_harness(name, model, tokenizer, tmp_path):
    items = read_items(name, write(tmp_path / "rows.jsonl", GOLDEN[name]["rows"]))
    found = multiple_choice(model, tokenizer, with_examples(name, items, [], 1 if name == "mmlu" else 0))
    assert len(found) == len(GOLDEN[name]["log_probs"]) >= 2
    for row, log_probs in zip(found, GOLDEN[name]["log_probs"]):
        assert row["log_probs"] == pytest.approx(log_probs, abs=1e-3)


def test_mmlu_is_told_by_field_as_in_table_19(tmp_path, capsys, folder):
    published = {"humanities": 13, "STEM": 18, "social sciences": 12}  # of the 57 subjects, Hendrycks et al. (2021); the rest is other
    assert {field: len(subjects.split(", ")) for field, (_, subjects) in MMLU_FIELDS.items() if subjects} == published
    subjects = ["philosophy", "high_school_us_history", "machine_learning", "us_foreign_policy", "virology", "anatomy"]
    rows = [{"question": f"What is {i}?", "subject": subject, "choices": list("wxyz"), "answer": i % 4}
            for i, subject in enumerate(subjects * 3)]
    file = write(tmp_path / "rows.jsonl", rows)
    assert [mmlu_field(item) for item in read_items("mmlu", file)[:6]] == ["humanities"] * 2 + ["STEM", "social sciences"] + ["other"] * 2
    assert command("tasks", folder, "--task", f"mmlu={file}", "--shots", "1", "--out", tmp_path / "out") == 0
    found, said = json.loads((tmp_path / "out" / "tasks.json").read_text())["mmlu"], capsys.readouterr().out
    right = [json.loads(line)["acc"] for line in (tmp_path / "out" / "mmlu.jsonl").read_text().splitlines()]
    n = len(right) // 6
    for field, places in (("humanities", [0, 1]), ("other", [4, 5])):
        assert found["fields"][field][0] == pytest.approx(np.mean([right[6 * k + i] for k in range(n) for i in places]))
        assert field in said


def test_each_rule_picks_the_choice_that_its_formula_picks(model, tokenizer):
    texts = ["a", "two words", "the kebbat eats eggs."]
    items = [choose(f"Question {i}:", texts, [right]) for i in range(8) for right in range(3)]
    seen = set()
    for item, row in zip(items, multiple_choice(model, tokenizer, items, answer_context=True)):
        p = continuation_log_probs(model, tokenizer, list(item.pairs))
        bare = continuation_log_probs(model, tokenizer, [("Answer:", " " + text) for text in texts])
        picks = {"acc": np.argmax(p), "acc_norm": np.argmax([x / len(t) for x, t in zip(p, texts)]), "acc_answer": np.argmax(p - bare)}
        assert all(row[rule] == (pick == item.right[0]) for rule, pick in picks.items())
        assert row["mc2"] == pytest.approx(math.exp(p[item.right[0]]) / sum(map(math.exp, p)), abs=1e-4)
        seen.add(tuple(picks.values()))
    assert any(len(set(picks)) > 1 for picks in seen)  # the rules do differ here


def test_a_prompt_that_is_too_long_keeps_bos_and_its_end(model, tokenizer):
    small = tiny_model(max_seq_len=24)
    prompt = "The karee eats eggs. " * 20
    tokens, n_prompt = encode_pair(tokenizer, prompt, " and the fox", 25)
    whole, n_whole = encode_pair(tokenizer, prompt, " and the fox")
    assert tokens == whole[:1] + whole[-24:] and len(tokens) - n_prompt == len(whole) - n_whole
    logits = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
    expected = sum(logits[i - 1, tokens[i]].item() for i in range(n_prompt, 25))
    assert continuation_log_probs(small, tokenizer, [(prompt, " and the fox")]) == pytest.approx([expected], abs=1e-3)


def items_of(path, name, rows):
    return read_items(name, write(path / f"{len(os.listdir(path))}.jsonl", rows))


def test_the_forms_in_which_a_benchmark_is_published_give_the_same_items(tmp_path):
    choices = {"text": ["wood", "ice", "iron"], "label": ["A", "B", "C"]}
    listed = [{"text": text, "label": label} for text, label in zip(*choices.values())]
    ai2 = {"id": "1", "question": {"stem": "What melts?", "choices": listed}, "answerKey": "B"}
    for name, hugging_face in (("arc-c", {"question": "What melts?"}), ("commonsenseqa", {"question": "What melts?"}),
                               ("openbookqa", {"question_stem": "What melts?"})):
        assert items_of(tmp_path, name, [ai2]) == items_of(tmp_path, name, [hugging_face | {"choices": choices, "answerKey": "B"}])
    passage = {"passage": "Ice melts.", "question": "does ice melt"}
    assert items_of(tmp_path, "boolq", [passage | {"answer": True, "title": "Ice"}]) == items_of(tmp_path, "boolq", [passage | {"label": 1}])

    (tmp_path / "high_school_physics_test.csv").write_text('"What melts?\nTwo answers, one right",wood,"ice, ""cold""",iron,salt,B\n')
    row = {"question": "What melts?\nTwo answers, one right", "subject": "high_school_physics", "choices": ["wood", 'ice, "cold"', "iron", "salt"]}
    item, = read_items("mmlu", str(tmp_path / "*.csv"))
    assert [item] == items_of(tmp_path, "mmlu", [row | {"answer": 1}])
    assert item.opening == "The following are multiple choice questions (with answers) about high school physics.\n\n"

    targets = {"Ice.": 1, "Wood.": 0}
    meta = {"question": "What melts?", "mc1_targets": targets, "mc2_targets": targets | {"Ice melts.": 1}}
    hugging_face = meta | {key: {"choices": list(meta[key]), "labels": list(meta[key].values())} for key in ("mc1_targets", "mc2_targets")}
    (tmp_path / "mc_task.json").write_text(json.dumps([meta], indent=2))
    (tmp_path / "TruthfulQA.csv").write_text("\ufeffType,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
                                             "Adversarial,Physics,What melts?,Ice,Ice; Ice melts.,Wood,none\n")
    for name in ("truthfulqa-mc1", "truthfulqa-mc2"):
        assert read_items(name, str(tmp_path / "mc_task.json")) == items_of(tmp_path, name, [hugging_face])
        item, = read_items(name, str(tmp_path / "TruthfulQA.csv"))
        same, = items_of(tmp_path, name, [hugging_face])
        assert {(pair, i in item.right) for i, pair in enumerate(item.pairs)} == {(pair, i in same.right) for i, pair in enumerate(same.pairs)}

    goal = {"goal": "Melt ice", "sol1": "Warm it.", "sol2": "Cool it."}
    asked = {"context": "Sam is cold.", "question": "Why?", "answerA": "rain", "answerB": "sun", "answerC": "tea"}
    for name, row, label in (("piqa", goal, "1"), ("siqa", asked, "3")):
        file = write(tmp_path / f"{name}.jsonl", [row, row])
        (tmp_path / f"{name}-labels.lst").write_text(f"{label}\n1\n")
        assert read_items(name, file) == items_of(tmp_path, name, [row | {"label": label}, row | {"label": "1"}])

    answer = {"Value": "Ice", "Aliases": ["The ice"], "NormalizedAliases": ["ice"]}
    (tmp_path / "wikipedia-dev.json").write_text(json.dumps({"Data": [{"Question": "What melts?", "Answer": answer}]}, indent=1))
    assert read_items("triviaqa", str(tmp_path / "wikipedia-dev.json")) == items_of(
        tmp_path, "triviaqa", [{"question": "What melts?", "answer": {"value": "Ice", "aliases": ["The ice"]}}])


def test_examples_stand_before_the_question_and_come_from_the_same_subject():
    items = [choose(f"{subject} {i}?", ["yes", "no"], [i % 2], f"About {subject}.\n\n") for i in range(4) for subject in ("ice", "fire")]
    asked = with_examples("mmlu", items, [], 2)
    assert len(asked) == 4  # the first two of each subject are its examples, and not asked
    assert asked[0].pairs[1] == ("About ice.\n\nice 0? yes\n\nice 1? no\n\nice 2?", " no")
    assert asked[1].pairs[0][0] == "About fire.\n\nfire 0? yes\n\nfire 1? no\n\nfire 2?"
    assert len(with_examples("mmlu", items, items[:4], 2)) == 8
    for few in ([], items[:2]):
        with pytest.raises(InputError, match="examples"):
            with_examples("mmlu", items, few, 5)


# ---------------------------------------------------------------------------------------------- generate and match, pass@k


@pytest.mark.parametrize("text, number", [
    ("She has 3 + 4 = 7 eggs.\n#### 7", "7.0"), ("so 1,234.50 dollars", "1234.5"), ("-12", "-12.0"), ("#### 5\n", "5.0"), ("none", ""),
    ("Each costs $3. Together 12.", "12.0"), ("#### 1,000", "1000.0")])
def test_the_number_of_an_answer_is_the_one_behind_the_hashes_or_the_last(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("text, words", [
    (" The Beatles.\nQ: next", "beatles"), ("an  U.S. city", "us city"), ("A", ""), ("Anna", "anna"), ("Théâtre!", "théâtre")])
def test_an_exact_match_forgets_articles_case_punctuation_and_later_lines(text, words):
    assert bare_words(text) == words


def test_the_published_rows_of_the_other_paths_become_prompts_answers_and_programs(tmp_path):
    problem = {"question": "2 eggs and 3?", "answer": "2+3=<<2+3=5>>5 eggs.\n#### 5"}
    item, = items_of(tmp_path, "gsm8k", [problem])
    assert item.example == "Question: 2 eggs and 3?\nAnswer: 2+3=5 eggs.\n#### 5\n\n" and last_number(item.answers[0]) == "5.0"
    asked = with_examples("naturalquestions", items_of(tmp_path, "naturalquestions", [
        {"question": "who laid it", "answer": ["the hen", "hen"]}, {"question": "who ate it", "answer": ["Sam"]}]), [], 1)
    assert asked[0].prompt == "Answer these questions:\nQ: who laid it\nA: the hen\nQ: who ate it\nA:" and asked[0].answers == ("Sam",)
    rows = [{"task_id": i, "text": f"Write f{i}.", "code": f"def f{i}():\n    return {i}", "test_list": [f"assert f{i}() == {i}"],
             "test_setup_code": "", "challenge_test_list": []} for i in (2, 3)]
    first, second = items_of(tmp_path, "mbpp", rows)
    assert first.example == first.prompt + rows[0]["code"] + "\n[DONE]\n\n" and "assert f2() == 2\n[BEGIN]\n" in first.prompt
    assert run_code(second.program[0] + rows[1]["code"] + second.program[1], 20, unsafe=True) == "pass"
    assert run_code(second.program[0] + rows[0]["code"] + second.program[1], 20, unsafe=True) == "fail"
    sanitized = {"task_id": 3, "prompt": "Write f3.", "code": rows[1]["code"], "test_imports": [], "test_list": rows[1]["test_list"]}
    assert items_of(tmp_path, "mbpp", [sanitized]) == [second]


def test_a_generated_answer_counts_if_and_only_if_it_is_accepted(model, tokenizer):
    task = TASKS["triviaqa"]
    prompts = [f"Q: What eats the {name}?\nA:" for name in ("kebbat", "filox", "lidee")]
    drawn = generate(model, [tokenizer.encode(p, bos=True, eos=False) for p in prompts], task.max_new_tokens, 0, stop=(tokenizer.eos_id,))
    lines = [tokenizer.decode(ids).split("\n")[0] for ids in drawn]
    assert all(map(bare_words, lines))
    items = [Item("", p, answers) for p, line in zip(prompts, lines) for answers in ((line.upper(), "x"), ("x", line + "y"))]
    rows = score(model, tokenizer, items, task, Tasks(), 0)
    assert [row["match"] for row in rows] == [1.0, 0.0] * 3


def test_a_completion_keeps_the_spaces_that_it_begins_with(tokenizer):
    """A program's first line is indented; the decoder of ids alone would drop one space."""
    model = tiny_model()
    ids, start = tokenizer.encode("x\n 7", bos=False, eos=False), len(tokenizer.encode("x\n", bos=False, eos=False))
    newline, *completion = ids[start - 1 :]
    assert tokenizer.decode(completion) == "7" and len({newline, *completion}) == len(completion) + 1
    with torch.no_grad():  # layers that add nothing, and embeddings that name the next token: a model that says this by heart
        for block in model.layers:
            block.attention.wo.weight.zero_(), block.feed_forward.w2.weight.zero_()
        model.tok_embeddings.weight.copy_(torch.sin(torch.arange(400 * 32, dtype=torch.double) ** 1.5).view(400, 32))
        model.output.weight.zero_()
        for now, following in zip([newline, *completion], [*completion, tokenizer.eos_id]):
            model.output.weight[following] += model.tok_embeddings.weight[now]
    item = Item("", "def one():\n", program=("def one():\n", "\nassert one() is None"))
    task = TASKS["humaneval"]._replace(max_new_tokens=len(completion) + 1)
    row, = score(model, tokenizer, [item], task, Tasks(temperature=0.0, unsafe_exec=True, seconds=20), 0)
    assert row["said"] == [" 7"] and row["verdicts"] == ["pass"] and row["pass@1"] == 1.0


def test_pass_at_k_is_that_of_the_golden_file_and_of_counting_subsets():
    for case in json.loads((HERE / "golden" / "pass_at_k.json").read_text())["cases"]:
        n = case["num_samples"] if isinstance(case["num_samples"], list) else [case["num_samples"]] * len(case["num_correct"])
        assert [pass_at_k(a, b, case["k"]) for a, b in zip(n, case["num_correct"])] == pytest.approx(case["pass_at_k"], abs=1e-10)
    subsets = list(combinations([True, True, False, False, False, False], 3))
    assert pass_at_k(6, 2, 3) == pytest.approx(np.mean([any(subset) for subset in subsets]))


# ---------------------------------------------------------------------------------------------- the sandbox

try:
    run_code("", 20)
    MISSING = ""
except InputError as error:
    MISSING = str(error)
in_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@in_sandbox
@pytest.mark.parametrize("case", json.loads((HERE / "golden" / "sandbox.json").read_text())["cases"], ids=lambda case: case["name"])
def test_programs_get_the_verdict_of_the_golden_file(case):
    program = f"{case['prompt']}{case['completion']}\n{case['test']}\ncheck({case['entry_point']})"
    assert run_code(program, 1.0 if case["expected"] == "timeout" else 20.0) in case["accept"]


ATTACKS = {  # each reaches its end, and so passes, if and only if it did what it must not do
    "a fork bomb": "import os, time\nfor _ in range(100):\n    if os.fork() == 0:\n        time.sleep(60)",
    "an endless loop": "while True: pass",
    "a loop that is deaf to signals": "import signal\nfor s in signal.Signals:\n    if s not in (9, 19): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "100 GB of memory": "x = bytearray(100 * 2**30)",
    "more memory than is allowed": "import mmap; x = mmap.mmap(-1, 3 * 2**29)",
    "deleting a file": "import os; os.remove({victim!r})",
    "deleting a library": "import os; os.remove(os.__file__)",
    "writing a file": "open({victim!r}, 'w').write('x')",
    "writing a new file": "open('/x', 'w').write('x')",
    "reading a file": "open({victim!r}).read()",
    "the environment": "import os; os.environ['SECRET_OF_THE_PARENT']",
    "the environment of the parent": "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
    "a socket to this machine": "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "a socket by its path": "import socket; socket.socket(socket.AF_UNIX).connect({path!r})",
    "a socket by an abstract name": "import socket; socket.socket(socket.AF_UNIX).connect({name!r})",
    "killing the parent": "import os; os.kill(os.getppid() or 10**6, 9)",
    "killing the group": "import os; os.killpg(0, 9); raise SystemExit",
    "killing a bystander": "import os; os.kill({bystander}, 9)",
    "opening the disk": "import os; os.listdir('/dev')",
    "more rights in a new user namespace": "import ctypes; assert ctypes.CDLL(None).unshare(1 << 28) == 0",
    "becoming root": "import os; os.setuid(0)",
    "making the files writable": "import ctypes; assert ctypes.CDLL(None).mount(None, b'/', None, 32, None) == 0",
    "going on after its time": "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\ntime.sleep(4)",
}


@in_sandbox
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_succeeds(attack, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "x")
    victim, name = tmp_path / "victim", f"\0tasks-{os.getpid()}"
    victim.write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as inet, socket.socket(socket.AF_UNIX) as by_path, socket.socket(socket.AF_UNIX) as abstract:
        by_path.bind(str(tmp_path / "s")), abstract.bind(name)
        by_path.listen(), abstract.listen()
        bystander = subprocess.Popen(["sleep", "60"])
        program = ATTACKS[attack].format(victim=str(victim), port=inet.getsockname()[1], path=str(tmp_path / "s"), name=name, bystander=bystander.pid)
        assert run_code(program, 2.0) in ("fail", "timeout")
        assert bystander.poll() is None and victim.read_text() == "here"
        bystander.kill(), bystander.wait()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"def jail" in path.read_bytes() and path.parent.name != str(os.getpid())]
    assert not left


@in_sandbox
def test_the_attacks_would_succeed_outside(tmp_path):
    """Or the test above would prove nothing."""
    victim = tmp_path / "victim"
    for attack in ("writing a file", "reading a file", "deleting a file", "more rights in a new user namespace", "opening the disk"):
        victim.write_text("here")
        program = ATTACKS[attack].format(victim=str(victim))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True)
        assert done.returncode == 0 or attack.startswith("more rights"), done.stderr


@in_sandbox
def test_an_honest_program_may_use_libraries_and_helpers_of_its_own():
    assert run_code("import re, math, json, decimal, hashlib, typing, collections, itertools, numpy\nassert math.isqrt(17) == 4", 20) == "pass"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes a right away, which a user has not got")
def test_without_namespaces_it_refuses_unless_told_otherwise():
    script = ("import ctypes, sys; sys.path.insert(0, '.'); ctypes.CDLL(None).prctl(24, 21, 0, 0, 0)\n"  # no CAP_SYS_ADMIN from here on
              "from eval import InputError, run_code\n"
              "try: print(run_code('x = 1'))\nexcept InputError as error: print(error)\n"
              "print(run_code('x = 1', 20, True), run_code('assert False', 20, True), run_code('while True: pass', 1, True))")
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE.parent, capture_output=True, text=True)
    refusal, verdicts = done.stdout.strip().split("\n")
    assert "there is no sandbox here" in refusal and "--unsafe_exec" in refusal and verdicts == "pass fail timeout"


# ---------------------------------------------------------------------------------------------- the commands


def test_tasks_scores_keeps_every_prompt_and_scores_nothing_twice(folder, tmp_path, capsys):
    files = {name: write(tmp_path / f"{name}.jsonl", GOLDEN[name]["rows"]) for name in ("piqa", "siqa")}
    call = ["tasks", folder, "--task", *(f"{name}={file}" for name, file in files.items()), "toy", "--out", tmp_path / "out",
            "--batch_size", "1", "--limit", "3", "--show", "1"]
    assert command(*call) == 0
    said = capsys.readouterr().out
    assert "commonsense (2 of 8 tasks)" in said and "Q: Sam gave Kim a lamp. How would Kim feel?" in said
    results = json.loads((tmp_path / "out" / "tasks.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "piqa.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"Question: {row['goal']}\nAnswer:" for row in GOLDEN["piqa"]["rows"]]
    assert results["piqa"]["figures"]["acc"][0] == pytest.approx(np.mean([row["acc"] for row in rows])) and results["toy"]["questions"] == 3
    assert command("report", tmp_path) == 0 and "Q: Sam" not in (page := (tmp_path / "report.html").read_text())
    assert "commonsense (2 of 8 tasks)" in page and "Llama 2 7B" in page
    parts = sorted((tmp_path / "out" / "parts").glob("piqa-*"))
    assert len(parts) == 3
    parts[0].unlink()
    parts[1].write_text(json.dumps([rows[1] | {"marked": True}]))
    assert command(*call) == 0
    again = [json.loads(line) for line in (tmp_path / "out" / "piqa.jsonl").read_text().splitlines()]
    assert again == [rows[0], rows[1] | {"marked": True}, rows[2]]
    assert command(*call, "--seed", "1") == 2 and "holds a run with --seed 0" in capsys.readouterr().err
    assert command(*call, "--no-resume") == 0
    assert [json.loads(line) for line in (tmp_path / "out" / "piqa.jsonl").read_text().splitlines()] == rows


PIQA = json.dumps(GOLDEN["piqa"]["rows"][0])


@pytest.mark.parametrize("name, file, content, says", [
    ("piqa", "rows.tsv", PIQA, "jsonl, .json or .csv"), ("piqa", "rows.jsonl", PIQA + "\n" + PIQA[:30], "line 2"),
    ("hellaswag", "rows.jsonl", PIQA, 'line 1: is no row of hellaswag .*expected {"activity_label"'), ("piqa", "rows.jsonl", "", "empty"),
    ("piqa", "rows.json", "[" + PIQA + ",", "not whole JSON"), ("piqa", "rows.jsonl.gz", gzip.compress(PIQA.encode() * 99, mtime=0)[:60], "can't be read"),
    ("piqa", "rows.jsonl", b"\xff\xfe", "not UTF-8"), ("piqa", "rows.jsonl", '["a"]\n', "line 1"), ("mmlu", "x_test.csv", 'why?,"a,b', "line 1"),
    ("piqa", "rows.jsonl", PIQA.replace('"label": 0', '"label": -1'), "line 1"), ("mmlu", "x_test.csv", "", "empty"),
    ("mmlu", "x_test.csv", "why?,a,b,c,d,A\nwhy?,a,b,c,d,\n", "x_test.csv, line 2"), ("mmlu", "x_test.csv", "why?,a,b,c,d,BC\n", "x_test.csv, line 1"),
    ("humaneval", "rows.jsonl", PIQA, "entry_point"), ("triviaqa", "rows.json", '{"Data": [{"Question": "x"}]}', "row 1")])
def test_a_wrong_file_is_one_sentence(name, file, content, says, tmp_path):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says) as caught:
        read_items(name, str(tmp_path / file))
    assert "\n" not in str(caught.value) and file in str(caught.value)


def test_wrong_flags_end_with_code_2_and_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(PIQA)
    (tmp_path / "a-labels.lst").write_text("1\n0\n")
    for argv, says in ((["--task", "pika=x"], "NAME one of boolq"), (["--task", f"piqa={tmp_path}/none.jsonl"], "no such file"), (["--task", "piqa"], "NAME=FILE"),
                       (["--task", f"piqa={tmp_path}/a.jsonl"], "2 labels for the 1 rows"), (["--task", "toy", "--limit", "0"], "--limit")):
        assert command("tasks", folder, "--out", tmp_path / "out", *argv) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    for argv, says in ((["perplexity", tmp_path, "x.txt"], "no weights"), (["perplexity", folder], "which files"),
                       (["perplexity", folder, tmp_path / "none.txt"], "can't be read"), (["curves", tmp_path / "none"], "no metrics.jsonl")):
        assert command(*argv) == 2 and says in capsys.readouterr().err


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(model, tokenizer, tmp_path, capsys):
    uniform, text = tiny_model(), "The karee eats eggs. Où est l'œuf ?\n" * 9
    with torch.no_grad():
        uniform.output.weight.zero_()
    for name, m in (("uniform", uniform), ("other", model)):
        save_hf(m, tmp_path / name)
        (tmp_path / name / "tokenizer.model").write_bytes(Path(tokenizer.path).read_bytes())
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write(json.dumps({"text": text}) + "\n")
    assert command("perplexity", tmp_path / "uniform", tmp_path / "a.txt", tmp_path / "b.jsonl.gz", "--seq_len", 16) == 0
    ids = tokenizer.encode(text, bos=False, eos=False)
    for line in capsys.readouterr().out.splitlines()[1:]:
        _, tokens, ppl, _, _, _, bits = line.split()
        assert int(tokens) == len(ids) and float(ppl) == pytest.approx(400, abs=0.01)
        assert float(bits) == pytest.approx(len(ids) * math.log2(400) / len(text.encode()), abs=1e-3)
    assert command("perplexity", tmp_path / "other", tmp_path / "a.txt", "--seq_len", 16) == 0
    losses = []
    for start in range(0, len(ids), 16):  # one token at a time
        piece = [tokenizer.bos_id, *ids[start : start + 16]]
        logits = model(torch.tensor([piece]))[0].double().log_softmax(-1)
        losses += [-logits[i, piece[i + 1]].item() for i in range(len(piece) - 1)]
    assert math.log(float(capsys.readouterr().out.splitlines()[1].split()[2])) == pytest.approx(np.mean(losses), rel=1e-4)


def test_curves_of_two_runs_are_one_picture_and_it_is_in_the_report(model, tmp_path):
    for name, slope in (("small", 1.0), ("large", 1.5)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "metrics.jsonl", [{"step": i, "tokens": 1000 * i, "loss": 6 - slope * math.log(i)} for i in range(1, 21)])
        (tmp_path / name / "config.json").write_text(json.dumps({"stage": "none", "settings": {}, "model": asdict(model.config), "threads": 1}))
    assert command("curves", tmp_path / "small", tmp_path / "large", "--out", tmp_path / "losses") == 0
    ends = json.loads((tmp_path / "losses" / "losses.json").read_text())
    assert ends[str(tmp_path / "small")]["loss"] == pytest.approx(6 - math.log(20)) and ends[str(tmp_path / "large")]["tokens"] == 20000
    assert (tmp_path / "losses" / "losses.png").read_bytes()[1:4] == b"PNG"
    assert command("report", tmp_path) == 0 and "data:image/png" in (tmp_path / "report.html").read_text()
