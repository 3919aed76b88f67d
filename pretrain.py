"""Pretraining (§2): raw text in, a base model out, by the same lines on a laptop and on thousands of GPUs.

    python pretrain.py                                             # a 1.0M model of the tiny world, minutes on 2 cores
    python pretrain.py --data wiki=/data/wiki/*.jsonl:2 web.txt.gz # your text; wiki is read twice (up-sampled, §2.1)
    torchrun --nproc_per_node=8 pretrain.py --preset 7b --data ... # the same lines on 8 GPUs
    python pretrain.py plan --preset 70b --gpus 2048               # memory, days, carbon, before it is paid for

Here stands once what every later stage uses too: settings and command line, sharding, the training loop,
checkpoints that survive a crash, perplexity and intervals. Read it in this order: settings, ranks, data
(documents → token shards → mixture → batches), optimizer and schedule, the loop, evaluation, a run. Behind it
stand checkpoints, the folders of runs and the plan, which a first reading can pass over.
"""
import argparse
import ctypes
import fcntl
import glob
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cache, reduce
from itertools import islice
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import toy
from model import (CHUNK_LOGITS, IGNORE, PRESETS, ModelConfig, ModelError, Parser, Transformer, config_of, count_parameters,
                   folder_aside, generate, initial_weight, load_weights, positive_number, read_any, tokenizer_beside, with_vocab)
from tokenizer import TOY_SYMBOLS, InputError, Tokenizer, parse_json, read_texts

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Common:
    """Flags that mean the same in every stage. The comments are the help; None means: by preset."""
    preset: str = "toy"  # size of the model, and the paper's hyper-parameters for it
    out: str = ""  # folder of this run; started again, it goes on where it stopped
    steps: int | None = None  # stop after so many steps, and end the schedule there; else after all epochs
    lr: float | None = None  # peak learning rate | 3e-4 (7B, 13B), 1.5e-4 (34B, 70B)
    warmup: int | None = None  # steps of linear warm-up | 2000
    lr_floor: float = 0.1  # where the cosine ends, a share of the peak | 0.1
    batch_size: int | None = None  # rows of a step, over all ranks | 1024, which is 4M tokens
    micro_batch: int | None = None  # rows of one forward pass on one rank
    seq_len: int | None = None  # tokens of a row | 4096 (Llama 1: 2048)
    adam_eps: float = 1e-5  # ε of AdamW: gradients far below it hardly move a weight | 1e-5
    weight_decay: float = 0.1  # decay of the matrices; norm gains are exempt (our choice) | 0.1
    grad_clip: float = 1.0  # largest norm of the gradient | 1.0
    eval_every: int | None = None  # steps between evaluations
    save_every: int | None = None  # steps between checkpoints
    keep: int = 2  # newest checkpoints to keep
    seed: int = 0  # seed of the weights, of the order of the data, and of samples
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "auto"  # fp32, bf16 (master weights stay fp32), or auto: bf16 on a GPU | not stated; bf16 by the maintainers
    compile: bool = False  # torch.compile each block, and the losses of the targets
    checkpointing: bool | None = None  # recompute activations in the backward pass | yes (Llama 1)
    replicas: int = 1  # copies of the sharded model (HSDP); 1 shards over all ranks
    threads: int = 0  # CPU threads of a rank; 0: its share of the cores (or OMP_NUM_THREADS, without torchrun)
    resume: bool = True  # go on where the run in --out stopped


@dataclass(frozen=True)
class Settings(Common):
    """Pretrain a Llama 2 on raw text, one epoch over a mixture of sources (§2)."""
    preset: str | None = None  # size of the model, and the paper's hyper-parameters for it; by default toy, or the size of --init
    out: str = "out/pretrain"  # folder of this run; started again, it goes on where it stopped
    data: tuple[str, ...] = ("toy",)  # [NAME=]GLOB[:EPOCHS] of .txt, .jsonl (.gz) or token shards; `toy`, `toy/web:0.5`, `docs`
    init: str = ""  # start from these weights: a run of ours, Meta's release or a Hugging Face folder
    tokenizer: str = ""  # tokenizer.model to use; else one is trained on the data
    vocab_size: int | None = None  # pieces of a tokenizer that is trained here | 32000
    n_kv_heads: int | None = None  # key and value heads, else the preset's; n_heads: MHA, 1: MQA, between: GQA | 8 (34B, 70B)
    ffn_multiplier: float | None = None  # widens the feed-forward layer, for fewer heads | 1.33 (MQA), 1.3 (GQA), A.2.1
    world: int = 0  # seed of the tiny world
    sample_tokens: int | None = None  # length of the samples at each evaluation; 0: none (they need the whole model)

    # Table 1: 3e-4 to 13B, 1.5e-4 above; 4M tokens are read as 4 · 2²⁰ (our choice)
    BY_PRESET: ClassVar[dict[str, dict]] = {
        name: dict(lr=3e-4 if config.dim <= 5120 else 1.5e-4, warmup=2000, batch_size=4 * 2**20 // config.max_seq_len,
                   micro_batch=1, seq_len=config.max_seq_len, vocab_size=32000, eval_every=1000, save_every=1000,
                   checkpointing=True, sample_tokens=0)
        for name, config in PRESETS.items() if not name.startswith("toy")
    } | {
        name: dict(lr=lr, warmup=50, batch_size=8, micro_batch=8, seq_len=256, vocab_size=vocab_size, eval_every=500,
                   save_every=250, checkpointing=False, sample_tokens=48)  # toy values: our choice
        for name, lr, vocab_size in [("toy-s", 3e-3, 1024), ("toy", 2e-3, 1024), ("toy-m", 1.5e-3, 1024),
                                     ("toy-l", 1e-3, 2048)]
    }


FREE = {"steps", "eval_every", "save_every", "keep", "device", "micro_batch", "compile", "checkpointing", "replicas",
        "threads", "resume", "out", "parallel", "timeout", "retries", "wait"}  # what may differ when a run goes on


@cache
def field_help(cls: type) -> dict[str, tuple[str, str]]:
    """Field → (its comment, the paper's value behind the bar or ''), read from the source of the class."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        for name, text in re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.M):
            meaning, _, paper = text.partition(" | ")
            found[name] = (meaning, paper)
    return found


def parse(cls: type, argv: list[str] | None = None):
    """The dataclass is the command line: its fields are the flags, their comments the help. Returns a `cls`."""
    texts = field_help(cls)
    parser = Parser(description=cls.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(cls):
        meaning, paper = texts[field.name]
        toy_value = cls.BY_PRESET.get("toy", {}).get(field.name)
        default = f"by preset; toy {toy_value}" if toy_value is not None else field.default
        notes = [f"default {default}"] * (default not in (None, "")) + [f"paper {paper}"] * bool(paper)
        text = f"{meaning} ({'; '.join(notes)})" if notes else meaning
        options = {"default": field.default, "help": text.replace("%", "%%")}
        if field.type in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        elif field.type == tuple[str, ...]:
            options |= {"nargs": "+", "metavar": "SPEC"}
        else:
            kinds = [kind for kind in (int, float, str) if field.type in (kind, kind | None)]
            options |= {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
        if field.name == "preset":
            options |= {"choices": list(cls.BY_PRESET), "metavar": "NAME"}
        positional = field.name == getattr(cls, "POSITIONAL", None)
        if positional:
            options["nargs"] = "*" if field.type == tuple[str, ...] else "?"
        parser.add_argument(field.name if positional else f"--{field.name}", **options)
    values = vars(parser.parse_args(argv))
    if "init" in values and values["preset"] is None:
        values["preset"] = preset_of(parent_of(values["init"]).config) if values["init"] else "toy"
    by_preset = cls.BY_PRESET.get(values.get("preset"), {})
    values = {k: by_preset.get(k) if v is None else tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if "resume" in values and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        values["resume"] = True  # started again by torchrun after a crash: what the first try made stays
    settings = cls(**values)
    for name, value in vars(settings).items():
        check_flag(name, value)
    if getattr(settings, "out", None) == "" and cls.out:
        raise InputError("--out is empty; name a folder")
    return settings


MAY_BE_0 = {"seed", "world", "warmup", "threads", "sample_tokens", "weight_decay", "lr_floor", "kl_coef", "ptx_coef", "retries",
            "critic_warmup", "wait", "past", "temperature", "shots", "show", "safety_aux", "watts", "resampled", "long", "replay"}
SHARES = {"safety", "unsafe", "noise", "threshold", "gamma", "lam", "top_p", "mfu"}  # from 0 to 1


def check_flag(name: str, value: object) -> None:
    """Raise InputError if a flag has a value that makes no sense in any stage."""
    if name == "temperatures" and not all(re.fullmatch(r"\d+\.?\d*|\.\d+", one) for one in value):
        raise InputError(f"--temperatures {' '.join(value)}: take numbers such as 0.7")
    if name == "device" and value not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {value} is unknown; take cpu, cuda or auto")
    if name == "device" and value == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but torch finds no GPU here; take --device cpu")
    if name == "dtype" and value not in ("auto", "fp32", "bf16"):
        raise InputError(f"--dtype {value} is unknown; take fp32, bf16 or auto")
    if type(value) not in (int, float):
        return
    if name in SHARES and not 0 <= value <= 1:
        raise InputError(f"--{name} is a share, from 0 to 1, not {value}")
    if name in MAY_BE_0 and not 0 <= value < math.inf:
        raise InputError(f"--{name} must not be below 0, as {value} is")
    if name not in SHARES | MAY_BE_0 and not 0 < value < math.inf:
        raise InputError(f"--{name} must be a number above 0, not {value}")
    if type(value) is int and value >= 2**31:
        raise InputError(f"--{name} {value} is too large; take a number below 2^31")


def preset_of(config: ModelConfig) -> str:
    """The preset that is nearest in size: whose hyper-parameters a fine-tuning stage takes unless it is told others."""
    size = flops_per_token(config, 0)  # six for each weight of a matrix
    return min(PRESETS, key=lambda name: abs(math.log(flops_per_token(with_vocab(PRESETS[name], config.vocab_size), 0) / size)))


def print_settings(settings) -> None:
    """What this run uses beside what the paper used, for the settings that the paper states."""
    for name, (meaning, paper) in field_help(type(settings)).items():
        if paper and getattr(settings, name, None) is not None:
            print(f"  {name:13} {getattr(settings, name)!s:10} paper: {paper}")


# ---------------------------------------------------------------------------------------------- ranks and sharding


class Ranks(NamedTuple):
    """Where this process stands: its number, how many there are, its device, and the mesh that shards models."""
    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    threads: int


def start(settings) -> Ranks:
    """Join the other processes; plain `python` is a group of one. A group exists always, so there is one code path."""
    kind = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:  # started by torchrun
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # without it a restart reads the addresses of dead ranks (torch 2.13)
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        be_alone(backend)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % settings.replicas:
        raise InputError(f"--replicas {settings.replicas} must divide the number of ranks, {world_size}")
    share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if "RANK" not in os.environ and "OMP_NUM_THREADS" in os.environ:
        share = torch.get_num_threads()  # it was asked for; torchrun sets it to 1 unasked
    threads = settings.threads or share
    before = read_config(settings.out) if settings.resume else {}
    if before.get("world_size") == world_size and not settings.threads:
        threads = before["threads"] or threads  # another number would change the last bits of every sum; a conversion noted 0
    torch.set_num_threads(threads)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc: keep freed memory (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
        mallopt(-3, 2**25), mallopt(-1, 2**31 - 1)  # instead of faulting every activation in again: 1.1 times as fast on CPU
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # see ANY_LENGTH; pretraining, whose rows are all alike, turns it on again
    shape, names = ((world_size,), ("shard",))
    if settings.replicas > 1:
        shape, names = (settings.replicas, world_size // settings.replicas), ("replica", "shard")
    return Ranks(rank, world_size, device, init_device_mesh(kind, shape, mesh_dim_names=names), threads)


def be_alone(backend: str) -> None:
    """Make a process group of one. gloo listens even then: at the loopback, not at an address where others could call."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_dtype(settings, ranks: Ranks) -> torch.dtype:
    """What a sharded model computes in, by --dtype; its master weights are fp32."""
    bf16 = settings.dtype == "bf16" or settings.dtype == "auto" and ranks.device.type == "cuda"
    return torch.bfloat16 if bf16 else torch.float32


