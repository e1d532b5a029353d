# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA layers as adapted layers: the same modules, keys and methods, computed by the fused op."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .. import functional as FE
from ..errors import TargetError
from ..layers.adapted import LIVING, AdaptedLinear, Location
from ..layers.plain import not_plain, own_tensors
from ..layers.slices import AdapterSlice
from ._library import require

require("peft")

from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402  (after the version check)
from transformers.pytorch_utils import Conv1D  # noqa: E402

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes that a layer has in addition to those of PEFT's class; `release_` removes them.
_OWN = ("fisher_capture", "forward_calls", "origin_fingerprint", "consolidated_tasks", "bound", "gaussian")


class FusedPeft(AdaptedLinear):
    """Base class of PEFT's LoRA layers whose plain calls (one active adapter, no variant) are fused.

    The class of a layer is swapped in place, so `isinstance`, state_dict keys and all methods of PEFT keep
    working. Calls that are not fused run PEFT's forward; `not_fused` gives the reason.
    x `[..., in_features]`, y `[..., out_features]`.
    """

    plain: ClassVar[type[Any]]  # a class of PEFT
    weight_path = "base_layer.weight"
    bases: ClassVar[tuple[type[nn.Module], ...]]  # classes of base layers that the op computes
    factor: ClassVar[type[nn.Module]] = nn.Linear  # the class of the modules in lora_A and lora_B

    bound: str | None  # the adapter that the EWC of attach_ewc belongs to
    gaussian: bool  # whether a new lora_A is normal with standard deviation 1 / r

    # Attributes of PEFT, most of them mappings from the name of the adapter.
    base_layer: Any
    r: Any
    scaling: dict[str, float]
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: dict[str, Any]
    active_adapters: list[str]
    _disable_adapters: bool

    @classmethod
    def accelerate_(cls, module: nn.Module) -> FusedPeft:
        """Turn a layer whose class is exactly `plain` into this class, in place."""
        module.__class__ = cls
        layer = cast(FusedPeft, module)
        LIVING.add(layer)
        layer.fisher_capture, layer.bound, layer.gaussian = None, None, False
        layer.forward_calls = layer.consolidated_tasks = 0
        # A merged weight is not the pretrained one.
        layer.origin_fingerprint = "" if layer.merged else layer.weight_fingerprint()
        return layer

    def release_(self) -> nn.Module:
        """Turn this layer back into PEFT's class, in place."""
        for name in _OWN:
            self.__dict__.pop(name, None)
        self.__class__ = self.plain
        return self

    def not_plain(self) -> str | None:
        """As in `AdaptedLinear`, of the base layer and of the active adapters."""
        matrices = [table[name] for name in self.active_names() for table in (self.lora_A, self.lora_B)]
        places = [*self._base_places(), *((matrix, "weight") for matrix in matrices)]
        reasons = (not_plain(module, name) for module, name in places)
        return next((reason for reason in reasons if reason is not None), None)

    def active_names(self) -> list[str]:
        """The names of the active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.lora_A]

    @property
    def adapter_slices(self) -> tuple[AdapterSlice, ...]:  # type: ignore[override]
        """The active adapters; a single one has the name `""`, as in a layer that `inject` adapted."""
        names = self.active_names()
        rows = ((0, self.out_features),)
        return tuple(
            AdapterSlice(name if len(names) > 1 else "", rows, self.r[name], float(self.scaling[name]))
            for name in names
        )

    @property
    def adapters_enabled(self) -> bool:
        """Whether PEFT's adapters are enabled; unlike PEFT's methods, setting it keeps requires_grad."""
        return not self._disable_adapters

    @adapters_enabled.setter
    def adapters_enabled(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    @property
    def dropout_p(self) -> float:
        """The largest dropout probability of the active adapters."""
        return max((_dropout(self.lora_dropout[name]) or 0.0 for name in self.active_names()), default=0.0)

    def parameter_locations(self, piece: AdapterSlice) -> tuple[Location, Location]:
        """Where lora_A and lora_B of an active adapter are stored; raises as `adapter_scale` does."""
        name = self._name_of(piece)
        return (own_tensors(self.lora_A[name]), "weight"), (own_tensors(self.lora_B[name]), "weight")

    def named_lora_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """lora_A and lora_B of the active adapters, named as in a layer that `inject` adapted."""
        named = []
        for piece, lora_a, lora_b in self.adapter_parameters():
            named += [(piece.a_name, lora_a), (piece.b_name, lora_b)]
        return named

    def adapter_scale(self, adapter: AdapterSlice) -> float | Tensor:
        """PEFT's current scaling of the adapter; raises `TargetError` when the layer belongs to an EWC whose
        adapter is not the active one."""
        return float(self.scaling[self._name_of(adapter)])

    def _name_of(self, piece: AdapterSlice) -> str:
        self._check_bound()
        names = self.active_names()
        if piece.name:
            return piece.name
        if len(names) != 1:
            raise TargetError(f"expected one active adapter, got {names}; call set_adapter(name)")
        return names[0]

    def _check_bound(self) -> None:
        if self.bound is not None and (names := self.active_names()) != [self.bound]:
            raise TargetError(
                f"the EWC of attach_ewc belongs to the adapter {self.bound!r}, but {names} are active; call "
                f"set_adapter({self.bound!r}) on the PEFT model"
            )

    @torch.no_grad()
    def reset_adapters(self, generator: torch.Generator | None = None) -> None:
        """Initialise the adapters in place, as at the start of a task: B = 0, and A normal with standard
        deviation 1 / r for init_lora_weights="gaussian", else as in `AdaptedLinear.reset_adapters`, which is
        PEFT's default."""
        super().reset_adapters(generator)
        if self.gaussian:
            for piece, lora_a, _ in self.adapter_parameters():
                device = lora_a.device if generator is None else generator.device
                drawn = torch.empty(lora_a.shape, dtype=lora_a.dtype, device=device)
                lora_a.copy_(drawn.normal_(0.0, 1.0 / piece.r, generator=generator))

    def not_fused(self) -> str | None:
        """The reason why PEFT's own forward serves the layer at present, or None."""
        if why := self.base_unfit(self.base_layer):
            return why
        names = self.active_names()
        if not names:
            return "none of its adapters is active"
        if len(names) > 1:
            return f"{len(names)} adapters are active: {', '.join(names)}"
        return self._adapter_unfit(names[0])

    def _adapter_unfit(self, name: str) -> str | None:
        lora_a, lora_b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if name in self.lora_variant:
            return f"adapter {name!r} is a variant ({type(self.lora_variant[name]).__name__})"
        if lora_b.bias is not None:
            return f"adapter {name!r} has a bias (lora_bias)"
        if type(lora_a) is not self.factor or type(lora_b) is not self.factor:
            kinds = f"{type(lora_a).__name__} and {type(lora_b).__name__}"
            return f"lora_A and lora_B of adapter {name!r} are {kinds}, not nn.{self.factor.__name__}"
        if _dropout(dropout) is None:
            return f"adapter {name!r} has {type(dropout).__name__} for dropout"
        for module in (self.base_layer, lora_a, lora_b, dropout):
            if _observed(module):
                return f"{type(module).__name__} inside it has hooks, which the fused op would not call"
        dtype, other = (cast(Tensor, factor.weight).dtype for factor in (lora_a, lora_b))
        return self._dtype_unfit(name, dtype, other)

    def _dtype_unfit(self, name: str, dtype: torch.dtype, other: torch.dtype) -> str | None:
        weight = self.base_layer.weight
        device = weight.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if weight.dtype == torch.float64:
            compute = torch.float64
        allowed = (compute,) if compute == torch.float64 else (compute, torch.float32)
        if other != dtype or dtype not in allowed:
            return f"adapter {name!r} is {dtype}, but the layer computes in {compute}"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of x; calls with further arguments (adapter_names of a mixed batch) run PEFT's forward."""
        if not torch.compiler.is_compiling():
            (self._original or self).__dict__["forward_calls"] += 1
        extra = bool(args) or any(value is not None for value in kwargs.values())
        plain = extra or self.merged or self._disable_adapters
        if plain or (why := self.not_fused()) is not None:
            if self.fisher_capture is not None:
                why = "the layer is merged or disabled, or got arguments beside x" if plain else why
                raise TargetError(f"a Fisher pass needs the fused op, which does not serve this call: {why}")
            return self._plain_forward(x, *args, **kwargs)
        if self.fisher_capture is not None:
            self._check_bound()
        (name,) = self.active_names()
        dropout = self.lora_dropout[name]
        return self._fused_forward(x, self._adapter(name), _dropout(dropout) or 0.0, dropout.training)

    def _adapter(self, name: str) -> FE.Adapter:
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        return FE.Adapter(lora_a, lora_b, float(self.scaling[name]), ((0, self.out_features),))

    def _plain_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own forward."""
        return cast(Tensor, self.plain.forward(self, x, *args, **kwargs))

    def _fused_forward(self, x: Tensor, adapter: FE.Adapter, dropout_p: float, training: bool) -> Tensor:
        return FE.lora_linear_adapters(
            x,
            self.base_weight,
            self.base_layer.bias,
            [adapter],
            dropout_p=dropout_p,
            training=training,
            capture=self.fisher_capture,
        )

    def consolidated_weight(self) -> Tensor:
        """A new tensor W + scaling B A, as in `AdaptedLinear`; raises `TargetError` while merged, and when
        the layer has other adapters, because these were trained on W and would no longer match the weight."""
        if len(self.lora_A) > 1:
            raise TargetError(
                f"consolidation changes the base weight under all adapters, of which there are "
                f"{sorted(self.lora_A)}; delete_adapter the others first"
            )
        return super().consolidated_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's own merge."""
        self.plain.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """PEFT's own unmerge, which subtracts."""
        self.plain.unmerge(self)

    def extra_repr(self) -> str:
        return nn.Module.extra_repr(self)

    @classmethod
    def base_unfit(cls, base: nn.Module) -> str | None:
        """The reason why calls with this base layer cannot be fused, or None."""
        if type(base) not in cls.bases:
            return f"its base layer is {type(base).__name__}, not nn.{cls.bases[0].__name__}"
        weight: Any = own_tensors(base).get("weight")
        if weight is None:
            return not_plain(base, "weight")
        if type(weight) not in (nn.Parameter, Tensor):
            return f"its base weight is {type(weight).__name__}, not a plain parameter"
        return (
            None if weight.is_floating_point() else f"its base weight is {weight.dtype}, not floating point"
        )


class FusedPeftLinear(FusedPeft, PeftLinear):
    """`peft.tuners.lora.layer.Linear`: x `[..., in_features]`, y `[..., out_features]`."""

    plain = PeftLinear
    bases = (nn.Linear, Conv1D)

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        """Whether the base layer is a Conv1D, whose weight is `[in_features, out_features]`."""
        return type(self.base_layer) is Conv1D


def _dropout(module: nn.Module) -> float | None:
    """The dropout probability of a module, 0 for `nn.Identity`, None for a module of another class."""
    if type(module) is nn.Identity:
        return 0.0
    return module.p if type(module) is nn.Dropout else None


def _observed(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)
