#!/usr/bin/env bash
# Both stages on one GPU: the vision tower once, then Llama 3 8B in 4 bits with LoRA (24 GB are enough
# by the dry run's arithmetic).
# Every command goes on where it stopped when the script is run again.
#
#   DATA=data CACHE=/nvme/cache bash examples/one_gpu.sh
set -euo pipefail
DATA=${DATA:-data} CACHE=${CACHE:-cache} RUNS=${RUNS:-runs}
VISION=google/siglip-so400m-patch14-384

llama3v encode --data "$DATA/captions.json" --vision "$VISION" --cache "$CACHE" --max-tiles 0 --codec int8 --precision bf16
llama3v pretrain --recipe llama3_8b_lora_24gb --data "$DATA/captions.json" --cache "$CACHE" --out "$RUNS/stage1"
llama3v encode --data "$DATA/conversations.json" --vision "$RUNS/stage1" --cache "$CACHE" --max-tiles 6 --codec int8 \
    --precision bf16
llama3v sft --recipe llama3_8b_lora_24gb --data "$DATA/conversations.json" --model "$RUNS/stage1" --cache "$CACHE" \
    --out "$RUNS/stage2"