def build(config: ModelConfig, settings, ranks: Ranks, kind: type[Transformer] = Transformer) -> Transformer:
    """A model whose parameters are sharded over the ranks (FSDP2), with the same weights at any world size."""
    with torch.device("meta"):
        model = kind(config)
    bf16 = compute_dtype(settings, ranks) == torch.bfloat16
    policy = MixedPrecisionPolicy()
    if bf16:  # what blocks are given is not cast: the rotation must stay fp32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model.compiled = settings.compile
    for block in model.layers:
        block.checkpointing = bool(settings.checkpointing)
        if settings.compile:
            block.compile()
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)
    model.to_empty(device=ranks.device)
    set_weights(model, lambda name, shape: initial_weight(name, shape, config.n_layers, settings.seed, ranks.device))
    return model


@torch.no_grad()
def set_weights(model: nn.Module, weight_of: Callable[[str, torch.Size], Tensor], skip: tuple[str, ...] = ()) -> None:
    """Fill a sharded model, but for `skip`, with `weight_of(name, shape)`, whole tensors that every rank computes for itself."""
    for name, p in model.named_parameters():
        if name in skip:
            continue
        whole = weight_of(name, p.shape).to(p.dtype)
        p.to_local().copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local())


@contextmanager
def gathered(model: Transformer, dtype: torch.dtype | None = None) -> Iterator[Transformer]:
    """A plain model with the full weights of a sharded one, for sampling: sharded, that is some 20 times slower (§3.2.3).

    All ranks enter together; inside, each may sample as much as it likes. The full weights go when the block ends.
    """
    with torch.device("meta"):
        whole = Transformer(model.config)
    with torch.no_grad():
        weights = {name: p.full_tensor().to(dtype or p.dtype) for name, p in model.named_parameters()}
    whole.load_state_dict(weights, assign=True)
    yield whole.eval()
    whole.to("meta")  # even if the caller still names it


@contextmanager
def rank_0_first(ranks: Ranks) -> Iterator[None]:
    """Rank 0 runs the block before the others do: it writes files that they then find."""
    if ranks.rank > 0:
        dist.barrier(cpu_group())
    yield
    if ranks.rank == 0:
        dist.barrier(cpu_group())


# ---------------------------------------------------------------------------------------------- documents


class Source(NamedTuple):
    """One source of text: its name, its documents, how often it is read, and what identifies its content."""
    name: str
    documents: Callable[[], Iterable[str]]
    epochs: float
    fingerprint: str
    shards: list[str]  # token shards of an earlier run, instead of documents


# Up-sampling of the most factual source at equal tokens (§2.1); as crawled, every source is read once.
TOY_MIX = ("toy/encyclopedia:3", "toy/web:0.4545", "toy/stories", "toy/numbers")


def sources(specs: Iterable[str], embedded: dict[str, tuple[Callable, str]], read: Callable, stdin: str = "") -> list[Source]:
    """[NAME=]GLOB[:EPOCHS] → sources. Raises InputError for a spec that can't be.

    embedded: name → (documents, fingerprint) of what needs no file. read(file) → the documents of a file. `-` stands
    for the file `stdin`.
    """
    found = []
    for spec in specs:
        pattern, colon, epochs = spec.rpartition(":")
        if not colon or not re.fullmatch(r"\d+\.?\d*|\.\d+", epochs):
            pattern, epochs = spec, "1"
        name, equals, rest = pattern.partition("=")
        stem = "stdin" if pattern == "-" else re.sub(r"\W+", "-", Path(pattern).name.split(".")[0]) or "data"
        name, pattern = (name, rest) if equals else (stem, pattern)
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"--data {spec}: the name {name!r} may hold letters, digits, - and _ only")
        shards = []
        if pattern in embedded:
            documents, fingerprint = embedded[pattern]
        elif pattern.startswith("toy/"):
            raise InputError(f"--data {spec}: the tiny world has no such part; take {', '.join(embedded)}")
        else:
            files = [stdin] if pattern == "-" else sorted(glob.glob(pattern))
            if not files:
                raise InputError(f"--data {spec}: no file matches {pattern}")
            shards = [file for file in files if file.endswith((".u16", ".u32"))]
            if shards and len(shards) < len(files):
                raise InputError(f"--data {spec}: token shards and text can't be mixed in one source; name them apart")
            documents = lambda files=tuple(files): (text for file in files for text in read(file))  # noqa: E731
            fingerprint = " ".join(file_fingerprint(file) for file in files)
        if float(epochs) > 1000:
            raise InputError(f"--data {spec}: read it 1000 times at most")
        if any(source.name == name for source in found):
            raise InputError(f"--data {spec}: a source named {name} is there already; write NAME={pattern}")
        found.append(Source(name, documents, float(epochs), fingerprint, shards))
    if not sum(source.epochs for source in found) > 0:
        raise InputError("--data: every source has 0 epochs, so there is nothing to learn; give one of them more")
    return found


def text_sources(settings: Settings, stdin: str = "") -> list[Source]:
    """The sources of pretraining; `toy` stands for TOY_MIX, `docs` for the docstrings of the installed Python."""
    embedded = {f"toy/{kind}": (lambda kind=kind: toy.documents(tiny_world(settings.world), kind),
                                f"toy/{kind} of world {settings.world}") for kind in toy.SOURCES}
    embedded["docs"] = toy.python_docs, f"docs of {sys.version} {sys.prefix}"
    specs = [part for spec in settings.data for part in (TOY_MIX if spec == "toy" else (spec,))]
    return sources(specs, embedded, read_documents, stdin)


@cache
def tiny_world(seed: int) -> toy.World:
    """The world of this seed, made once."""
    return toy.World(seed)


def spool_stdin(settings, ranks: Ranks) -> str:
    """Keep standard input, which can be read but once, as a file of the run, if a source is `-`; return its path."""
    path = Path(settings.out, "data", "stdin.txt")
    wanted = any(re.fullmatch(r"([\w-]+=)?-(:[\d.]+)?", spec) for spec in settings.data)
    with rank_0_first(ranks):
        if wanted and ranks.rank == 0 and not (path.exists() and settings.resume):
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path) as f:
                shutil.copyfileobj(sys.stdin.buffer, f)
    return str(path)


def file_fingerprint(file: str) -> str:
    """A hash of a file's size and of its first and last megabyte: enough to notice another file. InputError if there is none."""
    if not os.path.isfile(file):
        raise InputError(f"{file}: there is no such file")
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        head = f.read(2**20)
        f.seek(max(0, size - 2**20))
        return hashlib.sha256(b"%d" % size + head + f.read()).hexdigest()[:16]


