"""The reference model: a small Mixture-of-Experts decoder trained from scratch on Python sources."""
