"""Procedural scenes with captions and questions whose answers are exact: the embedded default's data.

scenes.py decides what is in a picture and draws it; language.py says it in words; documents.py makes text-only
documents from the same words, for the tiny LLM; dataset.py writes pictures and conversations to disk.
"""
