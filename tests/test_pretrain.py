"""The data, the optimizer, the loop, checkpoints and the command line of pretraining."""
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pretrain
from model import IGNORE, PRESETS, Transformer, generate, with_vocab
from pretrain import (InputError, Mixture, Parent, Ranks, Settings, adamw, build, checkpoints, cosine_schedule, flops_per_token,
                      gathered, interval, lm_loss, load_checkpoint, load_model, optimizer_step, parse, permute, perplexity,
                      read_documents, save_checkpoint, text_sources, train)

HERE = Path(__file__).resolve().parent.parent
TEXT = "\n\n".join(f"The {a} {b} has {i} eggs. It likes the {b}. " * 4 for i in range(30) for a, b in [("old", "fox"), ("red", "hen")])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    settings = parse(Settings, ["--out", str(tmp_path_factory.mktemp("none")), "--device", "cpu", "--threads", "1"])
    yield pretrain.start(settings)
    dist.destroy_process_group()
    pretrain.cpu_group.cache_clear()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "farm.txt"
    path.write_text(TEXT)
    return path


def settings_for(out, *flags):
    return parse(Settings, ["--out", str(out), "--preset", "toy-s", "--seq_len", "16", "--batch_size", "4", "--device", "cpu",
                            "--threads", "1", "--vocab_size", "320", "--sample_tokens", "0", *flags])