def read_documents(file: str) -> Iterator[str]:
    """The documents of a file: each "text" of a .jsonl, or the pages of a .txt.

    A page ends at the first blank line behind 2,000 characters (our choice).
    """
    if file.removesuffix(".gz").endswith(".jsonl"):
        yield from read_texts(file)
        return
    page, length = [], 0
    for line in read_texts(file):
        page.append(line)
        length += len(line)
        if length > 2000 and not line.strip() or length > 20000:  # characters; pages end with a paragraph if they can
            yield "".join(page)
            page, length = [], 0
    yield "".join(page)


# ---------------------------------------------------------------------------------------------- token shards

PART_TOKENS = 2**27  # tokens of one shard file
HELD_OUT_EVERY, HELD_OUT_DOCUMENTS, HELD_OUT_TOKENS = 100, 200, 2**16  # for perplexity, of each source: our choice


def prepare(found: list[Source], settings: Settings, ranks: Ranks) -> tuple[Path, dict]:
    """Tokenise every source into shards, once: rank 0 works, the others wait. Returns their folder and its index.

    The folder's name is a hash of data and tokenizer; it is complete when index.json is there. Stopped on the
    way, finished shards are not written again, though their text is encoded again. A shard is NAME-00000.u16 (or .u32):
    the ids of its documents, each with BOS and EOS, and NAME-00000.ends: where each document ends, as uint64.
    """
    tokenizer = file_fingerprint(settings.tokenizer) if settings.tokenizer else settings.vocab_size
    key = hashlib.sha256(json.dumps([[s.name, s.fingerprint] for s in found] + [tokenizer]).encode()).hexdigest()[:12]
    folder = Path(settings.out, "data", key)
    while ranks.rank > 0 and not (folder / "index.json").exists():
        time.sleep(0.1)  # no collective call here: tokenising may take longer than its time-out
    if not (folder / "index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tokenizer.model").exists():
            if settings.tokenizer:
                vocab_size = Tokenizer(settings.tokenizer).vocab_size  # says so if it is not one
                for shard in (Path(shard) for source in found for shard in source.shards):
                    check_ids(shard, shard_tokens(shard)[: 2**20], vocab_size)  # the others when they are read
                replace_file(folder / "tokenizer.model", Path(settings.tokenizer).read_bytes())
            else:
                train_tokenizer(found, folder / "tokenizer.model", settings)
        index = {s.name: tokenize(s, folder) for s in found}
        replace_file(folder / "index.json", json.dumps(index, indent=1).encode())
    return folder, json.loads((folder / "index.json").read_text())


def train_tokenizer(found: list[Source], path: Path, settings: Settings) -> None:
    """Train the tokenizer on the beginning of every source: 20 MB each for toy sizes, 1 GB otherwise (our choice)."""
    if any(source.shards for source in found):
        raise InputError("token shards need the tokenizer that made them: add --tokenizer FILE")
    is_toy = settings.preset.startswith("toy")

    def texts() -> Iterator[str]:
        for source in found:
            budget = 2e7 if is_toy else 1e9
            for text in source.documents():
                yield text
                budget -= len(text)
                if budget < 0:
                    break

    print("training the tokenizer", flush=True)
    Tokenizer.train(texts(), str(path), settings.vocab_size, user_defined_symbols=TOY_SYMBOLS if is_toy else ())


def tokenize(source: Source, folder: Path) -> dict:
    """Write the shards of one source, on all cores; return what the index says of it, with paths relative to folder."""
    if source.shards:
        return {"parts": [str(Path(shard).resolve()) for shard in source.shards], "held_out": None, "held_out_bytes": 0}
    vocab_size = Tokenizer(str(folder / "tokenizer.model")).vocab_size
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    suffix = f".u{8 * dtype.itemsize}"
    parts = sorted(path.name for path in folder.glob(f"{source.name}-?????{suffix}"))
    done = sum(len(shard_ends(folder / part)) for part in parts)  # documents in shards that an earlier, stopped run finished
    tokens, held_out, held_out_tokens, held_out_bytes = [], [], 0, 0

    def write(documents: list[np.ndarray], stem: str) -> str:
        replace_file(folder / f"{stem}.ends", np.cumsum([len(d) for d in documents], dtype=np.uint64).tobytes())
        replace_file(folder / f"{stem}{suffix}", np.concatenate(documents).tobytes())
        return stem + suffix

    documents = iter(source.documents())
    chunks = iter(lambda: list(islice(documents, 512)), [])
    windows = iter(lambda: list(islice(chunks, 4 * cores())), [])  # so much text is in memory at once, not more
    taken = size = 0  # documents for training so far; tokens of the shard that is being filled
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores(), fork, load_tokenizer, (folder / "tokenizer.model", dtype)) as pool:
        encoded = (document for window in windows for chunk in pool.map(encode_documents, window) for document in chunk)
        for seen, (ids, n_bytes) in enumerate(tqdm(encoded, desc=f"tokenising {source.name}", unit=" documents"), 1):
            room = len(held_out) < HELD_OUT_DOCUMENTS and held_out_tokens < HELD_OUT_TOKENS
            if seen % HELD_OUT_EVERY == 0 and room:
                held_out.append(ids)
                held_out_tokens += len(ids)
                held_out_bytes += n_bytes
                continue
            taken += 1
            if taken > done:
                tokens.append(ids)
                size += len(ids)
                if size >= PART_TOKENS:
                    parts.append(write(tokens, f"{source.name}-{len(parts):05d}"))
                    tokens, size = [], 0
    if tokens:
        parts.append(write(tokens, f"{source.name}-{len(parts):05d}"))
    if not parts:
        raise InputError(f"the source {source.name} is empty: it holds not one document")
    held = write(held_out, f"{source.name}-heldout") if held_out else None
    return {"parts": parts, "held_out": held, "held_out_bytes": held_out_bytes}


def load_tokenizer(path: Path, dtype: np.dtype) -> None:
    """In a worker process: hold the tokenizer for `encode_documents`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    encode_documents.tokenizer, encode_documents.dtype = Tokenizer(str(path)), dtype


def encode_documents(texts: list[str]) -> list[tuple[np.ndarray, int]]:
    """In a worker process: of each text that is not empty, its ids between BOS and EOS (our choice), and its bytes."""
    texts = [text for text in texts if text]
    encoded = encode_documents.tokenizer.encode(texts, bos=True, eos=True)
    return [(np.array(ids, encode_documents.dtype), len(text.encode())) for text, ids in zip(texts, encoded)]


def shard_tokens(part: Path) -> np.ndarray:
    """The ids of a shard: a memory map of uint16 or uint32, as its name says. InputError if they are not whole."""
    return mapped(part, np.uint16 if part.suffix == ".u16" else np.uint32)


def check_ids(file: Path, ids: np.ndarray, vocab_size: int) -> None:
    """Raise InputError if ids of a shard are outside the vocabulary."""
    if ids.max(initial=0) >= vocab_size:
        raise InputError(f"{file}: holds the token id {ids.max()}, outside the vocabulary of {vocab_size}; was it made with "
                         "another tokenizer?")


def shard_ends(part: Path) -> np.ndarray:
    """Where each document of a shard ends, in tokens: a memory map of uint64."""
    path = part.with_suffix(".ends")
    if not path.exists():
        raise InputError(f"{part}: the file {path.name} beside it is missing, so its documents can't be told apart; "
                         "put it back")
    return mapped(path, np.uint64)


def mapped(file: Path, dtype: type) -> np.ndarray:
    """A file of numbers as a memory map; InputError if it holds none, or half of one."""
    size = file.stat().st_size
    if not size or size % np.dtype(dtype).itemsize:
        raise InputError(f"{file}: {size} bytes are no whole numbers of {np.dtype(dtype).itemsize} each; make the shard again")
    return np.memmap(file, dtype, "r")


# ---------------------------------------------------------------------------------------------- mixture and batches


def permute(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """A permutation of 0 … n-1 without a table: a Feistel network, walked until it lands below n. (k,) → (k,)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng([seed, n]).integers(1 << 63, size=4, dtype=np.uint64)
    walking, result = np.arange(len(index)), index.astype(np.uint64)
    while len(walking):
        left, right = result[walking] >> np.uint64(half), result[walking] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        result[walking] = left << np.uint64(half) | right
        walking = walking[result[walking] >= n]
    return result.astype(np.int64)


class Rows:
    """Rows of tokens that are asked for by number: what `train` and `perplexity` read.

    batch(rows, total) → (inputs, targets, ...), each (total, seq_len); rows past n_rows, or fewer than total, are all IGNORE.
    """
    n_rows: int
    batch: Callable[[range, int], tuple[Tensor, ...]]

    def batch_at(self, step: int, batch_size: int, micro_batch: int, ranks: Ranks) -> list[tuple[Tensor, ...]]:
        """This rank's micro-batches of a step: rank k takes every world_size-th row, all ranks equally many batches."""
        mine = range(step * batch_size + ranks.rank, (step + 1) * batch_size, ranks.world_size)
        share = math.ceil(batch_size / ranks.world_size)
        return [self.batch(mine[i : i + micro_batch], min(micro_batch, share - i)) for i in range(0, share, micro_batch)]


