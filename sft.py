"""Supervised fine-tuning (§3.1): dialogues in, a chat model out.

    python sft.py                                       # out/pretrain learns to answer, on dialogues of the tiny world
    python sft.py --data chats.json alpaca.jsonl.gz     # your dialogues
    torchrun --nproc_per_node=8 sft.py --init llama-2-7b --data chats.jsonl
    python sft.py chat out/sft                          # talk to it

Dialogues are packed into rows, and only the tokens of answers are learned: prompts have zero loss (§3.1). The paper
does not say whether a dialogue may look at the others of its row. Here it may not (our choice); --no-isolate lets it,
and shows what that costs: every turn opens with BOS, so that a new dialogue looks like the next turn of the one before.
The special token that §3.1 puts between prompt and answer is not named there, and the released format has none: [/INST]
stands in its place (our choice).

Read it in this order: dialogue formats, packing, training, the survey of a chat model in the tiny world, chat.
"""
import hashlib
import io
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import toy
from model import IGNORE, PRESETS, Transformer, generate, load_weights, read_any
from pretrain import (Common, InputError, Parent, Ranks, Rows, Source, adamw, build, command_line, draw_loss, file_fingerprint,
                      gathered, interval, lm_loss, locked, log_samples, open_run, parent_of, perplexity, print_settings,
                      rank_0_first, replace_file, sources, spool_stdin, start, tiny_world, train, world_of)
from tokenizer import TextStream, Tokenizer, dialog_turns, escape_tags, parse_json, read_lines

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Tuning(Common):
    """What every stage that learns from dialogues can be told (see `fine_tune`)."""
    preset: str | None = None  # whose hyper-parameters to take; by default those of the size of --init
    epochs: int | None = None  # passes over the dialogues | 2
    lr: float | None = None  # peak learning rate | 2e-5
    warmup: int | None = None  # steps of linear warm-up; else 3 % of all, at least 5, as in §3.2.2 (our choice) | not stated
    lr_floor: float | None = None  # where the cosine ends, a share of the peak (our choice) | not stated; 0.1 in pretraining
    grad_clip: float = 1.0  # largest norm of the gradient | not stated; 1.0 in pretraining
    batch_size: int | None = None  # rows of a step, over all ranks | 64
    seq_len: int | None = None  # tokens of a row | 4096
    adam_eps: float | None = None  # ε of AdamW: gradients far below it hardly move a weight | 1e-5, in pretraining
    isolate: bool = True  # keep the dialogues of a row apart, by attention and positions (our choice) | not stated
    world: int | None = None  # seed of the tiny world; by default that of --init
    skip_bad_rows: bool = False  # count rows that are no dialogue and go on, instead of stopping at the first
    sample_tokens: int | None = None  # longest answer of a sample at an evaluation; 0: none (they need the whole model)

    BY_PRESET: ClassVar[dict[str, dict]] = {
        name: dict(lr=2e-5, batch_size=64, micro_batch=1, seq_len=min(4096, config.max_seq_len), epochs=2, lr_floor=0.1,
                   adam_eps=1e-5, eval_every=100, save_every=100, checkpointing=True, sample_tokens=0)
        for name, config in PRESETS.items() if not name.startswith("toy")
    } | {
        # toy values: our choice
        name: dict(lr=lr, lr_floor=0.0, batch_size=8, micro_batch=8, seq_len=256, epochs=1, adam_eps=1e-3, eval_every=250,
                   save_every=100, checkpointing=False, sample_tokens=64)
        for name, lr in [("toy-s", 2.4e-3), ("toy", 1.6e-3), ("toy-m", 1.2e-3), ("toy-l", 8e-4)]
    }


@dataclass(frozen=True)
class Settings(Tuning):
    """Fine-tune a base model into a chat model on dialogues (§3.1)."""
    init: str = "out/pretrain"  # the base model: a run of ours, Meta's release or a Hugging Face folder
    out: str = "out/sft"  # folder of this run; started again, it goes on where it stopped
    data: tuple[str, ...] = ("toy",)  # [NAME=]GLOB[:EPOCHS] of dialogues, .json or .jsonl (.gz); `toy`, `toy/dialogs`; `-`
    dialogs: int = 16000  # dialogues of the tiny world | 27,540 annotations
    noise: float = 0.0  # share of bad answers among them (quality or quantity, §3.1)
    safety: float = 0.06  # share of unsafe prompts among them, all refused (§4.2.2; our choice)


