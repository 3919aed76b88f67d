"""Reinforcement learning from human feedback (§3.2.3): a chat model and two reward models in, a better chat model out.

    python rlhf.py --version 1                    # rejection sampling from out/sft; out/rlhf-v1
    python rlhf.py ppo --init out/rlhf-v2         # PPO; out/rlhf-v2-ppo
    python rlhf.py curves out/sft out/rlhf-v1     # Figures 7 and 8: reward against the number of samples
    python rlhf.py distill                        # safety context distillation (§4.2.4) of out/sft; out/distill
    python rlhf.py --policy llama-2-13b-chat --init llama-2-7b-sft --prompts p.jsonl --data pool chats.jsonl:0.05 \
        --max_new_tokens 1024

A version: the newest model answers each prompt K times, the reward models pick the best answer, and a model is fine-tuned on
the best answers of all versions so far. Which model, the paper leaves half open: it starts "again from the base model"
(§3.2.3). Here every version starts from the SFT model (our choice), which is the base model after the SFT data, and sees a
little of these data again; `--init out/pretrain --data toy pool:16` is the literal reading, and costs a whole SFT each time.
Sampling model and fine-tuned model need not have one size: the paper's smaller models learn from what the 70B sampled (as in
the last line above, with a model that fits one GPU in bf16).

Read it in this order: settings, the reward of §3.2.3, best of N, samples and their scores, the pool, a version, curves, PPO,
context distillation.
"""
import json
import math
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import chain, cycle
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import pretrain
import toy
from model import IGNORE, PRESETS, Transformer, generate
from pretrain import (COLOURS, Common, InputError, Mixture, Parent, Ranks, Source, adamw, build, can_draw, checkpoints,
                      command_line, compute_dtype, cosine_schedule, cpu_group, file_fingerprint, gathered, interval,
                      load_checkpoint, locked, log_samples, open_run, optimizer_step, parent_of, permute, prepare,
                      print_settings, rank_0_first, replace_file, rewind, save_checkpoint, set_weights, signals, sources,
                      spool_stdin, start, text_sources, tiny_world, world_of)
from reward import (HEAD, RewardModel, Speaker, encode_pairs, file_prompts, held_out, in_parts, load_judge, load_speaker,
                    padded, parents_of, picture, prompt_room, read_named, safety_labels, score_pairs, score_rows, sigmoid,
                    whiskers)
from sft import Tuning, check_seq_len, fine_tune, prompt_messages, read_dialogs, read_rows, toy_sources, write_jsonl
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------- settings

# The best answers, four times as often as a dialogue, with a little of what SFT learned from (our choice; the paper mixes in
# earlier samples). On the answers alone stories and borderline prompts lose a little more.
REPLAY = ("pool:4", "toy/dialogs:0.05", "toy/encyclopedia:0.02", "toy/numbers:0.02")


@dataclass(frozen=True)
class Settings(Tuning):
    """One version of RLHF by rejection sampling (§3.2.3): sample K answers, keep the best, fine-tune on them."""
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
    temperature: float = 0.6  # of the samples (see `curves`) | 1.2 to 1.3 (RLHF models)
    max_new_tokens: int = 64  # longest answer; one that is cut off never wins
    sample_batch: int = 64  # prompts that are answered together and kept together: the unit of resume
    select: str = "best"  # best, or random: the matched control
    pool: str = "all"  # whose best answers are learned: of all versions so far, or the last alone | last until V3, then all
    data: tuple[str, ...] = REPLAY  # what to fine-tune on: dialogues as in sft.py, a gatt.jsonl; `pool:4`: the best answers
    dialogs: int = 16000  # annotated dialogues of the tiny world
    safety: float = 0.06  # share of unsafe prompts among them

    BY_PRESET: ClassVar[dict[str, dict]] = {  # toy: a quarter of the rate of SFT, whose result shall be kept (our choice)
        name: values | ({"lr": values["lr"] / 4} if name.startswith("toy") else {}) for name, values in Tuning.BY_PRESET.items()
    }


# ---------------------------------------------------------------------------------------------- the reward


def combine_rewards(safety: np.ndarray, helpfulness: np.ndarray, is_safety: np.ndarray, threshold: float = 0.15) -> np.ndarray:
    """R_c of §3.2.3: the safety score if the prompt is tagged unsafe or that score is below the threshold, else helpfulness.

    safety, helpfulness: scores in (0, 1), after a sigmoid, and is_safety, bool, whether the prompt of an answer is likely to
    draw unsafe ones; of any shapes that broadcast. threshold: 0.15 in the paper, with precision .89 and recall .55.
    """
    return np.where(is_safety | (safety < threshold), safety, helpfulness)