class Mixture(Rows):
    """One epoch over sources with weights (§2.1), as rows of tokens; row r is a pure function of r, the files and the seed.

    A source with weight w gives each document ⌊w⌋ times, and a share w - ⌊w⌋ of them once more. All documents are
    shuffled together and laid end to end, with one EOS in front at place -1, so that every token is a target exactly
    as often as its document is read. Row r is places r·T - 1 … r·T + T - 1 of that stream: rows overlap by one token.
    A token may look at the documents before its own in the row (not stated: our choice).
    Memory stays constant: the tokens and the order are memory-mapped files.
    """

    def __init__(self, parts: list[tuple[Path, float]], seq_len: int, seed: int, eos_id: int, vocab_size: int, folder: Path):
        """parts: (shard file, weight). folder: where the file with the order goes."""
        self.seq_len, self.seed, self.eos_id, self.vocab_size = seq_len, seed, eos_id, vocab_size
        self.files = [file for file, _ in parts]
        self.tokens = [shard_tokens(file) for file in self.files]
        self.doc_ends = [shard_ends(file) for file in self.files]
        for file, tokens, ends in zip(self.files, self.tokens, self.doc_ends):
            if not ends[0] or ends[-1] != len(tokens) or not (ends[:-1] < ends[1:]).all():
                raise InputError(f"{file}: its .ends file does not cut its {len(tokens)} tokens into documents; make the shard "
                                 "again")
        n_docs = [len(ends) for ends in self.doc_ends]
        self.first = np.cumsum([0, *n_docs])  # documents are numbered through all parts
        reads = [round(weight * n) for (_, weight), n in zip(parts, n_docs)]
        if not sum(reads):
            raise InputError(f"{self.files[0].stem}: its EPOCHS leave not one whole document; read more of it")
        key = hashlib.sha256(json.dumps([[f.name for f in self.files], reads, seed, n_docs]).encode()).hexdigest()[:12]
        path = folder / f"order-{key}.i64"
        if not path.exists():
            self.write_order(path, reads)
        self.order = np.memmap(path, np.int64, "r").reshape(-1, 2)  # (documents read, {where it ends, its number})
        self.n_tokens = int(self.order[-1, 0])
        self.n_rows = math.ceil(self.n_tokens / seq_len)

    def write_order(self, path: Path, reads: list[int]) -> None:
        """Shuffle the documents, of which reads[p] come from part p: their ends and numbers, a million at a time."""
        starts, total = np.cumsum([0, *reads]), 0
        with written_aside(path) as f:
            for start in range(0, int(starts[-1]), 2**20):
                slots = permute(np.arange(start, min(start + 2**20, int(starts[-1]))), int(starts[-1]), self.seed)
                lengths, numbers = np.empty_like(slots), np.empty_like(slots)
                part = np.searchsorted(starts, slots, side="right") - 1  # of each slot
                by_part = np.argsort(part, kind="stable")
                borders = np.searchsorted(part[by_part], np.arange(1, len(reads)))
                for p, mine in enumerate(np.split(by_part, borders)):
                    ends, read, n = self.doc_ends[p], slots[mine] - starts[p], len(self.doc_ends[p])
                    # whole epochs take every document; what is left of the reads takes a random subset
                    document = np.where(read < reads[p] // n * n, read % n, permute(read % n, n, self.seed + 1))
                    begins = np.where(document > 0, ends[document - 1], 0)
                    lengths[mine], numbers[mine] = ends[document] - begins, self.first[p] + document
                f.write(np.stack([total + np.cumsum(lengths), numbers], axis=1).tobytes())
                total += int(lengths.sum())

    def row(self, r: int) -> np.ndarray:
        """Places r·T - 1 … r·T + T - 1 of the stream: (seq_len + 1,), filled up with IGNORE behind its end."""
        row = np.full(self.seq_len + 1, IGNORE, np.int64)
        begin, end = r * self.seq_len - 1, min((r + 1) * self.seq_len, self.n_tokens)
        if begin < 0:
            row[0] = self.eos_id
        at = max(begin, 0)
        place = int(np.searchsorted(self.order[:, 0], at, side="right"))  # the document that holds token `at`
        while at < end:
            doc_end, number = self.order[place].tolist()
            part = int(np.searchsorted(self.first, number, side="right")) - 1
            shard_end = int(self.doc_ends[part][number - self.first[part]])  # where the document ends in its shard
            stop = min(end, doc_end)
            piece = self.tokens[part][shard_end - (doc_end - at) : shard_end - (doc_end - stop)]
            check_ids(self.files[part], piece, self.vocab_size)
            row[at - begin : stop - begin] = piece
            at, place = stop, place + 1
        return row

    def batch(self, rows: range, total: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), each (total, seq_len); rows past the end, or fewer than total, are all IGNORE targets."""
        found = [self.row(r) for r in rows if r < self.n_rows]
        found += [np.full(self.seq_len + 1, IGNORE, np.int64)] * (total - len(found))
        tokens = torch.from_numpy(np.stack(found))
        return tokens[:, :-1].clamp(min=0), tokens[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------- optimizer


def cosine_schedule(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """The factor on the peak learning rate: linear warm-up, then a cosine down to `floor` at the last step (§2.2)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(model: nn.Module, weight_decay: float, eps: float = 1e-5) -> torch.optim.AdamW:
    """AdamW with β 0.9 and 0.95, ε 1e-5 (§2.2); norm gains are not decayed (our choice)."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=eps, fused=True)
    for p in model.parameters():  # the state exists from the start, so that a checkpoint has a place to go
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def lm_loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor, dict]:
    """The loss of a micro-batch (inputs, targets[, documents]): -Σ log p(target), the number of targets, no more logs."""
    _, targets, *_ = batch
    return -model(*batch).sum(), (targets != IGNORE).sum(), {}


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, loss_fn: Callable, lr: float,
                   grad_clip: float, ranks: Ranks, interrupted: bool = False) -> dict[str, float]:
    """One step of every stage: the gradient of (sum of losses / number of targets) over micro-batches and all ranks.

    loss_fn(model, batch) → (loss_sum, count, logs), tensors; logs are sums over the same count. A step whose loss
    or gradient is not finite changes nothing. Returns the means, and count, grad_norm, finite, interrupted.
    """
    names, sums = ["loss", "count"], 0
    for batch in batches:
        loss_sum, count, logs = loss_fn(model, [x.to(ranks.device, non_blocking=True) for x in batch])
        loss_sum.backward()  # a sum: it is divided below, once the global count is known
        names = ["loss", "count", *logs]
        sums = sums + torch.stack([loss_sum.detach().double(), count.double(), *(v.double() for v in logs.values())])
    sums = torch.cat([sums, torch.tensor([float(interrupted)], dtype=torch.double, device=ranks.device)])
    dist.all_reduce(sums)
    scale = ranks.world_size / sums[1].clamp(min=1)  # FSDP has averaged the gradient over the ranks
    grads = [p.grad for p in model.parameters()]
    norm = nn.utils.get_total_norm(grads)
    norm = scale * (norm.full_tensor() if isinstance(norm, DTensor) else norm)
    *sums, interrupted, norm_value = torch.cat([sums, norm.double().view(1)]).tolist()
    finite = math.isfinite(sums[0]) and math.isfinite(norm_value)
    if finite:
        factor = (scale * (grad_clip / (norm + 1e-6)).clamp(max=1.0)).to(grads[0].dtype)
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in grads], factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    means = {name: value / max(1.0, sums[1]) for name, value in zip(names, sums)}
    return means | {"count": sums[1], "grad_norm": norm_value, "finite": finite, "interrupted": interrupted > 0}


# ---------------------------------------------------------------------------------------------- the loop

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "B200": 2250e12}


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of one token: 6 for each matrix weight, 12 · layers · dim · seq for attention.

    As Chowdhery et al. (2022, appendix B) count them, the causal half of attention not taken off.
    """
    attention = 2 * config.dim * (config.dim + config.n_kv_heads * config.head_dim)
    matrices = config.n_layers * (attention + 3 * config.dim * config.ffn_hidden) + config.dim * config.vocab_size
    return 6 * matrices + 12 * config.n_layers * config.dim * seq_len


def mfu(config: ModelConfig, seq_len: int, tokens_per_s: float, ranks: Ranks) -> float | None:
    """Model FLOPs utilisation: the share of the GPUs' dense bf16 peak; None on hardware that is not in the table."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    known = not re.search("PCIe|NVL|MIG", name)  # slower kin of the same name
    peak = next((peak for chip, peak in PEAK_FLOPS.items() if known and re.search(rf"\b{chip}\b", name)), None)
    return peak and tokens_per_s * flops_per_token(config, seq_len) / (peak * ranks.world_size)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them; a second Ctrl-C kills as usual."""
    caught: list[int] = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM may come twice: from torchrun and from the scheduler

    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch_at: Callable[[int], list], loss_fn: Callable,
          settings, ranks: Ranks, steps: int, evaluate: Callable[[int], dict] | None = None) -> None:
    """The training loop of every stage: from the newest checkpoint in --out to `steps`.

    batch_at(step) → this rank's micro-batches, a pure function, so that nothing else need be remembered. loss_fn:
    see `optimizer_step`. evaluate(step) → figures to log; every rank calls it, before the first step too if the run
    has a parent. Saves and stops on SIGTERM and Ctrl-C; stops with the last good checkpoint after ten steps in a row
    that were not finite.
    """
    out = Path(settings.out)
    newest = [str(checkpoints(out)[-1]) if checkpoints(out) else None]
    dist.broadcast_object_list(newest, group=cpu_group())  # a slow shared disk must not make ranks disagree
    progress = load_checkpoint(newest[0], {"model": model}, {"model": optimizer}) if newest[0] else {}
    first, tokens, seconds, skipped = (progress.get(key, 0) for key in ("step", "tokens", "seconds", "skipped"))
    if ranks.rank == 0:
        rewind(out / "metrics.jsonl", first or -1)  # step 0 is written again
        rewind(out / "samples.txt", first or -1)
        if newest[0]:
            print(f"going on at step {first} of {steps} from {newest[0]}", flush=True)
    bad = 0  # steps in a row that were not finite
    log = open(out / "metrics.jsonl", "a", buffering=1, encoding="utf-8") if ranks.rank == 0 else None
    if evaluate and settings.init and first == 0:
        figures = evaluate(0)
        if log:
            log.write(json.dumps({"step": 0, "tokens": 0, "loss": None, **figures, "seconds": 0.0}) + "\n")
            print("before the first step:", *(f"{name} {value:.3f}" for name, value in figures.items() if "loss/" in name))
    with (signals() as caught, ThreadPoolExecutor(1) as ahead,
          tqdm(total=steps, initial=first, unit="step", disable=ranks.rank > 0, dynamic_ncols=True) as bar):
        upcoming = ahead.submit(batch_at, first)
        clock = time.perf_counter()
        for step in range(first + 1, steps + 1):
            batches = upcoming.result()
            if step < steps:
                upcoming = ahead.submit(batch_at, step)  # read while the device computes
            lr = settings.lr * cosine_schedule(step - 1, steps, settings.warmup, settings.lr_floor)
            figures = optimizer_step(model, optimizer, batches, loss_fn, lr, settings.grad_clip, ranks, bool(caught))
            bad = 0 if figures.pop("finite") else bad + 1
            skipped += bad > 0
            interrupted, count = figures.pop("interrupted"), figures.pop("count")
            tokens += int(count)
            logs = {name: value for name, value in figures.items() if name not in ("loss", "grad_norm")}
            logs = logs or {"ppl": math.exp(min(20, figures["loss"]))}  # a loss without logs is a language model's: nats a token
            now = time.perf_counter()
            computed = ranks.world_size * sum(batch[0].numel() for batch in batches)  # count: those that were learnt
            seconds, rate, clock = seconds + now - clock, computed / (now - clock), now
            used = mfu(model.config, settings.seq_len, rate, ranks)
            if bad == 10:
                raise InputError(f"loss or gradient was not finite in ten steps in a row, the last of them {step}; "
                                 f"the newest good checkpoint is {(checkpoints(out) or ['none'])[-1]}: try a lower --lr")
            if evaluate and (step % settings.eval_every == 0 or step == steps):
                figures |= evaluate(step)
                clock = time.perf_counter()  # an evaluation is not counted as training time
            if log:
                line = {"step": step, "tokens": tokens, **figures, "lr": lr, "tokens_per_s": round(rate), "mfu": used,
                        "seconds": round(seconds, 3), "skipped": skipped}
                finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
                log.write(json.dumps(finite) + "\n")
                bar.set_postfix_str(f"loss {figures['loss']:.3f} " + "".join(f"{name} {logs[name]:.2f} " for name in logs)
                                    + f"lr {lr:.1e} grad {figures['grad_norm']:.2f} {rate:,.0f} tok/s"
                                    + (f" mfu {used:.0%}" if used else "")
                                    + (f" skipped {skipped}" if skipped else ""), refresh=False)
            bar.update()
            if step % settings.save_every == 0 or step == steps or interrupted:
                done = {"tokens": tokens, "seconds": seconds, "skipped": skipped}
                save_checkpoint(out, step, {"model": model}, {"model": optimizer}, done, settings.keep)
                clock = time.perf_counter()
            if interrupted:
                bar.close()
                if ranks.rank == 0:
                    print(f"stopped; saved {out}/step-{step:06d}. The same command goes on from there.", flush=True)
                sys.exit(128 + (caught or [signal.SIGTERM])[0])
    stopped: list = [None] * ranks.world_size  # since the last step began
    dist.all_gather_object(stopped, list(caught), group=cpu_group())
    if sum(stopped, []):
        if ranks.rank == 0:
            print(f"stopped behind the last step; saved {out}/step-{steps:06d}. The same command does the rest.", flush=True)
        sys.exit(128 + sum(stopped, [])[0])


