"""`POST /tokenize` and `/detokenize`: what a prompt costs, pictures included, without computing it."""

from dataclasses import asdict

from internvl_rt.inputs.raw_prompt import RawPrompt
from internvl_rt.server.answer import Json, text_of
from internvl_rt.server.ask import is_begun
from internvl_rt.server.body import parse
from internvl_rt.server.call import Call
from internvl_rt.server.fault import refusal
from internvl_rt.server.gate import read_body
from internvl_rt.server.protocol import DetokenizeRequest, TokenizeRequest
from internvl_rt.server.service import Service
from internvl_rt.server.thinking import wants_thinking
from internvl_rt.server.tools import read_tools


async def tokenize(service: Service, call: Call) -> None:
    """Counts the tokens of a text, or of a conversation as a chat request would have it, pictures included."""
    request = parse(await read_body(service, call), TokenizeRequest)
    service.check_model(request.model)
    if (request.messages is None) == (request.prompt is None):
        raise refusal("expected either messages or a prompt; send one of them", "messages", "invalid_value")
    asking, tokenizer = service.asking, service.core.tokenizer
    prompt: RawPrompt | list[Json] = RawPrompt(request.prompt or "")
    if request.messages is not None:
        tools = read_tools(request.tools, None, None, asking.options.max_tools)
        thinks = wants_thinking(None, None, asking.config, "", begun=is_begun(request.messages))
        conversation = await asking.conversation(request.messages, tools, thinks=thinks)
        prompt, call.media_places = conversation.messages, conversation.media_places
    described = await service.engine.describe(prompt, think=False, cache_salt=service.salt(call, None))
    ids, pictures = described.prompt.token_ids, list[Json]()
    for layout, span in zip(described.layouts, described.prompt.spans, strict=True):
        pictures.append({**(asdict(layout) if layout else {}), "start": span.start, "tokens": span.num_tokens})
    answer: Json = {"count": len(ids), "max_model_len": service.core.max_model_len, "tokens": ids, "pictures": pictures}
    if request.return_token_strs:
        answer["token_strs"] = [text_of(token_id, tokenizer) for token_id in ids]
    await call.send_json(answer)


async def detokenize(service: Service, call: Call) -> None:
    """Returns the text of tokens, special ones included."""
    request = parse(await read_body(service, call), DetokenizeRequest)
    service.check_model(request.model)
    tokenizer = service.core.tokenizer
    unknown = next((each for each in request.tokens if each not in tokenizer.token_bytes), None)
    if unknown is not None:
        raise refusal(f"tokens: {unknown} is no token of this model; send ids that it has", "tokens", "invalid_value")
    await call.send_json({"prompt": tokenizer.decode(request.tokens, skip_specials=False)})
