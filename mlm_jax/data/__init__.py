"""From raw text to batches: sources, tokenizer, packing, the prepared corpus and its loader.

Host code only: nothing in here imports the model or runs on a device.
"""
