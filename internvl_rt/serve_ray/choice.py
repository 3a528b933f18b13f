"""Chooses the replica for a prompt: the one that holds most of it, unless others have much less to do.

    worth = what it holds more than the replica that holds least, as a share of the prompt
            - load_share * (its requests - the fewest that a replica has)

The replica of the highest worth is preferred, if that is above 0 and it has at most `max_imbalance` requests more than
the one with the fewest. Otherwise two replicas are drawn, and the one with fewer requests is taken. A request more
weighs as a share of the prompt, because the work that is spared and the work that waits grow alike with the pictures
that a model is sent.
"""

from collections.abc import Hashable, Mapping, Sequence
from random import Random
from typing import TypeVar

MAX_HOLDERS = 32  # of one prompt, that are told to whoever chooses

R = TypeVar("R", bound=Hashable)


def advantages(held: Mapping[R, int], whole: int) -> dict[R, float]:
    """Returns which share of a prompt each replica holds more than the one that holds least.

    held: how much each replica holds. whole: how much there is, in the same unit.
    If many hold some, those that hold most are returned.
    """
    least = min(held.values(), default=0)
    more = {replica: (part - least) / whole for replica, part in held.items() if part > least}
    if len(more) <= MAX_HOLDERS:
        return more
    return {replica: more[replica] for replica in sorted(more, key=more.__getitem__, reverse=True)[:MAX_HOLDERS]}


def prefer(
    advantage: Mapping[R, float], requests: Mapping[R, int], *, load_share: float, max_imbalance: int, draw: Random
) -> R | None:
    """Returns the replica that a prompt is worth most at, or None if none is preferred.

    advantage: as `advantages` returns it, perhaps with replicas that are gone.
    requests: what each replica that is there has to do.
    """
    fewest = min(requests.values(), default=0)
    best, most = list[R](), 0.0
    for replica, share in advantage.items():
        more = requests.get(replica, max_imbalance + fewest + 1) - fewest
        worth = share - load_share * more
        if more > max_imbalance or worth <= 0 or worth < most:
            continue
        best, most = ([replica], worth) if worth > most else ([*best, replica], most)
    return draw.choice(best) if best else None


def draw_two(replicas: Sequence[R], draw: Random) -> list[R]:
    """Draws two different replicas, or as many as there are."""
    return draw.sample(replicas, min(2, len(replicas)))
