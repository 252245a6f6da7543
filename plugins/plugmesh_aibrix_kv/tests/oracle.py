"""S3-FIFO slowly: lists, sums and searches, as AIBrix's description and the order's docstring read."""

from __future__ import annotations


class Item:
    def __init__(self, key: bytes, size: int, where: str) -> None:
        self.key, self.size, self.where, self.hits, self.busy, self.parked = key, size, where, 0, False, False


class SlowS3Fifo:
    """`line` holds what is in the tier, parked or not, in order of entry into its queue; the first of a queue is its oldest."""

    def __init__(self, capacity: int, share: float, threshold: int, max_ghosts: int) -> None:
        self.small_max = int(capacity * share)
        self.main_max = capacity - self.small_max
        self.threshold, self.max_ghosts = threshold, max_ghosts
        self.line: list[Item] = []
        self.ghosts: list[tuple[bytes, int]] = []
        self.chosen: Item | None = None

    def find(self, key: bytes) -> Item | None:
        return next((i for i in self.line if i.key == key), None)

    def size(self, where: str) -> int:
        return sum(i.size for i in self.line if i.where == where)

    def oldest(self, where: str) -> Item | None:
        return next((i for i in self.line if i.where == where and not i.parked), None)

    def to_the_end(self, item: Item) -> None:
        self.line.remove(item)
        self.line.append(item)

    def add(self, key: bytes, size: int) -> None:
        item = self.find(key)
        if item is None:
            is_ghost = any(k == key for k, _ in self.ghosts)
            self.ghosts = [(k, s) for k, s in self.ghosts if k != key]
            self.line.append(Item(key, size, "main" if is_ghost else "small"))
        elif item.busy:
            item.busy = False
            if item.parked:
                item.parked = False
                self.to_the_end(item)

    def discard(self, key: bytes) -> None:
        item = self.find(key)
        if item is not None:
            item.busy = True
            if item is self.chosen:
                self.chosen = None

    def touch(self, key: bytes) -> None:
        item = self.find(key)
        if item is not None:
            item.hits = min(3, item.hits + 1)
            if item is self.chosen:
                self.chosen = None

    def left(self, key: bytes, evicted: bool) -> None:
        item = self.find(key)
        if item is None:
            return
        self.line.remove(item)
        self.chosen = None
        if evicted and item.where == "small":
            self.ghosts.append((key, item.size))
        while self.ghosts and (sum(s for _, s in self.ghosts) > self.main_max or len(self.ghosts) > self.max_ghosts):
            self.ghosts.pop(0)

    def victim(self) -> bytes | None:
        if all(i.busy for i in self.line):
            return None
        while self.chosen is None:
            small, main = self.oldest("small"), self.oldest("main")
            if small is not None and (self.size("small") > self.small_max or main is None):
                if small.hits >= self.threshold:
                    small.where, small.hits = "main", 0
                    self.to_the_end(small)
                    if self.size("main") > self.main_max:
                        self.main_turn()
                else:
                    self.out(small)
            else:
                self.main_turn()
        return self.chosen.key

    def main_turn(self) -> None:
        item = self.oldest("main")
        assert item is not None
        if item.hits:
            item.hits -= 1
            self.to_the_end(item)
        else:
            self.out(item)

    def out(self, item: Item) -> None:
        if item.busy:
            item.parked = True
        else:
            self.chosen = item


def simulate(requests: list[bytes], capacity: int, share: float = 0.3, threshold: int = 1) -> list[bool]:
    """A cache of `capacity` equal blocks by itself, nothing busy: which requests hit. Written from the paper's figure, not from the class above."""
    small: list[bytes] = []
    main: list[bytes] = []
    ghost: list[bytes] = []
    hits: dict[bytes, int] = {}
    small_max = int(capacity * share)
    main_max = capacity - small_max
    answers = []

    def round_of_main() -> bool:
        key = main.pop(0)
        if hits[key] > 0:
            hits[key] -= 1
            main.append(key)
            return False
        del hits[key]
        return True

    def round_of_small() -> bool:
        key = small.pop(0)
        if hits[key] >= threshold:
            hits[key] = 0
            main.append(key)
            return len(main) > main_max and round_of_main()
        del hits[key]
        ghost.append(key)
        if len(ghost) > main_max:
            ghost.pop(0)
        return True

    for key in requests:
        answers.append(key in hits)
        if key in hits:
            hits[key] = min(3, hits[key] + 1)
            continue
        if len(small) + len(main) == capacity:
            while not (round_of_small() if len(small) > small_max or not main else round_of_main()):
                pass
        if key in ghost:
            ghost.remove(key)
            main.append(key)
        else:
            small.append(key)
        hits[key] = 0
    return answers
