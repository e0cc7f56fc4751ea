"""`crosstalk`, by the name that the room exports; it lives in `weightlab.adapters.interference`."""

from weightlab.adapters.interference import crosstalk

__all__ = ["crosstalk"]
