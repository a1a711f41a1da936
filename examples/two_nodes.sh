#!/usr/bin/env bash
# Stage 2 on two machines with eight GPUs each. Run the same line on both; HEAD is the name of the first one.
# Data, cache, model and runs lie on a file system that both see. Where a machine is lost for good, torchrun goes on with
# the other (--nnodes 1:2), and the run with the next sample: 16 and 8 processes both divide --rows-per-step.
#
#   HEAD=node0 SHARED=/shared bash examples/two_nodes.sh
set -euo pipefail
: "${HEAD:?name of the first machine}" "${SHARED:?directory that both machines see}"

torchrun --nnodes 1:2 --nproc-per-node 8 --max-restarts 10 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" \
    --rdzv-id llama3v-stage2 -m llama3v sft --data "$SHARED/data/conversations.json" --model "$SHARED/runs/stage1" \
    --cache "$SHARED/cache" --out "$SHARED/runs/stage2" --row-tokens 4096 --rows-per-step 32 --rows-per-pass 1 \
    --precision bf16 --activation-checkpointing --rank-timeout 300
