"""Energy of runs: meters, a recorder with exact attribution to stages, a crash-proof record, and the callback."""
