"""Ray Serve: what a request meets. Thin shells around plain classes; nothing below imports Serve."""
