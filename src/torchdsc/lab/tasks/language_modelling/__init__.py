"""Language models that differ in their feed-forward layers, trained from scratch at parameter budgets."""
