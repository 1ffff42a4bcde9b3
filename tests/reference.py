"""The published formulas in float64 numpy, written from shared/REFERENCE.md §1 and from nothing of lora_one.

Notation: ``W`` (out, in), forward ``x (W + s B A)ᵀ``, gradient ``G = U diag(S) Vᵀ``, rank ``r``. Factors come
as ``A_RI, B_OR``. ``python tests/reference.py`` prints a table of expected values.
"""

import numpy as np

INDEX_SETS = {
    "ArB2r": lambda r: (range(r, 2 * r), range(r)),
    "A2rBr": lambda r: (range(r), range(r, 2 * r)),
    "ArBr": lambda r: (range(0, 2 * r, 2), range(1, 2 * r, 2)),
}


def with_sign_convention(U_OK, V_IK):
    """Flips pairs so that the largest-magnitude entry of each column of U is positive."""
    sign_K = np.sign(U_OK[np.abs(U_OK).argmax(axis=0), np.arange(U_OK.shape[1])])
    return U_OK * sign_K, V_IK * sign_K


def svd(M_OI):
    """``U_OK, S_K, V_IK``, with the sign convention."""
    U_OK, S_K, Vt_KI = np.linalg.svd(np.asarray(M_OI, dtype=np.float64), full_matrices=False)
    U_OK, V_IK = with_sign_convention(U_OK, Vt_KI.T)
    return U_OK, S_K, V_IK


def best_approximation(M_OI, k):
    """``[M]_k``, the nearest matrix of rank k."""
    U_OK, S_K, V_IK = svd(M_OI)
    return (U_OK[:, :k] * S_K[:k]) @ V_IK[:, :k].T


def gradient_scale(scale, *, direction, d_out, r, gamma, s, W_OI=None):
    """What ``init.scale`` multiplies each factor by."""
    if scale == "stable":
        return 1 / np.sqrt(gamma) if direction == "LoRA-One" else d_out ** (1 / 4) / np.sqrt(gamma)
    if scale == "weightS":
        return np.mean(np.sqrt(svd(W_OI)[1][:r] / s))
    return {"gd": 1 / s, "unit": 1.0}[scale]


def gradient_factors(
    G_OI, *, direction, scale, r, gamma, s, normalize="spectral", W_OI=None, index_sets=None
):
    """Factors from the gradient; ``index_sets`` are those of (B, A) for ``random``."""
    U_OK, S_K, V_IK = svd(G_OI)
    c = gradient_scale(scale, direction=direction, d_out=len(G_OI), r=r, gamma=gamma, s=s, W_OI=W_OI)
    if direction == "LoRA-One":
        root_R = np.sqrt(S_K[:r] / {"spectral": S_K[0], "none": 1.0}[normalize])
        return (V_IK[:, :r] * root_R).T * c, -U_OK[:, :r] * root_R * c
    of_B, of_A = index_sets or INDEX_SETS[direction](r)
    return V_IK[:, list(of_A)].T * c, U_OK[:, list(of_B)] * c


def weight_factors(W_OI, *, scale, r, gamma, s):
    """Factors from the weight (``init.mode=svd``)."""
    U_OK, S_K, V_IK = svd(W_OI)
    d_out, d_in = np.shape(W_OI)
    sigma_R = S_K[:r]
    of_A, of_B = {
        "default": (np.sqrt(sigma_R / s), np.sqrt(sigma_R / s)),
        "stable": (d_in ** (1 / 4) / np.sqrt(gamma), d_out ** (1 / 4) / np.sqrt(gamma)),
        "unit": (1.0, 1.0),
        "normalized": (np.sqrt(r * sigma_R / sigma_R.sum()), np.sqrt(r * sigma_R / sigma_R.sum())),
    }[scale]
    return (V_IK[:, :r] * of_A).T, U_OK[:, :r] * of_B


def norm_clip(A_RI, B_OR, W_OI, s):
    """Factors that keep ``max|s B A|`` within ``max|W|``."""
    rho = np.abs(W_OI).max() / np.abs(s * B_OR @ A_RI).max()
    return (A_RI * np.sqrt(rho), B_OR * np.sqrt(rho)) if rho < 1 else (A_RI, B_OR)


def adam_step(G_OI, A_RI, B_OR):
    """``B sign(BᵀG) + sign(G Aᵀ) A``: minus the first Adam step of the product, over η."""
    return B_OR @ np.sign(B_OR.T @ G_OI) + np.sign(G_OI @ A_RI.T) @ A_RI


def adam_objective(G_OI, A_RI, B_OR):
    """``‖B sign(BᵀG) + sign(G Aᵀ) A - sign(G)‖²_F`` (kexue.fm/archives/10226)."""
    return np.sum((adam_step(G_OI, A_RI, B_OR) - np.sign(G_OI)) ** 2)


def adam_objective_at_best_scale(G_OI, A_RI, B_OR):
    """The objective of ``c A, c B`` at the best c ≥ 0; the step is linear in c."""
    step_OI, target_OI = adam_step(G_OI, A_RI, B_OR), np.sign(G_OI)
    c = max(0.0, np.sum(step_OI * target_OI) / np.sum(step_OI**2))
    return np.sum((c * step_OI - target_OI) ** 2)


def dora_magnitudes(W_OI, A_RI, B_OR, s, *, shifts_base):
    """Row norms of (base weight after init) + s B A."""
    base_OI = W_OI - s * B_OR @ A_RI if shifts_base else W_OI
    return np.linalg.norm(base_OI + s * B_OR @ A_RI, axis=1)


def simple_std(kind, factor, *, d_out, d_in, r, std):
    """Standard deviation of the entries of ``factor`` (``A`` or ``B``)."""
    rows, columns = (r, d_in) if factor == "A" else (d_out, r)
    if kind == "kaiming":
        return simple_bound(d_in) / np.sqrt(3) if factor == "A" else np.sqrt(2 / columns)
    return {
        "zeros": 0.0,
        "gaussian": std,
        "fan_out_kaiming": np.sqrt(2 / rows),
        "xavier": np.sqrt(2 / (rows + columns)),
        "unit": 1 / np.sqrt(max(rows, columns)),
        "orthogonal": 1 / np.sqrt(max(rows, columns)),
    }[kind]


def simple_bound(d_in):
    """Largest entry of a Kaiming-uniform A, with a = √5."""
    gain = np.sqrt(2 / (1 + np.sqrt(5) ** 2))
    return gain * np.sqrt(3 / d_in)


def print_table():
    """Singular values, scales and factor norms for one small gradient and weight."""
    rng = np.random.default_rng(0)
    G_OI, W_OI = rng.standard_normal((6, 5)) * 1e-3, rng.standard_normal((6, 5))
    settings = {"r": 2, "gamma": 16.0, "s": 8.0, "W_OI": W_OI}
    print("S(G) " + " ".join(f"{value:.6e}" for value in svd(G_OI)[1]))
    print(f"{'direction':<10}{'scale':<9}{'A[0,0]':>12}{'B[0,0]':>12}{'max|BA|':>12}")
    for direction in ("LoRA-One", *INDEX_SETS):
        for scale in ("stable", "gd", "unit", "weightS"):
            A_RI, B_OR = gradient_factors(G_OI, direction=direction, scale=scale, **settings)
            row = (A_RI[0, 0], B_OR[0, 0], np.abs(B_OR @ A_RI).max())
            print(f"{direction:<10}{scale:<9}" + "".join(f"{value:>12.6f}" for value in row))


if __name__ == "__main__":
    print_table()
