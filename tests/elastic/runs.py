"""Configurations of tiny runs, for fixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastic.config import RunConfig, make_config

Configure = Callable[..., RunConfig]


def silent(*_: object) -> None:
    """Where tests have a run say something that they do not read."""


def configurations(defaults: Sequence[str], **given: object) -> Configure:
    """make(*settings "a.b=c", **flags of make_config), on top of these settings and flags."""

    def make(*settings: str, **flags: object) -> RunConfig:
        return make_config(settings=[*defaults, *settings], **{**given, **flags})

    return make
