"""Lightning strategies: they place processes, networks do not know them."""
