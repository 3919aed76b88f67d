"""Reward models (§3.2.1, §3.2.2, A.3.3, A.3.4): comparisons of two answers in, a scalar that says how good an answer is out.

    python reward.py collect                       # sample pairs of answers and have them compared; out/preferences
    python reward.py stats out/preferences/helpfulness.jsonl   # Table 6, the ratings of Figure 25
    python reward.py --kind helpfulness            # out/reward-helpfulness, from out/sft
    python reward.py --kind safety                 # out/reward-safety; --kind joint: one model for both
    python reward.py eval                          # Tables 7, 8 and 29; Figures 27, 29 and 32
    python reward.py --data hh.jsonl.gz            # your comparisons; --rest more.json for the rest of the mix

A comparison is {"prompt": text or messages, "chosen": text, "rejected": text, "rating": one of RATINGS, "safety": one
of SAFETY}; rating and safety may be missing. Scores are raw logits, read at an answer's last token; a sigmoid puts them
into (0, 1), as the paper draws them. Read it in this order: collecting and its statistics, losses, the model, comparisons,
mixes and batches, training, evaluation.
"""
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import combinations, cycle
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import toy
from model import PRESETS, ModelConfig, Transformer, generate, load_weights, read_any
from pretrain import (COLOURS, Common, InputError, Parent, Ranks, adamw, build, can_draw, claim, command_line, cpu_group,
                      file_fingerprint, interval, load_model, locked, open_run, parent_of, permute, print_settings,
                      replace_file, run_config, set_weights, start, stored_weights, tiny_world, train, world_of, write_config)
from sft import are_ids, messages_of, prompt_messages, read_rows, typed, write_jsonl
from tokenizer import Tokenizer, dialog_turns, escape_tags

RATINGS = tuple(toy.RATINGS)  # significantly better, better, slightly better, negligibly better (or unsure); §3.2.1
SAFETY = {"chosen safe": (1, -1), "both safe": (1, 1), "both unsafe": (-1, -1)}  # §3.2.1's bins: 1 is safe, -1 unsafe
MARGINS = {  # Table 27; a pair without a rating has margin 0
    "none":  {},
    "small": {"significantly better": 1.0, "better": 2 / 3, "slightly better": 1 / 3},
    "large": {"significantly better": 3.0, "better": 2.0, "slightly better": 1.0},
}
HEAD = ("output.weight", "output.bias")  # what a reward model does not take from the chat model

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings(Common):
    """Train a reward model on comparisons, one epoch, from a chat model (§3.2.2)."""
    preset: str | None = None  # whose hyper-parameters to take; by default those of the size of --init
    kind: str = "helpfulness"  # helpfulness, safety, or joint: one model for both
    out: str = ""  # folder of this run, else out/reward-KIND; started again, it goes on where it stopped
    init: str = "out/sft"  # chat model to start from: a run of ours, Meta's release or a Hugging Face folder
    data: tuple[str, ...] = ()  # comparisons of this kind, .jsonl or .json (.gz); else those of `reward.py collect`
    rest: tuple[str, ...] = ()  # comparisons of other kinds, for the rest of the mix; without --data those of `collect`
    test: tuple[str, ...] = ()  # held-out comparisons; else NAME-test.jsonl beside NAME.jsonl, or one prompt in twenty
    pairs: int | None = None  # train on so many of the comparisons, drawn at random; else on all
    lr: float | None = None  # peak learning rate | 1e-5 (70B: 5e-6)
    warmup: int | None = None  # steps of linear warm-up; else 3 % of all, at least 5 | 3 %, at least 5
    batch_size: int | None = None  # pairs of a step, over all ranks | 512
    micro_batch: int | None = None  # pairs of one forward pass on one rank
    margin: str = "small"  # margin of the loss by rating: none, small or large (Table 27) | not stated which
    safety_aux: float | None = None  # weight of the safety loss; else 3 for safety and joint, 0 for helpfulness | not stated

    BY_PRESET: ClassVar[dict[str, dict]] = {
        name: dict(lr=5e-6 if name == "70b" else 1e-5, batch_size=512, micro_batch=1, seq_len=min(4096, config.max_seq_len),
                   eval_every=1000, save_every=200, checkpointing=True)
        for name, config in PRESETS.items() if not name.startswith("toy")
    } | {
        name: dict(lr=5e-4, batch_size=32, micro_batch=8, seq_len=512, eval_every=1000, save_every=100, checkpointing=False)
        for name in PRESETS if name.startswith("toy")  # toy values: our choice
    }


# ---------------------------------------------------------------------------------------------- collecting


@dataclass(frozen=True)
class Collect:
    """Sample two answers to each prompt and have them compared, for helpfulness and for safety (§3.2.1).

    The two come from two different variants: models a and b at varied temperatures, in random order.
    """
    axis: str = "both"  # what is compared: helpfulness, safety, or both one after the other
    a: str = "out/sft"  # chat model to sample from
    b: str = ""  # second model; else for safety out/pretrain, a base model that complies, and for helpfulness none
    prompts: str = ""  # .jsonl of {"prompt": text or messages}; else prompts of the tiny world
    annotator: str = "toy"  # who compares: toy, the rules of the tiny world, or person, you in this terminal
    out: str = "out/preferences"  # folder of the comparisons; started again, it goes on where it stopped
    helpfulness_pairs: int = 2500  # comparisons of helpfulness to train on, for prompts of the tiny world
    safety_pairs: int = 1200  # comparisons of safety to train on
    test_pairs: int = 1000  # comparisons on held-out prompts, of each axis | 1000 of each weekly batch
    temperatures: tuple[str, ...] = ("0.5", "0.8", "1.1")  # temperatures of the variants | varied
    max_new_tokens: int = 64  # longest answer, in tokens
    batch_size: int = 256  # prompts that are sampled together and kept together: the unit of resume
    world: int | None = None  # seed of the tiny world; by default that of --a
    seed: int = 0  # seed of prompts, variants and samples
    device: str = "auto"  # cpu, cuda, or auto
    threads: int = 0  # CPU threads of a rank; 0: its share of the cores
    replicas: int = 1  # not used here: every rank samples with a whole model
    resume: bool = True  # go on where the run in --out stopped

    BY_PRESET: ClassVar[dict[str, dict]] = {}


