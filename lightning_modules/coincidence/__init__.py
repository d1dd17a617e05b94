"""Modules that find coincidences of photons: spiking networks, scores of pairs, and classical sorters beside them."""
