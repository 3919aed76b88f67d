"""Ghost Attention (§3.3, A.3.5): a chat model that forgets its instruction after a turn in, one that holds to it out.

    python gatt.py                                   # out/gatt, from out/sft: dialogues under an instruction, then fine-tuning
    python gatt.py --data chats.jsonl --constraints ask   # your dialogues; a system message in one is its instruction
    python gatt.py test out/sft out/gatt             # Table 30: does the instruction still hold at turn 20? out/gatt-test
    python gatt.py attention out/gatt --before out/sft    # Figure 10

While answers are sampled, the instruction ("Act as a pirate.") stands in every message of the user, so that none can forget
it. For training it stays in the first message alone, and only the last answer is learned.

We know of no public implementation. Where the paper leaves room this is our reading, each time our choice:
- Which answers are sampled under the instruction. That the earlier ones "mismatch" it at training time says: the last alone.
  That one samples "from this synthetic data" allows: all, turn by turn, as they come in use. --resampled 0 is the first reading,
  1 the second; by default half of the dialogues follow each.
- The place of the instruction: that of a system prompt in the released format, before the words of each user's message.
- What picks the best sample: nothing by default. With --samples K it is the helpfulness reward of the bare exchange, which knows
  nothing of the instruction and prefers answers that ignore it: instructions then hold less well, and the answers are better.
- How long the dialogues are: also between the short ones and the full length, or what is learned has a hole there.
- What is learned beside it: a few answers of the model's own without an instruction, refusals among them, and a few annotated
  dialogues, or it loses what fine-tuning and RLHF gave it.

Read it in this order: settings, instructions, sampling, the loss mask, training, the test, the attention map.
"""
import json
import math
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import toy
from model import KVCache, Transformer, apply_rope, generate, load_weights, read_any, rope_table
from pretrain import (COLOURS, InputError, Ranks, can_draw, claim, command_line, cpu_group, file_fingerprint, interval,
                      locked, open_run, parent_of, rank_0_first, replace_file, sources, spool_stdin, start, tiny_world, world_of,
                      write_config)
from reward import RewardModel, Speaker, in_parts, load_judge, load_speaker, parents_of, picture, score_rows, whiskers
from sft import Tuning, check_seq_len, fine_tune, prompt_messages, read_dialogs, toy_sources, write_jsonl
from tokenizer import Tokenizer, dialog_turns, parse_json

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings(Tuning):
    """Sample dialogues under instructions, and fine-tune a chat model on their last answers (§3.3)."""
    init: str = "out/sft"  # the newest chat model: it is sampled from, and fine-tuned | RLHF V3
    out: str = "out/gatt"  # folder of this run; started again, it goes on where it stopped
    data: tuple[str, ...] = ("toy",)  # dialogues whose users speak, [NAME=]GLOB of .json or .jsonl (.gz); `toy`; `-`
    dialogs: int = 1200  # dialogues of the tiny world
    long: float = 0.2  # share of them with 7 to 20 turns; the others have 1 to 6
    constraints: str = "toy"  # toy, the lists of the tiny world; ask, lists that the chat model writes; or a .json file | ask
    resampled: float = 0.5  # share of the dialogues with all answers sampled under the instruction, not the last alone
    samples: int = 1  # how many are sampled of each last answer under an instruction
    reward: str = "out/reward-helpfulness"  # reward model that picks the best of several samples; "" takes the first that ends
    temperature: float = 0.3  # of the samples; their top-p is 1 | not stated
    past: int | None = None  # earlier turns that sampling reads; else all that fit | all
    max_new_tokens: int | None = None  # longest answer, in tokens; a dialogue with a longer one is dropped | not stated
    check: bool = False  # drop samples that break the rule of their constraint: the tiny world can tell, the paper could not
    replay: float = 0.15  # share of the dialogues that are learned without an instruction too, with answers of the model's own
    sample_batch: int = 300  # dialogues that are sampled together and kept together: the unit of resume

    # toy values: our choice. A model of the tiny world never met a second system prompt in a dialogue, and obeys it best when it
    # reads that message alone; its questions do not build on each other. One row a step: a row has few answers to learn.
    BY_PRESET: ClassVar[dict[str, dict]] = {
        name: values | (dict(lr=0.375 * values["lr"], adam_eps=1e-5, seq_len=1024, batch_size=1, micro_batch=1, epochs=2,
                             eval_every=1000, past=0, max_new_tokens=96) if name.startswith("toy") else dict(max_new_tokens=1024))
        for name, values in Tuning.BY_PRESET.items()
    }


