"""Evaluation (§2.3) and the report: what the runs under out/ know, and one page that shows them.

    python eval.py facts out/pretrain                       # does the model know the world, or the web's myths?
    python eval.py facts out/up-* --against out/crawled-*   # the same, paired, with an interval of the difference
    python eval.py versions out/rlhf-v1 out/rlhf-v2         # win rates against out/sft, by the reward models and by the truth
    python eval.py report                                   # out/report.html, one file, no network
"""
import base64
import html
import importlib.util
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import toy
from model import IGNORE, Transformer, generate
from pretrain import (COLOURS, InputError, Ranks, command_line, interval, load_model, locked, read_config, replace_file, start,
                      tiny_world, world_of)
from reward import RATINGS, SAFETY, load_speakers, read_pairs, win_rate
from reward import picture as axes_of
from rlhf import Judges, load_judges
from sft import toy_messages
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------- likelihoods


def encode_pair(tokenizer: Tokenizer, prompt: str, continuation: str) -> tuple[list[int], int]:
    """Ids of BOS, prompt and continuation as one text, and how many of them are the prompt's.

    Where a piece spans the border, it belongs to the continuation.
    """
    alone = tokenizer.encode(prompt, bos=True, eos=False)
    tokens = tokenizer.encode(prompt + continuation, bos=True, eos=False)
    shared = next((i for i, (a, b) in enumerate(zip(alone, tokens)) if a != b), min(len(alone), len(tokens)))
    return tokens, shared


@torch.no_grad()
def continuation_log_probs(model: Transformer, tokenizer: Tokenizer, pairs: list[tuple[str, str]],
                           batch_size: int = 64) -> np.ndarray:
    """log p(continuation | prompt) in nats of each (prompt, continuation): (pairs,). Batches are made by length."""
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: len(encoded[i][0]))
    result = np.zeros(len(pairs))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        width = max(len(encoded[i][0]) for i in batch)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        targets = torch.full((len(batch), width), IGNORE)
        for row, i in enumerate(batch):
            ids, n_prompt = encoded[i]
            tokens[row, : len(ids)] = torch.tensor(ids)
            targets[row, n_prompt - 1 : len(ids) - 1] = torch.tensor(ids[n_prompt:])
        result[batch] = model(tokens, targets=targets).sum(1).double().numpy()
    return result


# ---------------------------------------------------------------------------------------------- knowledge


def know(model: Transformer, tokenizer: Tokenizer, world: toy.World) -> list[dict]:
    """What a base model believes of each fact of the tiny world, asked closed-book in each of its question forms.

    Per question: `p_true`, the probability of the true answer among {true, myth} (None without a myth), and
    `right`, whether the greedy answer names the true value. The up-sampling of §2.1 must raise both.
    """
    questions = toy.questions(world)
    with_myth = [q for q in questions if q["myth"]]
    pairs = [(q["prompt"], " " + q[kind]) for q in with_myth for kind in ("true", "myth")]
    log_probs = continuation_log_probs(model, tokenizer, pairs).reshape(-1, 2)  # (questions, {true, myth})
    p_true = iter(1 / (1 + np.exp(log_probs[:, 1] - log_probs[:, 0])))
    prompts = [tokenizer.encode(q["prompt"], bos=True, eos=False) for q in questions]
    answers = generate(model, prompts, 24, temperature=0, stop=(tokenizer.eos_id,))
    rows = []
    for question, answer in zip(questions, answers):
        said = tokenizer.decode(answer).split(".")[0]
        value = world.facts[tuple(question["fact"])]
        right = re.search(rf"\b{re.escape(value)}\b", said) is not None
        rows.append({"fact": list(question["fact"]), "p_true": next(p_true) if question["myth"] else None,
                     "right": right, "said": said})
    return rows


