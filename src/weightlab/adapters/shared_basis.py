"""`shared_basis`, by the name that the room exports; it lives in `weightlab.adapters.basis`."""

from weightlab.adapters.basis import shared_basis

__all__ = ["shared_basis"]
