"""Weights in and out: Meta's release, Hugging Face folders, pooled key and value heads; transformers is the oracle."""
import json
import math
import os
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from model import (PRESETS, ModelConfig, ModelError, Transformer, count_parameters, generate, hf_name, load_hf, load_meta,
                   load_weights, main, meta_weights, pool_kv_heads, reader, save_hf)
from pretrain import InputError, Settings, ablated, parse
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


def pooled_to(model, n_kv_heads, how="mean"):
    """The model with fewer key and value heads."""
    return load_weights(*pool_kv_heads(model.config, reader(model), n_kv_heads, how))


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


def spoil(file, how):
    """Damage a file of weights, safetensors or torch's."""
    read, write = (safetensors_of, save_safetensors) if file.suffix == ".safetensors" else (torch.load, torch.save)
    changes = {
        "wrong shape": lambda w: {name: p[..., :-1].clone() for name, p in w.items()},
        "no norm": lambda w: {name: p for name, p in w.items() if not name.endswith("norm.weight")},
        "int8": lambda w: {name: p.to(torch.int8) for name, p in w.items()},
        "float8": lambda w: {name: p.to(torch.float8_e4m3fn) for name, p in w.items()},
        "a bias": lambda w: w | {"output.bias": torch.zeros(64)},
        "scales": lambda w: w | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
        "a list": lambda w: list(w.values()),
        "numbers": lambda w: dict.fromkeys(w, 1.0),
        "code": lambda w: w | {"norm.weight": Evil(file.parent / "pwned")},
    }
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-999])
    elif how == "absurd header":
        file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    elif how == "missing":
        file.unlink()
    else:
        write(changes[how](read(file)), file)


def safetensors_of(file):
    return pytest.importorskip("safetensors.torch").load_file(file)


def save_safetensors(tensors, file):
    pytest.importorskip("safetensors.torch").save_file(tensors, file)


SETTINGS = {  # a change of params.json and config.json → what the sentence must name
    "no width": ({"dim": None, "hidden_size": None}, "dim|hidden_size"), "text": ({"n_heads": "many", "num_attention_heads": "many"}, "heads is 'many'"),
    "a list": ({"n_kv_heads": [8], "num_key_value_heads": [8]}, "heads is"), "half a layer": ({"n_layers": 1.5, "num_hidden_layers": 1.5}, "layers is 1.5"),
    "true": ({"n_layers": True, "num_hidden_layers": True}, "layers is True"), "no heads": ({"n_heads": 0, "num_attention_heads": 0}, "heads is 0"),
    "cut": ({"n_layers": 1, "num_hidden_layers": 1}, "2 layers, not 1"), "absurd": ({"n_layers": 10**7, "num_hidden_layers": 10**7}, "layers is 10000000"),
    "more absurd": ({"n_layers": 10**9, "num_hidden_layers": 10**9}, "layers is 1000000000"),
    "epsilon": ({"norm_eps": math.nan, "rms_norm_eps": math.nan}, "eps is nan"), "negative": ({"rope_theta": -1}, "theta is -1"),
    "infinite": ({"rope_theta": math.inf}, "theta is inf"), "zero": ({"norm_eps": 0, "rms_norm_eps": 0.0}, "eps is 0"),
    "scaled": ({"use_scaled_rope": True, "rope_scaling": {"type": "linear", "factor": 2}}, "rotary"),
}
HF_SETTINGS = {
    "head size": ({"head_dim": 5}, "5"), "other model": ({"model_type": "mistral", "hidden_size": None}, "mistral"), "bias": ({"attention_bias": True}, "bias"),
    "activation": ({"hidden_act": "gelu"}, "gelu"), "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "wide": ({"intermediate_size": 40}, "shape"), "text": ({"rope_parameters": "yarn"}, "rotary"), "no vocabulary": ({"vocab_size": None}, "vocab_size"),
}


