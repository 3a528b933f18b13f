"""`POST /v1/decisions`: questions about one input, answered by probabilities. All share one prefix, pictures included.

Each question follows the same input, whose keys and values are computed once and shared. A question's values are scored
as whole answers, with the end of the turn, so that long and short ones compare.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl_rt.engine.reply import Score, Usage
from internvl_rt.server.answer import Json
from internvl_rt.server.ask import Asking, Conversation
from internvl_rt.server.body import parse
from internvl_rt.server.call import Call
from internvl_rt.server.fault import NO_RETRY, ApiError, refusal
from internvl_rt.server.gate import read_body
from internvl_rt.server.items import messages_of
from internvl_rt.server.protocol import DecisionsRequest, Message, Part, Question
from internvl_rt.server.service import Service

MAX_CHOICES, MAX_LEVELS = 255, 10
AT_ONCE = 8  # questions that are scored together, each with all of its values


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question as the model sees it: what follows the input, and the texts that it may answer with."""

    text: str
    values: tuple[str, ...]


async def decisions(service: Service, call: Call) -> None:
    """Answers predicates, choices and scores, in the order of the questions."""
    request = parse(await read_body(service, call), DecisionsRequest)
    service.check_model(request.model)
    options, num_questions = service.options, len(request.questions)
    if not 1 <= num_questions <= options.max_questions:
        what = f"questions: expected 1 to {options.max_questions}, got {num_questions:,}"
        raise refusal(what, "questions", "limit_exceeded")
    asked = [_read(question, f"questions[{index}]") for index, question in enumerate(request.questions)]
    num_values = sum(len(each.values) for each in asked)
    if num_values > options.max_question_values:
        what = f"questions: at most {options.max_question_values:,} values together are taken, got {num_values:,}"
        raise refusal(what, "questions", "limit_exceeded")
    conversation = await conversation_of(service.asking, request)
    call.media_places = conversation.media_places
    salt, limit_s = service.salt(call, request.cache_salt), service.timeout_s(request.timeout_s)
    try:
        async with asyncio.timeout(limit_s):
            results = await _score(service, conversation, asked, salt)
    except TimeoutError:
        what = f"the questions were not answered within {limit_s:g} s; ask fewer"
        raise ApiError(408, what, "timeout", headers=NO_RETRY) from None
    answers = [_answer(question, scores) for question, scores in zip(request.questions, results, strict=True)]
    usage = _usage(results)
    service.metrics.used(usage.prompt_tokens, usage.cached_tokens, usage.image_tokens, usage.completion_tokens)
    await call.send_json(
        {
            "answers": answers,
            "model": service.names[0],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
        }
    )


async def conversation_of(asking: Asking, request: DecisionsRequest) -> Conversation:
    """Reads what all questions are about. Raises ApiError."""
    messages, places = messages_of(request.input)
    if not messages or messages[-1].role != "user":
        messages, places = [*messages, Message("user", "")], [*places, "input"]
    return await asking.conversation(messages, places=places)


async def _score(
    service: Service, conversation: Conversation, asked: Sequence[_Asked], salt: str | None
) -> list[list[Score]]:
    """Scores the values of each question. The first value of all comes alone, and computes the input for the others."""
    places = asyncio.Semaphore(AT_ONCE)

    async def score(question: _Asked, values: Sequence[str]) -> list[Score]:
        async with places:
            messages = _with_question(conversation.messages, question.text)
            return await service.engine.score(messages, values, include_end=True, cache_salt=salt)

    begun = await score(asked[0], asked[0].values[:1])
    left = [(asked[0], asked[0].values[1:]), *((question, question.values) for question in asked[1:])]
    tasks = [asyncio.create_task(score(question, values)) for question, values in left]
    try:
        first, *others = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [[*begun, *first], *others]


def _usage(results: Sequence[Sequence[Score]]) -> Usage:
    """Adds up the questions: of each its prompt once, and the tokens of its values."""
    firsts = [scores[0] for scores in results]
    prompts = sum(first.usage.prompt_tokens - len(first.logprobs) for first in firsts)
    return Usage(
        prompt_tokens=prompts,
        image_tokens=sum(first.usage.image_tokens for first in firsts),
        completion_tokens=sum(len(score.logprobs) for scores in results for score in scores),
        cached_tokens=sum(first.usage.cached_tokens for first in firsts),
    )


def _with_question(messages: Sequence[Json], question: str) -> list[Json]:
    """Appends a question to the last user message."""
    *before, last = messages
    content = last["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    gap = "\n\n" if any(part["type"] == "text" and part["text"] for part in parts) else ""
    return [*before, {"role": "user", "content": [*parts, {"type": "text", "text": gap + question}]}]


def _read(question: Question, where: str) -> _Asked:
    """Reads a question. Raises ApiError."""
    about = question.instructions
    if not isinstance(about, str):
        about = "\n".join(_text(part, f"{where}.instructions[{index}]") for index, part in enumerate(about))
    if not about.strip():
        raise refusal(f"{where}.instructions: expected a question, got none; send one", f"{where}.instructions")
    if question.type == "predicate":
        return _Asked(f"{about}\n\nIs this true? Answer with Yes or No alone.", ("Yes", "No"))
    if question.type == "choice":
        choices = [(_written(each.value), each.description) for each in question.choices or ()]
        most, key, kind = MAX_CHOICES, "choices", "one of these values"
    elif question.type == "score":
        choices = [(each.label, each.description) for each in question.levels or ()]
        most, key, kind = MAX_LEVELS, "levels", "one of these levels, from the lowest to the highest"
    else:
        what = f"{where}.type: expected predicate, choice or score, got {question.type!r:.60}"
        raise refusal(what, f"{where}.type", "invalid_value")
    values = tuple(value for value, _ in choices)
    if not 2 <= len(values) <= most or len(set(values)) < len(values) or not all(map(str.strip, values)):
        what = f"{where}.{key}: expected 2 to {most} texts, each another one and none empty"
        raise refusal(what, f"{where}.{key}", "invalid_value")
    lines = "\n".join(f"- {value}: {described}" if described else f"- {value}" for value, described in choices)
    return _Asked(f"{about}\n\nAnswer with {kind} alone:\n{lines}", values)


def _answer(question: Question, scores: Sequence[Score]) -> Json:
    """Makes an answer of the log-probabilities of the values.

    Probabilities are those among the values. A confidence is how likely the model answers so, whatever it may say.
    """
    totals = [score.total for score in scores]
    best = max(range(len(totals)), key=totals.__getitem__)
    weights = [math.exp(total - totals[best]) for total in totals]
    probabilities = [weight / sum(weights) for weight in weights]
    answer: Json = {"type": question.type, "name": question.name}
    if question.type == "predicate":
        return answer | {"probability": probabilities[0]}
    answer["confidence"] = math.exp(totals[best])
    if question.type == "choice":
        values = [each.value for each in question.choices or ()]
        pairs = zip(values, probabilities, strict=True)
        listed: list[Any] = [{"value": value, "probability": probability} for value, probability in pairs]
        return answer | {"choice": values[best], "probabilities": listed}
    labels = [each.label for each in question.levels or ()]
    levels = enumerate(zip(labels, probabilities, strict=True))
    listed = [{"label": label, "value": index, "probability": probability} for index, (label, probability) in levels]
    expected = sum(index * probability for index, probability in enumerate(probabilities))
    return answer | {"score": expected, "probabilities": listed}


def _written(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _text(part: Part, where: str) -> str:
    if part.text is None:
        what = f"{where}: only texts may ask; put pictures into the input"
        raise refusal(what, where, "unsupported_content_part")
    return part.text
