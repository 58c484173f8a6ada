"""From messages to token ids: the only place where a chat template is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]  # {"role": "user", "content": "How many apples ...?"}
Template = Literal["chat", "plain"]

_REMEDY = (
    "set prompts.chat_template to a file with a Jinja chat template, or prompts.template to plain for a base model"
)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Template = "chat") -> list[int]:
    """Token ids of a conversation up to where the assistant begins to speak.

    "chat" is the tokenizer's own template with its generation prompt, whatever it inserts by itself (some add a
    default system message). "plain" is the messages' texts joined by blank lines, with the special tokens that the
    tokenizer puts around any text but a closing one.

    Raises ValueError if the tokenizer has no chat template or the template refuses the messages.
    """
    if template == "plain":
        ids = list(tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    rendered = _apply(tokenizer, messages, add_generation_prompt=True)
    # The template writes its own special tokens: the tokenizer must not add them a second time.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, text: str, end_id: int, template: Template = "chat"
) -> list[int]:
    """Token ids of an assistant's ``text`` as a sampler would have drawn it after :func:`render`, then ``end_id``.

    It is tokenised apart from the prompt, as samples are. Under "chat" surrounding white space is dropped, because
    the generation prompt already ends where the text begins.
    """
    content = text.strip() if template == "chat" else text
    return [*tokenizer(content, add_special_tokens=False)["input_ids"], end_id]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, template: Template = "chat") -> int:
    """The token that ends an assistant's turn: the first special token that the chat template writes after it.

    Falls back to the end-of-sequence token. Raises ValueError if there is neither.
    """
    if template == "chat":
        mark = "ENDOFTURN"
        conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
        tail = _apply(tokenizer, conversation, add_generation_prompt=False).rpartition(mark)[2]
        special = _special_ids(tokenizer)
        for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token: completions could not end; set its eos_token")
    return int(tokenizer.eos_token_id)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: Template = "chat", chat_template: str | None = None
) -> None:
    """Give the tokenizer the template of file ``chat_template``, and make sure it has one if ``template`` needs it.

    The tokenizer itself is changed, so that every stage renders alike and the saved student carries the template.
    Raises FileNotFoundError if the file is missing, ValueError if there is no template at all.
    """
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template: {_REMEDY}")


def read_chat_template(path: str) -> str:
    """The text of a chat template file. Raises FileNotFoundError, or ValueError if it is empty."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"prompts.chat_template: there is no file {path}")
    text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"prompts.chat_template: {path} is empty")
    return text


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    import jinja2

    prepare_tokenizer(tokenizer)
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"the chat template fails on a conversation of roles {roles} ({error}): if it takes no system message "
            f"remove prompts.system, else {_REMEDY}"
        ) from error


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
