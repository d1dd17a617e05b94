"""Start-up guard: a torchvision built for another torch breaks torchmetrics and Lightning with an obscure error."""

from __future__ import annotations

import importlib.util


class BrokenTorchvision(ImportError):
    """torchvision is installed but cannot be imported beside this torch."""


def require_sound_torchvision() -> None:
    """Raise `BrokenTorchvision` with the remedy if torchvision is present and does not import.

    torchmetrics imports torchvision whenever it finds it, and Lightning imports torchmetrics. Wattlight needs neither
    torchvision nor anything that depends on it.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        raise BrokenTorchvision(
            "torchvision is installed but is built for another torch; uninstall it (pip uninstall torchvision: "
            f"Wattlight does not need it) or install the matching build [{type(error).__name__}: {error}]"
        ) from error
