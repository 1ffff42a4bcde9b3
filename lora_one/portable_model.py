"""A PEFT model whose ``save_pretrained`` writes adapters that travel.

The class of the model is extended in place, so that everything else (the Trainer, ``isinstance``,
merging) sees the PEFT model that it is.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

from lora_one.adapters import PREFIX, InitReport, keeps_shift_in_adapter, lora_layers
from lora_one.errors import UserError
from lora_one.inits import AdapterInit
from lora_one.portable import portable_config, portable_state

# The methods are those of a PEFT model, whose class comes after this one.
if TYPE_CHECKING:
    _Base = PeftModel
else:
    _Base = object


class PortableMixin(_Base):
    """What ``make_portable`` adds to the class of a PEFT model.

    Attributes:
        init_report: What the start did to the model.
    """

    init_report: InitReport
    _starts: dict[str, AdapterInit]
    _started_adapter: str

    def save_pretrained(
        self,
        save_directory: str,
        *arguments: Any,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> None:
        """As PEFT's, but what is written is for the untouched base model.

        Args:
            save_directory: Gets ``adapter_model.safetensors`` and ``adapter_config.json``.
            arguments: As PEFT's.
            path_initial_model_for_weight_conversion: Where the untouched base model was saved; it is
                named as the base model in the written config. Nothing else changes: the adapter is
                written for it in any case.
            state_dict: As PEFT's.
            settings: As PEFT's.

        Raises:
            UserError: If the folder of the untouched model holds no model.
        """
        base = path_initial_model_for_weight_conversion
        if base is not None and not any((Path(base) / f"{k}config.json").is_file() for k in ("", "adapter_")):
            raise UserError(
                f"path_initial_model_for_weight_conversion={base}: holds no saved model; "
                "give the folder of model.save_pretrained(...) from before the preprocessing"
            )
        if self._shifts_base() and self._adapts_an_end():
            # PEFT would write a targeted output head itself too: here, its shifted weight.
            settings.setdefault("save_embedding_layers", False)
        with self._portable_config(base):
            super().save_pretrained(
                save_directory, *arguments, state_dict=self._portable_state(state_dict), **settings
            )

    def load_adapter(self, model_id: Any, adapter_name: str, *arguments: Any, **settings: Any) -> Any:
        """As PEFT's; the Trainer resumes with it from what ``save_pretrained`` has written.

        Raises:
            UserError: If the file was trained from another start than this model.
        """
        if adapter_name == self._started_adapter and self._shifts_base():
            config = PeftConfig.from_pretrained(model_id)
            own: Any = self.peft_config[adapter_name]
            if getattr(config, "r", None) == 2 * own.r:
                state = self._without_start(load_peft_weights(model_id, device="cpu"), str(model_id))
                return set_peft_model_state_dict(self, state, adapter_name=adapter_name)
        if adapter_name == self._started_adapter:
            settings.setdefault("autocast_adapter_dtype", False)  # its weights keep their dtype
        else:
            self._refuse_another(adapter_name)
        return super().load_adapter(model_id, adapter_name, *arguments, **settings)

    def add_adapter(self, adapter_name: str, *arguments: Any, **settings: Any) -> None:
        """As PEFT's.

        Raises:
            UserError: If the base is shifted: the new adapter would fit a base that nobody else has.
        """
        self._refuse_another(adapter_name)
        super().add_adapter(adapter_name, *arguments, **settings)

    def unload(self) -> Any:
        """As PEFT's.

        Raises:
            UserError: If the base is shifted: what is left would not be the pretrained model.
        """
        if self._shifts_base():
            raise UserError("unload: the base weights are shifted; load the pretrained model again")
        base: Any = self.base_model
        return base.unload()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As PEFT's: inside, the model is the pretrained one, with a shifted base too.

        Raises:
            UserError: If the base is shifted and the adapter is DoRA's.
        """
        if not self._shifts_base():
            with super().disable_adapter():
                yield
            return
        own: Any = self.peft_config[self._started_adapter]
        if own.use_dora:
            raise UserError("disable_adapter: not with DoRA on a shifted base; load the base model beside it")
        layers = lora_layers(self)
        held: list[tuple[Any, Tensor]] = []
        try:
            for name, init in self._starts.items():
                layer = layers[PREFIX + name]
                for factors, start in ((layer.lora_A, init.A_RI), (layer.lora_B, init.B_OR)):
                    parameter = factors[self._started_adapter].weight
                    held.append((parameter, parameter.data))
                    # The shifted base and the first adapter are the pretrained layer.
                    parameter.data = start.to(parameter.device)
            yield
        finally:
            for parameter, data in held:
                parameter.data = data

    def merge_and_unload(self, *arguments: Any, **settings: Any) -> Any:
        """As PEFT's.

        Raises:
            UserError: If the shift of the base is kept in the adapter: the merged weights would lack it.
        """
        if keeps_shift_in_adapter(self):
            raise UserError(
                "the base is shifted by the adapter, not in its weights: save_pretrained, and merge with "
                "PeftModel.from_pretrained(base, folder).merge_and_unload()"
            )
        base: Any = self.base_model
        return base.merge_and_unload(*arguments, **settings)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the PEFT model that it extends."""
        return _rebuild, (type(self).__bases__[1],), self.__dict__

    def _refuse_another(self, adapter_name: str) -> None:
        if self._shifts_base():
            raise UserError(
                f"adapter {adapter_name!r}: the base weights are shifted for {self._started_adapter!r}, so "
                "another one would fit a base that nobody else has; load it on the untouched model"
            )

    def _adapts_an_end(self) -> bool:
        model: Any = self.get_base_model()
        ends = [
            end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None
        ]
        layers = lora_layers(self)
        return any(layers[PREFIX + name] in ends for name in self._starts)

    def _shifts_base(self) -> bool:
        return any(init.shifts_base for init in self._starts.values())

    @contextmanager
    def _portable_config(self, base: str | None) -> Iterator[None]:
        configs: Any = self.peft_config
        own = configs[self._started_adapter]
        portable = portable_config(own, self._shifts_base())
        if base is not None and (Path(base) / "config.json").is_file():
            portable.base_model_name_or_path = str(base)
        configs[self._started_adapter] = portable
        try:
            yield
        finally:
            configs[self._started_adapter] = own

    def _portable_state(self, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        full = dict(self.state_dict() if state is None else state)
        if not self._shifts_base():
            return full
        mark = f".{self._started_adapter}.weight"
        own = {key.replace(mark, ".weight"): full.pop(key) for key in self._keys() if key in full}
        portable = portable_state(own, self._starts)
        return full | {key.removesuffix(".weight") + mark: tensor for key, tensor in portable.items()}

    def _keys(self) -> list[str]:
        mark = f"{self._started_adapter}.weight"
        return [f"{PREFIX}{name}.lora_{factor}.{mark}" for name in self._starts for factor in "AB"]

    def _without_start(self, state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """The trained factors of a written rank-2r adapter, whose other half has to be this start."""
        for name, init in self._starts.items():
            key_A, key_B = (f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
            rank = init.A_RI.shape[0]
            stored_A, stored_B = (
                half.to(init.A_RI) for half in (state[key_A][rank:], state[key_B][:, rank:])
            )
            if not (torch.equal(stored_A, -init.A_RI) and torch.equal(stored_B, init.B_OR)):
                raise UserError(
                    f"{where}: trained from another start than this model ({name}); prepare the gradients "
                    "from the same cache_file, or load it with peft.PeftModel on the untouched base model"
                )
            state[key_A], state[key_B] = state[key_A][:rank].clone(), state[key_B][:, :rank].clone()
        return state


def make_portable(
    model: PeftModel, starts: dict[str, AdapterInit], report: InitReport, adapter_name: str
) -> Any:
    """The same model, which now writes adapters for the untouched base model."""
    kind: Any = type(model)
    model.__class__ = _portable_class(kind)
    portable: Any = model
    portable._starts, portable._started_adapter, portable.init_report = starts, adapter_name, report
    return portable


def _rebuild(kind: Any) -> Any:
    extended = _portable_class(kind)
    return extended.__new__(extended)


@functools.cache
def _portable_class(kind: Any) -> Any:
    return type(kind.__name__, (PortableMixin, kind), {"__module__": kind.__module__})
