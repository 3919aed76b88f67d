"""How fast it is, measured beside what it is compared with, in one run: medians over interleaved repetitions.

    python tests/bench.py sampling     # generate, against transformers' generate and against its linear layers alone
    python tests/bench.py gathered     # sampling with gathered weights, against sampling a sharded model (§3.2.3)
    python tests/bench.py training     # one optimizer step, against transformers' Llama and litgpt's; on a GPU with MFU

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
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import PRESETS, ModelConfig, Transformer, generate, save_hf, swap_rope_layout, with_vocab
from pretrain import Settings, adamw, build, gathered, lm_loss, mfu, optimizer_step, parse, start


def interleaved(contestants: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds that each contestant takes, in turns, after one unmeasured turn: a slow minute hits them all alike."""
    seconds = {name: [] for name in contestants}
    for turn in range(repetitions + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
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


def in_transformers(model: Transformer) -> nn.Module:
    """The same weights in transformers' Llama."""
    from transformers import LlamaForCausalLM
    weight = model.output.weight
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, f"{folder}/hf")
        return LlamaForCausalLM.from_pretrained(f"{folder}/hf", dtype=weight.dtype).to(weight.device)


# ---------------------------------------------------------------------------------------------- sampling

TOY, TOY_L = with_vocab(PRESETS["toy"], 1024), with_vocab(PRESETS["toy-l"], 2048)
GPT_2 = ModelConfig(768, 12, 12, 12, 2048, 32000, 1024)  # GPT-2's shape: 110M without, 134M with the output matrix
CASES = {  # name: (config, dtype, (batch, new tokens)...)
    "1M fp32": (TOY, torch.float32, (64, 64), (1, 64)),
    "15M bf16": (TOY_L, torch.bfloat16, (64, 64), (1, 64)),
    "110M bf16": (GPT_2, torch.bfloat16, (8, 16), (1, 32)),
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
    rows, found = [], {}
    for name, (config, dtype, *shapes) in CASES.items():
        if args.only not in name:
            continue
        model = Transformer(config).to(dtype)
        theirs = in_transformers(model).eval()
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


# ---------------------------------------------------------------------------------------------- training

STEPS = {  # name: (config, dtype, rows, tokens of a row)
    "1M fp32": (TOY, "fp32", 8, 256), "15M fp32": (TOY_L, "fp32", 8, 256), "15M bf16": (TOY_L, "bf16", 8, 256),
    "110M fp32": (GPT_2, "fp32", 2, 256),
}
GPU_STEPS = {
    "124M bf16": (GPT_2, "bf16", 16, 1024), "1.1B bf16": (ModelConfig(2048, 22, 32, 4, 5632), "bf16", 2, 4096),
    "7B's shape, 4 layers, bf16": (replace(PRESETS["7b"], n_layers=4), "bf16", 1, 4096),
}


def in_litgpt(model: Transformer) -> nn.Module:
    """The same weights in litgpt's GPT."""
    from litgpt import GPT, Config
    c = model.config
    theirs = GPT(Config(name="ours", block_size=c.max_seq_len, padded_vocab_size=c.vocab_size, n_layer=c.n_layers,
                        n_head=c.n_heads, n_query_groups=c.n_kv_heads, n_embd=c.dim, intermediate_size=c.ffn_hidden,
                        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
                        norm_eps=c.norm_eps, mlp_class_name="LLaMAMLP")).to(model.output.weight)
    half_split = partial(swap_rope_layout, head_dim=c.head_dim, to_hf=True)
    state = {"lm_head": model.output, "transformer.wte": model.tok_embeddings, "transformer.ln_f": model.norm}
    state = {f"{name}.weight": module.weight for name, module in state.items()}
    for i, block in enumerate(model.layers):
        a, f, to = block.attention, block.feed_forward, f"transformer.h.{i}."
        state |= {to + "attn.qkv.weight": torch.cat([half_split(a.wq.weight), half_split(a.wk.weight), a.wv.weight]),
                  to + "attn.proj.weight": a.wo.weight, to + "norm_1.weight": block.attention_norm.weight,
                  to + "norm_2.weight": block.ffn_norm.weight, to + "mlp.fc_1.weight": f.w1.weight,
                  to + "mlp.fc_2.weight": f.w3.weight, to + "mlp.proj.weight": f.w2.weight}
    theirs.load_state_dict(state)
    return theirs


def transformers_loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor, dict]:
    """Its own loss: the mean, times the number of targets, which are all of them here."""
    inputs, targets = batch
    count = torch.tensor(targets.numel(), device=targets.device)
    return model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss * count, count, {}