# ---------------------------------------------------------------------------------------------- instructions

COMBINED = 0.15  # share of instructions that join two constraints: our choice
LISTS = {  # kind → what the chat model is asked for, how a constraint is said, and tersely (A.3.5)
    "hobby": ("hobbies", "You enjoy {}.", "Hobby: {}."),
    "language": ("languages", "Always answer in {}.", "Language: {}."),
    "figure": ("public figures", "Always act as {} from now.", "Figure: {}."),
}


def ask_for_lists(speaker: Speaker) -> list[dict]:
    """Constraints from lists that the chat model itself writes, so that it knows what they name (A.3.5).

    Raises InputError if it writes no list, as the models of the tiny world do not.
    """
    found = []
    for kind, (plural, text, terse) in LISTS.items():
        prompt = prompt_ids(speaker.tokenizer, "", f"Write a list of twenty {plural}, one a line, without a comment.")
        ids = generate(speaker.model, [prompt], 256, temperature=0, stop=(speaker.tokenizer.eos_id,))[0]
        said = speaker.tokenizer.decode(ids).strip()
        names = re.findall(r"^ *(?:\d+[.)]|[-*•]) *(\w[^\n:]{1,30}?)[ .]*$", said, re.MULTILINE)
        if len(names) < 5:
            raise InputError(f"{speaker.folder} makes no list of {plural} (it says {said[:40]!r}); name a file of constraints "
                             "with --constraints, or take those of the tiny world")
        found += [{"kind": kind, "texts": [text.format(name)], "terse": terse.format(name)} for name in dict.fromkeys(names)]
    return found


def read_constraints(file: str) -> list[dict]:
    """Constraints [{"kind", "texts", "terse"}] of a .json file; InputError if it holds others."""
    try:
        found = [{key: row[key] for key in ("kind", "texts", "terse")} for row in parse_json(Path(file).read_text("utf-8-sig"))]
    except (OSError, ValueError, TypeError, KeyError):
        found = []
    if not found or not all(isinstance(c["texts"], list) and c["texts"] and all(
            isinstance(text, str) for text in (c["kind"], c["terse"], *c["texts"])) for c in found):
        raise InputError(f'--constraints {file}: is no .json list of {{"kind": text, "texts": [text, ...], "terse": text}}; '
                         "mend it, or take toy or ask")
    return found


def draw_instruction(constraints: list[dict], rng: Random) -> tuple[list[dict], str]:
    """One or two constraints at random, and the instruction that says them; half of the instructions are terse (§3.3).

    A style stands alone: no chat model of the tiny world obeys one beside another constraint.
    """
    kinds = list(dict.fromkeys(c["kind"] for c in constraints))
    joined = [kind for kind in kinds if kind != "style"]
    both = rng.random() < COMBINED and len(joined) > 1
    chosen = [rng.choice([c for c in constraints if c["kind"] == kind])
              for kind in (sorted(rng.sample(joined, 2), key=kinds.index) if both else [rng.choice(kinds)])]
    is_terse = rng.random() < 0.5
    return chosen, " ".join(c["terse"] if is_terse else rng.choice(c["texts"]) for c in chosen)


class Plan(NamedTuple):
    """A dialogue to sample: what its users say, and under which instruction; one without is for replay."""
    id: str
    instruction: str
    constraints: list[dict]  # that the instruction was made of
    throughout: bool  # all answers are sampled under the instruction, not the last alone
    users: list[str]


