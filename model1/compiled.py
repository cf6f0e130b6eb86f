"""How a few operations become one call each on the CPU.

A decode step has so few numbers in most of its operations that a call of torch or numpy costs more
than its arithmetic. Their plain loops are compiled to machine code here (numba: no compiler on the
user's machine). The model's, in float32, go one row after the other, so that a row's bits cannot
depend on the others. Knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, cast

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float32]
P = ParamSpec("P")
R = TypeVar("R")

# What may be done in another order than written, within a row: sums in vectors, and a product and
# a sum in one. NaN and infinity mean what they mean.
_FREEDOM = {"reassoc", "contract", "nsz"}


COMPILER = f"numba {numba.__version__} for {llvmlite.binding.get_host_cpu_name()}"
"""What the order of a vectorised sum, and so its bits, hang on."""


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as machine code, made at its first call for the types of that call.

    The code is kept beside the module, or else in the user's cache folder or $NUMBA_CACHE_DIR.
    Where none of these can be written to, every process compiles anew.
    """
    return _compiled(function, fastmath=_FREEDOM)


def compiled_as_written(function: Callable[P, R]) -> Callable[P, R]:
    """The same with every operation in the order in which it is written."""
    return _compiled(function, fastmath=False)


def _compiled(function: Callable[P, R], fastmath: set[str] | bool) -> Callable[P, R]:
    try:
        made = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath, cache=True)(function)
    except RuntimeError:  # no folder for the cache
        made = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    return cast("Callable[P, R]", made)


def on_cpu(
    fast: Callable[Concatenate[Tensor, P], R],
) -> Callable[[Callable[Concatenate[Tensor, P], R]], Callable[Concatenate[Tensor, P], R]]:
    """Decorates a plain torch function: on the CPU its twin `fast` takes its place.

    The plain one stays to be had, as `__wrapped__`.
    """

    def decorate(
        plain: Callable[Concatenate[Tensor, P], R],
    ) -> Callable[Concatenate[Tensor, P], R]:
        @wraps(plain)
        def either(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
            return (fast if x.device.type == "cpu" else plain)(x, *args, **kwargs)

        return cast("Callable[Concatenate[Tensor, P], R]", either)

    return decorate


def floats(tensor: Tensor) -> Floats:
    """A float32 tensor on the CPU as an array, in one piece: its own memory where it is in one."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    array: Floats = tensor.contiguous().numpy()
    return array
