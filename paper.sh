#!/usr/bin/env bash
# The paper, stage by stage, on a laptop: each stage goes on where it stopped, prints its seconds, and the report shows what there is.
set -euo pipefail
cd "$(dirname "$0")"
python="${PYTHON:-python}"

stage() {
    echo "--- $* ($SECONDS s so far)"
    $python "$@" || { echo "this stage stopped; 'bash paper.sh' goes on with: $python $*" >&2; exit 1; }
}

stage pretrain.py               # §2: world, tokenizer, one epoch, base model
stage eval.py facts             # §2.1: does it know the encyclopedia, or the web's myths?
stage eval.py tasks             # §2.3: the tiny world's own multiple choice
stage sft.py                    # §3.1: the base model becomes a chat model
stage reward.py collect         # §3.2.1: two answers to each prompt, compared by helpfulness and by safety
stage reward.py --kind helpfulness      # §3.2.2: a model of each
stage reward.py --kind safety
stage reward.py eval            # Tables 7, 8 and 29
stage rlhf.py curves out/sft    # Figures 7 and 8: the best of N answers, and their truth

stage rlhf.py --version 1       # §3.2.3: rejection sampling; out/rlhf-v1
stage rlhf.py ppo --init out/sft --steps 40     # PPO on reward models that never saw its answers: over-optimisation; out/sft-ppo

# §3.2.1: fresh comparisons, of the newest model with one that the old reward models like too much; reward models again
old=out/preferences new=out/preferences-v2
stage reward.py collect --axis helpfulness --a out/rlhf-v1 --b out/sft-ppo --seed 2 --out $new
stage reward.py collect --axis safety --a out/rlhf-v1 --seed 2 --out ${new}s
stage reward.py --kind helpfulness --init out/rlhf-v1 --out out/reward-helpfulness-v2 \
    --data $old/helpfulness.jsonl $new/helpfulness.jsonl --rest ${new}s/safety.jsonl
stage reward.py --kind safety --init out/rlhf-v1 --out out/reward-safety-v2 \
    --data $old/safety.jsonl ${new}s/safety.jsonl --rest $old/helpfulness.jsonl $new/helpfulness.jsonl
stage reward.py eval out/reward-helpfulness out/reward-helpfulness-v2 out/reward-safety out/reward-safety-v2 \
    --helpfulness $new/helpfulness-test.jsonl --safety ${new}s/safety-test.jsonl --out out/rewards-v2    # old against new, on new pairs
judges="--helpfulness out/reward-helpfulness-v2 --harmlessness out/reward-safety-v2"

stage rlhf.py --version 2 $judges --safety_test ${new}s/safety-test.jsonl       # the best answers of both versions, rescored
stage rlhf.py ppo --init out/rlhf-v2 $judges --safety_test ${new}s/safety-test.jsonl    # eq. 3 and 4; out/rlhf-v2-ppo
stage gatt.py --init out/rlhf-v1        # §3.3: Ghost Attention; out/gatt
stage gatt.py test out/rlhf-v1 out/gatt # Table 30: does the instruction still hold at turn 20?
stage gatt.py attention out/gatt --before out/rlhf-v1   # Figure 10

stage eval.py versions out/sft-ppo out/rlhf-v1 out/rlhf-v2 out/rlhf-v2-ppo out/gatt $judges     # Figure 11
stage eval.py judge --a out/rlhf-v2-ppo --b out/sft --judge truth       # §3.4: side by side
stage eval.py safety out/sft out/rlhf-v1 out/rlhf-v2-ppo --rewards out/reward-helpfulness-v2 out/reward-safety-v2     # §4.4, Figure 14
stage eval.py diversity out/sft out/rlhf-v2-ppo         # Figure 21
stage eval.py corpus toy        # Table 9
stage eval.py report            # out/report.html