def litgpt_loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor, dict]:
    """The cross-entropy of its logits."""
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return loss, torch.tensor(targets.numel(), device=targets.device), {}


def peak_memory(model: nn.Module, optimizer: torch.optim.Optimizer, run: Callable[[], object], device: torch.device) -> float:
    """Bytes that tensors hold at the peak of a step: weights, state of the optimizer, gradients, activations."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()  # the other contestants wait there too
        run()
        step = torch.cuda.max_memory_allocated() - others
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        step = max(accumulate(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"))
    held = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    return step + sum(t.numel() * t.element_size() for t in held)


def training(args: argparse.Namespace) -> dict:
    """A whole step (forward, backward, clipping, AdamW), ours in four forms, against transformers' and litgpt's.

    All run through `optimizer_step` with our AdamW and start from the same weights. In bf16 all weights are bf16, but for
    those of FSDP, which computes in bf16 and keeps fp32 weights, as pretrain.py does.
    """
    ranks = start(parse(Settings, ["--threads", str(args.threads)]))
    on_gpu, rows, found = ranks.device.type == "cuda", [], {}
    for case, (config, dtype, batch, seq) in (GPU_STEPS if on_gpu else STEPS).items():
        if args.only not in case:
            continue
        tokens = torch.randint(config.vocab_size, (batch, seq + 1))
        batches = [(tokens[:, :-1], tokens[:, 1:].contiguous())]
        settings = parse(Settings, ["--dtype", dtype])
        bare = Transformer(config).to(ranks.device, torch.bfloat16 if dtype == "bf16" else None)
        theirs = in_transformers(bare)
        models = {"ours": (bare, bare, lm_loss)}  # name: (what holds the weights, what is called, its loss)
        for name, more in (("ours, FSDP", {}), ("ours, FSDP, --compile", {"compile": True})):
            model = build(config, replace(settings, **more), ranks)
            models[name] = model, model, lm_loss
        models |= {"transformers": (theirs, theirs, transformers_loss),
                   "transformers, compiled": (theirs, torch.compile(theirs), transformers_loss)}
        try:
            model = in_litgpt(bare)
            models["litgpt"] = model, model, litgpt_loss
        except ImportError as error:
            print(f"without litgpt: {error}")
        optimizers = {id(model): adamw(model, 0.1) for model, _, _ in models.values()}
        runs = {name: partial(optimizer_step, called, optimizers[id(model)], batches, loss, 1e-5, 1.0, ranks)
                for name, (model, called, loss) in models.items()}
        losses = {name: run()["loss"] for name, run in runs.items()}
        assert max(losses.values()) - min(losses.values()) < 0.02, losses  # they do compute the same
        seconds = interleaved(runs, args.repetitions)
        for name, (model, _, _) in models.items():
            rate, memory = summary(seconds[name], batch * seq), peak_memory(model, optimizers[id(model)], runs[name], ranks.device)
            times = {f"× {other}": ratio(seconds[name], seconds[other]) for other in ("transformers", "transformers, compiled")}
            used = mfu(config, seq, rate["median"], ranks)
            rows.append([case, name, spread(rate), *(f"{x:.2f}" for x in times.values()), f"{memory / 1e6:,.0f}"]
                        + [f"{used or 0:.0%}"] * on_gpu)
            found[f"{case}, {name}"] = rate | times | {"memory": memory, "mfu": used}
    print_table(["model", "who", "tokens/s", "× transformers", "× its compiled form", "peak, MB"] + ["MFU"] * on_gpu, rows)
    return found


COMMANDS = {"sampling": sampling, "gathered": sample_gathered, "training": training}

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
