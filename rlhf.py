"""Reinforcement learning from human feedback (§3.2.3): a chat model and two reward models in, a better chat model out.

    python rlhf.py --version 1                    # rejection sampling from out/sft; out/rlhf-v1
    python rlhf.py ppo --version 2                # PPO from out/rlhf-v2; out/rlhf-v2-ppo
    python rlhf.py curves out/sft out/rlhf-v1     # Figures 7 and 8: reward against the number of samples
    python rlhf.py --policy llama-2-70b-chat --init llama-2-7b-sft --prompts p.jsonl --data pool chats.jsonl:0.05

A version: the newest model answers each prompt K times, the reward models pick the best answer, and a model is fine-tuned on
the best answers of all versions so far. Which model, the paper leaves half open: it starts "again from the base model"
(§3.2.3). Here every version starts from the SFT model (our choice), which is the base model after the SFT data, and sees a
little of these data again; `--init out/pretrain --data toy pool:16` is the literal reading, and costs a whole SFT each time.
Sampling model and fine-tuned model need not have one size: the paper's smaller models learn from what the 70B sampled (the
last line above).

Read it in this order: the reward of §3.2.3, best of N, the pool, a version, curves, PPO.
"""
import importlib.util
import json
import math
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

import toy
from model import generate
from pretrain import (COLOURS, InputError, Ranks, build, command_line, file_fingerprint, interval, load_model, locked, open_run,
                      parent_of, replace_file, sources, start, tiny_world, world_of)
from reward import (RewardModel, Speaker, file_prompts, in_parts, load_speakers, pair_ids, picture, read_named, safety_labels,
                    score_rows, sigmoid, whiskers)
from sft import Tuning, fine_tune, read_dialogs, toy_messages, toy_sources
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------- settings


# The best answers, four times as often as a dialogue, with a little of what SFT learned from (our choice): without it sums and
# facts that no prompt asks are forgotten.
REPLAY = ("pool:4", "toy/dialogs:0.05", "toy/encyclopedia:0.02", "toy/numbers:0.02")


@dataclass(frozen=True)
class Settings(Tuning):
    """One version of RLHF by rejection sampling (§3.2.3): sample K answers, keep the best, fine-tune the base model."""
    version: int = 1  # number of this version; names --out, and where the defaults below are found
    init: str = "out/sft"  # model to fine-tune, of the size of the new version; the same for every version | the base model
    policy: str = ""  # chat model that samples; else out/sft for version 1, then the version before | the newest, 70B
    out: str = ""  # folder of this run, else out/rlhf-vN; started again, it goes on where it stopped
    helpfulness: str = "out/reward-helpfulness"  # reward model of helpfulness
    harmlessness: str = "out/reward-safety"  # reward model of safety
    threshold: float | None = None  # safety score below which an answer counts as unsafe; else chosen on --safety_test | 0.15
    safety_test: str = "out/preferences/safety-test.jsonl"  # held-out comparisons with safety labels, to choose the threshold on
    prompts: str = ""  # .jsonl of {"prompt": text or messages, "unsafe": bool}; else prompts of the tiny world
    n_prompts: int = 400  # prompts of the tiny world
    unsafe: float = 0.25  # share of unsafe ones among them, half of these attacked
    n_samples: int = 16  # K, answers to each prompt | not stated; 10 to 100 in the figures
    temperature: float = 0.6  # of the samples, tuned for each version (see `curves`) | 1.2 to 1.3 (RLHF models)
    max_new_tokens: int = 64  # longest answer; one that is cut off never wins
    sample_batch: int = 64  # prompts that are answered together and kept together: the unit of resume
    select: str = "best"  # best, or random: the matched control
    pool: str = "all"  # whose best answers are learned: of all versions so far, or the last alone | last until V3, then all
    data: tuple[str, ...] = REPLAY  # what to fine-tune on: dialogues as in sft.py; `pool`, `pool:4`: the best answers
    dialogs: int = 16000  # annotated dialogues of the tiny world
    safety: float = 0.06  # share of unsafe prompts among them

    BY_PRESET: ClassVar[dict[str, dict]] = {  # toy: a quarter of the rate of SFT, whose result shall be kept (our choice)
        name: values | ({"lr": values["lr"] / 4} if name.startswith("toy") else {}) for name, values in Tuning.BY_PRESET.items()
    }


