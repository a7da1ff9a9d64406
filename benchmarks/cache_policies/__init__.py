"""Eviction policies and predictors on recorded routing; `__main__` states the question. Not a cache of its own."""
