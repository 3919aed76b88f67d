#!/usr/bin/env bash
# The paper, stage by stage, on a laptop, and out/report.html:      bash paper.sh
# Then versions 3 to 5 and every ablation, for hours:               bash paper.sh full
# Another tiny world, in a folder of its own:                       WORLD=1 RUNS=world-1 bash paper.sh
# Stopped anywhere, the same line goes on; a stage that out/stages.jsonl calls done is not run again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python="${PYTHON:-python}"  # or PYTHON="torchrun --nproc_per_node=2"
full=${1:-}
line="${WORLD:+WORLD=$WORLD }${RUNS:+RUNS=$RUNS }${PYTHON:+PYTHON=\"$PYTHON\" }bash paper.sh $full"
mkdir -p "${RUNS:-$here}/out"
cd "${RUNS:-$here}"
touch out/stages.jsonl
exec 3>&1
counting="" stages=0 left=0 lanes=1 running="" beside=""

# However this ends, it stops what it has started, and waits until that has saved.
finish() {
    local rc=$?
    trap "" INT TERM
    kill $running $beside 2> /dev/null || true
    wait
    if [ "$beside" ]; then cat out/beside.log; fi
    exit $rc
}
trap finish EXIT
trap 'echo "stopped; go on with: $line" >&2; exit 130' INT TERM

# stage SECONDS SCRIPT ARGUMENTS: run it, unless it is done. SECONDS: what it took on two cores, in a lane on one.
stage() {
    local seconds=$1 began=$SECONDS rc=0
    shift
    if [ -z "$counting" ]; then finished=$(cat out/stages.jsonl); fi
    if [[ $finished == *"{\"command\": \"$*\", \"rc\": 0,"* ]]; then return; fi
    if [ "$counting" ]; then stages=$((stages + 1)) left=$((left + seconds / lanes)); return; fi
    echo "--- $* ($(to_go))" | tee -a "${said:-/dev/null}" >&3
    $python "$here/$1" "${@:2}" &
    running=$!
    wait "$running" || rc=$?
    running=""
    echo "{\"command\": \"$*\", \"rc\": $rc, \"seconds\": $((SECONDS - began)), \"lanes\": $lanes}" >> out/stages.jsonl
    if [ $rc -ne 0 ]; then echo "$* stopped; go on with: $line" >&2; exit 1; fi
}

# lanes STAGES STAGES: two lines of stages at once, each on half of the cores, where neither waits for the other. What the
# second has to say comes when both are done.
lanes() {
    if [[ $python == torchrun* ]]; then eval "$1"; eval "$2"; return; fi  # it has the cores already
    local lanes=2 rc=0
    if [ "$counting" ]; then eval "$1"; eval "$2"; return; fi
    local -x OMP_NUM_THREADS=$((($(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) + 1) / 2))
    : > out/beside.log
    (trap finish EXIT; trap "exit 130" INT TERM; said=out/beside.log; eval "$2") >> out/beside.log 2>&1 &
    beside=$!
    eval "$1"
    wait "$beside" || rc=1
    beside=""
    sed $'s/.*\r//' out/beside.log  # of each progress bar the last state
    if [ $rc -ne 0 ]; then exit 1; fi
}

to_go() {
    local lanes=1
    counting=yes stages=0 left=0
    everything
    echo "$stages to go, about $((left / 60 + 1)) min"
}

# §3.2.1: as the models change, new comparisons and reward models again. VERSION MODEL OTHER_MODEL
again() {
    local new=out/preferences-v$1 help=out/reward-helpfulness-v$1 harmless=out/reward-safety-v$1
    lanes "stage 24 reward.py collect --axis helpfulness --a $2 --b $3 --seed $1 --out $new" \
        "stage 34 reward.py collect --axis safety --a $2 --seed $1 --out ${new}s"
    helpful+=" $new/helpfulness.jsonl" safe+=" ${new}s/safety.jsonl"
    lanes "stage 73 reward.py --kind helpfulness --init $2 --out $help --data $helpful --rest $safe" \
        "stage 50 reward.py --kind safety --init $2 --out $harmless --data $safe --rest $helpful"
    newest="$help $harmless" rewards+=" $help $harmless" judges="--helpfulness $help --harmlessness $harmless"
    train="$judges --safety_test ${new}s/safety-test.jsonl"
    new_pairs="--helpfulness $new/helpfulness-test.jsonl --safety ${new}s/safety-test.jsonl --out out/rewards-v$1"
}

old_and_new() {  # all reward models so far, on the newest pairs
    stage 30 reward.py eval $rewards $new_pairs
}

