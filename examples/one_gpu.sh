#!/usr/bin/env bash
# Both stages on one GPU: the vision tower once, then Llama 3 8B in 4 bits with LoRA (24 GB are enough).
# Every command goes on where it stopped when the script is run again.
#
#   DATA=data CACHE=/nvme/cache bash examples/one_gpu.sh
set -euo pipefail
DATA=${DATA:-data} CACHE=${CACHE:-cache} RUNS=${RUNS:-runs}
VISION=google/siglip-so400m-patch14-384
LLM=meta-llama/Meta-Llama-3-8B-Instruct

llama3v encode --data "$DATA/captions.json" --vision "$VISION" --cache "$CACHE" --max-tiles 0 --precision bf16
llama3v pretrain --data "$DATA/captions.json" --vision "$VISION" --llm "$LLM" --max-tiles 0 --cache "$CACHE" \
    --out "$RUNS/stage1" --llm-weights nf4 --precision bf16 --rows-per-pass 1
llama3v encode --data "$DATA/conversations.json" --vision "$RUNS/stage1" --cache "$CACHE" --precision bf16
llama3v sft --data "$DATA/conversations.json" --model "$RUNS/stage1" --cache "$CACHE" --out "$RUNS/stage2" \
    --llm-weights nf4 --lora-rank 128 --llm-learning-rate 2e-4 --precision bf16 --rows-per-pass 1
