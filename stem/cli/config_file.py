"""Options of a command from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Options of the command from a YAML file; what is typed on the command line wins."""
    if path is None:
        return None
    import yaml

    try:
        # Texts as they stand: YAML itself would read 8:40 as the number 520, and 1e-2 as a text.
        document = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise typer.BadParameter(f"{path} must hold a mapping of options, such as 'steps: 50'")
    allowed = {p.name for p in context.command.params if p.name not in ("config", "help")}
    repeatable = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    defaults: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in allowed:
            options = ", ".join(sorted(allowed))
            raise typer.BadParameter(
                f"{path}: {context.info_name} has no option {key!r}; it has {options}"
            )
        if name == "option":
            defaults[name] = _flat_options(path, value)
        elif name in repeatable and isinstance(value, list):
            defaults[name] = [_text(path, key, part) for part in value]
        else:
            text = _text(path, key, value)
            defaults[name] = [text] if name in repeatable else text
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def with_config_file(context: typer.Context, typed: list[str] | None) -> list[str]:
    """Texts of --option: the YAML file's, then those typed, which win field by field."""
    return [*(context.default_map or {}).get("option", []), *(typed or [])]


def _text(path: Path, key: str, value: Any) -> str:
    """The option's text on the command line: [512, 320] is 512x320, [ddim, stem] is ddim,stem."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise typer.BadParameter(f"{path}: {key} is {value}; it must be one value or a list")
    return ("x" if key == "size" else ",").join(value)


def _flat_options(path: Path, methods: Any) -> list[str]:
    """{method: {field: value}} as METHOD.FIELD=VALUE texts."""
    if isinstance(methods, list) and all(isinstance(text, str) for text in methods):
        return methods
    if not isinstance(methods, dict) or not all(isinstance(f, dict) for f in methods.values()):
        raise typer.BadParameter(
            f"{path}: option must map methods to their fields, such as 'stem: {{num_bases: 64}}', "
            "or list METHOD.FIELD=VALUE texts"
        )
    return [
        f"{method}.{field}={_value_text(path, field, value)}"
        for method, fields in methods.items()
        for field, value in fields.items()
    ]


def _value_text(path: Path, field: str, value: Any) -> str:
    """A field's text as --option takes it: a mapping, or a list of others, is YAML in one line."""
    if isinstance(value, dict) or (isinstance(value, list) and not _is_flat(value)):
        import yaml

        return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()
    return _text(path, field, value)


def _is_flat(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