def change(file, values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


META = ModelConfig(64, 2, 8, 8, 48, vocab_size=64)


@pytest.mark.parametrize("how", ["cut short", "missing", "code", "wrong shape", "no norm", "int8", "float8", "a bias", "a list", "numbers"])
@pytest.mark.parametrize("shard", [0, 1])
def test_a_spoilt_release_is_refused_with_a_sentence_and_runs_nothing(tmp_path, how, shard):
    write_meta(loud(META), tmp_path / "meta", 2)
    spoil(tmp_path / "meta" / f"consolidated.{shard:02d}.pth", how)
    with pytest.raises(ModelError, match="meta"):
        load_meta(tmp_path / "meta")
    assert not (tmp_path / "meta" / "pwned").exists()


@pytest.mark.parametrize("changes, named", SETTINGS.values(), ids=SETTINGS)
def test_params_that_make_no_llama_2_are_refused_with_a_sentence_that_names_them(tmp_path, changes, named):
    write_meta(loud(META), tmp_path / "meta", 2)
    change(tmp_path / "meta" / "params.json", changes)
    with pytest.raises(ModelError, match=f"meta.*({named})"):
        load_meta(tmp_path / "meta")


def write_bin(model, folder):
    """A Hugging Face folder as it was before safetensors."""
    save_hf(model, folder)
    torch.save(safetensors_of(folder / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_folder_with_torch_files_is_read_like_one_with_safetensors(tmp_path):
    model = loud(shape("GQA"))
    write_bin(model, tmp_path / "hf")
    assert same(load_hf(tmp_path / "hf"), model)


@pytest.mark.parametrize("how", ["cut short", "absurd header", "missing", "wrong shape", "no norm", "int8", "float8", "scales"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_spoilt_hugging_face_folder_is_refused_with_a_sentence_and_runs_nothing(tmp_path, file, how):
    pytest.importorskip("safetensors")
    (save_hf if file == "model.safetensors" else write_bin)(loud(shape("GQA")), tmp_path / "hf")
    spoil(tmp_path / "hf" / file, how)
    with pytest.raises(ModelError, match="hf"):
        load_hf(tmp_path / "hf")


def test_a_torch_file_of_a_hugging_face_folder_runs_nothing(tmp_path):
    pytest.importorskip("safetensors")
    write_bin(loud(shape("GQA")), tmp_path / "hf")
    spoil(tmp_path / "hf" / "pytorch_model.bin", "code")
    with pytest.raises(ModelError, match="weights alone"):
        load_hf(tmp_path / "hf")
    assert not (tmp_path / "hf" / "pwned").exists()


@pytest.mark.parametrize("changes, named", (SETTINGS | {f"hf {k}": v for k, v in HF_SETTINGS.items()}).values(), ids=[*SETTINGS, *(f"hf {k}" for k in HF_SETTINGS)])
def test_a_config_that_makes_no_llama_2_is_refused_with_a_sentence_that_names_it(tmp_path, changes, named):
    pytest.importorskip("safetensors")
    save_hf(loud(shape("GQA")), tmp_path / "hf")
    change(tmp_path / "hf" / "config.json", changes)
    with pytest.raises(ModelError, match=f"hf.*({named})"):
        load_hf(tmp_path / "hf")


@pytest.mark.parametrize("index", [{}, {"weight_map": ["model.safetensors"]}, {"weight_map": {"x": 1}}, {"weight_map": {"x": "../../etc/passwd"}},
                                   {"weight_map": {"x": "gone.safetensors"}}, {"weight_map": {}}, []])
def test_an_index_that_names_no_files_of_its_folder_is_refused_with_a_sentence(tmp_path, index):
    pytest.importorskip("safetensors")
    save_hf(loud(shape("GQA")), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="hf"):
        load_hf(tmp_path / "hf")


def test_an_untied_model_without_an_output_matrix_is_refused(tmp_path):
    save_hf(loud(shape("GQA")), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    save_safetensors({name: p.clone() for name, p in safetensors_of(file).items() if name != "lm_head.weight"}, file)
    with pytest.raises(ModelError, match="lm_head"):
        load_hf(tmp_path / "hf")
    change(tmp_path / "hf" / "config.json", {"tie_word_embeddings": True})
    assert torch.equal(load_hf(tmp_path / "hf").output.weight, loud(shape("GQA")).tok_embeddings.weight)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_weights_keep_their_type_or_get_the_one_that_is_asked_for(tmp_path, dtype):
    model = loud(shape("GQA")).bfloat16()
    save_hf(model, tmp_path / "hf", dtype)
    stored = safetensors_of(tmp_path / "hf" / "model.safetensors")
    assert {w.dtype for w in stored.values()} == {dtype or torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == str(dtype or torch.bfloat16).removeprefix("torch.")
    assert same(load_hf(tmp_path / "hf", torch.bfloat16), model)
    with pytest.raises(ModelError, match="there already"):
        save_hf(model, tmp_path / "hf")


def test_llama_cpps_converter_knows_every_name_and_finds_every_setting_that_it_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = loud(shape("GQA"))
    save_hf(model, tmp_path / "hf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.n_layers)
    mapped = [names.get_name(name, try_suffixes=(".weight",)) for name in safetensors_of(tmp_path / "hf" / "model.safetensors")]
    assert None not in mapped and len(set(mapped)) == len(list(model.parameters()))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps",
            "rope_theta", "max_position_embeddings", "vocab_size"} <= set(config)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_pooled_heads_are_the_means_of_their_groups(n_kv_heads):
    model = loud(shape("MHA"))
    pooled = pooled_to(model, n_kv_heads)
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
        torch.testing.assert_close(pooled_to(model, 2, how)(tokens), model(tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(pooled_to(model, 2, "random")(tokens), model(tokens), atol=1e-2)
    with pytest.raises(ModelError, match="3"):
        pooled_to(model, 3)


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=1500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def model_py(monkeypatch, capsys, *argv):
    """What `python model.py ARGV` prints."""
    monkeypatch.setattr(sys, "argv", ["model.py", *map(str, argv)])
    main()
    return capsys.readouterr().out


def test_the_command_line_converts_generates_and_trains_on(tmp_path, monkeypatch, capsys):
    Tokenizer.train(["the fox has eggs. " * 30, "a hen likes the fox."], str(tmp_path / "tokenizer.model"), 300)
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.model"))
    model = loud(ModelConfig(32, 2, 4, 4, 48, vocab_size=300, max_seq_len=4096)).bfloat16()  # Meta's params.json leaves 4096 open
    write_meta(model, tmp_path / "meta", 2)
    (tmp_path / "meta" / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    model_py(monkeypatch, capsys, "convert", tmp_path / "meta", tmp_path / "hf", "--to", "hf")
    assert same(load_hf(tmp_path / "hf", torch.bfloat16), model)

    result = run("model.py", "convert", tmp_path / "hf", tmp_path / "gqa", "--to", "ours", "--n_kv_heads", "2")
    assert result.returncode == 0, result.stderr
    model_py(monkeypatch, capsys, "convert", tmp_path / "gqa", tmp_path / "pooled", "--to", "hf", "--dtype", "bf16")
    assert same(load_hf(tmp_path / "pooled", torch.bfloat16), pooled_to(model, 2).bfloat16())

    prompt = tokenizer.encode("the fox", bos=True, eos=False)
    for folder in ("hf", "gqa"):
        new = generate(load_hf(tmp_path / ("hf" if folder == "hf" else "pooled")), [prompt], 5, stop=(2,))[0]
        whole = model_py(monkeypatch, capsys, "generate", tmp_path / folder, "--prompt", "the fox", "--max_new_tokens", "5")
        assert whole == tokenizer.decode(prompt + new) + "\n"  # with the space between prompt and answer

    (tmp_path / "farm.jsonl").write_text('{"text": "the fox has eggs. the hen likes eggs."}\n' * 200)
    for parent, n_kv_heads in (("gqa", 2), ("hf", 4)):
        out = tmp_path / f"up-{parent}"
        result = run("pretrain.py", "--init", tmp_path / parent, "--data", tmp_path / "farm.jsonl", "--out", out, "--steps", "2", "--lr", "1e-9",
                     "--seq_len", "16", "--batch_size", "2", "--sample_tokens", "0", "--device", "cpu", "--threads", "1")
        assert result.returncode == 0, result.stderr
        config = json.loads((out / "config.json").read_text())["model"]
        assert config == asdict(replace(model.config, n_kv_heads=n_kv_heads))
        before, *_, after = [json.loads(line)["loss/farm"] for line in (out / "metrics.jsonl").read_text().splitlines() if "loss/farm" in line]
        assert before == pytest.approx(after, abs=1e-4) and before > 1 and "before the first step" in result.stdout

    result = run("model.py", "generate", tmp_path / "hf", "--prompt", "the " * 5000)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("model.py: "), result.stderr
    with pytest.raises(ModelError, match="nowhere"):
        model_py(monkeypatch, capsys, "convert", tmp_path / "nowhere", tmp_path / "x", "--to", "hf")


def test_the_paper_widens_the_feed_forward_layer_so_that_grouped_and_multi_query_attention_cost_no_parameters():
    mha = ablated(PRESETS["34b"], 64, None)
    mqa, gqa = (count_parameters(ablated(mha, *change)) for change in ((1, 1.33), (8, 1.3)))  # A.2.1
    assert gqa == pytest.approx(mqa, rel=0.005) and mqa == pytest.approx(count_parameters(mha), rel=0.07)
    settings = parse(Settings, ["--n_kv_heads", "1", "--ffn_multiplier", "1.33"])
    assert ablated(PRESETS["toy"], settings.n_kv_heads, settings.ffn_multiplier) == replace(PRESETS["toy"], n_kv_heads=1, ffn_hidden=468)
    assert ablated(PRESETS["toy"], None, None) == PRESETS["toy"]
    with pytest.raises(InputError, match="--ffn_multiplier"):
        parse(Settings, ["--ffn_multiplier", "nan"])
