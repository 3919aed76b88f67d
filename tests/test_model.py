"""The transformer and its sampling, held against a golden file, closed forms and brute force."""
import base64
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import model as model_file
from model import (IGNORE, PRESETS, KVCache, ModelConfig, ModelError, Transformer, apply_rope, count_parameters, document_lengths,
                   document_positions, generate, initial_weight, nucleus, rope_table, sample, swiglu_hidden, target_log_probs,
                   uniforms)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "llama_logits.json").read_text())["cases"]
TINY = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=40, vocab_size=50, max_seq_len=48)
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [4, 4]]


def array(text, shape):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").reshape(shape).copy())


def loud(config=TINY, seed=0):
    """A random model whose distributions are far from flat, so that a mistake shows in the samples."""
    model = Transformer(config, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return model


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_logits_loss_gradients_and_greedy_tokens_equal_those_of_transformers(case):
    model = Transformer(ModelConfig(**case["config"], max_seq_len=64))
    model.load_state_dict({name: array(text, case["shapes"][name]) for name, text in case["weights"].items()})
    tokens = torch.tensor(case["tokens"])
    torch.testing.assert_close(model(tokens), array(case["logits"], case["logits_shape"]), atol=3e-5, rtol=1e-5)
    loss = -model(tokens[:, :-1], targets=tokens[:, 1:]).mean()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(case["gradient_norms"], abs=1e-4)
    assert generate(model, [case["greedy_prompt"]], len(case["greedy"]), temperature=0) == [case["greedy"]]


@pytest.mark.parametrize("name, count", [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("34b", 33_743_970_304), (
    "70b", 68_976_648_192), ("llama1-7b", 6_738_415_616), ("llama1-33b", 32_528_943_616), ("llama1-65b", 65_285_660_672)])
def test_presets_have_the_published_number_of_parameters(name, count):
    assert count_parameters(PRESETS[name]) == count


def test_feed_forward_widths_are_those_of_the_released_models():
    assert [swiglu_hidden(4096), swiglu_hidden(5120), swiglu_hidden(8192)] == [11008, 13824, 22016]
    assert swiglu_hidden(8192, 4096, 1.3) == 28672


def test_rope_turns_neighbouring_pairs_by_position_times_frequency():
    x = torch.randn(1, 5, 2, 8)
    turned = apply_rope(x, rope_table(8, 5, 10000.0, x.device)[None, :, None])
    for t in range(5):
        for k in range(4):
            angle = t * 10000 ** (-2 * k / 8)
            a, b = x[0, t, :, 2 * k], x[0, t, :, 2 * k + 1]
            torch.testing.assert_close(turned[0, t, :, 2 * k], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(turned[0, t, :, 2 * k + 1], a * math.sin(angle) + b * math.cos(angle))


def test_rope_as_it_is_compiled_is_the_rope_of_complex_numbers(monkeypatch):
    x, rotation = torch.randn(2, 5, 3, 8), rope_table(8, 5, 10000.0, torch.device("cpu"))[None, :, None]
    turned = apply_rope(x, rotation)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(x, rotation), turned)


def test_grouped_attention_equals_multi_head_attention_with_copied_heads():
    grouped = loud()
    full = Transformer(ModelConfig(**{**TINY.__dict__, "n_kv_heads": 4}))
    weights = dict(grouped.state_dict())
    for name in weights:
        if name.endswith(("wk.weight", "wv.weight")):
            heads = weights[name].view(2, 8, 32)  # (n_kv_heads, head_dim, dim)
            weights[name] = heads.repeat_interleave(2, 0).reshape(32, 32)
    full.load_state_dict(weights)
    tokens = torch.randint(50, (2, 9))
    torch.testing.assert_close(full(tokens), grouped(tokens), atol=1e-4, rtol=1e-4)


def test_a_later_token_changes_no_earlier_logit():
    model, tokens = loud(), torch.randint(50, (1, 12))
    before = model(tokens)
    tokens[0, 7] = (tokens[0, 7] + 1) % 50
    after = model(tokens)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7], after[:, 7])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_document_has_the_logits_and_gradients_that_it_has_alone(compiled):
    model, alone = loud(), loud()
    model.compiled = compiled  # as compiled blocks do it: by a mask
    rows = [[4, 1, 6, 5], [9, 7]]
    tokens = torch.randint(50, (2, 16))
    documents = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] for lengths in rows])
    assert document_positions(documents).flatten().tolist() == [t for lengths in rows for n in lengths for t in range(n)]
    assert document_lengths(document_positions(documents)) == [n for lengths in rows for n in lengths]
    packed = model(tokens, documents=documents)
    packed.logsumexp(-1).sum().backward()
    for row, lengths in enumerate(rows):
        start = 0
        for n in lengths:
            logits = alone(tokens[row : row + 1, start : start + n])
            torch.testing.assert_close(packed[row : row + 1, start : start + n], logits, atol=1e-5, rtol=1e-5)
            logits.logsumexp(-1).sum().backward()
            start += n
    for mine, theirs in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(
    not shutil.which("g++"), reason="the compiler of PyTorch needs g++"))])