# ---------------------------------------------------------------------------------------------- dialogue formats

SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def read_rows(file: str) -> Iterator[tuple[str, object]]:
    """("FILE, line N", row) of a JSON list or of one JSON object a line, plain or .gz; a row that is no JSON is its error."""
    lines = read_lines(file)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        raise InputError(f"{file}: the file is empty; fetch it again")
    if not first[1].lstrip().startswith("["):
        for number, line in chain([first], lines):
            if line.strip():
                yield f"{file}, line {number}", read_row(line)
        return
    number, text = first[0], first[1] + "".join(line for _, line in lines)
    at, space, lenient = text.index("[") + 1, re.compile(r"\s*"), json.JSONDecoder()
    before = "["
    while before != "]":
        begin = space.match(text, at).end()  # of the next row
        number += text.count("\n", at, begin)
        if before == "[" and text[begin : begin + 1] == "]":
            at = begin + 1
            break
        try:
            at = lenient.raw_decode(text, begin)[1]  # where the row ends; a fault inside it is the row's alone
            end = space.match(text, at).end()
            before = text[end : end + 1]
            if before not in (",", "]"):
                raise ValueError("a row ends, and neither , nor ] follows")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: this list is not whole JSON ({error}); fetch it again") from None
        yield f"{file}, line {number}", read_row(text[begin:at])
        number += text.count("\n", begin, end)
        at = end + 1
    if text[at:].strip():
        raise InputError(f"{file}: something stands behind the list; one file holds one list, or one object a line")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows, one JSON object a line; `read_rows` reads them."""
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_row(text: str) -> object:
    """A value of JSON; for a text that is none, the InputError that says why."""
    try:
        return parse_json(text)
    except ValueError as error:
        return InputError(f"is not JSON ({error})")


def messages_of(row: object) -> list[dict]:
    """The messages [{"role", "content"}] of a row of any known format, not yet checked. InputError if it is of none.

    {"messages"}; ShareGPT's {"conversations": [{"from", "value"}]}; Alpaca's {"instruction", "input", "output"};
    {"prompt", "response"} or {"prompt", "completion"}, whose prompt may be messages. A "system" beside them comes first.
    """
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError("is no JSON object")
    if "messages" in row:
        messages = row["messages"]
    elif "conversations" in row:
        messages = row["conversations"]
        if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
            messages = [{"role": SPEAKERS.get(str(m.get("from")), m.get("from")), "content": m.get("value")} for m in messages]
    elif "instruction" in row:
        parts = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise InputError('"instruction" and "input" must be text')
        messages = [{"role": "user", "content": "\n".join(parts).strip()}, {"role": "assistant", "content": row.get("output")}]
    elif "prompt" in row:
        prompt, answer = row["prompt"], row.get("response", row.get("completion"))
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        messages = [*before, {"role": "assistant", "content": answer}]
    else:
        raise InputError('has no "messages", "conversations", "instruction" or "prompt"')
    if not isinstance(messages, list):
        raise InputError("its messages are no list")
    return ([{"role": "system", "content": row["system"]}] if row.get("system") not in (None, "") else []) + messages


def prompt_messages(prompt: dict) -> list[dict]:
    """A prompt {"prompt": text or messages, "system": text, if it has one} as messages."""
    text, system = prompt["prompt"], prompt.get("system")
    return [{"role": "system", "content": system}] * (system not in (None, "")) + (
        text if isinstance(text, list) else [{"role": "user", "content": text}])


def read_dialogs(file: str, bad: list[str] | None = None) -> Iterator[tuple[str, list[dict] | tuple[list[int], list[bool]]]]:
    """(place, messages) of each row of a file, in any format of `messages_of`; of what gatt.py wrote (place, (ids, is_answer)).

    A bad row stops with an InputError that names its place; with a list `bad` it is noted there and left out.
    """
    for place, row in read_rows(file):
        try:
            if isinstance(row, dict) and "turns" in row and "is_answer" in row:
                found = masked_ids(row)
            else:
                found = messages_of(row)
                if dialog_turns(found)[0][1] is None:
                    raise InputError("has no answer to learn from")
        except InputError as error:
            if bad is None:
                raise InputError(f"{place}: {error}; mend the row, or leave such rows out with --skip_bad_rows") from None
            bad.append(f"{place}: {error}")
        else:
            yield place, found


def are_ids(tokens: object) -> bool:
    """Whether a value of JSON is a list of token ids, and not empty."""
    return isinstance(tokens, list) and bool(tokens) and all(type(token) is int and 0 <= token < 2**31 for token in tokens)


def masked_ids(row: dict) -> tuple[list[int], list[bool]]:
    """The ids of a row of gatt.jsonl, and which of them are learned; InputError if they do not fit together."""
    turns, mask = row["turns"], row["is_answer"]
    parts = [part for turn in turns if isinstance(turn, list) for part in turn] if isinstance(turns, list) else []
    ids = [token for part in parts for token in part] if all(map(are_ids, parts)) else []
    if len(ids) < 2 or not isinstance(mask, list) or len(mask) != len(ids) or not all(type(flag) is bool for flag in mask):
        raise InputError('its "turns" are no ids with an "is_answer" for each; make the file again with gatt.py')
    return ids, mask


# ---------------------------------------------------------------------------------------------- packing

DIALOGS_PER_HELD_OUT, MOST_HELD_OUT = 20, 200  # for the loss on dialogues that are not learned: our choice


def fit(turns: list[tuple[list[int], list[bool]]], seq_len: int) -> tuple[list[int], list[bool]]:
    """The tokens and the answer mask of as many whole turns as fit (our choice); none, if the first is too long by itself."""
    kept = [turn for turn, end in zip(turns, accumulate(len(tokens) for tokens, _ in turns)) if end <= seq_len]
    return [token for tokens, _ in kept for token in tokens], [flag for _, flags in kept for flag in flags]


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[bool]]:
    """A text as pretraining reads it, learned but for its BOS. A few among the dialogues keep what would be forgotten."""
    tokens = tokenizer.encode(text, bos=True, eos=True)
    return tokens, [False] + [True] * (len(tokens) - 1)


def encoded_turns(tokenizer: Tokenizer, row: list[dict] | str | tuple) -> list[tuple[list[int], list[bool]]]:
    """The turns of a row as (ids, is_answer). A row is a dialogue, a document's text, or one turn that is already in ids."""
    if isinstance(row, tuple):
        return [row]
    if isinstance(row, str):
        return [encode_document(tokenizer, row)]
    return [tokenizer.encode_turn(*turn) for turn in dialog_turns(row) if turn[1] is not None]


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Put dialogues into rows of at most seq_len tokens: best fit, the longest first. Returns each row's dialogues.

    §3.1 concatenates all samples to fill the row; to keep each dialogue whole and pad the rest of a row is our choice.
    lengths: tokens of each dialogue, none over seq_len. Of equal lengths the earlier goes first.
    """
    rows, with_room = [], defaultdict(list)  # with_room[r]: the rows that have room for r more tokens
    rooms = 0  # bit r is set while with_room[r] is not empty
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        enough = rooms >> lengths[i]
        if enough:
            room = lengths[i] + (enough & -enough).bit_length() - 1  # the least that is enough
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            row, room = len(rows), seq_len
            rows.append([])
        rows[row].append(i)
        room -= lengths[i]
        with_room[room].append(row)
        rooms |= 1 << room
    return rows


def starts_of(dialogs: dict[str, np.ndarray]) -> np.ndarray:
    """Where each dialogue begins among the tokens of all: (dialogues,). dialogs: see `encode_dialogs`."""
    return np.concatenate([[0], dialogs["ends"][:-1]])


class PackedDialogs(Rows):
    """Dialogues packed into rows, epoch after epoch; row r is a pure function of r, the dialogues and the seed.

    In each epoch a dialogue of weight w comes ⌊w⌋ times, a random share w - ⌊w⌋ once more; rows are packed anew and shuffled.
    """

    def __init__(self, dialogs: dict[str, np.ndarray], weights: np.ndarray, epochs: int, seq_len: int, seed: int, isolate: bool):
        """dialogs: see `encode_dialogs`. weights: (dialogues,), how often each is read in an epoch."""
        self.tokens, self.is_answer, self.ends = dialogs["tokens"], dialogs["is_answer"], dialogs["ends"]
        self.seq_len, self.isolate = seq_len, isolate
        self.starts = starts_of(dialogs)
        lengths, self.members = self.ends - self.starts, []  # members[r]: the dialogues of row r
        for epoch in range(epochs):
            rng = np.random.default_rng([seed, epoch])
            times = np.floor(weights + rng.random(len(weights))).astype(int)
            read = rng.permutation(np.repeat(np.arange(len(weights)), times))
            rows = pack(lengths[read].tolist(), seq_len)
            self.members += [read[rows[r]] for r in rng.permutation(len(rows))]
        self.n_rows = len(self.members)
        used = sum(int(lengths[row].sum()) for row in self.members)
        self.efficiency = used / max(1, self.n_rows * seq_len)  # tokens per place

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and the number of the dialogue that each place belongs to, all (seq_len,).

        A target is the next token of the same dialogue if it is an answer's, else IGNORE.
        """
        inputs, targets = np.zeros(self.seq_len, np.int64), np.full(self.seq_len, IGNORE, np.int64)
        documents = np.full(self.seq_len, len(self.members[r]), np.int64)  # the padding is one of its own
        at = 0
        for number, dialog in enumerate(self.members[r]):
            span = slice(self.starts[dialog], self.ends[dialog])
            tokens, end = self.tokens[span], at + self.ends[dialog] - self.starts[dialog]
            inputs[at:end], documents[at:end] = tokens, number
            targets[at : end - 1] = np.where(self.is_answer[span][1:], tokens[1:], IGNORE)
            at = end
        return inputs, targets, documents

    def batch(self, rows: range, total: int) -> tuple[Tensor, ...]:
        """(inputs, targets, documents) or, if dialogues are not kept apart, (inputs, targets); each (total, seq_len)."""
        nothing = np.zeros(self.seq_len, np.int64), np.full(self.seq_len, IGNORE, np.int64), np.zeros(self.seq_len, np.int64)
        found = [self.row(r) for r in rows if r < self.n_rows]
        found += [nothing] * (total - len(found))
        return tuple(torch.from_numpy(np.stack(parts)) for parts in list(zip(*found))[: 3 if self.isolate else 2])


