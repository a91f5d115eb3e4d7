"""The canonical tree over microbatches ``0..M-1``: in which order contributions are added, whoever computed them (E2).

A node over ``[lo, hi)`` splits at the largest power of two below ``hi - lo``. Since what is sent is always a tree node,
the sum depends neither on the order of arrival nor on the number of workers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

from paramserver.errors import OverlappingContribution

__all__ = ["Addition", "Node", "TreeSum", "check_node", "children", "maximal_nodes", "plan_additions", "tree_reduce"]

T = TypeVar("T")


class Node(NamedTuple):
    """Microbatches ``lo`` to ``hi - 1`` of one tree."""

    lo: int
    hi: int

    def covers(self, other: "Node") -> bool:
        """Whether every microbatch of ``other`` is in this node."""
        return self.lo <= other.lo and other.hi <= self.hi

    def disjoint(self, other: "Node") -> bool:
        """Whether the two have no microbatch in common."""
        return self.hi <= other.lo or other.hi <= self.lo


def children(node: Node) -> tuple[Node, Node]:
    """Left and right child of a node over at least two microbatches."""
    size = node.hi - node.lo
    assert size > 1, "a leaf has no children"
    middle = node.lo + (1 << ((size - 1).bit_length() - 1))
    return Node(node.lo, middle), Node(middle, node.hi)


def maximal_nodes(lo: int, hi: int, num_microbatches: int) -> list[Node]:
    """The largest tree nodes inside ``[lo, hi)``, from left to right: what a worker with this run sends."""

    def inside(node: Node) -> Iterator[Node]:
        if node.disjoint(Node(lo, hi)):
            return
        if Node(lo, hi).covers(node):
            yield node
            return
        for child in children(node):
            yield from inside(child)

    return list(inside(Node(0, num_microbatches))) if lo < hi else []


@lru_cache(maxsize=4096)
def check_node(node: Node, num_microbatches: int) -> None:
    """Refuse what is not a node of the tree.

    Raises:
        OverlappingContribution: naming it.
    """
    if node not in maximal_nodes(node.lo, node.hi, num_microbatches):
        raise OverlappingContribution(
            f"microbatches [{node.lo}, {node.hi}) are no node of the tree over {num_microbatches} microbatches"
        )


def tree_reduce(root: Node, held: Callable[[Node], T | None], add: Callable[[T, T], T]) -> T:
    """Sum what is held along the tree below ``root``; left operand first. The held nodes must cover the root."""
    value = held(root)
    if value is not None:
        return value
    left, right = children(root)
    return add(tree_reduce(left, held, add), tree_reduce(right, held, add))


class Addition(NamedTuple):
    """``registers[target] = registers[left] + registers[right]``."""

    left: int
    right: int
    target: int


@lru_cache(maxsize=256)
def plan_additions(root: Node, held: tuple[Node, ...]) -> tuple[Addition, ...]:
    """The additions that make the sum over ``root``, for registers that begin with the values of ``held``.

    Further registers are temporary, as few as the tree's depth. The last addition's target has the sum; if there is
    none, register 0 has it.
    """
    found: list[Addition] = []
    places = {node: index for index, node in enumerate(held)}

    def place(node: Node, free: int) -> tuple[int, int]:
        """Where the sum over ``node`` lies, and the first register that is free then."""
        if node in places:
            return places[node], free
        left, right = children(node)
        left_at, after_left = place(left, free)
        right_at, _ = place(right, after_left)
        found.append(Addition(left_at, right_at, free))
        return free, free + 1

    place(root, len(held))
    return tuple(found)


class TreeSum(Generic[T]):
    """Contributions to one sum, in any order: which are held, which are missing.

    A contribution covered by a held one is dropped (it is a repetition); one that covers held ones replaces them.
    """

    def __init__(self, num_microbatches: int) -> None:
        self.root = Node(0, num_microbatches)
        self._held: dict[Node, T] = {}

    def insert(self, node: Node, value: T) -> bool:
        """Hold ``value`` for ``node``; False if it was covered already.

        Raises:
            OverlappingContribution: if the node is not one of this tree.
        """
        check_node(node, self.root.hi)
        if any(other.covers(node) for other in self._held):
            return False
        for other in [other for other in self._held if node.covers(other)]:
            del self._held[other]
        self._held[node] = value
        return True

    @property
    def contributions(self) -> Mapping[Node, T]:
        """A copy of what is held."""
        return dict(self._held)

    def holds(self, contributions: Mapping[Node, T]) -> bool:
        """Whether these very objects are held, and nothing else."""
        held = self._held
        return len(held) == len(contributions) and all(held.get(n) is value for n, value in contributions.items())

    @property
    def held(self) -> int:
        """How many microbatches the held nodes cover."""
        return sum(node.hi - node.lo for node in self._held)

    @property
    def complete(self) -> bool:
        """Whether the held nodes cover the root."""
        return self.held == self.root.hi

    def missing(self, wanted: range | None = None) -> list[int]:
        """Those of the ``wanted`` microbatches, all if None, that no held node covers."""
        held = {index for node in self._held for index in range(node.lo, node.hi)}
        return [index for index in (range(self.root.hi) if wanted is None else wanted) if index not in held]

    def reduce(self, add: Callable[[T, T], T]) -> T:
        """The sum over the root; must be complete."""
        values, additions = self.plan()
        registers = dict(enumerate(values))
        for left, right, target in additions:
            registers[target] = add(registers[left], registers[right])
        return registers[additions[-1].target if additions else 0]

    def plan(self, node: Node | None = None) -> tuple[list[T], tuple[Addition, ...]]:
        """The values held inside ``node``, and the additions that make its sum of them; None is the root.

        The held values must cover it.
        """
        root = node or self.root
        nodes = tuple(sorted(other for other in self._held if root.covers(other)))
        assert sum(n.hi - n.lo for n in nodes) == root.hi - root.lo, f"microbatches {self.missing()} are missing"
        return [self._held[n] for n in nodes], plan_additions(root, nodes)

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()

    def fold(self, node: Node, value: T, add: Callable[[T, T], T]) -> None:
        """Insert, then add siblings as soon as both are held: keeps about ``log2`` values for a run in order."""
        self.insert(node, value)
        self._merge(self.root, add)

    def _merge(self, node: Node, add: Callable[[T, T], T]) -> None:
        if node in self._held or node.hi - node.lo < 2:
            return
        left, right = children(node)
        self._merge(left, add)
        self._merge(right, add)
        if left in self._held and right in self._held:
            self._held[node] = add(self._held.pop(left), self._held.pop(right))

    def pop_all(self) -> Iterable[tuple[Node, T]]:
        """Take out what is held, from left to right."""
        held = sorted(self._held.items())
        self._held.clear()
        return held
