"""PPO: its functions against frozen outputs of known libraries, the details that known code got wrong, and whole runs."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pretrain
import toy
from eval import Report, report
from model import IGNORE, ModelConfig, Transformer, generate, target_log_probs
from pretrain import InputError, adamw, load_model, parent_of, parse, save_model
from reward import RewardModel, sigmoid
from rlhf import (Ppo, adapted, align, at_every_place, critic_step_loss, deal, gae, kl_estimates, learn, load_models, load_prompts,
                  logit, make_batch, policy_step_loss, ppo, ppo_loss, prompts_at, sample_answers, score_answers, take, token_rewards,
                  value_loss, whiten, whiten_scores)
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent.parent
EOS = 2


def golden(name):
    return json.loads((HERE / f"tests/golden/{name}.json").read_text())["cases"]


def double(values, **more):
    return torch.tensor(values, dtype=torch.double, **more)


def close(ours, theirs, tolerance=1e-7):
    """Within a share of the largest true magnitude."""
    theirs = double(theirs)
    return torch.allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


def named(case):
    return f"{case['name']} {case.get('kind', '')}".strip()


# ---- the functions, against frozen outputs of TRL, verl and torchtune in float64


@pytest.mark.parametrize("case", golden("whiten"), ids=named)
def test_whitening_is_that_of_trl(case):
    mask = torch.tensor(case["mask"]).bool()
    values = logit(double(case["scores"]), 1e-12) if "scores" in case else double(case["values"])
    assert close(values, case["values"])
    assert close(whiten(double(case["values"]), mask), case["whitened"])


@pytest.mark.parametrize("case", golden("gae"), ids=named)
def test_rewards_advantages_and_returns_are_those_of_torchtune_and_verl(case):
    log_probs, reference, values, scores = (double(case[key]) for key in ("logprobs", "ref_logprobs", "values", "scores"))
    mask = torch.arange(values.shape[1]) < torch.tensor(case["lengths"])[:, None]
    rewards = token_rewards(scores, log_probs, reference, mask, case["kl_coeff"])
    advantages, returns = gae(rewards, values, mask, case["gamma"], case["lam"])
    assert close(rewards, case["rewards"]) and close(advantages, case["advantages"])
    assert close(returns.where(mask, 0), case["returns"])
    assert case["advantages_whitened"] is None or close(whiten(advantages, mask), case["advantages_whitened"])


@pytest.mark.parametrize("case", golden("ppo_loss"), ids=named)
def test_both_losses_their_gradients_and_clip_fractions_are_those_of_torchtune_and_verl(case):
    mask = torch.tensor(case["mask"]).bool()
    log_probs, values = (double(case[key], requires_grad=True) for key in ("logprobs", "values"))
    policy, clipped = ppo_loss(log_probs, double(case["old_logprobs"]), double(case["advantages"]), mask, case["clip"])
    value, value_clipped = value_loss(values, double(case["old_values"]), double(case["returns"]), mask, case["value_clip"])
    n = mask.sum()
    ((policy + case["value_coeff"] * value) / n).backward()
    for ours, key in ((policy / n, "policy_loss"), (value / n, "value_loss"), (log_probs.grad, "grad_logprobs"), (values.grad, "grad_values")):
        assert close(ours.detach(), case[key]), key
    assert (clipped / n).item() == pytest.approx(case["policy_clip_fraction"], abs=1e-7)
    assert (value_clipped / n).item() == pytest.approx(case["value_clip_fraction"], abs=1e-7)


@pytest.mark.parametrize("case", golden("kl_logprobs"), ids=named)
def test_kl_estimates_are_those_of_verl_and_log_probs_those_of_trl(case):
    log_probs, reference = double(case["logprobs"]), double(case["ref_logprobs"])
    k1, k3 = kl_estimates(log_probs, reference)
    assert close(k1, case["k1"], 1e-9) and close(k3, case["k3"], 1e-15 if "tiny" in case["name"] else 1e-9)
    if case["kind"] == "from logits" and "1e4" not in case["name"]:  # our log-probabilities are fp32, as any loss of ours
        logits, one = double(case["logits"]).float(), torch.eye(len(case["logits"][0][0]))
        ours = target_log_probs(logits, one, torch.tensor(case["tokens"]), case["temperature"])
        assert close(ours.double(), case["logprobs"], 1e-5)
        every = [target_log_probs(logits, one, torch.full(logits.shape[:2], token), case["temperature"]) for token in range(len(one))]
        entropy = -sum(part.exp() * part for part in every)  # the mean of -log π under π, which is what we log of the samples
        assert close(entropy.double(), case["entropy"], 1e-5)


def policies(n=3):
    """Two distributions over n tokens, and every token once: sums weighted by the first are exact expectations under it."""
    policy, reference = torch.randn(2, n, dtype=torch.double).log_softmax(-1)
    return policy, reference, (policy.exp() * (policy - reference)).sum()


def test_k1_and_k3_are_the_right_way_up_both_have_the_mean_kl_under_the_policy():
    policy, reference, kl = policies()
    k1, k3 = kl_estimates(policy, reference)
    assert (policy.exp() * k1).sum().item() == pytest.approx(kl.item(), abs=1e-12)
    assert (policy.exp() * k3).sum().item() == pytest.approx(kl.item(), abs=1e-12)
    _, upside_down = kl_estimates(reference, policy)
    assert abs((policy.exp() * upside_down).sum() - kl) > 0.01


def test_k3_keeps_its_digits_where_the_policies_are_almost_equal():
    _, k3 = kl_estimates(double([-1.0]), double([-1.0 + 1e-7]))
    assert k3.item() == pytest.approx(0.5e-14, rel=1e-5)  # exp(r) - 1 - r would give 0 or noise
    assert (kl_estimates(torch.randn(99), torch.randn(99))[1] >= 0).all()


def test_whitening_removes_the_mean_and_counts_real_tokens_alone():
    x, mask = torch.randn(6, 9, dtype=torch.double) + 3, torch.rand(6, 9) < 0.6
    real = whiten(x, mask)[mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-12) and real.std().item() == pytest.approx(1, abs=1e-6)
    assert (whiten(x, mask)[~mask] == 0).all() and torch.equal(whiten(x.where(mask, 1e6), mask), whiten(x, mask))


def test_a_single_score_and_none_at_all_are_whitened_to_zero_not_nan():
    assert whiten(double([3.0, 9.0]), torch.tensor([True, False])).tolist() == [0, 0]
    assert whiten(double([3.0]), torch.tensor([False])).tolist() == [0]


def test_the_logit_undoes_the_sigmoid_and_stays_finite_at_the_ends():
    x = torch.linspace(-9, 9, 19, dtype=torch.double)
    assert torch.allclose(logit(torch.sigmoid(x)), x, atol=1e-6)
    assert logit(double([0.0, 1.0])).tolist() == pytest.approx([-13.8155, 13.8155], abs=1e-3)


def test_scores_go_through_sigmoid_piece_logit_and_whitening_and_the_kl_penalty_is_not_whitened():
    combined, mask = double([0.2, 0.9, 0.6]), torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    raw = np.log(np.array([0.2, 0.9, 0.6]) / np.array([0.8, 0.1, 0.4]))
    by_hand = (raw - raw.mean()) / raw.std(ddof=1)
    scores = whiten_scores(combined, torch.ones(3).bool())
    assert scores.tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)
    log_probs, reference = torch.randn(2, 3, 3, dtype=torch.double)
    totals = token_rewards(scores, log_probs, reference, mask, kl_coef=0.3).sum(1)
    penalties = [0.3 * sum((log_probs - reference)[i, : n].tolist()) for i, n in enumerate((2, 3, 1))]
    assert totals.tolist() == pytest.approx((by_hand - penalties).tolist(), abs=1e-6)


def test_an_answer_that_was_cut_off_gets_minus_one_and_moves_no_other_score():
    combined, finished = double([0.2, 0.99, 0.6, 0.4]), torch.tensor([True, False, True, True])
    scores = whiten_scores(combined, finished)
    assert scores[1] == -1
    assert torch.allclose(scores[finished], whiten_scores(combined[finished], torch.ones(3).bool()))
    plain = whiten_scores(combined, finished, whitened=False)
    assert plain[1] == -1 and torch.allclose(plain[finished], logit(combined[finished]))


def test_the_score_is_paid_on_eos_not_on_the_token_behind_it():
    inputs, targets = align([[1, 7, 8], [1, 9]], [[5, EOS], [6, 5, 4, EOS]])
    rewards = token_rewards(double([1.0, 2.0]), torch.zeros(2, 5), torch.zeros(2, 5), targets != IGNORE, kl_coef=1.0)
    assert targets[rewards != 0].tolist() == [EOS, EOS] and rewards[rewards != 0].tolist() == [1, 2]
    assert inputs.tolist() == [[1, 7, 8, 5, EOS], [1, 9, 6, 5, 4]]
    assert targets.tolist() == [[IGNORE, IGNORE, 5, EOS, IGNORE], [IGNORE, 6, 5, 4, EOS]]


def test_padding_is_known_by_length_so_a_padding_id_inside_an_answer_is_learned():
    _, targets = align([[1, 3], [1, 3]], [[0, 0, EOS], [EOS]])
    assert targets.tolist() == [[IGNORE, 0, 0, EOS], [IGNORE, EOS, IGNORE, IGNORE]]


def test_advantages_are_the_sum_of_discounted_errors_and_stand_at_the_places_of_the_actions():
    rewards, values = torch.randn(2, 2, 7, dtype=torch.double)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()  # prompts before, padding behind
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for row, places in ((0, [2, 3, 4, 5]), (1, [1, 2])):
        for i, t in enumerate(places):
            deltas = [rewards[row, s] + (0.9 * values[row, s + 1] if s < places[-1] else 0) - values[row, s] for s in places[i:]]
            by_hand = sum(0.72**k * delta for k, delta in enumerate(deltas))
            assert advantages[row, t].item() == pytest.approx(by_hand.item(), abs=1e-12)
            assert returns[row, t].item() == pytest.approx((by_hand + values[row, t]).item(), abs=1e-12)
    assert (advantages[~mask] == 0).all()


def test_returns_come_from_advantages_before_they_are_whitened():
    rewards, values, mask = torch.randn(3, 5, dtype=torch.double), torch.randn(3, 5, dtype=torch.double), torch.ones(3, 5).bool()
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1))


@pytest.mark.parametrize("garbage", [1e9, math.nan, math.inf])
def test_whatever_stands_outside_the_answer_changes_no_reward_advantage_loss_or_gradient(garbage):
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()
    clean = torch.randn(6, 2, 5, dtype=torch.double).where(mask, 0)

    def everything(filled):
        new, old, reference, values, old_values, _ = (x.clone().requires_grad_() for x in filled)
        with torch.no_grad():
            rewards = token_rewards(double([1.0, -1.0]), old, reference, mask, 0.1)
            advantages, returns = gae(rewards, old_values, mask, 0.99, 0.95)
        outside = torch.where(mask, whiten(advantages, mask), filled[5]), torch.where(mask, returns, filled[5])
        losses = ppo_loss(new, old.detach(), outside[0], mask, 0.2), value_loss(values, old_values.detach(), outside[1], mask, 0.2)
        sum(loss for loss, _ in losses).backward()
        return [rewards, advantages, returns.where(mask, 0), *sum(losses, ()), new.grad, values.grad]

    for ours, wanted in zip(everything(clean.where(mask, garbage)), everything(clean)):
        assert torch.equal(ours, wanted)


def test_losses_are_sums_so_that_micro_batches_and_ranks_add_up():
    tensors, mask = torch.randn(3, 4, 6), torch.rand(4, 6) < 0.7
    for loss in (ppo_loss, value_loss):
        whole, parts = loss(*tensors, mask, 0.2), [loss(*(x[i : i + 1] for x in tensors), mask[i : i + 1], 0.2) for i in range(4)]
        assert whole[0].item() == pytest.approx(sum(part.item() for part, _ in parts), rel=1e-5)
        assert whole[1] == sum(n for _, n in parts)


def test_the_adaptive_kl_coefficient_is_zieglers_and_its_step_is_bounded():
    assert adapted(0.1, kl=1.1, target=1.0, n=64, horizon=1000) == pytest.approx(0.1 * (1 + 0.1 * 0.064))
    assert adapted(0.1, kl=99, target=1.0, n=64, horizon=1000) == pytest.approx(0.1 * (1 + 0.2 * 0.064))
    assert adapted(0.1, kl=-99, target=1.0, n=64, horizon=1000) == pytest.approx(0.1 * (1 - 0.2 * 0.064))


def bandit(kl_coef, iterations=150, n=4000):
    """PPO with our functions on answers of one token. Returns the policy, π₀ and the rewards of the tokens."""
    reference, reward = torch.randn(2, 5, dtype=torch.double)
    reference = reference.log_softmax(-1)
    weights = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], betas=(0.9, 0.95))
    mask = torch.ones(n, 1).bool()
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - iteration / iterations)
        with torch.no_grad():
            old = weights.log_softmax(-1)
            actions = torch.searchsorted(old.exp().cumsum(0), (torch.arange(n) + 0.5) / n).clamp(max=4)[:, None]  # (n, 1)
            rewards = token_rewards(reward[actions[:, 0]], old[actions], reference[actions], mask, kl_coef)
            advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 0.95)
        for _ in range(4):  # steps on the same answers: what the clip is for
            loss, _ = ppo_loss(weights.log_softmax(-1)[actions], old[actions], whiten(advantages, mask), mask, 0.2)
            (loss / n).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights.detach().log_softmax(-1), reference, reward


@pytest.mark.parametrize("kl_coef", [0.3, 1.0])
def test_a_bandit_converges_to_the_start_tilted_by_the_reward_over_beta(kl_coef):
    policy, reference, reward = bandit(kl_coef)
    optimum = (reference + reward / kl_coef).softmax(-1)  # π₀ exp(r / β) / Z
    assert (policy.exp() - optimum).abs().sum() < 0.03 < (reference.exp() - optimum).abs().sum() / 5


def test_a_beta_without_bound_keeps_the_policy_and_none_gives_it_all_to_the_best_token():
    policy, reference, reward = bandit(1e6)
    assert (policy.exp() - reference.exp()).abs().sum() < 0.02
    policy, reference, reward = bandit(0.0)
    assert policy.exp()[reward.argmax()] > 0.95


# ---- the models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with random weights of a tiny chat model and of two reward models."""
    folder = tmp_path_factory.mktemp("models")
    texts = [m["content"] for d in toy.dialogues(toy.World(0), 300) for m in d["messages"]]
    tokenizer = Tokenizer.train(texts, str(folder / "tokenizer.model"), 400)
    config = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_hidden=48, vocab_size=400, max_seq_len=160)
    for name, model in (("chat", Transformer(config)), ("helpfulness", RewardModel(config, 1)), ("safety", RewardModel(config, 2))):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3 if p.ndim > 1 else 1)  # far from uniform
        save_model(model, str(folder / name), tokenizer.path)
        pretrain.cpu_group.cache_clear()
    return folder