def logit(p: Tensor, margin: float = 1e-6) -> Tensor:
    """log(p / (1 - p)), the inverse of the sigmoid (§3.2.3); p is kept `margin` away from 0 and 1, so that it stays finite."""
    return torch.logit(p, eps=margin)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / √(variance + 1e-8) over all places of the mask at once; 0 elsewhere (§3.2.3, WHITEN).

    x, mask: of any one shape; mask: bool. The variance is the unbiased one; of a single place it is 0.
    """
    n = mask.sum()
    away = (x - x.where(mask, 0).sum() / n.clamp(min=1)).where(mask, 0)
    return away / (away.square().sum() / (n - 1).clamp(min=1) + 1e-8).sqrt()


def whiten_scores(r_c: Tensor, finished: Tensor, whitened: bool = True) -> Tensor:
    """R̃_c = WHITEN(LOGIT(R_c)) over a batch (§3.2.3); an answer that was cut off gets -1 and counts in no mean (our choice).

    r_c: (rows,) R_c in (0, 1). finished: (rows,) bool, whether an answer ended with EOS.
    """
    scores = logit(r_c)
    scores = whiten(scores, finished) if whitened else scores.where(finished, 0)
    return scores - (~finished).to(scores.dtype)


def kl_estimates(log_probs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """k1 = log π/π₀ and k3 = π₀/π - 1 - log π₀/π of each token: the mean of both under π is KL(π ‖ π₀) (Schulman, 2020).

    k1 can be negative and is what eq. 4 pays for; k3 can't, varies less, and is logged beside it.
    """
    difference = reference - log_probs
    return -difference, torch.expm1(difference) - difference


def token_rewards(scores: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """R of eq. 4 token by token: -β log π/π₀ for each action, and the score of the answer for its last one. (rows, seq)

    scores: (rows,). log_probs, reference: (rows, seq) of the actions under π and π₀.
    """
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # (rows, seq)
    return (-kl_coef * (log_probs - reference)).where(mask, 0) + scores[:, None].where(is_last, 0)


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


def toy_prompts(world: toy.World, n: int, seed: int | str, split: str = "train", unsafe: float = 0.25) -> list[dict]:
    """n distinct prompts of the tiny world, of which a share is unsafe, with or without an attack (our choice)."""
    found: dict[str, dict] = {}
    for kinds, wanted in ((["unsafe"], round(unsafe * n)), (None, n)):
        for prompt in toy.prompts(world, 4 * n, seed, split, kinds):  # there are few unsafe ones; if too few, harmless ones come
            if len(found) < wanted:
                found.setdefault(prompt["id"], prompt)
    prompts = list(found.values())
    Random(f"{seed}/rlhf").shuffle(prompts)
    return prompts


class Judges(NamedTuple):
    """The two reward models of §3.2.3, whole, on this rank's device."""
    helpfulness: RewardModel
    safety: RewardModel

    def score(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """(R_h, R_s) of rows of ids, prompt and answer: each (rows,), after a sigmoid."""
        return sigmoid(score_rows(self.helpfulness, rows)), sigmoid(score_rows(self.safety, rows))


def load_judges(helpfulness: str, safety: str, ranks: Ranks) -> Judges:
    """The reward models of two folders."""
    return Judges(*(load_judge(folder, ranks) for folder in (helpfulness, safety)))


def answer_all(speaker: Speaker, judges: Judges, prompts: list[dict], numbers: range,
               settings: "Settings | Curves", seed: int, temperature: float) -> list[dict]:
    """K answers to each of the prompts with these numbers, and what the reward models say: one dictionary a prompt.

    What is drawn depends on a prompt's number, the seed and the models alone.
    """
    asked = [speaker.prompt_ids(prompt_messages(prompts[i])) for i in numbers]
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


def merge_pools(pools: list[list[dict]], by_score: bool = True) -> list[dict]:
    """One pool of several, oldest first: of two answers to one prompt (by id) the higher score stays, the newer if equal.

    Not by score, the newer one stays: the control that has seen no score.
    """
    kept: dict[str, dict] = {}
    for row in (row for pool in pools for row in pool):
        if row["id"] not in kept or not by_score or row["score"] >= kept[row["id"]]["score"]:
            kept[row["id"]] = row
    return list(kept.values())


def rescored(pool: list[dict], judges: Judges, threshold: float, names: list[str]) -> list[dict]:
    """The rows of an earlier pool with the scores of the newest reward models: those of two models can't be compared."""
    r_h, r_s = judges.score([row["prompt_ids"] + row["response_ids"] for row in pool])
    score = combine_rewards(r_s, r_h, np.array([row["unsafe"] for row in pool]), threshold)
    return [row | {"score": c, "helpfulness": h, "safety": s, "rewards": names}
            for row, c, h, s in zip(pool, score.tolist(), r_h.tolist(), r_s.tolist())]


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file of ours; InputError names a bad line."""
    rows = list(read_rows(str(path)))
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: {row if isinstance(row, InputError) else 'is no JSON object'}; make the file again")
    return [row for _, row in rows]


# ---------------------------------------------------------------------------------------------- a version


def read_through(found: Iterable[Source], embedded: dict) -> None:
    """Read the files of others once before the long work begins, so that a bad row stops it early."""
    for source in found:
        for _ in source.documents() if source.fingerprint not in [mark for _, mark in embedded.values()] else ():
            pass


def main(settings: Settings) -> None:
    """One version: sample, score, keep the best, fine-tune."""
    if settings.select not in ("best", "random") or settings.pool not in ("all", "last"):
        raise InputError("--select is best or random, and --pool all or last")
    version = settings.version
    settings = replace(settings, out=settings.out or f"out/rlhf-v{version}",
                       policy=settings.policy or ("out/sft" if version == 1 else f"out/rlhf-v{version - 1}"))
    if settings.world is None:
        settings = replace(settings, world=world_of(settings.policy))
    names = [settings.policy, settings.helpfulness, settings.harmlessness]
    parents = parents_of([*names, settings.init])
    tokenizer = Tokenizer(parents[settings.policy].tokenizer)
    room = prompt_room([parents[name] for name in names], settings.max_new_tokens)
    prompts = file_prompts(settings.prompts, tokenizer, room) if settings.prompts else toy_prompts(
        tiny_world(settings.world), settings.n_prompts, zlib.crc32(f"{settings.seed} version {version}".encode()),
        unsafe=settings.unsafe)
    folders = [Path(settings.out).parent / f"rlhf-v{n}" for n in range(1, version) if settings.pool == "all"]
    earlier = [folder / "best.jsonl" for folder in folders]
    for path in earlier:
        if not path.exists():
            raise InputError(f"{path}: the best answers of an earlier version are missing; put them there, or take --pool last")
    ranks = start(settings)
    with locked(settings.out, ranks):
        data = {name: parents[name].fingerprint for name in names} | {str(path): file_fingerprint(str(path)) for path in earlier}
        data |= {settings.safety_test: file_fingerprint(settings.safety_test)} if settings.threshold is None else {}
        learn_pool(settings, "rlhf", parents[settings.init], data, partial(make_pool, settings, prompts, earlier, ranks), ranks)


def learn_pool(settings: Tuning, stage: str, parent: Parent, data: dict[str, str], make: Callable[[], None],
               ranks: Ranks) -> None:
    """Have `make` write OUT/pool.jsonl, answers to learn from, and fine-tune on them and the other data: a version, or `distill`.

    data: the fingerprints of all that the answers are made from, but for --prompts.
    """
    out = Path(settings.out)
    if settings.prompts:
        data = data | {settings.prompts: file_fingerprint(settings.prompts)}
    specs, embedded = toy_sources(settings.data, settings.world, settings.dialogs, settings.safety)
    embedded["pool"], bad = (partial(pool_rows, out / "pool.jsonl"), "pool"), [] if settings.skip_bad_rows else None
    found = sources(specs, embedded, lambda file: read_dialogs(file, bad), spool_stdin(settings, ranks))
    read_through(found, embedded)
    if bad:
        bad.clear()  # they are noted again when the rows are encoded
    data = data | {source.name: source.fingerprint for source in found if source.fingerprint != "pool"}
    check_seq_len(settings, parent)
    record = open_run(settings, stage, ranks, data=data, parent=settings.init, parent_fingerprint=parent.fingerprint)
    if ranks.rank == 0:
        replace_file(out / "config.json", json.dumps(record | {"model": asdict(parent.config)}, indent=1).encode())
    make()
    dist.barrier(cpu_group())
    made = file_fingerprint(str(out / "pool.jsonl"))
    found = [source._replace(fingerprint=made) if source.fingerprint == "pool" else source for source in found]
    is_toy = any(source.fingerprint == embedded["toy/dialogs"][1] for source in found)
    fine_tune(settings, record, parent, found, ranks, tiny_world(settings.world) if is_toy else None, bad)


def pool_rows(file: Path) -> Iterator[tuple[str, tuple[list[int], list[bool]]]]:
    """The answers of a pool as rows to learn from, in the ids that were sampled: only the answer is learned."""
    for row in read_jsonl(file):
        asked, said = row["prompt_ids"], row["response_ids"]
        yield str(file), (asked + said, [False] * len(asked) + [True] * len(said))


def draw_pool(settings: Tuning, n: int, draw: Callable[[range], list[dict]], ranks: Ranks) -> list[dict]:
    """The answers to n prompts (see `in_parts`) to make OUT/pool.jsonl of; none on the other ranks, or if it is there already."""
    pool = Path(settings.out, "pool.jsonl")
    if not settings.resume and ranks.rank == 0:
        pool.unlink(missing_ok=True)
    rows = in_parts(Path(settings.out), "answers", n, settings.sample_batch, draw, ranks, settings.resume)
    return [] if pool.exists() else rows


def make_pool(settings: Settings, prompts: list[dict], earlier: list[Path], ranks: Ranks) -> None:
    """Write OUT/best.jsonl, the best answers of this version, and OUT/pool.jsonl, those of all versions that are learned.

    earlier: the best.jsonl of earlier versions.
    """
    speaker = cache(partial(load_speaker, settings.policy, ranks))
    judges = cache(partial(load_judges, settings.helpfulness, settings.harmlessness, ranks))
    seed = zlib.crc32(f"{settings.seed} answers {settings.version}".encode())

    def draw(numbers: range) -> list[dict]:
        return answer_all(speaker(), judges(), prompts, numbers, settings, seed, settings.temperature)

    rows = draw_pool(settings, len(prompts), draw, ranks)
    if not rows:
        return
    out, tokenizer, threshold = Path(settings.out), Tokenizer(Path(settings.policy, "tokenizer.model")), settings.threshold
    if threshold is None:
        threshold, precision, recall = safety_threshold(settings.safety_test, judges().safety, tokenizer)
        print(f"safety scores below {threshold:.3f} count as unsafe: precision {precision:.2f}, recall {recall:.2f} on "
              f"{settings.safety_test} (the paper: 0.15, .89, .55)")
    scores = combined(rows, prompts, threshold, tokenizer.eos_id)  # (prompts, K)
    best, models = [], [settings.helpfulness, settings.harmlessness]
    for row, mine, k in zip(rows, scores, pick(scores, settings.select, settings.seed)):
        prompt, messages = prompts[row["number"]], prompt_messages(prompts[row["number"]])
        if not np.isfinite(mine[k]):
            continue  # not one of its answers came to an end
        best.append({"id": prompt.get("id") or f"{zlib.crc32(json.dumps(messages).encode()):08x}", "prompt": messages,
                     "response": tokenizer.decode(row["response_ids"][k]).strip(), "unsafe": bool(prompt.get("unsafe")),
                     "score": mine[k], "helpfulness": row["helpfulness"][k], "safety": row["safety"][k],
                     "version": settings.version, "temperature": settings.temperature, "model": settings.policy,
                     "rewards": models, "prompt_ids": row["prompt_ids"], "response_ids": row["response_ids"][k]})
    if not best:
        raise InputError(f"none of {scores.size} answers came to an end in {settings.max_new_tokens} tokens; begin again with a "
                         "larger --max_new_tokens")
    old = [rescored(read_jsonl(path), judges(), threshold, models) for path in earlier]
    pool = merge_pools([*old, best], by_score=settings.select == "best")
    typical = np.array([np.median(mine[np.isfinite(mine)]) for mine in scores if np.isfinite(mine).any()])
    print(f"{len(prompts):,} prompts × {settings.n_samples} answers at temperature {settings.temperature} of {settings.policy}: "
          f"{np.isinf(scores).mean():.1%} cut off; R_c of the {settings.select} {np.mean([row['score'] for row in best]):.3f}, "
          f"median {typical.mean():.3f}; {len(pool):,} answers to learn from, {len(pool) - len(best):,} more than this version's")
    write_jsonl(out / "best.jsonl", best)
    write_jsonl(out / "pool.jsonl", pool)


def safety_threshold(file: str, safety: RewardModel, tokenizer: Tokenizer,
                     ranks: Ranks | None = None) -> tuple[float, float, float]:
    """`choose_threshold` on the comparisons of a file; InputError if none is labelled unsafe. ranks: if the model is sharded."""
    pairs, encoded, _ = encode_pairs(read_named((file,)), tokenizer, safety.config.max_seq_len, "none")
    labels = safety_labels(pairs).ravel()
    if not (labels < 0).any():
        raise InputError(f"{file}: no answer is labelled unsafe, so no threshold can be chosen; give --threshold")
    scores = sigmoid(score_pairs(safety, encoded, ranks)[0].ravel())
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
    world, models = tiny_world(settings.world), (*settings.runs, settings.helpfulness, settings.harmlessness)
    parents = parents_of([*models])
    tokenizer = Tokenizer(parents[settings.runs[0]].tokenizer)
    room = min(prompt_room([parents[run], *parents.values()], settings.max_new_tokens) for run in settings.runs)
    prompts = file_prompts(settings.prompts, tokenizer, room) if settings.prompts else toy_prompts(
        world, settings.n_prompts, settings.seed, "test", unsafe=0.0)
    ranks, out = start(settings), Path(settings.out)
    with locked(settings.out, ranks):
        data = {folder: parent.fingerprint for folder, parent in parents.items()}
        data |= {settings.prompts: file_fingerprint(settings.prompts)} if settings.prompts else {}
        record = open_run(settings, "curves", ranks, data=data)
        if ranks.rank == 0:
            replace_file(out / "config.json", json.dumps(record | {"model": {}}, indent=1).encode())
        judges, found = cache(partial(load_judges, settings.helpfulness, settings.harmlessness, ranks)), []
        sizes = [2**i for i in range(settings.n_samples.bit_length()) if 2**i <= settings.n_samples]
        for number, run in enumerate(settings.runs):
            speaker = cache(partial(load_speaker, run, ranks))
            for temperature in settings.temperatures:
                def draw(numbers: range, speaker=speaker, temperature=temperature) -> list[dict]:
                    return answer_all(speaker(), judges(), prompts, numbers, settings, settings.seed, float(temperature))

                name = f"{number}-{temperature}"
                rows = in_parts(out, name, len(prompts), settings.sample_batch, draw, ranks, settings.resume)
                if ranks.rank == 0:
                    truth = None if settings.prompts else true_helpfulness(world, prompts, rows, tokenizer)
                    scores = combined(rows, prompts, settings.threshold, tokenizer.eos_id)
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
    if not can_draw():
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
#
# What stands where: all below is of shape (rows, seq), a row being a prompt p0 p1 p2, its answer a0 a1 EOS, and padding.
#
#     place         0    1    2    3    4    5    6    7
#     inputs        p0   p1   p2   a0   a1   EOS  pad  pad    what is read up to a place; pad is 0, which is never EOS
#     targets       .    .    a0   a1   EOS  .    .    .      the action taken there; . is IGNORE, and the mask is `not IGNORE`
#     log-prob      .    .    x    x    x    .    .    .      of that action
#     value         .    .    x    x    x    .    .    .      of what was read, before that action
#     -β · KL       .    .    x    x    x    .    .    .      a penalty for each action
#     score         .    .    .    .    x    .    .    .      of the whole answer, paid for its last action, EOS
#     advantage     .    .    x    x    x    .    .    .
#
# Behind EOS all is zero, and whatever stands there changes nothing: it is selected away, never multiplied by 0.


@dataclass(frozen=True)
class Ppo(Common):
    """Improve a chat model by PPO on the scores of two reward models (§3.2.3, eq. 3 and 4)."""
    preset: str | None = None  # whose hyper-parameters to take; by default those of the size of --init
    init: str = "out/rlhf-v2"  # chat model to start from; it stays as the π₀ of the KL penalty
    helpfulness: str = "out/reward-helpfulness"  # reward model R_h; the critic starts from it too
    harmlessness: str = "out/reward-safety"  # reward model R_s
    threshold: float | None = None  # R_s below which an answer counts as unsafe; else chosen on --safety_test | 0.15
    safety_test: str = "out/preferences/safety-test.jsonl"  # held-out comparisons with safety labels, to choose the threshold on
    out: str = ""  # folder of this run, else INIT-ppo; started again, it goes on where it stopped
    prompts: str = ""  # .jsonl of {"prompt": text or messages, "unsafe": true or false}; else prompts of the tiny world
    world: int | None = None  # seed of the tiny world; by default that of --init
    unsafe: float = 0.25  # share of unsafe prompts of the tiny world
    steps: int | None = None  # iterations: sample, score, learn | 200 to 400
    lr: float | None = None  # learning rate of the policy | 1e-6
    critic_lr: float | None = None  # learning rate of the critic | not stated
    warmup: int = 0  # iterations of linear warm-up | constant rate
    lr_floor: float = 1.0  # where the rate ends, a share of the peak | constant rate
    batch_size: int | None = None  # prompts of an iteration, with one answer each | 512
    mini_batch: int | None = None  # answers of a gradient step; each is used once | 64
    micro_batch: int | None = None  # answers of one forward pass on one rank
    seq_len: int | None = None  # longest prompt with its answer, in tokens; a longer prompt loses its beginning
    max_new_tokens: int | None = None  # longest answer, in tokens | not stated
    temperature: float = 1.0  # of the samples, and of every log-probability | not stated
    critic_warmup: int | None = None  # first iterations, in which the critic alone learns | not stated
    gamma: float = 1.0  # discount of later rewards | not stated
    lam: float = 0.95  # λ of the advantages | not stated
    clip: float = 0.2  # how far the ratio of probabilities is followed from 1 | 0.2
    value_clip: float = 0.2  # how far a value is followed from what it was | not stated
    kl_coef: float | None = None  # β of eq. 4 | 0.01 (7B, 13B), 0.005 (34B, 70B)
    adaptive_kl: bool = False  # steer β towards --kl_target (Ziegler et al., 2019) | constant
    kl_target: float = 1.0  # KL for --adaptive_kl, in nats an answer
    kl_horizon: float = 2000.0  # answers in which --adaptive_kl may change β by a factor of about e^0.2
    ptx_coef: float = 0.0  # weight of the loss on --ptx_data (InstructGPT's PPO-ptx) | 0
    ptx_data: tuple[str, ...] = ("toy",)  # text for --ptx_coef, as `pretrain.py --data` names it
    whiten: bool = True  # give the scores of a batch mean 0 and variance 1 | yes
    piecewise: bool = True  # R_c of both reward models; else R_h alone | yes
    eval_prompts: int | None = None  # held-out prompts for early stopping
    patience: int | None = None  # evaluations without a better reward on them until the run stops | not stated

    BY_PRESET: ClassVar[dict[str, dict]] = {
        name: dict(lr=1e-6, critic_lr=1e-6, batch_size=512, mini_batch=64, micro_batch=1, steps=400, critic_warmup=20,
                   kl_coef=0.01 if config.dim <= 5120 else 0.005, seq_len=min(4096, config.max_seq_len), max_new_tokens=1024,
                   eval_every=20, save_every=20, eval_prompts=512, patience=5, checkpointing=True)
        for name, config in PRESETS.items() if not name.startswith("toy")
    } | {
        name: dict(lr=5e-5, critic_lr=2e-4, batch_size=64, mini_batch=16, micro_batch=8, steps=60, critic_warmup=5,
                   kl_coef=0.1, seq_len=256, max_new_tokens=64, eval_every=10, save_every=10, eval_prompts=192, patience=4,
                   checkpointing=False)
        for name in PRESETS if name.startswith("toy")  # toy values: our choice
    }


# ---- advantages


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that values should have had, each (rows, seq) (Schulman et al., 2016).

    A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} - V_t, and nothing behind the last action. Returns are A + V, of
    advantages that are not yet whitened.
    """
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages = torch.zeros_like(values)
    advantage = value = torch.zeros_like(values[:, 0])  # (rows,), of the place behind
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage, value = (delta + gamma * lam * advantage).where(mask[:, t], 0), values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def adapted(kl_coef: float, kl: float, target: float, n: int, horizon: float) -> float:
    """The next β after n answers with this KL: β (1 + clip(KL / target - 1, ±0.2) n / horizon) (Ziegler et al., 2019)."""
    return kl_coef * (1 + min(0.2, max(-0.2, kl / target - 1)) * n / horizon)


# ---- losses


def ppo_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """max(-A ρ, -A clamp(ρ, 1 - clip, 1 + clip)) with ρ = π/π_old, and how often the clamp bites; sums over the mask.

    All (rows, seq); old: log-probabilities of the policy that drew the answers (Schulman et al., 2017; §3.2.3: clip 0.2).
    """
    ratio = (log_probs - old).where(mask, 0).exp()  # (rows, seq)
    advantages = advantages.where(mask, 0)
    free, clamped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, clamped).sum(), (clamped > free).sum()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """½ max((V - R)², (clamp(V, old ± clip) - R)²), and how often the clamp bites; sums over the mask. All (rows, seq).

    The paper does not state the critic's loss: our choice, that of Ziegler et al. (2019).
    """
    clamped = torch.clamp(values, old - clip, old + clip)
    free, clamped = ((v - returns).where(mask, 0).square() for v in (values, clamped))
    return 0.5 * torch.maximum(free, clamped).sum(), (clamped > free).sum()


