"""Tokens in a config: there for requests, and not in what is printed, logged or saved."""

from typing import Any


class Credential(str):
    """A token that shows as `<TOKEN>` and is pickled as `None`. Requests and copies get it as it is."""

    def __repr__(self):
        return "<TOKEN>"

    def __reduce_ex__(self, protocol):
        return type(None), ()

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


class CredentialsMixin:
    """
    For configs: put it before [`~transformers.TrainingArguments`] among the bases.

    transformers pickles the whole config into the `training_args.bin` of every save, which is pushed with the model,
    and masks `hub_token` only where it writes text. Here every value whose name is `token` or ends in `_token` is a
    [`Credential`], also within a dict such as `model_init_kwargs`. A config that was pickled (`training_args.bin`, the
    arguments of a spawned process) has `None` there, which stands for the token of `hf auth login` or of `HF_TOKEN`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _hidden(name, value))

    def to_dict(self) -> dict[str, Any]:
        """The parent's, for trackers and JSON, with tokens masked in dicts too."""
        return {name: _masked(value) for name, value in super().to_dict().items()}


def _hidden(name: str, value: Any) -> Any:
    if isinstance(value, str) and (name == "token" or name.endswith("_token")):
        return Credential(value)
    if type(value) is dict:
        hidden = {key: _hidden(str(key), item) for key, item in value.items()}
        return hidden if any(hidden[key] is not value[key] for key in value) else value
    return value


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    return repr(value) if isinstance(value, Credential) else value