def toy_dialogs(world: toy.World, n: int, long: float, seed: int) -> Iterator[tuple[str, list[dict]]]:
    """What users of the tiny world say, as (place, messages): 1 to 6 harmless turns, or, of a share `long`, 7 to 20.

    Half of the long ones have the full 20. One in sixteen dialogues is an unsafe request under a preprompt for safety (§4.2.4);
    one in eight is one under no instruction (an empty system message), attacked or not: refusals shall be replayed too.
    """
    for i in range(n):
        rng = Random(f"{world.seed}/{seed}/gatt/{i}")
        kind = rng.random()
        if kind < 1 / 16:
            (topic,) = rng.choice(world.slots["unsafe"]["train"])
            users, system = [rng.choice(toy.WORDINGS["unsafe"]).format(topic)], [rng.choice(toy.PREPROMPTS)]
        elif kind < 3 / 16:
            asked = prompt_messages(toy.draw_prompt(world, rng, kinds=["unsafe"]))
            users, system = [message["content"] for message in asked if message["role"] == "user"], [""]
        else:
            turns = rng.choice((20, rng.randint(7, 20))) if rng.random() < long else rng.randint(1, 6)
            users, system = [toy.draw_prompt(world, rng)["prompt"] for _ in range(turns)], []
        yield "toy", ([{"role": "system", "content": text} for text in system]
                      + [{"role": "user", "content": user} for user in users])


def make_plans(dialogs: Iterable[tuple[str, list[dict]]], constraints: list[dict], resampled: float, replay: float,
               seed: int) -> list[Plan]:
    """For each dialogue, one under its own system message or a drawn instruction; for a share `replay`, one without too.

    A dialogue whose system message is empty comes without an instruction alone.
    """
    plans = []
    for i, (place, messages) in enumerate(dialogs):
        if isinstance(messages, tuple):
            raise InputError(f"{place}: was made by gatt.py; give dialogues as text")
        rng = Random(f"{seed}/plan/{i}")
        chosen, instruction = draw_instruction(constraints, rng)
        if messages[0]["role"] == "system":
            chosen, instruction = [], messages[0]["content"]
        users = [message["content"] for message in messages if message["role"] == "user"]
        throughout, is_replayed = rng.random() < resampled, rng.random() < replay
        if instruction:
            plans.append(Plan(f"gatt/{i}", instruction, chosen, throughout, users))
        if is_replayed or not instruction:
            plans.append(Plan(f"replay/{i}", "", [], False, users))
    return plans


# ---------------------------------------------------------------------------------------------- sampling


def prompt_ids(tokenizer: Tokenizer, instruction: str, user: str) -> list[int]:
    """The ids of a user's message, with the instruction where a system prompt stands; it may be empty."""
    messages = [{"role": "system", "content": instruction}] * bool(instruction) + [{"role": "user", "content": user}]
    return tokenizer.encode_turn(*dialog_turns(messages, escape=True)[0])[0]


def synthesize(speaker: Speaker, plans: list[Plan], first: int, settings: Settings,
               reward: RewardModel | None = None) -> list[dict]:
    """Dialogues sampled with the instruction in every user's message, written with it in the first alone (§3.3).

    plans: of numbers first, first + 1, ...; what is drawn depends on a plan's number, the seed and the models alone. The last
    answer under an instruction is the best of `settings.samples` by the reward of the bare exchange. Returns a row of each plan:
    the form that the last answer was "sampled" in and the one to be "trained", as messages, and the latter's "turns" as ids
    (prompt, answer). If a message does not fit the context, or no sample of a turn ends (and obeys, with settings.check), the
    row is {"id", "dropped": that turn}.
    """
    tokenizer = speaker.tokenizer
    answers: list[list[list[int]]] = [[] for _ in plans]  # ids of each plan's answers so far

    def said(i: int, turn: int) -> str:  # the instruction under which an answer is sampled
        return plans[i].instruction if plans[i].throughout or turn + 1 == len(plans[i].users) else ""

    def read(i: int, turn: int) -> list[int]:  # what is read for it, as far as it fits: earlier turns, the user's message
        ids: list[int] = []
        earliest = 0 if settings.past is None else max(0, turn - settings.past)
        for t in reversed(range(earliest, turn + 1)):
            prompt = prompt_ids(tokenizer, said(i, turn), plans[i].users[t])
            longer = prompt + (answers[i][t] if t < turn else []) + ids
            if len(longer) + settings.max_new_tokens > speaker.model.config.max_seq_len:
                break
            ids = longer
        return ids

    for turn in range(max(len(plan.users) for plan in plans)):
        reads = {i: read(i, turn) for i, plan in enumerate(plans) if len(answers[i]) == turn < len(plan.users)}
        alive = [i for i, ids in reads.items() if ids]
        learned = [i for i in alive if plans[i].instruction and turn + 1 == len(plans[i].users)]
        for mine, k in ((learned, settings.samples), ([i for i in alive if i not in learned], 1)):
            drawn = generate(speaker.model, [reads[i] for i in mine], settings.max_new_tokens, settings.temperature, 1.0,
                             (tokenizer.eos_id,), zlib.crc32(f"{settings.seed} {turn}".encode()), k, [first + i for i in mine])
            found = [(i, answer) for i, answer in zip(np.repeat(mine, k).tolist(), drawn) if answer[-1] == tokenizer.eos_id
                     and not (settings.check and said(i, turn) and not obeys(plans[i].constraints, tokenizer.decode(answer)))]
            scores = np.zeros(len(found))
            if reward and k > 1 and found:
                scores = score_rows(reward, [prompt_ids(tokenizer, "", plans[i].users[turn]) + answer for i, answer in found])
            for n in np.argsort(-scores, kind="stable"):  # the best first, of equals the earlier
                i, answer = found[n]
                if len(answers[i]) == turn:
                    answers[i].append(answer)
    return [written(tokenizer, *pair) for pair in zip(plans, answers)]


