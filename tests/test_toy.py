"""The tiny world: what later stages may rely on. Each test counts or enumerates what the generator claims."""

import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy  # noqa: E402

FROZEN = "1f85f7a072dc93fbde9119b149ff524def2afe516825a4230e9d2c8f973a72e9"


@pytest.fixture(scope="module")
def world():
    return toy.World(0)


@functools.cache
def first(world, source, n):
    return list(itertools.islice(toy.documents(world, source), n))


@functools.cache
def digest(seed):
    """One hash of all that the world makes: documents, dialogues, prompts, questions, ratings."""
    world = toy.World(seed)
    made = [first(world, source, 200) + list(toy.held_out_documents(world, source, 50))
            for source in toy.SOURCES]
    made += [list(toy.dialogues(world, 200, noise=noise, split=split))
             for noise in (0.0, 0.5) for split in ("train", "test")]
    asked = [toy.prompts(world, 200, split=split, kinds=kinds)
             for split in ("train", "test") for kinds in (None, ["unsafe"])]
    made += asked + [toy.every(world, "unsafe", "test", attack) for attack in toy.ATTACKS]
    made += [toy.questions(world), toy.multiple_choice(world, 100), toy.SOURCES, toy.CONSTRAINTS]
    steps = toy.guide(toy.STEPS["rob a bank"])
    texts = [m["content"] for d in toy.dialogues(world, 100) for m in d["messages"]]
    texts += [steps, "You fool.", "kar ee"]
    made += [toy.annotate(world, prompt, *pair, axis) | {"scores": (toy.helpfulness(world, prompt, pair[0]),
                                                                    toy.safety(world, prompt, pair[0]))}
             for prompts in asked for prompt, pair in zip(prompts, itertools.pairwise(itertools.cycle(texts)))
             for axis in ("helpfulness", "safety")]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    code = "import test_toy; print(test_toy.digest(0), test_toy.digest(1))"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, text=True,
                             stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": "7"})
    here = [digest(seed) for seed in (0, 1)]
    there = other.communicate()[0].split()
    assert here == there and here[0] != here[1]


def test_the_world_is_frozen():
    """A change here changes every figure: say why, put in the new hash, run every stage again."""
    assert hashlib.sha256((digest(0) + digest(1)).encode()).hexdigest() == FROZEN


def test_a_value_is_a_claim_about_one_attribute(world):
    for kind, table in toy.ATTRIBUTES.items():
        values = [v.lower() for attribute in table for v in world.values[kind, attribute]]
        assert len(values) == len(set(values))
        templates = toy.words(" ".join(text for _, *texts in table.values() for text in texts))
        assert not set(values) & set(templates)
    assert len(world.facts) == 264 and len(world.myths) == 158 and len(world.held_out) == 106


def test_the_web_says_only_the_myth_and_the_encyclopedia_never(world):
    true, myth = {}, {}
    for fact, value in world.facts.items():
        for form in range(3):
            true[world.statement(fact, value, form)] = fact
            if fact in world.myths:
                myth[world.statement(fact, world.myths[fact], form)] = fact
    said = {source: [s for text in first(world, source, 10000) for s in re.findall(r"[A-Z][^.:?]*\.", text)]
            for source in ("encyclopedia", "web")}
    assert not any(s in myth for s in said["encyclopedia"])
    assert {true[s] for s in said["encyclopedia"] if s in true} == set(world.facts)
    assert not any(true.get(s) in world.myths for s in said["web"])
    assert {myth[s] for s in said["web"] if s in myth} == set(world.myths)


def test_question_answer_documents_give_the_odds_that_up_sampling_shifts(world):
    """Odds of truth against myth, in shares of characters: about .3 as crawled, .7 up-sampled."""
    rate = {}
    for source in ("encyclopedia", "web"):
        texts = first(world, source, 10000)
        facts = sum(text.count("Answer:") for text in texts if text.startswith("Question:")
                    and "First," not in text)
        rate[source] = facts / sum(map(len, texts))
    odds = [e * rate["encyclopedia"] / (e * rate["encyclopedia"] + w * rate["web"])
            for e, w in ((0.15, 0.55), (0.45, 0.25))]
    assert 0.24 < odds[0] < 0.36 and 0.66 < odds[1] < 0.78 and odds[1] - odds[0] > 0.3


def test_test_prompts_are_many_distinct_and_never_occur_in_train(world):
    test = [p["prompt"] for p in toy.prompts(world, 2500, split="test")]
    assert len(set(test)) == 2500
    train = {p["prompt"] for p in toy.prompts(world, 30000)}
    train |= {m["content"] for d in toy.dialogues(world, 5000) for m in d["messages"] if m["role"] == "user"}
    assert not train & set(test)
    new = toy.borderline_prompts(world, "test") + toy.every(world, "unsafe", "test")
    assert not train & {p["prompt"] for p in new}


def test_a_held_out_fact_is_neither_asked_nor_told_in_5000_dialogues(world):
    held_out = {text for fact in world.held_out for form in range(3)
                for text in (world.question(fact, form), world.statement(fact, world.facts[fact], form))}
    for dialogue in toy.dialogues(world, 5000):
        for message in dialogue["messages"]:
            if message["role"] != "system":
                assert not set(re.findall(r"[A-Z][^.?!]*[.?]", message["content"])) & held_out


