"""Named ways to a trained model. Each docstring states the command, the hardware, the time, the dollars and the score.

`quickstart` is also a verb (`llama3v.quickstart`); `smol.py` is run by `examples/smol.py`. See docs/training.md.
"""