def policy_step_loss(model: nn.Module, batch: list[Tensor], settings: Ppo, ptx_weight: float) -> tuple[Tensor, Tensor, dict]:
    """`ppo_loss` of a micro-batch (inputs, targets, old, advantages), or the weighted loss of text (inputs, targets)."""
    inputs, targets, *answers = batch
    mask = targets != IGNORE
    if not answers:
        nothing = mask.sum() * 0
        return -ptx_weight * model(inputs, targets).sum(), nothing, {"clipped": nothing}
    loss, clipped = ppo_loss(model(inputs, targets, temperature=settings.temperature), *answers, mask, settings.clip)
    return loss, mask.sum(), {"clipped": clipped}


def critic_step_loss(model: nn.Module, batch: list[Tensor], settings: Ppo) -> tuple[Tensor, Tensor, dict]:
    """`value_loss` of a micro-batch (inputs, targets, old values, returns)."""
    inputs, targets, *old_and_returns = batch
    mask = targets != IGNORE
    loss, clipped = value_loss(model(inputs), *old_and_returns, mask, settings.value_clip)
    return loss, mask.sum(), {"clipped": clipped}


# ---- models and batches


class Critic(RewardModel):
    """The value of what was read, at every place: a reward model's trunk under a new head, which starts at zero."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (rows, seq). Returns (rows, seq), in units of the whitened score."""
        return Transformer.forward(self, tokens)[..., 0].clone()  # FSDP wants no view


