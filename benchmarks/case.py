"""What a benchmark states: the points, the calls that are compared there, and the least work that has to be done."""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Point = dict[str, int | str]
Row = dict[str, Any]

# Read from left to right a table goes from what everybody has to what nobody should run.
_FIRST, _LAST = ("dense", "floor"), ("published",)


@dataclass(frozen=True)
class Floor:
    """The least that a call has to do, whatever its implementation.

    Attributes:
        bytes: Read from and written to memory: inputs, weights and outputs once each.
        operations: Floating-point operations of its matrix products, two a multiply-add.
    """

    bytes: int
    operations: int


@dataclass(frozen=True)
class Case:
    """Calls that do the same work at one point, timed in turn within one process.

    Attributes:
        point: Sizes and kind of the point, by name.
        calls: What is timed, by name.
        subject: The call whose time is divided by each other's.
        floor: Least work of the subject.
        left_out: Calls that are not made at this point, with the reason.
        per: Units of work in a call; times are given per unit.
        unit: What the times are of.
    """

    point: Point
    calls: Mapping[str, Callable[[], object]]
    subject: str
    floor: Floor | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    per: int = 1
    unit: str = "ms"


@dataclass(frozen=True)
class MemoryCase:
    """Steps whose peak memory is compared at one point, each in a fresh process.

    Attributes:
        point: As of a :class:`Case`; given to the steps as keyword arguments.
        steps: "module:function" by name; each returns the bytes that its step took beyond what was there before.
        subject: The step whose bytes are divided by each other's.
        computed: Bytes by term of what a formula says that a step keeps alive, by name of the step.
        left_out: Steps that are not made at this point, with the reason.
    """

    point: Point
    steps: Mapping[str, str]
    subject: str
    computed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How a benchmark is asked to run.

    Attributes:
        device: "cpu" or "cuda".
        quick: A few small points, to see that everything runs.
    """

    device: str = "cpu"
    quick: bool = False


# Cases in; the measured row of each is sent back, so that the next may depend on it; at last what they add up to.
Cases = Generator[Case | MemoryCase, Row, dict[str, Any] | None]


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark.

    Attributes:
        name: On the command line, and of its JSON.
        description: What is compared, in one line.
        tests: Paths of the tests without which its figures mean nothing.
        cases: Yields its cases.
        usual: Whether it runs where no benchmark is named.
        publish: Called with the complete result once that is written among the committed ones.
    """

    name: str
    description: str
    tests: tuple[str, ...]
    cases: Callable[[Settings], Cases]
    usual: bool = True
    publish: Callable[[dict[str, Any]], None] | None = None


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of every table: Dense and the floor first, the published formulation last."""

    def place(name: str) -> int:
        return _FIRST.index(name) - len(_FIRST) if name in _FIRST else int(name in _LAST)

    return sorted(names, key=place)
