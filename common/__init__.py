"""Contracts that two or more of the deployments and actors share. Imports no Ray."""