paper() {
    helpful=out/preferences/helpfulness.jsonl safe=out/preferences/safety.jsonl rewards="out/reward-helpfulness out/reward-safety"
    stage 293 pretrain.py --world ${WORLD:-0}       # §2: world, tokenizer, one epoch, base model
    stage 115 sft.py                 # §3.1: the base model becomes a chat model
    stage 38 reward.py collect       # §3.2.1: two answers to each prompt, compared by helpfulness and by safety
    lanes "stage 42 reward.py --kind helpfulness" "stage 27 reward.py --kind safety; base_model"    # §3.2.2: a model of each
    lanes first_version over_optimised
    again 2 out/rlhf-v1 out/sft-ppo
    lanes second_version ghost_attention
    versions="out/rlhf-v1 out/rlhf-v2 out/rlhf-v2-ppo" last=out/rlhf-v2-ppo second=$train general=""
}

base_model() {
    stage 6 eval.py facts            # §2.1: does it know the encyclopedia, or the web's myths?
    stage 6 eval.py tasks            # §2.3: the tiny world's own multiple choice
}

first_version() {
    stage 60 rlhf.py --version 1     # §3.2.3: rejection sampling; out/rlhf-v1
    stage 31 rlhf.py curves out/sft  # Figures 7 and 8: the best of N answers, and their truth
    stage 16 reward.py eval          # Tables 7, 8 and 29
}

over_optimised() {
    stage 93 rlhf.py ppo --init out/sft --steps 40 # PPO on reward models that never saw its answers
}

second_version() {
    stage 89 rlhf.py --version 2 $train             # the best answers of both versions, rescored
    stage 145 rlhf.py ppo --init out/rlhf-v2 $train # eq. 3 and 4; out/rlhf-v2-ppo
}

ghost_attention() {
    stage 172 gatt.py --init out/rlhf-v1            # §3.3; out/gatt
    stage 65 gatt.py test out/rlhf-v1 out/gatt      # Table 30: does the instruction still hold at turn 20?
    stage 6 gatt.py attention out/gatt --before out/rlhf-v1     # Figure 10
    old_and_new
}

# A version behind Ghost Attention: from its model, with some of its dialogues among the best answers
ghost() {
    echo "--init $1 --data pool:4 toy/dialogs:0.05 toy/encyclopedia:0.02 toy/numbers:0.02 $1/gatt.jsonl:0.3 --seq_len 1024
        --batch_size 2 --micro_batch 2"
}

# §3.2.3 to the end: three more versions by rejection sampling, each from the newest model's samples, PPO behind the last; and
# §3.4.1's check for drift, a general reward model from other comparisons, of the base model with the first chat model
more_versions() {
    stage 40 reward.py collect --a out/sft --b out/pretrain --seed 9 --out out/preferences-general
    stage 50 reward.py --kind joint --init out/pretrain --data out/preferences-general/helpfulness.jsonl \
        --rest out/preferences-general/safety.jsonl --out out/reward-general
    general="--general out/reward-general"
    again 3 out/rlhf-v2-ppo out/rlhf-v2
    old_and_new
    stage 65 rlhf.py --version 3 --policy out/rlhf-v2-ppo $train
    stage 118 gatt.py --init out/rlhf-v3 --out out/gatt-v3      # where the paper has it
    again 4 out/gatt-v3 out/rlhf-v2-ppo
    old_and_new
    stage 90 rlhf.py --version 4 --policy out/gatt-v3 $train $(ghost out/gatt-v3)
    again 5 out/rlhf-v4 out/gatt-v3
    old_and_new
    stage 90 rlhf.py --version 5 $train $(ghost out/gatt-v3)
    stage 170 rlhf.py ppo --init out/rlhf-v5 $train
    stage 90 gatt.py test out/rlhf-v3 out/gatt-v3 out/rlhf-v5 out/rlhf-v5-ppo --out out/gatt-test-v5
    versions+=" out/rlhf-v3 out/rlhf-v4 out/rlhf-v5 out/rlhf-v5-ppo" last=out/rlhf-v5-ppo
}

