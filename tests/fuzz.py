"""Feed damaged files of every format to the readers: each must read them or refuse them with one sentence.

    python tests/fuzz.py --n 10000             # that many files, in this process
    python tests/fuzz.py --n 0 --cli 50        # that many through the command lines, each a process of its own
    python tests/fuzz.py --n 1 --first 17      # one of them again

A good small file is damaged: bits are turned, bytes cut, swapped, doubled or put in, and JSON is changed as JSON: names dropped
or doubled, values of other types, huge numbers, NaN. What happens depends on the seed and the file's number alone. Success is a
file that is read, or an error of ours in one line; all else is printed, with the seed and the number, and ends with exit code 1.
"""
import argparse
import contextlib
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch

from eval import TASKS, Contamination, longest_matches, index_samples, read_items, read_samples, with_examples
from gatt import draw_instruction, read_constraints
from model import ModelConfig, ModelError, Transformer, generate, load_hf, load_meta, load_weights, read_any, save_hf
from pretrain import InputError, Mixture, fingerprint, load_model, parent_of, read_documents, save_model, world_of
from reward import RewardModel, encode_pairs, file_prompts, held_out, read_pairs
from sft import encoded_turns, prompt_messages, read_dialogs
from tokenizer import TOY_SYMBOLS, Tokenizer, read_texts
from tokenizer import main as tokenizer_main