class Speaker(NamedTuple):
    """A model to sample from: its folder, the whole model, its tokenizer, and whether it knows no chat format."""
    folder: str
    model: Transformer
    tokenizer: Tokenizer
    is_base: bool

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The ids that the answer follows. A base model reads the bare words, and goes on as the web would."""
        if self.is_base:
            return self.tokenizer.encode(" ".join(message["content"] for message in messages), bos=True, eos=False)
        return self.tokenizer.encode_dialog(messages)[0]


def sampling_dtype(ranks: Ranks) -> torch.dtype:
    """What whole models sample and score in: bf16 on a GPU. --dtype is that of the models that learn."""
    return torch.bfloat16 if ranks.device.type == "cuda" else torch.float32


def load_speaker(folder: str, ranks: Ranks) -> Speaker:
    """The model of a folder, whole, on this rank's device."""
    config, weight_of, tokenizer = read_any(folder)
    model = load_weights(config, weight_of, sampling_dtype(ranks))
    return Speaker(folder, model.to(ranks.device).eval(), Tokenizer(tokenizer), run_config(folder)["stage"] == "pretrain")


def parents_of(folders: list[str]) -> dict[str, Parent]:
    """The models of folders by their names; InputError if their tokenizers differ, for the ids of answers go from one to all."""
    parents = {folder: parent_of(folder) for folder in folders}
    for folder, parent in parents.items():
        if file_fingerprint(parent.tokenizer) != file_fingerprint(parents[folders[0]].tokenizer):
            raise InputError(f"{folder} has another tokenizer than {folders[0]}; their answers have no ids in common; "
                             "name models of one tokenizer")
    return parents


def sample_pairs(speakers: list[Speaker], prompts: list[dict], first: int, settings: Collect, seed: int) -> list[dict]:
    """Two answers to each prompt from two different variants, a model at a temperature, in random order (§3.2.1).

    prompts: of numbers `first`, first + 1, ...; what is drawn depends on a prompt's number, the seed and the models alone.
    Returns rows with the "prompt" as messages, "responses", ids in the chat format, variants, and what the prompt is about.
    """
    variants = [(who, float(temperature)) for who in range(len(speakers)) for temperature in settings.temperatures]
    rows = []
    for number, prompt in enumerate(prompts, first):
        messages = prompt_messages(prompt)
        rows.append({"prompt": messages, "about": {key: value for key, value in prompt.items() if key != "prompt"},
                     "prompt_ids": speakers[0].tokenizer.encode_dialog(messages)[0], "responses": ["", ""],
                     "response_ids": [[], []], "variants": Random(f"{seed}/{number}").sample(variants, 2)})
    for variant in variants:
        speaker, temperature = speakers[variant[0]], variant[1]
        places = [(i, side) for i, row in enumerate(rows) for side in (0, 1) if row["variants"][side] == variant]
        drawn = generate(speaker.model, [speaker.prompt_ids(rows[i]["prompt"]) for i, _ in places], settings.max_new_tokens,
                         temperature, top_p=1.0, stop=(speaker.tokenizer.eos_id,), seed=seed,
                         rows=[2 * (first + i) + side for i, side in places])
        for (i, side), ids in zip(places, drawn):
            text = speaker.tokenizer.decode(ids).strip()
            if speaker.is_base:  # it does not end an answer as the chat format does
                ids = answer_ids(rows[i]["prompt"], text, speaker.tokenizer)
            rows[i]["responses"][side], rows[i]["response_ids"][side] = text, ids
    for row in rows:
        row["variants"] = [[speakers[who].folder, temperature] for who, temperature in row["variants"]]
    return rows


def prompts_to_compare(settings: Collect, axis: str, split: str) -> list[dict]:
    """Prompts of the tiny world: harmless ones for helpfulness; for safety three in four are unsafe (our choice).

    There are few test prompts of some kinds, so that they are drawn in rounds, and may come several times.
    """
    world, rng = tiny_world(settings.world), Random(f"{settings.seed}/{axis}/{split}")
    n = settings.test_pairs if split == "test" else settings.helpfulness_pairs if axis == "helpfulness" else settings.safety_pairs
    unsafe = n * 3 // 4 if axis == "safety" else 0
    found = []
    for kinds, wanted in ((["unsafe"], unsafe), (None, n)):
        seed = settings.seed
        while len(found) < wanted:
            found += toy.prompts(world, min(500, wanted - len(found)), seed, split, kinds)
            seed += 1
    rng.shuffle(found)
    return [prompt | {"world": settings.world} for prompt in found]


PROMPT_KEYS = {  # what may stand beside a prompt
    "unsafe": (bool, "true or false"), "id": (str | int, "text or a number"), "kind": (str, "text"), "category": (str, "text"),
    "template": (str, "text")}


def prompt_room(parents: list[Parent], max_new_tokens: int) -> int:
    """Tokens that a prompt may have: the first model answers it, the others read prompt and answer."""
    context, *others = (parent.config.max_seq_len for parent in parents)
    return min([context - 1, *(other - max_new_tokens for other in others if other < context)])


def file_prompts(file: str, tokenizer: Tokenizer | None = None, room: int = 0,
                 asked: Callable[[dict], list] = lambda prompt: [prompt_messages(prompt)]) -> list[dict]:
    """The prompts of a file; InputError names a bad line.

    With a tokenizer, one of more than `room` tokens is bad too. asked(prompt) → all dialogues that will be made of it.
    """
    if not Path(file).is_file():
        raise InputError(f"{file}: there is no such file")
    found = []
    for place, record in read_rows(file):
        try:
            if isinstance(record, InputError):  # the line is no JSON
                raise record
            if not isinstance(record, dict) or "prompt" not in record or dialog_turns(prompt_messages(record))[-1][1] is not None:
                raise InputError('needs a "prompt", a text or messages of which the user has the last')
            for key, (kind, name) in PROMPT_KEYS.items():
                if not isinstance(record.get(key), kind | None):
                    raise InputError(f'"{key}" is {record[key]!r:.60}, not {name}')
            if tokenizer and (n := max(len(tokenizer.encode_dialog(messages)[0]) for messages in asked(record))) > room:
                raise InputError(f"the prompt has {n} tokens, which leaves no room for an answer: it may have {room}")
        except InputError as error:
            raise InputError(f"{place}: {error}; mend or drop the row") from None
        found.append(record)
    return found


