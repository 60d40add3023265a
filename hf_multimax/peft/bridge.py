"""The one place that touches what PEFT does not offer: its list of methods is an enum, which is closed.

PEFT's own ``register_peft_method`` does the rest. A member ``MULTIMAX_ADAPTER`` in PEFT itself would replace
``_add_member``, and nothing else.
"""

import importlib.metadata
import logging
from typing import Any

from hf_multimax.peft.names import PREFIX, TYPE

__all__ = ["register", "try_to_register"]

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the adapter known to PEFT, once.

    Raises:
        RuntimeError: if this version of PEFT is not made as the versions before it.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType, register_peft_method

        if TYPE in PEFT_TYPE_TO_CONFIG_MAPPING:
            return
        if TYPE not in list(PeftType):
            _add_member(PeftType)
        from hf_multimax.peft.config import MultiMaxAdapterConfig
        from hf_multimax.peft.model import MultiMaxAdapterModel

        register_peft_method(
            name=TYPE.lower(), config_cls=MultiMaxAdapterConfig, model_cls=MultiMaxAdapterModel, prefix=PREFIX
        )
    except (ImportError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise RuntimeError(
            f"MultiMax cannot be registered with PEFT {importlib.metadata.version('peft')} ({error!r}): "
            "install a version from 0.20 to 0.21, or a newer hf-multimax"
        ) from error


def try_to_register() -> None:
    """:func:`register`, which says in the log what went wrong: PEFT itself must stay importable."""
    try:
        register()
    except RuntimeError as error:
        logger.warning(error)


def _add_member(kinds: Any) -> None:
    """A member of an enum of strings that is there already."""
    member = str.__new__(kinds, TYPE)
    member._name_, member._value_ = TYPE, TYPE
    kinds._member_names_.append(TYPE)
    kinds._member_map_[TYPE] = kinds._value2member_map_[TYPE] = member
    type.__setattr__(kinds, TYPE, member)
