"""The laboratory: corpora, tokenizers, the budget solver, training, comparison and its report."""
