"""What an ingress believes of caches follows their reports and is bounded; it asks again when a report is lost."""

from collections.abc import Iterator
from random import Random

from internvl_rt.serve_ray.holdings import EXPECTED_S, MAX_EXPECTED, Holdings, Ledger, Report

FACTS = {"block_size": 16}


def digest(number: int) -> bytes:
    return number.to_bytes(16, "little")


def digests(*numbers: int) -> list[bytes]:
    return list(map(digest, numbers))


def told(*numbers: int, number: int = 0, whole: bool = True, removed: tuple[int, ...] = ()) -> Report:
    return Report("a", number, whole, b"".join(digests(*numbers)), b"".join(digests(*removed)))


def test_an_ingress_that_reads_all_reports_knows_what_the_cache_holds() -> None:
    draw, ledger, holdings = Random(0), Ledger(), Holdings(max_blocks=1000)
    held: set[int] = set()

    def events() -> Iterator[tuple[str, bytes]]:
        for _ in range(draw.randrange(30)):
            if held and draw.random() < 0.4:
                number = draw.choice(sorted(held))
                held.discard(number)
                yield "removed", digest(number)
            elif draw.random() < 0.02:
                held.clear()
                yield "cleared", b""
            else:
                number = draw.choice(sorted(set(range(60)) - held))
                held.add(number)
                yield "stored", digest(number)

    for _ in range(200):
        ledger.follow(events())
        if ledger.has_news:
            assert holdings.take(ledger.report("a", FACTS), 0.0)
        assert {number for number in range(60) if holdings.match(digests(number), 0.0)["a"]} == held
        assert not ledger.has_news


def test_a_change_that_is_undone_before_the_report_is_not_in_it() -> None:
    ledger = Ledger()
    ledger.report("a", FACTS)
    ledger.follow([("stored", digest(1)), ("removed", digest(1)), ("stored", digest(2))])
    report = ledger.report("a", FACTS)
    assert (report.whole, report.stored, report.removed, report.facts) == (False, digest(2), b"", None)


def test_a_lost_report_is_noticed_and_a_whole_one_makes_up_for_it() -> None:
    ledger, holdings = Ledger(), Holdings(max_blocks=1000)
    assert holdings.take(ledger.report("a", FACTS), 0.0)
    ledger.follow([("stored", digest(1))])
    ledger.report("a", FACTS)  # lost
    ledger.follow([("stored", digest(2))])
    assert not holdings.take(ledger.report("a", FACTS), 0.0)
    ledger.follow([("stored", digest(3))])
    assert not holdings.take(ledger.report("a", FACTS), 0.0), "it goes on asking"
    ledger.ask_for_whole()
    report = ledger.report("a", FACTS)
    assert report.whole
    assert report.facts == FACTS
    assert holdings.take(report, 0.0)
    assert holdings.match(digests(1, 2, 3), 0.0) == {"a": 3}


def test_an_ingress_that_begins_later_asks_for_a_whole_report() -> None:
    holdings = Holdings(max_blocks=10)
    assert not holdings.take(told(1, number=7, whole=False), 0.0)
    assert holdings.match(digests(1), 0.0) == {"a": 0}
    assert holdings.take(told(1, number=8), 0.0)
    assert holdings.take(told(2, number=9, whole=False, removed=(1,)), 0.0)
    assert (holdings.match(digests(1), 0.0), holdings.match(digests(2), 0.0)) == ({"a": 0}, {"a": 1})


def test_only_leading_blocks_count() -> None:
    holdings = Holdings(max_blocks=10)
    holdings.take(told(1, 2, 4), 0.0)
    assert holdings.match(digests(1, 2, 3, 4), 0.0) == {"a": 2}
    assert holdings.match([], 0.0) == {"a": 0}


def test_no_more_blocks_of_a_replica_are_known_than_the_limit_allows() -> None:
    holdings = Holdings(max_blocks=4)
    holdings.take(told(*range(10)), 0.0)
    known = [number for number in range(20) if holdings.match(digests(number), 0.0)["a"]]
    assert len(known) == 4
    holdings.take(told(15, 16, number=1, whole=False, removed=(known[0],)), 0.0)
    assert sum(holdings.match(digests(number), 0.0)["a"] for number in range(20)) == 4
    assert holdings.match(digests(15), 0.0) == {"a": 1}


def test_a_replica_that_got_a_prompt_is_believed_to_hold_it_for_a_while() -> None:
    holdings = Holdings(max_blocks=4)
    holdings.expect("a", digests(1), 0.0)  # it is not heard of
    holdings.take(told(), 0.0)
    holdings.expect("a", digests(1, 2), 0.0)
    assert holdings.match(digests(1, 2), EXPECTED_S - 1) == {"a": 2}
    assert holdings.match(digests(1, 2), EXPECTED_S) == {"a": 0}
    holdings.expect("a", digests(1, 2), 0.0)
    holdings.take(told(number=1, whole=False, removed=(2,)), 0.0)
    assert holdings.match(digests(1, 2), 0.0) == {"a": 1}


def test_beliefs_are_bounded_and_the_oldest_go_first() -> None:
    holdings = Holdings(max_blocks=4)
    holdings.take(told(), 0.0)
    holdings.expect("a", digests(*range(MAX_EXPECTED)), 0.0)
    holdings.expect("a", digests(0, MAX_EXPECTED), 1.0)
    assert holdings.match(digests(0), 1.0) == {"a": 1}
    assert holdings.match(digests(1), 1.0) == {"a": 0}
    assert len(holdings._replicas["a"].expected) == MAX_EXPECTED
    holdings.expect("a", digests(5), EXPECTED_S + 0.5)  # what is over is dropped
    assert len(holdings._replicas["a"].expected) == 3


def test_a_silent_replica_is_forgotten_with_all_that_is_known_of_it() -> None:
    holdings = Holdings(max_blocks=4)
    holdings.take(told(1), 0.0)
    holdings.take(Report("b", 0, True, digest(1), b"", None, b"x 1"), 10.0)
    holdings.forget(5.0)
    assert holdings.match(digests(1), 10.0) == {"b": 1}
    assert holdings.metrics() == {"b": b"x 1"}
    assert len(holdings) == 1
    holdings.drop("b")
    holdings.drop("b")
    assert len(holdings) == 0
