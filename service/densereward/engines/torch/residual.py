"""A float32 residual stream for decoders whose weights are of half precision.

A decoder adds the output of every attention and MLP to one stream. In half precision each addition rounds the whole
stream. Token rewards are differences of prefix scores, and drown in that noise as models get deeper. Here the stream
stays float32: the embedding's output, the additions and the norms. Weights and matrix products stay as they are.

No model code is needed. A small pass shows what reads the stream:

    embedding               gives float32, so the model's own additions are in float32
    norms that read it      compute in float32 and give half precision; the last norm gives the head float32
    rotary embeddings       give half precision, as before
    other modules           get what they read of it in half precision

A model in which float32 does not arrive at the end runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from densereward.errors import EngineFailure

__all__ = ["ResidualDtype", "ResidualStream"]

ResidualDtype = Literal["float32", "weights"]
"""Of the residual stream of a half-precision model: float32 where it can be, or the dtype of the weights."""


class ResidualStream:
    """The residual stream of one decoder.

    Args:
        backbone: the decoder.
        probe: runs a small pass of it, and returns its last hidden state.

    Attributes:
        dtype: the stream's.
    """

    def __init__(self, backbone: Any, probe: Callable[[], Tensor]) -> None:
        self.dtype: torch.dtype = backbone.dtype
        self._narrow = self.dtype
        self._active = True
        self._handles: dict[nn.Module, Any] = {}
        self._reading: set[nn.Module] = set()
        self._probing = True
        self._last_norm: nn.Module | None = None
        self._last_output: Tensor | None = None
        if self.dtype not in (torch.bfloat16, torch.float16):
            return
        self._hook(backbone)
        arrives = self._arrives(probe)
        self._probing, self._last_output = False, None
        if arrives:
            self.dtype = torch.float32
            self._remove(self._handles.keys() - self._reading)
        else:
            self._remove(list(self._handles))

    @contextmanager
    def off(self) -> Iterator[None]:
        """What runs within keeps the dtype that it has of itself."""
        self._active = False
        try:
            yield
        finally:
            self._active = True

    def _hook(self, backbone: Any) -> None:
        embedding = backbone.get_input_embeddings()
        for module in backbone.modules():
            if module is embedding:
                self._handles[module] = module.register_forward_hook(self._widen_output)
                self._reading.add(module)
            elif "rotary" in type(module).__name__.lower():
                self._handles[module] = module.register_forward_hook(self._narrow_output)
            elif _is_norm(module):
                _compute_in_float32(module)
                self._handles[module] = module.register_forward_hook(self._norm_output)
            elif any(True for _ in module.parameters(recurse=False)):
                self._handles[module] = module.register_forward_pre_hook(self._narrow_input, with_kwargs=True)

    def _arrives(self, probe: Callable[[], Tensor]) -> bool:
        """Whether the stream is float32 at the end of a pass: as the last norm's input, or as it is."""
        try:
            hidden = probe()
        except (EngineFailure, RuntimeError, TypeError):  # whatever a model's code makes of a dtype it did not expect
            return False
        if self._last_output is not None and self._last_output.data_ptr() == hidden.data_ptr():
            return True
        self._last_norm = None
        return hidden.dtype == torch.float32

    def _remove(self, modules: Any) -> None:
        for module in list(modules):
            self._handles.pop(module).remove()

    def _widen_output(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.float() if self._active else output

    def _narrow_output(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if not self._active:
            return output
        if self._probing:
            self._reading.add(module)
        if isinstance(output, Tensor):
            return output.to(self._narrow)
        return tuple(each.to(self._narrow) for each in output)

    def _norm_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._active or args[0].dtype != torch.float32:
            return output
        if module is self._last_norm and not self._probing:
            return output
        narrowed = output.to(self._narrow)
        if self._probing:
            self._reading.add(module)
            self._last_norm, self._last_output = module, narrowed
        return narrowed

    def _narrow_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._active:
            return None
        place = next((i for i, each in enumerate(args) if _is_wide(each)), None)
        if place is not None:
            args = (*args[:place], args[place].to(self._narrow), *args[place + 1 :])
        elif _is_wide(kwargs.get("hidden_states")):
            kwargs = kwargs | {"hidden_states": kwargs["hidden_states"].to(self._narrow)}
        else:
            return None
        if self._probing:
            self._reading.add(module)
        return args, kwargs


def _is_wide(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dtype == torch.float32


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _compute_in_float32(module: nn.Module) -> None:
    """Let torch's own norms take float32 beside narrow weights; those of transformers' models do so already."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float()

    own: Any = module
    if type(module) is nn.LayerNorm:
        forward = module.forward
        own.forward = lambda given: (
            layer_norm(given, own.normalized_shape, wide(own.weight), wide(own.bias), own.eps)
            if _is_wide(given)
            else forward(given)
        )
    elif type(module) is nn.RMSNorm:
        plain = module.forward
        own.forward = lambda given: (
            rms_norm(given, own.normalized_shape, wide(own.weight), own.eps) if _is_wide(given) else plain(given)
        )