def flags(folders, out, *more):
    return ["--init", str(folders / "chat"), "--helpfulness", str(folders / "helpfulness"), "--harmlessness", str(folders / "safety"), "--threshold", "0.15", "--out",
            str(out), "--preset", "toy-s", "--device", "cpu", "--threads", "1", "--batch_size", "12", "--mini_batch", "6",
            "--micro_batch", "2", "--seq_len", "80", "--max_new_tokens", "24", "--eval_prompts", "6", *map(str, more)]


@pytest.fixture(scope="module")
def settings(folders, tmp_path_factory):
    return parse(Ppo, flags(folders, tmp_path_factory.mktemp("none"), "--temperature", "0.7", "--critic_warmup", "0"))


@pytest.fixture(scope="module")
def ranks(settings):
    yield pretrain.start(settings)
    dist.destroy_process_group()
    pretrain.cpu_group.cache_clear()


@pytest.fixture()
def models(settings, ranks):
    return load_models(settings, ranks)


@pytest.fixture(scope="module")
def tokenizer(folders):
    return Tokenizer(str(folders / "tokenizer.model"))


def rollout(models, tokenizer, settings, ranks, kl_coef=0.1, iteration=1):
    """Prompts, their ids, answers, and what is made of them with random scores."""
    prompts = prompts_at([], iteration, settings)
    ids, answers = sample_answers(models.policy, prompts, iteration, tokenizer, settings, ranks)
    batch, figures = make_batch(models, ids, answers, torch.rand(len(ids)).double(), tokenizer.eos_id, kl_coef, settings, ranks)
    return prompts, ids, answers, batch, figures


