"""On a GPU everything is what it is on the CPU, in fp32 to rounding and in bf16 to 1 %. Without a GPU these tests are skipped."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import ModelConfig, Transformer, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CONFIG = ModelConfig(dim=128, n_layers=3, n_heads=4, n_kv_heads=2, ffn_hidden=352, vocab_size=500, max_seq_len=128)


def twins(config: ModelConfig = CONFIG) -> tuple[Transformer, Transformer]:
    """The same model on the CPU and on the GPU, with larger weights than a new one's, so that tokens depend on the past."""
    here, there = Transformer(config), Transformer(config).cuda()
    with torch.no_grad():
        for p in here.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    there.load_state_dict(here.state_dict())
    return here.eval(), there.eval()


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_and_gradients_are_those_of_the_cpu(n_kv_heads, compiled):
    here, there = twins(replace(CONFIG, n_kv_heads=n_kv_heads))
    tokens = torch.randint(500, (4, 97))
    documents = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([20, 45, 31])).expand(4, 96)
    if compiled:
        there.compiled = True
        for block in there.layers:
            block.compile()
    for packed in (None, documents):
        expected = here(tokens[:, :-1], tokens[:, 1:], packed)
        found = there(*(None if x is None else x.cuda() for x in (tokens[:, :-1], tokens[:, 1:], packed)))
        torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
        for model, log_probs in ((here, expected), (there, found)):
            model.zero_grad()
            log_probs.mean().backward()
        for mine, theirs in zip(there.parameters(), here.parameters()):
            assert (mine.grad.cpu() - theirs.grad).norm() <= 1e-3 * theirs.grad.norm()


def test_bf16_changes_the_mean_loss_by_less_than_1_percent():
    here, there = twins()
    tokens = torch.randint(500, (8, 97))
    with torch.no_grad():
        expected = here(tokens[:, :-1], tokens[:, 1:]).mean()
        found = there.to(torch.bfloat16)(tokens[:, :-1].cuda(), tokens[:, 1:].cuda()).mean()
    assert abs(found.item() - expected.item()) < 0.01 * abs(expected.item())


@pytest.mark.parametrize("lengths", [[7, 7, 7, 7], [3, 20, 9, 14]])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_sampling_by_cuda_graphs_draws_the_tokens_of_the_cpu(lengths, temperature):
    here, there = twins()
    prompts = [torch.randint(500, (n,)).tolist() for n in lengths]
    drawn = [generate(model, prompts, 60, temperature, 0.9, stop=range(8), seed=3, n_samples=6, log_probs=True)
             for model in (here, there)]
    assert len({len(one.tokens) for one in drawn[0]}) > 5 or not temperature  # rows left the batch at many times
    assert [one.tokens for one in drawn[0]] == [one.tokens for one in drawn[1]]
    for mine, theirs in zip(*drawn):
        assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-3)


def test_pretraining_from_one_parent_has_the_losses_of_the_cpu(tmp_path):
    root, losses = Path(__file__).resolve().parent.parent, {}

    def pretrain(out: str, *flags: str) -> None:
        subprocess.run([sys.executable, root / "pretrain.py", "--data", "toy/stories", "--out", out, "--sample_tokens", "0", *flags],
                       cwd=tmp_path, check=True, capture_output=True)

    pretrain("parent", "--steps", "5", "--device", "cpu")
    for name, *flags in [("cpu", "--device", "cpu"), ("fp32", "--dtype", "fp32"), ("bf16", "--compile")]:
        pretrain(name, "--init", "parent", "--steps", "20", *flags)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = torch.tensor([loss for line in lines if (loss := json.loads(line)["loss"]) is not None])
    torch.testing.assert_close(losses["fp32"], losses["cpu"], atol=1e-3, rtol=0)
    torch.testing.assert_close(losses["bf16"], losses["cpu"], atol=0, rtol=0.01)