def obeys(constraints: list[dict], text: str) -> bool:
    """Whether an answer keeps to all constraints, by the rules of the tiny world."""
    return all(toy.obeys(constraint, text.strip()) for constraint in constraints)


def written(tokenizer: Tokenizer, plan: Plan, answers: list[list[int]]) -> dict:
    """The row of a dialogue (see `synthesize`)."""
    if len(answers) < len(plan.users):
        return {"id": plan.id, "dropped": len(answers) + 1}
    system = [{"role": "system", "content": plan.instruction}] * bool(plan.instruction)
    exchanges = [[{"role": "user", "content": user}, {"role": "assistant", "content": tokenizer.decode(answer).strip()}]
                 for user, answer in zip(plan.users, answers)]
    return {"id": plan.id, "instruction": plan.instruction, "constraints": [c.get("name", c["terse"]) for c in plan.constraints],
            "sampled": [message for exchange in exchanges for message in system + exchange],
            "trained": system + [message for exchange in exchanges for message in exchange],
            "turns": [(prompt_ids(tokenizer, "" if turn else plan.instruction, user), answer)
                      for turn, (user, answer) in enumerate(zip(plan.users, answers))]}


# ---------------------------------------------------------------------------------------------- the loss mask


def gatt_mask(turns: list[tuple[list[int], list[int]]], earlier: bool = False) -> list[bool]:
    """Which tokens of a dialogue are learned: the last answer's, EOS included; earlier turns have zero loss (§3.3).

    turns: the ids of each turn's prompt and answer. earlier: learn the earlier answers too, as without an instruction. Returns
    a flag for each token, in order.
    """
    return [is_answer and (earlier or turn == len(turns) - 1) for turn, (prompt, answer) in enumerate(turns)
            for is_answer in [False] * len(prompt) + [True] * len(answer)]


# ---------------------------------------------------------------------------------------------- training

# Beside its own dialogues, as in sft.py (our choice). Annotated dialogues, and stories in which people speak in many characters
# and of many hobbies: without them a model forgets those that Ghost Attention does not train on.
TOY_MIX = ("toy/dialogs", "toy/encyclopedia:0.02", "toy/numbers:0.1", "toy/stories:0.03")