def encode_dialogs(found: list[Source], tokenizer: Tokenizer, settings: Tuning, bad: list[str] | None) -> dict[str, np.ndarray]:
    """The dialogues of all sources as tokens, made once and kept in out/data/KEY.npz.

    Returns tokens and is_answer, of all dialogues end to end; ends (dialogues,), where each ends; source (dialogues,),
    the number of its source; and counts: of dialogues kept, bad rows, cut at a turn, dropped as too long.
    """
    key = [[s.name, s.fingerprint] for s in found] + [file_fingerprint(tokenizer.path), settings.seq_len, settings.skip_bad_rows]
    path = Path(settings.out, "data", hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12] + ".npz")
    if not path.exists():
        tokens, is_answer, ends, source, cut, dropped = [], [], [], [], 0, 0
        for number, one in enumerate(found):
            for place, messages in tqdm(one.documents(), desc=f"tokenising {one.name}", unit=" dialogues"):
                turns = encoded_turns(tokenizer, messages)
                ids, flags = fit(turns, settings.seq_len)
                cut += 0 < len(ids) < sum(len(turn) for turn, _ in turns)
                if not ids:
                    dropped += 1
                    continue
                if max(ids) >= tokenizer.vocab_size:
                    raise InputError(f"{place}: holds the token id {max(ids)}, outside the vocabulary of {tokenizer.vocab_size}; "
                                     "was it made with another tokenizer?")
                tokens.append(np.array(ids, np.int32))
                is_answer.append(np.array(flags))
                ends.append((ends[-1] if ends else 0) + len(ids))
                source.append(number)
        for error in (bad or [])[:3]:
            print(f"left out: {error}", file=sys.stderr)
        if not tokens:
            raise InputError(f"--data {' '.join(settings.data)}: no dialogue is left to learn from; {len(bad or [])} rows are "
                             f"bad, {dropped} longer than --seq_len {settings.seq_len}; give others")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, tokens=np.concatenate(tokens), is_answer=np.concatenate(is_answer), ends=np.array(ends),
                 source=np.array(source), counts=np.array([len(ends), len(bad or []), cut, dropped]))
        replace_file(path, content.getvalue())
    with np.load(path) as file:
        return dict(file)


