"""Matrix numerics that the other rooms stand on."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.linalg.assignment import Assignment, linear_assignment
    from weightlab.linalg.coefficient_fit import fit_newton_schulz, gaussian_spectrum, spectrum_error
    from weightlab.linalg.coefficients import COEFFICIENTS, CoefficientSet
    from weightlab.linalg.column_selection import expand_basis_columns, select_basis_columns
    from weightlab.linalg.cosine_transform import dct, dct_matrix
    from weightlab.linalg.gram_spectrum import gram_eigenvalues
    from weightlab.linalg.incremental_pca import IncrementalPCA
    from weightlab.linalg.matrix_sign import newton_schulz, newton_schulz_foreach
    from weightlab.linalg.moment_sketch import MomentSketch
    from weightlab.linalg.orthogonal_factor import cholesky_qr, eigenbasis, polar_factor, qr_factor
    from weightlab.linalg.orthogonality import orthogonality_deviation, orthogonality_error
    from weightlab.linalg.outliers import clip_outliers
    from weightlab.linalg.padding import common_shape, merge_shapes, stack_padded, unstack_padded
    from weightlab.linalg.power_law import PowerLawScan, power_law_scan
    from weightlab.linalg.relaxed_polar import relaxed_polar_factor
    from weightlab.linalg.singular_triples import TopSVD, top_svd
    from weightlab.linalg.sinkhorn import sinkhorn_normalize
    from weightlab.linalg.streaming_moments import PrincipalComponents, StreamingMoments

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Assignment": ".assignment",
        "COEFFICIENTS": ".coefficients",
        "CoefficientSet": ".coefficients",
        "IncrementalPCA": ".incremental_pca",
        "MomentSketch": ".moment_sketch",
        "PowerLawScan": ".power_law",
        "PrincipalComponents": ".streaming_moments",
        "StreamingMoments": ".streaming_moments",
        "cholesky_qr": ".orthogonal_factor",
        "clip_outliers": ".outliers",
        "common_shape": ".padding",
        "dct": ".cosine_transform",
        "dct_matrix": ".cosine_transform",
        "eigenbasis": ".orthogonal_factor",
        "expand_basis_columns": ".column_selection",
        "fit_newton_schulz": ".coefficient_fit",
        "gaussian_spectrum": ".coefficient_fit",
        "gram_eigenvalues": ".gram_spectrum",
        "linear_assignment": ".assignment",
        "merge_shapes": ".padding",
        "newton_schulz": ".matrix_sign",
        "newton_schulz_foreach": ".matrix_sign",
        "orthogonality_deviation": ".orthogonality",
        "orthogonality_error": ".orthogonality",
        "polar_factor": ".orthogonal_factor",
        "power_law_scan": ".power_law",
        "qr_factor": ".orthogonal_factor",
        "relaxed_polar_factor": ".relaxed_polar",
        "select_basis_columns": ".column_selection",
        "sinkhorn_normalize": ".sinkhorn",
        "spectrum_error": ".coefficient_fit",
        "stack_padded": ".padding",
        "top_svd": ".singular_triples",
        "unstack_padded": ".padding",
    },
)
