"""Crash a tiny run of every stage at every file operation and at random moments; it must go on as if nothing had been.

    python tests/faults.py                        # all of it: minutes
    python tests/faults.py pretrain --only 31 32  # two operations of one stage
    python tests/faults.py soak --minutes 90      # two thirds of it training, then sampling: memory, speed and open files over time

A child process runs the stage with an audit hook that counts the operations on files below its --out (open for
writing, rename, remove, mkdir, rmdir) and kills the process, as a power cut would, just before the nth. Then the same
command runs again, undisturbed. All weights, and every line of metrics but its times, must equal those of a run
that was never killed; so must the comparisons of `collect`, and what evaluations write. A stage that is added to the project adds a line to STAGES.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import eval as evaluation
import gatt
import pretrain
import reward
import rlhf
import sft
from model import Transformer

TEXT = "\n\n".join(f"The {a} {b} has {i} eggs. It likes the {b}. " * 4 for i in range(20) for a, b in [("old", "fox"), ("red", "hen")])
DIALOGS = [{"prompt": f"How many eggs has the {name}?", "response": f"It has {i} eggs."} for i in range(30) for name in ("fox", "hen")]
PAIRS = [{"prompt": f"Eggs of the fox, day {i}?", "chosen": f"It has {i} eggs.", "rejected": "None."} for i in range(80)]
SMALL = ["--device", "cpu", "--threads", "1", "--out", "{out}", "--batch_size", "4"]
TRAIN = [*SMALL, "--preset", "toy-s", "--micro_batch", "4", "--steps", "9", "--save_every", "3", "--eval_every", "3"]
JUDGES = ["--helpfulness", "{base}/judge/out", "--harmlessness", "{base}/judge/out"]
ASK = ["--device", "cpu", "--threads", "1", "--out", "{out}", "--max_new_tokens", "8"]
STAGES = {  # name: main, settings, flags, kind of model; {base} holds small data files, and the runs of MADE that the flags name
    "pretrain": (pretrain.main, pretrain.Settings,
                 [*TRAIN, "--data", "{base}/farm.txt", "--seq_len", "16", "--vocab_size", "340", "--sample_tokens", "4"], Transformer),
    "sft": (sft.main, sft.Settings, [*TRAIN, "--init", "{base}/base/out", "--data", "{base}/chat.jsonl", "--seq_len", "64",
                                     "--epochs", "3", "--sample_tokens", "4"], Transformer),
    "collect": (reward.collect, reward.Collect,
                [*SMALL, "--a", "{base}/base/out", "--b", "{base}/base/out", "--helpfulness_pairs", "6", "--safety_pairs", "6",
                 "--test_pairs", "3", "--max_new_tokens", "8"], None),
    "reward": (reward.main, reward.Settings, [*TRAIN, "--init", "{base}/base/out", "--data", "{base}/pairs.jsonl",
                                              "--rest", "{base}/pairs.jsonl", "--seq_len", "64"], reward.RewardModel),
    "rlhf": (rlhf.main, rlhf.Settings,
             [*TRAIN, "--init", "{base}/base/out", "--policy", "{base}/base/out", "--helpfulness", "{base}/judge/out",
              "--harmlessness", "{base}/judge/out", "--threshold", "0.15", "--n_prompts", "8", "--n_samples", "8",
              "--sample_batch", "4", "--temperature", "1", "--max_new_tokens", "40", "--seq_len", "128", "--sample_tokens", "4",
              "--data", "pool:4", "{base}/chat.jsonl"], Transformer),
    "ppo": (rlhf.ppo, rlhf.Ppo,
            [*TRAIN, "--init", "{base}/base/out", "--helpfulness", "{base}/judge/out", "--harmlessness", "{base}/judge/out",
             "--threshold", "0.2", "--mini_batch", "2", "--critic_warmup", "1", "--lr", "1e-3", "--adaptive_kl",
             "--max_new_tokens", "6", "--seq_len", "40", "--eval_prompts", "4", "--patience", "9", "--ptx_coef", "0.1",
             "--ptx_data", "{base}/farm.txt"], Transformer),
    "distill": (rlhf.distill, rlhf.Distill,
                [*TRAIN, "--init", "{base}/base/out", "--harmlessness", "{base}/judge/out", "--no-gate", "--n_prompts", "12",
                 "--sample_batch", "6", "--temperature", "1", "--max_new_tokens", "60", "--seq_len", "128", "--sample_tokens", "4",
                 "--data", "pool:4", "{base}/chat.jsonl"], Transformer),
    "tasks": (evaluation.tasks, evaluation.Tasks, ["{base}/base/out", "--task", "toy", "--limit", "12", *SMALL], None),
    "judge": (evaluation.judge, evaluation.Judge, [*SMALL, "--a", "{base}/base/out", "--b", "{base}/base/out", "--judge", "truth",
                                                   "--n_prompts", "6", "--temperature", "1", "--max_new_tokens", "8"],
              None),
    "reward-eval": (reward.evaluate, reward.Eval, ["{base}/judge/out", "--helpfulness", "{base}/pairs.jsonl", "--safety",
                                                   "{base}/pairs.jsonl", "--device", "cpu", "--out", "{out}"], None),
    "curves": (rlhf.curves, rlhf.Curves, ["{base}/base/out", *JUDGES, *ASK, "--n_prompts", "6", "--n_samples", "4", "--sample_batch", "3",
                                          "--temperatures", "0.7", "1.1"], None),
    "versions": (evaluation.versions, evaluation.Versions, ["{base}/base/out", "--against", "{base}/base/out", *JUDGES, *ASK,
                                                            "--n_prompts", "8"], None),
    "safety": (evaluation.safety, evaluation.Safety, ["{base}/base/out", "--rewards", "{base}/judge/out", "{base}/judge/out", *ASK], None),
    "diversity": (evaluation.diversity, evaluation.Diversity, ["{base}/base/out", *ASK, "--n_prompts", "3", "--samples", "4",
                                                               "--temperatures", "0.5", "1.1"], None),
    "contamination": (evaluation.contamination, evaluation.Contamination,
                      ["--train", "{base}/base/out/data/*/*-[0-9]*.u16", "--test", "{base}/samples.jsonl", "--tokenizer",
                       "{base}/base/out/tokenizer.model", "--out", "{out}"], None),
    "gatt-test": (gatt.test, gatt.Test, ["{base}/base/out", "--dialogs", "3", "--turns", "1", "2", "--unseen_turns", "1",
                                         "--max_new_tokens", "8", "--out", "{out}"], None),
    "gatt": (gatt.main, gatt.Settings, [*TRAIN, "--init", "{base}/base/out", "--data", "{base}/chat.jsonl", "--seq_len", "256",
                                        "--reward", "{base}/judge/out", "--samples", "2", "--max_new_tokens", "64", "--sample_batch", "20",
                                        "--temperature", "1", "--replay", "0.3", "--sample_tokens", "4"], Transformer),
}
MADE = {"base": "pretrain", "judge": "reward"}  # what a stage starts from: folder and stage
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
CLOCKS = {"tokens_per_s", "seconds", "peak_gib", "mfu", "seconds/sampling", "seconds/scoring", "seconds/training"}


def run(stage: str, folder: Path, kill_before: int | None = None, kill_after_s: float | None = None,
        by: int = signal.SIGKILL) -> tuple[int, int]:
    """Run a stage in a child, that a signal may end; (its exit code or minus the signal that ended it, file operations that it did)."""
    reader, writer = os.pipe()
    pid = os.fork()  # torch is imported once; a child starts in milliseconds
    if pid == 0:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        parent, out, count = os.getpid(), str(folder / "out"), 0

        def hook(event, args):
            nonlocal count
            below = event in OPERATIONS and (str(args[0]).startswith(out) or event in {"os.remove", "os.rmdir"} and args[-1] != -1)
            if below and os.getpid() == parent:  # rmtree names files relative to an open folder
                if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                    return
                count += 1
                if count == kill_before:
                    os.kill(parent, signal.SIGKILL)

        sys.addaudithook(hook)
        main, settings, flags, _ = STAGES[stage]
        sys.argv = [f"{stage}.py"] + [flag.format(base=folder.parent, out=out) for flag in flags]
        code = 0
        try:
            pretrain.command_line(main, settings)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 1
        os.write(writer, str(count).encode())
        os._exit(code)
    os.close(writer)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, by)
    _, status = os.waitpid(pid, 0)
    count = int(os.read(reader, 20) or 0)
    os.close(reader)
    return os.waitstatus_to_exitcode(status), count


def outcome(stage: str, folder: Path) -> tuple[dict, list]:
    """What must not depend on crashes: the newest weights; metrics without clocks, comparisons and samples."""
    out, kind = folder / "out", STAGES[stage][3]
    weights = pretrain.load_model(out, kind)[0].state_dict() if kind else {}
    lines = [json.loads(line) for path in sorted(out.rglob("*.jsonl")) for line in path.read_text().splitlines()]
    lines += [json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.name != "config.json"]
    lines = [{k: v for k, v in line.items() if k not in CLOCKS} if isinstance(line, dict) else line for line in lines]
    return weights, lines + [path.read_text() for path in out.glob("samples.txt")]


def check(stage: str, only: list[int] | None = None, random_kills: int = 5) -> int:
    """Crash a stage at each operation (or `only` some) and at random moments; returns how many crashes were survived."""
    base = Path(tempfile.mkdtemp(prefix="faults-"))
    (base / "farm.txt").write_text(TEXT)
    for name, rows in (("chat", DIALOGS), ("pairs", PAIRS)):
        (base / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (base / "samples.jsonl").write_text("\n".join(json.dumps({"prompt": text, "score": i}) for i, text in enumerate(TEXT.split("\n\n"))))
    (base / "whole").mkdir()
    for name, maker in MADE.items():
        if stage != "pretrain" and (name == "base" or any(f"{{base}}/{name}/" in flag for flag in STAGES[stage][2])):
            (base / name).mkdir()
            assert run(maker, base / name)[0] == 0
    began = time.perf_counter()
    code, operations = run(stage, base / "whole")
    seconds = time.perf_counter() - began
    assert code == 0, (base / "whole" / "log.txt").read_text()[-2000:]
    weights, lines = outcome(stage, base / "whole")
    chance = random.Random(0)
    crashes = [{"kill_before": n} for n in only or range(1, operations + 1)]
    crashes += [{"kill_after_s": seconds * chance.uniform(0.2, 1), "by": by}  # a power cut, a scheduler, Ctrl-C
                for _, by in zip(range(random_kills), cycle((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))]
    for crash in crashes:
        folder = base / "-".join(f"{k}-{float(v):.3g}" for k, v in crash.items())
        folder.mkdir()
        killed, _ = run(stage, folder, **crash)
        assert killed == -signal.SIGKILL or "kill_after_s" in crash, f"{crash}: the run ended with {killed} before its crash"
        code, _ = run(stage, folder)
        assert code == 0, f"{stage}, {crash}: did not go on: {(folder / 'log.txt').read_text()[-2000:]}"
        again, again_lines = outcome(stage, folder)
        assert all(torch.equal(weights[name], again[name]) for name in weights), f"{stage}, {crash}: other weights"
        assert lines == again_lines, f"{stage}, {crash}: other metrics, samples or comparisons"
        left = [path.name for path in (folder / "out").rglob("*.part")]
        assert not left, f"{stage}, {crash}: {left} left behind"
        print(f"{stage}: survived {crash} of {operations} operations", flush=True)
        shutil.rmtree(folder)
    shutil.rmtree(base)
    return len(crashes)


SAMPLING = """
import sys, time
sys.path.insert(0, sys.argv[1])
from model import PRESETS, Transformer, generate
model, prompts = Transformer(PRESETS["toy-s"]), [[1, i % 200 + 5] for i in range(64)]
for turn in range(10**9):
    generate(model, prompts, 64, 0.8, 0.9, seed=turn)
    print(turn, flush=True)
