"""New words for a run that is trained or imported: `words` makes its tokenizer's pieces of them, `run` their parameters."""
