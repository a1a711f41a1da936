"""Llama 3-V 8B, both stages in full: about 600,000 captions, then about 1,000,000 conversations.

Hardware: 8 GPUs of 80 GB and about 12 TB of local disk for the cache (bf16; half of it with --codec int8).

    llama3v encode --data captions.json --vision google/siglip-so400m-patch14-384 --max-tiles 0 --cache /nvme/cache
    torchrun --nproc-per-node 8 -m llama3v pretrain --recipe llama3_8b --data captions.json \\
        --cache /nvme/cache --out runs/stage1
    llama3v encode --data conversations.json --vision runs/stage1 --max-tiles 6 --cache /nvme/cache
    torchrun --nproc-per-node 8 -m llama3v sft --recipe llama3_8b --data conversations.json --model runs/stage1 \\
        --cache /nvme/cache --out runs/stage2

By `--dry-run`, stage 1 needs 42 GB on each GPU (DDP). Stage 2 trains all weights and shares them out (FSDP2): 56 GB on
each of eight, or 24 with `--activation-checkpointing`, which computes a third more. Encoding can be shared out, too:
`--part 1/8` to `--part 8/8`; examples/eight_gpus.sh does all of it.

Data: LLaVA-Pretrain (558k) or the like for captions, one overview tile each; LLaVA-1.5's 665k, with documents and charts
added, or the like for conversations, up to six slices and an overview each.

Expected, by arithmetic (plan/flops.py) and not measured: encode 3.7 H100-hours, stage 1 2.1, stage 2 29.5, at 40% of an
H100's 989 TFLOP/s: 4.4 hours on eight, $81 at $2.29 an H100-hour ($28 on spot machines at $0.80).
Score: not measured.

Batches and the second learning rate are those of the LLaVA-1.5 and Open-LLaVA-NeXT-Llama3 recipes: 256 samples a step, then
2e-5 and 128 samples, both with a cosine after 3% of warm-up and no weight decay. The first rate is a tenth of theirs (1e-3),
since this projector's last matrix starts with far smaller weights than their MLP (docs/training.md); not tried at this size.
A row of 4,096 tokens holds about 29 captions or 5 conversations.
"""

from typing import Any

PRETRAIN: dict[str, Any] = {
    "vision": "google/siglip-so400m-patch14-384",
    "llm": "meta-llama/Meta-Llama-3-8B-Instruct",
    "scale_factor": 3,
    "max_tiles": 0,  # stage 1 aligns: the overview tells what a caption says (LLaVA-UHD trains it without slices, too)
    "epochs": 1.0,
    "row_tokens": 4096,
    "rows_per_step": 8,
    "rows_per_pass": 1,
    "learning_rate": 1e-4,
    "precision": "bf16",
    "llm_weights": "bf16",
    "checkpoint_every": 200,
}

SFT: dict[str, Any] = {
    "policy": "projector+llm",
    "max_tiles": 6,
    "epochs": 1.0,
    "row_tokens": 4096,
    "rows_per_step": 24,
    "rows_per_pass": 1,
    "learning_rate": 2e-5,
    "llm_learning_rate": 2e-5,
    "precision": "bf16",
    "checkpoint_every": 500,  # one is 96 GB: weights and two moments of 8B parameters in fp32
}
