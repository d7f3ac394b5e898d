"""What requests to the API may hold; what each field means is its description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from foretoken.core.params import MAX_TEMPERATURE
from foretoken.server.errors import FieldError
from foretoken.server.field_types import (
    FEW,
    MAX_COUNT,
    MAX_ENTRIES,
    MAX_STOPS,
    ONE_BY_ONE,
    ONE_TO_FEW,
    WHOLE,
    AnyTokenIds,
    Bias,
    Count,
    Cutoff,
    Ignored,
    JsonObject,
    Limit,
    NonEmpty,
    NumLogprobs,
    Penalty,
    PositiveShare,
    Schema,
    Share,
    TokenIds,
    TokenSequence,
    Unserved,
    refuse_many,
)


class TextPart(Schema):
    """A part of a message's or a prediction's content; others than text are not served."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], FEW]


class Speculation(Schema):
    """How a request is drafted for: speed, never what is said."""

    enabled: bool = Field(True, description="Whether drafts are made; false is plain decoding.")
    drafters: Annotated[list[NonEmpty], FEW] | None = Field(
        None, description="Names of loaded drafters to use; null for all."
    )
    max_nodes: Count | None = Field(
        None, description="Most draft tokens per step; null for the server's own bound."
    )
    details: bool = Field(
        False,
        description="Whether choices carry `foretoken.tokens`: each token's id, text and the "
        "drafter that guessed it.",
    )


class Prediction(Schema):
    """Predicted output: a text that the answer may copy from. It changes speed, never tokens."""

    type: Literal["content"]
    content: Content


class StreamOptions(Schema):
    """What a stream holds beside the text."""

    include_usage: bool | None = Field(
        None, description="Whether a last chunk without choices carries `usage`."
    )
    include_obfuscation: Ignored = None


class TextFormat(Schema):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Schema):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Schema):
    """A JSON schema and what it is called."""

    name: str = Field(description="Changes nothing.")
    description: str | None = Field(None, description="Changes nothing.")
    schema_: JsonObject = Field({}, alias="schema", description="The JSON schema.")
    strict: bool | None = Field(None, description="Changes nothing: the schema always holds.")


