"""Which self-attentions of a UNet stay in a swap."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from gspn.models.latents import is_whole

Keep = str | Sequence[str] | int | None  # what `keep` of gspn.swap takes


def level_of(unet: nn.Module, name: str) -> int:
    """How many times the map at the module `name` was halved."""
    deepest = len(unet.config.down_block_types) - 1
    part, _, rest = name.partition(".")
    if part == "mid_block":
        return deepest
    index = int(rest.split(".")[0])
    return index if part == "down_blocks" else deepest - index


def kept_names(unet: nn.Module, names: Sequence[str], keep: str | Sequence[str] | None) -> tuple[str, ...]:
    """Those of the attentions `names` that `keep` says, in their order.

    Args:
        keep: one or several of these: "lowest", the level with the smallest map; "level:N", the maps that were halved N
            times; a name or a glob of names; the name of a module around them. None keeps none.

    Raises ValueError where one of them matches nothing or all is kept; TypeError for anything else.
    """
    listed = keep if isinstance(keep, Iterable) and not isinstance(keep, str) else [keep]
    wanted = [] if keep is None else list(listed)
    if unknown := [each for each in wanted if not isinstance(each, str)]:
        raise TypeError(f"keep takes names, globs, 'lowest', 'level:N' or a whole number, got {unknown[0]!r}")
    levels = {name: level_of(unet, name) for name in names}
    found = set()
    for each in wanted:
        matched = [name for name in names if _matches(each, name, levels)]
        if not matched:
            there = ", ".join(f"level:{level}" for level in sorted(set(levels.values())))
            raise ValueError(
                f"keep: {each!r} matches none of the {len(names)} self-attentions; they are at {there}, with names "
                f"such as {names[0]}"
            )
        found.update(matched)
    if found and len(found) == len(names):
        raise ValueError(f"keep: all {len(names)} self-attentions would stay, so that there is nothing to swap")
    return tuple(name for name in names if name in found)


def _matches(wanted: str, name: str, levels: Mapping[str, int]) -> bool:
    if wanted == "lowest":
        return levels[name] == max(levels.values())
    if wanted.startswith("level:"):
        return wanted == f"level:{levels[name]}"
    return name.startswith(f"{wanted}.") or fnmatchcase(name, wanted)


def check_count(keep: int, names: Sequence[str]) -> None:
    """Raises ValueError unless `keep` of the attentions `names` can stay."""
    if not 1 <= keep < len(names):
        raise ValueError(f"keep has to be from 1 to {len(names) - 1}, of {len(names)} self-attentions, got {keep}")


def is_count(keep: Keep) -> bool:
    return is_whole(keep)
