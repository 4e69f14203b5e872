"""What ``/v1/streams`` takes and answers, as it stands in the server's OpenAPI schema."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sink_vllm.policy.parked import ResumedFrom

_MOST = 2**31 - 1
TokenIds = list[Annotated[int, Field(ge=0, le=_MOST)]]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Message(_Request):
    """A chat message of plain text."""

    role: Literal["system", "user", "assistant"] = Field(description="Who says it.")
    content: str = Field(description="The text.")


class Content(_Request):
    """At most one of messages, text and tokens."""

    messages: list[Message] | None = Field(
        default=None, min_length=1, description="Chat messages, for the model's chat template."
    )
    text: str | None = Field(default=None, min_length=1, description="Text, appended as it is.")
    tokens: TokenIds | None = Field(
        default=None, min_length=1, description="Token ids, appended as they are."
    )

    @property
    def is_raw(self) -> bool:
        """Whether it is appended as it is."""
        return self.text is not None or self.tokens is not None

    @property
    def has_content(self) -> bool:
        return self.messages is not None or self.is_raw

    @model_validator(mode="after")
    def _one_of_them(self) -> "Content":
        given = [name for name in ("messages", "text", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; send one of them")
        return self


class CreateStream(Content):
    """A new stream. Its first content is computed with the first append."""

    model: str | None = Field(
        default=None, description="Name of the served model or LoRA adapter. Default: the model."
    )
    system: str | None = Field(
        default=None, description="System prompt; short for a first message of that role."
    )
    kv_policy: Literal["full", "sink"] | None = Field(
        default=None, description="'full' never evicts and ends at the server's capacity."
    )
    sink_tokens: int | None = Field(
        default=None, ge=0, le=_MOST, description="First tokens that are never evicted."
    )
    sink_window: int | None = Field(
        default=None, ge=1, le=_MOST, description="Most recent tokens that are always kept."
    )
    sink_pin: Literal["none", "system"] | None = Field(
        default=None, description="'system' makes the whole system prompt sink tokens."
    )
    cache_salt: str | None = Field(
        default=None, min_length=1, description="Keeps the cached pages of this stream to itself."
    )
    metadata: dict[
        Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]
    ] = Field(
        default_factory=dict, max_length=16, description="Of the client's own: 16 texts by name."
    )
    expires_after: int | None = Field(
        default=None,
        ge=1,
        le=_MOST,
        description="Seconds without use after which it is forgotten, at most the server's.",
    )
    priority: int = Field(
        default=0,
        ge=-(2**63),
        le=2**63 - 1,
        description="Of its turns: lower comes earlier. Other than 0 needs a server with "
        "--scheduling-policy priority.",
    )

    @model_validator(mode="after")
    def _system_comes_first(self) -> "CreateStream":
        if self.system is not None and self.is_raw:
            raise ValueError("system needs chat messages; send text or tokens without it")
        return self

    def first_messages(self) -> list[dict[str, str]]:
        """System prompt and messages."""
        system = [] if self.system is None else [Message(role="system", content=self.system)]
        return [message.model_dump() for message in (*system, *(self.messages or ()))]

    def options(self) -> dict[str, Any]:
        """The options of the policy that were given, as in ``vllm_xargs``."""
        names = ("kv_policy", "sink_tokens", "sink_window", "sink_pin")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Generate(_Request):
    """How to generate; what is left out is the server's default."""

    max_tokens: int | None = Field(
        default=None, ge=1, le=_MOST, description="Default: until the model ends its turn."
    )
    min_tokens: int = Field(default=0, ge=0, le=_MOST, description="Tokens before an end counts.")
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus of probability.")
    top_k: int | None = Field(default=None, ge=-1, le=_MOST, description="Most likely tokens.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Relative to the likeliest.")
    seed: int | None = Field(default=None, ge=0, le=_MOST, description="For repeatable sampling.")
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="As in OpenAI's API."
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="As in OpenAI's API."
    )
    repetition_penalty: float | None = Field(default=None, gt=0, le=100, description="1 is none.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, max_length=16, description="Texts that end the output."
    )
    ignore_eos: bool = Field(default=False, description="Go on when the model ends its turn.")


