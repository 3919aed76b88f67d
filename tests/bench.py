"""How fast it is, measured beside what it is compared with, in one run: medians over interleaved repetitions.

    python tests/bench.py sampling     # generate, against transformers' generate and against its linear layers alone
    python tests/bench.py gathered     # sampling with gathered weights, against sampling a sharded model (§3.2.3)
    python tests/bench.py training     # one optimizer step, against transformers' Llama and litgpt's; on a GPU with MFU
    python tests/bench.py packed       # packed dialogues: attention in each alone, against a mask over the whole row
    python tests/bench.py pieces       # loader, tokenising, checkpoints and start-up, each against what bounds it
    python tests/bench.py rl           # an iteration of PPO and a round of rejection sampling, split into their parts
    python tests/bench.py scaling      # how cost grows with context, batch and ranks; 70B laid out over 2,048 ranks
    python tests/bench.py heads        # decoding with MHA, GQA and MQA of equal size (Figure 24, Table 18)

Each subcommand is one function; it prints a table and, last, one line of JSON. Figures of two runs of a shared
machine can't be compared, ratios inside one run can.
"""
import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate, count, islice, product
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import rlhf
import toy
from model import (PRESETS, KVCache, ModelConfig, Transformer, captured, count_parameters, generate, save_hf, swap_rope_layout,
                   with_vocab)
from pretrain import (Mixture, Ranks, Settings, Source, adamw, build, checkpoints, gathered, lm_loss, load_checkpoint, mfu,
                      optimizer_step, parent_of, parse, prepare, replace_file, save_checkpoint, save_model, shard_size, start,
                      text_sources, tokenize)
from reward import RewardModel, load_speaker
from sft import PackedDialogs
from tokenizer import TOY_SYMBOLS, Tokenizer


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
TINY_LLAMA = ModelConfig(2048, 22, 32, 4, 5632)  # 1.1B
CASES = {  # name: (config, dtype, (batch, tokens of a prompt, new tokens)...)
    "1M fp32": (TOY, torch.float32, (64, 16, 64), (1, 16, 64)),
    "15M bf16": (TOY_L, torch.bfloat16, (64, 16, 64), (1, 16, 64)),
    "110M bf16": (GPT_2, torch.bfloat16, (8, 16, 16), (1, 16, 32)),
}
GPU_CASES = {
    "124M bf16": (GPT_2, torch.bfloat16, (64, 16, 64), (1, 900, 64)),
    "1.1B bf16": (TINY_LLAMA, torch.bfloat16, (64, 16, 64), (1, 1000, 64)),
    "7B bf16": (PRESETS["7b"], torch.bfloat16, (64, 16, 64), (1, 1000, 64)),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT = 16  # tokens of a prompt of `gathered`


@torch.no_grad()
def least_work(model: Transformer, batch: int, steps: int) -> None:
    """What no sampler can do without: on a CPU the matrix products of each step, on a GPU reading the weights once a step."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {width: torch.randn(batch, 1, width, dtype=model.output.weight.dtype) for width in {x.in_features for x in layers}}
    for _ in range(steps):
        if DEVICE.type == "cuda":
            torch._foreach_norm([layer.weight for layer in layers], math.inf)
            continue
        for layer in layers:
            layer(inputs[layer.in_features])


def sampling(args: argparse.Namespace) -> dict:
    """Our generate, transformers' generate with the same weights (up to 2B), and the floor that the linear layers set."""
    rows, found = [], {}
    for name, (config, dtype, *shapes) in (GPU_CASES if DEVICE.type == "cuda" else CASES).items():
        if args.only not in name:
            continue
        with DEVICE:
            model = Transformer(config).to(dtype)
        theirs = in_transformers(model).eval() if count_parameters(config) < 2e9 else None
        for batch, prompt, new in shapes:
            prompts = torch.randint(config.vocab_size, (batch, prompt))
            contestants = {"ours": lambda: generate(model, prompts.tolist(), new, args.temperature, args.top_p),
                           "floor": lambda: least_work(model, batch, new)}
            if theirs:
                theirs.generation_config.eos_token_id = None  # both draw exactly `new` tokens
                there = prompts.to(DEVICE)
                contestants["transformers"] = lambda: theirs.generate(
                    there, attention_mask=torch.ones_like(there), max_new_tokens=new, do_sample=True,
                    temperature=args.temperature, top_p=args.top_p, top_k=0, pad_token_id=0)
            seconds = interleaved(contestants, args.repetitions)
            rates = {who: summary(s, batch * new) for who, s in seconds.items()}
            share = ratio(seconds["ours"], seconds["floor"])
            times = ratio(seconds["ours"], seconds["transformers"]) if theirs else math.nan
            rows.append([name, str(batch), str(prompt), spread(rates["ours"]), spread(rates["transformers"]) if theirs else "",
                         spread(rates["floor"]), f"{times:.2f}" if theirs else "", f"{share:.0%}"])
            found[f"{name} batch {batch}"] = rates | {"ours / transformers": times, "ours / floor": share}
    print_table(["model", "batch", "prompt", "ours, tokens/s", "transformers",
                 "weights read, no more" if DEVICE.type == "cuda" else "linear layers alone", "ours / transformers",
                 "ours / floor"], rows)
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
    "124M bf16": (GPT_2, "bf16", 64, 1024), "1.1B bf16": (TINY_LLAMA, "bf16", 4, 4096),
    "7B's shape, 4 layers, bf16": (replace(PRESETS["7b"], n_layers=4), "bf16", 4, 4096),
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
    return step + sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in held)