# One flag of a stage each, in a folder of its own
ablations_of_base_models() {
    local size heads how
    # §2: up-sampling; sizes (Figures 5 and 6)
    stage 170 pretrain.py --world ${WORLD:-0} --steps 1000 --out out/upsampled
    stage 170 pretrain.py --world ${WORLD:-0} --steps 1000 --data toy/encyclopedia toy/web toy/stories toy/numbers --out out/crawled
    stage 10 eval.py facts out/upsampled --against out/crawled
    for size in "toy-s 100" "toy 160" "toy-m 370" "toy-l 1230"; do
        stage ${size#* } pretrain.py --world ${WORLD:-0} --preset ${size% *} --vocab_size 1024 --steps 480 --out out/size-${size% *}
    done
    for size in "toy 160" "toy-m 370"; do  # at the learning rate of toy-s
        stage ${size#* } pretrain.py --world ${WORLD:-0} --preset ${size% *} --vocab_size 1024 --steps 480 --lr 3e-3 \
            --out out/size-${size% *}-lr
    done
    stage 5 eval.py curves out/size-toy-s out/size-toy out/size-toy-m out/size-toy-l
    for size in toy-s toy-m; do
        stage 200 sft.py --init out/size-$size --out out/sft-$size
        stage 60 reward.py --init out/sft-$size --out out/reward-$size
    done
    # A.2.1: one key and value head, or two, widened to equal parameters (Table 18); and pooled from four (Ainslie et al.)
    for heads in "4 1" "2 1.3" "1 1.33"; do
        stage 170 pretrain.py --world ${WORLD:-0} --steps 1000 --n_kv_heads ${heads% *} --ffn_multiplier ${heads#* } --out out/heads-${heads% *}
    done
    for heads in 2 1; do for how in mean first random; do
        [ -d out/$how-$heads ] || stage 5 model.py convert out/heads-4 out/$how-$heads --to ours --n_kv_heads $heads --pool $how
        stage 15 pretrain.py ${WORLD:+--world $WORLD} --init out/$how-$heads --seed 1 --steps 50 --lr 1e-3 --warmup 5 --sample_tokens 0 --out out/pooled-$how-$heads
    done; done
}

ablations_of_chat_models() {
    local alone="--data toy/dialogs --lr 1e-3"  # the chat model of dialogues alone
    local share how margin pairs seed
    # §3.1: packed dialogues that see each other; quality against quantity
    stage 80 sft.py $alone --out out/sft-apart
    stage 80 sft.py $alone --no-isolate --out out/sft-together
    stage 80 sft.py $alone --noise 0.3 --out out/sft-quantity
    stage 80 sft.py $alone --dialogs 2000 --epochs 8 --out out/sft-quality
    # §3.2.2: margins (Table 28), the safety loss (Table 29), one model for both, data (Figure 6)
    for margin in none small large; do for seed in 0 1 2; do
        stage 30 reward.py --margin $margin --seed $seed --out out/margin-$margin-$seed
    done; done
    stage 20 reward.py --kind safety --safety_aux 0 --out out/reward-safety-without
    stage 40 reward.py --kind joint --out out/reward-joint
    for pairs in 300 1000; do stage 20 reward.py --pairs $pairs --out out/reward-pairs-$pairs; done
    # §3.2.3: temperatures, the pool of the last version alone, a control that picks at random; the parts of eq. 4
    for how in 0.4 0.8; do stage 50 rlhf.py --version 1 --temperature $how --out out/v1-temperature-$how; done
    stage 50 rlhf.py --version 1 --select random --out out/v1-random
    stage 60 rlhf.py --version 2 $second --pool last --out out/v2-pool-last
    for how in "--kl_coef 0" --no-whiten --no-piecewise; do
        stage 80 rlhf.py ppo --init out/sft --steps 40 $how --out "out/ppo${how// /-}"
    done
    stage 60 eval.py versions out/v1-temperature-0.4 out/v1-temperature-0.8 out/v1-random out/v2-pool-last out/ppo--kl_coef-0 \
        out/ppo--no-whiten out/ppo--no-piecewise --out out/versions-ablations
    # §4.2: shares of safety data (Figures 15, 33); safety RLHF where there is something to lose; the gate of distillation (Figure 16)
    for share in 0 0.0006 0.006 0.015 0.03 0.06; do
        stage 30 sft.py --dialogs 4000 --data toy/dialogs toy/encyclopedia:0.08 toy/numbers:0.08 --safety $share --sample_tokens 0 \
            --out out/sft-safety-$share
    done
    stage 60 eval.py safety out/sft-safety-{0,0.0006,0.006,0.015,0.03,0.06} --rewards out/reward-helpfulness out/reward-safety \
        --out out/safety-scaling
    stage 80 rlhf.py --version 1 --unsafe 0.5 --n_prompts 800 --policy out/sft-safety-0.06 --init out/sft-safety-0.06 --out out/rlhf-safety
    stage 30 eval.py safety out/sft-safety-0.06 out/rlhf-safety --rewards out/reward-helpfulness out/reward-safety --out out/safety-rlhf
    stage 60 rlhf.py distill --init out/sft-safety-0.015
    stage 60 rlhf.py distill --init out/sft-safety-0.015 --no-gate --out out/distill-no-gate
    stage 30 eval.py safety out/sft-safety-0.015 out/distill out/distill-no-gate --out out/safety-distill
}

# §3.4, §4: side by side, by the newest reward models, by a third one that trained no version, and by the truth; safety
evaluations() {
    lanes "stage 110 eval.py versions out/sft-ppo $versions out/gatt $judges $general" other_evaluations    # Figures 11, 20
}

other_evaluations() {
    local name=${last#out/}
    stage 7 eval.py judge --a $last --b out/sft --judge truth --out out/judge-$name
    stage 56 eval.py safety out/sft out/rlhf-v1 $last --rewards $newest --out out/safety-$name  # §4.4, Figure 14
    stage 32 eval.py diversity out/sft $last --out out/diversity-$name  # Figure 21
    stage 6 eval.py corpus toy ${WORLD:+--world $WORLD}     # Table 9
}

everything() {
    paper
    if [ "$full" = full ]; then more_versions; lanes ablations_of_base_models ablations_of_chat_models; fi
    evaluations
}
everything
$python "$here/eval.py" report  # out/report.html