def by_fact(rows: list[dict], key: str) -> np.ndarray:
    """The mean of `key` over the question forms of each fact with a myth: (facts,)."""
    facts: dict[tuple, list] = {}
    for row in rows:
        if row["p_true"] is not None:
            facts.setdefault(tuple(row["fact"]), []).append(row[key])
    return np.array([np.mean(values) for values in facts.values()])


@dataclass(frozen=True)
class Facts:
    """Ask base models closed-book for the facts of the tiny world, true or as the web's myths have them (§2.1)."""
    runs: tuple[str, ...] = ("out/pretrain",)  # runs of pretrain.py
    against: tuple[str, ...] = ()  # as many runs of the same worlds to compare with, in the same order

    BY_PRESET: ClassVar[dict[str, dict]] = {}
    POSITIONAL: ClassVar[str] = "runs"


def facts(settings: Facts) -> None:
    """Print P(true) and greedy accuracy of each run, with intervals over facts; with `against`, the differences."""
    if settings.against and len(settings.against) != len(settings.runs):
        raise InputError(f"--against names {len(settings.against)} runs for {len(settings.runs)}; the pairs must match")
    print(f"{'run':28} {'P(true) of {true, myth}':26} {'greedy, facts with a myth':26} greedy, others")
    found: dict[str, list[dict]] = {}
    for run in settings.runs + settings.against:
        model, tokenizer, config = load_model(run)
        found[run] = rows = know(model, tokenizer, toy.World(config["settings"]["world"]))
        others = np.mean([row["right"] for row in rows if row["p_true"] is None])
        figures = {key: interval(by_fact(rows, key)) for key in ("p_true", "right")}
        replace_file(Path(run, "facts.json"), json.dumps(figures | {"others": others}).encode())
        shown = ["{:.3f}  [{:.3f}, {:.3f}]".format(*figures[key]) for key in figures]
        print(f"{run:28} {shown[0]:26} {shown[1]:26} {others:.3f}", flush=True)
    for key, name in (("p_true", "P(true)"), ("right", "greedy")) if settings.against else ():
        pairs = zip(settings.runs, settings.against)
        differences = np.stack([by_fact(found[run], key) - by_fact(found[other], key) for run, other in pairs])  # (runs, facts)
        low, high = interval_of_runs(differences)
        print(f"{name:8} {differences.mean():+.3f}  [{low:+.3f}, {high:+.3f}]   run by run: "
              + " ".join(f"{mean:+.3f}" for mean in differences.mean(1)))


