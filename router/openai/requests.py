"""What may be sent: the bodies of requests, as pydantic models that also make the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...core.request import MAX_SEED

MAX_ANSWERS = 128  # of one request: prompts times answers of each

_UINT32 = 2**32 - 1
_INT32 = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=_UINT32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]


class _Body(BaseModel):
    # Strict: "1" is no number and true is no integer. OpenAI refuses unknown fields, and so do we.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """How an answer is streamed."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage and no choices")
    include_obfuscation: bool | None = Field(default=None, description="Accepted; nothing is obfuscated")


class JsonSchema(_Body):
    """A named JSON schema."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Accepted; the schema is always followed")


class TextFormat(_Body):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(_Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Body):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(_Body):
    """Extension: text that a regular expression matches as a whole."""

    type: Literal["regex"]
    regex: str = Field(min_length=1)


class GrammarFormat(_Body):
    """Extension: text of a grammar in Lark's notation of EBNF, with the rule `start`."""

    type: Literal["grammar"]
    grammar: str = Field(min_length=1)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")
]


class GenerationRequest(_Body):
    """What completions and chat completions share. null means the default everywhere."""

    model: str = Field(description="As /v1/models names it")
    stream: bool | None = Field(default=None, description="Server-sent events, ended by data: [DONE]")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream")
    n: int | None = Field(default=None, ge=1, le=MAX_ANSWERS, description="Answers to each prompt; 1")
    temperature: float | None = Field(default=None, description="0 is greedy; 1")
    top_p: float | None = Field(default=None, description="Keep the likeliest tokens of this probability; 1")
    top_k: int | None = Field(default=None, ge=-1, le=_INT32, description="Extension: keep k tokens; 0 or -1 keeps all")
    min_p: float | None = Field(
        default=None, description="Extension: keep tokens this likely relative to the likeliest"
    )
    presence_penalty: float | None = Field(default=None, description="-2 to 2; 0")
    frequency_penalty: float | None = Field(default=None, description="-2 to 2; 0")
    repetition_penalty: float | None = Field(default=None, description="Extension: above 1 repeats less; 1")
    logit_bias: dict[str, float] | None = Field(default=None, description="Token id to what is added to its logit")
    seed: int | None = Field(default=None, ge=-MAX_SEED - 1, le=MAX_SEED, description="Same seed, same answer")
    stop: str | Annotated[list[str], Field(max_length=16)] | None = Field(
        default=None, description="The answer ends before any of these strings; at most 16"
    )
    stop_token_ids: TokenIds | None = Field(default=None, description="Extension: it ends after any of these")
    ignore_eos: bool | None = Field(default=None, description="Extension: go on past the end of sequence")
    min_tokens: int | None = Field(default=None, ge=0, le=_INT32, description="Extension: do not end before")
    response_format: ResponseFormat | None = Field(default=None, description="What the text must look like")
    priority: int | None = Field(
        default=None, ge=-_INT32 - 1, le=_INT32, description="Extension: higher goes first among waiting requests"
    )
    tenant: str | None = Field(
        default=None, max_length=256, description="Extension: requests of different tenants never share KV"
    )
    timeout_s: float | None = Field(default=None, gt=0, description="Extension: seconds until the request fails")
    prompt_cache_key: str | None = Field(
        default=None, description="Names the conversation, for the routing policy session; else user does"
    )
    user: str | None = Field(default=None, description="The same, where there is no prompt_cache_key")
    # Accepted, for they change nothing about the answer.
    metadata: dict[str, str] | None = Field(default=None, description="Accepted")
    store: Literal[False] | None = Field(default=None, description="Nothing is stored")
    service_tier: str | None = Field(default=None, description="Accepted")
    safety_identifier: str | None = Field(default=None, description="Accepted")


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: (
        str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    max_tokens: int | None = Field(default=None, ge=0, le=_INT32, description="16; 0 only with echo")
    echo: bool | None = Field(default=None, description="Begin the text with the prompt")
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_ANSWERS, description="Make so many answers, return the n likeliest; not with stream"
    )
    logprobs: TopLogprobs | None = Field(default=None, description="So many likeliest tokens beside each token")
    suffix: str | None = Field(default=None, description="Refused: the models served do not fill in the middle")


class FunctionCall(_Body):
    """A function and its arguments as JSON text."""

    name: str = Field(min_length=1)
    arguments: str


class ToolCall(_Body):
    """A call that the assistant asked for."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class InstructionMessage(_Body):
    """What the assistant is told to be; developer reads as system."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(_Body):
    """What the person says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(_Body):
    """What the model said."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    # What our own answers hold and clients send back.
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(_Body):
    """What a function returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class Function(_Body):
    """A function that the model may ask for."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of its arguments")
    strict: bool | None = Field(default=None, description="Accepted; forced calls always follow the schema")


class Tool(_Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(_Body):
    """Names a function."""

    name: str


class NamedTool(_Body):
    """The one function to call."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1, le=_INT32, description="As max_completion_tokens")
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_INT32, description="Up to the model's limit")
    logprobs: bool | None = Field(default=None, description="Tell how likely each token was")
    top_logprobs: TopLogprobs | None = Field(default=None, description="Likeliest tokens beside each; needs logprobs")
    tools: list[Tool] | None = Field(default=None, max_length=128, description="Functions that the model may ask for")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None, description="auto where there are tools; required and a name force a call"
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false keeps the first call only")
    modalities: list[Literal["text"]] | None = Field(default=None, description="Text only")
    reasoning_effort: str | None = Field(default=None, description="Accepted")
    verbosity: str | None = Field(default=None, description="Accepted")


class TokenizeRequest(_Body):
    """The body of /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)


class DetokenizeRequest(_Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: TokenIds
    keep_special_tokens: bool | None = None
