"""Lottery tickets: scores, pruning, controls, ticket files, cost, sparse execution."""
