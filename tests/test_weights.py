"""Weights in and out: Meta's release, Hugging Face folders, pooled key and value heads; transformers is the oracle."""
import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from model import (ModelConfig, ModelError, Transformer, generate, hf_name, load_hf, load_meta, mean_pool_kv_heads, meta_weights, save_hf)
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent.parent
SHAPES = {"MHA": (4, 4, 48), "GQA": (4, 2, 48), "MQA": (4, 1, 48), "odd FFN": (2, 2, 27)}


def shape(name):
    n_heads, n_kv_heads, ffn_hidden = SHAPES[name]
    return ModelConfig(32, 2, n_heads, n_kv_heads, ffn_hidden, vocab_size=61, max_seq_len=64, rope_theta=5000.0)


def loud(config, seed=0):
    model = Transformer(config, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6) if p.ndim > 1 else p.uniform_(0.5, 1.5)
    return model


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_our_logits_from_what_we_write_and_we_read_it_back(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    ours = loud(shape(name))
    save_hf(ours, tmp_path / "hf", max_bytes=20_000)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(61, (2, 20))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=0)
    assert same(load_hf(tmp_path / "hf"), ours) and load_hf(tmp_path / "hf").config == ours.config
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {hf_name(n) for n, _ in ours.named_parameters()} == set(theirs.state_dict())
    assert len(set(index["weight_map"].values())) > 2  # sharded


@pytest.mark.parametrize("name, tied", [("MHA", False), ("GQA", True), ("MQA", False)])
def test_we_compute_the_logits_of_a_model_that_transformers_wrote(tmp_path, name, tied):
    transformers = pytest.importorskip("transformers")
    n_heads, n_kv_heads, ffn_hidden = SHAPES[name]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, intermediate_size=ffn_hidden,
        vocab_size=61, max_position_embeddings=64, rope_theta=777.0, tie_word_embeddings=tied, initializer_range=0.2))
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    assert ours.config.rope_theta == 777.0
    tokens = torch.randint(61, (2, 20))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def write_meta(model, folder, n_shards, **params):
    """Meta's release by hand: n_shards files, columns and rows cut as their model-parallel layers cut them."""
    folder.mkdir()
    for i in range(n_shards):
        shard = {"rope.freqs": torch.zeros(4)}
        for name, p in model.state_dict().items():
            dim = 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0
            shard[name] = p if p.ndim == 1 else p.chunk(n_shards, dim)[i].clone()
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    c = model.config
    released = {"dim": c.dim, "multiple_of": 256, "n_heads": c.n_heads, "n_layers": c.n_layers, "norm_eps": c.norm_eps, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(released | params))


@pytest.mark.parametrize("n_shards", [1, 2, 8])
def test_meta_shards_of_any_number_give_the_same_weights(tmp_path, n_shards):
    model = loud(ModelConfig(64, 2, 8, 8, 48, vocab_size=64, max_seq_len=4096))
    write_meta(model, tmp_path / "meta", n_shards)
    loaded = load_meta(tmp_path / "meta")
    assert same(loaded, model) and loaded.config == model.config


def test_grouped_heads_and_a_feed_forward_of_any_width_come_from_params_and_weights(tmp_path):
    model = loud(ModelConfig(64, 1, 8, 2, 80, vocab_size=64, max_seq_len=4096))
    write_meta(model, tmp_path / "meta", 2, n_kv_heads=2, ffn_dim_multiplier=1.3, multiple_of=4096)
    assert load_meta(tmp_path / "meta").config == model.config and same(load_meta(tmp_path / "meta"), model)


def test_weights_are_read_one_parameter_at_a_time(tmp_path):
    model = loud(shape("GQA"))
    write_meta(model, tmp_path / "meta", 1, n_kv_heads=2)
    _, weight_of = meta_weights(tmp_path / "meta")
    assert torch.equal(weight_of("norm.weight", (32,)), model.norm.weight)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def spoil_meta(folder, how):
    file = folder / "consolidated.01.pth"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:999])
    elif how == "missing shard":
        (folder / "consolidated.00.pth").unlink()
    elif how == "last shard missing":
        file.unlink()
    elif how == "code":
        torch.save({"norm.weight": Evil(folder / "pwned")}, file)
    elif how == "wrong shape":
        torch.save({name: p[..., :-1] for name, p in torch.load(file).items()}, file)
    elif how == "no name":
        torch.save({name: p for name, p in torch.load(file).items() if "norm" not in name}, file)
    elif how == "params":
        (folder / "params.json").write_text("{")


@pytest.mark.parametrize("how", ["truncated", "missing shard", "last shard missing", "code", "wrong shape", "no name", "params"])
def test_a_spoilt_release_is_refused_with_a_sentence_and_runs_nothing(tmp_path, how):
    write_meta(loud(ModelConfig(64, 1, 8, 8, 48, vocab_size=64)), tmp_path / "meta", 2)
    spoil_meta(tmp_path / "meta", how)
    with pytest.raises(ModelError, match="meta"):
        load_meta(tmp_path / "meta")
    assert not (tmp_path / "meta" / "pwned").exists()


