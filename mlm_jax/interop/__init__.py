"""Hugging Face folders, read and written: config, weights and tokenizer.

What is particular to an architecture is data: a row of `FAMILIES` in `fields` and of `NAMES` in `tensors`.
"""