def test_the_first_ratio_is_one_on_every_micro_batch_that_is_trained_on(models, tokenizer, settings, ranks):
    *_, batch, figures = rollout(models, tokenizer, settings, ranks)
    seen = 0
    for rows in sum(deal(batch["targets"], settings, ranks), []):
        part = inputs, targets, old, advantages = take([batch[name] for name in ("inputs", "targets", "log_probs", "advantages")], rows)
        new = models.policy(inputs, targets, temperature=settings.temperature)
        assert (new - old).abs().max() < 1e-6
        loss, count, logs = policy_step_loss(models.policy, part, settings, 0.0)
        assert loss.item() == pytest.approx(-advantages.sum().item(), abs=1e-4) and logs["clipped"] == 0
        seen += count
    mask = batch["targets"] != IGNORE
    assert seen == mask.sum() and figures["kl"] == pytest.approx(0, abs=1e-6)
    advantages = batch["advantages"][mask]
    assert (advantages.mean().item(), advantages.std().item()) == pytest.approx((0, 1), abs=1e-4)


def test_the_log_probs_that_are_learned_from_are_those_the_samples_were_drawn_with(models, tokenizer, settings, ranks, folders):
    _, ids, answers, batch, _ = rollout(models, tokenizer, settings, ranks)
    plain, *_ = load_model(folders / "chat")
    for temperature, same in ((settings.temperature, True), (1.0, False)):
        drawn = generate(plain, ids, settings.max_new_tokens, temperature, top_p=1.0, stop=(EOS,), seed=1, log_probs=True)
        if same:  # a ragged batch with a cache, against the rows padded on the right that training reads
            assert [sample.tokens for sample in drawn] == answers
            log_probs = torch.cat([torch.tensor(sample.log_probs) for sample in drawn])
            assert torch.allclose(batch["log_probs"][batch["targets"] != IGNORE].float(), log_probs, atol=1e-4)
        else:  # at another temperature the same tokens have other log-probabilities
            other = at_every_place(models.policy, models.policy, (batch["inputs"], batch["targets"]), settings, ranks)
            assert (other - batch["log_probs"]).abs().max() > 0.1


