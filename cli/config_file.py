"""Reads and writes YAML files of flags: one plain value a name."""

import os
from pathlib import Path
from typing import Any

from errors import UserError

FIX = "Write a line `name: value` for each flag"
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("", "~", "null", "Null", "NULL")


def read(path: str) -> dict[str, str | None]:
    """Return the text of each name's value, as the command line would have it; None for null.

    YAML would read 2e-5 as text, on as true and 1:2:3 as a number, so nothing is converted here.
    Raises UserError.
    """
    import yaml

    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"--config={path} cannot be read: {error.strerror}", "Check the name") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config={path} is not YAML: {reason}", FIX) from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"--config={path} is not a mapping of flags to values", FIX)
    values = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            raise UserError(f"--config={path}, line {line}: a flag has more than one value", FIX)
        if key.value in values:
            raise UserError(f"--config={path} has {key.value} twice", "Leave one of them out")
        is_quoted = value.style is not None
        is_null = value.value in NULLS and not is_quoted
        values[key.value] = None if is_null else value.value
    return values


def read_switch(path: str, name: str, text: str) -> bool:
    """Return whether a switch is on. Raises UserError."""
    if text.lower() not in SWITCHES:
        raise UserError(f"--config={path}: {name} is {text!r}", "Give true or false")
    return SWITCHES[text.lower()]


def write(path: Path, values: dict[str, Any]) -> None:
    """Write the values in one step: the file is the old one or the new one, never a part."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(temporary, path)