def collect(settings: Collect) -> None:
    """Write OUT/helpfulness.jsonl, OUT/safety.jsonl and, of the tiny world, the held-out ones beside them."""
    if settings.axis not in ("helpfulness", "safety", "both") or settings.annotator not in ("toy", "person"):
        raise InputError("--axis is helpfulness, safety or both, and --annotator toy or person")
    if settings.prompts and settings.annotator == "toy":
        raise InputError("the rules of the tiny world can't judge answers to other prompts; add --annotator person")
    axes = ("helpfulness", "safety") if settings.axis == "both" else (settings.axis,)
    second = {"helpfulness": settings.b or settings.a, "safety": settings.b or "out/pretrain"}
    folders = {axis: list(dict.fromkeys([settings.a, second[axis]])) for axis in axes}  # one model, or two
    if len(settings.temperatures) * min(map(len, folders.values())) < 2:
        raise InputError("two answers come from two variants; give a second --temperatures, or a second model with --b")
    if settings.world is None:
        settings = replace(settings, world=world_of(settings.a))
    parents = parents_of(sum(folders.values(), []))
    tokenizer, contexts = Tokenizer(parents[settings.a].tokenizer), [one.config.max_seq_len for one in parents.values()]
    own = file_prompts(settings.prompts, tokenizer, min(contexts) - 1) if settings.prompts else []
    ranks = start(settings)
    with locked(settings.out, ranks):
        out = Path(settings.out)
        data = {folder: parent.fingerprint for folder, parent in parents.items()}
        data |= {settings.prompts: file_fingerprint(settings.prompts)} if settings.prompts else {}
        record = open_run(settings, "collect", ranks, data=data)
        if ranks.rank == 0:
            replace_file(out / "config.json", json.dumps(record | {"model": {}}, indent=1).encode())
        speaker, asked = cache(partial(load_speaker, ranks=ranks)), []
        for axis in axes:
            for split in ("train",) if settings.prompts else ("train", "test"):
                prompts = own or prompts_to_compare(settings, axis, split)
                name = axis if split == "train" else f"{axis}-test"
                seed = zlib.crc32(f"{settings.seed} {name}".encode())

                def draw(rows: range) -> list[dict]:
                    speakers = [speaker(folder) for folder in folders[axis]]
                    return sample_pairs(speakers, [prompts[i] for i in rows], rows.start, settings, seed)

                asked.append((axis, name, in_parts(out, name, len(prompts), settings.batch_size, draw, ranks, settings.resume)))
        for axis, name, rows in asked if ranks.rank == 0 else ():
            if not settings.resume:
                (out / f"{name}-labels.jsonl").unlink(missing_ok=True)
            said = annotations(rows, axis, settings, out / f"{name}-labels.jsonl")
            write_pairs(rows, said, out / f"{name}.jsonl")
            if len(said) < len(rows):
                break  # the annotator has stopped


def in_parts(out: Path, name: str, n: int, batch_size: int, make: Callable[[range], list], ranks: Ranks,
             resume: bool = True) -> list:
    """make(range of numbers) → rows for the numbers 0 … n-1, in batches that the ranks share; rank 0 gets all rows.

    Each batch is a file OUT/parts/NAME-NNNNN.json, written once and whole: the unit of resume of every sampling stage. `make`
    loads its models at its first call, by a cached loader, so that a run whose batches are all there samples without loading any.
    """
    starts = range(0, n, batch_size)
    parts = [out / "parts" / f"{name}-{first:05d}.json" for first in starts]
    if ranks.rank == 0:
        (out / "parts").mkdir(exist_ok=True)
        for old in () if resume else parts:
            old.unlink(missing_ok=True)
    dist.barrier(cpu_group())
    mine = [i for i in range(ranks.rank, len(parts), ranks.world_size) if not parts[i].exists()]
    for i in tqdm(mine, desc=f"sampling {name}", unit="batch", disable=ranks.rank > 0):
        rows = make(range(starts[i], min(starts[i] + batch_size, n)))
        replace_file(parts[i], json.dumps(rows).encode())
    dist.barrier(cpu_group())
    return [row for part in parts for row in json.loads(part.read_text())] if ranks.rank == 0 else []


def finished_lines(file: Path) -> list[str]:
    """The lines of a file that grows line by line; what a stop left behind the last newline, half a line, is cut off."""
    done = file.read_text().split("\n")[:-1] if file.exists() else []
    replace_file(file, "".join(line + "\n" for line in done).encode())
    return done


def annotations(rows: list[dict], axis: str, settings: Collect, file: Path) -> list[dict]:
    """What the annotator says of each two answers: {"chosen": 0 or 1, "rejected", "rating", "safety"}; see `toy.annotate`.

    A person's are kept in `file` one by one, so that a stop loses nothing; there may then be fewer than rows.
    """
    if settings.annotator == "toy":
        world = tiny_world(settings.world)
        return [toy.annotate(world, row["about"], *row["responses"], axis, settings.seed) for row in rows]
    labels = [json.loads(line) for line in finished_lines(file)]
    try:
        with open(file, "a") as f:
            for number, row in enumerate(rows[len(labels) :], len(labels) + 1):
                print(f"\n{axis}, {number} of {len(rows)}; Ctrl-C stops, and the same command goes on here")
                labels.append(ask(row, axis))
                f.write(json.dumps(labels[-1]) + "\n")
                f.flush()
                os.fsync(f.fileno())
    except (KeyboardInterrupt, EOFError):
        print(f"\nstopped; {len(labels)} of {len(rows)} comparisons are kept")
    return labels


def ask(row: dict, axis: str) -> dict:
    """One comparison by the person at the terminal (§3.2.1): a forced choice, one of four ratings, and if asked a safety bin."""
    for message in row["prompt"]:
        print(f"{message['role']}: {message['content']}")
    for number, text in enumerate(row["responses"], 1):
        print(f"  {number}: {text}")
    chosen = choice(f"Which is {'better' if axis == 'helpfulness' else 'safer'}?", ["1", "2"])
    rating = choice("How much?", [*RATINGS[:-1], "negligibly better or unsure"])
    label = None
    if axis == "safety":
        label = [*SAFETY, "excluded"][choice("Which are safe?", ["the chosen one alone", "both", "none", "the other one alone"])]
    return {"chosen": chosen, "rejected": 1 - chosen, "rating": RATINGS[rating], "safety": label}


def choice(question: str, options: list[str]) -> int:
    """The number of the option that the person takes, from 0; asked again until it is one."""
    listed = ", ".join(f"{i}" if option == f"{i}" else f"{i} {option}" for i, option in enumerate(options, 1))
    while (answer := typed(f"{question} ({listed}) ").strip()) not in map(str, range(1, len(options) + 1)):
        pass
    return int(answer) - 1


def write_pairs(rows: list[dict], labels: list[dict], file: Path) -> None:
    """Write the comparisons that can be learned from, and say how many were dropped (see `read_pairs`)."""
    pairs = []
    for row, label in zip(rows, labels):
        pair = {key: row[key] for key in ("prompt", "prompt_ids", "about")} | {key: label[key] for key in ("rating", "safety")}
        for side in ("chosen", "rejected"):
            i = label[side]
            pair |= {side: row["responses"][i], f"{side}_ids": row["response_ids"][i], f"{side}_by": row["variants"][i]}
        pairs.append(pair)
    kept = [pair for pair in pairs if not unusable(pair)]
    write_jsonl(file, kept)
    dropped = Counter(filter(None, map(unusable, pairs)))
    print(f"{file}: {len(kept):,} comparisons" + "".join(f", {n} dropped ({why})" for why, n in dropped.items()))


