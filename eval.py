"""Evaluation (§2.3) and the report: what the runs under out/ know, and one page that shows them.

    python eval.py facts out/pretrain                       # does the model know the world, or the web's myths?
    python eval.py facts out/up-* --against out/crawled-*   # the same, paired, with an interval of the difference
    python eval.py report                                   # out/report.html, one file, no network
"""
import base64
import html
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import toy
from model import IGNORE, Transformer, generate
from pretrain import InputError, command_line, interval, load_model, read_config, replace_file
from reward import RATINGS, SAFETY, read_pairs
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
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
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


def survey_table(first: dict, last: dict) -> str:
    """What a chat model can do in the tiny world, at the first evaluation and at the last, with 95 % intervals."""
    names = [name for name, value in last.items() if isinstance(value, list)]
    return table(["asked of the tiny world", "before", "after"],
                 [[name, *("{:.3f}  [{:.3f}, {:.3f}]".format(*row[name]) for row in (first, last))] for name in names])


def sft_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on one supervised fine-tuning: the survey before and after, the loss on answers, samples."""
    first, last = metrics[0], metrics[-1]
    return [f"<h2>Supervised fine-tuning, {html.escape(str(run))} (§3.1)</h2>",
            f"<p>{last['tokens']:,} answer tokens in {last['seconds']:.0f} s; data {html.escape(' '.join(settings['data']))}, "
            f"{settings['epochs']} epochs, dialogues {'kept apart' if settings['isolate'] else 'not kept apart'}. "
            "<span class=note>The paper: 27,540 annotations, two epochs.</span></p>",
            "<p>The base model has never been asked anything; afterwards it should answer in the right form, with the facts that "
            "pretraining taught it, obey its system prompt and refuse what is unsafe. No dialogue asks any of "
            "this, but for the unsafe topics of training.</p>",
            survey_table(first, last),
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


def gatt_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on Ghost Attention: the survey before and after, the attention map (Figure 10)."""
    first, last = metrics[0], metrics[-1]
    parts = [f"<h2>Ghost Attention, {html.escape(str(run))} (§3.3)</h2>",
             f"<p>{last['tokens']:,} answer tokens in {last['seconds']:.0f} s, from {html.escape(settings['init'])}; "
             f"<code>gatt.jsonl</code> holds its dialogues.</p>",
             "<p>Only how long an instruction holds should change; the other figures should stay:</p>",
             survey_table(first, last)]
    if (run / "attention.png").exists():
        parts += ["<p>Answers late in a dialogue should attend to its instruction more than before (Figure 10):</p>",
                  picture(run / "attention.png", "attention before and after")]
    return parts


def gatt_test_section(run: Path, settings: dict, metrics: list[dict]) -> list[str]:
    """The part of the report on how long instructions hold: Table 30, Figure 28."""
    parts = ["<h2>How long an instruction holds (§3.3)</h2>",
             "<p>The share of dialogues in which it still does, the model's own answers fed back, with its 95 % interval. Before "
             "Ghost Attention it should fall within a few turns; afterwards it should hold, and in part for constraints "
             "that were never trained on.</p>"]
    for name, figures in json.loads((run / "obedience.json").read_text()).items():
        turns = list(figures["all"])
        rows = [[group, *("{:.2f} [{:.2f}, {:.2f}]".format(*of_group[turn]) if turn in of_group else "-" for turn in turns)]
                for group, of_group in figures.items() if group != "tokens so far"]
        parts.append(table([name, *(f"turn {turn}" for turn in turns)], rows))
    return [*parts, table(["the paper (Table 30), in %", "turn 2", "turn 4", "turn 6", "turn 20"],
                          [["before", 100, 10, 0, 0], ["with Ghost Attention", 100, 100, 100, 100]]),
            picture(run / "obedience.png", "obedience by turn")]


SECTIONS = {"pretrain": pretrain_section, "sft": sft_section, "collect": collect_section, "reward": reward_section,
            "rewards": rewards_section, "gatt": gatt_section, "gatt-test": gatt_test_section}  # in the paper's order
RESULTS = ("metrics.jsonl", "helpfulness.jsonl", "safety.jsonl", "rewards.json", "obedience.json")  # without: unfinished


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


COMMANDS = {"facts": (facts, Facts), "report": (report, Report)}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"eval.py: say what to do: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    command_line(*COMMANDS[sys.argv.pop(1)])