def test_answers_are_drawn_not_greedy_and_depend_on_the_seed_alone(models, tokenizer, settings, ranks):
    prompts = prompts_at([], 1, settings)
    first, again, other = (sample_answers(models.policy, prompts, seed, tokenizer, settings, ranks)[1] for seed in (1, 1, 2))
    assert first == again and sum(a != b for a, b in zip(first, other)) > len(first) // 2


def test_nothing_is_dropped_out_in_any_of_the_five_models_and_three_of_them_are_frozen(models):
    for model in models:
        assert not any("Dropout" in type(module).__name__ for module in model.modules())
    assert [any(p.requires_grad for p in model.parameters()) for model in models] == [True, True, False, False, False]


def test_the_critic_is_the_helpfulness_models_trunk_under_a_head_of_zeros(models, settings, ranks):
    trunk, judge = dict(models.critic.named_parameters()), dict(models.helpfulness.named_parameters())
    assert all(torch.equal(trunk[name].full_tensor(), judge[name].full_tensor()) for name in trunk if "output" not in name)
    tokens = torch.randint(3, 400, (2, 9))
    assert (models.critic(tokens) == 0).all() and models.critic(tokens).shape == (2, 9)


def test_a_value_is_what_is_known_before_the_action_and_moves_with_no_later_token(models, settings, ranks):
    inputs, targets = align([[1, 7, 8], [1, 7, 8]], [[5, 6, EOS], [5, 9, EOS]])
    with torch.no_grad():
        models.critic.output.weight.to_local().normal_()
    values = at_every_place(models.critic, lambda inputs, _: models.critic(inputs), (inputs, targets), replace(settings, mini_batch=2), ranks)
    assert targets[:, 3].tolist() == [6, 9]  # the action that differs
    assert torch.allclose(values[0, :4], values[1, :4], atol=1e-5) and (values[0, 4] - values[1, 4]).abs() > 0.01