# ---------------------------------------------------------------------------------------------- the reward


def combine_rewards(safety: np.ndarray, helpfulness: np.ndarray, is_safety: np.ndarray, threshold: float = 0.15) -> np.ndarray:
    """R_c of §3.2.3: the safety score if the prompt is tagged unsafe or that score is below the threshold, else helpfulness.

    safety, helpfulness: (answers,) scores in (0, 1), after a sigmoid. is_safety: (answers,) bool, whether the prompt of
    an answer is likely to draw unsafe ones. threshold: 0.15 in the paper, with precision .89 and recall .55.
    """
    return np.where(is_safety | (safety < threshold), safety, helpfulness)


def choose_threshold(safety: np.ndarray, is_unsafe: np.ndarray, precision: float = 0.89) -> tuple[float, float, float]:
    """The highest threshold under which so large a share of the answers is unsafe: (threshold, its precision, its recall).

    safety: (answers,) scores in (0, 1). is_unsafe: (answers,) bool. precision: §3.2.3 reports .89, and recall .55, of 0.15;
    to choose by it is our choice. If no threshold is as precise, the most precise one is taken.
    """
    order = np.argsort(safety, kind="stable")
    hits, n = np.cumsum(is_unsafe[order]), np.arange(1, len(safety) + 1)  # among the n lowest
    last = np.flatnonzero(np.diff(safety[order], append=np.inf) > 0)  # of equal scores, all or none are below
    enough = last[(hits / n)[last] >= precision]
    at = enough[-1] if len(enough) else last[np.argmax((hits / n)[last])]
    above = safety[order[at + 1]] if at + 1 < len(safety) else 1.0
    return float((safety[order[at]] + above) / 2), float(hits[at] / n[at]), float(hits[at] / hits[-1])


def load_reward(folder: str, settings, ranks: Ranks) -> RewardModel:
    """A reward model, sharded over the ranks and frozen."""
    parent = parent_of(folder)
    model = build(parent.config, settings, ranks, RewardModel)
    parent.fill(model)
    return model.eval().requires_grad_(False)


def toy_prompts(world: toy.World, n: int, seed: int, split: str = "train", unsafe: float = 0.25) -> list[dict]:
    """n distinct prompts of the tiny world, of which a share is unsafe, with or without an attack (our choice)."""
    found: dict[str, dict] = {}
    for kinds, wanted in ((["unsafe"], round(unsafe * n)), (None, n)):
        for prompt in toy.prompts(world, 4 * n, seed, split, kinds):  # there are few unsafe ones; if too few, harmless ones come
            if len(found) < wanted:
                found.setdefault(prompt["id"], prompt)
    prompts = list(found.values())
    Random(f"{seed}/rlhf").shuffle(prompts)
    return prompts


# ---------------------------------------------------------------------------------------------- best of N


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: an upper bound of the KL divergence, in nats, of best-of-n from its policy; reached without ties."""
    return math.log(n) - (n - 1) / n


def best_of_n(probabilities: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """The exact distribution of the best of n independent answers, with ties: (answers,), both arguments (answers,).

    An answer's share of its level of scores stays what it was: q(y) = p(y) / p(level) · (P(score ≤)ⁿ - P(score <)ⁿ).
    """
    levels, level = np.unique(scores, return_inverse=True)
    p = np.bincount(level, probabilities, len(levels))  # of each level
    upto = np.minimum(np.cumsum(p), 1.0)
    return probabilities / p[level] * (upto**n - (upto - p).clip(0) ** n)[level]


def best_scored(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The mean of `values` at the best-scored of n samples, over all choices of n of the K that were drawn: (prompts,).

    scores, values: (prompts, K). Of equal scores the earlier sample wins. With values = scores it is the expected maximum.
    """
    k = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(k, n) for i in range(k)])  # that the i-th lowest of K is the best of n
    ascending = np.argsort(-scores, axis=1, kind="stable")[:, ::-1]
    return np.take_along_axis(values, ascending, axis=1) @ weights


