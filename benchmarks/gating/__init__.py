"""Dynamic gating beside static capacity gating (Huang et al., arXiv 2303.06182, section V)."""
