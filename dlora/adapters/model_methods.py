"""The methods of a model with adapters, by the names that PEFT and transformers give them.

transformers' classes have methods of these names for adapters that PEFT put in, and would save the
whole base. So a model with adapters becomes a subclass of its class, under the same name, whose
methods mean dlora's adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dlora.adapters.counted import count_parameters
from dlora.adapters.hub import upload
from dlora.adapters.peft_names import PREFIX
from dlora.adapters.save_load import adapter_files, load_adapter, save_adapter
from dlora.adapters.swap import load_named
from dlora.errors import UsageError
from dlora.lora.attach import disabled, every_child
from dlora.lora.foreign import peft_asks
from dlora.lora.made_class import made_class, original_class
from dlora.lora.merge import is_merged, merge, unmerge
from dlora.lora.names import activate, active, attached, by_name, rows
from dlora.lora.several import DEFAULT
from dlora.lora.switch import switch_off, switch_on
from dlora.methods.named import remove

# Arguments of transformers' and PEFT's `save_pretrained`, with the values that change nothing here.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "variant": (None,),
    "safe_serialization": (True,),
    "save_peft_format": (True,),
    "distributed_checkpoint": (False,),
    "save_embedding_layers": ("auto", False),
    "path_initial_model_for_weight_conversion": (None,),
}
# How the base would be cut into files, or where its tensors come from: the adapter has its own.
_OF_THE_BASE = ("state_dict", "max_shard_size", "save_function", "save_original_format")
_STAY = "dlora adapters stay attached"
_WRAPPED = (
    "this model has dlora adapters, which PEFT would wrap and no longer train; use either "
    "dlora.attach or PEFT, on a model of its own"
)
_UPLOADING = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


def equip(model: nn.Module) -> None:
    """Give a model with adapters the methods of `AdaptedModel`, in place; once is enough."""
    if not isinstance(model, AdaptedModel):
        base: Any = type(model)
        kind = GeneratingModel if hasattr(base, "generate") else AdaptedModel
        model.__class__ = made_class(kind, base, base.__name__)


def unequip(model: nn.Module) -> None:
    """Give a model without adapters its own class back."""
    if not attached(model) and isinstance(model, AdaptedModel):
        model.__class__ = original_class(type(model))


def _refused(call: str, why: str) -> Callable[..., None]:
    """A method of PEFT's that raises a `UsageError`, whatever it is given."""

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise UsageError(f"{call}: {why}")

    return refuse


