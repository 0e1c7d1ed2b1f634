"""What the configurations of the models share: checks of their fields, and the way to plain dicts and back."""

from collections.abc import Callable
from dataclasses import asdict, fields


class Config:
    """Base of the frozen dataclasses that determine the parameters of a model."""

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict) -> "Config":
        """The inverse of to_dict. An unknown field is a ValueError that lists the known ones."""
        return build(cls, plain)


def build(cls: type, options: dict):
    """cls(**options). An unknown field is a ValueError that lists the known ones; what else is no `options` is one
    too."""
    if not isinstance(options, dict):
        raise ValueError(f"{cls.__name__} cannot be built from {options!r}; it takes a dict of its fields")
    known = [f.name for f in fields(cls)]
    for name in options:
        if name not in known:
            raise ValueError(f"{cls.__name__} has an unknown field {name!r}; it takes {', '.join(known)}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"{cls.__name__} cannot be built from {options!r}: {error}") from error


def build_levels(cls: type, plain: dict, build_level: Callable[[dict], object]):
    """As build, for a configuration whose field `levels` is a list of dicts, each made into a level by build_level."""
    if not isinstance(plain, dict):
        return build(cls, plain)
    if not isinstance(plain.get("levels"), list | tuple):
        given = "missing from the configuration" if "levels" not in plain else repr(plain["levels"])
        raise ValueError(f"levels is {given}; it must be a list of levels, outermost first")
    return build(cls, {**plain, "levels": tuple(build_level(entry) for entry in plain["levels"])})


def check_ints(config, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be an int of {least} or more")


def check_dropout(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a number in [0, 1)")


def check_choice(config, name: str, accepted) -> None:
    if getattr(config, name) not in tuple(accepted):
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(map(str, accepted))}")