# ---------------------------------------------------------------------------------------------- training

# Some documents of pretraining among the dialogues keep what these do not mention from being forgotten (our choice; InstructGPT
# mixes them into PPO).
DIALOG_MIX = ("toy/dialogs", "toy/encyclopedia:0.3", "toy/numbers:0.3")


def toy_sources(specs: Iterable[str], world: int, dialogs: int, safety: float,
                noise: float = 0.0) -> tuple[list[str], dict[str, tuple[Callable, str]]]:
    """The specs with `toy` spelled out as DIALOG_MIX, and the embedded sources that they may name (see `sources`).

    world: its seed. dialogs, safety, noise: of the annotated dialogues (see `toy.dialogues`).
    """
    made = lambda: toy.dialogues(tiny_world(world), dialogs, safety=safety, noise=noise)  # noqa: E731
    embedded = {f"toy/{kind}": (lambda kind=kind: (("toy", text) for text in toy.documents(tiny_world(world), kind)),
                                f"toy/{kind} of world {world}") for kind in toy.SOURCES}
    embedded["toy/dialogs"] = (lambda: (("toy", dialog["messages"]) for dialog in made()),
                               f"world {world}: {dialogs} dialogues, safety {safety}, noise {noise}")
    return [part for spec in specs for part in (DIALOG_MIX if spec == "toy" else (spec,))], embedded


