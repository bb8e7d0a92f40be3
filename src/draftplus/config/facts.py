"""What the schema says about a key besides its type and default. Lists of keys and checks of single keys use it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Concatenate, Literal, ParamSpec

P = ParamSpec("P")
Affects = Literal["trajectory", "length", "conduct", "record"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about a key, or about a section of keys, which has only `help` and `affects`.

    choices: the strings that it may be. Values of other types, such as a list of names, are checked elsewhere.
    above, at_least, at_most, below: bounds of a number. Null is exempt from choices and bounds.
    each: choices and bounds apply to each entry of a list. count: how many entries the list must have.
    hint: added to the message after the bounds.
    affects: what changes with its value. "trajectory": what is learned, so that a run cannot be continued with another
    value; "length": how long a run goes on; "conduct": where and how it is computed, what it is called, and when it is
    given up; "record": what is measured and stored on the way. None: as for its section, or else the trajectory.
    of_model: whether the model decides where it is null, before a run starts.
    file: whether it names a file or directory, whose content decides whether a run can be continued.
    added: whether it is newer than the first release; at its default it is left out of a run's name.
    base_model: whether it determines which model is tuned.
    in_method_name: whether the report shows it as part of the method's name, such as DRaFT+.
    """

    help: str = ""
    choices: tuple[str, ...] = ()
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    each: bool = False
    count: int | None = None
    hint: str = ""
    affects: Affects | None = None
    base_model: bool = False
    in_method_name: bool = False
    of_model: bool = False
    file: bool = False
    added: bool = False

    @property
    def meaning(self) -> str:
        """One line: the choices, and the help."""
        return "; ".join(filter(None, [" | ".join(self.choices), self.help]))

    def entries(self, value: Any) -> list[Any]:
        """The values that choices and bounds apply to."""
        return list(value) if self.each and value is not None else [value]

    def allows(self, value: Any) -> bool:
        """Whether all numbers are finite and within the bounds, and a list has as many entries as it must."""
        entries = self.entries(value)
        return self.count in (None, len(entries)) and all(map(self._within_bounds, entries))

    def _within_bounds(self, entry: Any) -> bool:
        if not isinstance(entry, (int, float)) or isinstance(entry, bool):
            return True
        return (
            (isinstance(entry, int) or math.isfinite(entry))  # isfinite fails for an int beyond all floats
            and (self.above is None or entry > self.above)
            and (self.at_least is None or entry >= self.at_least)
            and (self.at_most is None or entry <= self.at_most)
            and (self.below is None or entry < self.below)
        )

    def demand(self, value: Any) -> str:
        """What a message demands of such a value: 'be above 0 and at most 1' or 'have 2 entries, each finite'."""
        limits = {"above": self.above, "at least": self.at_least, "at most": self.at_most, "below": self.below}
        told = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
        if self.at_most is None and self.below is None and any(isinstance(one, float) for one in self.entries(value)):
            told = ["finite", *told]
        count = "" if self.count is None else f"{self.count} "
        return (f"have {count}entries, each " if self.each else "be ") + " and ".join(told)


def facts_of(f: dataclasses.Field[Any]) -> Facts:
    """The facts that a field of the schema carries."""
    facts = f.metadata["facts"]
    assert isinstance(facts, Facts)
    return facts


def _with_facts(make: Callable[P, Facts]) -> Callable[Concatenate[Any, P], Any]:
    # the arguments are those of Facts, so that a type checker catches a misspelled one
    def key(default: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        metadata = {"facts": make(*args, **kwargs)}
        if callable(default):
            return dataclasses.field(default_factory=default, metadata=metadata)
        if isinstance(default, (list, dict)):
            return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
        return dataclasses.field(default=default, metadata=metadata)

    return key


key = _with_facts(Facts)  # a field of the schema: its default, its help, and further facts as keywords
