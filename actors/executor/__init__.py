"""The executor: a library model whose experts live in slots, and the engine that generates with it. Knows no Serve."""
