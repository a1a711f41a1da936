"""Several processes that train one model: torchrun starts them, one for each GPU, and restarts them where one fails.

    ranks.py        who they are, and what they tell one another
    placement.py    where the weights lie: in one process, in every one (DDP), or in parts (FSDP2)
    sharded.py      checkpoints to which every process writes its part (DCP)

One process alone joins nothing and pays nothing.
"""
