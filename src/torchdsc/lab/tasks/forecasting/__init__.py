"""Forecasts of multivariate time series, by patch transformers that differ in their feed-forward layers."""
