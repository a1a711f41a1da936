"""Llama 3-V 8B on one GPU of 24 GB: the LLM stands still in 4 bits, and LoRA adapters learn beside it.

Hardware: one GPU of 24 GB (RTX 4090, RTX 3090, L4, A10), 24 GB of memory, and a local disk for the cache.

    pip install 'llama3v[lora]'
    llama3v encode --data captions.json --vision google/siglip-so400m-patch14-384 --max-tiles 0 --codec int8 \\
        --precision bf16 --cache /nvme/cache
    llama3v pretrain --recipe llama3_8b_lora_24gb --data captions.json --cache /nvme/cache --out runs/stage1
    llama3v encode --data conversations.json --vision runs/stage1 --max-tiles 6 --codec int8 \\
        --precision bf16 --cache /nvme/cache
    llama3v sft --recipe llama3_8b_lora_24gb --data conversations.json --model runs/stage1 --cache /nvme/cache \\
        --out runs/stage2
    llama3v merge runs/stage2 --out merged

By `--dry-run` stage 1 needs 20 GB and stage 2 17, where activations are computed again in the backward pass (without,
41). Not tried on a GPU.

Expected, by arithmetic (plan/flops.py) and not measured, on an RTX 4090 (165 TFLOP/s dense in bf16, at 40%) with activation
recompute: stage 1, 600k captions: 17 hours; stage 2, 1M conversations of up to seven tiles: 156 hours; $70 at $0.40 an
hour. A first run on a tenth of the data (`--limit`) takes under a day and $7. Encoding takes 20 hours more for all of it.
Score: not measured. Bunny-Llama-3-8B-V, made with the same adapters from 2M and 695k samples, reports MMMU 43.3.

Rank 128, alpha 256 and the learning rates (projector 2e-5, adapters 2e-4) are Bunny-Llama-3-8B-V's.
"""

from typing import Any

from llama3v.recipes.llama3_8b import PRETRAIN as FULL_PRETRAIN

PRETRAIN: dict[str, Any] = FULL_PRETRAIN | {
    "row_tokens": 2048,
    "rows_per_step": 16,
    "llm_weights": "nf4",
    "codec": "int8",
}

SFT: dict[str, Any] = {
    "policy": "projector+llm",
    "max_tiles": 6,
    "epochs": 1.0,
    "row_tokens": 2048,
    "rows_per_step": 48,
    "rows_per_pass": 1,
    "learning_rate": 2e-5,
    "llm_learning_rate": 2e-4,
    "lora_rank": 128,
    "lora_alpha": 256.0,
    "lora_dropout": 0.05,
    "llm_weights": "nf4",
    "precision": "bf16",
    "activation_checkpointing": True,
    "codec": "int8",
    "checkpoint_every": 200,
}
