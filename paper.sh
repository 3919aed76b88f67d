#!/usr/bin/env bash
# The paper, stage by stage, on a laptop: each stage goes on where it stopped, and the report shows what there is.
set -euo pipefail
cd "$(dirname "$0")"
python="${PYTHON:-python}"

$python pretrain.py             # §2: world, tokenizer, one epoch, base model
$python eval.py facts           # §2.1: does it know the encyclopedia, or the web's myths?
$python sft.py                  # §3.1: the base model becomes a chat model
$python reward.py collect       # §3.2.1: two answers to each prompt, compared by helpfulness and by safety
$python reward.py --kind helpfulness    # §3.2.2: a model of each
$python reward.py --kind safety
$python reward.py eval          # Tables 7, 8 and 29
$python rlhf.py curves out/sft  # Figures 7 and 8: the best of N answers, and their truth
$python rlhf.py --version 1     # §3.2.3: rejection sampling; out/rlhf-v1
$python eval.py versions out/rlhf-v1    # Figure 11: win rates against out/sft
$python eval.py report          # out/report.html
