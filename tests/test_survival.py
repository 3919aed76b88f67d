"""What a run survives: flipped bits, a full or read-only disk, a second run in its folder, a dead rank, odd sizes and numbers."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import pretrain
from model import PRESETS, Transformer, generate, with_vocab
from pretrain import InputError, checkpoints, load_model

HERE = Path(__file__).resolve().parent.parent
TEXT = "\n\n".join(f"The {a} {b} has {i} eggs. It likes the {b}. " * 4 for i in range(30) for a, b in [("old", "fox"), ("red", "hen")])
TINY = ["--preset", "toy-s", "--seq_len", "16", "--batch_size", "4", "--device", "cpu", "--threads", "1", "--vocab_size", "320",
        "--sample_tokens", "0", "--save_every", "3", "--eval_every", "100"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "farm.txt"
    path.write_text(TEXT)
    return path


def run(*flags, under=(sys.executable,)):
    """pretrain.py as a user calls it."""
    return subprocess.run([*under, str(HERE / "pretrain.py"), *TINY, *map(str, flags)], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if line["step"] and line["loss"] is not None])


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_and_the_one_before_it_is_whole(tmp_path, text):
    assert run("--data", text, "--out", tmp_path / "out", "--steps", "6").returncode == 0
    before, newest = checkpoints(tmp_path / "out")
    chance, files = random.Random(0), [path for path in newest.iterdir() if path.name != "checksums.json"]
    for _ in range(40):
        path = chance.choice(files)
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(InputError, match=newest.name):
            load_model(tmp_path / "out")
        path.write_bytes(whole)
    load_model(tmp_path / "out")
    files[0].write_bytes(b"")
    result = run("--data", text, "--out", tmp_path / "out", "--steps", "9")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "remove the folder to go on from the one before" in result.stderr
    shutil.rmtree(newest)
    result = run("--data", text, "--out", tmp_path / "out", "--steps", "9")
    assert result.returncode == 0 and f"going on at step {int(before.name[5:])}" in result.stdout


@contextmanager
def small_disk(folder, megabytes):
    """A disk of so many megabytes."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_a_run_with_a_sentence_and_what_was_saved_serves_when_there_is_room(tmp_path, text):
    disk = tmp_path / "disk"
    flags = ["--data", text, "--out", disk / "out", "--steps", "12"]
    with small_disk(disk, 5):
        result = run(*flags)
        assert result.returncode == 2 and "MB are free there" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
        saved = checkpoints(disk / "out")
        assert saved and not list(disk.rglob("*.part"))
        load_model(disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        result = run(*flags)
        assert result.returncode == 2 and "can't be written to" in result.stderr and result.stderr.count("\n") == 1
        subprocess.run(["mount", "-o", "remount,rw,size=20m", disk], check=True)
        result = run(*flags)
        assert result.returncode == 0 and f"going on at step {int(saved[-1].name[5:])}" in result.stdout
        assert run(*flags[:2], "--out", tmp_path / "whole", "--steps", "12").returncode == 0
        assert np.array_equal(losses(disk / "out"), losses(tmp_path / "whole"))


def start(*flags, under=(sys.executable,)):
    return subprocess.Popen([*under, str(HERE / "pretrain.py"), *TINY, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(step, out, process):
    """Until a run has logged that step."""
    until = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < step:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_run_in_the_folder_refuses_and_a_stopped_one_saves_and_says_so(tmp_path, text, number, code):
    flags = ["--data", f"{text}:99", "--out", tmp_path / "out", "--save_every", "1000", "--steps", "1000"]
    first = start(*flags)
    wait_for(5, tmp_path / "out", first)
    second = run(*flags)
    assert second.returncode == 2 and "another process is writing to it" in second.stderr
    first.send_signal(number)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == code and "The same command goes on from there" in said
    assert int(checkpoints(tmp_path / "out")[-1].name[5:]) >= 5  # not only at --save_every


def test_a_run_over_two_ranks_of_which_one_is_killed_loses_one_save_interval_at_most(tmp_path, text):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    flags = ["--data", f"{text}:9", "--save_every", "15", "--steps", "45"]
    assert run(*flags, "--out", tmp_path / "whole").returncode == 0
    agent = start(*flags, "--out", tmp_path / "out", under=torchrun)
    wait_for(22, tmp_path / "out", agent)
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(found[-1]), signal.SIGKILL)
    said, errors = agent.communicate(timeout=300)
    assert agent.returncode == 0, errors[-2000:]
    on = int(said.rsplit("going on at step ", 1)[1].split()[0].rstrip(",.;"))
    assert on >= 15
    assert np.abs(losses(tmp_path / "out") - losses(tmp_path / "whole")).max() < 1e-4


@pytest.mark.parametrize("flags", [["--seq_len", "1", "--steps", "4"], ["--vocab_size", "300", "--steps", "4"]], ids=" ".join)
def test_odd_sizes_train(tmp_path, text, flags):
    result = run("--data", text, "--out", tmp_path / "out", *flags)
    assert result.returncode == 0, result.stderr[-2000:]
    assert np.isfinite(losses(tmp_path / "out")).all()


def test_documents_of_one_token_and_ids_beyond_two_bytes_are_read_as_they_are(tmp_path):
    ids = [np.array([1, id, 2], np.uint32) for id in (65_536, 7, 70_000)]
    np.concatenate(ids).tofile(tmp_path / "x-00000.u32")
    np.cumsum([len(d) for d in ids]).astype(np.uint64).tofile(tmp_path / "x-00000.ends")
    mixture = pretrain.Mixture([(tmp_path / "x-00000.u32", 1)], 4, 0, 2, 70_001, tmp_path)
    seen = np.concatenate([mixture.row(r)[1:] for r in range(mixture.n_rows)])
    assert sorted(seen[seen >= 0].tolist()) == sorted(np.concatenate(ids).tolist())


def test_a_model_that_never_ends_is_cut_at_the_context(monkeypatch):
    model = Transformer(with_vocab(PRESETS["toy-s"], 50))
    model.config = pretrain.replace(model.config, max_seq_len=12)
    answers = generate(model, [[1, 2, 3], [4] * 11], 10**6, temperature=0, stop=(49,))
    assert [len(answer) for answer in answers] == [9, 1] and 49 not in sum(answers, [])
