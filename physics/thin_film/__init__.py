"""Optics of multilayer thin films: simulator, materials, tokens, stacks, targets, refinement."""