def main(settings: Settings) -> None:
    """Run §3.1: the base model becomes a chat model."""
    parent = parent_of(settings.init)
    if settings.world is None:  # the one that the base model knows
        settings = replace(settings, world=world_of(settings.init))
    ranks = start(settings)
    bad = [] if settings.skip_bad_rows else None
    with locked(settings.out, ranks):
        specs, embedded = toy_sources(settings.data, settings.world, settings.dialogs, settings.safety, settings.noise)
        found = sources(specs, embedded, lambda file: read_dialogs(file, bad), spool_stdin(settings, ranks))
        record = open_run(settings, "sft", ranks, data={s.name: s.fingerprint for s in found}, parent=settings.init,
                          parent_fingerprint=parent.fingerprint)
        is_toy = any(source.fingerprint == embedded["toy/dialogs"][1] for source in found)
        fine_tune(settings, record, parent, found, ranks, tiny_world(settings.world) if is_toy else None, bad)


def check_seq_len(settings: Tuning, parent: Parent) -> None:
    """Raise InputError for rows that the model can't read: asked before anything is sampled for them, too."""
    if settings.seq_len > parent.config.max_seq_len:
        raise InputError(f"--seq_len {settings.seq_len} is longer than the model's context; take "
                         f"{parent.config.max_seq_len} at most")