class JsonSchemaFormat(Schema):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class GenerationRequest(Schema):
    """What both kinds of completion take."""

    model: NonEmpty = Field(description="The served model's name, as /v1/models says it.")
    stream: bool | None = Field(None, description="Whether chunks are sent as they come.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    n: Limit | None = Field(None, description="Choices per prompt; 1. Each has a seed of its own.")
    stop: (
        NonEmpty | Annotated[list[NonEmpty], Field(fail_fast=True, max_length=MAX_STOPS)] | None
    ) = Field(None, description="A text or a list of texts, before which the output ends.")
    seed: Annotated[int, WHOLE] | None = Field(
        None,
        description="Key of the noise, modulo 2**64: the same request with the same seed gives "
        "the same tokens. Null draws one.",
    )
    response_format: ResponseFormat | None = Field(None, description="What the output must follow.")
    prediction: Prediction | None = None
    speculation: Speculation | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Seconds after which the request is given up, with 504."
    )

    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = Field(
        1.0, description="0 is greedy. Null is 1, which is OpenAI's default."
    )
    top_p: PositiveShare | None = Field(
        None, description="Keep the fewest most likely tokens whose probabilities reach this; 1."
    )
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT), WHOLE] | None = Field(
        None, description="Keep the k most likely tokens; 0 and -1 keep all."
    )
    min_p: Share | None = Field(
        None, description="Drop tokens below this share of the likeliest token's probability."
    )
    top_h: PositiveShare | None = Field(
        None, description="Keep the likeliest tokens up to this share of their entropy."
    )
    typical_p: PositiveShare | None = Field(
        None, description="Keep the tokens whose surprise is nearest to the expected one."
    )
    epsilon_cutoff: Cutoff | None = Field(None, description="Drop tokens less likely than this.")
    eta_cutoff: Cutoff | None = Field(
        None, description="The same, with a bound that falls where the entropy is high."
    )
    presence_penalty: Penalty | None = Field(
        None, description="Subtracted once if a token occurs in the output."
    )
    frequency_penalty: Penalty | None = Field(
        None, description="Subtracted for each time a token occurs in the output."
    )
    repetition_penalty: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Divides positive and multiplies negative logits of tokens seen; 1."
    )
    no_repeat_ngram_size: Count | None = Field(
        None, description="No run of so many tokens comes twice; 0 is off."
    )
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Bias],
            Field(max_length=MAX_ENTRIES, json_schema_extra={"additionalProperties": False}),
            BeforeValidator(refuse_many),
        ]
        | None
    ) = Field(None, description="Added to the logits of token ids, which are written as text.")
    sequence_bias: (
        Annotated[list[Annotated[list[TokenSequence | Bias], ONE_BY_ONE]], FEW] | None
    ) = Field(None, description="Pairs of token ids and a bias of the last one after the others.")
    bad_words_ids: Annotated[list[TokenSequence], FEW] | None = Field(
        None, description="Sequences of token ids that are never completed."
    )
    allowed_token_ids: AnyTokenIds | None = Field(None, description="Only these are ever chosen.")
    suppress_tokens: TokenIds | None = Field(None, description="Token ids that are never chosen.")
    stop_token_ids: TokenIds | None = Field(None, description="Token ids that end the output.")
    ignore_eos: bool | None = Field(None, description="Go on after an end-of-sequence token.")
    min_tokens: Count | None = Field(
        None, description="No token that ends the output is chosen before so many others."
    )
    json_schema: JsonObject | bool | None = Field(
        None, description="A JSON schema that the output must follow."
    )
    regex: NonEmpty | None = Field(
        None, description="A regular expression that the whole output must match."
    )
    lark: NonEmpty | None = Field(
        None, description="A grammar in llguidance's Lark dialect that the output must follow."
    )
    prompt_logprobs: NumLogprobs | None = Field(
        None,
        description="For each prompt token but the first, its log-probability and those of this "
        "many likeliest tokens.",
    )
    logprobs_mode: Literal["raw", "processed"] | None = Field(
        None, description="As the model says it, or after every control."
    )

    # What changes nothing.
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    def check_together(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            FieldError: Two do.
        """
        if self.stream_options is not None and not self.stream:
            raise FieldError(
                "stream_options", "stream_options are for streams", hint="set stream to true"
            )


class CompletionRequest(GenerationRequest):
    """A request to /v1/completions."""

    prompt: (
        NonEmpty
        | Annotated[list[NonEmpty], ONE_TO_FEW]
        | TokenSequence
        | Annotated[list[TokenSequence], ONE_TO_FEW]
    ) = Field(description="A text, a list of texts, token ids, or a list of lists of token ids.")
    max_tokens: Limit | None = Field(
        None, description="Most tokens of each choice; 16. The context's end is another bound."
    )
    echo: bool | None = Field(None, description="Whether the text begins with the prompt.")
    logprobs: NumLogprobs | None = Field(
        None,
        description="For each token, its log-probability and those of this many likeliest tokens.",
    )
    best_of: Limit | None = Field(
        None, description="As many as `n`, or null: every choice is returned."
    )
    suffix: Unserved = None

    def check_together(self) -> None:
        """Refuse fields that contradict each other."""
        super().check_together()
        if self.best_of not in (None, self.n or 1):
            raise FieldError(
                "best_of",
                f"every choice that is made is returned; got best_of {self.best_of} with n "
                f"{self.n or 1}",
                hint="leave best_of out, or make it n",
            )


class Message(Schema):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(description="A text, or text parts, which are joined by line ends.")
    name: str | None = Field(None, description="Of who speaks, if the chat template shows it.")
    refusal: Unserved = None
    annotations: Unserved = None
    audio: Unserved = None
    tool_calls: Unserved = None
    function_call: Unserved = None
    reasoning: Unserved = None


class ChatRequest(GenerationRequest):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], ONE_TO_FEW] = Field(description="The conversation so far.")
    max_completion_tokens: Limit | None = Field(
        None, description="Most tokens of each choice; as many as there is room for."
    )
    max_tokens: Limit | None = Field(None, description="The older name of `max_completion_tokens`.")
    logprobs: bool | None = Field(
        None, description="Whether each token's log-probability is reported."
    )
    top_logprobs: NumLogprobs | None = Field(
        None, description="How many likeliest tokens are reported beside it; only with `logprobs`."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Whether the template opens the assistant's turn; true."
    )
    continue_final_message: bool | None = Field(
        None, description="Whether the last message is left open and goes on; false."
    )
    chat_template_kwargs: (
        Annotated[
            dict[str, bool | int | float | str | None],
            Field(max_length=MAX_ENTRIES),
            BeforeValidator(refuse_many),
        ]
        | None
    ) = Field(None, description="Variables for the chat template, such as enable_thinking.")
    modalities: Annotated[list[Literal["text"]], FEW] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(None, description="There are no tools.")
    function_call: Literal["none", "auto"] | None = Field(None, description="Likewise.")
    parallel_tool_calls: Ignored = None
    verbosity: Unserved = None
    reasoning_effort: Unserved = None
    tools: Unserved = None
    functions: Unserved = None
    audio: Unserved = None
    web_search_options: Unserved = None
    moderation: Unserved = None

    def check_together(self) -> None:
        """Refuse fields that contradict each other."""
        super().check_together()
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise FieldError(
                "max_tokens",
                f"max_tokens is the older name of max_completion_tokens; got {self.max_tokens} "
                f"and {self.max_completion_tokens}",
                hint="give one of them",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError(
                "top_logprobs", "top_logprobs are for logprobs", hint="set logprobs to true"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError(
                "continue_final_message",
                "a message that goes on excludes add_generation_prompt",
                hint="give one of them",
            )