def test_optimizers_are_the_papers_adamw(models, settings):
    optimizer = adamw(models.policy, settings.weight_decay, settings.adam_eps)
    assert all((group["betas"], group["eps"]) == ((0.9, 0.95), 1e-5) for group in optimizer.param_groups)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0} and settings.grad_clip == 1.0


def test_presets_hold_the_papers_hyper_parameters():
    for name, kl_coef in (("7b", 0.01), ("13b", 0.01), ("34b", 0.005), ("70b", 0.005)):
        preset = Ppo.BY_PRESET[name]
        assert (preset["batch_size"], preset["mini_batch"], preset["lr"], preset["kl_coef"]) == (512, 64, 1e-6, kl_coef)
        assert 200 <= preset["steps"] <= 400
    assert (Ppo.clip, Ppo.lr_floor, Ppo.warmup, Ppo.adam_eps, Ppo.weight_decay, Ppo.whiten) == (0.2, 1.0, 0, 1e-5, 0.1, True)


def gradients(model, loss_fn, batch):
    loss, count, _ = loss_fn(model, batch)
    loss.backward()
    found = [p.grad.full_tensor().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return loss.item(), count.item(), found


@pytest.mark.parametrize("who", ["policy", "critic"])
def test_changing_anything_after_eos_changes_no_loss_and_no_gradient_of_a_model(models, tokenizer, settings, ranks, who):
    *_, batch, _ = rollout(models, tokenizer, settings, ranks)
    names = {"policy": ("log_probs", "advantages"), "critic": ("values", "returns")}[who]
    loss_fn = {"policy": partial(policy_step_loss, settings=settings, ptx_weight=0.0), "critic": partial(critic_step_loss, settings=settings)}[who]
    mask = batch["targets"] != IGNORE
    behind = ~mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    clean = [batch[name] for name in ("inputs", "targets", *names)]
    spoilt = [clean[0].where(~behind, 77), clean[1], *(x.where(mask, math.nan) for x in clean[2:])]
    model = getattr(models, who)
    loss, count, grads = gradients(model, loss_fn, clean)
    other_loss, other_count, other_grads = gradients(model, loss_fn, spoilt)
    assert behind.any() and (loss, count) == (other_loss, other_count) and all(map(torch.equal, grads, other_grads))
    assert any(grad.abs().max() > 0 for grad in grads)


def test_every_figure_is_over_real_tokens_so_that_wider_padding_changes_none(models, tokenizer, settings, ranks):
    _, ids, answers, batch, figures = rollout(models, tokenizer, settings, ranks)
    some = slice(0, 6)
    combined, one = torch.rand(6).double(), replace(settings, micro_batch=1)
    _, alone = make_batch(models, ids[some], answers[some], combined, EOS, 0.1, one, ranks)
    _, padded = make_batch(models, ids[some], answers[some], combined, EOS, 0.1, replace(settings, micro_batch=6), ranks)
    assert alone == pytest.approx(padded, abs=1e-5)
    lengths = [len(answer) for answer in answers]
    assert figures["length"] == pytest.approx(np.mean(lengths)) and figures["truncated"] == np.mean([a[-1] != EOS for a in answers])
    log_probs = batch["log_probs"][batch["targets"] != IGNORE]
    assert figures["entropy"] == pytest.approx(-log_probs.sum().item() / sum(lengths))


def test_the_combined_reward_reads_the_sampled_ids_and_takes_safety_where_the_prompt_is_tagged(models, tokenizer, settings, ranks, folders):
    prompts, ids, answers, *_ = rollout(models, tokenizer, settings, ranks)
    judges = {name: load_model(folders / name, RewardModel)[0] for name in ("helpfulness", "safety")}
    rows = [prompt + answer for prompt, answer in zip(ids, answers)]
    with torch.no_grad():
        r_h, r_s = ([sigmoid(judge(torch.tensor([row]), torch.tensor([len(row)])).item()) for row in rows] for judge in judges.values())
    by_hand = [s if prompt["unsafe"] or s < 0.15 else h for s, h, prompt in zip(r_s, r_h, prompts)]
    assert {prompt["unsafe"] for prompt in prompts} == {True, False}
    combined, figures = score_answers(models, prompts, ids, answers, 0.15, settings, ranks)
    assert combined.tolist() == pytest.approx(by_hand, abs=1e-5) and figures["R_h"] == pytest.approx(np.mean(r_h), abs=1e-5)
    helpful, _ = score_answers(models, prompts, ids, answers, 0.15, replace(settings, piecewise=False), ranks)
    assert helpful.tolist() == pytest.approx(r_h, abs=1e-5)


def learned_to_end(models, tokenizer, settings, ranks, kl_coef):
    """Iterations with random scores: there is nothing to learn but that an answer which is cut off gets -1."""
    optimizers = {name: adamw(getattr(models, name), 0.0, settings.adam_eps) for name in ("policy", "critic")}
    history = []
    for iteration in range(1, settings.steps + 1):
        *_, batch, figures = rollout(models, tokenizer, settings, ranks, kl_coef=kl_coef, iteration=iteration)
        history.append(figures | learn(models, optimizers, batch, iteration, None, settings, ranks, False))
    return history


def test_several_clipped_steps_on_each_batch_learn_to_end_an_answer_and_beta_holds_the_policy_back(models, tokenizer, settings, ranks):
    settings = replace(settings, lr=3e-3, critic_lr=3e-3, batch_size=48, mini_batch=12, micro_batch=12, temperature=1.0, steps=12)
    free = learned_to_end(models, tokenizer, settings, ranks, kl_coef=0.0)
    assert free[0]["truncated"] > 0.8 and free[-1]["truncated"] < 0.5
    assert free[0]["clipped/policy"] > 0
    held = learned_to_end(load_models(settings, ranks), tokenizer, settings, ranks, kl_coef=3.0)
    assert abs(held[-1]["kl"]) < free[-1]["kl"] / 3


def test_of_answers_that_all_score_alike_nothing_is_learned_and_no_number_is_lost(models, tokenizer, settings, ranks):
    before = [p.detach().clone() for p in models.policy.parameters()]
    prompts = prompts_at([], 1, settings)
    ids, answers = sample_answers(models.policy, prompts, 1, tokenizer, settings, ranks)
    answers = [answer[:-1] + [tokenizer.eos_id] for answer in answers]  # all end
    batch, _ = make_batch(models, ids, answers, torch.full((len(ids),), 0.7).double(), tokenizer.eos_id, 0.0, settings, ranks)
    assert not batch["advantages"].any() and all(x.isfinite().all() for x in batch.values())
    optimizers = {name: adamw(model, 0.0) for name, model in (("policy", models.policy), ("critic", models.critic))}
    figures = learn(models, optimizers, batch, 1, None, settings, ranks, False)
    assert figures["finite/policy"] == figures["finite/critic"] == 1
    assert all(map(torch.equal, before, models.policy.parameters()))


def test_an_overlong_prompt_loses_its_beginning_so_that_its_answer_has_room(models, tokenizer, settings, ranks):
    prompt = {"prompt": "Is 7 even? " * 900, "unsafe": False}
    ids, answers = sample_answers(models.policy, [prompt] * 2, 1, tokenizer, settings, ranks)
    whole = tokenizer.encode_dialog([{"role": "user", "content": prompt["prompt"]}])[0]
    assert all(one == whole[-len(one):] and len(one) + len(answer) <= settings.seq_len for one, answer in zip(ids, answers))


def test_the_critic_learns_alone_first_and_the_policy_does_not_move(models, tokenizer, settings, ranks):
    before = [p.full_tensor().clone() for p in models.policy.parameters()]
    optimizers = {name: adamw(getattr(models, name), 0.1) for name in ("policy", "critic")}
    *_, batch, _ = rollout(models, tokenizer, settings, ranks)
    settings = replace(settings, critic_warmup=1, critic_lr=3e-3)
    learned = [learn(models, optimizers, batch, 1, None, settings, ranks, False) for _ in range(4)]
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(models.policy.parameters(), before))
    assert learned[-1]["loss/critic"] < 0.9 * learned[0]["loss/critic"] and "loss/policy" not in learned[0]