CLEAN = (InputError, ModelError)
SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=48, vocab_size=320, max_seq_len=256)
FOX = "The old fox has 3 eggs."
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": FOX}, {"role": "assistant", "content": "Yes."}]
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": FOX}]
IDS = {"prompt_ids": [1, 5, 9], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}
ROWS = {  # format → rows of each form that it may have
    "documents": [{"text": FOX}, {"text": "A hen.", "id": 1}],
    "dialogs": [{"messages": TURNS}, {"conversations": [{"from": "human", "value": FOX}, {"from": "gpt", "value": "Yes."}]},
                {"instruction": FOX, "input": "x", "output": "y", "system": "Be brief."}, {"prompt": FOX, "response": "y"},
                {"prompt": ASKED, "completion": "y"}, {"id": "gatt/0", "turns": [[[1, 5, 9], [7, 2]]], "is_answer": [False, False, False, True, True]}],
    "pairs": [{"prompt": FOX, "chosen": "a", "rejected": "b", "rating": "better", "safety": "both safe"} | IDS,
              {"prompt": ASKED, "responses": ["a", "b", "c"], "scores": [1, 2.5, -3]},
              {"chosen": f"\n\nHuman: {FOX}\n\nAssistant: Yes.", "rejected": f"\n\nHuman: {FOX}\n\nAssistant: No."},
              {"conversations": [{"from": "human", "value": FOX}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}],
    "prompts": [{"prompt": FOX, "unsafe": True, "kind": "fact", "id": 7, "category": "x", "template": "Be safe."}, {"prompt": ASKED, "system": "Hi"}],
    "constraints": [{"kind": "hobby", "texts": ["You enjoy chess.", "Like chess."], "terse": "Hobby: chess."}, {"kind": "style", "texts": [FOX], "terse": "x"}],
    "samples": [{"prompt": FOX, "score": 1}, {"tokens": [5, 6, 7], "score": 0.5}, {"prompt": [FOX, "y"], "score": 0}],
    "messages": TURNS,
    "hellaswag": [{"activity_label": "Eggs", "ctx_a": FOX, "ctx_b": "it", "endings": ["a", "b"], "label": 1}, {"query": FOX, "choices": ["a", "b"], "gold": 0}],
    "piqa": [{"goal": FOX, "sol1": "a", "sol2": "b", "label": 1}],
    "siqa": [{"context": FOX, "question": "why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}],
    "winogrande": [{"sentence": "The fox saw the _ here.", "option1": "hen", "option2": "egg", "answer": "2"}],
    "arc-e": [{"question": {"stem": FOX, "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}, "answerKey": "B"},
              {"question": FOX, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}],
    "openbookqa": [{"question_stem": FOX, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}],
    "commonsenseqa": [{"question": {"stem": FOX, "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}, "answerKey": "B"}],
    "boolq": [{"passage": FOX, "question": "has it eggs", "answer": True}],
    "mmlu": [{"question": FOX, "subject": "eggs", "choices": ["a", "b", "c", "d"], "answer": 2}],
    "truthfulqa-mc1": [{"question": FOX, "mc1_targets": {"a": 1, "b": 0}}, {"question": FOX, "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}}],
    "truthfulqa-mc2": [{"question": FOX, "mc2_targets": {"a": 1, "b": 0}}],
    "triviaqa": [{"question": FOX, "answer": {"value": "3", "aliases": ["three"]}}],
    "naturalquestions": [{"question": FOX, "answer": ["3", "three"]}],
    "gsm8k": [{"question": FOX, "answer": "It has <<1+2=3>>3. #### 3"}],
    "humaneval": [{"prompt": "def fox():\n", "entry_point": "fox", "canonical_solution": "    return 3\n", "test": "def check(f):\n    assert f() == 3"}],
    "mbpp": [{"text": FOX, "code": "x = 3", "test_list": ["assert x == 3"], "test_setup_code": ""}, {"prompt": FOX, "code": "x = 3", "test_list": ["assert x"], "test_imports": ["import math"]}],
}


class Format(NamedTuple):
    """A kind of file: its name, good bytes for each of its files, what reads it, and the command line that does ({} is the file)."""
    files: dict[str, bytes]  # names below a folder; one of them is damaged
    read: Callable[[Path], object]  # of the file, or of the folder if there are several
    command: list[str] | None = None


def write_meta(model: Transformer, folder: Path, n_shards: int = 2) -> None:
    """Meta's release by hand: columns and rows cut as their model-parallel layers cut them."""
    folder.mkdir()
    for i in range(n_shards):
        torch.save({name: p if p.ndim == 1 else p.chunk(n_shards, 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0)[i].clone()
                    for name, p in model.state_dict().items()}, folder / f"consolidated.{i:02d}.pth")
    c = model.config
    (folder / "params.json").write_text(json.dumps({"dim": c.dim, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "n_layers": c.n_layers,
                                                    "norm_eps": c.norm_eps, "multiple_of": 256, "vocab_size": -1}))


def good_files(base: Path) -> dict[str, Format]:
    """Every format that is read from strangers, with its good files; `base` then holds run, judge, hf and meta to start from."""
    tokenizer = Tokenizer.train([FOX, "A hen likes the fox. It said: yes, no."] * 30, str(base / "tokenizer.model"), SHAPE.vocab_size, TOY_SYMBOLS)
    model = Transformer(SHAPE)
    save_model(model, str(base / "run"), tokenizer.path)
    save_model(RewardModel(SHAPE), str(base / "judge"), tokenizer.path)
    for sums in base.glob("*/step-*/checksums.json"):
        sums.unlink()  # they would notice nearly all, and the readers behind them would not be tried
    save_hf(model, base / "hf", max_bytes=100_000)
    write_meta(model, base / "meta")
    for folder in ("hf", "meta"):
        shutil.copy(tokenizer.path, base / folder)

    def say(model: Transformer) -> None:
        generate(model, [tokenizer.encode(FOX, bos=True, eos=False)], 2)

    def run(folder: Path) -> None:
        parent_of(folder), fingerprint(folder), world_of(folder)
        say(load_model(folder)[0]), say(load_weights(*read_any(folder)[:2]))

    def shard(folder: Path) -> None:
        rows = Mixture([(folder / "fox.u16", 1)], 8, 0, 2, SHAPE.vocab_size, folder)
        rows.batch(range(rows.n_rows), rows.n_rows)
        longest_matches(index_samples([np.arange(20)]), [folder / "fox.u16"])

    def constraints(file: Path) -> None:
        found = read_constraints(str(file))
        [draw_instruction(found, Random(i)) for i in range(20)]

    def messages(file: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            if tokenizer_main(["show", "--dialog", str(file), "--model", tokenizer.path]):
                raise InputError(said.getvalue().removesuffix("\n"))

    def samples(file: Path) -> None:
        index_samples(read_samples(Contamination(test=str(file), tokenizer=tokenizer.path))[0])

    readers = {
        "documents": lambda file: [tokenizer.encode(text, True, True) for text in read_documents(str(file))],
        "dialogs": lambda file: [encoded_turns(tokenizer, row) for _, row in read_dialogs(str(file))],
        "pairs": lambda file: encode_pairs(read_pairs((str(file),))[0], tokenizer, 256, "small"),
        "prompts": lambda file: [tokenizer.encode_dialog(prompt_messages(row)) for row in sum(held_out(file_prompts(str(file))), [])],
        "constraints": constraints, "samples": samples,
        "messages": messages,
    }
    readers |= {name: lambda file, name=name: with_examples(name, read_items(name, str(file)), [], 0) for name in TASKS}
    small = ["--device", "cpu", "--threads", "1", "--preset", "toy-s", "--steps", "1", "--seq_len", "32", "--batch_size", "2", "--sample_tokens", "0"]
    commands = {
        "documents": ["pretrain.py", "--data", "{}", "--vocab_size", "320", *small],
        "dialogs": ["sft.py", "--init", "{base}/run", "--data", "{}", *small],
        "pairs": ["reward.py", "--init", "{base}/run", "--data", "{}", *small[:-2]],
        "prompts": ["eval.py", "judge", "--a", "{base}/run", "--b", "{base}/hf", "--prompts", "{}", "--rewards", "{base}/judge", "--max_new_tokens", "2"],
        "constraints": ["gatt.py", "--init", "{base}/run", "--reward", "{base}/judge", "--dialogs", "4", "--constraints", "{}", "--max_new_tokens", "2", *small],
        "samples": ["eval.py", "contamination", "--train", "{base}/fox.u16", "--test", "{}", "--tokenizer", "{base}/tokenizer.model"],
        "tasks": ["eval.py", "tasks", "{base}/run", "--shots", "0", "--device", "cpu", "--threads", "1", "--task", "{name}={}"],
    }
    formats = {}
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        whole = json.dumps(rows, indent=1).encode()
        ways = {"json": whole} if name in ("constraints", "messages") else {"jsonl": lines, "json": whole, "jsonl.gz": gzip.compress(lines)}
        for ending, content in ways.items():
            if (name, ending) != ("documents", "json"):
                formats[f"{name}.{ending}"] = Format({f"rows.{ending}": content}, readers[name], commands.get(name, commands["tasks"] if name in TASKS else None))
    formats["documents.txt"] = Format({"rows.txt": f"{FOX}\n\nA hen.\n".encode() * 40}, readers["documents"], commands["documents"])
    formats["texts.txt"] = Format({"rows.txt": f"{FOX}\n\nA hen.\n".encode() * 40}, lambda file: list(read_texts(str(file))))
    formats["texts.jsonl.gz"] = Format({"rows.jsonl.gz": gzip.compress(b'{"text": "The old fox."}\n' * 9)}, lambda file: list(read_texts(str(file))))
    formats["mmlu.csv"] = Format({"eggs_test.csv": b'"How many, fox?",1,2,3,4,C\nWhy?,a,b,c,d,A\n'}, readers["mmlu"])
    formats["truthfulqa.csv"] = Format({"t.csv": f'Question,Best Answer,Correct Answers,Incorrect Answers\n"{FOX}",a,a; b,"c; d"\n'.encode()}, readers["truthfulqa-mc1"])
    formats["labels.lst"] = Format({"rows.jsonl": b'{"goal": "fox", "sol1": "a", "sol2": "b"}\n' * 2, "rows-labels.lst": b"0\n1\n"}, lambda folder: read_items("piqa", str(folder / "rows.jsonl")))
    formats["tokenizer.model"] = Format({"tokenizer.model": Path(tokenizer.path).read_bytes()}, lambda file: Tokenizer(file).decode(Tokenizer(file).encode(FOX, True, True)))
    ids = [tokenizer.encode(text, bos=True, eos=True) for text in (FOX, "A hen.", FOX)]
    (base / "fox.u16").write_bytes(np.concatenate(ids).astype(np.uint16).tobytes())
    formats["shards"] = Format({"fox.u16": (base / "fox.u16").read_bytes(), "fox.ends": np.cumsum([len(one) for one in ids]).astype(np.uint64).tobytes()}, shard)
    speak = ["model.py", "generate", "{}", "--max_new_tokens", "2"]
    for name, read in (("run", run), ("hf", lambda folder: say(load_hf(folder))), ("meta", lambda folder: say(load_meta(folder)))):
        files = {str(path.relative_to(base / name)): path.read_bytes() for path in sorted((base / name).rglob("*")) if path.is_file() and path.name != ".lock"}
        formats[name] = Format(files, read, speak)
    return formats


# ---------------------------------------------------------------------------------------------- damage

STRANGE = (None, True, False, 0, -1, 7, 1.5, -0.0, 1e308, 10**30, 2**31, 2**63, "", "x", "7", [], {}, [[]], [None], {"x": 1}, "\ud83d", "[INST]", "\x00", "ä" * 3000)
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '"', "01", "'x'", "\x00")


def change_json(content: bytes, rng: Random) -> bytes:
    """JSON with one thing changed in it: dropped, doubled, or of another type; a line of a file if it has several."""
    text = content.decode()
    lines = text.splitlines(keepends=True)
    single = not text.startswith(("[\n", "{\n")) and len(lines) > 1
    at = rng.randrange(len(lines)) if single else 0
    value = json.loads(lines[at] if single else text)
    places = []  # (container, key) of everything in it

    def visit(node: object) -> None:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            visit(child)

    visit(value)
    node, key = rng.choice(places) if places else ([value], 0)
    how = rng.choice(["drop", "strange", "strange", "strange", "raw", "double", "swap", "rename"])
    mark = "\0mark\0"
    if how == "drop":
        del node[key]
    elif how == "swap" and len(places) > 1:
        other, name = rng.choice(places)
        node[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(node[key]))
    elif how == "rename" and isinstance(node, dict):
        node[rng.choice(["text", "Prompt", "x", ""])] = node.pop(key)
    elif how == "double" and isinstance(node, dict):
        node[mark + str(key)] = node[key]
    elif how == "raw":
        node[key] = mark
    else:
        node[key] = rng.choice(STRANGE)
    new = json.dumps(value).replace(json.dumps(mark)[:-1], '"') if how == "double" else json.dumps(value)
    new = new.replace(json.dumps(mark), rng.choice(RAW))
    lines[at : at + 1 if single else None] = [new + "\n"]
    return "".join(lines).encode("utf-8", "surrogatepass")


def change_bytes(content: bytes, rng: Random) -> bytes:
    """Bytes with a few of them changed, cut off, put in, doubled or swapped."""
    found, n = bytearray(content), len(content)
    how = rng.choice(["bits", "bits", "bits", "cut", "head", "insert", "double", "swap", "zero", "empty"])
    a, b = sorted(rng.randrange(n + 1) for _ in range(2)) if n else (0, 0)
    if how == "bits" and n:
        head = rng.choice([n, min(n, 200), min(n, 2000)])  # the beginning says what the rest is
        for _ in range(rng.choice([1, 1, 2, 8])):
            found[rng.randrange(head)] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del found[a:]
    elif how == "head":
        del found[:a]
    elif how == "insert":
        found[a:a] = rng.choice([b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b"{", b"]", b"\xed\xa0\x80", b"\x1f\x8b", rng.randbytes(9)])
    elif how == "double":
        found[b:b] = found[a:b][:5000]
    elif how == "swap":
        found = found[b:] + found[a:b] + found[:a]
    elif how == "zero":
        found[a:b] = bytes(b - a)
    else:
        found.clear()
    return bytes(found)


def damaged(content: bytes, name: str, rng: Random) -> bytes:
    """A file after one change; what is compressed may be changed inside."""
    if name.endswith(".gz") and rng.random() < 0.5:
        return gzip.compress(damaged(gzip.decompress(content), name.removesuffix(".gz"), rng))
    if name.endswith((".json", ".jsonl")) and rng.random() < 0.7:
        return change_json(content, rng)
    return change_bytes(content, rng)


# ---------------------------------------------------------------------------------------------- trying


class TooLong(BaseException):
    """A reader took longer than anybody waits."""


def alarm(*_) -> None:
    """What SIGALRM does."""
    raise TooLong


def prepare(form: Format, folder: Path, rng: Random | None = None) -> tuple[Path, str]:
    """Write a format's files, with `rng` one of them damaged; the path to read, and the name of that file."""
    shutil.rmtree(folder, ignore_errors=True)
    victim = (rng or Random(0)).choice(sorted(form.files))
    for name, content in form.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(damaged(content, name, rng) if rng and name == victim else content)
    return (folder if len(form.files) > 1 else folder / victim), victim


def attempt(form: Format, path: Path) -> str:
    """Read what may be damaged: "read", "refused", or what went wrong."""
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            form.read(path)
        return "read"
    except CLEAN as error:
        return "refused" if str(error).strip() and "\n" not in str(error) else f"more than one line: {error!r}"
    except TooLong:
        return "took longer than 10 s"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def attempt_command(form: Format, name: str, path: Path, base: Path) -> str:
    """The same by a command line, in a process of its own."""
    words = [word.replace("{}", str(path)).replace("{base}", str(base)).replace("{name}", name.split(".")[0]) for word in form.command]
    out = [] if words[0] == "model.py" else ["--out", str(base / "out")]
    done = subprocess.run([sys.executable, str(HERE.parent / words[0]), *words[1:], *out], capture_output=True, text=True, errors="replace",
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    shutil.rmtree(base / "out", ignore_errors=True)
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith(f"{words[0]}: ")]
    if "Traceback" in done.stderr or done.returncode not in (0, 2) or len(said) != (done.returncode == 2):
        return f"exit code {done.returncode}: {done.stderr[-1500:]}"
    return "refused" if done.returncode else "read"


def fuzz(n: int, seed: int = 0, first: int = 0, only: str = "", cli: bool = False) -> tuple[Counter, list[str]]:
    """Try n damaged files; how many were read, refused or neither, and a line for each of the last."""
    counts, failures = Counter(), []
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    formats = {name: form for name, form in good_files(base).items() if only in name and (form.command or not cli)}
    for name, form in formats.items():
        assert attempt(form, prepare(form, base / "file")[0]) == "read", f"the good {name} is not read"
    for number in range(first, first + n):
        rng = Random(f"{seed}/{number}")
        name = rng.choice(sorted(formats))
        path, victim = prepare(formats[name], base / "file", rng)
        outcome = attempt_command(formats[name], name, path, base) if cli else attempt(formats[name], path)
        counts[outcome if outcome in ("read", "refused") else "neither"] += 1
        if outcome not in ("read", "refused"):
            failures.append(f"--seed {seed} --first {number}: {name}, {victim}: {outcome}")
            print(failures[-1], flush=True)
    shutil.rmtree(base)
    return counts, failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10000, help="files that are read in this process")
    parser.add_argument("--cli", type=int, default=0, help="files that go through the command lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--only", default="", help="formats whose name holds this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for n, cli in ((args.n, False), (args.cli, True)):
        if n:
            counts, failures = fuzz(n, args.seed, args.first, args.only, cli)
            print(f"{n} files{' by the command lines' * cli}: {counts['read']} read, {counts['refused']} refused, {counts['neither']} neither")
            failed |= bool(failures)
    sys.exit(failed)