def main(settings: Settings) -> None:
    """Run §3.3: what users say → dialogues under instructions → gatt.jsonl → fine-tuning on the last answers."""
    is_toy = settings.data == ("toy",)
    if settings.check and not (is_toy and settings.constraints == "toy"):
        raise InputError("--check: the rules of the tiny world judge its own dialogues and constraints alone; leave it out")
    for name in ("long", "resampled", "replay"):
        if not 0 <= getattr(settings, name) <= 1:
            raise InputError(f"--{name} is a share of the dialogues, from 0 to 1, not {getattr(settings, name)}")
    constraints = {"toy": toy.constraints("train"), "ask": []}.get(settings.constraints)
    if constraints is None:
        constraints = read_constraints(settings.constraints)
    reward = settings.reward if settings.samples > 1 else ""
    parents = parents_of([settings.init, reward] if reward else [settings.init])
    parent = parents[settings.init]
    check_seq_len(settings, parent)
    if settings.world is None:
        settings = replace(settings, world=world_of(settings.init))
    world, out, bad = tiny_world(settings.world), Path(settings.out), [] if settings.skip_bad_rows else None
    ranks = start(settings)
    with locked(settings.out, ranks):
        spoken = lambda: toy_dialogs(world, settings.dialogs, settings.long, settings.seed)  # noqa: E731
        embedded = {"toy": (spoken, f"world {settings.world}")}
        found = sources(settings.data, embedded, lambda file: read_dialogs(file, bad), spool_stdin(settings, ranks))
        if any(source.epochs != 1 for source in found):
            raise InputError("--data: gatt.py reads each dialogue once; leave EPOCHS out")
        data = {s.name: s.fingerprint for s in found} | {folder: one.fingerprint for folder, one in parents.items()}
        data["constraints"] = zlib.crc32(json.dumps(constraints).encode())
        record = open_run(settings, "gatt", ranks, data=data, parent=settings.init, parent_fingerprint=parent.fingerprint)
        if ranks.rank == 0:
            replace_file(out / "config.json", json.dumps(record | {"model": asdict(parent.config)}, indent=1).encode())
        dialogs = (dialog for source in found for dialog in source.documents())
        sample_rows(dialogs, constraints, reward, settings, ranks)
        specs, documents = toy_sources(TOY_MIX if is_toy else (), settings.world, settings.dialogs * 2 // 3, safety=0.06)
        documents["gatt"] = partial(read_dialogs, str(out / "gatt.jsonl")), file_fingerprint(str(out / "gatt.jsonl"))
        learned = sources(["gatt", *specs], documents, read_dialogs)
        fine_tune(settings, record, parent, learned, ranks, world if is_toy else None, bad)


def sample_rows(dialogs: Iterable[tuple[str, list[dict]]], constraints: list[dict], reward: str, settings: Settings,
                ranks: Ranks) -> None:
    """Write OUT/gatt.jsonl. The models that it takes are gone when it returns: fine-tuning needs the room."""
    speaker, lists = cache(partial(load_speaker, settings.init, ranks)), Path(settings.out, "constraints.json")
    judge = cache(partial(load_judge, reward, ranks)) if reward else lambda: None
    with rank_0_first(ranks):  # asked once: other lists would be other plans for the dialogues that are there
        if not constraints and ranks.rank == 0 and not (settings.resume and lists.exists()):
            replace_file(lists, json.dumps(ask_for_lists(speaker()), indent=1).encode())
    plans = make_plans(dialogs, constraints or read_constraints(str(lists)), settings.resampled, settings.replay, settings.seed)
    draw = lambda rows: synthesize(speaker(), [plans[i] for i in rows], rows.start, settings, judge())  # noqa: E731
    rows = in_parts(Path(settings.out), "gatt", len(plans), settings.sample_batch, draw, ranks, settings.resume)
    if ranks.rank == 0:
        write_rows(rows, plans, Path(settings.out, "gatt.jsonl"))
    dist.barrier(cpu_group())


def write_rows(rows: list[dict], plans: list[Plan], file: Path) -> None:
    """Write the dialogues that can be learned, and say how many there are and, in the tiny world, how many answers obey."""
    kept = [(row, plan) for row, plan in zip(rows, plans) if "dropped" not in row]
    if not kept:
        raise InputError(f"all {len(rows)} dialogues were dropped: no answer came to an end, or none had room in the context; "
                         "begin again with another --max_new_tokens")
    masks = [gatt_mask(row["turns"], earlier=not plan.instruction) for row, plan in kept]
    write_jsonl(file, [row | {"is_answer": mask} for (row, _), mask in zip(kept, masks)])
    n, turns = sum(bool(plan.instruction) for _, plan in kept), sum(len(plan.users) for _, plan in kept)
    print(f"{file}: {n:,} dialogues under an instruction, {len(kept) - n:,} without, of {turns:,} turns; {len(rows) - len(kept)} "
          "dropped, for want of an answer")
    judged = [obeys(plan.constraints, row["trained"][-1]["content"]) for row, plan in kept
              if plan.constraints and all("mark" in constraint for constraint in plan.constraints)]
    if judged:
        print(f"of the answers to learn {np.mean(judged):.1%} obey, by the rules of the tiny world")


# ---------------------------------------------------------------------------------------------- the test


@dataclass(frozen=True)
class Test:
    """Does the instruction still hold, the model's own answers fed back (Table 30, Figure 28, A.3.5)? In the tiny world."""
    runs: tuple[str, ...] = ("out/sft", "out/gatt")  # chat models of one world
    out: str = "out/gatt-test"  # folder of the table, the picture and the dialogues
    dialogs: int = 200  # dialogues under constraints of training, and as many under unseen ones
    turns: tuple[str, ...] = ("1", "2", "4", "6", "10", "20")  # turns to look at | 2, 4, 6, 20
    unseen_turns: int = 6  # turns of the dialogues under unseen constraints
    max_new_tokens: int = 64  # longest answer, in tokens
    world: int | None = None  # seed of the tiny world; by default that of the first run
    seed: int = 0  # seed of constraints and questions

    BY_PRESET: ClassVar[dict[str, dict]] = {}
    POSITIONAL: ClassVar[str] = "runs"


@torch.inference_mode()
def converse(model: Transformer, prompts: list[list[list[int]]], max_new_tokens: int, eos_id: int) -> list[list[list[int]]]:
    """The greedy answers to whole dialogues: ids of each answer. prompts: ids of each dialogue's messages of the user.

    All rows go on by one token a step: each reads its message or speaks. So nothing is read twice, and no row waits for another.
    Positions go on past the context that the model was trained with.
    """
    columns = max(sum(len(ids) + max_new_tokens + 1 for ids in dialog) for dialog in prompts)
    model.config = replace(model.config, max_seq_len=max(columns, model.config.max_seq_len))
    kv = KVCache(model.config, torch.ones(len(prompts), dtype=torch.long), columns)
    answers: list[list[list[int]]] = [[[]] for _ in prompts]
    ahead = [dialog[0][::-1] for dialog in prompts]  # what each row is to read, the next token last
    rows = list(range(len(prompts)))  # those in the cache
    while rows:
        logits = model(torch.tensor([[ahead[row].pop()] for row in rows]), cache=kv)  # (rows, vocab)
        for row, token in zip(rows, logits.argmax(-1).tolist()):
            if ahead[row] or len(answers[row]) > len(prompts[row]):  # it reads, or its dialogue is over
                ahead[row] = ahead[row] or [eos_id]
                continue
            answer = answers[row][-1]
            answer.append(token)
            ahead[row] = [token]
            if token == eos_id or len(answer) == max_new_tokens:
                answers[row].append([])
                after = prompts[row][len(answers[row]) - 1 :][:1] or [[eos_id]]  # the next message
                ahead[row] = after[0][::-1] + [eos_id] + ahead[row] * (token != eos_id)
        kept = [j for j, row in enumerate(rows) if len(answers[row]) <= len(prompts[row])]
        if len(kept) <= 0.75 * len(rows):  # moving the cache costs; do it when a quarter is done
            kv.keep(torch.tensor(kept, dtype=torch.long))
            rows = [rows[j] for j in kept]
    return [dialog[:-1] for dialog in answers]


def long_dialogs(model: Transformer, tokenizer: Tokenizer, world: toy.World, split: str, turns: int,
                 settings: Test) -> list[dict]:
    """Dialogues of so many turns on prompts never asked, each under one constraint of the split, its kinds in turn.

    Rows {"kind", "instruction", "messages"} and, of each turn, "obeys", "helpfulness", and "tokens" up to the answer's end.
    """
    rng, rows = Random(f"{world.seed}/{settings.seed}/test/{split}"), []
    kinds = cycle(dict.fromkeys(constraint["kind"] for constraint in toy.constraints(split)))
    for kind, _ in zip(kinds, range(settings.dialogs)):
        constraint = rng.choice([c for c in toy.constraints(split) if c["kind"] == kind])
        instruction = rng.choice([*constraint["texts"], constraint["terse"]])
        asked = [toy.draw_prompt(world, rng, "test") for _ in range(turns)]
        ids = [prompt_ids(tokenizer, "" if turn else instruction, prompt["prompt"]) for turn, prompt in enumerate(asked)]
        rows.append((constraint, instruction, asked, ids))
    found = []
    all_answers = converse(model, [ids for *_, ids in rows], settings.max_new_tokens, tokenizer.eos_id)
    for (constraint, instruction, asked, ids), answers in zip(rows, all_answers):
        texts = [tokenizer.decode(answer).strip() for answer in answers]
        messages = [{"role": "system", "content": instruction}]
        for prompt, text in zip(asked, texts):
            messages += [{"role": "user", "content": prompt["prompt"]}, {"role": "assistant", "content": text}]
        found.append({
            "kind": constraint["kind"], "instruction": instruction, "messages": messages,
            "obeys": [toy.obeys(constraint, text) for text in texts],
            "helpfulness": [toy.helpfulness(world, prompt, text) for prompt, text in zip(asked, texts)],
            "tokens": np.cumsum([len(prompt) + len(answer) for prompt, answer in zip(ids, answers)]).tolist()})
    return found


def by_turn(rows: list[dict], key: str, turns: list[int]) -> dict[str, tuple[float, float, float]]:
    """The mean of a figure at each of the turns that the dialogues have, with its interval over dialogues."""
    return {str(turn): interval(np.array([row[key][turn - 1] for row in rows], float))
            for turn in turns if turn <= len(rows[0][key])}


def test(settings: Test) -> None:
    """Print Table 30 of each run, with kinds and unseen constraints, draw it, and write the dialogues to be read."""
    if not all(turn.isdecimal() and int(turn) for turn in settings.turns):
        raise InputError(f"--turns {' '.join(settings.turns)}: they are numbers from 1, as in --turns 1 2 6 20")
    turns, out = sorted(map(int, settings.turns)), Path(settings.out)
    claim(out, "gatt-test")
    for run in settings.runs:
        parent_of(run)  # a wrong one is refused before the long work
    world = tiny_world(world_of(settings.runs[0]) if settings.world is None else settings.world)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict] = {}
    for run in settings.runs:
        config, weight_of, tokenizer_file = read_any(run)
        model, tokenizer = load_weights(config, weight_of), Tokenizer(tokenizer_file)
        seen = long_dialogs(model, tokenizer, world, "train", turns[-1], settings)
        unseen = long_dialogs(model, tokenizer, world, "test", min(settings.unseen_turns, turns[-1]), settings)
        groups = {"all": seen} | {kind: [row for row in seen if row["kind"] == kind] for kind in ("persona", "hobby", "style")}
        groups |= {"unseen": unseen} | {f"unseen {kind}": [row for row in unseen if row["kind"] == kind]
                                        for kind in ("persona", "hobby")}
        found[run] = {name: by_turn(rows, "obeys", turns) for name, rows in groups.items()}
        found[run] |= {"true helpfulness": by_turn(seen, "helpfulness", turns), "tokens so far": by_turn(seen, "tokens", turns)}
        print(f"{f'{run}, turn':24}" + "".join(f"{turn:>20}" for turn in turns))
        for name, figures in found[run].items():
            form = "{:.0f}  [{:.0f}, {:.0f}]" if name.startswith("tokens") else "{:.2f}  [{:.2f}, {:.2f}]"
            print(f"{name:24}" + "".join(f"{form.format(*values):>20}" for values in figures.values()), flush=True)
        write_jsonl(out / f"{re.sub(r'[^A-Za-z0-9]+', '-', run).strip('-')}.jsonl", seen + unseen)
    replace_file(out / "results.json", json.dumps(found, indent=1).encode())
    write_config(settings, "gatt-test")
    if not can_draw():
        return
    with picture(out / "obedience.png", "How long an instruction holds (Table 30)", "turn", "share that obeys") as axes:
        for (run, of_run), colour in zip(found.items(), cycle(COLOURS)):
            for name, line in (("all", "-"), ("unseen", ":")):
                whiskers(axes, [int(turn) for turn in of_run[name]], list(of_run[name].values()), colour, f"{run}, {name}")
                axes.containers[-1].lines[0].set_linestyle(line)
        axes.set_ylim(-0.05, 1.05)


