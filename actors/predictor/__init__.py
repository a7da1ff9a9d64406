"""Predicts, from token ids alone, which experts a prompt will need: the network, its training, and its publisher."""
