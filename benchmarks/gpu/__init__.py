"""What one GPU does: encode pass, stage 1 and stage 2 at Llama 3 8B's shape, and what the seed's whole run would cost.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json [--dollars-per-hour 2.29] [--minutes 8.5]

Runs unattended on one 80 GB GPU, from a checkout, with torch, transformers, safetensors, numpy and pillow and nothing
else installed; no model, data or network is needed, since weights and features are random. With `--shape tiny` it runs
anywhere, on a CPU too, and shows that it works; its figures mean nothing then.

Every part (parts.py says what each measures) is a process of its own, so that one that runs out of memory, hangs or
crashes loses nothing of the others. Results are written after each part. Parts come in the order of their importance,
and one that no longer fits into the time is left out, and is said to be.

What is measured is the trainer's own code: its rows (`RowPlan`, `make_pass`), its loader thread (`Ahead`), its
`train_step`. Rows are packed as usual. The features come from memory instead of a disk.

How to read it: model FLOPs utilisation (MFU) counts useful work only (llama3v/plan/flops.py), and is given against the
GEMM rate measured in the same run and against the datasheet. Beside it stands where a step's time goes: matrix
products, attention, the rest by kind of kernel, and time in which the GPU waits. The largest share that is no matrix
product is the next lever. Parts in pairs (compiled or not, recomputing or not, fp32 or bf16 for the frozen LLM) say
what a lever brings.
"""
