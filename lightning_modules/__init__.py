"""One LightningModule per kind of task; the science is in ``networks`` and ``physics``."""
