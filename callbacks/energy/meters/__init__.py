"""Sources of energy and power: one file per kind of hardware."""
