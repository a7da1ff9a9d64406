"""Models that ship with the project; each folder holds a checkpoint and the scripts that made it."""
