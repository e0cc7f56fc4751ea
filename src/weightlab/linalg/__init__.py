"""Matrix numerics that the other rooms stand on."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.linalg.coefficients import COEFFICIENTS, CoefficientSet
    from weightlab.linalg.matrix_sign import newton_schulz
    from weightlab.linalg.orthogonality import orthogonality_error

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "COEFFICIENTS": ".coefficients",
        "CoefficientSet": ".coefficients",
        "newton_schulz": ".matrix_sign",
        "orthogonality_error": ".orthogonality",
    },
)