# ---------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def perplexity(model: nn.Module, mixture: Rows, micro_batch: int, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
    """Per row of a held-out mixture: the summed loss in nats, and the number of targets. Rows are dealt to the ranks."""
    totals = torch.zeros(2, mixture.n_rows, dtype=torch.double, device=ranks.device)
    for batch in range(0, math.ceil(mixture.n_rows / micro_batch), ranks.world_size):
        begin = (batch + ranks.rank) * micro_batch
        rows = range(begin, min(begin + micro_batch, mixture.n_rows))
        inputs, targets, *documents = (x.to(ranks.device) for x in mixture.batch(rows, micro_batch))
        losses = -model(inputs, targets, *documents).double()  # (micro_batch, seq)
        totals[:, rows.start : rows.stop] = torch.stack([losses.sum(1), (targets != IGNORE).sum(1)])[:, : len(rows)]
    if hasattr(model, "reshard"):
        model.reshard()  # without a backward pass the root would stay whole
    dist.all_reduce(totals)
    return tuple(totals.cpu().numpy())


def interval(values: np.ndarray, weights: np.ndarray | None = None, draws: int = 1000,
             seed: int = 0) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by bootstrap over the values: (mean, low, high). With weights: Σ values / Σ weights."""
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].sum(1) / weights[picks].sum(1), [2.5, 97.5])
    return values.sum() / weights.sum(), low, high


def say_something(model: Transformer, tokenizer: Tokenizer, length: int) -> list[str]:
    """What a base model says after BOS, and after the words of the tiny world: four samples at temperature 0.8."""
    starts = [tokenizer.encode(text, bos=True, eos=False) for text in ("", "", "Question:", "One day")]
    answers = generate(model, starts, length, temperature=0.8, top_p=0.95, stop=(tokenizer.eos_id,))
    return [tokenizer.decode(start[1:] + answer).strip() for start, answer in zip(starts, answers)]


def log_samples(path: Path, step: int, texts: list[str]) -> None:
    """Add texts, one a line, to the samples of a run, behind a line that names the step."""
    with open(path, "a", encoding="utf-8", newline="\n") as f:
        f.write(f"--- step {step}\n" + "".join(text.replace("\n", "\\n") + "\n" for text in texts))


COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]  # Okabe and Ito's, which colour-blind readers can tell apart


def training_curve(metrics: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens in millions and training loss of each step, (steps,), and both smoothed by a mean over a fiftieth of them."""
    tokens, losses = np.array([[r["tokens"] / 1e6, r["loss"]] for r in metrics if r["loss"] is not None]).reshape(-1, 2).T
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    return tokens, losses, tokens[window // 2 :][: len(smooth)], smooth


def log_scale(axes) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib import ticker
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=[1, 2, 3, 5]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def can_draw() -> bool:
    """Whether matplotlib is there, which draws into files; where it is not, what to install is printed."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: `pip install matplotlib` draws them")
        return False
    matplotlib.use("Agg")
    return True


def draw_loss(out: Path) -> None:
    """out/loss.png: the training loss and each source's held-out loss against tokens (the form of Figure 5)."""
    if not can_draw():
        return
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens, losses, smooth_tokens, smooth_losses = training_curve(rows)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(tokens, losses, color="0.8", lw=0.8, label="training, each step")
    window = len(losses) - len(smooth_losses) + 1
    axes.plot(smooth_tokens, smooth_losses, color="k", lw=1.5, label=f"training, mean of {window} steps")
    names = sorted({key.removeprefix("loss/") for row in rows for key in row if key.startswith("loss/")})
    for i, name in enumerate(names):
        points = [(r["tokens"] / 1e6, r["loss/" + name]) for r in rows if "loss/" + name in r]
        axes.plot(*zip(*points), "o-", ms=4, color=COLOURS[i % 5], label=f"held-out {name}")
    log_scale(axes)
    axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- a run


def ablated(config: ModelConfig, n_kv_heads: int | None, ffn_multiplier: float | None) -> ModelConfig:
    """A preset with other key and value heads, and a feed-forward layer that makes up for them (A.2.1, Table 18)."""
    ffn_hidden = round(config.ffn_hidden * (ffn_multiplier or 1))
    return replace(config, n_kv_heads=n_kv_heads or config.n_kv_heads, ffn_hidden=ffn_hidden)


def main(settings: Settings) -> None:
    """Run the whole of §2: sources → tokenizer → shards → one epoch → perplexity, samples and a loss curve."""
    parent = parent_of(settings.init) if settings.init else None
    if parent and (settings.n_kv_heads or settings.ffn_multiplier):
        raise InputError("--init brings its own shape; drop --n_kv_heads and --ffn_multiplier (model.py convert pools heads)")
    config = parent.config if parent else ablated(PRESETS[settings.preset], settings.n_kv_heads, settings.ffn_multiplier)
    if settings.seq_len > config.max_seq_len:
        raise InputError(f"--seq_len {settings.seq_len} is longer than the model's context; take {config.max_seq_len} at most")
    if settings.init and settings.tokenizer:
        raise InputError("--init brings its own tokenizer; drop --tokenizer")
    if settings.tokenizer and not os.path.isfile(settings.tokenizer):
        raise InputError(f"--tokenizer {settings.tokenizer}: there is no such file")
    more = {"parent": settings.init, "parent_fingerprint": parent.fingerprint} if parent else {}
    ranks = start(settings)
    torch.backends.cuda.enable_cudnn_sdp(True)  # all rows have one length (see ANY_LENGTH)
    with locked(settings.out, ranks):
        out = Path(settings.out)
        found = text_sources(settings, spool_stdin(settings, ranks))
        record = open_run(settings, "pretrain", ranks, data={s.name: s.fingerprint for s in found}, **more)
        if parent:
            settings = replace(settings, tokenizer=parent.tokenizer)
        folder, index = prepare(found, settings, ranks)
        tokenizer = Tokenizer(str(folder / "tokenizer.model"))
        config = config if parent else with_vocab(config, tokenizer.vocab_size)
        parts = [(folder / part, source.epochs) for source in found for part in index[source.name]["parts"] if source.epochs]
        held_out = {name: folder / entry["held_out"] for name, entry in index.items() if entry["held_out"]}
        common = (settings.seq_len, settings.seed, tokenizer.eos_id, tokenizer.vocab_size, folder)
        with rank_0_first(ranks):
            mixture = Mixture(parts, *common)
            held_out = {name: Mixture([(file, 1)], *common) for name, file in held_out.items()}
        steps = min(math.ceil(mixture.n_rows / settings.batch_size), settings.steps or sys.maxsize)
        model = build(config, settings, ranks)
        if parent:
            parent.fill(model)
        if ranks.rank == 0:
            replace_file(out / "tokenizer.model", (folder / "tokenizer.model").read_bytes())
            replace_file(out / "config.json", json.dumps(record | {"model": asdict(config)}, indent=1).encode())
            print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {mixture.n_tokens:,} tokens, {steps:,} steps, "
                  f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)} on {ranks.device.type}")
            print_settings(settings)

        def evaluate(step: int) -> dict:
            figures = {}
            for name, held in held_out.items():
                losses, counts = perplexity(model, held, settings.micro_batch, ranks)
                mean, low, high = interval(losses, counts)
                bits = losses.sum() / math.log(2) / index[name]["held_out_bytes"]
                figures |= {f"loss/{name}": mean, f"low/{name}": low, f"high/{name}": high, f"bits_per_byte/{name}": bits}
            if settings.sample_tokens:
                with gathered(model) as whole:
                    if ranks.rank == 0:
                        texts = say_something(whole, tokenizer, settings.sample_tokens)
                        log_samples(out / "samples.txt", step, texts)
                        tqdm.write("\n".join(f"  {step}: {text[:110]}" for text in texts[2:]))
            return figures

        batch_at = lambda step: mixture.batch_at(step, settings.batch_size, settings.micro_batch, ranks)  # noqa: E731
        train(model, adamw(model, settings.weight_decay, settings.adam_eps), batch_at, lm_loss, settings, ranks, steps, evaluate)
        if ranks.rank == 0:
            report(out)


