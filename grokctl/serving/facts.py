"""What a server says of itself and of its model: names, tokens, health, numbers."""

from collections.abc import Mapping
from typing import Final

from grokctl import __version__
from grokctl.errors import UsageError
from grokctl.serving import fields
from grokctl.serving.exchange import Answer, Receive, Scope, Send, json_answer
from grokctl.serving.measures import CONTENT_TYPE
from grokctl.serving.served_model import ServedModel
from grokctl.serving.service import Service
from grokctl.serving.vocabulary import Vocabulary
from grokctl.serving.wire_errors import of_usage, unavailable
from grokctl.session import settings

_MOST_TOKENS: Final = 2**20
"""Of a text, or that a text is made of: several contexts."""


async def models(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """All names of the model."""
    model = service.model
    cards = [model.card(name) for name in model.names]
    await json_answer({"object": "list", "data": cards})(scope, receive, send)


async def one_model(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """One name."""
    model = service.model
    card = model.card(model.check_name(scope["path_params"]["name"]))
    await json_answer(card)(scope, receive, send)


# --- tokens


async def tokenize(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Token ids of a text, as vLLM (`prompt`) or llama.cpp (`content`) is asked for them."""
    model = service.model
    words = model.require_vocabulary()

    def answer(body: Mapping[str, object]) -> Answer:
        given = {name: value for name, value in body.items() if value is not None}
        name = "prompt" if "prompt" in given else "content"
        text = _text(body, name)
        if len(text) > _MOST_TOKENS:
            raise fields.mismatch(name, f"at most {_MOST_TOKENS:,} characters", f"{len(text):,}")
        detail = "with_pieces" if name == "content" else "return_token_strs"
        is_detailed = fields.take(given, detail, fields.switch, False)
        ids = words.encode(text)
        if len(ids) > _MOST_TOKENS:
            raise fields.mismatch(name, f"at most {_MOST_TOKENS:,} tokens", f"{len(ids):,}")
        if name == "content":
            pieces = [{"id": each, "piece": _piece(words, each)} for each in ids if is_detailed]
            return json_answer({"tokens": pieces if is_detailed else ids})
        values = {"count": len(ids), "max_model_len": model.plan.context, "tokens": ids}
        strings = [words.name(each) for each in ids] if is_detailed else None
        return json_answer({**values, "token_strs": strings})

    answered = await service.bodies.read(scope, receive, answer)
    await answered(scope, receive, send)


def _piece(words: Vocabulary, token: int) -> str | list[int]:
    """The text of a token, or its bytes if they are no text."""
    found = bytes(words.bytes_of(token))
    try:
        return found.decode()
    except UnicodeDecodeError:
        return list(found)


async def detokenize(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """The text of token ids."""
    words = service.model.require_vocabulary()

    def answer(body: Mapping[str, object]) -> Answer:
        ids = body.get("tokens")
        if not isinstance(ids, list):
            raise fields.mismatch("tokens", "a list of token ids", ids)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < words.size:
                raise fields.mismatch("tokens", f"token ids from 0 to {words.size - 1}", token)
        text = words.tokenizer.decode(ids)
        return json_answer({"prompt": text, "content": text})

    answered = await service.bodies.read(scope, receive, answer)
    await answered(scope, receive, send)


async def tokenizer_info(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """What evaluation harnesses ask before they use the two routes above."""
    model = service.model
    words = model.require_vocabulary()
    names = {token: name for name, token in words.controls.items()}
    config = model.plan.config
    values = {
        "tokenizer_class": "sentencepiece",
        "bos_token": names.get(1),
        "eos_token": names.get(config.eos_token, words.name(config.eos_token)),
        "pad_token": names.get(config.pad_token),
        "chat_template": None,
        "vocab_size": words.size,
        "model_max_length": model.plan.context,
    }
    await json_answer(values)(scope, receive, send)


def _text(body: Mapping[str, object], name: str) -> str:
    try:
        return settings.check_text(name, fields.text(name, body.get(name)))
    except UsageError as error:
        raise of_usage(error) from error


# --- the server


async def health(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """200 while requests can be relied on to be answered."""
    problem = service.health()
    if problem is not None:
        raise problem
    await json_answer({"status": "ok"})(scope, receive, send)


async def version(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Of grokctl."""
    del service
    await json_answer({"version": __version__})(scope, receive, send)


async def load(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Sequences under way."""
    gauges = service.gauges()
    await json_answer({"server_load": gauges.running + gauges.waiting})(scope, receive, send)


async def metrics(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """Numbers for Prometheus."""
    page = service.measures.page(service.gauges())
    await Answer(page, media_type=CONTENT_TYPE)(scope, receive, send)


async def props(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """What clients of llama.cpp ask for."""
    model = service.model
    values = {
        "default_generation_settings": {"n_ctx": model.plan.context},
        "total_slots": service.slots,
        "model_alias": model.name,
        "build_info": f"grokctl-{__version__}",
        "bos_token": _control(model, 1),
        "eos_token": _control(model, model.plan.config.eos_token),
        "chat_template": "",
    }
    await json_answer(values)(scope, receive, send)


def _control(model: ServedModel, token: int) -> str:
    return "" if model.vocabulary is None else model.vocabulary.name(token)


async def slots(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """How full the slots are; nothing of what is in them."""
    model, lengths = service.model, service.running_lengths()
    if len(lengths) >= service.slots and b"fail_on_no_slot=1" in scope["query_string"].split(b"&"):
        raise unavailable("slots: expected a free one", "no_slot", retry_after_s=1)
    lengths += [0] * (service.slots - len(lengths))
    values = [
        {"id": slot, "is_processing": bool(n_past), "n_ctx": model.plan.context, "n_past": n_past}
        for slot, n_past in enumerate(lengths)
    ]
    await json_answer(values)(scope, receive, send)
