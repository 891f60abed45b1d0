"""Answers a request: config, weights, model, cache, sampling, engine."""