def training(args: argparse.Namespace) -> dict:
    """A whole step (forward, backward, clipping, AdamW), ours in four forms, against transformers' and litgpt's.

    All run through `optimizer_step` with our AdamW and start from the same weights. In bf16 all weights are bf16, but for
    those of FSDP, which computes in bf16 and keeps fp32 weights, as pretrain.py does.
    """
    ranks = start(parse(Settings, ["--threads", str(args.threads)]))
    torch.backends.cuda.enable_cudnn_sdp(True)  # as pretrain.py does
    on_gpu, rows, found = ranks.device.type == "cuda", [], {}
    for case, (config, dtype, batch, seq) in (GPU_STEPS if on_gpu else STEPS).items():
        if args.only not in case:
            continue
        tokens = torch.randint(config.vocab_size, (batch, seq + 1))
        batches = [(tokens[:, :-1], tokens[:, 1:].contiguous())]
        settings = parse(Settings, ["--dtype", dtype])
        with ranks.device:
            bare = Transformer(config).to(torch.bfloat16 if dtype == "bf16" else None)
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
        runs = {name: partial(optimizer_step, called, optimizers[id(model)], batches, loss, 0.0, 1.0, ranks)  # weights stay
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


# ---------------------------------------------------------------------------------------------- packed dialogues


def packed(args: argparse.Namespace) -> dict:
    """Forward and backward of rows of packed dialogues: attention in each alone, and under a mask, as compiled blocks have it."""
    rows, found = [], {}
    for name, config, batch, lengths in [("1M, 8 rows of 256", TOY, 8, [70, 80, 60, 46]), ("1M, a row of 1,024", TOY, 1,
                                         [100, 200, 150, 300, 200, 74]), ("15M, 4 rows of 256", TOY_L, 4, [70, 80, 60, 46])]:
        if args.only not in name:
            continue
        model = Transformer(config)
        tokens = torch.randint(config.vocab_size, (batch, sum(lengths)))
        documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand_as(tokens)

        def step(by_mask: bool) -> None:
            model.compiled = by_mask
            (-model(tokens, targets=tokens, documents=documents).mean()).backward()

        seconds = interleaved({"alone": lambda: step(False), "mask": lambda: step(True)}, args.repetitions)
        rates = {who: summary(s, tokens.numel()) for who, s in seconds.items()}
        times = ratio(seconds["alone"], seconds["mask"])
        rows.append([name, *map(spread, rates.values()), f"{times:.2f}"])
        found[name] = rates | {"alone / mask": times}
    print_table(["rows", "each dialogue alone, tokens/s", "a mask over the row", "alone / mask"], rows)
    return found


# ---------------------------------------------------------------------------------------------- pieces


def pieces(args: argparse.Namespace) -> dict:
    """Reading, tokenising, saving, loading and starting up, each against what bounds it."""
    ranks, config = start(parse(Settings, ["--threads", str(args.threads)])), TOY_L
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "run")
        settings = parse(Settings, ["--data", "toy/stories", "--dtype", "fp32", "--out", str(out)])
        folder, index = prepare(text_sources(settings), settings, ranks)
        tokenizer = Tokenizer(folder / "tokenizer.model")
        parts = [(folder / part, 1.0) for part in index["stories"]["parts"]]
        mixture = Mixture(parts, 256, 0, tokenizer.eos_id, tokenizer.vocab_size, folder)
        texts = list(islice(toy.documents(toy.World(0), "encyclopedia"), 4000))
        size = sum(len(text.encode()) for text in texts)
        processor = SentencePieceProcessor(model_file=tokenizer.path)

        def tokenise() -> None:
            target = Path(tempfile.mkdtemp(dir=place))
            shutil.copy(tokenizer.path, target)
            tokenize(Source("texts", lambda: texts, 1.0, "", []), target)

        models = {"1M": build(TOY, settings, ranks), "15M": build(config, settings, ranks)}
        optimizers = {name: adamw(model, 0.1) for name, model in models.items()}
        batches = mixture.batch_at(0, 8, 8, ranks)
        steps = {f"step of the {name}": partial(optimizer_step, model, optimizers[name], batches, lm_loss, 1e-5, 1.0, ranks)
                 for name, model in models.items()}
        saved, copied = Path(place, "saved"), Path(place, "copied")
        state = {"model": models["15M"]}, {"model": optimizers["15M"]}
        copied.mkdir()
        numbers = count(1)

        def copy() -> None:
            for file in checkpoints(saved)[-1].iterdir():
                replace_file(copied / file.name, file.read_bytes())  # to the disk, as a checkpoint goes

        def start_up() -> None:
            log = out / "metrics.jsonl"
            log.unlink(missing_ok=True)  # of the run before
            run = subprocess.Popen(
                [sys.executable, HERE.parent / "pretrain.py", "--data", "toy/stories", "--out", out, "--no-resume", "--threads",
                 str(args.threads)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while run.poll() is None and not (log.exists() and log.stat().st_size):
                time.sleep(0.01)
            run.kill()
            assert run.wait() < 0, "pretrain.py ended before its first step"

        seconds = interleaved({
            "batch of 8 × 256": lambda: [mixture.batch_at(i, 8, 8, ranks) for i in range(50)], **steps,
            "tokenising": tokenise, "sentencepiece alone": lambda: processor.encode(texts, num_threads=1),
            "saving": lambda: save_checkpoint(saved, next(numbers), *state, {}, keep=1),
            "loading": lambda: load_checkpoint(checkpoints(saved)[-1], *state), "copying": copy,
            "start-up": start_up, "importing torch": lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True),
        }, args.repetitions)
        stored = sum(file.stat().st_size for file in checkpoints(saved)[-1].iterdir())
    seconds["batch of 8 × 256"] = [s / 50 for s in seconds["batch of 8 × 256"]]
    for name, bound, size in [
            ("batch of 8 × 256", "step of the 1M", None), ("batch of 8 × 256", "step of the 15M", None),
            ("tokenising", "sentencepiece alone", size), ("saving", "copying", stored), ("loading", "copying", stored),
            ("start-up", "importing torch", None)]:
        shown = [f"{spread(summary(seconds[who], size / 1e6))} MB/s" if size else f"{1000 * statistics.median(seconds[who]):,.1f} ms"
                 for who in (name, bound)]
        times = ratio(seconds[name], seconds[bound])
        found[f"{name} / {bound}"] = {"ours": seconds[name], "its": seconds[bound], "ratio": times}
        rows.append([name, shown[0], bound, shown[1], f"{times:.2f}"])
    print_table(["what", "ours", "against", "its", "times as fast"], rows)
    return found


# ---------------------------------------------------------------------------------------------- reinforcement learning


def random_models(folder: str) -> None:
    """A chat model and two reward models of the toy size with weights that were never trained, where a pipeline puts its own."""
    file = f"{folder}/tokenizer.model"
    Tokenizer.train(islice(toy.documents(toy.World(0), "encyclopedia"), 2000), file, 1024, TOY_SYMBOLS)
    for name, kind in (("sft", Transformer), ("reward-helpfulness", RewardModel), ("reward-safety", RewardModel)):
        save_model(kind(TOY), f"{folder}/{name}", file)


def clocked(seconds: dict[str, list[float]], name: str, run: Callable[[], object]) -> object:
    """What `run` returns; how long it took is added to the times of that name."""
    begin = time.perf_counter()
    result = run()
    seconds.setdefault(name, []).append(time.perf_counter() - begin)
    return result


def rl(args: argparse.Namespace) -> dict:
    """An iteration of PPO (64 prompts), plain sampling for the same prompts, and a round of rejection sampling (64 × 16)."""
    with tempfile.TemporaryDirectory() as place:
        runs = args.runs or place
        if not args.runs:
            random_models(place)
        settings = parse(rlhf.Ppo, ["--init", f"{runs}/sft", "--helpfulness", f"{runs}/reward-helpfulness", "--harmlessness",
                                    f"{runs}/reward-safety", "--threads", str(args.threads), "--dtype", "fp32"])
        best_of = parse(rlhf.Settings, ["--init", settings.init, "--threads", str(args.threads)])
        ranks, parent, tokenizer = start(settings), parent_of(settings.init), Tokenizer(f"{settings.init}/tokenizer.model")
        models, tuned = rlhf.load_models(settings, ranks), build(parent.config, settings, ranks)
        optimizers = {name: adamw(model, 0.1) for name, model in (("policy", models.policy), ("critic", models.critic))}
        tuner, plain = adamw(tuned, 0.1), load_speaker(settings.init, ranks)
        judges = rlhf.load_judges(settings.helpfulness, settings.harmlessness, ranks)
    iterations, rounds, drawn = {}, {}, []
    for i in range(args.repetitions + 1):
        prompts = rlhf.toy_prompts(toy.World(0), settings.batch_size, i)
        ids, answers = clocked(iterations, "sampling", lambda: rlhf.sample_answers(
            models.policy, prompts, i, tokenizer, settings, ranks))

        def score() -> dict[str, Tensor]:
            r_c, _ = rlhf.score_answers(models, prompts, ids, answers, 0.15, settings, ranks)
            return rlhf.make_batch(models, ids, answers, r_c, tokenizer.eos_id, settings.kl_coef, settings, ranks)[0]

        batch = clocked(iterations, "scoring", score)
        clocked(iterations, "training", lambda: rlhf.learn(
            models, optimizers, batch, settings.critic_warmup + 1, None, settings, ranks, False))
        simple = clocked(iterations, "plain generate", lambda: generate(
            plain.model, ids, settings.max_new_tokens, settings.temperature, 1.0, (tokenizer.eos_id,), i))
        drawn.append([sum(map(len, answers)), sum(map(len, simple))])
        many = clocked(rounds, "sampling", lambda: generate(
            plain.model, ids, best_of.max_new_tokens, best_of.temperature, 1.0, (tokenizer.eos_id,), i, best_of.n_samples))
        asked = [one for one in ids for _ in range(best_of.n_samples)]
        r_h, _ = clocked(rounds, "scoring", lambda: judges.score([a + b for a, b in zip(asked, many)]))
        best = [j * best_of.n_samples + k for j, k in enumerate(r_h.reshape(len(ids), -1).argmax(1))]

        def tune() -> None:
            flags = [np.repeat([False, True], [len(asked[j]), len(many[j])]) for j in best]
            dialogs = {"tokens": np.concatenate([asked[j] + many[j] for j in best]), "is_answer": np.concatenate(flags),
                       "ends": np.cumsum([len(f) for f in flags])}
            packed = PackedDialogs(dialogs, np.full(len(best), 4.0), 1, 256, i, True)  # `pool:4`, without the replay
            for step in range(math.ceil(packed.n_rows / 8)):
                optimizer_step(tuned, tuner, packed.batch_at(step, 8, 8, ranks), lm_loss, 1e-4, 1.0, ranks)

        clocked(rounds, "training", tune)
    rows, found = [], {}
    for name, seconds in (("PPO, an iteration", iterations), ("rejection sampling, a round", rounds)):
        parts = {part: statistics.median(seconds[part][1:]) for part in ("sampling", "scoring", "training")}
        whole = sum(parts.values())
        rows.append([name, f"{whole:.2f} s", *(f"{s:.2f} s, {s / whole:.0%}" for s in parts.values())])
        found[name] = parts
    print_table(["what", "all", "sampling", "scoring", "training"], rows)
    ours, simple = ([s / n[who] for s, n in zip(iterations[part], drawn)][1:]
                    for who, part in enumerate(("sampling", "plain generate")))  # seconds a token
    found |= {"PPO": summary(ours, 1), "plain": summary(simple, 1), "ratio": ratio(ours, simple)}
    print(f"\ntokens/s of PPO's sampling {spread(found['PPO'])}, of plain generate {spread(found['plain'])}, "
          f"ratio {found['ratio']:.2f}")
    return found


# ---------------------------------------------------------------------------------------------- scaling


def step_cost(config: ModelConfig, batch: int, seq: int, ranks: Ranks, repetitions: int) -> dict[str, float]:
    """Tokens per second of all ranks, and the peak memory of this one, of a step with `batch` rows on each rank."""
    model = build(config, parse(Settings, ["--dtype", "fp32"]), ranks)
    tokens, optimizer = torch.randint(config.vocab_size, (batch, seq + 1)), adamw(model, 0.1)
    run = partial(optimizer_step, model, optimizer, [(tokens[:, :-1], tokens[:, 1:].contiguous())], lm_loss, 1e-5, 1.0, ranks)
    seconds = interleaved({"step": run}, repetitions)["step"]
    return summary(seconds, batch * seq * ranks.world_size) | {"memory": peak_memory(model, optimizer, run, ranks.device)}


def scaling(args: argparse.Namespace) -> dict | None:
    """One step of the 15M under FSDP: context at 4,096 tokens a step, batch at T 256, ranks at 4 rows of 256 each."""
    if "RANK" in os.environ:
        ranks = start(parse(Settings, ["--threads", str(args.threads)]))
        cases = {f"ranks {ranks.world_size}": (4, 256)}
        if ranks.world_size == 1:
            cases |= {f"context {seq}": (4096 // seq, seq) for seq in (256, 512, 1024, 2048, 4096)}
            cases |= {f"batch {batch}": (batch, 256) for batch in (1, 2, 4, 8, 16)}
        found = {name: step_cost(replace(TOY_L, max_seq_len=4096), *case, ranks, args.repetitions) for name, case in cases.items()}
        return None if ranks.rank else found
    found = {}
    for n in (1, 2, 4):
        result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *sys.argv],
                                check=True, stdout=subprocess.PIPE, text=True)
        found |= json.loads(result.stdout.strip().split("\n")[-1])
    found = {name: cost for name, cost in found.items() if name not in ("command", "threads")}
    print_table(["what", "tokens/s", "peak of a rank, MB"],
                [[name, spread(cost), f"{cost['memory'] / 1e6:,.0f}"] for name, cost in found.items()])
    begin, config = time.perf_counter(), PRESETS["70b"]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2048)
    mesh = init_device_mesh("cpu", (2048,))
    with torch.device("meta"):
        model = Transformer(config)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    mine = sum(p.to_local().numel() for p in model.parameters())
    assert mine == shard_size(config, 2048)
    found["70B over 2,048 ranks"] = {"seconds": time.perf_counter() - begin, "parameters of rank 0": mine}
    print(f"\n70B over 2,048 ranks of the fake group: laid out in {found['70B over 2,048 ranks']['seconds']:.1f} s, "
          f"{mine:,} parameters on rank 0, as planned")
    return found