# ---------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Stats:
    """Count comparisons as Table 6 does, and their ratings as Figure 25 does."""
    files: tuple[str, ...] = ("out/preferences/helpfulness.jsonl", "out/preferences/safety.jsonl")  # files of comparisons
    tokenizer: str = "out/sft/tokenizer.model"  # tokenizer that counts

    BY_PRESET: ClassVar[dict[str, dict]] = {}
    POSITIONAL: ClassVar[str] = "files"


def stats(settings: Stats) -> None:
    """Print the means of Table 6 of each file, and the shares of ratings (Figure 25) and of safety bins (§3.2.1).

    An example is a dialogue with one of its two responses; a turn is a prompt and its response (our reading).
    """
    tokenizer = Tokenizer(settings.tokenizer)
    print(f"{'comparisons of':40} {'number':>9} {'turns':>6} {'tokens an example':>18} {'of a prompt':>12} {'of a response':>14}")
    for file in settings.files:
        pairs, turns, examples, prompts, responses = read_named((file,)), [], [], [], []
        for pair in pairs:
            asked = [message["content"] for message in pair["prompt"] if message["role"] == "user"]
            said = [message["content"] for message in pair["prompt"] if message["role"] != "user"]
            texts = [*asked, *said, pair["chosen"], pair["rejected"]]
            lengths = [len(ids) for ids in tokenizer.encode(texts, bos=False, eos=False)]
            turns.append(len(asked))
            prompts += lengths[: len(asked)]
            responses += lengths[-2:]
            examples.append(sum(lengths[:-2]) + sum(lengths[-2:]) / 2)
        print(f"{file:40} {len(pairs):9,} {np.mean(turns):6.1f} {np.mean(examples):18.1f} {np.mean(prompts):12.1f} "
              f"{np.mean(responses):14.1f}")
        for key, groups in (("rating", RATINGS), ("safety", SAFETY)):
            counts = Counter(pair[key] or "none" for pair in pairs)
            shares = [f"{name} {counts[name] / len(pairs):.1%}" for name in (*groups, "none") if counts[name]]
            if set(counts) != {"none"}:
                print(f"  {key}: " + ", ".join(shares))


# ---------------------------------------------------------------------------------------------- losses


def margin_ranking_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """-log σ(r_c - r_r - m(r)), the mean over pairs (§3.2.2, eq. 2); with margin 0 it is eq. 1.

    chosen, rejected: (pairs,) raw scores, before any sigmoid. margin: (pairs,), 0 for unrated pairs.
    """
    return -F.logsigmoid(chosen - rejected - margin).mean()


def safety_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-log σ(r) of a safe answer, -log σ(-r) of an unsafe one, 0 without a label; the mean over answers (A.3.4).

    scores: (answers,) raw scores. labels: (answers,), 1 safe, -1 unsafe, 0 unknown. The paper names the loss and its
    effect (Table 29), but prints no formula: this one is our choice.
    """
    return -(F.logsigmoid(labels * scores) * labels.abs()).mean()


# ---------------------------------------------------------------------------------------------- the model


class ScalarHead(nn.Linear):
    """A head that computes in fp32: in bf16 scores between 4 and 8 would be 1/32 apart, and unlike answers would tie."""

    def forward(self, h: Tensor) -> Tensor:
        """h: (..., dim) → (..., 1)."""
        return F.linear(h.float(), self.weight.float(), self.bias.float())


class RewardModel(Transformer):
    """A chat model whose next-token head is replaced by a scalar regression head (§3.2.2). There is no dropout."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__(config, seed)
        self.output = ScalarHead(config.dim, 1)
        if not self.output.weight.is_meta:
            with torch.no_grad():
                for p in self.output.parameters():
                    p.copy_(head_weight(p.shape, seed, p.device))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The raw score of each row, in fp32: (rows,), read at the last of its tokens.

        tokens: (rows, seq) ids, prompt and answer, filled up on the right with any id. lengths: (rows,), tokens that are real.
        """
        scores = super().forward(tokens)[..., 0]  # (rows, seq)
        return scores[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (rows,)


def load_judge(folder: str, ranks: Ranks) -> RewardModel:
    """The reward model of a folder, whole, on this rank's device."""
    return load_weights(*stored_weights(folder), sampling_dtype(ranks), RewardModel).to(ranks.device).eval()


