"""Text and three classification tasks made of the Python sources of the machine: no network, seeded, split by file."""
