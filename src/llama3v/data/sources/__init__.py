"""Data sources, one file each. A new kind of data is one more file, and a line in `base.open_source`."""

from llama3v.data.sources.base import ImageRef, Rejected, Sample, Source, open_source

__all__ = ["ImageRef", "Rejected", "Sample", "Source", "open_source"]
