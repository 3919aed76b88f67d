"""Short trainings of one tiny model, run by test_pretrain.py alone and under torchrun: over_ranks.py TEXT_FILE OUT."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.distributed.device_mesh import init_device_mesh

from model import ModelConfig
from pretrain import Mixture, Settings, adamw, build, lm_loss, open_run, parse, prepare, rank_0_first, start, text_sources, train


def losses_of(ranks, out, *flags):
    """Train 200 steps; the losses are then in OUT/metrics.jsonl."""
    settings = parse(Settings, ["--preset", "toy-s", "--data", f"{sys.argv[1]}:9", "--out", out, "--steps", "200", "--lr", "5e-4",
                                "--seq_len", "16", "--batch_size", "4", "--micro_batch", "1", "--vocab_size", "320", *flags])
    open_run(settings, "pretrain", ranks)
    folder, index = prepare(text_sources(settings), settings, ranks)
    with rank_0_first(ranks):
        mixture = Mixture([(folder / part, 9) for part in index["farm"]["parts"]], settings.seq_len, 0, 2, 320, folder)
    config = ModelConfig(dim=30, n_layers=1, n_heads=3, n_kv_heads=1, ffn_hidden=50, vocab_size=320, max_seq_len=16)
    # 30 and 50 do not divide by 4: shards are of unequal size
    model = build(config, settings, ranks)
    batch_at = lambda step: mixture.batch_at(step, settings.batch_size, settings.micro_batch, ranks)  # noqa: E731
    train(model, adamw(model, 0.1), batch_at, lm_loss, settings, ranks, settings.steps)


if __name__ == "__main__":
    ranks = start(parse(Settings, ["--device", "cpu", "--threads", "1"]))
    for dtype in ("fp32", "bf16"):
        losses_of(ranks, f"{sys.argv[2]}/{dtype}", "--dtype", dtype)
    if ranks.world_size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        losses_of(ranks._replace(mesh=mesh), f"{sys.argv[2]}/replicas", "--dtype", "fp32", "--replicas", "2")
