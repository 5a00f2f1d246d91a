"""Reads and writes YAML files of flags: one plain value a name."""

import os
from pathlib import Path

NULLS = ("", "~", "null", "Null", "NULL")
FIX = "write a line `name: value` for each flag"


def read(path: str) -> dict[str, str | None]:
    """The text of each name's value, as the command line would have it; None: the value is null.

    YAML would read 2e-5 as text, on as true and 1:2:3 as a number, so nothing is converted here. Raises
    ValueError.
    """
    import yaml

    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--config={path} cannot be read ({error.strerror}): check the name") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config={path} is not YAML ({reason}): {FIX}") from None
    if node and not isinstance(node, yaml.MappingNode):
        raise ValueError(f"--config={path} is no mapping of flags to values: {FIX}")
    found = {}
    for name, value in node.value if node else ():
        if not (isinstance(name, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)):
            line = f"--config={path}, line {name.start_mark.line + 1}"
            raise ValueError(f"{line} has more than one value for a flag: {FIX}")
        if name.value in found:
            raise ValueError(f"--config={path} has {name.value} twice: leave one of them out")
        is_null = value.style is None and value.value in NULLS  # what is quoted is text
        found[name.value] = None if is_null else value.value
    return found


def write(path: Path, values: dict) -> None:
    """Writes the values in one step: the file is the old one or the new one, never a part."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(temporary, path)