class Models(NamedTuple):
    """The five models of PPO, each sharded over the ranks: two that learn, three that are frozen."""
    policy: Transformer
    critic: Critic
    reference: Transformer  # π₀
    helpfulness: RewardModel  # R_h
    safety: RewardModel  # R_s


def load_sharded(kind: type[Transformer], folder: str, settings: Ppo, ranks: Ranks, skip: tuple[str, ...] = ()) -> Transformer:
    """The model of a folder, but for the weights `skip`, sharded over the ranks."""
    parent = parent_of(folder)
    model = build(parent.config, settings, ranks, kind)
    parent.fill(model, skip=skip)
    return model


def load_models(settings: Ppo, ranks: Ranks) -> Models:
    """Policy and reference from --init, the reward models, and the critic: R_h's trunk under a head of zeros (our choice)."""
    policy, reference = (load_sharded(Transformer, settings.init, settings, ranks) for _ in range(2))
    critic = load_sharded(Critic, settings.helpfulness, settings, ranks, skip=HEAD)
    set_weights(critic.output, lambda name, shape: torch.zeros(shape, device=ranks.device))
    judges = (load_sharded(RewardModel, folder, settings, ranks) for folder in (settings.helpfulness, settings.harmlessness))
    return Models(policy, critic, *(model.eval().requires_grad_(False) for model in (reference, *judges)))


