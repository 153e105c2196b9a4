"""Networks over one graph: the search of a topology for each task (Choi and Im, CVPR 2023), and its peers."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from den.recipes.dag.fit import Fitted, fit

__all__ = ["Fitted", "fit"]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.fit")
    globals().update({each: getattr(module, each) for each in __all__})
    return globals()[name]
