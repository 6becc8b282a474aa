"""An ``nn.LSTM`` whose dropouts let its matrix products skip the dropped units."""

# No postponed annotations in this file: torch.jit.script reads those of the class.
from copy import copy
from typing import Any, overload

import torch
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _capture, functional, hints
from ._autocast import autocast_dtype
from ._compile import opaque
from .functional import LayerCall, Operand
from .kernels import Steps
from .patterns import Case, check_probability, check_sampling, draw

#: NR+Random (the baseline), NR+ST and NR+RH+ST of the paper's tables.
MODES = ("random", "nr_st", "nr_rh_st")


#: What ``__init__`` adds to the arguments of ``nn.LSTM`` -> the attribute that holds it. One of the latter has another
#: name, because ``nn.LSTM`` keeps its own kind in ``mode``, which cuDNN is asked for.
OPTIONS = {
    "recurrent_dropout": "recurrent_dropout",
    "input_dropout": "input_dropout",
    "output_dropout": "output_dropout",
    "mode": "dropout_mode",
    "locked": "locked",
    "sampling": "sampling",
    "native": "native",
    "site": "site",
}


def check_mode(mode: str) -> str:
    """``mode`` itself; ValueError unless it is one of :data:`MODES`."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def with_dropout_mode(state: dict[str, Any], stock_mode: str | None = None) -> dict[str, Any]:
    """The state of a pickled module, which may be one from when the option was kept in ``mode``.

    Args:
        stock_mode: what ``mode`` holds instead; None for no such attribute.
    """
    if state.get("mode") not in MODES:
        return state
    state = {**state, "dropout_mode": state["mode"], "mode": stock_mode}
    if stock_mode is None:
        del state["mode"]
    return state


class StructuredDropoutLSTM(nn.LSTM):
    r"""``torch.nn.LSTM`` with structured dropout in both directions of information flow.

    .. math::
        \text{gates}_t = W_{ih}\, D^{x}_t(x_t) + W_{hh}\, D^{h}_t(h_{t-1}) + b

    where :math:`D_t` keeps the same units for the whole batch at step :math:`t` and new ones at the next. The
    mask acts inside the products: the emitted :math:`h_t` and the cell path :math:`c_t` stay undropped.

    Args:
        *args, **kwargs: all of ``nn.LSTM`` (``input_size``, ``hidden_size``, ``num_layers``, ``bias``,
            ``batch_first``, ``dropout`` between layers, ``bidirectional``, ``device``, ``dtype``).
        recurrent_dropout: probability for :math:`h_{t-1}` in each layer and direction.
        input_dropout: probability for the first layer's input.
        output_dropout: probability for the last layer's output (both directions together).
        mode: ``"nr_rh_st"`` (default): every dropout structured. ``"nr_st"``: structured, without recurrent
            dropout. ``"random"``: all dropouts random, products dense: the baseline. Its attribute is
            ``dropout_mode``, since ``mode`` is ``"LSTM"`` in every ``nn.LSTM``.
        locked: the same units at all time steps (Cases II and IV of Fig. 1).
        sampling: ``"exact"`` or ``"bernoulli"``; see :func:`sd_plugin.patterns.draw_kept`.
        native: use ``nn.LSTM``'s own kernels where nothing can be skipped (eval mode, all probabilities 0, random
            dropout without a recurrent one). False always runs this library's kernels.
        site: prefix of its sites in the report.

    Inputs, outputs, shapes, parameter names and ``state_dict`` are ``nn.LSTM``'s, packed sequences and unbatched
    input included. An input that carries a hint (from :class:`StructuredDropout`) is skipped likewise; an output
    that was dropped carries one.

    Raises:
        ValueError: a probability is not in [0, 1), ``mode`` or ``sampling`` is unknown, or ``nr_st`` is given a
            recurrent dropout. NotImplementedError: ``proj_size`` is not 0.

    Source: Sarma et al. 2021 (arXiv 2106.12089), section 3.
    """

    qconfig = _capture.NotQuantized()
    #: Not compiled by ``torch.jit.script``.
    __jit_unused_properties__ = [*nn.LSTM.__jit_unused_properties__, "case"]  # noqa: RUF012 - as torch writes it

    def __init__(
        self,
        *args: Any,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        mode: str = "nr_rh_st",
        locked: bool = False,
        sampling: str = "exact",
        native: bool = True,
        site: str = "lstm",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("proj_size", 0) != 0:
            raise NotImplementedError("StructuredDropoutLSTM has no projections (proj_size must be 0)")
        super().__init__(*args, **kwargs)
        if self.proj_size != 0:
            raise NotImplementedError("StructuredDropoutLSTM has no projections (proj_size must be 0)")
        self.configure(
            recurrent_dropout=recurrent_dropout,
            input_dropout=input_dropout,
            output_dropout=output_dropout,
            mode=mode,
            locked=locked,
            sampling=sampling,
            native=native,
            site=site,
        )

    def configure(
        self,
        *,
        recurrent_dropout: float,
        input_dropout: float,
        output_dropout: float,
        mode: str,
        locked: bool = False,
        sampling: str = "exact",
        native: bool = True,
        site: str = "lstm",
    ) -> None:
        """Set what ``__init__`` adds to ``nn.LSTM``; arguments and errors as there."""
        self.dropout_mode = check_mode(mode)
        self.sampling = check_sampling(sampling)
        self.locked, self.native, self.site = locked, native, site
        check_probability(self.dropout, "dropout")
        self.input_dropout = check_probability(input_dropout, "input_dropout")
        self.output_dropout = check_probability(output_dropout, "output_dropout")
        self.recurrent_dropout = check_probability(recurrent_dropout, "recurrent_dropout")
        if mode == "nr_st" and self.recurrent_dropout:
            raise ValueError("mode nr_st has no recurrent dropout; use nr_rh_st, or recurrent_dropout=0")

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Any) -> "StructuredDropoutLSTM":
        """A second module that shares ``lstm``'s parameters, hooks and training flag.

        Args:
            **options: of ``__init__``; those not given have its defaults.

        Raises:
            NotImplementedError: ``lstm`` has projections. ValueError: as ``__init__``. TypeError: an option is unknown.
        """
        if lstm.proj_size != 0:
            raise NotImplementedError("StructuredDropoutLSTM has no projections (proj_size must be 0)")
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; valid: {', '.join(OPTIONS)}")
        module = cls.__new__(cls)
        # Containers are copied, so that each module registers for itself; what they hold is shared.
        own = {k: copy(v) if isinstance(v, (dict, list, set)) else v for k, v in lstm.__dict__.items()}
        module.__dict__.update(own)
        defaults = {"recurrent_dropout": 0.0, "input_dropout": 0.0, "output_dropout": 0.0, "mode": "nr_rh_st"}
        module.configure(**{**defaults, **options})
        return module

    @classmethod
    def adopt(cls, lstm: nn.LSTM, **options: Any) -> "StructuredDropoutLSTM":
        """Make an existing ``nn.LSTM`` one of this class, in place: same object, parameters and hooks.

        Arguments and errors as :meth:`from_lstm`; nothing is changed if one is raised.
        """
        checked = cls.from_lstm(lstm, **options)
        # One that was converted and then parametrized has a class that torch made of this one.
        if not isinstance(lstm, cls):
            lstm.__class__ = cls
        lstm.__dict__.update({name: checked.__dict__[name] for name in OPTIONS.values()})
        return lstm  # type: ignore[return-value]

    @property
    def case(self) -> Case:
        """The case of Fig. 1 that ``dropout_mode`` and ``locked`` amount to."""
        return Case.of(self.dropout_mode != "random", self.locked)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(with_dropout_mode(state, "LSTM"))

    # Two kinds of input, told to torch.jit.script as torch's own module tells it.
    @overload
    @torch._jit_internal._overload_method
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        pass

    @overload
    @torch._jit_internal._overload_method
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        pass

    def forward(self, input: Any, hx: Any = None) -> Any:
        # (torch.jit.script compiles what is left without this branch.)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._scripted_packed(input, hx)
        else:  # noqa: RET505 - of two branches it compiles the one that the input's type takes
            return self._scripted(input, hx)

    def _forward(self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None) -> Any:
        if isinstance(input, _capture.Proxy):
            return _capture.as_node(self, super().forward, self._drops(), input, hx)
        if self.native and not self.training:
            return super().forward(input, hx)
        return self._forward_opaque(input, hx)

    @opaque
    def _forward_opaque(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        if self._is_native(input):
            return self._forward_native(input, hx)
        _capture.refuse_recording(self)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        return self._forward_tensor(input, hx)

    # (Compiled by torch.jit.script too.)
    def _drops(self) -> bool:
        """A dropout is on that ``nn.LSTM`` has not: its own is at random and between layers."""
        own = self.recurrent_dropout > 0.0 or self.input_dropout > 0.0 or self.output_dropout > 0.0
        between = self.num_layers > 1 and self.dropout > 0.0 and (self.locked or self.dropout_mode != "random")
        return self.training and (own or between)

    def _is_native(self, input: Tensor | PackedSequence) -> bool:
        """No product can skip, and every dropout inside the stack is one that ``nn.LSTM`` itself does."""
        if not self.native or not self.training:
            return self.native
        if self.recurrent_dropout:
            return False
        if self.case is not Case.I and (self.input_dropout or self.output_dropout or self.dropout):
            return False
        return hints.lookup(input.data if isinstance(input, PackedSequence) else input) is None

    def _forward_native(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """``nn.LSTM``'s own kernels, between the random dropouts it does not have."""
        y, state = super().forward(self._drop_random(input, self.input_dropout), hx)
        return self._drop_random(y, self.output_dropout), state

    def _drop_random(self, x: Tensor | PackedSequence, p: float) -> Tensor | PackedSequence:
        if not self.training or p == 0:
            return x
        if isinstance(x, PackedSequence):
            return x._replace(data=nn.functional.dropout(x.data, p))
        return nn.functional.dropout(x, p)

    def _forward_tensor(self, input: Tensor, hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        steps = Steps(int(self.batch_first and batched))
        if hx is not None and any(state.dim() != input.dim() for state in (hx[0], hx[1])):
            raise RuntimeError(
                f"For {'batched' if batched else 'unbatched'} input, hx and cx should be {input.dim()}-D, got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        if hx is not None and not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        hx = self._initial_state(x, steps.batch(x), hx, None)
        y, h_n, c_n = self._layers(x, hx, steps)
        if batched:
            return y, (h_n, c_n)
        return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))

    def _forward_packed(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        steps = Steps.packed(batch_sizes.tolist())
        hx = self._initial_state(data, steps.batch(data), hx, sorted_indices)
        y, h_n, c_n = self._layers(data, hx, steps)
        packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden((h_n, c_n), unsorted_indices)

    def _initial_state(
        self, x: Tensor, batch: int, hx: tuple[Tensor, Tensor] | None, sorted_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``hx`` checked and in the order of the rows, or zeros, ``[layers · directions, B, H]``."""
        shape = (self.num_layers * (1 + self.bidirectional), batch, self.hidden_size)
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        dtype = self._parameters_of("l0")[0].dtype
        if x.dtype != dtype and autocast_dtype(x.device.type) is None:
            raise ValueError(f"RNN input dtype ({x.dtype}) does not match weight dtype ({dtype})")
        if hx is None:
            zeros = x.new_zeros(shape)
            return zeros, zeros
        for name, state in zip(("hidden[0]", "hidden[1]"), hx, strict=True):
            self.check_hidden_size(state, shape, f"Expected {name} size {{}}, got {{}}")
        return self.permute_hidden(hx, sorted_indices)

    def _layers(self, x: Tensor, hx: tuple[Tensor, Tensor], steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
        """All layers, with the dropouts between, before and after them."""
        x = self._drop(x, self.input_dropout, steps, "input")
        directions = 1 + self.bidirectional
        finals: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = self._drop(x, self.dropout, steps, f"l{layer}.input")
            outputs = []
            operand = self._input_operand(x, steps)
            for direction in range(directions):
                state = (hx[0][layer * directions + direction], hx[1][layer * directions + direction])
                y, *final = self._direction(x, state, operand, steps, layer, direction)
                outputs.append(y)
                finals.append((final[0], final[1]))
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        x = self._drop(x, self.output_dropout, steps, "output")
        return x, torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals])

    def _drop(self, x: Tensor, p: float, steps: Steps, where: str) -> Tensor:
        if not self.training:
            return x
        return functional.dropout(x, p, self.case, steps, sampling=self.sampling, site=f"{self.site}.{where}")

    def _input_operand(self, x: Tensor, steps: Steps) -> Operand:
        """What the layer's input knows of its zero columns, if that speaks of the same time steps."""
        hint = hints.lookup(x) if self.training else None
        return Operand.hinted(hint if hint is not None and hint.speaks_of(x, steps) else None, x)

    def _direction(
        self, x: Tensor, state: tuple[Tensor, Tensor], operand: Operand, steps: Steps, layer: int, direction: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        suffix = f"l{layer}{'_reverse' if direction else ''}"
        recurrent = self._recurrent_operand(x, steps, suffix)
        call = LayerCall(operand, recurrent, steps, reverse=bool(direction))
        return functional.lstm_layer(x, state, self._parameters_of(suffix), call)

    def _recurrent_operand(self, x: Tensor, steps: Steps, suffix: str) -> Operand:
        if not self.training or self.recurrent_dropout == 0:
            return Operand()
        pattern = draw(
            self.case,
            steps.count(x),
            steps.batch(x),
            self.hidden_size,
            self.recurrent_dropout,
            sampling=self.sampling,
            device=x.device,
            dtype=x.dtype,
        )
        return Operand.drawn(pattern, f"{self.site}.{suffix}.recurrent")

    def _parameters_of(self, suffix: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One direction's parameters, looked up by name so that re-parametrised weights are seen."""
        weights = getattr(self, f"weight_ih_{suffix}"), getattr(self, f"weight_hh_{suffix}")
        if not self.bias:
            return (*weights, None, None)
        return (*weights, getattr(self, f"bias_ih_{suffix}"), getattr(self, f"bias_hh_{suffix}"))

    def _scripted(self, input: Tensor, hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``nn.LSTM.forward`` of a tensor, for ``torch.jit.script``, which knows no ``super()``."""
        self._refuse_scripted_training()
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        if hx is not None and not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        state = self._scripted_state(x, x.size(batch_dim), hx, None)
        self.check_forward_args(x, state, None)
        y, h, c = _VF.lstm(
            x,
            state,
            self._flat_weights,  # type: ignore[arg-type]
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        if batched:
            return y, (h, c)
        return y.squeeze(batch_dim), (h.squeeze(1), c.squeeze(1))

    def _scripted_packed(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        """The same of a packed sequence."""
        self._refuse_scripted_training()
        data, batch_sizes, sorted_indices, unsorted_indices = input
        state = self._scripted_state(data, int(batch_sizes[0]), hx, sorted_indices)
        self.check_forward_args(data, state, batch_sizes)
        y, h, c = _VF.lstm(
            data,
            batch_sizes,
            state,
            self._flat_weights,  # type: ignore[arg-type]
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden((h, c), unsorted_indices)

    def _scripted_state(
        self, x: Tensor, batch: int, hx: tuple[Tensor, Tensor] | None, sorted_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if hx is not None:
            return self.permute_hidden(hx, sorted_indices)
        directions = 2 if self.bidirectional else 1
        zeros = torch.zeros(self.num_layers * directions, batch, self.hidden_size, dtype=x.dtype, device=x.device)
        return zeros, zeros

    def _refuse_scripted_training(self) -> None:
        if self._drops():
            raise RuntimeError(
                "a scripted StructuredDropoutLSTM is for evaluation: sd_plugin.to_stock(model) before scripting"
            )

    def extra_repr(self) -> str:
        own = {
            "recurrent_dropout": self.recurrent_dropout,
            "input_dropout": self.input_dropout,
            "output_dropout": self.output_dropout,
        }
        told = [f"{name}={p}" for name, p in own.items() if p] + [f"mode={self.dropout_mode}"]
        return ", ".join([super().extra_repr(), *told])
