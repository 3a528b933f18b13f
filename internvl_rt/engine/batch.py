"""Answers many requests in one continuous batch, in the thread that waits for them."""

from collections.abc import Iterator

from tqdm import tqdm

from internvl_rt.engine.loop import StepLoop
from internvl_rt.engine.reply import Reply
from internvl_rt.engine.request import Request


def run_batch(
    loop: StepLoop, requests: Iterator[Request | Reply], num_requests: int, *, max_running: int, progress: bool = False
) -> list[Reply]:
    """Returns the replies in order. Takes a request when fewer than `max_running` run, and holds none that has ended.

    requests: a reply among them is that of a request that ended before it could run.

    Raises the error of a request, or that of taking one, and cancels the rest.
    """
    replies: dict[int, Reply] = {}
    unfinished: dict[int, Request] = {}
    with tqdm(total=num_requests, unit="request", disable=not progress) as bar:

        def advance() -> None:
            loop.advance(next(iter(unfinished.values())))
            for index, request in [(i, request) for i, request in unfinished.items() if request.done]:
                loop.poll(request)  # raises the request's error
                if request.reply is not None:
                    replies[index] = request.reply
                del unfinished[index]
                bar.update()

        try:
            for index in range(num_requests):
                while len(unfinished) >= max_running:
                    advance()
                request = next(requests)
                if isinstance(request, Reply):
                    replies[index] = request
                    bar.update()
                    continue
                unfinished[index] = request
                loop.submit(request)
                del request
            while unfinished:
                advance()
        finally:
            for request in unfinished.values():
                loop.cancel(request)
    return [replies[index] for index in range(num_requests)]
