"""Names of attributes on spans, metrics and log records.

Those of the GenAI semantic conventions are theirs (still in development there, so they are named in
this one place); what they lack begins with ``sessile.``.
"""

from __future__ import annotations

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import error_attributes

CONVERSATION_ID = gen_ai.GEN_AI_CONVERSATION_ID
OPERATION = gen_ai.GEN_AI_OPERATION_NAME
PROVIDER = gen_ai.GEN_AI_PROVIDER_NAME
MODEL = gen_ai.GEN_AI_REQUEST_MODEL
MAX_TOKENS = gen_ai.GEN_AI_REQUEST_MAX_TOKENS
TEMPERATURE = gen_ai.GEN_AI_REQUEST_TEMPERATURE
FINISH_REASONS = gen_ai.GEN_AI_RESPONSE_FINISH_REASONS
INPUT_TOKENS = gen_ai.GEN_AI_USAGE_INPUT_TOKENS
CACHED_TOKENS = gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS
OUTPUT_TOKENS = gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS
ERROR_TYPE = error_attributes.ERROR_TYPE

CHAT = {OPERATION: "chat", PROVIDER: "sessile"}
"""On every span of a turn's inference."""

SESSION = "sessile.session_id"
TURN = "sessile.turn_id"
TENANT = "sessile.tenant"
PRIORITY = "sessile.priority"
REPLICA = "sessile.replica"
ATTEMPT = "sessile.attempt"
STATUS = "sessile.status"
CAUSE = "sessile.cause"
MODE = "sessile.mode"
OUTCOME = "sessile.outcome"
STATE = "sessile.state"
KIND = "sessile.kind"
WRITE = "sessile.write"
