"""Answers many requests in one continuous batch, in the thread that waits for them."""

from collections.abc import Iterator

from tqdm import tqdm

from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.reply import Reply
from internvl_rt.engine.request import Request


def as_completed(
    loop: StepLoop, requests: Iterator[Request | Reply], *, max_running: int
) -> Iterator[tuple[int, Reply]]:
    """Yields each reply, with the number of its request, as soon as it is there.

    Takes a request when fewer than `max_running` run, and holds none that has ended. requests: a reply among them is
    that of a request that ended before it could run.

    Raises the error of a request, or that of taking one. That, or closing the iterator, cancels the rest.
    """
    unfinished: dict[int, Request] = {}
    try:
        taken, more = 0, True
        while more or unfinished:
            if more and len(unfinished) < max_running:
                request = next(requests, None)
                if request is None:
                    more = False
                elif isinstance(request, Reply):
                    yield taken, request
                else:
                    unfinished[taken] = request
                    loop.submit(request)
                taken += 1
                del request
                continue
            loop.advance(next(iter(unfinished.values())))
            for number in [number for number, request in unfinished.items() if request.done]:
                loop.poll(unfinished[number])  # raises the request's error
                reply = unfinished.pop(number).reply
                assert reply is not None, "a request that ended without one has an error"
                yield number, reply
    finally:
        for request in unfinished.values():
            loop.cancel(request)


def run_batch(
    loop: StepLoop, requests: Iterator[Request | Reply], num_requests: int, *, max_running: int, progress: bool = False
) -> list[Reply]:
    """Returns the replies in order. Runs and raises as `as_completed` does.

    num_requests: shown with the progress.
    """
    replies: dict[int, Reply] = {}
    with tqdm(total=num_requests, unit="request", disable=not progress) as bar:
        for number, reply in as_completed(loop, requests, max_running=max_running):
            replies[number] = reply
            bar.update()
    return [replies[number] for number in range(len(replies))]