def test_log_probs_in_chunks_have_the_values_and_gradients_of_the_whole(monkeypatch, compiled):
    h = torch.randn(2, 7, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.double, requires_grad=True)
    targets = torch.randint(11, (2, 7))
    targets[0, 2] = targets[1, 6] = IGNORE
    whole = torch.log_softmax((h @ weight.T).float() / 0.7, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != IGNORE)
    expected = torch.autograd.grad(whole.sum(), [h, weight])
    for limit in (1, 33, 10**6):  # one row at a time, three, all
        monkeypatch.setitem(model_file.CHUNK_LOGITS, "cpu", limit)
        found = target_log_probs(h, weight, targets, 0.7, compiled)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), [h, weight]), expected, atol=1e-6, rtol=1e-5)


def test_a_row_of_ignored_targets_has_loss_zero_and_gradient_zero_not_nan():
    model = loud()
    loss = -model(torch.zeros(2, 5, dtype=torch.long), targets=torch.full((2, 5), IGNORE)).sum()
    loss.backward()
    assert loss.item() == 0 and all(p.grad.abs().max() == 0 for p in model.parameters())


def test_recomputing_activations_changes_no_gradient():
    tokens, gradients = torch.randint(50, (2, 9)), []
    for recompute in (False, True):
        model = loud()
        for block in model.layers:
            block.checkpointing = recompute
        model(tokens[:, :-1], targets=tokens[:, 1:]).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def draw_without_cache(model, prompt, steps, temperature, top_p, seed, row, k):
    """The rule of `generate`, told again: whole forward passes, Python loops, numpy."""
    tokens, log_probs = list(prompt), []
    random = uniforms(seed, torch.tensor([row]), torch.tensor([k]), steps)[0].tolist()
    for u in random:
        logits = model(torch.tensor([tokens]))[0, -1].double().detach().numpy()
        if temperature > 0:
            logits = logits / temperature
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        kept, mass = probs.copy(), 0.0
        for token in np.argsort(-probs, kind="stable"):
            if mass > top_p:
                kept[token] = 0
            mass += probs[token]
        token, left = 0, u * kept.sum() if temperature > 0 else None
        if temperature == 0:
            token = int(probs.argmax())
        else:
            while left >= kept[token]:
                left -= kept[token]
                token += 1
        tokens.append(token)
        log_probs.append(math.log(probs[token]))
    return tokens[len(prompt):], log_probs


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_cached_and_batched_sampling_equals_the_plain_loop_token_for_token(temperature, top_p):
    model = loud()
    found = generate(model, PROMPTS, 20, temperature, top_p, seed=3, n_samples=2, log_probs=True)
    for i, prompt in enumerate(PROMPTS):
        for k in range(2):
            tokens, log_probs = draw_without_cache(model, prompt, 20, temperature, top_p, 3, i, k)
            assert found[2 * i + k].tokens == tokens
            assert found[2 * i + k].log_probs == pytest.approx(log_probs, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_a_sample_does_not_depend_on_the_batch_it_was_drawn_in(batch_size):
    model = loud()
    together = generate(model, PROMPTS, 15, 1.0, 1.0, stop=(3,), seed=1, n_samples=3, batch_size=batch_size)
    alone = [generate(model, [prompt], 15, 1.0, 1.0, stop=(3,), seed=1, n_samples=k + 1, rows=[i])[k]
             for i, prompt in enumerate(PROMPTS) for k in range(3)]
    assert together == alone


def test_no_more_is_drawn_at_once_than_the_memory_for_keys_and_values_holds(monkeypatch):
    model, shapes, prompts = loud(), [], [prompt for prompt in PROMPTS if len(prompt) > 1] * 3
    free = generate(model, prompts, 15, 1.0, 1.0, n_samples=2)
    a_token = 2 * 2 * 2 * 8 * 4  # bytes: keys and values of 2 layers, 2 heads, 8 numbers in fp32
    monkeypatch.setattr(model_file, "CACHE_BYTES", 150 * a_token)
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    assert generate(model, prompts, 15, 1.0, 1.0, n_samples=2) == free
    read = [(rows, width) for rows, width in shapes if width > 1]  # the passes over prompts
    assert read == [(4, 3), (3, 6), (2, 6)] and max(2 * rows * (width + 15) for rows, width in read) <= 150


def test_in_bf16_the_first_token_of_a_ragged_batch_is_that_of_the_plain_loop():
    model = loud().bfloat16()
    found = generate(model, PROMPTS, 6, 0)
    assert [draw_without_cache(model, prompt, 6, 0, 1.0, 0, 0, 0)[0][0] for prompt in PROMPTS] == [tokens[0] for tokens in found]


def test_stopping_cuts_a_sample_and_changes_nothing_before():
    model = loud()
    prompts = PROMPTS * 4
    free = generate(model, prompts, 30, 1.0, 1.0)
    stopped = generate(model, prompts, 30, 1.0, 1.0, stop=(3, 17, 40))
    assert any(len(tokens) < 30 for tokens in stopped) and any(len(tokens) == 30 for tokens in free)
    for long, short in zip(free, stopped):
        ends = [i for i, token in enumerate(long) if token in (3, 17, 40)]
        assert short == (long[: ends[0] + 1] if ends else long)


def test_sampled_log_probs_equal_those_of_the_training_forward():
    model = loud()
    for prompt, drawn in zip(PROMPTS, generate(model, PROMPTS, 10, 0.8, 1.0, log_probs=True)):
        tokens = torch.tensor([prompt + drawn.tokens])
        trained = model(tokens[:, :-1], targets=tokens[:, 1:], temperature=0.8)[0, len(prompt) - 1 :]
        assert drawn.log_probs == pytest.approx(trained.tolist(), abs=1e-4)


def test_tokens_stream_to_the_callback_as_they_are_returned():
    model, streamed = loud(), {}
    answers = generate(model, PROMPTS, 12, 1.0, 1.0, stop=(3,), n_samples=2, batch_size=4,
                       on_token=lambda index, token: streamed.setdefault(index, []).append(token))
    assert [streamed[i] for i in range(len(answers))] == answers


def test_a_row_ends_where_the_context_is_full():
    model = loud()
    answers = generate(model, [[1] * 45, [1], [1] * 47], 100, 1.0, 1.0)
    assert [len(answer) for answer in answers] == [3, 47, 1]


def test_samples_have_the_frequencies_of_the_softmax_and_top_p_cuts_the_tail():
    logits, n = torch.tensor([2.0, 0.0, 1.0, -1.0]), 20000
    u = uniforms(0, torch.arange(n), torch.zeros(n, dtype=torch.long), 1)[:, 0]
    for top_p, expected in [(1.0, torch.softmax(logits, 0)), (0.7, torch.tensor([0.7311, 0, 0.2689, 0]))]:
        tokens, _ = sample(logits.expand(n, 4), 1.0, top_p, u)
        frequency = torch.bincount(tokens, minlength=4) / n
        assert (frequency - expected).abs().max() < 0.015  # over four standard errors
        assert (frequency[expected == 0] == 0).all()


@pytest.mark.parametrize("scale", [4.0, 0.1])  # the nucleus lies inside the 64 likeliest tokens, or not
def test_the_nucleus_is_the_shortest_start_of_the_sorted_tokens_whose_mass_exceeds_top_p(scale):
    probs = torch.softmax(torch.randn(5, 300) * scale, -1)
    kept = nucleus(probs, 0.9)
    for row, found in zip(probs.double().tolist(), kept):
        mass, expected = 0.0, set()
        for token in sorted(range(300), key=lambda token: -row[token]):
            if mass <= 0.9:
                expected.add(token)
            mass += row[token]
        assert set(found.nonzero()[:, 0].tolist()) == expected
        assert (len(expected) > 64) == (scale < 1)
    assert torch.equal(kept[kept > 0], probs[kept > 0])


def test_a_model_that_has_sampled_can_still_be_trained():
    rope_table.cache_clear()  # so that sampling makes the table which training then uses
    model = loud()
    generate(model, PROMPTS, 4)
    model(torch.ones(1, 3, dtype=torch.long), targets=torch.ones(1, 3, dtype=torch.long)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_uniforms_are_splitmix64_of_seed_row_sample_and_step_in_turn():
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31
    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of the published generator with seed 0
    rows, samples = torch.tensor([0, 5, 2**40]), torch.tensor([1, 0, 7])
    found = uniforms(12345, rows, samples, 3)
    for i in range(3):
        for t in range(3):
            bits = mix(mix(mix(mix(12345) ^ rows[i].item()) ^ samples[i].item()) ^ t)
            assert found[i, t].item() == (bits >> 11) / 2**53


def test_weights_start_as_stated_and_only_wo_and_w2_are_smaller():
    model = Transformer(ModelConfig(dim=128, n_layers=8, n_heads=4, n_kv_heads=2, ffn_hidden=352, vocab_size=500))
    for name, p in model.named_parameters():
        expected = 0.02 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.02
        assert (p == 1).all() if p.ndim == 1 else p.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_weight_depends_on_its_name_and_the_seed_alone():
    draw = lambda name, seed: initial_weight(name, torch.Size([4, 4]), 2, seed, torch.device("cpu"))  # noqa: E731
    assert torch.equal(draw("a", 0), draw("a", 0))
    assert not torch.equal(draw("a", 0), draw("b", 0)) and not torch.equal(draw("a", 0), draw("a", 1))


def test_the_cache_keeps_the_rows_that_it_is_told_to_keep():
    cache = KVCache(TINY, torch.tensor([2, 3]), 5)
    k = torch.randn(2, 2, 3, 8)
    for layer in range(2):
        cache.append(layer, k, -k)
    cache.advance(torch.zeros(2, 3, 1))
    cache.keep(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.memory[1][0][:, :, :3], k[[1, 1, 0]]) and cache.lengths.tolist() == [3, 3, 2]


@pytest.mark.parametrize("lengths", [[3, 3, 3], [2, 5, 3]])
def test_a_frozen_cache_gives_the_logits_of_a_growing_one(lengths):
    model, prompts = loud(), torch.randint(TINY.vocab_size, (3, max(lengths)))
    logits = []
    for freeze in (False, True):
        cache = KVCache(TINY, torch.tensor(lengths), 16)
        with torch.no_grad():
            one = [model(prompts, cache=cache)]
            if freeze:
                cache.freeze()
            for step in range(6):
                if step == 3:
                    cache.keep(torch.tensor([2, 0]))
                one.append(model(one[-1].argmax(-1)[-len(cache.lengths):, None], cache=cache))
        logits.append(torch.cat(one))
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("prompt, word", [([], "empty"), ([1] * 48, "48"), ([1, 50], "50"), ([-1, 2], "-1")])
def test_a_prompt_that_cannot_be_read_is_refused_with_a_sentence(prompt, word):
    with pytest.raises(ModelError, match=word):
        generate(loud(), [[1], prompt], 4)


def test_a_shape_that_cannot_be_is_refused():
    with pytest.raises(ModelError, match="n_kv_heads"):
        ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=3, ffn_hidden=8)
    with pytest.raises(ModelError, match="context of 48"):
        loud()(torch.zeros(1, 49, dtype=torch.long))