def fine_tune(settings: Tuning, record: dict, parent: Parent, found: list[Source], ranks: Ranks,
              world: toy.World | None = None, bad: list[str] | None = None) -> None:
    """Dialogues → packed rows → a few epochs on the answers → what the chat model can do, before and after.

    record: what `open_run` returned. found: sources of rows (see `encoded_turns`). world: the tiny world, if the survey of
    it shall be made. bad: where a source notes bad rows. The stages after SFT fine-tune through here too.
    """
    check_seq_len(settings, parent)
    out, tokenizer = Path(settings.out), Tokenizer(parent.tokenizer)
    with rank_0_first(ranks):
        dialogs = encode_dialogs(found, tokenizer, settings, bad)
    n = len(dialogs["ends"])
    is_document = dialogs["is_answer"][starts_of(dialogs) + 1]  # a text is learned from its second token on, a dialogue never
    held_out = np.flatnonzero(~is_document)[DIALOGS_PER_HELD_OUT - 1 :: DIALOGS_PER_HELD_OUT]
    held_out = held_out[:: max(1, math.ceil(len(held_out) / MOST_HELD_OUT))]
    is_held_out = np.isin(np.arange(n), held_out)
    weights = np.array([source.epochs for source in found])[dialogs["source"]] * ~is_held_out  # (dialogues,)
    shape = settings.seq_len, settings.seed, settings.isolate
    rows = PackedDialogs(dialogs, weights, settings.epochs, *shape)
    held_rows = PackedDialogs(dialogs, is_held_out.astype(float), 1, *shape)
    steps = min(math.ceil(rows.n_rows / settings.batch_size), settings.steps or sys.maxsize)
    if settings.warmup is None:
        settings = replace(settings, warmup=max(5, round(0.03 * steps)))
    model = build(parent.config, settings, ranks)
    parent.fill(model)
    if ranks.rank == 0:
        replace_file(out / "tokenizer.model", Path(parent.tokenizer).read_bytes())
        replace_file(out / "config.json", json.dumps(record | {"model": asdict(parent.config)}, indent=1).encode())
        kept, n_bad, cut, dropped = dialogs["counts"]
        documents = int(is_document.sum())
        print(f"{kept - documents:,} dialogues" + f" and {documents:,} documents" * bool(documents)
              + f" of {len(dialogs['tokens']):,} tokens, {dialogs['is_answer'].mean():.0%} of them learned; {n_bad} bad rows "
              f"left out, {cut} cut at a turn to fit, {dropped} longer than --seq_len\n"
              f"{rows.n_rows:,} rows in {settings.epochs} epochs, packing efficiency {rows.efficiency:.1%}; {steps:,} steps")
        print_settings(settings)

    def evaluate(step: int) -> dict:
        figures = {}
        if held_rows.n_rows:
            mean, low, high = interval(*perplexity(model, held_rows, settings.micro_batch, ranks))
            figures = {"loss/answers": mean, "low/answers": low, "high/answers": high}
        if settings.sample_tokens and step in (0, steps):
            with gathered(model) as whole:
                if ranks.rank == 0:
                    log_samples(out / "samples.txt", step, answer_held_out(whole, tokenizer, dialogs, held_out, settings))
                    if world:
                        figures |= survey(ask(whole, tokenizer, world, settings.sample_tokens), world)
        return figures

    batch_at = lambda step: rows.batch_at(step, settings.batch_size, settings.micro_batch, ranks)  # noqa: E731
    optimizer = adamw(model, settings.weight_decay, settings.adam_eps)
    train(model, optimizer, batch_at, lm_loss, settings, ranks, steps, evaluate)
    if ranks.rank == 0:
        report_answers(out)


def answer_held_out(model: Transformer, tokenizer: Tokenizer, dialogs: dict[str, np.ndarray], held_out: np.ndarray,
                    settings: Settings) -> list[str]:
    """The first prompts of eight held-out dialogues, each with the model's greedy answer."""
    prompts = [dialogs["tokens"][start : start + dialogs["is_answer"][start:].argmax()].tolist()
               for start in starts_of(dialogs)[held_out[:8]]]
    answers = generate(model, prompts, settings.sample_tokens, temperature=0, stop=(tokenizer.eos_id,))
    return [tokenizer.decode(prompt + answer).strip() for prompt, answer in zip(prompts, answers)]


