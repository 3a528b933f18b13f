"""Runs random operations on PagedKVCache and on a model of it, and compares both after each operation.

The random numbers come from hypothesis, which shrinks a failure (machine.py), or from a plain generator, which is fast
(soak.py). A pool of numbers replaces the keys and values (device.py): wrong sharing, a block that is reused too early,
or a missing copy shows as a wrong number.
"""

from typing import Any

from internvl_rt._C import PagedKVCache
from paged_kv_cache.buffers import POISON, check_split_plan, int32, length_of, step_buffers
from paged_kv_cache.device import Device
from paged_kv_cache.draws import Draw, Draws
from paged_kv_cache.mirror import Mirror
from paged_kv_cache.model import RefusedError


class Driver(Draws):
    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        model = self.model
        self.events = self.integer(0, 1) == 1
        options = {"watermark_blocks": model.watermark_blocks, "events": self.events, "window": model.window}
        arguments = (model.num_blocks, model.block_size)
        self.cache = PagedKVCache(*arguments, **options)
        self.calls: list[tuple[Any, ...]] = [("PagedKVCache", *arguments, options)]
        self.device = Device(*arguments, model.window)
        self.mirror = Mirror()

    # --- the cache and the model

    def both(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Calls the method of the cache and of the model; returns their equal result, or None if both refuse."""
        self.calls.append((name, *arguments, options))
        arrays = [int32(a) if isinstance(a, list) else a for a in arguments]
        try:
            expected = getattr(self.model, name)(*arguments, **options)
        except RefusedError as refused:
            self.check_refused(name, *arrays, **options)
            self.calls.append(("refused", str(refused)))
            return None
        result = getattr(self.cache, name)(*arrays, **options)
        assert result == expected, f"{name}: expected {expected}, got {result}"
        return result

    def check_refused(self, name: str, *arguments: Any, **options: Any) -> None:
        try:
            getattr(self.cache, name)(*arguments, **options)
        except ValueError:
            return
        raise AssertionError(f"{name} was not refused")

    def history(self) -> str:
        text = "\n".join(" ".join(map(str, call)) for call in self.calls)
        return text.replace(str(bytes(32)), "bytes(32)")

    def check(self) -> None:
        self.cache.check_invariants()
        expected, got = self.model.stats(), self.cache.stats()
        assert got == expected, {key: (got[key], expected[key]) for key in expected if got[key] != expected[key]}
        assert self.cache.num_available_blocks == self.model.num_available()
        assert self.cache.num_sequences == len(self.model.sequences)
        assert all(length_of(self.cache, seq_id) == s.length for seq_id, s in self.model.sequences.items())
        self.device.check(self.model)
        if len(self.model.events) >= self.model.num_blocks:  # a cache with too many events drops them all
            self.drain_events()

    # --- operations

    def match(self) -> None:
        _, prompt = self.draw_prompt()
        self.both("match", *prompt, max_cached=self.draw_max_cached(prompt))

    def admit(self) -> None:
        text, prompt = self.draw_prompt()
        seq_id, num_reserved = self.draw_new_id(), self.pick([0, 0, len(prompt[0]), len(prompt[0]) + 3])
        num_reserved = -1 if self.rarely() and self.rarely() else num_reserved
        max_cached = self.draw_max_cached(prompt)
        if self.both("admit", seq_id, *prompt, num_reserved=num_reserved, max_cached=max_cached) is not None:
            self.text[seq_id] = text

    def choose_ids(self, seq_ids: list[int]) -> None:
        """Chooses the ids of all tokens that have slots now; the cache learns them later."""
        for seq_id in seq_ids:
            s = self.model.sequences[seq_id]
            start, count = len(s.token_ids), s.length - len(s.token_ids)
            ids = self.text_ids(self.text[seq_id], start, count)
            if ids and self.rarely():
                ids[0] = self.integer(2, 3)
            self.model.choose_ids(s, ids)

    def append_one(self) -> None:
        seq_id = self.draw_sequence()
        length = self.model.sequences[seq_id].length if seq_id in self.model.sequences else 0
        num_tokens = self.beside_boundary(length, 2) if self.integer(0, 1) else self.integer(0, 2)
        num_tokens = -1 if self.rarely() and self.rarely() else num_tokens
        if self.both("append", [seq_id], [num_tokens]):
            self.choose_ids([seq_id])

    def append(self) -> None:
        seq_ids = self.draw_some()
        counts = [self.draw_count(seq_id) for seq_id in seq_ids]
        if self.both("append", seq_ids, counts):
            self.choose_ids(seq_ids)

    def extend(self) -> None:
        seq_id = self.draw_sequence()
        if seq_id not in self.model.sequences:
            return self.both("extend", seq_id, [1])
        s = self.model.sequences[seq_id]
        ids = s.token_ids[s.num_known :]
        ids = ids[: self.integer(0, len(ids))] if self.rarely() else ids
        if len(ids) + s.num_known == len(s.token_ids) and self.rarely():
            ids = [*ids, 1]
        self.both("extend", seq_id, ids)

    def publish(self) -> None:
        seq_ids = self.draw_some()
        limits = [min(self.model.sequences[i].num_in_steps, self.model.sequences[i].num_known) for i in seq_ids]
        self.both("publish", seq_ids, [n + self.pick([0, 0, 0, 0, -1, 1]) if self.rarely() else n for n in limits])

    def fork(self, seq_id: int | None = None) -> int:
        seq_id, new_seq_id = self.draw_sequence() if seq_id is None else seq_id, self.draw_new_id()
        self.both("fork", seq_id, new_seq_id)
        self.text.setdefault(new_seq_id, self.integer(0, 2))
        return new_seq_id

    def branch(self) -> None:
        """Forks a sequence and its forks, and appends to each fork at once, before the copies are made."""
        family = [self.draw_sequence()]
        for _ in range(self.integer(1, 3)):
            family.append(self.fork(self.pick(family)))
            if self.both("append", family[-1:], [self.integer(0, 2)]):
                self.choose_ids(family[-1:])

    def answer_several_times(self) -> None:
        """Forks a sequence while a step computes its prompt; one fork may end at once, the others go on together."""
        parent = self.draw_sequence()
        if parent not in self.model.sequences:
            return self.both("fork", parent, parent)
        s = self.model.sequences[parent]
        if not self.compute([parent], [max(0, len(s.token_ids) - s.length)]):
            return
        if published := self.integer(0, 1):
            self.publish_computed([parent])
        family = {parent, *(self.fork(parent) for _ in range(self.integer(1, 3)))}
        if not published:
            self.publish_computed([parent])
        if self.integer(0, 1):
            self.both("release", self.pick(sorted(family)))
        self.complete()
        rest = sorted(family & self.model.sequences.keys())
        if self.compute(rest, [self.pick([1, 1, self.draw_count(i)]) for i in rest]):
            self.publish_computed(rest)

    def rollback(self) -> None:
        seq_id = self.draw_sequence()
        length = self.model.sequences[seq_id].length if seq_id in self.model.sequences else 0
        most = min(length, self.model.block_size + 2)
        self.both("rollback", seq_id, self.pick([-1, length + 1]) if self.rarely() else self.integer(0, most))

    def release(self) -> None:
        self.both("release", self.draw_sequence())

    def take_copies(self) -> None:
        self.calls.append(("take_copies",))
        got, expected = self.cache.take_copies().tolist(), self.model.take_copies()
        assert got == expected, f"take_copies: expected {expected}, got {got}"
        self.device.copy(got)

    def step(self) -> None:
        seq_ids = self.draw_some()
        counts = [self.num_uncomputed(seq_id) for seq_id in seq_ids]
        if self.rarely():
            counts = [self.integer(0, self.model.sequences[seq_id].length) for seq_id in seq_ids]
        self.launch(seq_ids, counts)

    def num_uncomputed(self, seq_id: int) -> int:
        return self.model.sequences[seq_id].length - self.model.sequences[seq_id].num_in_steps

    def launch(self, seq_ids: list[int], counts: list[int], fails: bool = False) -> bool:
        """Fills a step, which the device runs at once; returns whether it was not refused."""
        model, rows = self.model, [self.model.sequences[seq_id] for seq_id in seq_ids]
        num_blocks = [model.blocks_for(s.length) for s in rows]
        num_decodes = counts.count(1)
        num_items = max(0, num_decodes + self.integer(-1, 6)) if self.integer(0, 1) else None
        num_rows = len(rows) + self.integer(0, 1)
        width = max(num_blocks, default=0) + self.integer(0, 1)
        num_tokens, has_window = sum(counts) + self.integer(0, 1), model.window is not None
        out = step_buffers(num_rows, width, num_tokens, num_items, has_window=has_window)
        self.calls.append(("fill_step", seq_ids, counts, {"num_items": num_items}))
        if model.copies or (num_items is not None and num_items < num_decodes):
            self.check_refused("fill_step", int32(seq_ids), int32(counts), **out)
            assert all((buffer == POISON).all() for buffer in out.values())
            if num_items is not None and num_items < num_decodes:
                return False
            self.take_copies()
        try:
            step = model.fill_step(seq_ids, counts)
        except RefusedError:
            self.check_refused("fill_step", int32(seq_ids), int32(counts), **out)
            assert all((buffer == POISON).all() for buffer in out.values())
            self.make_writable(seq_ids)
            return False
        assert self.cache.fill_step(int32(seq_ids), int32(counts), **out) == step

        spare = num_rows - len(rows)
        got = {name: buffer.tolist() for name, buffer in out.items()}
        starts = [sum(counts[:row]) for row in range(len(rows) + 1)]
        assert got["query_start_S1"] == starts + starts[-1:] * spare, "query_start_S1"
        assert got["seq_len_S"] == [s.length for s in rows] + [0] * spare, "seq_len_S"
        size, names = model.block_size, (("block_table_SN", "slot_T"), ("window_table_SN", "window_slot_T"))
        for number, (table_name, slot_name) in enumerate(names[: 1 + has_window]):
            tables = [s.tables[number][:n] + [-1] * (width - n) for s, n in zip(rows, num_blocks, strict=True)]
            assert got[table_name] == tables + [[-1] * width] * spare, f"{table_name} is not the model's"
            slots = [
                s.tables[number][t // size] * size + t % size
                for s, n in zip(rows, counts, strict=True)
                for t in range(s.length - n, s.length)
            ]
            assert got[slot_name] == slots + [-1] * (num_tokens - len(slots)), f"{slot_name} is not the model's"
        if num_items is not None:
            split = [n if count == 1 else 0 for n, count in zip(num_blocks, counts, strict=True)]
            check_split_plan(got["split_start_S1"], got["split_W3"], split + [0] * spare)
        fails = fails or (self.rarely() and self.rarely())
        if fails:
            self.calls.append(("the step fails",))
            self.device.doomed.add(step)
        for s, count in zip(rows, counts, strict=True):
            self.device.compute(s, count, fails)
        return True

    def make_writable(self, seq_ids: list[int]) -> None:
        """Takes back, at times, the tokens that a step may not write, so that append() finds other blocks for them."""
        for seq_id in seq_ids:
            if self.integer(0, 1):
                self.both("rollback", seq_id, self.num_uncomputed(seq_id))

    def failing_step(self) -> None:
        """Publishes what a failing step and maybe one after it compute; releases some of the sequences."""
        seq_ids = self.draw_some()[:2]
        if not self.compute(seq_ids, [self.draw_count(seq_id) for seq_id in seq_ids], fails=True):
            return
        if self.integer(0, 1):
            self.publish_computed(seq_ids)
        if seq_ids and self.integer(0, 1):
            seq_ids.append(self.fork(self.pick(seq_ids)))
        if self.integer(0, 1):
            self.serve()
        seq_ids = [seq_id for seq_id in dict.fromkeys(seq_ids) if seq_id in self.model.sequences]
        if self.integer(0, 1) and self.compute(seq_ids, [self.draw_count(seq_id) for seq_id in seq_ids]):
            self.publish_computed(seq_ids)
        for seq_id in seq_ids:
            if self.integer(0, 1) and seq_id in self.model.sequences:
                self.both("release", seq_id)

    def serve(self) -> None:
        """Does what an engine does in one step, which leads to states with many shared blocks."""
        seq_ids = self.draw_some()
        if self.compute(seq_ids, [self.draw_count(seq_id) for seq_id in seq_ids]):
            self.publish_computed(seq_ids)

    def compute(self, seq_ids: list[int], counts: list[int], fails: bool = False) -> bool:
        """Appends tokens and starts the step; if blocks are missing, releases one of the sequences instead."""
        if not self.both("append", seq_ids, counts):
            self.both("release", self.pick(seq_ids))
            return False
        self.choose_ids(seq_ids)
        self.take_copies()
        return self.launch(seq_ids, [self.num_uncomputed(seq_id) for seq_id in seq_ids], fails)

    def publish_computed(self, seq_ids: list[int]) -> None:
        for seq_id in seq_ids:
            s = self.model.sequences[seq_id]
            self.both("extend", seq_id, s.token_ids[s.num_known :])
        limits = [min(self.model.sequences[i].num_in_steps, self.model.sequences[i].num_known) for i in seq_ids]
        self.both("publish", seq_ids, limits)

    def complete(self) -> None:
        step = self.integer(self.model.completed, self.model.latest)
        if self.rarely() and self.rarely():  # also the steps that did not fail are given up
            self.both("complete", step, failed=True)
        self.complete_to(step)

    def complete_all(self) -> None:
        self.complete_to(self.model.latest)

    def complete_to(self, last: int) -> None:
        """Says which steps have ended well and which have failed."""
        doomed = self.device.doomed
        while self.model.completed < last:
            step = self.model.completed + 1
            while step < last and (step in doomed) == (step + 1 in doomed):
                step += 1
            self.both("complete", step, failed=step in doomed)
        self.both("complete", last)

    def reset(self) -> None:
        if not self.rarely():
            return
        self.both("reset")
        for seq_id, s in list(self.model.sequences.items()):  # blocks that were matched are no longer published
            if self.integer(0, 1):
                self.launch([seq_id], [self.integer(0, s.length)])

    def drain_events(self) -> None:
        got = [(*event[:3], event[3].tolist()) for event in self.cache.drain_events()]
        expected, self.model.events = self.model.events, []
        if self.events:
            self.mirror.replay(expected, got)
            assert self.mirror.contents() == set(self.model.published.values()), "the events give another index"
        else:
            assert got == [], "events that nobody wants"

    def misuse(self) -> None:
        """Makes a call that the cache must refuse in every state."""
        some = sorted(self.model.sequences)[:1]
        all_ids = list(self.model.sequences)
        unknown = 77
        picture = (0, 1, bytes(32))
        self.pick(
            [
                lambda: self.both("append", [*some, unknown], [0] * (len(some) + 1)),
                lambda: self.both("append", [*some, *some, unknown], [0] * (2 * len(some) + 1)),
                lambda: self.both("append", some, [1] * (len(some) + 1)),
                lambda: self.both("append", all_ids[:2], [1, -1][-len(all_ids[:2]) :] if all_ids else [1]),
                lambda: self.both("extend", unknown, [1]),
                lambda: self.both("publish", [*all_ids, unknown], [0] * (len(all_ids) + 1)),
                lambda: self.both("complete", self.model.latest + 1),
                lambda: self.both("complete", self.model.completed - 1),
                lambda: self.both("admit", 2**31, [1]),
                lambda: self.both("admit", 9, [1], (picture, picture)),
                lambda: self.both("admit", 9, [1, 1], ((1, 2, bytes(32)),)),
                lambda: self.both("match", [1], ((0, 0, bytes(32)),)),
                lambda: self.both("match", [1], ((0, 1, bytes(31)),)),
                lambda: self.both("match", [1], max_cached=-1),
                lambda: self.both("fork", some[0] if some else unknown, some[0] if some else 9),
            ]
        )()


OPERATIONS = [  # an operation is listed more than once to be drawn more often
    *["serve"] * 8,
    "answer_several_times",
    *["admit"] * 4,
    *["append", "append_one", "append_one", "extend", "extend", "publish", "step", "failing_step", "take_copies"],
    *["complete", "complete", "complete_all", "fork", "branch", "rollback", "release"],
    *["match", "reset", "drain_events", "misuse"],
]


def perform(driver: Driver, operation: str) -> None:
    nothing_here = not driver.model.sequences and not driver.rarely()
    getattr(driver, "admit" if nothing_here else operation)()
    driver.check()
