"""Texts and chats to token ids, as the model knows them.

A prompt is a text, or a list of messages ({"role": ..., "content": ...}: a system
prompt, several turns) that the tokenizer's chat template renders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlft.core.errors import ConfigError, DataError

Prompt = str | Sequence[Mapping[str, Any]]


def encode_prompts(
  tokenizer: Any, prompts: Sequence[Prompt], chat: bool = False
) -> list[list[int]]:
  """Token ids of prompts, as training and sampling both see them.

  Args:
    tokenizer: a `transformers` tokenizer.
    prompts: texts, or lists of messages, which are always rendered by the chat
      template.
    chat: whether to put each text into the tokenizer's chat template as the user's
      turn. What is rendered ends with the opening of the assistant's turn: the ids of
      `apply_chat_template(add_generation_prompt=True)`. Text that looks like a special
      token is encoded as plain text, so that no message can open or close a turn.

  Returns:
    A list of ids for each prompt.

  Raises:
    ConfigError: there is no tokenizer, or no usable chat template where one is needed.
    DataError: a prompt is neither a text nor a list of messages.
  """
  if tokenizer is None:
    raise ConfigError("the policy has no tokenizer: it cannot read texts")
  prompts = [_checked(p, f"prompt {i}") for i, p in enumerate(prompts)]
  out: list[list[int]] = [[]] * len(prompts)
  plain = [i for i, p in enumerate(prompts) if isinstance(p, str) and not chat]
  texts = [prompts[i] for i in plain]
  for i, ids in zip(plain, tokenizer(texts)["input_ids"] if texts else []):
    out[i] = list(ids)
  rest = [i for i, p in enumerate(prompts) if chat or not isinstance(p, str)]
  for i, ids in zip(rest, _encode_chats(tokenizer, [prompts[i] for i in rest])):
    out[i] = ids
  return out


def is_text(prompt: Any) -> bool:
  """Whether a prompt is to be encoded: a text or messages, no token ids."""
  if isinstance(prompt, str):
    return True
  return isinstance(prompt, Sequence) and any(isinstance(m, Mapping) for m in prompt)


def _checked(prompt: Any, name: str) -> Prompt:
  """The prompt, if it is a text or a list of messages."""
  if isinstance(prompt, str):
    return prompt
  if isinstance(prompt, Sequence) and prompt:
    roles = [isinstance(m, Mapping) and m.get("role") for m in prompt]
    if all(isinstance(role, str) for role in roles):
      return prompt
  raise DataError(
    f"{name} is {prompt!r:.200}; give a text, or a list of messages such as "
    '{"role": "user", "content": "..."}'
  )


def _encode_chats(tokenizer: Any, prompts: list[Prompt]) -> list[list[int]]:
  if not prompts:
    return []
  if not getattr(tokenizer, "chat_template", None):
    raise ConfigError(
      "the tokenizer has no chat template: leave chat=False and give texts"
    )
  out = []
  for prompt in prompts:
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [m["content"] for m in chat if isinstance(m.get("content"), str)]
    if texts and ids_of(tokenizer, texts) != ids_of(tokenizer, texts, plain=True):
      if not isinstance(prompt, str):
        raise ConfigError(f"a message holds a special token: {prompt!r:.200}")
      out.append(_framed(tokenizer, prompt))
      continue
    try:
      rendered = tokenizer.apply_chat_template(
        list(chat), tokenize=False, add_generation_prompt=True
      )
    except Exception as error:  # templates raise what they like
      reason = str(error).strip().split("\n")[0]
      raise ConfigError(f"the chat template cannot be rendered: {reason}") from error
    out += ids_of(tokenizer, [rendered])
  return out


def ids_of(tokenizer: Any, texts: list[str], plain: bool = False) -> list[list[int]]:
  """Ids of texts as they stand, without BOS (chat templates bring their own).

  `plain` reads what looks like a special token as ordinary text.
  """
  encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=plain)
  return [list(ids) for ids in encoded["input_ids"]]


def _framed(tokenizer: Any, text: str) -> list[int]:
  """A text with special tokens in it, between what the template puts around it."""
  before, after, trims = _chat_frame(tokenizer)
  text = text.strip() if trims else text
  head, tail = ids_of(tokenizer, [before, after])
  return head + ids_of(tokenizer, [text], plain=True)[0] + tail


def _chat_frame(tokenizer: Any) -> tuple[str, str, bool]:
  """What the chat template puts around a user's text, and whether it strips it."""
  marker = "RLFTUSERTEXT"
  rendered = tokenizer.apply_chat_template(
    [{"role": "user", "content": f" {marker} "}],
    tokenize=False,
    add_generation_prompt=True,
  )
  trims = f" {marker} " not in rendered
  before, found, after = rendered.partition(marker if trims else f" {marker} ")
  if not found or marker in after:
    raise ConfigError("the chat template does not show the user's text exactly once")
  return before, after, trims


def completion_end(tokenizer: Any, eos_ids: Sequence[int], chat: bool = False) -> int:
  """The token that ends a completion in training: one that also ends it in sampling.

  In a chat it is the one that the template puts after the assistant's text, which need
  not be the tokenizer's EOS.
  """
  if chat:
    marker = "RLFTASSISTANTTEXT"
    turns = [
      {"role": "user", "content": "."},
      {"role": "assistant", "content": marker},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    for token in ids_of(tokenizer, [rendered.rpartition(marker)[2]])[0]:
      if token in eos_ids:
        return token
  own = tokenizer.eos_token_id
  return own if own in eos_ids else eos_ids[0]