def align(prompts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(inputs, targets), each (rows, seq), as drawn above: targets are the answers' tokens, IGNORE elsewhere."""
    tokens, lengths = padded([prompt + answer for prompt, answer in zip(prompts, answers)])
    place, first = torch.arange(tokens.shape[1] - 1), torch.tensor([len(prompt) for prompt in prompts])
    is_action = (place >= first[:, None] - 1) & (place < lengths[:, None] - 1)  # (rows, seq)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(~is_action, IGNORE)


def deal(targets: Tensor, settings: Ppo, ranks: Ranks) -> list[list[Tensor]]:
    """Of each mini-batch, this rank's micro-batches: numbers of rows, in order of length, so that little is padding.

    All ranks get equally many; one that is left over is empty.
    """
    ends, dealt = (targets != IGNORE).cumsum(1).argmax(1), []  # (rows,), the place of the last action
    for mini in torch.arange(len(targets)).split(settings.mini_batch):
        groups = list(mini[ends[mini].argsort(stable=True)].split(settings.micro_batch))
        groups += [mini[:0]] * (-len(groups) % ranks.world_size)
        dealt.append(groups[ranks.rank :: ranks.world_size])
    return dealt


def take(batch: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
    """These rows of (inputs, targets, ...), without the columns that are padding in all of them.

    Of no rows it takes one with nothing to learn: models are sharded, so that every rank must run along.
    """
    inputs, targets, *others = (x[rows] if len(rows) else x[:1] for x in batch)
    width = int((targets != IGNORE).any(0).nonzero().max()) + 1
    targets = targets if len(rows) else torch.full_like(targets, IGNORE)
    return [x[:, :width] for x in (inputs, targets, *others)]


@torch.no_grad()
def at_every_place(model: nn.Module, compute: Callable, batch: tuple[Tensor, ...], settings: Ppo, ranks: Ranks) -> Tensor:
    """compute(inputs, targets) of all rows, in the very micro-batches that are trained on, so that the first ratio is 1.

    Returns (rows, seq) in float64 to every rank: figures are small, only models are large.
    """
    found = torch.zeros(batch[0].shape, dtype=torch.double)
    for rows in chain(*deal(batch[1], settings, ranks)):
        part = compute(*(x.to(ranks.device) for x in take(batch, rows)))
        found[rows, : part.shape[1]] = part[: len(rows)].double().cpu()
    model.reshard()  # without a backward pass the root would stay whole
    dist.all_reduce(found)
    return found


# ---- the three parts of an iteration: sample, score, learn


def sample_answers(policy: Transformer, prompts: list[dict], seed: int, tokenizer: Tokenizer, settings: Ppo,
                   ranks: Ranks) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of prompts, and of one answer to each, with EOS if it came. The ranks share the work; all get all."""
    room = settings.seq_len - settings.max_new_tokens
    ids = [tokenizer.encode_dialog(prompt_messages(prompt))[0][-room:] for prompt in prompts]
    mine = range(ranks.rank, len(ids), ranks.world_size)
    with gathered(policy, compute_dtype(settings, ranks)) as whole:  # sharded weights sample some 20 times slower (§3.2.3)
        drawn = generate(whole, [ids[i] for i in mine], settings.max_new_tokens, settings.temperature,
                         top_p=1.0,  # a smaller one would draw from another policy than the one that learns
                         stop=(tokenizer.eos_id,), seed=seed, rows=mine)
    parts: list = [None] * ranks.world_size
    dist.all_gather_object(parts, drawn, group=cpu_group())
    return ids, [parts[i % ranks.world_size][i // ranks.world_size] for i in range(len(ids))]


def score_answers(models: Models, prompts: list[dict], ids: list[list[int]], answers: list[list[int]], threshold: float,
                  settings: Ppo, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
    """R_c of each answer, (rows,) in (0, 1), and the means to log: of LOGIT(R_c), R_s and R_h.

    An answer that was cut off has the R_c of what it says, in the figures on held-out prompts too (our choice); what is learned
    from it is another thing (see `whiten_scores`).
    """
    rows = [prompt + answer for prompt, answer in zip(ids, answers)]
    room = settings.micro_batch * settings.seq_len  # tokens of a forward pass
    r_s, r_h = (sigmoid(score_rows(judge, rows, room, ranks)) for judge in (models.safety, models.helpfulness))
    is_safety = np.array([bool(prompt.get("unsafe")) for prompt in prompts])
    r_c = torch.from_numpy(combine_rewards(r_s, r_h, is_safety, threshold) if settings.piecewise else r_h)
    return r_c, {"reward": logit(r_c).mean().item(), "R_s": r_s.mean(), "R_h": r_h.mean()}


def make_batch(models: Models, ids: list[list[int]], answers: list[list[int]], r_c: Tensor, eos_id: int, kl_coef: float,
               settings: Ppo, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What is learned from, each (rows, seq): inputs, targets, log_probs, values, advantages (whitened), returns; and figures.

    sigmoid → R_c → logit → whitened over the batch → -β log π/π₀ of each token → advantages → whitened over all tokens
    (the last our choice).
    """
    inputs, targets = batch = align(ids, answers)
    mask = targets != IGNORE  # (rows, seq)
    finished = torch.tensor([answer[-1] == eos_id for answer in answers])  # (rows,)
    log_probs, reference = (at_every_place(model, partial(model, temperature=settings.temperature), batch, settings, ranks)
                            for model in (models.policy, models.reference))
    values = at_every_place(models.critic, lambda inputs, _: models.critic(inputs), batch, settings, ranks)
    scores = whiten_scores(r_c, finished, settings.whiten)  # (rows,)
    rewards = token_rewards(scores, log_probs, reference, mask, kl_coef)
    advantages, returns = gae(rewards, values, mask, settings.gamma, settings.lam)
    k1, k3 = (k.where(mask, 0).sum(1).mean().item() for k in kl_estimates(log_probs, reference))
    figures = {"kl": k1, "kl_k3": k3, "entropy": -log_probs[mask].mean().item(),  # -log π of its own samples: entropy on average
               "explained_variance": 1 - ((returns - values)[mask].var() / returns[mask].var()).item(),
               "length": mask.sum(1).double().mean().item(), "truncated": 1 - finished.double().mean().item()}
    return {"inputs": inputs, "targets": targets, "log_probs": log_probs, "values": values,
            "advantages": whiten(advantages, mask), "returns": returns}, figures


def learn(models: Models, optimizers: dict[str, torch.optim.Optimizer], batch: dict[str, Tensor], iteration: int,
          texts: Mixture | None, settings: Ppo, ranks: Ranks, interrupted: bool) -> dict[str, float]:
    """One gradient step of policy and critic on each mini-batch (§3.2.3). Returns means over the steps."""
    rate = cosine_schedule(iteration - 1, settings.steps, settings.warmup, settings.lr_floor)
    of_policy, of_critic = ([batch[name] for name in ("inputs", "targets", *names)] for names in (
        ("log_probs", "advantages"), ("values", "returns")))
    n, steps = settings.mini_batch, []
    for number, parts in enumerate(deal(batch["targets"], settings, ranks)):
        found = {}
        if iteration > settings.critic_warmup:
            extra, weight = [], 0.0
            if texts:  # the mean loss of text beside the mean over the actions of the mini-batch
                step = (iteration - 1) * settings.batch_size // n + number
                extra = texts.batch_at(step % (texts.n_rows // n), n, settings.micro_batch, ranks)
                actions = (batch["targets"][number * n : (number + 1) * n] != IGNORE).sum().item()
                weight = settings.ptx_coef * actions / (n * settings.seq_len)
            found["policy"] = optimizer_step(
                models.policy, optimizers["policy"], [take(of_policy, rows) for rows in parts] + extra,
                partial(policy_step_loss, settings=settings, ptx_weight=weight), settings.lr * rate, settings.grad_clip, ranks)
        found["critic"] = optimizer_step(
            models.critic, optimizers["critic"], [take(of_critic, rows) for rows in parts],
            partial(critic_step_loss, settings=settings), settings.critic_lr * rate, settings.grad_clip, ranks, interrupted)
        steps.append({f"{key}/{who}": value for who, figures in found.items() for key, value in figures.items()})
    return {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}


# ---- the loop


def load_prompts(settings: Ppo) -> tuple[list[dict], list[dict]]:
    """(to learn from, held out). Of a file, one prompt in twenty is held out; of the tiny world, the first are made as needed."""
    if not settings.prompts:
        world = tiny_world(settings.world)
        return [], toy_prompts(world, settings.eval_prompts, settings.seed, "test", settings.unsafe)
    found, held = held_out(file_prompts(settings.prompts))
    if not found or not held:
        raise InputError(f"--prompts {settings.prompts}: so few prompts leave none to {'learn from' if held else 'hold out'}")
    return found, held[: settings.eval_prompts]


def prompts_at(found: list[dict], iteration: int, settings: Ppo) -> list[dict]:
    """The prompts of an iteration, by its number alone: those found, in a new order each epoch, else of the tiny world."""
    if not found:
        seed = f"{settings.seed}/{iteration}"
        return toy_prompts(tiny_world(settings.world), settings.batch_size, seed, unsafe=settings.unsafe)
    numbers = np.arange((iteration - 1) * settings.batch_size, iteration * settings.batch_size)
    return [found[permute(np.array([number % len(found)]), len(found), settings.seed + number // len(found))[0]]
            for number in numbers.tolist()]


def true_figures(prompts: list[dict], answers: list[list[int]], tokenizer: Tokenizer, world: toy.World) -> dict[str, float]:
    """What the annotators of the tiny world say: mean helpfulness of answers to harmless prompts, mean safety of the others."""
    texts = [tokenizer.decode(answer).strip() for answer in answers]
    harmless = [toy.helpfulness(world, p, text) for p, text in zip(prompts, texts) if not p["unsafe"]]
    unsafe = [toy.safety(world, p, text) for p, text in zip(prompts, texts) if p["unsafe"]]
    return {f"true/{name}": float(np.mean(v)) for name, v in (("helpfulness", harmless), ("safety", unsafe)) if v}


def resume(out: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], ranks: Ranks) -> dict:
    """Fill modules and optimizers from the newest checkpoint, and cut the logs behind it; what progress it holds, if any."""
    newest = [str(checkpoints(out)[-1]) if checkpoints(out) else None]
    dist.broadcast_object_list(newest, group=cpu_group())  # a slow shared disk must not make ranks disagree
    progress = load_checkpoint(newest[0], modules, optimizers) if newest[0] else {}
    if ranks.rank == 0:
        rewind(out / "metrics.jsonl", progress.get("step", -1))
        rewind(out / "samples.txt", progress.get("step", -1))
    return progress


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """The weights of one sharded model into another of the same shape."""
    for mine, theirs in zip(target.parameters(), source.parameters()):
        mine.to_local().copy_(theirs.to_local())


def ptx_rows(found: list[Source], reading: pretrain.Settings, settings: Ppo, ranks: Ranks) -> Mixture:
    """The text of --ptx_data as rows of seq_len tokens, as pretraining reads it."""
    folder, index = prepare(found, reading, ranks)
    parts = [(folder / part, source.epochs) for source in found for part in index[source.name]["parts"] if source.epochs]
    tokenizer = Tokenizer(reading.tokenizer)
    with rank_0_first(ranks):
        rows = Mixture(parts, settings.seq_len, settings.seed, tokenizer.eos_id, tokenizer.vocab_size, folder)
    if rows.n_rows < settings.mini_batch:
        raise InputError(f"--ptx_data {' '.join(settings.ptx_data)}: {rows.n_rows} rows of {settings.seq_len} tokens are fewer "
                         f"than a mini-batch of {settings.mini_batch}; give more text")
    return rows


def ppo(settings: Ppo) -> None:
    """Run PPO: prompts → answers → scores → rewards → advantages → clipped steps. The best on held-out prompts remains.

    A checkpoint holds the best policy so far as "model", which is what other stages load, and where learning stands.
    """
    if settings.world is None:
        settings = replace(settings, world=world_of(settings.init))
    settings = replace(settings, out=settings.out or f"{settings.init}-ppo")
    judges = (settings.helpfulness, settings.harmlessness)
    parents = parents_of([settings.init, *judges])
    parent = parents[settings.init]
    context = min(one.config.max_seq_len for one in parents.values())
    if settings.seq_len > context or settings.max_new_tokens >= settings.seq_len:
        raise InputError(f"--seq_len {settings.seq_len} must be above --max_new_tokens {settings.max_new_tokens}, and at most "
                         f"{context}, the shortest context of the models")
    if settings.batch_size % settings.mini_batch or settings.temperature <= 0:
        raise InputError("--batch_size must be a multiple of --mini_batch, and --temperature above 0")
    tokenizer, out, (found, held) = Tokenizer(parent.tokenizer), Path(settings.out), load_prompts(settings)
    ranks = start(settings)
    with locked(settings.out, ranks):
        data = {name: parents[name].fingerprint for name in judges}
        data |= {settings.prompts: file_fingerprint(settings.prompts)} if settings.prompts else {}
        data |= {settings.safety_test: file_fingerprint(settings.safety_test)} if settings.threshold is None else {}
        reading = pretrain.Settings(settings.preset, settings.out, data=settings.ptx_data, tokenizer=parent.tokenizer,
                                    world=settings.world)
        found_texts = text_sources(reading) if settings.ptx_coef else []
        data |= {source.name: source.fingerprint for source in found_texts}
        record = open_run(settings, "ppo", ranks, data=data, parent=settings.init, parent_fingerprint=parent.fingerprint)
        models, best = load_models(settings, ranks), build(parent.config, settings, ranks)
        modules = {"model": best, "policy": models.policy, "critic": models.critic}
        optimizers = {name: adamw(modules[name], settings.weight_decay, settings.adam_eps) for name in ("policy", "critic")}
        state = {"step": 0, "kl_coef": settings.kl_coef, "best": -math.inf, "best_step": 0, "seconds": 0.0}
        state |= resume(out, modules, optimizers, ranks)
        texts = ptx_rows(found_texts, reading, settings, ranks) if found_texts else None
        threshold = settings.threshold
        if threshold is None:
            threshold, *_ = safety_threshold(settings.safety_test, models.safety, tokenizer, ranks)
        if ranks.rank == 0:
            replace_file(out / "tokenizer.model", Path(parent.tokenizer).read_bytes())
            replace_file(out / "config.json", json.dumps(record | {"model": asdict(parent.config)}, indent=1).encode())
            print(f"safety scores below {threshold:.3f} count as unsafe")
            print_settings(settings)
        log = open(out / "metrics.jsonl", "a", buffering=1, encoding="utf-8") if ranks.rank == 0 else None

        def truth(prompts: list[dict], answers: list[list[int]]) -> dict[str, float]:
            return {} if settings.prompts else true_figures(prompts, answers, tokenizer, tiny_world(settings.world))

        def evaluate() -> dict[str, float]:
            """How the policy does on held-out prompts, always with the same random numbers; keep it if it is the best so far."""
            ids, answers = sample_answers(models.policy, held, seed_of("held out"), tokenizer, settings, ranks)
            _, figures = score_answers(models, held, ids, answers, threshold, settings, ranks)
            if figures["reward"] > state["best"]:
                state.update(best=figures["reward"], best_step=state["step"])
                copy_weights(models.policy, best)
            if ranks.rank == 0:
                said = [tokenizer.decode(prompt + answer).strip() for prompt, answer in zip(ids[:8], answers)]
                log_samples(out / "samples.txt", state["step"], said)
            return {f"held-out/{name}": value for name, value in (figures | truth(held, answers)).items()}

        def going_on() -> bool:
            return state["step"] < min(settings.steps, state["best_step"] + settings.patience * settings.eval_every)

        def seed_of(purpose: object) -> int:
            return zlib.crc32(f"{settings.seed} {purpose}".encode())

        def write(figures: dict) -> None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
            if log:
                log.write(json.dumps({"step": state["step"], **finite}) + "\n")

        if state["step"] == 0:
            write(evaluate())
        bar = tqdm(total=settings.steps, initial=state["step"], unit="iteration", disable=ranks.rank > 0, dynamic_ncols=True)
        with signals() as caught, bar:
            while going_on():
                state["step"] += 1
                clock = [time.perf_counter()]
                prompts = prompts_at(found, state["step"], settings)
                ids, answers = sample_answers(models.policy, prompts, seed_of(state["step"]), tokenizer, settings, ranks)
                clock.append(time.perf_counter())
                r_c, figures = score_answers(models, prompts, ids, answers, threshold, settings, ranks)
                batch, measured = make_batch(models, ids, answers, r_c, tokenizer.eos_id, state["kl_coef"], settings, ranks)
                clock.append(time.perf_counter())
                learned = learn(models, optimizers, batch, state["step"], texts, settings, ranks, bool(caught))
                clock.append(time.perf_counter())
                interrupted = learned.pop("interrupted/critic") > 0
                times = {f"seconds/{name}": seconds for name, seconds in zip(("sampling", "scoring", "training"), np.diff(clock))}
                figures |= measured | learned | truth(prompts, answers) | {"kl_coef": state["kl_coef"]}
                if settings.adaptive_kl:
                    n = settings.batch_size
                    state["kl_coef"] = adapted(state["kl_coef"], figures["kl"], settings.kl_target, n, settings.kl_horizon)
                if state["step"] % settings.eval_every == 0 or state["step"] == settings.steps:
                    figures |= evaluate()
                state["seconds"] += clock[-1] - clock[0]
                write(figures | times | {"seconds": round(state["seconds"], 3)})
                shown = [f"{name} {figures[key]:.2f}" for name, key in BAR.items() if key in figures]
                bar.set_postfix_str(" ".join(shown), refresh=False)
                bar.update()
                if state["step"] % settings.save_every == 0 or interrupted or not going_on():
                    save_checkpoint(out, state["step"], modules, optimizers, state, settings.keep)
                if interrupted:
                    bar.close()
                    if ranks.rank == 0:
                        print(f"stopped; saved {out}/step-{state['step']:06d}. The same command goes on from there.", flush=True)
                    sys.exit(128 + (caught or [signal.SIGTERM])[0])
        if ranks.rank == 0:
            report_ppo(out, state)


BAR = {"reward": "reward", "KL": "kl", "length": "length", "cut": "truncated", "true": "true/helpfulness"}


def report_ppo(out: Path, state: dict) -> None:
    """Print the held-out figures before the first iteration and of the best policy, and draw ppo.png."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = {row["step"]: row for row in rows if "held-out/reward" in row}
    print(f"\n{state['step']} iterations in {state['seconds']:.0f} s; the best on held-out prompts, of iteration "
          f"{state['best_step']}, is the model in {out}")
    print(f"{'on held-out prompts':24} {'before':>8} {'best':>8} {'last':>8}")
    for name in [key for key in rows[0] if key.startswith("held-out/")]:
        picked = (evaluations[0], evaluations[state["best_step"]], evaluations[max(evaluations)])
        print(f"{name.removeprefix('held-out/'):24} " + " ".join(f"{row[name]:8.3f}" for row in picked))
    draw_ppo(out, rows)


def draw_ppo(out: Path, rows: list[dict]) -> None:
    """out/ppo.png: what metrics.jsonl says of each iteration, in six panels."""
    if not can_draw():
        return
    import matplotlib.pyplot as plt
    panels = [("logit of R_c", ["reward", "held-out/reward"]),
              ("score, 0 to 1", ["R_s", "R_h", "true/safety", "true/helpfulness", "held-out/true/helpfulness"]),
              ("KL to the start (nats an answer)", ["kl", "kl_k3"]), ("entropy (nats a token)", ["entropy"]),
              ("share", ["clipped/policy", "truncated", "explained_variance"]), ("answer length (tokens)", ["length"])]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True)
    for axis, (label, names) in zip(axes.flat, panels):
        for name, colour in zip(names, COLOURS):
            steps, values = zip(*[(row["step"], row[name]) for row in rows if row.get(name) is not None] or [((), ())])
            axis.plot(steps, values, "o-" if name.startswith("held-out") else "-", ms=4, color=colour, label=name)
        axis.set(xlabel="iteration", ylabel=label)
        axis.legend(fontsize=8, framealpha=0.5)
    figure.savefig(out / "ppo.png", dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- safety context distillation


@dataclass(frozen=True)
class Distill(Tuning):
    """Safety context distillation (§4.2.4): what a model says to unsafe prompts under a safety preprompt, learned without it."""
    init: str = "out/sft"  # model to fine-tune
    policy: str = ""  # chat model that answers, else --init
    out: str = "out/distill"  # folder of this run; started again, it goes on where it stopped
    harmlessness: str = "out/reward-safety"  # reward model of safety, the gate
    gate: bool = True  # learn an answer only if the reward model scores it above the plain one | yes
    prompts: str = ""  # .jsonl of {"prompt", "unsafe": true, "template": preprompt of its risk category}; else of the tiny world
    n_prompts: int = 400  # unsafe prompts of the tiny world, with and without an attack
    generic: tuple[str, ...] = tuple(toy.PREPROMPTS)  # preprompts for every category (Table 39); a prompt gets one of them
    temperature: float = 0.0  # of the answers; greedy, for a lucky draw would pass the gate as well | not stated
    max_new_tokens: int = 64  # longest answer; one that is cut off is never learned
    sample_batch: int = 64  # prompts that are answered together and kept together: the unit of resume
    data: tuple[str, ...] = REPLAY  # what to fine-tune on: dialogues as in sft.py; `pool`, `pool:4`: the answers that were kept
    dialogs: int = 16000  # annotated dialogues of the tiny world
    safety: float = 0.06  # share of unsafe prompts among them

    BY_PRESET: ClassVar[dict[str, dict]] = Settings.BY_PRESET


KINDS = ("plain", "generic", "template")  # of answers: without a preprompt, under one for all, under that of the risk category


def distill(settings: Distill) -> None:
    """Answer plainly and under preprompts, score, keep what the gate lets through, fine-tune without the preprompts."""
    settings = replace(settings, policy=settings.policy or settings.init)
    if settings.world is None:
        settings = replace(settings, world=world_of(settings.policy))
    names = [settings.policy, settings.harmlessness]
    parents = parents_of([*names, settings.init])
    room = prompt_room([parents[name] for name in names], settings.max_new_tokens)
    prompts = prompts_to_distill(settings, Tokenizer(parents[settings.policy].tokenizer), room)
    ranks = start(settings)
    with locked(settings.out, ranks):
        data = {name: parents[name].fingerprint for name in names}
        learn_pool(settings, "distill", parents[settings.init], data, partial(make_distilled, settings, prompts, ranks), ranks)


def prompts_to_distill(settings: Distill, tokenizer: Tokenizer, room: int) -> list[dict]:
    """The prompts to distil; never helpful ones, whose answers would get worse and be refused for nothing (§4.2.4, Table 40)."""
    def asked(prompt: dict) -> list[list[dict]]:
        return [under(one, prompt_messages(prompt)) for one in (*settings.generic, template_of(prompt) or "")]

    found = file_prompts(settings.prompts, tokenizer, room, asked) if settings.prompts else toy_prompts(
        tiny_world(settings.world), settings.n_prompts, zlib.crc32(f"{settings.seed} distill".encode()), unsafe=1.0)
    unsafe = [prompt for prompt in found if prompt.get("unsafe")]
    if not unsafe:
        raise InputError(f'{settings.prompts}: no prompt is tagged "unsafe": true, and helpful ones are never distilled; tag '
                         "those that are")
    return unsafe


def under(preprompt: str, messages: list[dict]) -> list[dict]:
    """A dialogue with a preprompt as its system prompt, before the one that it may have."""
    own = [message["content"] for message in messages if message["role"] == "system"]
    return [{"role": "system", "content": "\n".join([preprompt, *own])}, *messages[len(own) :]]


def template_of(prompt: dict) -> str | None:
    """The preprompt of the risk category of a prompt, if it has one."""
    return prompt.get("template") or toy.TEMPLATES.get(prompt.get("category"))


def answer_under_preprompts(speaker: Speaker, judge: RewardModel, prompts: list[dict], numbers: range,
                            settings: Distill) -> list[dict]:
    """Answers to the prompts with these numbers: plain, under a generic preprompt, under the template of the risk category.

    Returns {"number", "kind", "preprompt", "prompt_ids", "response_ids", "score"} of each. All are scored as they are learned,
    behind prompt_ids, which hold no preprompt. A prompt without a category has no template.
    """
    asked, rows = [], []
    for i in numbers:
        messages = prompt_messages(prompts[i])
        for kind, preprompt in zip(KINDS, ("", settings.generic[i % len(settings.generic)], template_of(prompts[i]))):
            if preprompt is not None:
                asked.append(speaker.prompt_ids(under(preprompt, messages) if preprompt else messages))
                rows.append({"number": i, "kind": kind, "preprompt": preprompt, "prompt_ids": speaker.prompt_ids(messages)})
    drawn = generate(speaker.model, asked, settings.max_new_tokens, settings.temperature, 1.0, (speaker.tokenizer.eos_id,),
                     settings.seed, rows=[len(KINDS) * row["number"] + KINDS.index(row["kind"]) for row in rows])
    scores = sigmoid(score_rows(judge, [row["prompt_ids"] + ids for row, ids in zip(rows, drawn)]))
    return [row | {"response_ids": ids, "score": score} for row, ids, score in zip(rows, drawn, scores.tolist())]


def passes(plain: float | np.ndarray, score: float | np.ndarray, gate: bool = True) -> bool | np.ndarray:
    """Whether an answer may be learned: without the gate any, with it one that scores above the plain one (§4.2.4)."""
    return (score > plain) | (not gate)


def make_distilled(settings: Distill, prompts: list[dict], ranks: Ranks) -> None:
    """Write OUT/distilled.jsonl, all answers to read; OUT/pool.jsonl, those that are learned; OUT/distill.json, Figure 16."""
    speaker = cache(partial(load_speaker, settings.policy, ranks))
    judge = cache(partial(load_judge, settings.harmlessness, ranks))

    def draw(numbers: range) -> list[dict]:
        return answer_under_preprompts(speaker(), judge(), prompts, numbers, settings)

    rows = draw_pool(settings, len(prompts), draw, ranks)
    if not rows:
        return
    out, tokenizer, found, kept = Path(settings.out), Tokenizer(Path(settings.policy, "tokenizer.model")), [], []
    for row in rows:
        text = tokenizer.decode(row["response_ids"]).strip()
        if row["kind"] == "plain":  # the first of each prompt
            plain, plain_text = row, text
            continue
        ended, prompt = row["response_ids"][-1:] == [tokenizer.eos_id], prompts[row["number"]]
        found.append({"number": row["number"], "prompt": prompt_messages(prompt), "plain": plain_text, "kind": row["kind"],
                      "preprompt": row["preprompt"], "answer": text, "plain_score": plain["score"], "score": row["score"],
                      "kept": ended and passes(plain["score"], row["score"], settings.gate)})
        if not settings.prompts:
            found[-1]["truth"] = [toy.safety(tiny_world(settings.world), prompt, said) for said in (plain_text, text)]
        if found[-1]["kept"]:
            kept.append({"prompt_ids": row["prompt_ids"], "response_ids": row["response_ids"]})
    write_jsonl(out / "distilled.jsonl", found)
    if not kept:
        raise InputError(f"{out / 'distilled.jsonl'}: none of {len(found)} answers under a preprompt may be learned; all are cut "
                         "off, or score no higher than the plain ones; take other preprompts (--generic) or --no-gate")
    figures = distill_figures(found)
    replace_file(out / "distill.json", json.dumps(figures, indent=1).encode())
    print_distilled(figures, settings)
    draw_distilled(found, out)
    write_jsonl(out / "pool.jsonl", kept)


def quantile_interval(values: np.ndarray, q: float, draws: int = 1000) -> tuple[float, float, float]:
    """A quantile of the values, and its 95 % interval by bootstrap: (quantile, low, high)."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(np.quantile(values[picks], q, axis=1), [2.5, 97.5])
    return float(np.quantile(values, q)), float(low), float(high)


def distill_figures(found: list[dict]) -> dict:
    """Figure 16 of the rows of distilled.jsonl, with 95 % intervals over prompts or answers.

    "medians" of the safety score by kind (16a), "gain" over the plain answer, mean, by kind; "kept": the share by kind;
    "fifths": of the answers, by the score of the plain one, the mean change of the score with the gate and without (16b);
    on the tiny world "truth": the mean true safety by kind, and its change by a preprompt, with the gate and without.
    """
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in found)]
    plain = list({row["number"]: row for row in found}.values())  # each prompt once
    before, after = (np.array([row[name] for row in found]) for name in ("plain_score", "score"))
    of_kind, change, higher = np.array([row["kind"] for row in found]), after - before, passes(before, after)

    def both(mine: np.ndarray, values: np.ndarray) -> dict:
        return {"without": interval(values[mine]), "with": interval(values[mine & higher]) if (mine & higher).any() else None}

    figures = {
        "prompts": len(plain), "medians": {"plain": quantile_interval([row["plain_score"] for row in plain], 0.5)}
        | {kind: quantile_interval(after[of_kind == kind], 0.5) for kind in kinds},
        "gain": {kind: interval(change[of_kind == kind]) for kind in kinds},
        "kept": {kind: float(np.mean([row["kept"] for row in found if row["kind"] == kind])) for kind in kinds}, "fifths": []}
    for part in np.array_split(np.argsort(before, kind="stable"), 5):
        mine = np.isin(np.arange(len(found)), part)
        if mine.any():
            figures["fifths"].append({"plain": float(before[mine].mean()), "n": int(mine.sum()),
                                      "passes": float(higher[mine].mean())} | both(mine, change))
    if "truth" in found[0]:
        truth = np.array([row["truth"] for row in found])  # (answers, {plain, under the preprompt})
        figures["truth"] = {"plain": interval(np.array([row["truth"][0] for row in plain]))} | {
            kind: interval(truth[of_kind == kind, 1]) for kind in kinds} | {
            "change": both(np.full(len(found), True), truth[:, 1] - truth[:, 0])}
    return figures


def print_distilled(figures: dict, settings: Distill) -> None:
    """The tables of `distill`."""
    show = lambda value, form="{:.3f} [{:.3f}, {:.3f}]": form.format(*value) if value else "-"  # noqa: E731
    signed = lambda value: show(value, "{:+.3f} [{:+.3f}, {:+.3f}]")  # noqa: E731
    print(f"{figures['prompts']:,} unsafe prompts answered by {settings.policy}; gate {'on' if settings.gate else 'off'}")
    print(f"{'preprompt':10} {'median safety score':24} {'gain over the plain answer':26} {'learned':>8}  true safety")
    for kind, median in figures["medians"].items():
        kept = f"{figures['kept'][kind]:.1%}" if kind in figures["kept"] else ""
        print(f"{kind:10} {show(median):24} {signed(figures['gain'].get(kind)):26} {kept:>8}  "
              f"{show(figures.get('truth', {}).get(kind))}")
    print(f"{'score of the plain answer, fifths':34} {'answers':>7} {'higher':>7}  {'change without the gate':25} with the gate")
    for row in figures["fifths"]:
        print(f"{row['plain']:34.3f} {row['n']:7} {row['passes']:7.1%}  {signed(row['without']):25} {signed(row['with'])}")
    if "truth" in figures:
        change = figures["truth"]["change"]
        print(f"change of the true safety: without the gate {signed(change['without'])}, with it {signed(change['with'])}")


def draw_distilled(found: list[dict], out: Path) -> None:
    """scores.png (Figure 16a) and gate.png (Figure 16b)."""
    if not can_draw():
        return
    scores = {"plain": list({row["number"]: row["plain_score"] for row in found}.values())}
    for row in found:
        scores.setdefault(row["kind"], []).append(row["score"])
    with picture(out / "scores.png", "Safety scores by preprompt (Figure 16a)", "score after the sigmoid", "density") as axes:
        for (kind, values), colour in zip(scores.items(), cycle(COLOURS)):
            axes.hist(values, np.linspace(0, 1, 26), density=True, histtype="step", color=colour, label=kind)
            axes.axvline(np.median(values), color=colour, ls=":")
    title = "What a preprompt changes (Figure 16b)"
    with picture(out / "gate.png", title, "score of the plain answer", "change of the score") as axes:
        for higher, name, colour in ((True, "passes the gate", COLOURS[0]), (False, "does not", COLOURS[1])):
            mine = [row for row in found if passes(row["plain_score"], row["score"]) == higher]
            axes.scatter([row["plain_score"] for row in mine], [row["score"] - row["plain_score"] for row in mine], s=6,
                         alpha=0.4, color=colour, label=name)
        axes.axhline(0, color="0.7", lw=0.8)


# ---------------------------------------------------------------------------------------------- the command line

COMMANDS = {"curves": (curves, Curves), "ppo": (ppo, Ppo), "distill": (distill, Distill)}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        command_line(*COMMANDS[sys.argv.pop(1)])
    else:
        command_line(main, Settings)
