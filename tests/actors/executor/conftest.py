"""Where there is no GPU, Triton's kernels run in its interpreter: slow, on the CPU, with the same results."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """The interpreter turns arrays of one element into integers in a way that numpy 2.4 no longer allows."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index
    _patch_lang = interpreter._patch_lang
    _patched: set[str] = set()

    def _patch_lang_once(function: Any) -> Any:
        """The interpreter patches Triton's language for every call of a kernel, and of a function in one, and unpatches
        it again. It looks through hundreds of names for that, and would find the same ones.
        """
        if function.__module__ not in _patched:
            _patched.add(function.__module__)
            _patch_lang(function)
        return interpreter._LangPatchScope()  # undoes nothing

    interpreter._patch_lang = _patch_lang_once
    _np_dtype = cache(interpreter._get_np_dtype)  # which makes a dictionary of all types at every call
    interpreter._get_np_dtype = lambda dtype: _np_dtype(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)
    # The type of a tuple, a long text, is of use to the compiler alone; every shape is a tuple.
    tl.core._type_for_tuple_values = lambda values, fields=None: None
    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        widened = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(widened, tl.float32)

    def _create_dot_of_bfloat16(self: Any, a: Any, b: Any, *args: Any) -> Any:
        """The interpreter keeps bfloat16 as bit patterns, and multiplies those."""
        return _create_dot(self, _widened(a), _widened(b), *args)

    interpreter.InterpreterBuilder.create_dot = _create_dot_of_bfloat16


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