class Append(Content):
    """More content, and whether to generate behind it. Without content: go on generating."""

    generate: Generate | None = Field(
        default=None, description="Left out: the content is computed, and nothing is generated."
    )
    stream: bool = Field(default=False, description="Server-sent events instead of one answer.")
    return_token_ids: bool = Field(default=False, description="Generated token ids as well.")
    priority: int | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, description="Of this turn. Default: the stream's."
    )

    @model_validator(mode="after")
    def _something_to_do(self) -> "Append":
        if self.generate is None and not self.has_content:
            raise ValueError("there is nothing to append; send messages, text, tokens or generate")
        return self


class TurnInfo(BaseModel):
    """How far a turn in progress has come; all counts in tokens."""

    position: int = Field(description="Length of the stream with what it has brought up to now.")
    evicted: int = Field(description="Tokens the model no longer sees.")
    cached: int = Field(description="Tokens it sees: sink tokens and window.")
    generated_tokens: int = Field(description="Up to now.")
    seconds: float = Field(description="In which they came, from the first output on.")


class StreamInfo(BaseModel):
    """A stream as the server knows it; all counts in tokens."""

    id: str
    object: Literal["stream"] = "stream"
    model: str = Field(description="Served model or LoRA adapter.")
    created: int = Field(description="Unix time.")
    age_seconds: float = Field(description="Since it was created.")
    idle_seconds: float = Field(description="Since it was last appended to.")
    expires_in_seconds: float = Field(description="Until it is forgotten if nobody appends.")
    busy: bool = Field(description="Somebody is appending.")
    turn: TurnInfo | None = Field(
        description="The turn in progress, no part of the stream until it ends; null without one, "
        "and until it has computed what was appended."
    )
    turns: int = Field(description="Appends so far.")
    position: int = Field(description="Length of the stream.")
    evicted: int = Field(description="Tokens the model no longer sees.")
    cached: int = Field(description="Tokens it sees: sink tokens and window.")
    evictions: int = Field(description="Evictions of one stride.")
    sink_tokens: int | None = Field(description="Null with kv_policy 'full'.")
    sink_window: int | None = Field(description="Null with kv_policy 'full'.")
    capacity: int = Field(description="Most tokens it ever has cached.")
    pending_messages: int = Field(description="Messages that the first append will compute.")
    metadata: dict[str, str] = Field(description="As given when it was created.")
    priority: int = Field(description="Of its turns; lower comes earlier.")


class StreamList(BaseModel):
    """Streams of one API key, the most recently used ones first."""

    object: Literal["list"] = "list"
    data: list[StreamInfo] = Field(description="A page of them.")
    has_more: bool = Field(description="Ask again with `after` as the last id of this page.")


class AppendUsage(BaseModel):
    """What an append cost, in tokens."""

    appended_tokens: int = Field(description="Of messages, text or tokens, with the template's.")
    generated_tokens: int = Field(description="Generated behind them.")
    cached_tokens: int = Field(description="Of the stream before, found in the prefix cache.")
    computed_tokens: int = Field(description="Prompt tokens that had to be computed.")
    resumed_from: ResumedFrom | None = Field(
        description="What the stream went on from: its cached pages; pages kept in host memory or "
        "on disk; its tokens in the window alone, as the pages were gone; null if all of it was "
        "computed again."
    )


class Answer(BaseModel):
    """What an append has brought, without the stream as it is then."""

    text: str | None = Field(description="What was generated; null in event streams.")
    token_ids: list[int] | None = Field(description="If asked for.")
    finish_reason: str | None = Field(description="stop, length, or null without generation.")
    usage: AppendUsage


class Appended(Answer):
    """The answer to an append; of an event stream, its last event but ``[DONE]``."""

    object: Literal["stream.append"] = "stream.append"
    stream: StreamInfo


class Delta(BaseModel):
    """An event of an event stream."""

    object: Literal["stream.delta"] = "stream.delta"
    text: str = Field(description="What was generated since the last event.")
    token_ids: list[int] | None = Field(description="If asked for.")


class Deleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["stream.deleted"] = "stream.deleted"
    deleted: bool = True