def report(out: Path) -> None:
    """Print the end of a run as a table: tokens, speed, and each source's held-out perplexity with its interval."""
    rows = (out / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(rows[0]), json.loads(rows[-1])
    print(f"\n{last['tokens']:,} tokens in {last['seconds']:.0f} s, {last['tokens'] / last['seconds']:,.0f} tokens/s")
    names = [key.removeprefix("loss/") for key in last if key.startswith("loss/")]
    if names:
        print(f"{'held-out source':18} {'perplexity':>10}  {'95 % interval':16} {'bits per byte':>13}"
              + "  before the first step" * (first["step"] == 0))
    else:
        print(f"nothing was measured: token shards hold nothing out, nor does a source of fewer than {HELD_OUT_EVERY} documents")
    for name in names:
        mean, low, high = (math.exp(last[f"{key}/{name}"]) for key in ("loss", "low", "high"))
        print(f"{name:18} {mean:10.3f}  {low:6.3f} … {high:6.3f}  {last[f'bits_per_byte/{name}']:13.3f}"
              + (f"  {math.exp(first[f'loss/{name}']):21.3f}" if first["step"] == 0 else ""))
    draw_loss(out)
    print(f"model, metrics, samples and loss curve are in {out}")


# ---------------------------------------------------------------------------------------------- checkpoints


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file that is written whole or not at all: aside, to the disk, renamed when the block ends."""
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with written_aside(path) as f:
        f.write(content)


def checkpoint_state(modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name: `NAME/weights/PARAMETER` and `NAME/optimizer/PARAMETER/STATE`.

    An optimizer belongs to the module of the same name.
    """
    state = {}
    for name, module in modules.items():
        for parameter_name, p in module.named_parameters():
            state[f"{name}/weights/{parameter_name}"] = p.detach()
            if name in optimizers:
                for key, value in optimizers[name].state[p].items():
                    state[f"{name}/optimizer/{parameter_name}/{key}"] = value
    return state


@cache
def cpu_group() -> dist.ProcessGroup:
    """A gloo group of its own: checkpoints are agreed on over it, and ranks wait for each other's files."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))  # for a whole stage of rank 0, or for a person


def save_checkpoint(out: str | Path, step: int, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer],
                    progress: dict, keep: int = 2) -> None:
    """Save modules, optimizers and a JSON-able `progress` as out/step-NNNNNN: written aside, then renamed.

    Every rank calls it and writes its own shards; the folder loads at any world size. The newest `keep` stay.
    InputError if the disk does not take it; then nothing of it is left.
    """
    final = Path(out, f"step-{step:06d}")
    aside = Path(f"{final}.part")
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier(cpu_group())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a group of one process saves alone
            dcp.save(checkpoint_state(modules, optimizers), checkpoint_id=aside, process_group=cpu_group())
        if dist.get_rank() == 0:
            replace_file(aside / "progress.json", json.dumps({"step": step} | progress).encode())
        sums = checksums(aside, alone=False)
        if dist.get_rank() == 0:
            replace_file(aside / "checksums.json", json.dumps(sums).encode())
            os.replace(aside, final)
    except (OSError, dcp.api.CheckpointException) as error:  # torch wraps what a rank raises: a full disk is a RuntimeError
        reason = next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error
        free = shutil.disk_usage(out).free / 1e6
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"{final}: can't be saved ({type(reason).__name__}, {free:.1f} MB are free there); what was saved "
                         "before is whole: make room, then the same command goes on from there") from error
    if dist.get_rank() == 0:
        for old in checkpoints(out)[:-keep]:
            remove_checkpoint(old)
    dist.barrier(cpu_group())


def crc_of(file: Path) -> int:
    """The CRC-32 of a file: a second for each GB."""
    with open(file, "rb") as f:
        return reduce(lambda crc, part: zlib.crc32(part, crc), iter(lambda: f.read(2**20), b""), 0)


def checksums(folder: Path, alone: bool) -> dict[str, int]:
    """The CRC-32 of every file of a checkpoint. Every rank calls it, reads what that rank wrote, and hears of the rest.

    alone: of the files that this rank reads, without waiting for the others.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    files = [folder / ".metadata", folder / "progress.json", *folder.glob("*.distcp")]
    numbers = [int(found[1]) if (found := re.match(r"__(\d+)_", file.name)) else 0 for file in files]  # torch's names: __RANK_0
    sums = [{file.name: crc_of(file) for file, number in zip(files, numbers) if number % world_size == rank}] * world_size
    if alone:
        return sums[0]
    if world_size > 1:
        dist.all_gather_object(sums, sums[0], group=cpu_group())
    return {name: crc for share in sums for name, crc in share.items()}


def saved_sums(folder: str | Path) -> dict[str, int]:
    """What `checksums` was when a checkpoint was saved; empty for one of an older version, which is read unchecked."""
    path = Path(folder, "checksums.json")
    return json.loads(path.read_text()) if path.exists() else {}


def check_sums(folder: str | Path, alone: bool) -> None:
    """Raise InputError if a bit of a checkpoint is not as it was saved. alone: see `checksums`."""
    with undamaged(folder):
        if (sums := saved_sums(folder)) and not checksums(Path(folder), alone).items() <= sums.items():
            raise ValueError("other checksums")


def checkpoints(out: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((p for p in Path(out).glob("step-*") if re.fullmatch(r"step-\d+", p.name)), key=lambda p: int(p.name[5:]))


def remove_checkpoint(folder: Path) -> None:
    """Remove a folder step-NNNNNN, renamed first, so that half of it is never taken for a checkpoint."""
    aside = folder.with_name(folder.name + ".part")
    os.replace(folder, aside)
    shutil.rmtree(aside)


class SafeReader(dcp.FileSystemReader):
    """Reads torch's checkpoints without letting their pickled index name anything but a few harmless classes."""

    def read_metadata(self, *args, **kwargs):
        class Unpickler(pickle.Unpickler):
            def find_class(self, module, name):
                if (module, name.split(".")[0]) not in HARMLESS:
                    raise InputError(f"{path}: asks for {module}.{name}, which no checkpoint of ours needs; it is not loaded")
                return super().find_class(module, name)

        path = Path(self.path, ".metadata")  # torch offers no other way in than to lend it another pickle.load
        original, pickle.load = pickle.load, lambda file: Unpickler(file).load()
        try:
            return super().read_metadata(*args, **kwargs)
        finally:
            pickle.load = original


HARMLESS = {("torch.distributed.checkpoint.metadata", name) for name in (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
    "_MEM_FORMAT_ENCODING")} | {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch", "float32"), ("torch", "bfloat16"), ("torch", "float16"), ("torch", "int64"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("collections", "OrderedDict")}


def load_checkpoint(folder: str | Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """Fill modules and optimizers from a folder step-NNNNNN, saved at any world size; return its progress."""
    return read_checkpoint(folder, checkpoint_state(modules, optimizers))


def read_checkpoint(folder: str | Path, state: dict[str, Tensor], sums: bool = True) -> dict:
    """Fill the named tensors (see `checkpoint_state`) from a folder step-NNNNNN; return its progress.

    Raises InputError if it is of another shape or damaged, before anything is changed if a shape or a sum tells. sums: check
    those of its files. If the tensors are sharded every rank must call it; whole ones a rank reads alone, when it needs them.
    """
    alone = not any(isinstance(tensor, DTensor) for tensor in state.values())
    check_sizes(folder, saved_sizes(folder), {name: tensor.shape for name, tensor in state.items()})
    if sums:
        check_sums(folder, alone)
    with undamaged(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=SafeReader(folder), process_group=None if alone else cpu_group(), no_dist=alone)
        progress = json.loads(Path(folder, "progress.json").read_text())
        if progress["step"] != int(Path(folder).name.removeprefix("step-")):
            raise ValueError("progress.json counts other steps")
        for name, tensor in state.items():
            if not (tensor.to_local() if isinstance(tensor, DTensor) else tensor).isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
    return progress


def load_model(out: str | Path, kind: type[Transformer] = Transformer) -> tuple[Transformer, Tokenizer, dict]:
    """The newest model of a run as a plain module on the CPU, its tokenizer, and its config.json."""
    config, weight_of = stored_weights(out)
    return load_weights(config, weight_of, kind=kind).eval(), Tokenizer(tokenizer_beside(out, config)), read_config(out)


def stored_weights(out: str | Path) -> tuple[ModelConfig, Callable]:
    """The newest weights of a run, one at a time: its shape, and weight_of(name, shape) → that parameter in fp32."""
    config, newest = saved_shape(out)
    check_sums(newest, alone=True)

    def weight_of(name: str, shape: tuple) -> Tensor:
        state = {f"model/weights/{name}": torch.empty(shape)}
        read_checkpoint(newest, state, sums=False)
        return state.popitem()[1]

    return config, weight_of


def shape_of(out: str | Path) -> ModelConfig:
    """The shape of a run of ours, as its config.json tells it; ModelError if it tells none that makes sense."""
    path, model = Path(out, "config.json"), read_config(out).get("model", {})
    return config_of(path, *(positive_number(path, model, field.name, field.type) for field in fields(ModelConfig)))


def saved_shape(out: str | Path) -> tuple[ModelConfig, Path]:
    """The shape of a run of ours, and its newest checkpoint. InputError or ModelError if the two do not fit.

    That is asked before a model of whatever size is built. The head may be another one, that of a reward model.
    """
    if not checkpoints(out):
        raise InputError(f"{out}: there is no checkpoint of ours{how_to_make(out)}")
    config, newest = shape_of(out), checkpoints(out)[-1]
    saved = saved_sizes(newest)
    layers = [int(found[1]) for name in saved if (found := re.match(r"model/weights/layers\.(\d{1,9})\.", name))]
    if config.n_layers != len(set(layers)):
        raise InputError(f"{out}/config.json: n_layers is {config.n_layers}, not {len(set(layers))} as in {newest.name}; put the "
                         "right one back")
    with torch.device("meta"):
        shapes = {f"model/weights/{name}": p.shape for name, p in Transformer(config).named_parameters()}
    check_sizes(newest, saved, {name: shape for name, shape in shapes.items() if "/output." not in name})
    return config, newest


def saved_sizes(folder: str | Path) -> dict[str, torch.Size]:
    """The shape of every tensor in a checkpoint, by its name (see `checkpoint_state`). InputError if it is damaged."""
    with undamaged(folder):
        if (sums := saved_sums(folder)) and sums[".metadata"] != crc_of(Path(folder, ".metadata")):
            raise ValueError("another checksum")  # before it is unpickled
        return {name: entry.size for name, entry in SafeReader(folder).read_metadata().state_dict_metadata.items()}


@contextmanager
def undamaged(folder: str | Path) -> Iterator[None]:
    """What goes wrong while a checkpoint is read, as an InputError: torch raises many kinds for what is missing or cut."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
        raise InputError(f"{folder}: this checkpoint is damaged ({type(error).__name__}); remove the folder to go on "
                         "from the one before") from error


def check_sizes(folder: str | Path, saved: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> None:
    """Raise InputError if a checkpoint lacks a tensor, or has it in another shape."""
    for name, shape in wanted.items():
        if name not in saved:
            raise InputError(f"{folder}: has no {name}; is it a checkpoint of another stage or size?")
        if saved[name] != shape:
            raise InputError(f"{folder}: {name} has shape {tuple(saved[name])}, not {tuple(shape)}; is it of another stage or "
                             "size?")


# ---------------------------------------------------------------------------------------------- the folder of a run


def fingerprint(out: str | Path) -> str:
    """What identifies the newest weights of a run: a hash of what made them, and of that checkpoint's progress.

    A finished run that is started again, perhaps with other threads or intervals, keeps it.
    """
    found, config = checkpoints(out), read_config(out)
    if not found or not config:
        raise InputError(f"--init {out}: there is no checkpoint in it")
    settings = {name: value for name, value in config["settings"].items() if name not in FREE}
    made_of = [config["stage"], settings, config["model"], config.get("data"), config.get("parent_fingerprint")]
    with undamaged(found[-1]):
        content = json.dumps(made_of, sort_keys=True).encode() + Path(found[-1], "progress.json").read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def read_config(out: str | Path) -> dict:
    """The config.json of a run of ours; empty if there is none."""
    path = Path(out, "config.json")
    if not path.exists():
        return {}
    try:
        config = parse_json(path.read_text())
    except ValueError:
        config = None
    kinds = {"stage": str, "settings": dict, "model": dict, "threads": int}
    is_ours = isinstance(config, dict) and all(type(config.get(name)) is kind for name, kind in kinds.items())
    if not is_ours or not 0 <= config["threads"] < 2**15:
        raise InputError(f"{path} was not written by this project, or is damaged; take another folder")
    return config


class Parent(NamedTuple):
    """What a run starts from: its shape, its tokenizer, what identifies its weights, and how they get into a model."""
    config: ModelConfig
    tokenizer: str
    fingerprint: str
    fill: Callable[..., None]  # of (model, skip=names of parameters that the model has of its own)


def parent_of(folder: str) -> Parent:
    """A run of ours, Meta's release or a Hugging Face folder, as --init names it; filled shard by shard, never whole."""
    if checkpoints(folder):
        config, newest = saved_shape(folder)

        def fill(model: nn.Module, skip: tuple[str, ...] = ()) -> None:
            state = checkpoint_state({"model": model}, {})
            read_checkpoint(newest, {name: p for name, p in state.items() if name.removeprefix("model/weights/") not in skip})

        return Parent(config, tokenizer_beside(folder, config), fingerprint(folder), fill)
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: there is no such folder{how_to_make(folder)}")
    config, weight_of, tokenizer = read_any(folder)
    files = sorted((path.name, path.stat().st_size) for path in Path(folder).iterdir())
    key = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    return Parent(config, tokenizer, key, lambda model, skip=(): set_weights(model, weight_of, skip))


def how_to_make(folder: str | Path) -> str:
    """The end of a sentence that misses a folder: the command that makes it, or a hint."""
    makers = {"pretrain": "pretrain.py", "sft": "sft.py", "reward-helpfulness": "reward.py --kind helpfulness",
              "reward-safety": "reward.py --kind safety", "rlhf-v1": "rlhf.py", "rlhf-v2": "rlhf.py --version 2"}
    maker = makers.get(Path(folder).name)
    return f"; make it with `python {maker}`" if maker else "; name the --out of a run"


def run_config(folder: str | Path) -> dict:
    """The config.json of a run of ours; for weights from elsewhere one that tells nothing."""
    if not checkpoints(folder):
        return {"stage": "", "settings": {}}
    if not (config := read_config(folder)):
        raise InputError(f"{folder}: config.json is missing beside its checkpoints; put it back")
    return config


def world_of(folder: str) -> int:
    """The seed of the tiny world that a run of ours knows; 0 for weights from elsewhere."""
    world = run_config(folder)["settings"].get("world") or 0
    if type(world) is not int or world < 0:
        raise InputError(f"{folder}/config.json: world is {world!r:.60}, not the seed of a tiny world; put the right one back")
    return world


def save_model(model: Transformer, out: str, tokenizer: str) -> None:
    """Write a plain model as a run of ours with one checkpoint, step-000000, that --init and `load_model` read."""
    if not os.path.isfile(tokenizer):
        raise InputError(f"{tokenizer} is missing: a run of ours has its tokenizer beside it; put it there")
    with folder_aside(out) as aside:
        be_alone("gloo")
        try:
            save_checkpoint(aside, 0, {"model": model}, {}, {})
        finally:
            dist.destroy_process_group()
            cpu_group.cache_clear()  # it went with the others
        replace_file(aside / "tokenizer.model", Path(tokenizer).read_bytes())
        config = {"stage": "convert", "settings": {}, "model": asdict(model.config), "threads": 0, "world_size": 1}
        replace_file(aside / "config.json", json.dumps(config, indent=1).encode())


def claim(out: str | Path, stage: str) -> None:
    """Raise InputError if --out can't be written to, or holds a run of another stage, whose config.json would be written over."""
    before = read_config(out)
    if before and before["stage"] != stage:
        raise InputError(f"{out} holds a run of another stage, {before['stage']}; take another --out")
    there = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {out}: {there} is no folder that can be written to; take another")


CALLED = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])  # before `eval.py` and others take their subcommand off


def open_run(settings, stage: str, ranks: Ranks, **more) -> dict:
    """Claim --out: refuse another run's folder, drop what was left unfinished. Returns what config.json will hold.

    `more` goes there too; of it, `data` (fingerprints) must not change while the run goes on.
    """
    out = Path(settings.out)
    record = {"stage": stage, "settings": asdict(settings), "command": CALLED, **more, "threads": ranks.threads,
              "world_size": ranks.world_size, "torch": torch.__version__}
    record = json.loads(json.dumps(record))
    if ranks.rank == 0:
        before = read_config(out)
        claim(out, stage)
        for name in ("init", "policy"):
            if getattr(settings, name, "") and Path(getattr(settings, name)).resolve() == out.resolve():
                raise InputError(f"--{name} {out} is --out itself, which would be written over; take another --out")
        if before and settings.resume:
            changed = [f"--{name} {before['settings'].get(name)}" for name, value in record["settings"].items()
                       if name not in FREE and before["settings"].get(name) != value]
            changed += ["other data"] * (before.get("data") != record.get("data"))
            if changed:
                raise InputError(f"{out} holds a run with {changed[0]}; take another --out, or --no-resume to begin again")
            for name in ("threads", "world_size", "torch", "parent_fingerprint"):
                if before.get(name) != record.get(name):
                    print(f"note: this run had {name} {before.get(name)}, now {record.get(name)}; "
                          "it goes on, but not bit for bit", file=sys.stderr)
        elif before or not checkpoints(out):
            for folder in checkpoints(out):
                remove_checkpoint(folder)
            for name in ("metrics.jsonl", "samples.txt"):
                (out / name).unlink(missing_ok=True)
        else:
            raise InputError(f"{out} holds checkpoints without a config.json of ours; take another --out")
        for unfinished in out.glob("step-*.part"):
            shutil.rmtree(unfinished)
    dist.barrier(cpu_group())
    return record


def write_config(settings, stage: str, **more: str) -> None:
    """OUT/config.json of a run that begins anew each time."""
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    record = {"stage": stage, "settings": asdict(settings), "command": CALLED, **more, "model": {},
              "threads": torch.get_num_threads()}
    replace_file(Path(settings.out, "config.json"), json.dumps(record, indent=1).encode())


@contextmanager
def locked(out: str, ranks: Ranks) -> Iterator[None]:
    """Hold --out, so that a second run in the same folder refuses instead of mixing its files with ours."""
    if ranks.rank > 0:
        yield
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock = open(Path(out, ".lock"), "w")
    except OSError as error:
        raise InputError(f"--out {out}: can't be written to ({error.strerror}); take another folder") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers, gone with the process
        except (BlockingIOError, PermissionError):
            raise InputError(f"{out}: another process is writing to it; wait for it, or take another --out") from None
        try:
            yield
        finally:
            if not any(path.is_file() and path.name != ".lock" for path in Path(out).rglob("*")):  # it was refused
                shutil.rmtree(out)


def rewind(path: Path, step: int) -> None:
    """Cut what a log holds behind `step`: a run that goes on writes it again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # behind the last newline stands nothing, or half a line
        found = re.match(rb'\{"step": (\d+)|--- step (\d+)', line)
        if found and int(found[1] or found[2]) > step:
            break
        kept.append(line + b"\n")
    replace_file(path, b"".join(kept))


# ---------------------------------------------------------------------------------------------- before a run is paid for


@dataclass(frozen=True)
class Plan:
    """What a pretraining run needs before it is paid for: memory, time, energy and carbon (§2.2.1, Table 2)."""
    preset: str = "7b"  # size of the model
    gpus: int = 8  # GPUs, over which the model is sharded
    tokens: float = 2e12  # tokens of the run | 2.0T
    mfu: float = 0.4  # share of the peak that the run reaches; Table 2's GPU-hours imply what the paper reached
    peak_flops: float = 312e12  # dense bf16 FLOP/s of a GPU: A100 312e12, H100 989e12 | A100
    watts: float = 400.0  # power of a GPU | 400 (350 for 34B)
    micro_batch: int = 1  # rows of one forward pass on one GPU
    seq_len: int | None = None  # tokens of a row
    checkpointing: bool = True  # recompute activations in the backward pass

    BY_PRESET: ClassVar[dict[str, dict]] = {name: {"seq_len": Settings.BY_PRESET[name]["seq_len"]} for name in PRESETS}


TABLE_2 = {"7b": (184320, 400, 31.22), "13b": (368640, 400, 62.44), "34b": (1038336, 350, 153.90),
           "70b": (1720320, 400, 291.42)}  # GPU-hours on A100-80GB, watts, tCO2eq


def carbon(gpu_hours: float, watts: float) -> float:
    """Tonnes of CO2eq: energy × PUE 1.1 × 0.385 kg/kWh, the Llama 1 paper's formula, which gives all of Table 2."""
    return gpu_hours * watts / 1000 * 1.1 * 0.385 / 1000


def shard_size(config: ModelConfig, gpus: int) -> int:
    """Parameters that rank 0 holds: FSDP cuts each parameter's first dimension, rounded up."""
    with torch.device("meta"):
        return sum(math.ceil(p.shape[0] / gpus) * p[0].numel() for p in Transformer(config).parameters())


def plan_memory(config: ModelConfig, gpus: int, rows: int, seq_len: int, checkpointing: bool, width: int = 2) -> dict[str, float]:
    """Bytes of one GPU at the peak of a step, by what they are for; width: bytes of an activation (bf16 2, fp32 4).

    A layer keeps, for each token, seven vectors of dim (input, normed input, query, output of the attention as it
    leaves and as wo reads it, the residual, its normed form), a key and a value, and four of the feed-forward layer.
    """
    tokens, mine = rows * seq_len, shard_size(config, gpus)
    head = 2 * config.vocab_size * config.dim
    block = (count_parameters(config) - head - config.dim) / config.n_layers
    layer = width * tokens * (7 * config.dim + 2 * config.n_kv_heads * config.head_dim + 4 * config.ffn_hidden)
    kept = config.n_layers * (width * tokens * config.dim if checkpointing else layer)
    logits = 4 * 4 * min(tokens * config.vocab_size, CHUNK_LOGITS["cuda"])  # logits, fp32 copy, softmax, gradient
    first = kept + logits  # when the backward pass begins
    last = 4 * mine + layer + 2 * width * tokens * config.ffn_hidden  # when it ends: gradients, and one layer at work
    both = checkpointing or last > first  # with checkpointing the two are close, and counted together
    unsharded = (width + 4) * block if gpus > 1 else 0  # a block's gradient, and its fp32 copy on the way out
    parts = {"weights": 4 * mine, "AdamW": 8 * mine, "gathered units": width * (head + 2 * block) + unsharded,
             "gradients": 4 * mine if both else 0, "activations": max(first, last - 4 * mine if both else 0)}
    return parts | {"total": sum(parts.values())}


def plan(settings: Plan) -> None:
    """Print memory, time, energy and carbon of a run, and Table 2 beside what its own GPU-hours imply."""
    config = PRESETS[settings.preset]
    flops = flops_per_token(config, settings.seq_len)
    rate = settings.gpus * settings.peak_flops * settings.mfu / flops  # tokens a second
    gpu_hours = settings.tokens / rate / 3600 * settings.gpus
    print(f"{count_parameters(config):,} parameters, {shard_size(config, settings.gpus):,} of them on the first of "
          f"{settings.gpus:,} GPUs")
    memory = plan_memory(config, settings.gpus, settings.micro_batch, settings.seq_len, settings.checkpointing)
    print("GB of a GPU: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items()))
    cache = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim
    print(f"KV cache {cache / 1024:,.0f} KiB a token, {cache * config.max_seq_len / 1e9:.2f} GB for a full context (bf16)")
    print(f"{flops:.3e} FLOPs a token; at {settings.mfu:.0%} MFU {rate:,.0f} tokens/s, "
          f"{settings.tokens / rate / 86400:,.1f} days, {gpu_hours:,.0f} GPU-hours")
    print(f"{gpu_hours * settings.watts / 1e6:,.1f} MWh of GPUs, {carbon(gpu_hours, settings.watts):,.2f} tCO2eq")
    print("\nTable 2   GPU-hours    W   tCO2eq   by the formula   MFU that 2.0T tokens in those hours imply")
    for name, (hours, watts, printed) in TABLE_2.items():
        implied = flops_per_token(PRESETS[name], 4096) * 2e12 / (hours * 3600 * 312e12)
        print(f"{name:6} {hours:12,} {watts:4} {printed:8.2f} {carbon(hours, watts):16.2f} {implied:10.1%}")


# ---------------------------------------------------------------------------------------------- the command line


def command_line(main: Callable, cls: type, argv: list[str] | None = None) -> None:
    """Parse the flags and run `main`; bad input ends with one sentence on standard error and exit code 2.

    So does a file that the system does not let us read or write.
    """
    try:
        settings = parse(cls, argv)
        if hasattr(settings, "threads") or os.environ.get("RANK", "0") == "0":  # what has no such flag needs one process
            main(settings)
    except (InputError, ModelError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            cpu_group.cache_clear()  # it went with the others


COMMANDS = {"plan": (plan, Plan)}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        command_line(*COMMANDS[sys.argv.pop(1)])
    else:
        command_line(main, Settings)