def launch(script, *flags, n=1):
    """Run a script of ours as a user would: with python, or over n ranks with torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    return subprocess.run([sys.executable, *torchrun, str(HERE / script), *map(str, flags)], capture_output=True, text=True,
                          timeout=1500, env=os.environ | {"OMP_NUM_THREADS": "1"})


def command(*flags, n=1):
    return launch("pretrain.py", *flags, n=n)


# ---- data


def write_shard(path, documents):
    np.concatenate([np.array(d, np.uint16) for d in documents]).tofile(f"{path}.u16")
    np.cumsum([len(d) for d in documents]).astype(np.uint64).tofile(f"{path}.ends")
    return Path(f"{path}.u16")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 4097])
def test_permute_is_a_permutation_and_its_seed_matters(n):
    found = permute(np.arange(n), n, seed=7)
    assert sorted(found.tolist()) == list(range(n))
    if n > 10:
        assert found.tolist() != list(range(n)) and found.tolist() != permute(np.arange(n), n, seed=8).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_token_is_a_target_exactly_as_often_as_its_weight_says(tmp_path, world_size):
    rng = np.random.default_rng(0)
    token = iter(range(10, 60000))  # every token is its own, so that counting is easy
    shards = [[[next(token) for _ in range(rng.integers(1, 12))] for _ in range(n)] for n in (17, 40, 10)]
    weights = [3, 1, 0.5]
    parts = [(write_shard(tmp_path / f"s{i}", shard), w) for i, (shard, w) in enumerate(zip(shards, weights))]
    mixture = Mixture(parts, seq_len=7, seed=1, eos_id=2, vocab_size=60000, folder=tmp_path)
    seen = Counter()
    steps = math.ceil(mixture.n_rows / 5)
    for step in range(steps):
        for rank in range(world_size):
            batches = mixture.batch_at(step, 5, 2, Ranks(rank, world_size, None, None, 1))
            assert len(batches) == math.ceil(math.ceil(5 / world_size) / 2)  # equally many on all ranks, or they would hang
            for inputs, targets in batches:
                assert inputs.shape == targets.shape and inputs.shape[1] == 7 and inputs.min() >= 0
                seen.update(targets[targets != IGNORE].tolist())
    for shard, weight in zip(shards, weights):
        counts = [{seen[t] for t in document} for document in shard]
        assert all(len(c) == 1 for c in counts)  # a document is read whole
        reads = Counter(min(c) for c in counts)
        assert reads == ({weight: len(shard)} if weight >= 1 else {1: len(shard) // 2, 0: len(shard) // 2})
    assert sum(seen.values()) == mixture.n_tokens


def test_the_stream_is_whole_documents_end_to_end_behind_one_eos(tmp_path):
    shard = [[100 * i + j for j in range(i % 5 + 1)] for i in range(1, 30)]
    mixture = Mixture([(write_shard(tmp_path / "s", shard), 2)], 6, 0, 2, 60000, tmp_path)
    rows = [mixture.row(r) for r in range(mixture.n_rows)]
    assert all(a[-1] == b[0] for a, b in zip(rows, rows[1:]))  # rows overlap by one token
    stream = [int(rows[0][0])] + [int(t) for row in rows for t in row[1:] if t != IGNORE]
    assert stream[0] == 2
    documents, at = [], 1
    while at < len(stream):
        document = shard[stream[at] // 100 - 1]
        assert stream[at : at + len(document)] == document
        documents.append(document[0])
        at += len(document)
    assert Counter(documents) == {d[0]: 2 for d in shard} and documents != sorted(documents)


def test_documents_of_all_sources_are_shuffled_together(tmp_path):
    parts = [(write_shard(tmp_path / f"s{i}", [[i + 1] * 4] * 500), 1) for i in range(2)]
    mixture = Mixture(parts, 4, 0, 0, 100, tmp_path)
    sequence = [int(mixture.row(r)[1]) for r in range(mixture.n_rows)]
    changes = sum(a != b for a, b in zip(sequence, sequence[1:]))
    assert 430 < changes < 570  # 500 expected of a fair shuffle, four standard deviations are 63


def test_text_files_are_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i}\n" + "\n" * (i % 7 == 0) for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "a.txt.gz", "wt") as f:
        f.write(text)
    pages = list(read_documents(str(tmp_path / "a.txt")))
    assert "".join(pages) == text and len(pages) > 5 and all(page.endswith("\n\n") for page in pages[:-1])
    assert pages == list(read_documents(str(tmp_path / "a.txt.gz")))


def test_jsonl_documents_are_the_text_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": "three"}\n')
    assert list(read_documents(str(tmp_path / "a.jsonl"))) == ["one\ntwo", "three"]


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', ["line 2", '"text"']), ("a.jsonl", b'{"text": 3}\n', ["line 1"]),
    ("a.jsonl", b"[1]\n", ["line 1"]), ("a.jsonl", b'{"text": "\\ud83d"}\n', ["line 1"]), ("a.txt", b"fine\n\xff\xfe\n", ["line 2", "UTF-8"]),
    ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], ["can't be read"]), ("a.txt.gz", b"not gzip", ["can't be read"])])
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_documents(str(path)))
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words)


def test_a_source_is_name_glob_and_epochs(text_file):
    found = text_sources(parse(Settings, ["--data", "toy", f"{text_file}:2", f"mine={text_file}", "toy-web=toy/web:.5"]))
    assert [(s.name, s.epochs) for s in found] == [("encyclopedia", 3), ("web", 0.4545), ("stories", 1), ("numbers", 1),
                                                   ("farm", 2), ("mine", 1), ("toy-web", 0.5)]


@pytest.mark.parametrize("spec", ["nowhere/*.txt", "toy/atlas", "a/b=docs", "docs:0"])
def test_a_source_that_cannot_be_is_refused(spec):
    with pytest.raises(InputError):
        text_sources(parse(Settings, ["--data", spec]))


# ---- optimizer and schedule


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_a_tenth():
    found = [cosine_schedule(step, 1000, 100) for step in range(1000)]
    assert found[0] == 0.01 and found[99] == 1.0 and found[999] == pytest.approx(0.1)
    assert found[100 + 899 // 2] == pytest.approx(0.55, abs=1e-3) and found[100:] == sorted(found[100:], reverse=True)


def test_a_step_over_micro_batches_equals_adamw_by_hand_on_the_mean_over_all_targets(ranks):
    config = with_vocab(PRESETS["toy-s"], 40)
    settings = settings_for("unused", "--seed", "3")
    model = build(config, settings, ranks)
    by_hand = Transformer(config, seed=3).double()
    optimizer = adamw(model, 0.1)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows in (3, 1, 2):
        tokens = torch.randint(40, (rows, 12), generator=generator)
        targets = torch.randint(40, (rows, 12), generator=generator)
        targets[:, rows * 2 :] = IGNORE  # unequal counts, so that a mean of means would differ
        batches.append((tokens, targets))
    moments = {name: (0.0, 0.0) for name, _ in by_hand.named_parameters()}
    for step in (1, 2, 3):
        figures = optimizer_step(model, optimizer, batches, lm_loss, lr=1e-2, grad_clip=0.5, ranks=ranks)
        by_hand.zero_grad()
        total, count = 0, 0
        for tokens, targets in batches:
            log_probs = torch.log_softmax(by_hand(tokens).double(), -1)
            total = total - log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORE].sum()
            count += (targets != IGNORE).sum()
        loss = total / count
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in by_hand.parameters())).item()
        assert figures["loss"] == pytest.approx(loss.item(), abs=1e-5) and figures["grad_norm"] == pytest.approx(norm, rel=1e-4)
        with torch.no_grad():
            for name, p in by_hand.named_parameters():  # §2.2: β 0.9 and 0.95, ε 1e-5, decay 0.1 but on gains
                g = p.grad * min(1, 0.5 / norm)
                m, v = moments[name]
                m, v = moments[name] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                p -= 1e-2 * ((0.1 * p if p.ndim > 1 else 0) + (m / (1 - 0.9**step)) / (torch.sqrt(v / (1 - 0.95**step)) + 1e-5))
    for (name, p), q in zip(by_hand.named_parameters(), model.parameters()):
        torch.testing.assert_close(q.full_tensor().double(), p, atol=2e-5, rtol=1e-4, msg=name)


def test_a_step_that_is_not_finite_changes_nothing(ranks):
    model = build(with_vocab(PRESETS["toy-s"], 40), settings_for("unused"), ranks)
    optimizer = adamw(model, 0.1)
    before = [p.full_tensor().clone() for p in model.parameters()]
    poisoned = lambda model, batch: (lm_loss(model, batch)[0] * math.nan, torch.tensor(1.0), {})  # noqa: E731
    batch = [(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))]
    assert not optimizer_step(model, optimizer, batch, poisoned, 1.0, 1.0, ranks)["finite"]
    assert all(torch.equal(a, b.full_tensor()) for a, b in zip(before, model.parameters()))
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_a_step_without_any_target_has_loss_zero(ranks):
    model = build(with_vocab(PRESETS["toy-s"], 40), settings_for("unused"), ranks)
    batch = [(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), IGNORE))]
    figures = optimizer_step(model, adamw(model, 0.0), batch, lm_loss, 1e-3, 1.0, ranks)
    assert figures["finite"] and figures["loss"] == 0 and figures["grad_norm"] == 0


def test_flops_per_token_are_six_per_matrix_weight_plus_attention():
    config = PRESETS["7b"]
    matrices = sum(p.numel() for name, p in with_meta(config).named_parameters() if p.ndim > 1 and "tok_embeddings" not in name)
    assert flops_per_token(config, 4096) == 6 * matrices + 12 * 32 * 4096 * 4096


def test_the_plan_gives_the_carbon_of_table_2_from_its_gpu_hours():
    for hours, watts, printed in pretrain.TABLE_2.values():
        assert pretrain.carbon(hours, watts) == pytest.approx(printed, abs=0.1)


def test_rank_0_of_2048_holds_the_planned_parameters_of_a_70b():
    code = ("import torch.distributed as dist, sys; sys.path.insert(0, '.')\n"
            "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
            "dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=2048)\n"
            "import torch; from torch.distributed.device_mesh import init_device_mesh; from torch.distributed.fsdp import fully_shard\n"
            "from model import PRESETS, Transformer; from pretrain import shard_size\n"
            "mesh = init_device_mesh('cpu', (2048,))\n"
            "with torch.device('meta'): model = Transformer(PRESETS['70b'])\n"
            "for block in model.layers: fully_shard(block, mesh=mesh)\n"
            "fully_shard(model, mesh=mesh)\n"
            "print(sum(p.to_local().numel() for p in model.parameters()), shard_size(PRESETS['70b'], 2048))")
    held, planned = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout.split()
    assert held == planned


@pytest.mark.parametrize("rows, checkpointing", [(8, False), (8, True), (2, False)])
def test_planned_memory_is_within_a_tenth_of_the_measured_peak(ranks, rows, checkpointing):
    config = with_vocab(PRESETS["toy-l"], 2048)
    settings = settings_for("unused", "--checkpointing" if checkpointing else "--no-checkpointing")
    model = build(config, settings, ranks)
    optimizer = adamw(model, 0.1)
    tokens = torch.randint(2048, (rows, 257))
    batches = [(tokens[:, :-1], tokens[:, 1:].contiguous())]
    optimizer_step(model, optimizer, batches, lm_loss, 1e-3, 1.0, ranks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer_step(model, optimizer, batches, lm_loss, 1e-3, 1.0, ranks)
    live = np.cumsum([e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"])
    held = 12 * sum(p.numel() for p in model.parameters())  # weights and AdamW, there before and after
    planned = pretrain.plan_memory(config, 1, rows, 256, checkpointing, width=4)["total"]
    assert planned == pytest.approx(held + live.max(), rel=0.1)


def with_meta(config):
    with torch.device("meta"):
        return Transformer(config)


# ---- evaluation


def test_the_interval_covers_the_true_mean_about_95_times_of_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        _, low, high = interval(rng.exponential(1.0, 80), seed=trial)
        hits += low < 1.0 < high
    assert 270 <= hits <= 298


def test_perplexity_equals_a_plain_loop_over_the_rows(tmp_path, ranks):
    shard = write_shard(tmp_path / "s", [[5, 6, 7, 8, 9][: i % 5 + 1] for i in range(20)])
    mixture = Mixture([(shard, 1)], 8, 0, 2, 40, tmp_path)
    model = build(with_vocab(PRESETS["toy-s"], 40), settings_for("unused"), ranks)
    losses, counts = perplexity(model, mixture, 3, ranks)
    plain = Transformer(with_vocab(PRESETS["toy-s"], 40))
    for r in range(mixture.n_rows):
        tokens = torch.tensor([t for t in mixture.row(r) if t != IGNORE])
        log_probs = torch.log_softmax(plain(tokens[None, :-1])[0], -1)
        expected = -sum(log_probs[i, t].item() for i, t in enumerate(tokens[1:]))
        assert losses[r] == pytest.approx(expected, abs=1e-3) and counts[r] == len(tokens) - 1


def test_gathered_weights_are_the_weights_and_training_goes_on_after(ranks):
    config = with_vocab(PRESETS["toy-s"], 40)
    model, plain = build(config, settings_for("unused"), ranks), Transformer(config)
    expected = generate(plain, [[1, 2], [3]], 8, 1.0, 1.0)
    with gathered(model) as whole:
        assert generate(whole, [[1, 2], [3]], 8, 1.0, 1.0) == expected
    assert generate(model, [[1, 2], [3]], 8, 1.0, 1.0) == expected  # sharded, too, if all ranks draw equally many
    model.reshard()
    batch = [(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long))]
    optimizer = adamw(model, 0.1)
    assert optimizer_step(model, optimizer, batch, lm_loss, 1e-3, 1.0, ranks)["finite"]


# ---- checkpoints and resume


def test_a_checkpoint_gives_back_weights_and_optimizer_and_keeps_the_newest(tmp_path, ranks):
    config = with_vocab(PRESETS["toy-s"], 40)
    model = build(config, settings_for(tmp_path), ranks)
    optimizer = adamw(model, 0.1)
    batch = [(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long))]
    for step in (1, 2, 3):
        optimizer_step(model, optimizer, batch, lm_loss, 1e-2, 1.0, ranks)
        save_checkpoint(tmp_path, step, {"model": model}, {"model": optimizer}, {"pool": [step]}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    other = build(config, settings_for(tmp_path, "--seed", "9"), ranks)
    other_optimizer = adamw(other, 0.1)
    assert load_checkpoint(checkpoints(tmp_path)[-1], {"model": other}, {"model": other_optimizer}) == {"step": 3, "pool": [3]}
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p.full_tensor(), q.full_tensor())
        for key in ("step", "exp_avg", "exp_avg_sq"):
            a, b = optimizer.state[p][key], other_optimizer.state[q][key]
            assert torch.equal(a.full_tensor(), b.full_tensor()) if key != "step" else a == b == 3


def test_a_checkpoint_of_another_shape_or_a_damaged_one_is_refused_with_a_sentence(tmp_path, ranks):
    settings = settings_for(tmp_path)
    model = build(with_vocab(PRESETS["toy-s"], 40), settings, ranks)
    save_checkpoint(tmp_path, 1, {"model": model}, {}, {})
    folder = checkpoints(tmp_path)[0]
    with pytest.raises(InputError, match="shape"):
        load_checkpoint(folder, {"model": build(with_vocab(PRESETS["toy-s"], 41), settings, ranks)}, {})
    with pytest.raises(InputError, match="another stage"):
        load_checkpoint(folder, {"critic": model}, {})
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(folder, {"model": model}, {})


def test_a_checkpoint_with_code_in_its_index_runs_nothing(tmp_path, ranks):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/pwned",)

    import pickle
    model = build(with_vocab(PRESETS["toy-s"], 40), settings_for(tmp_path), ranks)
    save_checkpoint(tmp_path, 1, {"model": model}, {}, {})
    (checkpoints(tmp_path)[0] / ".metadata").write_bytes(pickle.dumps(Evil()))
    (checkpoints(tmp_path)[0] / "checksums.json").unlink()
    with pytest.raises(InputError, match="system"):
        load_checkpoint(checkpoints(tmp_path)[0], {"model": model}, {})
    assert not (tmp_path / "pwned").exists()


def shards(settings, ranks):
    return pretrain.prepare(text_sources(settings), settings, ranks)


def run_in_process(settings, ranks, text_file, stop_at=None):
    """`pretrain.main` without its process group: the same calls, with the targets of every step counted."""
    seen, stops = Counter(), []

    def counting_loss(model, batch):
        seen.update(batch[1][batch[1] != IGNORE].tolist())
        if len(stops) == 0 and stop_at is not None and sum(seen.values()) >= stop_at * 64:
            stops.append(os.kill(os.getpid(), signal.SIGTERM))
        return lm_loss(model, batch)

    record = pretrain.open_run(settings, "pretrain", ranks)
    folder, index = shards(settings, ranks)
    mixture = Mixture([(folder / index["farm"]["parts"][0], 1)], 16, 0, 2, 320, folder)
    config = with_vocab(PRESETS["toy-s"], 320)
    pretrain.replace_file(Path(settings.out, "config.json"), json.dumps(record | {"model": asdict(config)}).encode())
    model = build(config, settings, ranks)
    steps = math.ceil(mixture.n_rows / 4)
    batch_at = lambda step: mixture.batch_at(step, 4, 2, ranks)  # noqa: E731
    try:
        train(model, adamw(model, 0.1), batch_at, counting_loss, settings, ranks, steps)
    except SystemExit as stop:
        assert stop.code == 128 + signal.SIGTERM
    return seen, model, mixture


def test_a_signal_during_the_last_evaluation_stops_the_run_once_it_is_saved(tmp_path, ranks, capsys):
    settings = settings_for(tmp_path, "--steps", "3")
    model = build(with_vocab(PRESETS["toy-s"], 40), settings, ranks)
    batch = [(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long))]

    def evaluate(step):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(SystemExit) as stop:
        train(model, adamw(model, 0.1), lambda step: batch, lm_loss, settings, ranks, 3, evaluate)
    assert stop.value.code == 128 + signal.SIGTERM and checkpoints(tmp_path)[-1].name == "step-000003"
    assert "stopped behind the last step" in capsys.readouterr().out


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run_and_leave_the_last_good_checkpoint(tmp_path, ranks):
    settings = settings_for(tmp_path, "--save_every", "5")
    model = build(with_vocab(PRESETS["toy-s"], 40), settings, ranks)
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        loss, count, logs = lm_loss(model, batch)
        return loss * (math.nan if len(calls) in (3, 8) or len(calls) > 11 else 1.0), count, logs

    batch = [(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long))]
    with pytest.raises(InputError, match="step-000020"):
        train(model, adamw(model, 0.1), lambda step: batch, loss_fn, settings, ranks, 100)
    assert len(calls) == 21 and json.loads((checkpoints(tmp_path)[-1] / "progress.json").read_text())["skipped"] == 11
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["loss"] is None][:3] == [3, 8, 12]


def test_changed_data_are_noticed_before_anything_is_made_anew(tmp_path, ranks, text_file):
    settings = settings_for(tmp_path / "a", "--data", str(text_file))
    before, _, _ = run_in_process(settings, ranks, text_file, stop_at=9)
    with pytest.raises(InputError, match="other data"):
        pretrain.open_run(settings, "pretrain", ranks, data={"farm": "another fingerprint"})
    with pytest.raises(InputError, match="stage"):
        pretrain.open_run(settings, "sft", ranks)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, ranks):
    (tmp_path / "step-100").mkdir()
    (tmp_path / "step-100" / "precious").write_text("x")
    with pytest.raises(InputError, match="config.json"):
        pretrain.open_run(settings_for(tmp_path), "pretrain", ranks)
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(InputError, match="not written by this project"):
        pretrain.open_run(settings_for(tmp_path), "pretrain", ranks)
    assert (tmp_path / "step-100" / "precious").exists()


def test_a_log_is_cut_behind_the_step_that_a_run_goes_on_from(tmp_path):
    kept = "--- step 2\nwords\u2028and \x0c more\n".encode()
    (tmp_path / "log").write_bytes(kept + b"--- step 4\nlater\nhalf a li")
    pretrain.rewind(tmp_path / "log", 3)
    assert (tmp_path / "log").read_bytes() == kept


def test_across_a_stop_every_token_is_a_target_once_and_the_weights_are_bit_identical(tmp_path, ranks, text_file):
    straight, model, mixture = run_in_process(settings_for(tmp_path / "a", "--data", str(text_file)), ranks, text_file)
    settings = settings_for(tmp_path / "b", "--data", str(text_file))
    before, _, _ = run_in_process(settings, ranks, text_file, stop_at=9)
    after, resumed, _ = run_in_process(settings, ranks, text_file)
    assert 0 < sum(before.values()) < mixture.n_tokens and before + after == straight
    assert sum(straight.values()) == mixture.n_tokens
    assert all(torch.equal(p.full_tensor(), q.full_tensor()) for p, q in zip(model.parameters(), resumed.parameters()))
    lines = {name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "ab"}
    assert [x["loss"] for x in lines["a"]] == [x["loss"] for x in lines["b"]]


def test_tokenising_that_was_stopped_goes_on_and_makes_the_same_shards(tmp_path, ranks, text_file, monkeypatch):
    monkeypatch.setattr(pretrain, "PART_TOKENS", 500)
    whole, _ = shards(settings_for(tmp_path / "a", "--data", str(text_file)), ranks)
    half, _ = shards(settings_for(tmp_path / "b", "--data", str(text_file)), ranks)
    expected = {p.name: p.read_bytes() for p in whole.glob("farm*")}
    assert len(expected) > 6
    for name in ("index.json", "farm-00002.u16", "farm-00002.ends"):
        (half / name).unlink(missing_ok=True)
    for part in half.glob("farm-0000[3-9]*"):
        part.unlink()
    shards(settings_for(tmp_path / "b", "--data", str(text_file)), ranks)
    assert {p.name: p.read_bytes() for p in half.glob("farm*")} == expected


# ---- the command line


def test_help_shows_every_flag_with_a_meaning_and_the_papers_values():
    text = command("--help").stdout
    for field in fields(Settings):
        assert f"--{field.name}" in text
    assert re.search(r"peak learning rate\s+\(default\s+by\s+preset;\s+toy\s+0.002;\s+paper\s+3e-4", text)


def test_paper_presets_hold_the_papers_hyper_parameters():
    for name, lr, rows in [("7b", 3e-4, 1024), ("70b", 1.5e-4, 1024), ("llama1-7b", 3e-4, 2048)]:
        s = parse(Settings, ["--preset", name])
        assert (s.lr, s.batch_size * s.seq_len, s.batch_size, s.warmup, s.weight_decay, s.grad_clip) == (lr, 2**22, rows, 2000, 0.1, 1.0)


def test_pretraining_goes_on_from_a_large_model_with_the_hyper_parameters_of_its_size(monkeypatch):
    assert parse(Settings, []).preset == "toy"
    monkeypatch.setattr(pretrain, "parent_of", lambda folder: Parent(PRESETS["13b"], "", "", None))
    assert (found := parse(Settings, ["--init", "13b"])).preset == "13b" and found.seq_len == 4096 and found.lr == 3e-4


@pytest.mark.parametrize("words", [("pretrain.py", "plan"), ("model.py", "convert", "none", "there", "--to", "hf")])
def test_of_a_command_that_needs_one_process_the_others_of_torchrun_do_nothing(words):
    results = [subprocess.run([sys.executable, HERE / words[0], *words[1:]], env=os.environ | {"RANK": rank}, capture_output=True)
               for rank in "01"]
    assert results[0].stdout or results[0].returncode == 2
    assert (results[1].returncode, results[1].stdout, results[1].stderr) == (0, b"", b"")


def test_what_torchrun_starts_again_goes_on_even_if_it_was_to_begin_anew(monkeypatch):
    assert not parse(Settings, ["--no-resume"]).resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert parse(Settings, ["--no-resume"]).resume


@pytest.mark.parametrize("flags, word", [(["--lr", "-1"], "--lr"), (["--batch_size", "0"], "--batch_size"), (["--dtype", "fp8"], "fp8")])
def test_a_flag_that_cannot_be_is_refused(flags, word):
    with pytest.raises(InputError, match=word):
        parse(Settings, flags)


def test_a_missing_tokenizer_file_is_named(tmp_path, ranks, text_file):
    with pytest.raises(InputError, match="missing.model"):
        pretrain.main(settings_for(tmp_path, "--data", str(text_file), "--tokenizer", "missing.model"))


def test_token_shards_with_ids_outside_the_vocabulary_are_refused(tmp_path):
    mixture = Mixture([(write_shard(tmp_path / "s", [[5, 6, 900]]), 1)], 8, 0, 2, 320, tmp_path)
    with pytest.raises(InputError, match="900"):
        mixture.row(0)


def test_bad_input_ends_with_one_sentence_and_exit_code_2(tmp_path, text_file):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for flags, word in [(["--data", text_file, tmp_path / "empty.txt"], "empty"), (["--data", tmp_path / "latin.txt"], "latin.txt, line 1"),
                        (["--data", text_file, "--seq_len", "2000"], "2000")]:
        result = command(*SMALL, *flags, "--out", tmp_path / "o")
        message = [line for line in result.stderr.splitlines() if line.startswith("pretrain.py:")]
        assert result.returncode == 2 and len(message) == 1 and word in message[0] and "Traceback" not in result.stderr


SMALL = ("--preset", "toy-s", "--seq_len", "16", "--batch_size", "4", "--micro_batch", "1", "--vocab_size", "320", "--device", "cpu",
         "--sample_tokens", "0", "--threads", "1")


def test_another_run_in_the_same_folder_is_refused_by_the_name_of_the_field(tmp_path, text_file):
    flags = [*SMALL, "--data", text_file, "--out", tmp_path / "o", "--steps", "2"]
    assert command(*flags).returncode == 0
    result = command(*flags, "--lr", "0.5")
    assert result.returncode == 2 and "--lr" in result.stderr and "--out" in result.stderr
    assert command(*flags, "--lr", "0.5", "--no-resume").returncode == 0


def losses(out):
    return np.array([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])


def test_world_sizes_1_2_and_4_and_two_replicas_of_two_shards_agree_over_200_steps(tmp_path, text_file):
    for n in (1, 2, 4):
        result = launch("tests/over_ranks.py", text_file, tmp_path / str(n), n=n)
        assert result.returncode == 0, result.stderr[-2000:]
    for dtype, tolerance in [("fp32", 1e-4), ("bf16", 1e-2)]:
        alone = losses(tmp_path / "1" / dtype)
        assert len(alone) == 200 and alone[-1] < alone[0] - 1
        for n in (2, 4):
            assert np.abs(losses(tmp_path / str(n) / dtype) - alone).max() < tolerance
    assert np.abs(losses(tmp_path / "4" / "replicas") - losses(tmp_path / "1" / "fp32")).max() < 1e-4


def test_a_run_goes_on_at_another_world_size_with_the_same_losses(tmp_path, text_file):
    flags = [*SMALL, "--data", text_file, "--save_every", "10"]
    assert command(*flags, "--out", tmp_path / "a", "--steps", "20").returncode == 0
    # three ranks and a batch of four rows: two ranks fill up with a row that is all ignored
    result = command(*flags, "--out", tmp_path / "b", "--steps", "20", "--keep", "5", n=3)
    assert result.returncode == 0, result.stderr[-2000:]
    for folder in checkpoints(tmp_path / "b")[1:]:
        shutil.rmtree(folder)  # as if it had been killed after step 10
    result = command(*flags, "--out", tmp_path / "b", "--steps", "20")
    assert "going on at step 10" in result.stdout
    assert np.abs(losses(tmp_path / "a") - losses(tmp_path / "b")).max() < 1e-4
    a, b = (load_model(tmp_path / name)[0] for name in "ab")
    assert all((p - q).abs().max() < 1e-4 for p, q in zip(a.parameters(), b.parameters()))
