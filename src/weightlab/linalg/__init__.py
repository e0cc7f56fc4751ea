"""Matrix numerics that the other rooms stand on."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.linalg.coefficients import COEFFICIENTS, CoefficientSet
    from weightlab.linalg.matrix_sign import newton_schulz
    from weightlab.linalg.orthogonal_factor import cholesky_qr, eigenbasis, polar_factor, qr_factor
    from weightlab.linalg.orthogonality import orthogonality_error
    from weightlab.linalg.outliers import clip_outliers
    from weightlab.linalg.sinkhorn import sinkhorn_normalize

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "COEFFICIENTS": ".coefficients",
        "CoefficientSet": ".coefficients",
        "cholesky_qr": ".orthogonal_factor",
        "clip_outliers": ".outliers",
        "eigenbasis": ".orthogonal_factor",
        "newton_schulz": ".matrix_sign",
        "orthogonality_error": ".orthogonality",
        "polar_factor": ".orthogonal_factor",
        "qr_factor": ".orthogonal_factor",
        "sinkhorn_normalize": ".sinkhorn",
    },
)