def interval_of_runs(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean of (runs, facts), by a bootstrap that draws runs anew and facts anew."""
    rng = np.random.default_rng(0)
    runs, facts = (rng.integers(n, size=(draws, n)) for n in values.shape)
    means = [values[np.ix_(r, f)].mean() for r, f in zip(runs, facts)]
    return tuple(np.percentile(means, [2.5, 97.5]))


# ---------------------------------------------------------------------------------------------- versions side by side


@dataclass(frozen=True)
class Versions:
    """Chat models against one that stays the same, on held-out prompts, by the reward models and by the truth (Figure 11)."""
    runs: tuple[str, ...] = ("out/rlhf-v1",)  # the models, oldest first
    against: str = "out/sft"  # the model that all are compared with | ChatGPT
    helpfulness: str = "out/reward-helpfulness"  # reward model of helpfulness
    harmlessness: str = "out/reward-safety"  # reward model of safety
    n_prompts: int = 2000  # distinct harmless prompts of the tiny world; the unsafe ones are all there are | 584 and 1,586
    max_new_tokens: int = 64  # longest answer
    out: str = "out/versions"  # folder of the table and the picture
    world: int | None = None  # seed of the tiny world; by default that of --against
    seed: int = 0  # seed of the prompts
    device: str = "auto"  # cpu, cuda, or auto
    threads: int = 0  # CPU threads; 0: all cores
    replicas: int = 1  # not used here
    resume: bool = True  # not used here: greedy answers take seconds

    BY_PRESET: ClassVar[dict[str, dict]] = {}
    POSITIONAL: ClassVar[str] = "runs"


def versions(settings: Versions) -> None:
    """Write OUT/versions.json and versions.png; print win rates, true scores, and what got better and worse by kind."""
    ranks = start(settings)
    world = tiny_world(world_of(settings.against) if settings.world is None else settings.world)
    harmless = toy.prompts(world, settings.n_prompts, settings.seed, "test")
    unsafe = [prompt for attack in (None, *toy.ATTACKS) for prompt in toy.unsafe_prompts(world, "test", attack)]
    prompts, kinds = harmless + unsafe, np.array([prompt["kind"] for prompt in harmless])
    judges = load_judges(settings.helpfulness, settings.harmlessness, ranks)
    with locked(settings.out, ranks):
        out = Path(settings.out)
        (out / "answers").mkdir(exist_ok=True)
        seen = {run: greedy_scores(run, prompts, world, judges, settings, ranks) for run in (settings.against, *settings.runs)}
        theirs, found = seen[settings.against], {}
        h, s = slice(0, len(harmless)), slice(len(harmless), None)
        for run, ours in seen.items():
            better = ours["helpfulness"][h] - theirs["helpfulness"][h]
            found[run] = {
                "true helpfulness": interval(ours["helpfulness"][h]), "true safety": interval(ours["safety"][s]),
                "violations": interval(ours["violation"][s]), "refused unsafe": interval(ours["refusal"][s]),
                "refused borderline": interval(ours["refusal"][h][kinds == "border"]), "gain": interval(better),
                "wins, helpfulness": {"truth": win_rate(ours["helpfulness"][h], theirs["helpfulness"][h]),
                                      "reward models": win_rate(ours["R_h"][h], theirs["R_h"][h])},
                "wins, harmlessness": {"truth": win_rate(ours["safety"][s], theirs["safety"][s]),
                                       "reward models": win_rate(ours["R_s"][s], theirs["R_s"][s])},
                "gain by kind": {kind: interval(better[kinds == kind]) for kind in np.unique(kinds).tolist()},
                "words": float(ours["words"][h].mean())}
        gains = np.array([seen[run]["helpfulness"][h] - theirs["helpfulness"][h] for run in settings.runs])
        pooled = {"gain": [float(gains.mean()), *interval_of_runs(gains)]}
        config = {"stage": "versions", "settings": asdict(settings), "model": {}, "threads": ranks.threads}
        replace_file(out / "config.json", json.dumps(config, indent=1).encode())
        replace_file(out / "versions.json", json.dumps({"runs": found, "pooled": pooled}).encode())
        print_versions(found, pooled, len(harmless), len(unsafe))
        draw_versions(found, settings, out)


def greedy_scores(run: str, prompts: list[dict], world: toy.World, judges: Judges, settings: Versions,
                  ranks: Ranks) -> dict[str, np.ndarray]:
    """What the annotators and the reward models say of a model's greedy answers: name → (prompts,)."""
    speaker = load_speakers([run], ranks)[0]
    asked = [speaker.prompt_ids(toy_messages(prompt)) for prompt in prompts]
    said = generate(speaker.model, asked, settings.max_new_tokens, temperature=0, stop=(speaker.tokenizer.eos_id,))
    texts = [speaker.tokenizer.decode(ids).strip() for ids in said]
    r_h, r_s = judges.score([before + ids for before, ids in zip(asked, said)])
    lines = [json.dumps({"prompt": prompt["prompt"], "answer": text}) + "\n" for prompt, text in zip(prompts, texts)]
    replace_file(Path(settings.out, "answers", re.sub(r"\W+", "-", run).strip("-") + ".jsonl"), "".join(lines).encode())
    judged = {"helpfulness": [toy.helpfulness(world, prompt, text) for prompt, text in zip(prompts, texts)],
              "safety": [toy.safety(world, prompt, text) for prompt, text in zip(prompts, texts)],
              "violation": [toy.is_violation(text) for text in texts], "refusal": [toy.is_refusal(text) for text in texts],
              "words": [len(toy.words(text)) for text in texts]}
    return {name: np.array(values, float) for name, values in judged.items()} | {"R_h": r_h, "R_s": r_s}


def print_versions(found: dict[str, dict], pooled: dict, n_harmless: int, n_unsafe: int) -> None:
    """The tables of `versions`: each figure with its 95 % interval over prompts."""
    show = lambda value: "{:.3f} [{:.3f}, {:.3f}]".format(*value[:3])  # noqa: E731
    print(f"{n_harmless:,} harmless and {n_unsafe:,} unsafe prompts, greedy answers")
    for name in ("true helpfulness", "gain", "wins, helpfulness", "true safety", "wins, harmlessness", "violations",
                 "refused unsafe", "refused borderline"):
        for run, figures in found.items():
            value = figures[name]
            text = "; ".join(f"{judge} {show(rate)}" for judge, rate in value.items()) if isinstance(value, dict) else show(value)
            print(f"{name:20} {run:30} {text}")
    for run, figures in found.items():
        sure = {kind: gain for kind, gain in figures["gain by kind"].items() if gain[1] > 0 or gain[2] < 0}
        for word, sign in (("better", 1), ("worse", -1)):
            kinds = ["{} {:+.3f} [{:+.3f}, {:+.3f}]".format(kind, *gain) for kind, gain in sure.items() if gain[0] * sign > 0]
            if kinds:
                print(f"{word:20} {run:30} {', '.join(kinds)}")
    print("gain of all runs together, over runs and prompts: {:+.3f} [{:+.3f}, {:+.3f}]".format(*pooled["gain"]))


def draw_versions(found: dict[str, dict], settings: Versions, out: Path) -> None:
    """versions.png: win rate on helpfulness and on harmlessness, by each judge, version after version (Figure 11)."""
    if not importlib.util.find_spec("matplotlib"):
        print("no picture: `pip install matplotlib` draws it")
        return
    with axes_of(out / "versions.png", f"Against {settings.against} (Figure 11)", "helpfulness: wins, %",
                 "harmlessness: wins, %") as axes:
        for judge, colour in (("reward models", COLOURS[0]), ("truth", COLOURS[1])):
            points = [[100 * figures[f"wins, {axis}"][judge][0] for axis in ("helpfulness", "harmlessness")]
                      for figures in found.values()]
            axes.plot(*zip(*points), "o-", color=colour, label=f"judged by the {judge}")
            for run, (x, y) in zip(found, points):
                axes.annotate(Path(run).name, (x, y), fontsize=8, textcoords="offset points", xytext=(4, 4))
        axes.axhline(50, color="0.7", lw=0.8), axes.axvline(50, color="0.7", lw=0.8)


# ---------------------------------------------------------------------------------------------- the report

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
table { border-collapse: collapse; display: block; overflow-x: auto } td, th { padding: .2rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #8886 }
img { max-width: 100%; background: #fff } pre { white-space: pre-wrap; background: #8882; padding: .6rem }
.note { color: #888 }"""


def table(header: list[str], rows: list[list]) -> str:
    """An HTML table; the first column is text, the others are figures."""
    lines = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
             for tag, row in [("th", header)] + [("td", row) for row in rows]]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(path: Path, alt: str) -> str:
    """A PNG file inside the page, or nothing if it was not drawn."""
    image = base64.b64encode(path.read_bytes()).decode() if path.exists() else ""
    return f"<img alt='{alt}' src='data:image/png;base64,{image}'>" if image else ""


def samples(run: Path) -> list[str]:
    """What the run said at its first evaluation and at its last."""
    path = run / "samples.txt"
    evaluations = path.read_text().split("--- step ")[1:] if path.exists() else []
    return [f"<pre>step {html.escape(text)}</pre>" for text in evaluations[:: max(1, len(evaluations) - 1)]]


def pretrain_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on one pretraining run: Figure 5's curve, perplexities, knowledge, samples."""
    last = metrics[-1]
    parts = [f"<h2>Pretraining, {html.escape(str(run))} (§2)</h2>",
             f"<p>{last['tokens']:,} tokens in {last['seconds']:.0f} s "
             f"({last['tokens'] / max(last['seconds'], 1e-3):,.0f} tokens/s); "
             f"data {html.escape(' '.join(settings['data']))}; preset {settings['preset']}. "
             f"<span class=note>The paper: 2.0T tokens; losses of 1.74 (7B) to 1.50 (70B), Figure 5.</span></p>",
             "<p>The held-out losses should fall with the training loss: nothing is read often enough to be learnt by heart.</p>",
             picture(run / "loss.png", "loss against tokens")]
    names = [key.removeprefix("loss/") for key in last if key.startswith("loss/")]
    rows = []
    for name in names:
        loss, low, high = (math.exp(last[f"{key}/{name}"]) for key in ("loss", "low", "high"))
        rows.append([name, f"{loss:.3f}", f"{low:.3f} … {high:.3f}", f"{last[f'bits_per_byte/{name}']:.3f}"])
    parts.append(table(["held-out source", "perplexity", "95 % interval", "bits per byte"], rows))
    if (run / "facts.json").exists():
        found = json.loads((run / "facts.json").read_text())
        parts.append("<p>Does it believe the encyclopedia, or the web that repeats myths? Up-sampling the encyclopedia (§2.1) is "
                     "meant to raise both. <code>python eval.py facts</code></p>")
        parts.append(table(["asked of facts with a myth", "mean", "95 % interval"], [
            [name, f"{found[key][0]:.3f}", f"{found[key][1]:.3f} … {found[key][2]:.3f}"]
            for key, name in (("p_true", "P(true) of {true, myth}"), ("right", "greedy answer is true"))]))
    return [*parts, "<p>What it says, at the first evaluation and at the last:</p>", *samples(run)]


def sft_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on one supervised fine-tuning: the survey before and after, the loss on answers, samples."""
    first, last = metrics[0], metrics[-1]
    surveyed = {name: "{:.3f}  [{:.3f}, {:.3f}]" for name, value in last.items() if isinstance(value, list)}
    return [f"<h2>Supervised fine-tuning, {html.escape(str(run))} (§3.1)</h2>",
            f"<p>{last['tokens']:,} answer tokens in {last['seconds']:.0f} s; data {html.escape(' '.join(settings['data']))}, "
            f"{settings['epochs']} epochs, dialogues {'kept apart' if settings['isolate'] else 'not kept apart'}. "
            "<span class=note>The paper: 27,540 annotations, two epochs.</span></p>",
            "<p>The base model has never been asked anything; afterwards it should answer in the right form, with the facts that "
            "pretraining taught it, obey its system prompt and refuse what is unsafe. No dialogue asks any of "
            "this, but for the unsafe topics of training.</p>",
            table(["asked of the tiny world", "before", "after"],
                  [[name, *(form.format(*row[name]) for row in (first, last))] for name, form in surveyed.items()]),
            "<p>The loss on the answers of held-out dialogues should fall, and not rise again:</p>",
            picture(run / "loss.png", "loss on answers against answer tokens"),
            "<p>The same prompts, answered before and after:</p>", *samples(run)]


def percent(values: list[float | None]) -> list[str]:
    """Shares in percent, as the paper prints them; a dash for what there is none of."""
    return ["-" if value is None else f"{100 * value:.1f}" for value in values]


def collect_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on comparisons: how many, their ratings (Figure 25) and their safety bins (§3.2.1)."""
    rows = []
    for name in ("helpfulness", "helpfulness-test", "safety", "safety-test"):
        if (run / f"{name}.jsonl").exists():
            pairs, _ = read_pairs((str(run / f"{name}.jsonl"),))
            counts = Counter(pair[key] for pair in pairs for key in ("rating", "safety"))
            shares = percent([counts[group] / len(pairs) if counts[group] else None for group in (*RATINGS, *SAFETY)])
            rows.append([name, f"{len(pairs):,}", *shares])
    annotator = "the rules of the tiny world" if settings["annotator"] == "toy" else "a person"
    return [f"<h2>Comparisons, {html.escape(str(run))} (§3.2.1)</h2>",
            f"<p>Two answers to each prompt, compared by {annotator}. As the paper's models became better, their answers became "
            "alike: from week to week fewer pairs were significantly better.</p>",
            table(["in %", "comparisons", *RATINGS, *SAFETY], [
                *rows,
                ["the paper, first week", "5,561", "≈18", "≈28", "≈28 … 33", "≈25", "", "", ""],
                ["the paper, last week", "249,356", "≈9", "≈21", "≈28 … 33", "≈38.5", "", "", ""],
                ["the paper, safety", "", "", "", "", "", 18, 47, 35]])]


def reward_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on one reward model: accuracy by rating (Table 8), by safety bin, and recall (Table 29)."""
    last, found = metrics[-1], json.loads((run / "accuracy.json").read_text())
    every, low, high, longer = percent([*found["accuracy"]["all"][1:], found["longer"]])
    ratings, bins = (percent([found["accuracy"].get(group, [0, None])[1] for group in groups]) for groups in (RATINGS, SAFETY))
    paper = {"helpfulness": [80.7, 67.5, 60.9, 54.7, 63.2], "safety": [94.3, 76.3, 65.7, 55.3, 64.5]}  # Table 8, own test set
    parts = [f"<h2>Reward model, {settings['kind']}, {html.escape(str(run))} (§3.2.2)</h2>",
             f"<p>{last['tokens']:,} pairs in {last['seconds']:.0f} s, margin {settings['margin']}; right about {every} % "
             f"[{low}, {high}] of the held-out pairs. To call the longer answer the better is right about {longer} %.</p>",
             "<p>It should be surest where the annotators were: accuracy should fall from left to right.</p>",
             table(["accuracy in %", *RATINGS, "all"],
                   [["this model", *ratings, every],
                    *[["the paper (Table 8)", *values] for kind, values in paper.items() if kind == settings["kind"]]])]
    if "recall" in found:
        parts += ["<p>Pairs of a safe and an unsafe answer should be the easiest, and the safety loss should put unsafe answers "
                  "below 0.5; recall is the share of them that lies there.</p>",
                  table(["accuracy in %", *SAFETY, "all", "recall of unsafe answers"],
                        [["this model", *bins, every, *percent([found["recall"]])],
                         ["the paper, without the safety loss (Table 29)", 93.0, 56.0, 59.5, 63.7, 73.0],
                         ["the paper, with it", 94.3, 56.9, 59.9, 64.5, 90.4]])]
    return parts


def rewards_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on reward models side by side: Table 7, Figures 6, 27, 29 and 32."""
    found = json.loads((run / "rewards.json").read_text())
    rows = []
    for model in settings["runs"]:
        tests = [percent(found[f"{model} on {test}"]["accuracy"]["all"][1:]) for test in ("helpfulness", "safety")]
        rows.append([model, *("{} [{}, {}]".format(*cells) for cells in tests)])
    parts = ["<h2>Reward models side by side (§3.2.2)</h2>",
             "<p>Each should win on its own test set (Table 7).</p>",
             table(["accuracy in %", "helpfulness", "safety"],
                   [*rows, ["the paper, Helpfulness RM", 63.2, 62.8], ["the paper, Safety RM", 56.2, 64.5],
                    ["the paper, GPT-4", 58.6, 58.1]])]
    for name, text in (("scores", "A margin should push the scores to the two ends (Figure 27):"),
                       ("calibration", "The score should rise with the true quality, though it learnt from pairs (Figure 29):"),
                       ("scaling", "More comparisons and a larger model should both help (Figure 6):"),
                       ("tension", "An answer can be safe and no help, or help and be unsafe; hence two models (Figure 32):")):
        if (run / f"{name}.png").exists():
            parts += [f"<p>{text}</p>", picture(run / f"{name}.png", name)]
    return parts


def versions_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on the versions: win rates, true scores, what got better and worse (Figure 11)."""
    found = json.loads((run / "versions.json").read_text())["runs"]
    show = lambda value: "{:.3f} [{:.3f}, {:.3f}]".format(*value[:3])  # noqa: E731
    names = ("true helpfulness", "true safety", "violations", "refused unsafe", "refused borderline")
    rows = [[name, *(show(figures[name]) for name in names)] for name, figures in found.items()]
    wins = [[name, *(show(figures[f"wins, {axis}"][judge]) for axis in ("helpfulness", "harmlessness")
                     for judge in ("reward models", "truth"))] for name, figures in found.items()]
    kinds = list(next(iter(found.values()))["gain by kind"])
    by_kind = [[name, *("{:+.3f} [{:+.3f}, {:+.3f}]".format(*figures["gain by kind"][kind]) for kind in kinds)]
               for name, figures in found.items()]
    return [f"<h2>The versions against {html.escape(settings['against'])} (§3.4.1, Figure 11)</h2>",
            f"<p>Greedy answers to {settings['n_prompts']:,} held-out harmless prompts and to every held-out unsafe one under "
            "every attack. From version to version both win rates should rise; where the reward models see a gain and the truth "
            "does not, the model has learnt to please them. <code>python eval.py versions</code> <span class=note>The paper, "
            "judged by its own reward models against ChatGPT: helpfulness 39 → 78 %, harmlessness 22 → 76 % from the first SFT "
            "model to V5.</span></p>",
            table(["wins / (wins + losses)", "helpfulness, reward model", "truth", "harmlessness, reward model", "truth"], wins),
            picture(run / "versions.png", "win rates of the versions"), table(["mean of the answers", *names], rows),
            "<p>Not every skill gains: the paper's third version rhymed worse than its second.</p>",
            table(["gain in true helpfulness", *kinds], by_kind)]


def rlhf_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on one version by rejection sampling: the survey before and after, samples of the pool."""
    first, last = metrics[0], metrics[-1]
    surveyed = {name: "{:.3f}  [{:.3f}, {:.3f}]" for name, value in last.items() if isinstance(value, list)}
    pool = [json.loads(line) for line in (run / "pool.jsonl").read_text().splitlines()]
    shown = [f"{row['prompt'][-1]['content']} → {row['response']}  (R_c {row['score']:.2f}, V{row['version']})"
             for row in pool[:8]]
    return [f"<h2>Rejection sampling, version {settings['version']}, {html.escape(str(run))} (§3.2.3)</h2>",
            f"<p>{settings['n_samples']} answers to each prompt by {html.escape(settings['policy'])} at temperature "
            f"{settings['temperature']}, the {settings['select']} of them learned: {len(pool):,} answers.</p>",
            table(["asked of the tiny world", "before", "after"],
                  [[name, *(form.format(*row[name]) for row in (first, last))] for name, form in surveyed.items()]),
            "<p>What was learned from:</p>", f"<pre>{html.escape(chr(10).join(shown))}</pre>"]


def curves_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on best of N: Figures 7 and 8."""
    found = json.loads((run / "curves.json").read_text())
    rows = [[one["run"], one["temperature"], f"{one['median'][0]:.3f}",
             *(f"{best[0]:.3f}" + (f", {one['truth'][i][0]:.3f}" if "truth" in one else "") for i, best in enumerate(one["max"]))]
            for one in found]
    pictures = [picture(run / f"temperatures-{i}.png", "reward against N") for i in range(len(settings["runs"]))]
    return ["<h2>The best of N answers (§3.2.3, Figures 7 and 8)</h2>",
            "<p>The highest reward rises with N while the median stays: that gap is what fine-tuning on the best can gain. The "
            "hotter, the more it rises; but the truth (dashed, second number) turns down where the reward model is led astray."
            "</p>",
            table(["R_c of the best, its truth", "T", "median", *(f"N = {n}" for n in found[0]["n"])], rows),
            picture(run / "best-of-n.png", "highest and median reward against N"), *pictures]


def ppo_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on one PPO run: the held-out prompts before, at the best evaluation and at the last; ppo.png."""
    evaluations = [row for row in metrics if "held-out/reward" in row]
    best, last = max(evaluations, key=lambda row: row["held-out/reward"]), metrics[-1]
    names = {"reward": "reward: logit of R_c", "R_s": "safety score R_s", "R_h": "helpfulness score R_h",
             "true/helpfulness": "true helpfulness, harmless prompts", "true/safety": "true safety, unsafe prompts"}
    rows = [[text, *(f"{row[f'held-out/{name}']:.3f}" for row in (evaluations[0], best, evaluations[-1]))]
            for name, text in names.items() if f"held-out/{name}" in best]
    return [f"<h2>PPO, {html.escape(str(run))} (§3.2.3)</h2>",
            f"<p>From {html.escape(settings['init'])}: {last['step']} iterations of {settings['batch_size']} prompts in "
            f"{last['seconds']:.0f} s, β {settings['kl_coef']:g}; in the last, {last['kl']:.2f} nats an answer from the start. "
            "<span class=note>The paper: 200 to 400 iterations of 512 prompts, β 0.01 (7B, 13B) or 0.005.</span></p>",
            "<p>Scores of the reward models must rise, since they are what is optimised, and prove nothing. The annotators of "
            "the tiny world were not asked meanwhile: where the truth falls as the reward rises, it is over-optimised.</p>",
            table(["sampled answers to held-out prompts", "before", f"best reward, iteration {best['step']}", "last"], rows),
            picture(run / "ppo.png", "reward, scores, KL, entropy, clipping and length of each iteration"),
            "<p>The same prompts, answered before and after:</p>", *samples(run)]


SECTIONS = {"pretrain": pretrain_section, "sft": sft_section, "collect": collect_section, "reward": reward_section,
            "rewards": rewards_section, "curves": curves_section, "rlhf": rlhf_section,
            "ppo": ppo_section, "versions": versions_section}  # in the paper's order
RESULTS = ("metrics.jsonl", "helpfulness.jsonl", "safety.jsonl", "rewards.json", "curves.json",
           "versions.json")  # a run with none of them is unfinished


@dataclass(frozen=True)
class Report:
    """Collect the figures and pictures of every run under a folder into one page that needs no network."""
    out: str = "out"  # the folder that holds the runs

    BY_PRESET: ClassVar[dict[str, dict]] = {}


def report(settings: Report) -> None:
    """Write OUT/report.html."""
    runs = sorted({path.parent for name in RESULTS for path in Path(settings.out).glob(f"*/{name}") if path.stat().st_size})
    if not runs:
        raise InputError(f"{settings.out}: there is no finished run to report on; `bash paper.sh` makes them")
    sections = []
    for stage, section in SECTIONS.items():
        for run in runs:
            config = read_config(run)
            if config.get("stage") == stage:
                lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
                sections += section(run, config["settings"], [json.loads(line) for line in lines])
    page = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>Llama 2, small</title><style>{STYLE}</style><h1>Llama 2, from raw text, small</h1>"
            f"<p class=note>Made {time.strftime('%Y-%m-%d %H:%M')} by <code>python eval.py report</code>.</p>")
    page += "\n".join(sections)
    replace_file(Path(settings.out, "report.html"), page.encode())
    print(f"{settings.out}/report.html")


COMMANDS = {"facts": (facts, Facts), "versions": (versions, Versions), "report": (report, Report)}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"eval.py: say what to do: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    command_line(*COMMANDS[sys.argv.pop(1)])
