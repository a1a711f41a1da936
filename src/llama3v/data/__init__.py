"""Where samples come from, in what order they are read, and how they are packed."""
