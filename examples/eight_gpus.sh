#!/usr/bin/env bash
# Both stages on one machine with eight GPUs of 80 GB, Llama 3 8B in full: DDP in stage 1, FSDP2 in stage 2.
# torchrun starts all processes again, up to three times, where one fails; each start resumes. So does a second run of
# this script.
#
#   DATA=data CACHE=/nvme/cache bash examples/eight_gpus.sh
set -euo pipefail
DATA=${DATA:-data} CACHE=${CACHE:-cache} RUNS=${RUNS:-runs} GPUS=${GPUS:-8}
VISION=google/siglip-so400m-patch14-384

encode() { # DATA VISION OPTIONS...: the processes share the work, one for each GPU
    local data=$1 vision=$2 pids=()
    shift 2
    for ((gpu = 0; gpu < GPUS; gpu++)); do
        CUDA_VISIBLE_DEVICES=$gpu llama3v encode --data "$data" --vision "$vision" --cache "$CACHE" \
            --part "$((gpu + 1))/$GPUS" --precision bf16 "$@" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
}

encode "$DATA/captions.json" "$VISION" --max-tiles 0
torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 -m llama3v pretrain --recipe llama3_8b \
    --data "$DATA/captions.json" --cache "$CACHE" --out "$RUNS/stage1"
encode "$DATA/conversations.json" "$RUNS/stage1" --max-tiles 6
torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 -m llama3v sft --recipe llama3_8b \
    --data "$DATA/conversations.json" --model "$RUNS/stage1" --cache "$CACHE" --out "$RUNS/stage2"
