"""Variants of the layers trained at equal budgets and tokens, each tuned by the same number of trials."""
