"""The codec reads a model's folder as transformers does."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.conversations import CONVERSATIONS, GET_FLIGHT, assistant, without_tools
from tests.support.tokenizers import template, write_model_folder
from workers.text.hf_codec import load_hf_codec
from workers.text.port import Call, ChatMessage, LastTurn, Role
from workers.text.rendering import template_messages, template_tool

transformers: Any = pytest.importorskip("transformers")

TOOLS = {"llama3": [GET_FLIGHT], "qwen25": [GET_FLIGHT]}


@pytest.mark.parametrize("name", ["alternating", "chatml", "llama3", "qwen25", "smollm2"])
def test_a_whole_conversation_is_what_apply_chat_template_gives(name: str, tmp_path: Path) -> None:
    codec = load_hf_codec(write_model_folder(tmp_path, template(name)), datetime.now)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    tools = TOOLS.get(name, [])
    for exchanges in CONVERSATIONS.values():
        messages: list[ChatMessage] = []
        for exchange in exchanges if name != "alternating" else without_tools(exchanges):
            messages += [*exchange.new, assistant(exchange.reply)]
        if codec.shape.tool_calls:
            call = Call("c1", "get_flight", '{"number": "HAT001", "é": [1.5, null]}')
            messages.append(ChatMessage(Role.ASSISTANT, "", tool_calls=(call,)))
        expected = reference.apply_chat_template(
            template_messages(messages, codec.shape),
            tools=[template_tool(tool) for tool in tools] or None,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert codec.render(LastTurn.NONE, messages, tools) == expected