# ---------------------------------------------------------------------------------------------- the attention map


@dataclass(frozen=True)
class Map:
    """Draw what a chat model attends to in one dialogue, before and after Ghost Attention (Figure 10)."""
    run: str = "out/gatt"  # chat model whose dialogue it is; the picture is RUN/attention.png
    before: str = "out/sft"  # chat model that reads the same dialogue
    instruction: str = "Act as a pirate."  # of the dialogue
    turns: int = 6  # length of the dialogue
    bin: int = 4  # neighbouring tokens that share a cell
    world: int | None = None  # seed of the tiny world that asks; by default that of the run

    BY_PRESET: ClassVar[dict[str, dict]] = {}
    POSITIONAL: ClassVar[str] = "run"


@torch.no_grad()
def attention_weights(model: Transformer, tokens: list[int]) -> Tensor:
    """softmax(q kᵀ / √head_dim) of every layer and head, spelled out: (layers, heads, seq, seq), a row for each query."""
    config, seq = model.config, len(tokens)
    rotation = rope_table(config.head_dim, seq, config.rope_theta, torch.device("cpu"))[None, :, None]
    later = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    h, weights = model.tok_embeddings(torch.tensor([tokens])), []  # (1, seq, dim)
    for block in model.layers:
        x = block.attention_norm(h)
        q, k = (w(x).unflatten(-1, (-1, config.head_dim)) for w in (block.attention.wq, block.attention.wk))
        q, k = apply_rope(q, rotation)[0], apply_rope(k, rotation)[0]  # (seq, heads, head_dim), (seq, n_kv_heads, head_dim)
        k = k.repeat_interleave(config.n_heads // config.n_kv_heads, dim=1)  # (seq, heads, head_dim)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(config.head_dim)  # (heads, seq, seq)
        weights.append(scores.masked_fill(later, -math.inf).softmax(-1))
        h = block(h, rotation)
    return torch.stack(weights)


def binned(weights: Tensor, size: int) -> Tensor:
    """The maximum over layers and heads, and over cells of size × size neighbouring tokens (Figure 10): (cells, cells)."""
    highest = weights.amax((0, 1))  # (seq, seq)
    cells = -(-len(highest) // size)
    grown = highest.new_zeros(cells * size, cells * size)
    grown[: len(highest), : len(highest)] = highest
    return grown.view(cells, size, cells, size).amax((1, 3))


def attention(settings: Map) -> None:
    """Draw RUN/attention.png, and print how much the later answers attend to the instruction, before and after."""
    world = tiny_world(world_of(settings.run) if settings.world is None else settings.world)
    parents_of([settings.run, settings.before])
    models, tokenizer = {}, None
    for folder in (settings.run, settings.before):
        config, weight_of, tokenizer_file = read_any(folder)
        models[folder], tokenizer = load_weights(config, weight_of), tokenizer or Tokenizer(tokenizer_file)
    rng = Random("attention")
    users = [toy.draw_prompt(world, rng, "test", ["fact", "howto"])["prompt"] for _ in range(settings.turns)]
    prompts = [prompt_ids(tokenizer, "" if turn else settings.instruction, user) for turn, user in enumerate(users)]
    answers = converse(models[settings.run], [prompts], 64, tokenizer.eos_id)[0]
    tokens = [token for prompt, answer in zip(prompts, answers) for token in prompt + answer]
    print(tokenizer.decode(tokens))
    instruction = len(prompts[0]) - len(prompt_ids(tokenizer, "", users[0])) + 1  # the tokens up to its end
    asking = np.repeat([False, True] * settings.turns, [len(part) for pair in zip(prompts, answers) for part in pair])
    later = asking & (np.arange(len(tokens)) >= len(prompts[0]) + len(answers[0]))  # the answers behind the first
    weights = {folder: attention_weights(model, tokens) for folder, model in models.items()}
    for folder, of_model in weights.items():
        highest = of_model.amax((0, 1))[torch.from_numpy(later)][:, 1:instruction].amax(1)  # (tokens,)
        print(f"{folder}: the tokens of later answers attend to the instruction with {highest.mean():.3f} on average "
              "(the highest weight over layers and heads)")
    if not can_draw():
        return
    import matplotlib.pyplot as plt
    figure, both = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for axes, name, folder in zip(both, ("before", "after"), (settings.before, settings.run)):
        axes.imshow(binned(weights[folder], settings.bin), cmap="magma", vmin=0, vmax=1)
        axes.axvline(instruction / settings.bin - 0.5, color=COLOURS[0], lw=1)
        axes.set(title=f"{name}: {folder}", xlabel=f"attended to, {settings.bin} tokens a cell; left of the line: instruction")
    both[0].set_ylabel("attending")
    figure.savefig(Path(settings.run, "attention.png"), dpi=150)
    plt.close(figure)
    print(f"{settings.run}/attention.png")


# ---------------------------------------------------------------------------------------------- the command line

COMMANDS = {"test": (test, Test), "attention": (attention, Map)}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        command_line(*COMMANDS[sys.argv.pop(1)])
    else:
        command_line(main, Settings)
