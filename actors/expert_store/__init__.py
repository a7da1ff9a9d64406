"""The owner of all experts of a model: loads them into the shared memory of the nodes and hands out references."""
