"""Classes that are made from stock ones and go by their names.

Transformers, PEFT and TRL look classes up by name: a name of our own would miss weight conversions, losses, label
shifts and import lists.
"""

import copyreg
from typing import Any

__all__ = ["make_class", "register", "stock_of"]


class _Generated(type):
    """The class of generated classes: it pickles them as the call that makes them, since their name is another's."""


copyreg.pickle(_Generated, lambda generated: (generated._multimax_maker, (generated.stock_class,)))


def make_class(mixin: type, stock: type, maker: Any, namespace: dict[str, Any]) -> Any:
    """A class ``(mixin, stock)`` with the name, module and documentation of ``stock``.

    Args:
        maker: the function of ``stock`` that makes this class again, where it is unpickled.
        namespace: attributes of the class.
    """
    meta = _Generated if type(stock) is type else type("_Generated", (_Generated, type(stock)), {})
    if meta is not _Generated:
        copyreg.pickle(meta, lambda generated: (generated._multimax_maker, (generated.stock_class,)))
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    own = {"stock_class": stock, "_multimax_maker": staticmethod(maker)}
    return meta(stock.__name__, (mixin, stock), {**names, **own, **namespace})


def register(mapping: Any, config: type, value: Any) -> None:
    """Register with an Auto class's mapping what it makes of a generated config class.

    Before 5.16, ``register`` leaves out whatever is called a class of Transformers.
    """
    mapping.register(config, value, exist_ok=True)
    mapping._extra_content[config] = value


def stock_of(cls: type) -> Any:
    """The stock class under a generated one; a class that was not generated is its own."""
    return getattr(cls, "stock_class", cls)
