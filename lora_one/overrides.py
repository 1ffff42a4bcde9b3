"""Command-line overrides: from every published spelling to one, checked before Hydra sees them.

The published commands write ``+init=gradient``, ``++dataset_name=meta_math`` and
``++init.weight=stable``. Here ``init`` and ``dataset`` are groups of the defaults list, so that a
choice replaces the whole node. A plain ``key=value`` becomes ``++key=value``: then a mistyped key
reaches the typed config, which answers in one line and names the nearest valid key.
"""

import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lora_one.errors import UserError, nearest

_ALIASES = {"dataset_name": "dataset"}
_CHOICE_ALIASES = {("dataset", "commonsense"): "commonsense_reasoning"}
_KEY_ALIASES = {"init.weight": "init.scale"}
# Groups of which several choices go together.
_LIST_GROUPS = {"probes"}
# Texts in which signs of Hydra's grammar, and spaces at the ends, mean themselves.
_TEXT_KEYS = {"dataset.prompt", "dataset.target"}
# Tables of a sweeper that take new names.
_OPEN_TABLES = re.compile(r"^hydra\.sweeper\.(methods|centres|rates)\b")
_OVERRIDE = re.compile(r"^(?P<plus>\+{0,2})(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)$", re.DOTALL)


def normalise_overrides(arguments: list[str], conf_dir: Path) -> tuple[list[str], list[str]]:
    """Rewrites command-line arguments to the spelling that Hydra expects here.

    Args:
        arguments: The arguments after the program's name; flags pass through unchanged.
        conf_dir: The configuration folder; its folders are the groups.

    Returns:
        The rewritten arguments, and one note for each spelling whose meaning was mapped.

    Raises:
        UserError: If an override cannot be read, or a group has no such choice.
    """
    flags: list[str] = []
    rewritten: list[str] = []
    notes: list[str] = []
    for argument in arguments:
        if argument.lstrip("+~").startswith("="):
            raise UserError(f"cannot read the override {argument!r}: there is no key before '='; give one")
        taken = argument.lstrip("~").split("=", 1)[0]
        if argument.startswith("~") and taken in _groups(conf_dir):
            raise UserError(f"{argument}: {taken} cannot be taken away; give {taken}=NAME")
        match = _OVERRIDE.match(argument)
        if match is not None and match["key"] == "hydra":
            raise UserError(
                f"{argument}: Hydra's own settings stay; change one of them, such as hydra.verbose"
            )
        if match is None:
            flags.append(argument)  # Hydra's parser wants flags first; a bare word is a flag's value
            continue
        if match["key"].startswith("hydra"):
            is_open = _OPEN_TABLES.match(match["key"]) is not None
            rewritten.append(f"++{match['key']}={match['value']}" if is_open else argument)
            continue
        key, value = _ALIASES.get(match["key"], match["key"]), match["value"]
        if key in _KEY_ALIASES:
            notes.append(f"{key} was never read by the published programs; taken as {_KEY_ALIASES[key]}")
            key = _KEY_ALIASES[key]
        if key in _TEXT_KEYS:
            value = _quoted(value)
        if key in _groups(conf_dir):
            rewritten.append(f"{key}={_choices(key, value, conf_dir)}")
        else:
            rewritten.append(f"++{key}={value}")
        _check_grammar(argument, rewritten[-1])
    return flags + rewritten, notes


def named_keys(overrides: list[str]) -> set[str]:
    """The keys that a person named on the command line, groups and values alike."""
    return {override.lstrip("+").split("=", 1)[0] for override in overrides}


def _groups(conf_dir: Path) -> set[str]:
    return {path.name for path in conf_dir.iterdir() if path.is_dir()} - {"hydra"}


def _choices(group: str, value: str, conf_dir: Path) -> str:
    if "(" in value:  # a sweep function such as glob(tiny_*); Hydra knows the choices
        return value
    folder = conf_dir / group
    valid = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    # Hydra composes a list of choices into one node.
    is_list = value.startswith("[") and value.endswith("]") and group in _LIST_GROUPS
    value = value.strip("[]") if is_list else value
    asked = [name.strip() for name in value.strip("'\"").split(",")]
    names = [_CHOICE_ALIASES.get((group, name), name) for name in asked]
    for name in names:
        if name not in valid:
            shown = ", ".join(_beside(name, valid))
            raise UserError(f"{group}={name}: no such choice{nearest(name, valid)}; valid: {shown}")
    return f"[{','.join(names)}]" if is_list else ",".join(names)


def _beside(name: str, valid: list[str]) -> list[str]:
    """The choices of the folder that a name is in; at the top the other folders too."""
    folder = name.rpartition("/")[0]
    if not any(choice.startswith(f"{folder}/") for choice in valid):
        folder = ""
    files = [choice for choice in valid if choice.rpartition("/")[0] == folder]
    folders = {choice.partition("/")[0] + "/…" for choice in valid if "/" in choice}
    return files if folder else [*files, *sorted(folders)]


def _quoted(text: str) -> str:
    """A text as Hydra's grammar wants it, unless it is quoted already."""
    if text == "null" or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        return text
    # Only the backslashes before a quote, or at the end, escape something in Hydra's quotes.
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + "\\'" * bool(found[2]), text)
    return f"'{escaped}'"


def _check_grammar(argument: str, override: str) -> None:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = " ".join(str(error).splitlines()[0].split())
        raise UserError(f"cannot read the override {argument!r}: {reason}; quote the value") from None
