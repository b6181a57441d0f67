"""Real agent trajectories, rendered turn by turn and as a whole, must tokenise alike.

Set ``SESSILE_WORKLOADS`` to a folder that holds ``tau_sessions.jsonl.gz``: a line with the system
prompts (``{"systems": {key: text}}``), then one session a line (``{"system": key, "messages":
[{"role", "content", "tool_calls"}]}``), as recorded in the tau-bench repositories.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.conversations import Exchange, Model, now, system
from tests.support.tokenizers import byte_level_tokenizer, template, write_model_folder
from workers.text.hf_codec import load_hf_codec
from workers.text.hf_template import ChatTemplate
from workers.text.port import Call, ChatMessage, LastTurn, Role


def sessions(every: int) -> list[list[ChatMessage]]:
    folder = os.environ.get("SESSILE_WORKLOADS")
    if not folder:
        pytest.skip("SESSILE_WORKLOADS names no folder with tau_sessions.jsonl.gz")
    file = Path(folder) / "tau_sessions.jsonl.gz"
    if not file.exists():
        pytest.skip(f"{file} does not exist")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        systems = json.loads(next(lines))["systems"]
        recorded = [json.loads(line) for line in lines][::every]
    return [[system(systems[it["system"]]), *map(message, it["messages"])] for it in recorded]


def message(recorded: dict[str, Any]) -> ChatMessage:
    role, content = Role(recorded["role"]), recorded.get("content") or ""
    if role is Role.TOOL:
        return ChatMessage(role, content, tool_call_id="call_1", name="tool")
    calls = recorded.get("tool_calls") or () if role is Role.ASSISTANT else ()
    return ChatMessage(role, content, tuple(map(call, calls)))


def call(recorded: dict[str, Any]) -> Call:
    arguments = recorded["arguments"]  # of some models as text
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call("call_1", recorded["name"], text)


def turns(messages: list[ChatMessage]) -> Iterator[tuple[list[ChatMessage], ChatMessage]]:
    """What is new in each turn, and the reply to it. Replies nothing was asked for are given."""
    new: list[ChatMessage] = []
    for it in messages:
        if it.role is Role.ASSISTANT and any(m.role in (Role.USER, Role.TOOL) for m in new):
            yield new, it
            new = []
        else:
            new.append(it)


def as_text(reply: ChatMessage) -> ChatMessage:
    """As a model writes it whose template knows no calls."""
    calls = [
        f'<call>{{"name": "{it.name}", "arguments": {it.arguments}}}</call>'
        for it in reply.tool_calls
    ]
    return ChatMessage(Role.ASSISTANT, "\n".join(filter(None, [reply.content, *calls])))


def check(it: Model, every: int, keep_calls: bool) -> tuple[int, int, int]:
    """Sessions, turns, and turns where the whole ledger too is what the full render gives.

    It is not where a reply begins or ends with white space: re-rendered, that may be stripped, or
    become one token with the white space before it; a ledger keeps what the model generated.
    """
    recorded, count, whole = sessions(every), 0, 0
    for messages in recorded:
        given = [m if keep_calls else as_text(m) if m.tool_calls else m for m in messages]
        exchanges: list[Exchange] = []
        history: list[ChatMessage] = []
        steps = list(turns(given))
        for new, reply in steps:
            exchanges.append(Exchange(tuple(new), as_text(reply).content))
        last = LastTurn.NONE
        ledgers = it.ledger(exchanges) if not keep_calls else None
        for index, (new, reply) in enumerate(steps):
            history += new
            appended = it.codec.render(last, new, ())
            last = LastTurn.CLOSED
            _, full = it.render_everything(history)
            assert full[-len(appended) :] == appended
            count += 1
            if ledgers is not None:
                whole += ledgers[index][0] == full
                replies = [exchange.reply for exchange in exchanges[:index]]
                if all(text == text.strip() for text in replies):
                    assert ledgers[index][0] == full
            history.append(reply)
    return len(recorded), count, whole


@pytest.mark.parametrize("name", ["llama3", "qwen25", "smollm2"])
def test_trajectories_are_appended_as_they_are_rendered(name: str, tmp_path: Path) -> None:
    codec = load_hf_codec(write_model_folder(tmp_path, template(name)), now)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    plain = Tokenizer.from_str(byte_level_tokenizer())
    it = Model(codec, ChatTemplate(template(name), names, now), plain)
    print(f"{name}: sessions, turns, turns with an equal ledger: {check(it, 16, False)}")
    if name == "qwen25":
        print(f"{name}: with calls as the template writes them: {check(it, 16, True)}")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trajectories_with_the_bundled_models_own_tokenizer() -> None:
    from workers.engines.model_store import ModelUnavailable, model_folder

    sessions(every=1000)  # skips before a model is converted
    try:
        folder = model_folder()
    except ModelUnavailable as error:
        pytest.skip(str(error))
    it = Model(
        load_hf_codec(folder, now),
        ChatTemplate((folder / "chat_template.jinja").read_text(), {}, now),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    print(f"sessions, turns, turns with an equal ledger: {check(it, 1, False)}")
