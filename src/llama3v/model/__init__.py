"""The model: slicing, tiles, vision tower, projector, prompt and the whole."""