def spoil_hf(folder, how):
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "absurd header":
        file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    elif how == "missing":
        file.unlink()
    changes = {"head_dim": {"head_dim": 5}, "other model": {"model_type": "mistral"}, "scaled": {"rope_scaling": {"type": "linear", "factor": 2}},
               "bias": {"attention_bias": True}, "wrong shape": {"intermediate_size": 40}}
    (folder / "config.json").write_text(json.dumps(config | changes.get(how, {})))
    if how == "elsewhere":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))


@pytest.mark.parametrize("how", ["truncated", "absurd header", "missing", "head_dim", "other model", "scaled", "bias", "wrong shape", "elsewhere"])
def test_a_hugging_face_folder_that_is_no_llama_2_is_refused_with_a_sentence(tmp_path, how):
    pytest.importorskip("safetensors")
    save_hf(loud(shape("GQA")), tmp_path / "hf")
    spoil_hf(tmp_path / "hf", how)
    with pytest.raises(ModelError):
        load_hf(tmp_path / "hf")


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_pooled_heads_are_the_means_of_their_groups(n_kv_heads):
    model = loud(shape("MHA"))
    pooled = mean_pool_kv_heads(model, n_kv_heads)
    weight = model.layers[1].attention.wk.weight
    for group in range(n_kv_heads):
        size = 4 // n_kv_heads
        mean = sum(weight[8 * (group * size + i) : 8 * (group * size + i + 1)] for i in range(size)) / size
        torch.testing.assert_close(pooled.layers[1].attention.wk.weight[8 * group : 8 * group + 8], mean)
    assert pooled.config == replace(model.config, n_kv_heads=n_kv_heads)


def test_pooling_equal_heads_changes_no_logit_and_first_takes_the_first():
    model = loud(shape("MHA"))
    with torch.no_grad():
        for block in model.layers:
            for p in (block.attention.wk.weight, block.attention.wv.weight):
                p.view(2, 2, 8, 32)[:, 1] = p.view(2, 2, 8, 32)[:, 0]
    tokens = torch.randint(61, (2, 9))
    for how in ("mean", "first"):
        torch.testing.assert_close(mean_pool_kv_heads(model, 2, how)(tokens), model(tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mean_pool_kv_heads(model, 2, "random")(tokens), model(tokens), atol=1e-2)
    with pytest.raises(ModelError, match="3"):
        mean_pool_kv_heads(model, 3)


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=1500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_command_line_converts_generates_and_trains_on(tmp_path):
    Tokenizer.train(["the fox has eggs. " * 30, "a hen likes the fox."], str(tmp_path / "tokenizer.model"), 300)
    model = loud(ModelConfig(32, 2, 4, 4, 48, vocab_size=300, max_seq_len=64))
    write_meta(model, tmp_path / "meta", 1)
    (tmp_path / "meta" / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    for command in (["convert", tmp_path / "meta", tmp_path / "hf", "--to", "hf"],
                    ["convert", tmp_path / "hf", tmp_path / "gqa", "--to", "ours", "--n_kv_heads", "2"]):
        result = run("model.py", *command)
        assert result.returncode == 0, result.stderr
    result = run("model.py", "generate", tmp_path / "gqa", "--prompt", "the fox", "--max_new_tokens", "5")
    assert result.returncode == 0, result.stderr
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.model"))
    prompt = tokenizer.encode("the fox", bos=True, eos=False)
    new = generate(load_hf(tmp_path / "hf"), [prompt], 5, stop=(2,))[0]
    whole = run("model.py", "generate", tmp_path / "hf", "--prompt", "the fox", "--max_new_tokens", "5").stdout
    assert whole == tokenizer.decode(prompt + new) + "\n"  # with the space between prompt and answer
    (tmp_path / "farm.txt").write_text("the fox has eggs. the hen likes eggs.\n\n" * 50)
    for parent, n_kv_heads in (("gqa", 2), ("hf", 4)):
        result = run("pretrain.py", "--init", tmp_path / parent, "--data", tmp_path / "farm.txt", "--out", tmp_path / f"up-{parent}", "--steps", "2",
                     "--seq_len", "16", "--batch_size", "2", "--sample_tokens", "0", "--device", "cpu", "--threads", "1")
        assert result.returncode == 0, result.stderr
        config = json.loads((tmp_path / f"up-{parent}" / "config.json").read_text())["model"]
        assert config == asdict(replace(model.config, n_kv_heads=n_kv_heads, max_seq_len=4096))  # what Meta's params.json leaves open
    for command in (["convert", tmp_path / "nowhere", tmp_path / "x", "--to", "hf"], ["generate", tmp_path / "hf", "--prompt", "the " * 5000]):
        result = run("model.py", *command)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("model.py: "), result.stderr
