"""Statistics of several domains as those of one mixture."""

from __future__ import annotations

from collections.abc import Mapping

from mcsmoe.statistics.layer import LayerStatistics


def blend(domains: Mapping[str, LayerStatistics], weights: Mapping[str, float] | None = None) -> LayerStatistics:
    """The statistics of a mixture in which each domain has the share of tokens that ``weights`` gives it.

    Without weights every token counts once: the plain sum. With them the tokens of a domain count more or less than once,
    so counts are no whole numbers any more; the number of tokens in all stays.

    Raises:
        ValueError: a weight for no domain, none for one, a negative one, or nothing but zeros; names the domain.
    """
    if not domains:
        raise ValueError("there are no domains to blend")
    if weights is not None:
        for name in sorted(set(domains) ^ set(weights)):
            where = "no weight" if name in domains else "a weight, but no statistics"
            raise ValueError(f"domain {name!r} has {where}; there are {sorted(domains)}")
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of domain {name!r} is {weight}; give 0 or more")
        if not sum(weights.values()):
            raise ValueError("all domains have weight 0; give one of them more")
    tokens = {name: float(one.valid_tokens) for name, one in domains.items()}
    total = sum(tokens.values())
    made: LayerStatistics | None = None
    for name, one in domains.items():
        factor = 1.0
        if weights is not None and tokens[name]:
            factor = weights[name] / sum(weights.values()) * total / tokens[name]
        if factor == 0:
            continue
        part = one.cpu() if factor == 1 else one.scaled(factor)
        if made is None:
            made = part
        else:
            made.add_(part)
    assert made is not None
    return made
