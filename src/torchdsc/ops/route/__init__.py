"""Routing in one operation: logits, their top-K and the statistics of the regularisers, by several implementations."""
