"""Tensors that say they are on a GPU while the CPU computes them: they test the GPU's path where there is no GPU.

    with pretended_gpu() as waits:
        view = weak_view(image.to(GPU), …)
    assert not waits  # lines of the package at which the host waited for the device, and how often

As on a GPU, two devices in one operation raise. A copy that blocks, and a value that is read back, is a wait. The numbers are the
CPU's, to the bit. Limits: no backward pass (autograd asks the driver for the device's threads), and only the thread that entered.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.package_source import PACKAGE

GPU = torch.device("cuda", 0)
READ_BACK = frozenset(
    f"aten::{name}"
    for name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "_unique2",
                 "unique_dim", "unique_consecutive", "repeat_interleave")
)  # fmt: skip
INDEXING = frozenset(f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_"))


class OnGPU(Tensor):
    """A tensor whose numbers are `held` by one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        tensor = Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=GPU
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} outside of pretended_gpu, or in another thread")


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def waited(self, what: str) -> None:
        """Count a wait under the innermost line of the package; one that a test itself causes is none."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            self.waits[f"{frame.f_code.co_filename.removeprefix(f'{PACKAGE}/')}:{frame.f_lineno} {what}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be changed in place
            return self._run(func, func._schema.name, args, kwargs)

    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in ("aten::is_pinned", "aten::pin_memory", "aten::_pin_memory"):
            return name == "aten::is_pinned" or args[0]
        if name in ("aten::_to_copy", "aten::copy_"):
            return self._copied(func, name, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode it comes here whole, with what waits inside
                return func.decompose(*args, **kwargs)
        tensors = _tensors((*args, *kwargs.values()))
        on_gpu = self._runs_on_gpu(name, tensors, kwargs)
        found = func(*_each(args, _held), **{key: _each(value, _held) for key, value in kwargs.items()})
        if not on_gpu or name == "aten::_local_scalar_dense":
            return found
        known = {
            id(one.held): one for one in tensors if isinstance(one, OnGPU)
        }  # what is changed in place stays itself
        return _each(found, lambda one: known[id(one)] if id(one) in known else OnGPU(one))

    def _runs_on_gpu(self, name: str, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        """Whether the result is on the GPU. RuntimeError where its inputs are on two devices."""
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), torch.device("cpu")
            return device.type == "cuda"
        on_gpu = [one for one in tensors if isinstance(one, OnGPU)]
        on_host = [one for one in tensors if not isinstance(one, OnGPU) and one.dim() > 0]
        indexed = name in INDEXING and isinstance(tensors[0], OnGPU)
        if on_gpu and on_host and not indexed:
            raise RuntimeError(f"{name}: tensors on {GPU} and on the CPU ({[tuple(one.shape) for one in on_host]})")
        by_bool = indexed and any(one.dtype in (torch.bool, torch.uint8) for one in tensors[1:])
        if on_gpu and (name in READ_BACK or (indexed and (on_host or by_bool))):
            self.waited(name)
        return bool(on_gpu)

    def _copied(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        into = name == "aten::copy_"
        target, source = args[0], args[1 if into else 0]
        blocking = not (args[2] if into and len(args) > 2 else kwargs.get("non_blocking", False))
        device = target.device if into else torch.device(kwargs.get("device") or source.device)
        if blocking and device.type != source.device.type:
            self.waited(f"{source.device.type} to {device.type}")
        found = func(*_each(args, _held), **(kwargs if into else {**kwargs, "device": torch.device("cpu")}))
        return target if into else OnGPU(found) if device.type == "cuda" else found


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among the arguments of an operation, in their order; lists hold some too."""
    nested = (value if isinstance(value, list) else [value] for value in values)
    return [one for some in nested for one in some if isinstance(one, Tensor)]


def _each(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What an operation takes or gives, each tensor of it changed."""
    if isinstance(values, (list, tuple)):
        return type(values)([_each(value, change) for value in values])
    return change(values) if isinstance(values, Tensor) else values


def _held(value: Tensor) -> Tensor:
    return value.held if isinstance(value, OnGPU) else value


class _Event:
    mode: _Mode

    def __init__(self, blocking: bool = False) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None:
        self.mode.waited("event")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Counter[str]]:
    torch._C._ensureCUDADeviceGuardSet()
    swapped = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, _Mode() as mode, torch.backends.cudnn.flags(enabled=False):
        patch.setattr(torch.cuda, "_initialized", True)
        patch.setattr(torch.cuda, "Event", type("Event", (_Event,), {"mode": mode}))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield mode.waits
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(swapped)