def test_text_beside_the_answers_adds_its_mean_loss_times_the_coefficient(models, tokenizer, settings, ranks):
    *_, batch, _ = rollout(models, tokenizer, settings, ranks)
    answers, text = [batch[name] for name in ("inputs", "targets", "log_probs", "advantages")], torch.randint(3, 400, (4, 81))
    text = [text[:, :-1], text[:, 1:].contiguous()]
    n = (answers[1] != IGNORE).sum()
    weight = 0.5 * n.item() / text[1].numel()
    found = [policy_step_loss(models.policy, part, settings, weight) for part in (answers, text)]
    mean = sum(loss for loss, _, _ in found) / sum(count for _, count, _ in found)
    wanted = found[0][0] / n - 0.5 * models.policy(*text).mean()
    assert mean.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_share_every_row_once_and_do_equally_many_passes(settings, world_size):
    _, targets = align([[1]] * 12, [[5] * (i % 5) + [EOS] for i in range(12)])
    of_ranks = [deal(targets, settings, pretrain.Ranks(rank, world_size, None, None, 1)) for rank in range(world_size)]
    for mini in range(2):
        assert len({len(dealt[mini]) for dealt in of_ranks}) == 1
        rows = torch.cat([rows for dealt in of_ranks for rows in dealt[mini]])
        assert sorted(rows.tolist()) == list(range(6 * mini, 6 * mini + 6))
    empty = take((targets, targets, targets), torch.tensor([], dtype=torch.long))
    assert (empty[1] == IGNORE).all() and len(empty[0]) == 1


