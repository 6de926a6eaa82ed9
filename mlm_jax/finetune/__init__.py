"""Fine-tuning: labelled examples from files, encoded into rows, trained by the loop of pre-training, measured, predicted.

`classification`, `tagging` and `question_answering` know their formats and measures; `job` trains, `predict` applies.
"""