# ---------------------------------------------------------------------------------------------- heads


@torch.inference_mode()
def decode(model: Transformer, batch: int, context: int, steps: int) -> Callable[[], None]:
    """A function that decodes `steps` tokens of each row behind a context of random keys and values."""
    c, dtype = model.config, model.output.weight.dtype
    with DEVICE:
        cache = KVCache(c, torch.full((batch,), context), context + steps)
        room = batch, c.n_kv_heads, context + steps, c.head_dim
        cache.memory = [[torch.randn(room, dtype=dtype), torch.randn(room, dtype=dtype)] for _ in model.layers]
        tokens = torch.randint(c.vocab_size, (batch, 1))
    cache.used = context
    model(tokens)  # sets up what can't be set up while a graph is captured
    step = captured(model, cache) if DEVICE.type == "cuda" else partial(model, cache=cache)

    @torch.inference_mode()
    def run() -> None:
        cache.used = context
        cache.lengths.fill_(context)
        if cache.end is not None:
            cache.end.fill_(context)
        for _ in range(steps):
            step(tokens)
    return run


def heads(args: argparse.Namespace) -> dict:
    """Decoding with fewer and fewer key and value heads, the feed-forward layer widened to equal size (Figure 24).

    On a CPU the 15M in fp32, on a GPU 7B's shape in bf16, where large batches end the memory of multi-head attention.
    """
    on_gpu = DEVICE.type == "cuda"
    base, dtype = (PRESETS["7b"], torch.bfloat16) if on_gpu else (TOY_L, torch.float32)
    contexts, batches = ((256, 2048), (1, 32, 128, 512)) if on_gpu else ((512,), (1, 8, 64))
    rows, found, models = [], {}, {}
    for n in (32, 8, 1) if on_gpu else (6, 3, 2, 1):
        wider = round(2 * (base.n_heads - n) * base.head_dim / 3 / 8) * 8  # what wk and wv lose; bf16 products want multiples of 8
        with DEVICE:
            models[f"{n} of {base.n_heads}"] = Transformer(replace(base, n_kv_heads=n, ffn_hidden=base.ffn_hidden + wider)).to(
                dtype).eval()
    first = next(iter(models))
    for context, batch in product(contexts, batches):
        seconds = {}
        for name, model in models.items():
            try:  # one after the other: their caches would not fit beside each other
                seconds |= interleaved({name: decode(model, batch, context, 8)}, args.repetitions)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        for name, model in models.items():
            c = model.config
            cached = dtype.itemsize * 2 * c.n_layers * c.n_kv_heads * c.head_dim * (context + 8) * batch
            about = [str(context), str(batch), name, f"{cached / 1e6:,.0f}"]
            if name not in seconds:
                rows.append([*about, "out of memory", "", ""])
                continue
            latency, rate = statistics.median(seconds[name]) / 8, summary(seconds[name], batch * 8)
            times = ratio(seconds[name], seconds[first]) if first in seconds else math.nan
            rows.append([*about, f"{1000 * latency:.1f}", spread(rate), f"{times:.2f}" if first in seconds else ""])
            found[f"{name} context {context} batch {batch}"] = rate | {"latency": latency, "× MHA": times, "cache": cached}
    sizes = ", ".join(f"{name}: {count_parameters(model.config):,}" for name, model in models.items())
    print_table(["context", "batch", "key and value heads", "cache, MB", "ms a token", "tokens/s", "× MHA"], rows)
    print(f"\nparameters: {sizes}")
    return found


COMMANDS = {"sampling": sampling, "gathered": sample_gathered, "training": training, "packed": packed, "pieces": pieces, "rl": rl,
            "scaling": scaling, "heads": heads}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure speed, beside what it is compared with.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of all contestants")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--only", default="", help="cases whose name holds this, as in `--only 15M`")
    parser.add_argument("--runs", default="", help="rl: a folder with sft, reward-helpfulness, reward-safety; else random weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if (found := COMMANDS[args.command](args)) is not None:
        print(json.dumps({"command": args.command, "threads": args.threads, **found}))