# ---- whole runs


def launch(*flags, n=1):
    """Run rlhf.py as a user would: with python, or over n ranks with torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    return subprocess.run([sys.executable, *torchrun, str(HERE / "rlhf.py"), "ppo", *map(str, flags)], capture_output=True, text=True,
                          timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_one_and_two_ranks_make_the_same_run_and_the_report_shows_it(tmp_path, folders):
    runs = []
    for n in (1, 2):  # mini-batches of three micro-batches: one of two ranks has nothing left to do
        more = ["--steps", "4", "--eval_every", "2", "--save_every", "2", "--critic_warmup", "1", "--lr", "1e-3", "--patience", "9"]
        result = launch(*flags(folders, tmp_path / str(n), *more), n=n)
        assert result.returncode == 0, result.stderr[-3000:]
        runs.append(metrics(tmp_path / str(n)))
    clocks = {"seconds", "seconds/sampling", "seconds/scoring", "seconds/training"}
    for one, two in zip(*runs):
        assert {k: v for k, v in two.items() if k not in clocks} == pytest.approx({k: v for k, v in one.items() if k not in clocks}, abs=1e-4)
    last = runs[0][-1]
    assert last["step"] == 4 and {"reward", "R_s", "R_h", "kl", "kl_k3", "entropy", "clipped/policy", "explained_variance", "length",
                                  "truncated", "true/helpfulness", "true/safety", *clocks} <= set(last)
    assert (tmp_path / "1" / "ppo.png").exists()
    best, *_ = load_model(tmp_path / "1")
    rewards = {row["step"]: row["held-out/reward"] for row in runs[0] if "held-out/reward" in row}
    kept = max(rewards, key=rewards.get)
    assert f"of iteration {kept}," in result.stdout
    moved = any(not torch.equal(a, b) for a, b in zip(best.parameters(), load_model(folders / "chat")[0].parameters()))
    assert moved == (kept > 1)  # in the first iteration the critic learned alone
    report(Report((str(tmp_path),)))
    page = (tmp_path / "report.html").read_text()
    assert "PPO" in page and f"{rewards[0]:.3f}" in page and page.count("<img") == 2


def test_a_run_that_gets_no_better_stops_early_and_leaves_the_model_that_it_began_with(tmp_path, folders):
    more = ["--steps", "9", "--eval_every", "1", "--patience", "2", "--lr", "1e-12", "--critic_warmup", "0"]
    result = launch(*flags(folders, tmp_path / "run", *more))
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]
    model, start = load_model(tmp_path / "run")[0], load_model(folders / "chat")[0]
    assert all(map(torch.equal, model.parameters(), start.parameters()))
    assert parent_of(str(tmp_path / "run")).config == start.config
    again = launch(*flags(folders, tmp_path / "run", *more))
    assert again.returncode == 0 and len(metrics(tmp_path / "run")) == 3


def test_prompts_come_from_a_file_epoch_by_epoch_each_once_and_some_are_held_out(tmp_path, folders):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Is {i} even?", "unsafe": i % 3 == 0}) + "\n" for i in range(80)))
    settings = parse(Ppo, flags(folders, tmp_path / "run", "--prompts", file))
    found, held = load_prompts(settings)
    asked = [prompt["prompt"] for iteration in range(1, 30) for prompt in prompts_at(found, iteration, settings)]
    epochs = [asked[i : i + len(found)] for i in range(0, len(asked) - len(found), len(found))]
    assert all(sorted(epoch) == sorted(prompt["prompt"] for prompt in found) for epoch in epochs) and epochs[0] != epochs[1]
    assert held and not {prompt["prompt"] for prompt in held} & set(asked)
    result = launch(*flags(folders, tmp_path / "run", "--prompts", file, "--steps", "1", "--no-piecewise", "--no-whiten", "--kl_coef", "0",
                           "--critic_warmup", "0"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "true/helpfulness" not in metrics(tmp_path / "run")[-1]


@pytest.mark.parametrize("more, words", [
    (["--mini_batch", "5"], "multiple of --mini_batch"), (["--kl_coef", "-1"], "--kl_coef must not be below 0"), (["--temperature", "0"], "--temperature above 0"),
    (["--seq_len", "500"], "160, the shortest context of the models"), (["--max_new_tokens", "80"], "--max_new_tokens 80"),
    (["--harmlessness", "nowhere"], "nowhere"), (["--prompts", "nowhere.jsonl"], "nowhere.jsonl")])
def test_bad_input_is_one_sentence(folders, tmp_path, more, words):
    with pytest.raises(InputError, match=words):
        ppo(parse(Ppo, flags(folders, tmp_path / "run", *more)))