"""


def slope(hours: list[float], values: list[float]) -> tuple[float, float]:
    """The least-squares slope of values an hour, and half of its 95 % interval, as if they were independent."""
    x = torch.tensor(hours, dtype=torch.double) - sum(hours) / len(hours)
    y = torch.tensor(values, dtype=torch.double) - sum(values) / len(values)
    b = (x @ y / (x @ x)).item()
    return b, 1.96 * ((y - b * x).square().sum() / (len(values) - 2) / (x @ x)).sqrt().item()


def watch(name: str, command: list[str], said: Path, counted: Path, seconds: float) -> None:
    """Run a command so long; print how its memory, its speed and its open files change, after a tenth of the time to warm up.

    counted: a file to which it adds a line for each thing that is done.
    """
    process = subprocess.Popen(command, stdout=open(said, "w"), stderr=subprocess.DEVNULL)
    began, seen = time.time(), []
    while time.time() - began < seconds and process.poll() is None:
        time.sleep(seconds / 200)
        memory = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        seen.append((time.time() - began, memory, len(os.listdir(f"/proc/{process.pid}/fd")),
                     counted.read_bytes().count(b"\n") if counted.exists() else 0))
    assert process.poll() is None, f"{name} ended by itself"
    process.send_signal(signal.SIGTERM)
    process.wait()
    seen = seen[len(seen) // 10 :]
    hours, memory, files, done = zip(*((t / 3600, *rest) for t, *rest in seen))
    rate = [(b - a) / (u - t) / 3600 for t, u, a, b in zip(hours, hours[5:], done, done[5:])]
    mean = sum(rate) / len(rate)
    b, half = slope(hours, memory)
    v, wide = slope(hours[5:], [100 * r / mean for r in rate])
    print(f"{name}, {seconds / 60:.0f} minutes: {memory[-1]:.0f} MB, {b:+.1f} ± {half:.1f} MB an hour; {mean:.2f} a second, "
          f"{v:+.1f} ± {wide:.1f} % an hour; {min(files)} to {max(files)} open files", flush=True)


def soak(minutes: float) -> None:
    """Train, then sample, for long: nothing may grow."""
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    (base / "farm.txt").write_text("\n\n".join([TEXT] * 40))
    here = Path(__file__).resolve().parent.parent
    said = base / "said.txt"
    watch("training", [sys.executable, str(here / "pretrain.py"), "--preset", "toy-s", "--device", "cpu", "--threads", "1",
                       "--data", f"{base}/farm.txt:999", "--vocab_size", "340", "--seq_len", "64", "--out", f"{base}/out",
                       "--save_every", "200", "--eval_every", "500"], said, base / "out" / "metrics.jsonl", minutes * 40)
    watch("sampling", [sys.executable, "-c", SAMPLING, str(here)], said, said, minutes * 20)
    shutil.rmtree(base)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=list(STAGES), help="stages to crash, or soak")
    parser.add_argument("--only", nargs="+", type=int, help="these file operations only")
    parser.add_argument("--random_kills", type=int, default=5, help="kills at random moments")
    parser.add_argument("--minutes", type=float, default=90, help="length of the soak")
    args = parser.parse_args()
    if args.stages == ["soak"]:
        soak(args.minutes)
        sys.exit()
    for stage in args.stages:
        print(f"{stage}: {check(stage, args.only, args.random_kills)} crashes survived, the outcome bit-identical")
