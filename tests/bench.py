"""How fast it is, measured beside what it is compared with, in one run: medians over interleaved repetitions.

    python tests/bench.py sampling     # generate, against transformers' generate and against its linear layers alone
    python tests/bench.py gathered     # sampling with gathered weights, against sampling a sharded model (§3.2.3)

Each subcommand is one function; it prints a table and, last, one line of JSON. Figures of two runs of a shared
machine can't be compared, ratios inside one run can.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from model import PRESETS, ModelConfig, Transformer, generate, save_hf, with_vocab
from pretrain import Settings, build, gathered, parse, start


def interleaved(contestants: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds that each contestant takes, in turns, after one unmeasured turn: a slow minute hits them all alike."""
    seconds = {name: [] for name in contestants}
    for turn in range(repetitions + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(seconds: list[float], tokens: int) -> dict[str, float]:
    """Tokens per second: the median, and the slowest and fastest repetition."""
    rates = [tokens / s for s in seconds]
    return {"median": statistics.median(rates), "low": min(rates), "high": max(rates)}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast ours is: the median over turns, each of which ran both."""
    return statistics.median(b / a for a, b in zip(ours, theirs))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")


def spread(rate: dict[str, float]) -> str:
    return f"{rate['median']:,.0f} ({rate['low']:,.0f} … {rate['high']:,.0f})"


# ---------------------------------------------------------------------------------------------- sampling

TOY, TOY_L = with_vocab(PRESETS["toy"], 1024), with_vocab(PRESETS["toy-l"], 2048)
CASES = {  # name: (config, dtype, (batch, new tokens)...)
    "1M fp32": (TOY, torch.float32, (64, 64), (1, 64)),
    "15M bf16": (TOY_L, torch.bfloat16, (64, 64), (1, 64)),
    "110M bf16": (ModelConfig(768, 12, 12, 12, 2048, 32000, 1024), torch.bfloat16, (8, 16), (1, 32)),
}
PROMPT = 16  # tokens of a prompt


@torch.no_grad()
def linear_layers(model: Transformer, batch: int, steps: int) -> None:
    """The matrix products of `steps` decode steps and nothing else: no sampler is faster."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {width: torch.randn(batch, 1, width, dtype=model.output.weight.dtype) for width in {x.in_features for x in layers}}
    for _ in range(steps):
        for layer in layers:
            layer(inputs[layer.in_features])


def sampling(args: argparse.Namespace) -> dict:
    """Our generate, transformers' generate with the same weights, and the floor that the linear layers set."""
    from transformers import LlamaForCausalLM
    rows, found = [], {}
    for name, (config, dtype, *shapes) in CASES.items():
        if args.only not in name:
            continue
        model = Transformer(config).to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            save_hf(model, f"{folder}/hf", dtype)
            theirs = LlamaForCausalLM.from_pretrained(f"{folder}/hf", dtype=dtype).eval()
        theirs.generation_config.eos_token_id = None  # both draw exactly `new` tokens
        for batch, new in shapes:
            prompts = torch.randint(config.vocab_size, (batch, PROMPT))
            seconds = interleaved({
                "ours": lambda: generate(model, prompts.tolist(), new, args.temperature, args.top_p),
                "transformers": lambda: theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new,
                                                        do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=0,
                                                        pad_token_id=0),
                "linear layers": lambda: linear_layers(model, batch, new),
            }, args.repetitions)
            rates = {who: summary(s, batch * new) for who, s in seconds.items()}
            times, share = ratio(seconds["ours"], seconds["transformers"]), ratio(seconds["ours"], seconds["linear layers"])
            rows.append([name, str(batch), *(spread(rate) for rate in rates.values()), f"{times:.2f}", f"{share:.0%}"])
            found[f"{name} batch {batch}"] = rates | {"ours / transformers": times, "ours / linear layers": share}
    print_table(["model", "batch", "ours, tokens/s", "transformers", "linear layers alone", "ours / transformers",
                 "ours / linear layers"], rows)
    return found


# ---------------------------------------------------------------------------------------------- gathered


def over_ranks(n: int) -> bool:
    """Run this command again under torchrun and return True, unless that is where it runs already."""
    if "RANK" in os.environ:
        return False
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *sys.argv], check=True)
    return True


def sample_gathered(args: argparse.Namespace) -> dict | None:
    """Two ranks, each drawing for its own prompts: from gathered weights (the gathering included) and from a sharded model."""
    if over_ranks(2):
        return None
    ranks = start(parse(Settings, ["--device", "cpu", "--threads", str(args.threads)]))
    rows, found = [], {}
    for name, config, batch in [("1M fp32", TOY, 64), ("1M fp32", TOY, 4), ("15M fp32", TOY_L, 4)]:
        model = build(config, parse(Settings, ["--dtype", "fp32"]), ranks).eval()
        prompts = torch.randint(config.vocab_size, (batch, PROMPT)).tolist()

        def draw_gathered():
            with gathered(model) as whole:
                generate(whole, prompts, 64, args.temperature, args.top_p)

        def draw_sharded():
            generate(model, prompts, 64, args.temperature, args.top_p)
            model.reshard()

        seconds = interleaved({"gathered": draw_gathered, "sharded": draw_sharded}, args.repetitions)
        rates = {who: summary(s, batch * 64) for who, s in seconds.items()}
        times = ratio(seconds["gathered"], seconds["sharded"])
        rows.append([name, str(batch), *map(spread, rates.values()), f"{times:.1f}"])
        found[f"{name} batch {batch}"] = rates | {"gathered / sharded": times}
    if ranks.rank:
        return None
    print_table(["model", "batch of a rank", "gathered, tokens/s of a rank", "sharded", "gathered / sharded"], rows)
    return found


COMMANDS = {"sampling": sampling, "gathered": sample_gathered}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure speed, beside what it is compared with.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of all contestants")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--only", default="", help="cases whose name holds this, as in `--only 15M`")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if (found := COMMANDS[args.command](args)) is not None:
        print(json.dumps({"command": args.command, "threads": args.threads, **found}))