# ---------------------------------------------------------------------------------------------- samples and their scores


class Judges(NamedTuple):
    """The two reward models of §3.2.3, whole, on this rank's device."""
    helpfulness: RewardModel
    safety: RewardModel

    def score(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """(R_h, R_s) of rows of ids, prompt and answer: each (rows,), after a sigmoid."""
        return sigmoid(score_rows(self.helpfulness, rows)), sigmoid(score_rows(self.safety, rows))


def load_judges(helpfulness: str, safety: str, ranks: Ranks) -> Judges:
    """The reward models of two folders."""
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    return Judges(*(load_model(folder, RewardModel)[0].to(ranks.device, dtype).eval() for folder in (helpfulness, safety)))


def answer_all(speaker: Speaker, judges: Judges, prompts: list[dict], numbers: range, settings, seed: int,
               temperature: float) -> list[dict]:
    """K answers to each of the prompts with these numbers, and what the reward models say: one dictionary a prompt.

    What is drawn depends on a prompt's number, the seed and the models alone.
    """
    asked = [speaker.prompt_ids(toy_messages(prompts[i])) for i in numbers]
    drawn = generate(speaker.model, asked, settings.max_new_tokens, temperature, 1.0, (speaker.tokenizer.eos_id,), seed,
                     settings.n_samples, rows=numbers)
    r_h, r_s = judges.score([asked[j // settings.n_samples] + ids for j, ids in enumerate(drawn)])
    rows = []
    for j, (i, ids) in enumerate(zip(numbers, asked)):
        mine = slice(j * settings.n_samples, (j + 1) * settings.n_samples)
        rows.append({"number": i, "prompt_ids": ids, "response_ids": drawn[mine], "helpfulness": r_h[mine].tolist(),
                     "safety": r_s[mine].tolist()})
    return rows


def combined(rows: list[dict], prompts: list[dict], threshold: float, eos_id: int) -> np.ndarray:
    """R_c of all answers of `answer_all`: (prompts, K). An answer that was cut off has none: -inf, so that it never wins."""
    r_s, r_h = (np.array([row[name] for row in rows]) for name in ("safety", "helpfulness"))
    is_safety = np.array([[bool(prompts[row["number"]].get("unsafe"))] for row in rows])  # (prompts, 1)
    ended = np.array([[ids[-1:] == [eos_id] for ids in row["response_ids"]] for row in rows])
    return np.where(ended, combine_rewards(r_s, r_h, is_safety, threshold), -np.inf)


# ---------------------------------------------------------------------------------------------- the pool


def pick(scores: np.ndarray, select: str, seed: int) -> np.ndarray:
    """Which answer of each prompt is kept: (prompts,). scores: (prompts, K), -inf for one that may not be kept.

    best: the highest score, of equal ones the earliest. random: any, the control that has seen no score.
    """
    if select == "best":
        return scores.argmax(1)
    rng = np.random.default_rng(seed)
    return np.where(np.isfinite(scores), rng.random(scores.shape), -1.0).argmax(1)


def merge_pools(pools: list[list[dict]]) -> list[dict]:
    """One pool of several, oldest first: of two answers to one prompt (by id) the higher score stays, the newer if equal."""
    kept: dict[str, dict] = {}
    for row in (row for pool in pools for row in pool):
        if row["id"] not in kept or row["score"] >= kept[row["id"]]["score"]:
            kept[row["id"]] = row
    return list(kept.values())


def rescored(pool: list[dict], judges: Judges, threshold: float, names: list[str]) -> list[dict]:
    """The rows of an earlier pool with the scores of the newest reward models: those of two models can't be compared."""
    r_h, r_s = judges.score([row["prompt_ids"] + row["response_ids"] for row in pool])
    score = combine_rewards(r_s, r_h, np.array([row["unsafe"] for row in pool]), threshold)
    return [row | {"score": c, "helpfulness": h, "safety": s, "rewards": names}
            for row, c, h, s in zip(pool, score.tolist(), r_h.tolist(), r_s.tolist())]


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file of ours."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows, one JSON object a line."""
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


# ---------------------------------------------------------------------------------------------- a version


def main(settings: Settings) -> None:
    """One version: sample, score, keep the best, fine-tune."""
    if settings.select not in ("best", "random") or settings.pool not in ("all", "last"):
        raise InputError("--select is best or random, and --pool all or last")
    if settings.version < 1 or settings.n_samples < 1 or settings.n_prompts < 1:
        raise InputError("--version, --n_samples and --n_prompts must be at least 1")
    version = settings.version
    settings = replace(settings, out=settings.out or f"out/rlhf-v{version}",
                       policy=settings.policy or ("out/sft" if version == 1 else f"out/rlhf-v{version - 1}"))
    if settings.world is None:
        settings = replace(settings, world=world_of(settings.policy))
    names = [settings.policy, settings.helpfulness, settings.harmlessness]
    parents = {name: parent_of(name) for name in (settings.init, *names)}
    for name in (settings.init, *names[1:]):
        if Path(parents[name].tokenizer).read_bytes() != Path(parents[settings.policy].tokenizer).read_bytes():
            raise InputError(f"{name} has another tokenizer than {settings.policy}; their answers have no ids in common")
    ranks = start(settings)
    with locked(settings.out, ranks):
        out = Path(settings.out)
        earlier = [path for n in range(1, version) if (path := out.parent / f"rlhf-v{n}" / "best.jsonl").exists()]
        earlier *= settings.pool == "all"
        data = {name: parents[name].fingerprint for name in names} | {str(path): file_fingerprint(str(path)) for path in earlier}
        if settings.prompts:
            data[settings.prompts] = file_fingerprint(settings.prompts)
        specs, embedded = toy_sources(settings.data, settings.world, settings.dialogs, settings.safety)
        embedded["pool"] = partial(pool_rows, out / "pool.jsonl"), json.dumps([data, asdict(settings)], sort_keys=True)
        found = sources(specs, embedded, read_dialogs)
        data |= {source.name: source.fingerprint for source in found if source.name != "pool"}
        record = open_run(settings, "rlhf", ranks, data=data, parent=settings.init,
                          parent_fingerprint=parents[settings.init].fingerprint)
        if ranks.rank == 0:
            config = record | {"model": asdict(parents[settings.init].config)}
            replace_file(out / "config.json", json.dumps(config, indent=1).encode())
        make_pool(settings, ranks, earlier)
        is_toy = any(source.fingerprint == embedded["toy/dialogs"][1] for source in found)
        fine_tune(settings, record, parents[settings.init], found, ranks, tiny_world(settings.world) if is_toy else None)


def pool_rows(file: Path) -> Iterator[tuple[str, tuple[list[int], list[bool]]]]:
    """The answers of a pool as rows to learn from, in the ids that were sampled: only the answer is learned."""
    for row in read_jsonl(file):
        asked, said = row["prompt_ids"], row["response_ids"]
        yield str(file), (asked + said, [False] * len(asked) + [True] * len(said))


def make_pool(settings: Settings, ranks: Ranks, earlier: list[Path]) -> None:
    """Write OUT/best.jsonl, the best answers of this version, and OUT/pool.jsonl, those of all versions that are learned."""
    out, world = Path(settings.out), tiny_world(settings.world)
    prompts = file_prompts(settings.prompts) if settings.prompts else toy_prompts(
        world, settings.n_prompts, zlib.crc32(f"{settings.seed} version {settings.version}".encode()), unsafe=settings.unsafe)
    speaker = cache(lambda: load_speakers([settings.policy], ranks)[0])
    judges = cache(lambda: load_judges(settings.helpfulness, settings.harmlessness, ranks))
    if not settings.resume and ranks.rank == 0:
        (out / "pool.jsonl").unlink(missing_ok=True)
    seed = zlib.crc32(f"{settings.seed} answers {settings.version}".encode())

    def draw(numbers: range) -> list[dict]:
        return answer_all(speaker(), judges(), prompts, numbers, settings, seed, settings.temperature)

    rows = in_parts(out, "answers", len(prompts), settings.sample_batch, draw, ranks, settings.resume)
    if ranks.rank > 0 or (out / "pool.jsonl").exists():
        return
    threshold = settings.threshold
    if threshold is None:
        threshold, precision, recall = safety_threshold(settings, judges(), speaker().tokenizer)
        print(f"safety scores below {threshold:.3f} count as unsafe: precision {precision:.2f}, recall {recall:.2f} on "
              f"{settings.safety_test} (the paper: 0.15, .89, .55)")
    tokenizer = speaker().tokenizer
    scores = combined(rows, prompts, threshold, tokenizer.eos_id)  # (prompts, K)
    best, models = [], [settings.helpfulness, settings.harmlessness]
    for row, mine, k in zip(rows, scores, pick(scores, settings.select, settings.seed)):
        prompt, messages = prompts[row["number"]], toy_messages(prompts[row["number"]])
        if not np.isfinite(mine[k]):
            continue  # not one of its answers came to an end
        best.append({"id": prompt.get("id") or f"{zlib.crc32(json.dumps(messages).encode()):08x}", "prompt": messages,
                     "response": tokenizer.decode(row["response_ids"][k]).strip(), "unsafe": bool(prompt.get("unsafe")),
                     "score": mine[k], "helpfulness": row["helpfulness"][k], "safety": row["safety"][k],
                     "version": settings.version, "temperature": settings.temperature, "model": settings.policy,
                     "rewards": models, "prompt_ids": row["prompt_ids"], "response_ids": row["response_ids"][k]})
    old = [rescored(read_jsonl(path), judges(), threshold, models) for path in earlier]
    pool = merge_pools([*old, best])
    typical = np.array([np.median(mine[np.isfinite(mine)]) for mine in scores if np.isfinite(mine).any()])
    print(f"{len(prompts):,} prompts × {settings.n_samples} answers at temperature {settings.temperature} of {settings.policy}: "
          f"{np.isinf(scores).mean():.1%} cut off; R_c of the {settings.select} {np.mean([row['score'] for row in best]):.3f}, "
          f"median {typical.mean():.3f}; {len(pool):,} answers to learn from, {len(pool) - len(best):,} more than this version's")
    write_jsonl(out / "best.jsonl", best)
    write_jsonl(out / "pool.jsonl", pool)


def safety_threshold(settings, judges: Judges, tokenizer: Tokenizer) -> tuple[float, float, float]:
    """`choose_threshold` on the comparisons of --safety_test; InputError if none of their answers is labelled unsafe."""
    pairs = read_named((settings.safety_test,))
    labels = safety_labels(pairs).ravel()
    if not (labels < 0).any():
        raise InputError(f"{settings.safety_test}: no answer is labelled unsafe, so no threshold can be chosen; give --threshold")
    rows = [prompt + answer for prompt, answers in (pair_ids(pair, tokenizer) for pair in pairs) for answer in answers]
    scores = sigmoid(score_rows(judges.safety, rows))
    return choose_threshold(scores[labels != 0], labels[labels != 0] < 0)


# ---------------------------------------------------------------------------------------------- figures 7 and 8


@dataclass(frozen=True)
class Curves:
    """Reward against the number of samples, at several temperatures (Figures 7 and 8), and on the tiny world the truth."""
    runs: tuple[str, ...] = ("out/sft",)  # chat models that sample
    helpfulness: str = "out/reward-helpfulness"  # reward model of helpfulness
    harmlessness: str = "out/reward-safety"  # reward model of safety
    threshold: float = 0.15  # safety score below which an answer counts as unsafe | 0.15
    prompts: str = ""  # .jsonl of {"prompt": text or messages, "unsafe": bool}; else harmless held-out ones of the tiny world
    n_prompts: int = 100  # prompts of the tiny world
    n_samples: int = 16  # answers to each prompt | 100
    temperatures: tuple[str, ...] = ("0.4", "0.6", "0.8", "1.0", "1.2")  # of the samples | 0.6 to 1.5
    max_new_tokens: int = 64  # longest answer; one that is cut off never wins
    sample_batch: int = 50  # prompts that are answered together and kept together: the unit of resume
    out: str = "out/curves"  # folder of the table and the pictures
    world: int | None = None  # seed of the tiny world; by default that of the first run
    seed: int = 0  # seed of prompts and samples
    device: str = "auto"  # cpu, cuda, or auto
    threads: int = 0  # CPU threads of a rank; 0: its share of the cores
    replicas: int = 1  # not used here: every rank samples with a whole model
    resume: bool = True  # go on where the run in --out stopped

    BY_PRESET: ClassVar[dict[str, dict]] = {}
    POSITIONAL: ClassVar[str] = "runs"


def curves(settings: Curves) -> None:
    """Write OUT/curves.json and the pictures; print a table: of each run and temperature, what the best of N is worth."""
    if settings.world is None:
        settings = replace(settings, world=world_of(settings.runs[0]))
    ranks, models = start(settings), (*settings.runs, settings.helpfulness, settings.harmlessness)
    with locked(settings.out, ranks):
        out, world = Path(settings.out), tiny_world(settings.world)
        data = {folder: parent_of(folder).fingerprint for folder in models}
        data |= {settings.prompts: file_fingerprint(settings.prompts)} if settings.prompts else {}
        record = open_run(settings, "curves", ranks, data=data)
        if ranks.rank == 0:
            replace_file(out / "config.json", json.dumps(record | {"model": {}}, indent=1).encode())
        prompts = file_prompts(settings.prompts) if settings.prompts else toy_prompts(
            world, settings.n_prompts, settings.seed, "test", unsafe=0.0)
        judges, found = cache(lambda: load_judges(settings.helpfulness, settings.harmlessness, ranks)), []
        sizes = [2**i for i in range(settings.n_samples.bit_length()) if 2**i <= settings.n_samples]
        for number, run in enumerate(settings.runs):
            speaker = cache(lambda run=run: load_speakers([run], ranks)[0])
            for temperature in settings.temperatures:
                def draw(numbers: range, speaker=speaker, temperature=temperature) -> list[dict]:
                    return answer_all(speaker(), judges(), prompts, numbers, settings, settings.seed, float(temperature))

                name = f"{number}-{temperature}"
                rows = in_parts(out, name, len(prompts), settings.sample_batch, draw, ranks, settings.resume)
                if ranks.rank == 0:
                    truth = None if settings.prompts else true_helpfulness(world, prompts, rows, speaker().tokenizer)
                    scores = combined(rows, prompts, settings.threshold, speaker().tokenizer.eos_id)
                    found.append({"run": run, "temperature": float(temperature), "n": sizes} | gains(scores, truth, rows, sizes))
        if ranks.rank == 0:
            replace_file(out / "curves.json", json.dumps(found).encode())
            print_curves(found)
            draw_curves(found, out)


def true_helpfulness(world: toy.World, prompts: list[dict], rows: list[dict], tokenizer: Tokenizer) -> np.ndarray:
    """What the annotators think of all answers of `answer_all` to prompts of the tiny world: (prompts, K)."""
    said = lambda ids: tokenizer.decode(ids).strip()  # noqa: E731
    return np.array([[toy.helpfulness(world, prompts[row["number"]], said(ids)) for ids in row["response_ids"]] for row in rows])


def gains(scores: np.ndarray, truth: np.ndarray | None, rows: list[dict], sizes: list[int]) -> dict[str, list]:
    """Of the best of N, for each N: mean score and truth with intervals over prompts, and the KL divergence paid for it.

    scores, truth: (prompts, K). median: of all scores, which does not depend on N. kl: exact for the answers that were
    drawn, each as likely as it was often, so that equal answers and ties count; bound: log N - (N-1)/N.
    """
    scores = np.maximum(scores, 0.0)  # one that was cut off is worth nothing
    found = {"max": [interval(best_scored(scores, scores, n)) for n in sizes], "median": interval(np.median(scores, axis=1)),
             "bound": [best_of_n_kl(n) for n in sizes], "kl": []}
    if truth is not None:
        found["truth"] = [interval(best_scored(scores, truth, n)) for n in sizes]
    for n in sizes:
        paid = []
        for row, mine in zip(rows, scores):
            _, first, counts = np.unique([str(ids) for ids in row["response_ids"]], return_index=True, return_counts=True)
            p = counts / counts.sum()  # (distinct answers,)
            q = best_of_n(p, mine[first], n)
            paid.append(float(np.sum(q[q > 0] * np.log(q[q > 0] / p[q > 0]))))
        found["kl"].append(float(np.mean(paid)))
    return found


def print_curves(found: list[dict]) -> None:
    """The table of `curves`."""
    sizes = found[0]["n"]
    print(f"{'R_c of the best of N, its truth':36} T median" + "".join(f"{f'N = {n}':>14}" for n in sizes))
    for one in found:
        cells = [f"{one['max'][i][0]:.3f}" + (f", {one['truth'][i][0]:.3f}" if "truth" in one else "") for i in range(len(sizes))]
        print(f"{one['run']:33} {one['temperature']:4.1f} {one['median'][0]:6.3f}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"{'KL, nats: log N - (N-1)/N':45}" + "".join(f"{kl:14.3f}" for kl in found[0]["bound"]))
    for one in found:
        print(f"{'exact, with ties':40} {one['temperature']:4.1f}" + "".join(f"{kl:14.3f}" for kl in one["kl"]))


def draw_curves(found: list[dict], out: Path) -> None:
    """best-of-n.png (Figure 7) and temperatures-I.png for each run (Figure 8), with the truth dashed."""
    if not importlib.util.find_spec("matplotlib"):
        print("no pictures: `pip install matplotlib` draws them")
        return
    runs = list(dict.fromkeys(one["run"] for one in found))
    with picture(out / "best-of-n.png", "Best of N, each at its best temperature (Figure 7)", "N, samples", "R_c") as axes:
        for run, colour in zip(runs, cycle(COLOURS)):
            best = max((one for one in found if one["run"] == run), key=lambda one: one["max"][-1][0])
            whiskers(axes, best["n"], best["max"], colour, f"{run}, T = {best['temperature']}, highest")
            axes.axhline(best["median"][0], color=colour, ls=":", label="median")
        count_samples(axes, best["n"])
    for i, run in enumerate(runs):
        title = f"{run} (Figure 8); dashed: the truth"
        with picture(out / f"temperatures-{i}.png", title, "N, samples", "R_c of the best") as axes:
            for one, colour in zip((one for one in found if one["run"] == run), cycle(COLOURS)):
                whiskers(axes, one["n"], one["max"], colour, f"T = {one['temperature']}")
                if "truth" in one:
                    axes.plot(one["n"], [mean for mean, _, _ in one["truth"]], "--", color=colour)
            count_samples(axes, one["n"])


def count_samples(axes, sizes: list[int]) -> None:
    """Put 1, 2, 4 … on the x axis, each as far from the next."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))


# ---------------------------------------------------------------------------------------------- PPO


# ---------------------------------------------------------------------------------------------- the command line

COMMANDS = {"curves": (curves, Curves)}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        command_line(*COMMANDS[sys.argv.pop(1)])
    else:
        command_line(main, Settings)
