"""The two training stages over the cache."""