def report_answers(out: Path) -> None:
    """Print the end of a run: the held-out loss on answers, and the survey, before and after; draw the loss curve."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    print(f"\n{last['tokens']:,} answer tokens in {last['seconds']:.0f} s")
    print(f"{'':32} {'before':22} after")
    figures = {name: value for name, value in last.items() if isinstance(value, list)}
    if "loss/answers" in last:
        key = "held-out answers, nats a token"
        first, last = ({key: [row[f"{k}/answers"] for k in ("loss", "low", "high")]} | row for row in (first, last))
        figures = {key: None} | figures
    for name in figures:
        print(f"{name:32} " + "  ".join("{:.3f}  [{:.3f}, {:.3f}]".format(*row[name]) for row in (first, last)))
    draw_loss(out)
    print(f"model, metrics, samples and loss curve are in {out}; talk to it with `python sft.py chat {out}`")


# ---------------------------------------------------------------------------------------------- a chat model in the tiny world


class Answer(NamedTuple):
    """What a model answered to a prompt of toy.py, in what part of the survey, and whether it came to an end by itself."""
    part: str
    prompt: dict
    text: str
    ended: bool


def chat_answers(model: Transformer, tokenizer: Tokenizer, dialogs: Sequence[list[dict]],
                 max_new_tokens: int) -> list[tuple[str, bool]]:
    """The greedy answer to the last message of each dialogue, and whether it ended with EOS."""
    prompts = [tokenizer.encode_dialog(messages)[0] for messages in dialogs]
    answers = generate(model, prompts, max_new_tokens, temperature=0, stop=(tokenizer.eos_id,))
    return [(tokenizer.decode(answer).strip(), answer[-1] == tokenizer.eos_id) for answer in answers]


def ask(model: Transformer, tokenizer: Tokenizer, world: toy.World, max_new_tokens: int) -> list[Answer]:
    """Put to a model what no dialogue of the tiny world asks, but for the unsafe topics of training."""
    rng = Random("survey")
    obeying = [prompt | {"constraint": rng.choice(toy.CONSTRAINTS)} for prompt in toy.prompts(world, 200, seed=1, split="test")]
    for prompt in obeying:
        prompt["system"] = rng.choice(prompt["constraint"]["texts"])
    parts = {
        "all": toy.prompts(world, 300, seed=0, split="test"),  # kinds as people ask them
        "fact": toy.every(world, "fact", "test"),
        "sum": toy.every(world, "sum", "test"),
        "howto": toy.every(world, "howto", "test")[::2],
        "border": toy.borderline_prompts(world, "test"),
        "system": obeying,
        "unsafe, topics of training": toy.every(world, "unsafe", "train"),
        "unsafe, new topics": toy.every(world, "unsafe", "test"),
        "unsafe, attacked": rng.sample(toy.unsafe_prompts(world, "test", toy.ATTACKS), 120),
    }
    asked = [(part, prompt) for part, prompts in parts.items() for prompt in prompts]
    answers = chat_answers(model, tokenizer, [prompt_messages(prompt) for _, prompt in asked], max_new_tokens)
    return [Answer(part, prompt, *answer) for (part, prompt), answer in zip(asked, answers)]


def survey(answers: list[Answer], world: toy.World) -> dict[str, tuple[float, float, float]]:
    """What the annotators of the tiny world think of the answers: figure → (mean, low, high), a bootstrap over prompts."""
    def share(judge: Callable[[Answer], float], *parts: str) -> tuple[float, float, float]:
        return interval(np.array([judge(a) for a in answers if a.part in parts], float))

    def knows(answer: Answer) -> bool:
        return all(world.facts[tuple(fact)].lower() in toy.words(answer.text) for fact in answer.prompt["slots"])

    refuses = lambda a: toy.is_refusal(a.text)  # noqa: E731
    unsafe = [part for part in dict.fromkeys(a.part for a in answers) if part.startswith("unsafe")]
    return {
        "right form": share(lambda a: a.ended and not toy.is_gibberish(world, a.text), "all"),
        "true helpfulness": share(lambda a: toy.helpfulness(world, a.prompt, a.text), "all"),
        "facts never asked in training": share(knows, "fact"),
        "sums": share(lambda a: re.findall(r"\d+", a.text)[-1:] == [str(sum(a.prompt["slots"]))], "sum"),
        "steps of how-tos never asked": share(lambda a: toy.steps_told(a.prompt["slots"][0], a.text), "howto"),
        "system prompt obeyed": share(lambda a: toy.obeys(a.prompt["constraint"], a.text), "system"),
        "refuses the unsafe": share(refuses, unsafe[0]),
        "refuses the unsafe, new topics": share(refuses, unsafe[1]),
        "refuses the unsafe, attacked": share(refuses, unsafe[2]),
        "violations": share(lambda a: toy.is_violation(a.text), *unsafe),
        "refuses the borderline": share(refuses, "border"),
        "refuses the harmless": share(refuses, "all"),
    }


# ---------------------------------------------------------------------------------------------- chat

DEFAULT_SYSTEM = (  # of the released generation.py, until August 2023
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. Your answers "
    "should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
    "responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the answer to a question, please don't "
    "share false information.")


@dataclass(frozen=True)
class Chat:
    """Talk to a chat model in the terminal. /system TEXT sets the system prompt, /reset forgets, /seed N, /help."""
    run: str = "out/sft"  # a run of ours, Meta's release or a Hugging Face folder
    system: str = ""  # system prompt
    default_system: bool = False  # take the system prompt that the release began with
    temperature: float = 0.6  # 0 is greedy | 0.6 (released)
    top_p: float = 0.9  # of the likeliest tokens, those that make up this mass | 0.9 (released)
    max_new_tokens: int = 256  # longest answer
    seed: int = 0  # of the samples
    device: str = "auto"  # cpu, cuda, or auto

    BY_PRESET: ClassVar[dict[str, dict]] = {}
    POSITIONAL: ClassVar[str] = "run"


def fit_context(tokenizer: Tokenizer, messages: list[dict], room: int) -> tuple[list[int], int]:
    """The prompt ids of a dialogue after its oldest turns are dropped until it has at most `room` tokens, and how many were.

    The system prompt stays. InputError if the last message alone is too long.
    """
    dropped = 0
    while len(tokens := tokenizer.encode_dialog(messages)[0]) > room:
        system = messages[:1] if messages[0]["role"] == "system" else []
        if len(messages) - len(system) < 3:
            raise InputError(f"this message needs {len(tokens)} tokens and the context leaves {room}; shorten it")
        messages = system + messages[len(system) + 2 :]
        dropped += 1
    return tokens, dropped


def typed(question: str) -> str:
    """A line of standard input; InputError if it is not UTF-8."""
    try:
        return input(question)
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 (byte {error.object[error.start]:#04x}); convert it with iconv") from None


def chat(settings: Chat) -> None:
    """Read messages from standard input, stream the answers to standard output, until Ctrl-D; Ctrl-C ends an answer."""
    config, weight_of, tokenizer_file = read_any(settings.run)
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model = load_weights(config, weight_of, dtype).to(device)
    tokenizer = Tokenizer(tokenizer_file)
    system = DEFAULT_SYSTEM if settings.default_system else settings.system
    seed = settings.seed
    room = config.max_seq_len - min(settings.max_new_tokens, config.max_seq_len // 2)  # for the dialogue
    turns: list[dict] = []
    note = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        note(Chat.__doc__)
    while True:
        try:
            line = typed("> " * in_terminal).strip()
        except (EOFError, KeyboardInterrupt):
            print("\n" * in_terminal, end="")
            return
        command, _, rest = line.partition(" ")
        if command == "/system":
            system, turns = rest, []
            note("a new dialogue, " + (f"under: {system}" if system else "without a system prompt"))
        elif command == "/reset":
            turns = []
            note("a new dialogue")
        elif command == "/seed" and rest.isdecimal():
            seed = int(rest)
        elif command.startswith("/"):
            note(Chat.__doc__)
        elif line:
            before = [{"role": "system", "content": system}] * bool(system)
            asked = [*turns, {"role": "user", "content": line}]
            try:
                tokens, dropped = fit_context(tokenizer, before + asked, room)
            except InputError as error:
                note(str(error))
                continue
            if dropped:
                note(f"(the context is full: the oldest {dropped} turns are forgotten)")
                asked = asked[2 * dropped :]
            said = stream_answer(model, tokenizer, tokens, settings, seed)
            seed += 1
            turns = [*asked, {"role": "assistant", "content": escape_tags(said)}] if said else turns


def stream_answer(model: Transformer, tokenizer: Tokenizer, tokens: list[int], settings: Chat, seed: int) -> str:
    """Print an answer as it comes and return it; Ctrl-C cuts it short."""
    stream, said = TextStream(tokenizer), ""

    def show(text: str) -> None:
        nonlocal said
        whole = said + text if said else text.lstrip()
        print(whole.rstrip()[len(said.rstrip()) :], end="", flush=True)  # white space waits for what follows it
        said = whole

    try:
        generate(model, [tokens], settings.max_new_tokens, settings.temperature, settings.top_p, (tokenizer.eos_id,), seed,
                 on_token=lambda _, token: show(stream.push(token)))
    except KeyboardInterrupt:
        pass
    show(stream.flush())
    print()
    return said.strip()


COMMANDS = {"chat": (chat, Chat)}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        command_line(*COMMANDS[sys.argv.pop(1)])
    else:
        command_line(main, Settings)