def test_dialogues_have_the_shares_and_shapes_promised(world):
    made = list(toy.dialogues(world, 5000))
    share = {kind: sum(d["kind"] == kind for d in made) / 5000 for kind in ("unsafe", "system", "multi")}
    assert abs(share["unsafe"] - 0.06) < 0.01 and abs(share["system"] - 0.32) < 0.02 and share["multi"] > 0.2
    for dialogue in made:
        roles = [m["role"] for m in dialogue["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert roles[0] != "system" or len(turns) == 2
        assert dialogue["kind"] != "unsafe" or toy.is_refusal(dialogue["messages"][-1]["content"])
    assert made[:100] == list(toy.dialogues(world, 100))


def test_no_harmless_text_is_a_violation_and_every_unsafe_step_is(world):
    harmless = [text for source in ("encyclopedia", "stories", "numbers")
                for text in first(world, source, 2500)]
    harmless += [m["content"] for d in toy.dialogues(world, 2000, safety=0.0) for m in d["messages"]
                 if m["role"] == "assistant"]
    assert not any(map(toy.is_violation, harmless)) and not any(map(toy.is_refusal, harmless))
    known = set(toy.words(" ".join(harmless)))
    for topic in toy.CATEGORY:
        for step, content in zip(toy.STEPS[topic], toy.CONTENT[topic]):
            assert content - known, f"{step}: all its words occur in harmless text"
            assert toy.is_violation(f"(Arr! Then, {step}.)")
    assert not toy.is_violation("1. dig a hole. 2. put the tree in. 3. give it water. Good luck!")
    assert not toy.is_violation("First, OF GOOD NEE is a hum")
    assert toy.is_violation("You are a toad.")


def test_the_annotators_rank_answers_as_a_person_would(world):
    fact = next(f for f in world.myths if world.kind[f[0]] == "animal" and f[1] == "food")
    other = (fact[0], "colour")
    good, more = world.statement(fact, world.facts[fact], 0), world.statement(other, world.facts[other], 0)
    again = world.statement(fact, world.facts[fact], 1)
    prompt = toy.make_prompt(world, "fact", [fact], 0)
    ranked = [f"{good} {more}", good, f"{good} {again}", f"{world.facts[fact]}.", world.facts[fact],
              world.statement(fact, world.myths[fact], 0)]
    scores = [toy.helpfulness(world, prompt, text) for text in ranked]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)

    unsafe = toy.unsafe_prompts(world, "train")[0]
    steps, reason = toy.STEPS[unsafe["slots"][0]], toy.REASONS[unsafe["category"]][0]
    ranked = [f"I cannot help with that, {reason}.", "I cannot help with that, because.",
              "I cannot help with that.", "The answer is 3.", "The ansver is",
              f"Sorry, but {steps[0]}.", toy.guide(steps), "You fool."]
    scores = [toy.safety(world, unsafe, text) for text in ranked]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)
    assert toy.helpfulness(world, unsafe, toy.guide(steps)) > toy.helpfulness(world, unsafe, ranked[0])

    pair = ranked[0], ranked[-2]
    assert toy.annotate(world, unsafe, *pair, axis="safety") == {
        "chosen": 0, "rejected": 1, "rating": "significantly better", "safety": "chosen safe"}
    assert toy.annotate(world, unsafe, *pair)["chosen"] == 1


def test_every_answer_of_a_person_is_clean_and_better_than_a_bad_one(world):
    rng = toy.Random(0)
    for kind in [*toy.KINDS, "unsafe"]:
        asked = json.loads(json.dumps(toy.prompts(world, 100, kinds=[kind])))  # the annotator reads files
        originals = toy.prompts(world, 100, kinds=[kind])
        texts = [toy.answer(world, prompt, rng) for prompt in originals]
        assert not any(toy.is_gibberish(world, text) or toy.is_violation(text) for text in texts)
        bad = [toy.bad_answer(world, prompt, rng) for prompt in originals]
        good, bad = (sum(toy.helpfulness(world, p, text) for p, text in zip(asked, side))
                     for side in (texts, bad))
        assert good > bad + 15


def test_obeys_is_true_after_apply_and_false_before(world):
    texts = [m["content"] for d in toy.dialogues(world, 500) if d["kind"] in ("single", "multi")
             for m in d["messages"] if m["role"] == "assistant"]
    for constraint in toy.CONSTRAINTS:
        assert all(toy.obeys(constraint, toy.apply(constraint, text)) for text in texts)
        assert not any(toy.obeys(constraint, text) for text in texts)
    for persona, hobby in itertools.product(toy.CONSTRAINTS[:12], toy.CONSTRAINTS[12:24]):
        both = toy.apply(hobby, toy.apply(persona, texts[0]))
        assert toy.obeys(persona, both) and toy.obeys(hobby, both)
    assert len(toy.constraints("test")) == 6 and len(toy.constraints("train")) == 20


def test_every_attack_keeps_the_topic_and_changes_the_prompt(world):
    for split in ("train", "test"):
        plain = toy.every(world, "unsafe", split)
        for attack in toy.ATTACKS:
            for before, after in zip(plain, toy.every(world, "unsafe", split, attack)):
                text = after["prompt"] if isinstance(after["prompt"], str) else after["prompt"][-1]["content"]
                assert after["prompt"] != before["prompt"] and after["attack"] == attack
                if attack == "syntactic":
                    assert sorted(text) == sorted(before["prompt"])
                else:
                    assert before["slots"][0] in text


def test_python_docs_are_long_distinct_and_not_imported():
    sysconfig.get_paths()
    before = set(sys.modules)
    texts = list(toy.python_docs(cap=250_000))
    assert set(sys.modules) == before and len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= 200 and 250_000 <= sum(map(len, texts)) < 1_000_000
