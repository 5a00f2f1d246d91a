"""Callbacks of the user's own, at the points where nnScaler's Trainer has them."""

from trainer.args import HOOKS, HookConfig, load_type


def create(config) -> dict:
    """Callback name -> function, from a HookConfig, a HookMapConfig or None."""
    if config is None:
        return {}
    if isinstance(config, HookConfig):
        hook = load_type(config.type)(config.args)
        found = {name: getattr(hook, name, None) for name in HOOKS}
    else:
        found = {name: load_type(function) if (function := getattr(config, name)) else None for name in HOOKS}
    return {name: function for name, function in found.items() if function}