def head_weight(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """The head before training: weights N(0, 1/(dim + 1)), standard deviation 1/√(dim + 1); bias 0 (our choice, OpenAI's)."""
    if len(shape) == 1:
        return torch.zeros(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} reward head".encode()))
    return torch.randn(shape, generator=generator, device=device) / math.sqrt(shape[1] + 1)


@torch.no_grad()
def score_rows(model: nn.Module, rows: list[list[int]], batch_tokens: int = 2**14, ranks: Ranks | None = None) -> np.ndarray:
    """The raw score of each row of ids (prompt and answer): (rows,). Batches are made by length.

    With ranks, the batches are dealt to them and every rank gets all scores.
    """
    device = ranks.device if ranks else model.output.weight.device
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    unique = list(dict.fromkeys(map(tuple, rows)))  # of samples, many are equal
    batches = by_length([len(row) for row in unique], batch_tokens)
    scores = torch.zeros(len(unique), dtype=torch.double, device=device)
    for first in range(0, len(batches), world_size):  # every rank does equally many forward passes
        batch = batches[first + rank] if first + rank < len(batches) else []
        tokens, lengths = padded([unique[i] for i in batch] or [(0,)])
        found = model(tokens.to(device), lengths.to(device)).double()  # (batch,)
        scores[batch] = found[: len(batch)]
    if ranks:
        model.reshard()  # without a backward pass the root would stay whole
        dist.all_reduce(scores)
    places = {row: i for i, row in enumerate(unique)}
    return scores.cpu().numpy()[[places[tuple(row)] for row in rows]]


def by_length(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """The numbers of rows of these lengths in batches of at most `batch_tokens` with the padding, the short rows first."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[i] * (len(batches[-1]) + 1) > batch_tokens and batches[-1]:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens (rows, seq), filled up on the right with 0, and their lengths (rows,)."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), torch.tensor([len(row) for row in rows])


# ---------------------------------------------------------------------------------------------- comparisons


def read_pairs(files: tuple[str, ...]) -> tuple[list[dict], Counter]:
    """The comparisons of files in any known format, and how many were dropped, by reason.

    A comparison is {"prompt": messages, "chosen", "rejected", "rating" or None, "safety" or None, ...}; token ids and
    what else a row knows stay with it. Known are plain rows (see above), Anthropic's transcripts, the "conversations"
    of LLaMA-Factory, and {"prompt", "responses", "scores"}, of which every two responses with different scores make a
    pair. Dropped are pairs whose chosen answer is unsafe and whose other one is safe (§3.2.1), and pairs of equal
    answers (our choice). Raises InputError naming file and line of a bad row.
    """
    pairs, dropped = [], Counter()
    for file in files:
        for place, record in read_rows(file):
            try:
                found = comparisons(record)
            except InputError as error:
                raise InputError(f"{place}: {error}; mend or drop the row") from None
            pairs += [pair for pair in found if not unusable(pair)]
            dropped.update(filter(None, map(unusable, found)))
    return pairs, dropped


def unusable(pair: dict) -> str:
    """Why a comparison is dropped; empty if it is not."""
    if pair["safety"] == "excluded":
        return "chosen unsafe, other safe"
    return "equal answers" if pair["chosen"] == pair["rejected"] else ""


def comparisons(record: object) -> list[dict]:
    """The comparisons that one row of a file makes; InputError says what is wrong with it."""
    if isinstance(record, InputError):  # the line is no JSON
        raise record
    if not isinstance(record, dict):
        raise InputError("is no JSON object")
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if "conversations" in record:  # LLaMA-Factory
        messages = messages_of(record)
        chosen, rejected = (side.get("value") if isinstance(side, dict) else None for side in (chosen, rejected))
    elif "prompt" in record:
        messages = prompt_messages(record)
    elif isinstance(chosen, str) and isinstance(rejected, str):  # Anthropic
        (*messages, chosen), (*other, rejected) = read_transcript(chosen), read_transcript(rejected)
        if messages != other:
            raise InputError("the two transcripts differ before their last answers")
        chosen, rejected = chosen["content"], rejected["content"]
    else:
        raise InputError('has no "prompt", no "conversations", and no two transcripts')
    if dialog_turns(messages, escape=True)[-1][1] is not None:
        raise InputError("the prompt must end with a message of the user")
    if "responses" in record:
        return [{"prompt": messages, "chosen": better, "rejected": worse, "rating": None, "safety": None}
                for better, worse in ordered(record)]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise InputError('"chosen" and "rejected" must both be text')
    ids = [record.get(f"{part}_ids") for part in ("prompt", "chosen", "rejected")]
    if ids != [None] * 3 and not all(map(are_ids, ids)):
        raise InputError('"prompt_ids", "chosen_ids" and "rejected_ids" must be three lists of token ids, or all be left out')
    if not isinstance(record.get("about", {}), dict):
        raise InputError('"about" must be an object')
    rating, safety = record.get("rating"), record.get("safety")
    if rating not in (None, *RATINGS):
        raise InputError(f"the rating {rating!r} is unknown; take one of {', '.join(RATINGS)}, or leave it out")
    if safety not in (None, *SAFETY, "excluded"):
        raise InputError(f"the safety label {safety!r} is unknown; take one of {', '.join(SAFETY)}, excluded, or leave it out")
    return [record | {"prompt": messages, "chosen": chosen, "rejected": rejected, "rating": rating, "safety": safety}]


def read_transcript(text: str) -> list[dict]:
    """Anthropic's "\n\nHuman: ...\n\nAssistant: ..." as messages; two of one speaker in a row are joined."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    messages: list[dict] = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        role = {"Human": "user", "Assistant": "assistant"}[speaker]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + said.strip()
        else:
            messages.append({"role": role, "content": said.strip()})
    if before.strip() or not messages or messages[-1]["role"] != "assistant":
        raise InputError('a transcript begins with "\\n\\nHuman:" and ends with an answer of the "\\n\\nAssistant:"')
    return messages


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def ordered(record: dict) -> list[tuple[str, str]]:
    """Every two responses of different scores, the better one first."""
    responses, scores = record["responses"], record.get("scores")
    if not (isinstance(responses, list) and isinstance(scores, list) and len(responses) == len(scores)
            and all(isinstance(r, str) for r in responses)
            and all(map(is_number, scores))):
        raise InputError('"responses" must be a list of texts, and "scores" as long a list of numbers')
    ranked = sorted(zip(scores, responses), key=lambda pair: -pair[0])
    return [(better, worse) for (high, better), (low, worse) in combinations(ranked, 2) if high > low]


class Pair(NamedTuple):
    """A comparison as a reward model reads it: ids of dialogue and answer, the margin of its rating, its safety labels."""
    chosen: list[int]
    rejected: list[int]
    margin: float
    labels: tuple[int, int]  # of chosen and rejected: 1 safe, -1 unsafe, 0 unknown

    @property
    def length(self) -> int:
        """Tokens of the longer of the two."""
        return max(len(self.chosen), len(self.rejected))


def encode_pairs(pairs: list[dict], tokenizer: Tokenizer, seq_len: int, margin: str) -> tuple[list[dict], list[Pair], int]:
    """The comparisons that fit into seq_len, the same in ids, and how many did not fit.

    Sampled ids are kept as they are; text is put into the chat format, tags in it escaped. A dialogue that is too long
    loses its beginning, the same part for both answers; a pair with an answer that leaves no room for a token of its
    dialogue is dropped (our choices).
    """
    kept, encoded = [], []
    for pair in pairs:
        prompt, answers = pair_ids(pair, tokenizer)
        cut = max(0, len(prompt) + max(map(len, answers)) - seq_len)
        if cut < len(prompt):
            chosen, rejected = (prompt[cut:] + answer for answer in answers)
            encoded.append(Pair(chosen, rejected, MARGINS[margin].get(pair["rating"], 0.0), SAFETY.get(pair["safety"], (0, 0))))
            kept.append(pair)
    return kept, encoded, len(pairs) - len(kept)


def pair_ids(pair: dict, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """Ids of the dialogue and of its two answers, the sampled ones if the comparison has them.

    EOS ends an answer, but for a sampled one that was cut off."""
    if pair.get("chosen_ids"):
        ids = [pair[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")]
        if max(map(max, ids)) >= tokenizer.vocab_size:
            raise InputError(f"a comparison holds the token id {max(map(max, ids))}, outside the vocabulary of "
                             f"{tokenizer.vocab_size}; was it sampled with another tokenizer?")
        return ids[0], ids[1:]
    prompt = tokenizer.encode_dialog(pair["prompt"], escape=True)[0]
    return prompt, [answer_ids(pair["prompt"], pair[side], tokenizer) for side in ("chosen", "rejected")]


def answer_ids(messages: list[dict], text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of an answer to a dialogue in the chat format, EOS included; an empty one has little more than that."""
    question, _ = dialog_turns(messages, escape=True)[-1]
    ids, is_answer = tokenizer.encode_turn(question, escape_tags(text))
    return [token for token, mine in zip(ids, is_answer) if mine]


# ---------------------------------------------------------------------------------------------- mixes and batches


def held_out(pairs: list[dict]) -> tuple[list[dict], list[dict]]:
    """(for training, for testing): all pairs of one prompt in twenty are for testing (our choice)."""
    is_test = [zlib.crc32(json.dumps(pair["prompt"]).encode()) % 20 == 0 for pair in pairs]
    return [p for p, test in zip(pairs, is_test) if not test], [p for p, test in zip(pairs, is_test) if test]


def mix(kind: str, own: list, rest: list, seed: int) -> list:
    """What of the rest a reward model is trained on beside its own comparisons (§3.2.2, "Data Composition").

    helpfulness: as much as its own, if there is so much. safety: a tenth of the whole. joint: all of it.
    """
    n = {"helpfulness": len(own), "safety": round(len(own) / 9)}.get(kind, len(rest))
    return Random(f"{seed}/mix").sample(rest, min(n, len(rest)))


def batch_at(pairs: list[Pair], step: int, batch_size: int, micro_batch: int, seed: int, ranks: Ranks) -> list[list[Tensor]]:
    """This rank's micro-batches of a step. The pairs of a step are dealt out by length, so that little is padding.

    All ranks get equally many; one that is left over holds no real pair.
    """
    numbers = permute(np.arange(step * batch_size, min((step + 1) * batch_size, len(pairs))), len(pairs), seed)
    found = sorted((pairs[i] for i in numbers), key=lambda pair: pair.length)
    groups = [found[i : i + micro_batch] for i in range(0, len(found), micro_batch)]
    groups += [[]] * (-len(groups) % ranks.world_size)
    return [collate(group) for group in groups[ranks.rank :: ranks.world_size]]


def collate(pairs: list[Pair]) -> list[Tensor]:
    """Pairs as tensors: tokens (2 · pairs, seq), all chosen before all rejected, lengths, labels (2 · pairs,), margins (pairs,),
    and how many pairs are real: all, or 0 of one that stands in for none."""
    found = pairs or [Pair([0], [0], 0.0, (0, 0))]
    tokens, lengths = padded([pair.chosen for pair in found] + [pair.rejected for pair in found])
    labels = torch.tensor([pair.labels for pair in found], dtype=torch.float).T.flatten()
    return [tokens, lengths, labels, torch.tensor([pair.margin for pair in found]), torch.tensor(len(pairs))]


def reward_loss(model: nn.Module, batch: list[Tensor], safety_aux: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, ranking + safety_aux · safety, summed over its pairs; their number; sums to log.

    Chosen and rejected answers go through the model in one forward pass.
    """
    tokens, lengths, labels, margins, n = batch
    scores = model(tokens, lengths)  # (2 · pairs,)
    chosen, rejected = scores.chunk(2)  # (pairs,) each
    ranking, safety = margin_ranking_loss(chosen, rejected, margins), safety_loss(scores, labels)
    logs = {"ranking": ranking.detach(), "safety": safety.detach(), "accuracy": (chosen > rejected).float().mean()}
    return n * (ranking + safety_aux * safety), n, {name: n * value for name, value in logs.items()}


# ---------------------------------------------------------------------------------------------- training


def test_file(file: str) -> str:
    """The held-out comparisons beside a file: NAME-test.jsonl of NAME.jsonl."""
    stem, dot, ending = Path(file).name.partition(".")
    return str(Path(file).with_name(f"{stem}-test{dot}{ending}"))


def read_named(files: tuple[str, ...]) -> list[dict]:
    """The comparisons of files, with a line on what was dropped; InputError if a file is missing."""
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{file}: there is no such file; `python reward.py collect` makes comparisons of the tiny world")
    pairs, dropped = read_pairs(files)
    if files and not pairs:
        raise InputError(f"{', '.join(files)}: no comparison is left, of {dropped.total()}; give others")
    if dropped and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"{', '.join(files)}: dropped " + ", ".join(f"{n} ({why})" for why, n in dropped.items()))
    return pairs


def training_data(settings: Settings) -> tuple[list[dict], list[dict], list[dict]]:
    """(its own comparisons, those mixed in from the rest, held-out ones of its own kind) for a reward model."""
    own, rest, tested = read_named(settings.data), read_named(settings.rest), read_named(settings.test)
    if not settings.test:
        (own, tested), (rest, _) = held_out(own), held_out(rest)  # of the rest too: both kinds may compare the same prompts
    return own, mix(settings.kind, own, rest, settings.seed), tested


def main(settings: Settings) -> None:
    """Train one reward model (§3.2.2): comparisons → mix → one epoch → accuracy by rating on held-out prompts."""
    if settings.kind not in ("helpfulness", "safety", "joint"):
        raise InputError(f"--kind {settings.kind} is unknown; take helpfulness, safety or joint")
    if settings.margin not in MARGINS:
        raise InputError(f"--margin {settings.margin} is unknown; take {', '.join(MARGINS)}")
    if settings.safety_aux is None:
        settings = replace(settings, safety_aux=0.0 if settings.kind == "helpfulness" else 3.0)
    if not settings.data:
        files = [f"out/preferences/{kind}.jsonl" for kind in ("helpfulness", "safety")]
        own = [file for file in files if settings.kind in (Path(file).stem, "joint")]
        settings = replace(settings, data=tuple(own), rest=settings.rest or tuple(file for file in files if file not in own))
    test = settings.test or tuple(test_file(file) for file in settings.data if Path(test_file(file)).is_file())
    settings = replace(settings, out=settings.out or f"out/reward-{settings.kind}", test=test)
    parent = parent_of(settings.init)
    config, tokenizer = parent.config, Tokenizer(parent.tokenizer)
    if settings.seq_len > config.max_seq_len:
        raise InputError(f"--seq_len {settings.seq_len} is longer than the model's context; take {config.max_seq_len} at most")
    ranks = start(settings)
    with locked(settings.out, ranks):
        out = Path(settings.out)
        own, mixed_in, tested = training_data(settings)
        files = {file: file_fingerprint(file) for file in (*settings.data, *settings.rest, *settings.test)}
        encode = partial(encode_pairs, tokenizer=tokenizer, seq_len=settings.seq_len, margin=settings.margin)
        _, pairs, long = encode(own + mixed_in)
        tested, test_pairs, test_long = encode(tested)
        if not pairs or not tested:
            raise InputError(f"there is no comparison left to {'train' if not pairs else 'test'} on")
        n = min(len(pairs), settings.pairs or len(pairs))
        pairs = [pairs[i] for i in permute(np.arange(n), len(pairs), settings.seed)]
        steps = min(math.ceil(n / settings.batch_size), settings.steps or sys.maxsize)
        record = open_run(settings, "reward", ranks, data=files, parent=settings.init, parent_fingerprint=parent.fingerprint)
        if settings.warmup is None:
            settings = replace(settings, warmup=max(5, round(0.03 * steps)))
        model = build(config, settings, ranks, RewardModel)
        parent.fill(model, skip=HEAD)
        set_weights(model.output, lambda name, shape: head_weight(shape, settings.seed, ranks.device))
        if ranks.rank == 0:
            replace_file(out / "tokenizer.model", Path(parent.tokenizer).read_bytes())
            replace_file(out / "config.json", json.dumps(record | {"model": asdict(config), "pairs": n}, indent=1).encode())
            share = len(mixed_in) / len(own + mixed_in)
            print(f"{n:,} pairs ({settings.kind} {1 - share:.0%}, rest {share:.0%}), {steps:,} steps, {len(tested):,} held-out "
                  f"pairs, {long + test_long} dropped as too long, {ranks.world_size} rank{'s' * (ranks.world_size > 1)} on "
                  f"{ranks.device.type}")
            print_settings(settings)

        # Differences leave a score without a zero (eq. 1). The safety loss gives it one; else one shift, which is kept in the
        # bias, puts it at the mean of the held-out answers (our choice).
        has_zero = settings.safety_aux > 0 and any(any(pair.labels) for pair in pairs)

        def measure_held_out(step: int) -> dict:
            scores, lengths = score_pairs(model, test_pairs, ranks)
            if step == steps and not has_zero:
                scores = centre(model, scores)
            found = measure(scores, tested, lengths)
            if ranks.rank == 0:
                replace_file(out / "accuracy.json", json.dumps(found).encode())
            chosen, rejected = torch.from_numpy(scores).T  # (pairs,) each
            loss = margin_ranking_loss(chosen, rejected, torch.tensor([pair.margin for pair in test_pairs]))
            accuracies = {f"accuracy/{group}": mean for group, (_, mean, _, _) in found["accuracy"].items()}
            return {f"loss/{settings.kind}": loss.item(), **accuracies, "spread": float(scores.std())}

        loss_fn = partial(reward_loss, safety_aux=settings.safety_aux)
        batches = partial(batch_at, pairs, batch_size=settings.batch_size, micro_batch=settings.micro_batch, seed=settings.seed,
                          ranks=ranks)
        train(model, adamw(model, settings.weight_decay, settings.adam_eps), batches, loss_fn, settings, ranks, steps,
              measure_held_out)
        if ranks.rank == 0:
            print_measures({f"{settings.kind}, held-out prompts": json.loads((out / "accuracy.json").read_text())})
            print(f"model and metrics are in {out}")


# ---------------------------------------------------------------------------------------------- evaluation


def centre(model: RewardModel, scores: np.ndarray) -> np.ndarray:
    """Shift a reward model's bias so that the mean of these scores is 0, and return them: eq. 1 leaves it open (our choice)."""
    with torch.no_grad():
        model.output.bias.sub_(scores.mean())
    return scores - scores.mean()


def score_pairs(model: nn.Module, pairs: list[Pair], ranks: Ranks | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores, and lengths in tokens, of dialogue and answer: each (pairs, {chosen, rejected})."""
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    return score_rows(model, rows, ranks=ranks).reshape(-1, 2), np.array([len(row) for row in rows]).reshape(-1, 2)


def accuracy(right: np.ndarray, prompts: np.ndarray) -> tuple[float, float, float]:
    """The share that is right, and its 95 % interval by a bootstrap over prompts, whose pairs are alike: (mean, low, high)."""
    _, which = np.unique(prompts, return_inverse=True)
    return interval(np.bincount(which, right), np.bincount(which))


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, int]:
    """How often `ours` is the better of two answers to a prompt: (wins / (wins + losses), low, high, ties).

    ours, theirs: (prompts,) scores. Ties are left out, as in Figure 2; low and high are the 95 % interval. Without
    a single decided prompt it is (0.5, 0, 1, ties).
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    decided = ours != theirs
    ties = int((~decided).sum())
    return (*(interval(ours[decided] > theirs[decided]) if decided.any() else (0.5, 0.0, 1.0)), ties)


def trend(right: np.ndarray, level: np.ndarray) -> tuple[float, float]:
    """Does the share that is right rise with the level? Cochran and Armitage's test: (z, two-sided p).

    right: (pairs,) 0 or 1. level: (pairs,) numbers, here 3 for significantly better down to 0.
    """
    right, away = np.asarray(right, float), level - np.mean(level)
    spread = right.mean() * (1 - right.mean()) * (away**2).sum()
    z = (right * away).sum() / math.sqrt(spread) if spread else 0.0
    return z, math.erfc(abs(z) / math.sqrt(2))


def measure(scores: np.ndarray, pairs: list[dict], lengths: np.ndarray) -> dict:
    """What Tables 7, 8 and 29 say of a model on a test set: {"accuracy": {group: [n, mean, low, high]}, ...}.

    scores: (pairs, {chosen, rejected}) raw. lengths: the same, in tokens of dialogue and answer. Equal scores count as wrong. The
    groups are all, the ratings, and the safety bins; "longer" judges by length alone (equal ones by coin), "recall" is
    the share of unsafe answers below 0.5 after the sigmoid, "trend" says whether accuracy rises with the rating.
    """
    right, prompts = scores[:, 0] > scores[:, 1], np.array([json.dumps(pair["prompt"]) for pair in pairs])
    found = {}
    for group in ("all", *RATINGS, *SAFETY):
        mine = np.array([group in ("all", pair["rating"], pair["safety"]) for pair in pairs])
        if mine.any():
            found[group] = [int(mine.sum()), *accuracy(right[mine], prompts[mine])]
    result = {"accuracy": found, "longer": float((np.sign(lengths[:, 0] - lengths[:, 1]) / 2 + 0.5).mean())}
    level = np.array([RATINGS[::-1].index(pair["rating"]) if pair["rating"] else -1 for pair in pairs])
    if (level >= 0).any():
        result["trend"] = trend(right[level >= 0], level[level >= 0])
    is_unsafe = safety_labels(pairs) < 0
    if is_unsafe.any():
        result["recall"] = float((scores[is_unsafe] < 0).mean())
    return result


def safety_labels(pairs: list[dict]) -> np.ndarray:
    """1 of a safe answer, -1 of an unsafe one, 0 where nobody said: (pairs, {chosen, rejected})."""
    return np.array([SAFETY.get(pair["safety"], (0, 0)) for pair in pairs])


def print_measures(measures: dict[str, dict]) -> None:
    """A line for each model on a test set: accuracy in percent over all (with its interval) and by group, and the rest."""
    groups = [group for group in (*RATINGS, *SAFETY) if any(group in found["accuracy"] for found in measures.values())]
    titles = [group.removesuffix(" better")[:11] for group in groups] + ["longer", "recall"]
    print(f"{'accuracy in %':36} {'all':>5} 95 % interval" + "".join(f"{title:>12}" for title in titles))
    for name, found in measures.items():
        _, mean, low, high = found["accuracy"]["all"]
        cells = [found["accuracy"].get(group, [0, None])[1] for group in groups] + [found["longer"], found.get("recall")]
        print(f"{name:36} {100 * mean:5.1f} {100 * low:5.1f} … {100 * high:5.1f}"
              + "".join(f"{'-' if cell is None else f'{100 * cell:.1f}':>12}" for cell in cells))


@dataclass(frozen=True)
class Eval:
    """Compare reward models on both test sets: Tables 7, 8 and 29, Figures 6, 27, 29 and 32."""
    runs: tuple[str, ...] = ("out/reward-helpfulness", "out/reward-safety")  # reward models
    helpfulness: tuple[str, ...] = ("out/preferences/helpfulness-test.jsonl",)  # held-out comparisons by helpfulness
    safety: tuple[str, ...] = ("out/preferences/safety-test.jsonl",)  # held-out comparisons by safety
    out: str = "out/rewards"  # folder of the tables and pictures
    device: str = "auto"  # cpu, cuda, or auto

    BY_PRESET: ClassVar[dict[str, dict]] = {}
    POSITIONAL: ClassVar[str] = "runs"


def evaluate(settings: Eval) -> None:
    """Print accuracies of every model on every test set, and draw the paper's figures into --out."""
    claim(settings.out, "rewards")
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    tests = {name: read_named(files) for name, files in (("helpfulness", settings.helpfulness), ("safety", settings.safety))}
    configs, judged, measures = {}, {}, {}
    for run in settings.runs:
        model, tokenizer, configs[run] = load_model(run, RewardModel)
        if configs[run]["stage"] != "reward":
            raise InputError(f"{run}: was not made by `python reward.py`; name reward models")
        model.to(device)
        for test, pairs in tests.items():
            pairs, encoded, _ = encode_pairs(pairs, tokenizer, model.config.max_seq_len, "none")
            if not pairs:
                raise InputError(f"--{test}: no comparison fits the context of {run}; give shorter ones")
            scores, lengths = score_pairs(model, encoded)
            judged[run, test], measures[f"{run} on {test}"] = (pairs, scores), measure(scores, pairs, lengths)
    print_measures(measures)
    for name, found in measures.items():
        if "trend" in found:
            print("{}: trend of the accuracy with the rating, z = {:.1f}, p = {:.2g}".format(name, *found["trend"]))
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    draw(judged, configs, measures, out)
    replace_file(out / "rewards.json", json.dumps(measures, indent=1).encode())
    write_config(settings, "rewards")


def true_scores(pairs: list[dict], axis: str) -> np.ndarray | None:
    """What the rules of the tiny world say of both answers, without noise: (pairs, 2); None if the pairs are not of it."""
    if not all("slots" in pair.get("about", {}) for pair in pairs):
        return None
    rule = {"helpfulness": toy.helpfulness, "safety": toy.safety}[axis]
    try:
        return np.array([[rule(tiny_world(pair["about"]["world"]), pair["about"], pair[side]) for side in ("chosen", "rejected")]
                         for pair in pairs])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f'an "about" with "slots" is no prompt of the tiny world ({error!r:.60}); leave it out') from None


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Scores in (0, 1), as the paper draws them."""
    return 1 / (1 + np.exp(-scores))


@contextmanager
def picture(path: Path, title: str, xlabel: str, ylabel: str) -> Iterator:
    """Axes to draw on; the picture is written when the block ends."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    yield axes
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def whiskers(axes, x: list[float], intervals: list[tuple], colour: str, label: str) -> None:
    """Means with their 95 % intervals, joined by a line. intervals: (mean, low, high) of each x."""
    mean, low, high = np.array(intervals).T
    axes.errorbar(x, mean, [mean - low, high - mean], fmt="o-", ms=4, capsize=2, color=colour, label=label)


def draw(judged: dict, configs: dict, measures: dict, out: Path) -> None:
    """The pictures: histograms, calibration, accuracy by data and model size, and the tension between two models."""
    if not can_draw():
        return
    kinds = {run: config["settings"]["kind"] for run, config in configs.items()}
    own = {run: "safety" if kind == "safety" else "helpfulness" for run, kind in kinds.items()}
    colours = dict(zip(kinds, cycle(COLOURS)))

    with picture(out / "scores.png", "Scores on the own test set (Figure 27)", "score after the sigmoid", "density") as axes:
        for run in kinds:
            axes.hist(sigmoid(judged[run, own[run]][1].ravel()), np.linspace(0, 1, 51), density=True, histtype="step",
                      color=colours[run], label=f"{run}, margin {configs[run]['settings']['margin']}")

    with picture(out / "calibration.png", "Calibration (Figure 29)", "true score, tenths of the answers", "mean score") as axes:
        for run in kinds:
            pairs, scores = judged[run, own[run]]
            truth = true_scores(pairs, own[run])
            if truth is not None:
                tenths = np.array_split(np.argsort(truth.ravel(), kind="stable"), 10)
                whiskers(axes, [truth.ravel()[part].mean() for part in tenths],
                         [interval(sigmoid(scores.ravel()[part])) for part in tenths], colours[run], run)

    curves: dict[str, list] = {}
    for run, config in configs.items():
        _, *figures = measures[f"{run} on {own[run]}"]["accuracy"]["all"]
        curves.setdefault(f"{kinds[run]}, dim {config['model']['dim']}", []).append((config["pairs"], figures))
    if max(map(len, curves.values())) > 1:  # one point is no curve
        title, xlabel = "Data and model size (Figure 6)", "pairs to train on"
        with picture(out / "scaling.png", title, xlabel, "accuracy, own test set") as axes:
            for (name, points), colour in zip(curves.items(), cycle(COLOURS)):
                whiskers(axes, *zip(*sorted(points)), colour, name)
            axes.set_xscale("log")

    helper, guard = (next((run for run in kinds if kinds[run] == kind), None) for kind in ("helpfulness", "safety"))
    if helper and guard:
        pairs, x = judged[guard, "safety"]
        _, y = judged[helper, "safety"]
        title, labels = "Answers of the safety test set (Figure 32)", safety_labels(pairs)
        with picture(out / "tension.png", title, f"score of {guard}", f"score of {helper}") as axes:
            for label, name, colour in ((1, "safe answers", COLOURS[0]), (-1, "unsafe answers", COLOURS[1])):
                axes.scatter(sigmoid(x[labels == label]), sigmoid(y[labels == label]), s=4, alpha=0.4, color=colour, label=name)


# ---------------------------------------------------------------------------------------------- the command line

COMMANDS = {"collect": (collect, Collect), "stats": (stats, Stats), "eval": (evaluate, Eval)}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        command_line(*COMMANDS[sys.argv.pop(1)])
    else:
        command_line(main, Settings)