class AdaptedModel:
    """What a model gains, and what replaces methods of transformers' `PreTrainedModel`."""

    def __call__(
        self: Any, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        """The model's own call; see `rows` for `adapter_names`, an adapter for each row."""
        if adapter_names is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with rows(self, adapter_names):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        token: str | bool | None = None,
        selected_adapters: list[str] | None = None,
        **others: Any,
    ) -> None:
        """Write the adapter, never the base, in PEFT's files; see `dlora.save_adapter`.

        Those with names are written into folders of their names, as PEFT does. Any rank may,
        without a collective. What transformers' method has for the files of the base
        (`state_dict`, `max_shard_size`) has no part in it.

        Args:
            is_main_process: False: nothing is written, by this process.
            push_to_hub: upload the files as well, with `repo_id` and the other arguments of
                `push_to_hub`; without `repo_id` under the directory's name.
            selected_adapters: names of those to write; None: all.

        Raises:
            UsageError: an argument asks for something that is not written here.
        """
        uploading = {key: others.pop(key) for key in _UPLOADING if key in others}
        for key, value in others.items():
            if key not in _OF_THE_BASE and value not in _UNUSED.get(key, ()):
                raise UsageError(
                    f"save_pretrained: {key}={value!r} cannot act: the model has dlora adapters, "
                    "so PEFT's files are written; see dlora.save_adapter"
                )
        if uploading and not push_to_hub:
            raise UsageError(f"save_pretrained: {next(iter(uploading))} needs push_to_hub=True")
        if not is_main_process:
            return
        for name in attached(self) if selected_adapters is None else selected_adapters:
            place = Path(save_directory) if name == DEFAULT else Path(save_directory, name)
            save_adapter(self, place, name=name)
        if push_to_hub:
            repository = uploading.pop("repo_id", None) or Path(save_directory).name
            upload(Path(save_directory), repository, token=token, **uploading)

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **others: Any,
    ) -> Any:
        """Upload the adapter's files to the Hugging Face hub; the repository is made if need be.

        Call it on one rank.

        Returns:
            huggingface_hub's record of the commit.

        Raises:
            UsageError: the hub refuses, or cannot be reached.
        """
        for key, value in others.items():
            if key not in _OF_THE_BASE and value is not None:
                raise UsageError(f"push_to_hub: {key}={value!r} cannot act on an adapter's files")
        return upload(
            lambda directory: self.save_pretrained(directory),
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    # -- counts ---------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        """(trained parameters, all parameters), counted whole wherever they are divided."""
        return count_parameters(self)

    def print_trainable_parameters(self: Any) -> None:
        """Print both, and their ratio, in PEFT's words."""
        trained, every = count_parameters(self)
        print(
            f"trainable params: {trained:,d} || all params: {every:,d} || "
            f"trainable%: {100 * trained / every:.4f}"
        )

    # -- switching ------------------------------------------------------------------------------

    def disable_adapters(self: Any) -> None:
        """Compute as the base alone, until `enable_adapters`."""
        switch_off(self)

    def enable_adapters(self: Any) -> None:
        """Compute with the adapters again."""
        switch_on(self)

    @contextmanager
    def disable_adapter(self: Any) -> Iterator[None]:
        """`dlora.disabled`, by the name that a PeftModel has for it."""
        with disabled(self):
            yield

    def active_adapters(self: Any) -> list[str]:
        """The names of the adapters that the model computes with; as in transformers, of those
        that are switched off as well."""
        return active(self)

    def set_adapter(self: Any, adapter_name: str | list[str]) -> None:
        """`dlora.activate`, by the name that PEFT has for it; what is trained does not change."""
        activate(self, adapter_name)

    def load_adapter(
        self: Any,
        peft_model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        **others: Any,
    ) -> None:
        """`dlora.load_adapter`: a directory or hub id into the adapters of a name.

        Raises:
            UsageError: as there, or an argument means PEFT's own adapters.
        """
        for key in (key for key, value in others.items() if value is not None):
            raise UsageError(f"load_adapter: {key} cannot act on dlora adapters")
        if adapter_name == DEFAULT:
            load_adapter(self, peft_model_id)
        else:
            load_named(self, peft_model_id, adapter_name, is_trainable)

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """`dlora.remove`, by the name that PEFT has for it."""
        remove(self, adapter_name)
        unequip(self)

    def get_adapter_state_dict(self: Any, adapter_name: str = DEFAULT) -> dict[str, Tensor]:
        """Copies of the tensors that `save_pretrained` writes, by transformers' keys for them."""
        with by_name(self, adapter_name):
            _, tensors = adapter_files(self, None)
        return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()` and its like: a cast that the replica forbids is refused before it begins."""
        for child in every_child(self):
            child.check_cast(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    # -- merging --------------------------------------------------------------------------------

    def merge_adapter(
        self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """`dlora.merge`, by the name that a PeftModel has for it; nothing where it is merged.

        Args:
            safe_merge: of no effect: a merge that is not finite is refused in any case.

        Raises:
            UsageError: as there, or others than the active adapters are meant.
        """
        if adapter_names not in (None, active(self)):
            raise UsageError(f"merge_adapter: {adapter_names!r}: set_adapter chooses them first")
        if not is_merged(self):
            merge(self)

    def unmerge_adapter(self: Any) -> None:
        """`dlora.unmerge`; nothing where the model is not merged."""
        if is_merged(self):
            unmerge(self)

    merge_and_unload = _refused(
        "merge_and_unload",
        f"{_STAY}; merge_adapter() merges in place, and dlora.export --merge writes a merged model",
    )
    unload = _refused("unload", f"{_STAY}; disable_adapters() is there")
    add_adapter = _refused("add_adapter", "dlora.attach(model, config, name) adds adapters")
    add_weighted_adapter = _refused(
        "add_weighted_adapter", "activate() sums the updates of several"
    )
    enable_peft_hotswap = _refused(
        "enable_peft_hotswap", "the model has dlora adapters, not PEFT's"
    )

    # -- others' adapters -----------------------------------------------------------------------

    @property
    def peft_config(self: Any) -> Any:
        """Not there, since PEFT has no adapters in this model; PEFT's own question is refused."""
        if peft_asks():
            raise UsageError(f"get_peft_model: {_WRAPPED}")
        raise AttributeError("peft_config")

    @peft_config.setter
    def peft_config(self: Any, value: Any) -> None:
        raise UsageError(f"get_peft_model: {_WRAPPED}")


class GeneratingModel(AdaptedModel):
    """A model with a `generate` of transformers'."""

    def generate(
        self: Any, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        """The model's own `generate`; see `rows` for `adapter_names`, an adapter for each row."""
        given = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        sizes = ("num_beams", "num_return_sequences")
        repeated = max(kwargs.get(size) or getattr(given, size, None) or 1 for size in sizes)
        with rows(self, adapter_names, repeated):
            return super().generate(*args, **kwargs)  # type: ignore[misc]
