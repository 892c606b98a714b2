"""Prompts, chats and completions to token ids, as the model knows them.

A prompt is a text, or a list of messages ({"role": ..., "content": ...}: a system
prompt, several turns), which the tokenizer's chat template renders. A completion is a
text, token ids that were sampled, or an assistant's message.

What a message says is plain text: it cannot open or close a turn. Where it stands in
what the template wrote is followed (see `render_main`), not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlft.core.errors import ConfigError, DataError
from rlft.text.reader import Reader, reader
from rlft.text.render import Rendering, render

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
Completion = str | Message | Sequence[Message] | Sequence[int]
# Where a message has what was thought before its content.
_REASONING = ("reasoning_content", "reasoning", "thinking")


def encode_prompts(
  tokenizer: Any, prompts: Sequence[Prompt], chat: bool = False
) -> list[list[int]]:
  """Token ids of prompts, as training and sampling both see them.

  Args:
    tokenizer: a `transformers` tokenizer. What it puts before a text (BOS) stands there
      once, also where the text brings it; what it puts behind one is left out. A
      "prompt_end" in its configuration ends every text.
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
  own = reader(tokenizer)
  is_chat = [chat or not isinstance(p, str) for p in prompts]
  texts = iter(own.ids([own.ended(p) for p, c in zip(prompts, is_chat) if not c]))
  chats = [_turns(p) for p, c in zip(prompts, is_chat) if c]
  opened = iter(render(tokenizer, chats, True) if chats else ())
  return [
    _chat_ids(own, next(opened)) if c else own.begun(next(texts)) for c in is_chat
  ]


def encode_completions(
  tokenizer: Any,
  eos_ids: int | Sequence[int],
  rows: Sequence[tuple[Prompt, Completion]],
  chat: bool = False,
) -> list[tuple[list[int], list[int]]]:
  """(prompt ids, completion ids) of rows; together they spell the text.

  A completion that is text gets the end of completions, once. In a chat, prompt and
  completion are the ids of the conversation as the template renders it, to the end of
  the assistant's turn; where that does not begin as the prompt does (a prompt that
  opens <think>, say), the completion's text follows the prompt as it is. Sampled ids
  are taken as they are.

  Args:
    tokenizer: a `transformers` tokenizer.
    eos_ids: the ids that end a completion in sampling.
    rows: prompts with their completions.
    chat: see `encode_prompts`.

  Raises:
    ConfigError: as `encode_prompts`; and where the template hides what an assistant
      says, or drops a part of it.
    DataError: a row is not a prompt and a completion.
  """
  eos_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
  rows = [(clean(p), _completion(c)) for p, c in rows]
  prompts = encode_prompts(tokenizer, [p for p, _ in rows], chat)
  own = reader(tokenizer)
  out = []
  chats, texts = [], []
  for i, (prompt, completion) in enumerate(rows):
    out.append((prompts[i], completion))
    if isinstance(completion, str | Mapping):
      (chats if chat or not isinstance(prompt, str) else texts).append(i)
  ends, own_end = _ends(tokenizer, eos_ids), _own_end(tokenizer, eos_ids)
  parts = [_without_end(_said(rows[i][1]), ends) for i in texts]
  heads = [own.ended(rows[i][0]) for i in texts]
  before = own.ids(heads)
  whole = own.ids([head + text for head, (text, _) in zip(heads, parts)])
  for i, (text, end), head, ids in zip(texts, parts, before, whole):
    # A text may be split otherwise where it goes on than where it begins.
    ids = ids[len(head) :] if ids[: len(head)] == head else own.inside(text)
    end = own_end if end is None else end
    out[i] = (prompts[i], ids if ids[-1:] == [end] else [*ids, end])
  for i, ids in zip(
    chats,
    _replies(tokenizer, eos_ids, [(_turns(rows[i][0]), rows[i][1]) for i in chats]),
  ):
    out[i] = (prompts[i], ids)
  return out


def completion_end(tokenizer: Any, eos_ids: Sequence[int], chat: bool = False) -> int:
  """The token that ends a completion in training: one that also ends it in sampling.

  In a chat it is the one that the template puts after the assistant's text, which need
  not be the tokenizer's EOS.
  """
  if not chat:
    return _own_end(tokenizer, eos_ids)
  reply = {"role": "assistant", "content": "."}
  (ids,) = _replies(tokenizer, list(eos_ids), [(_turns("."), reply)])
  return ids[-1]


def is_text(prompt: Any) -> bool:
  """Whether a prompt is to be encoded: a text or messages, no token ids."""
  if isinstance(prompt, str):
    return True
  return isinstance(prompt, Sequence) and any(isinstance(m, Mapping) for m in prompt)


def is_messages(value: Any) -> bool:
  """Whether a value is a list of messages, not empty."""
  return (
    isinstance(value, list | tuple)
    and len(value) > 0
    and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value)
  )


def is_completion(value: Any) -> bool:
  """Whether a value is a text, an assistant's message (perhaps in a list), or ids."""
  if isinstance(value, Mapping):
    return value.get("role", "assistant") == "assistant"
  if is_messages(value):
    return len(value) == 1 and is_completion(value[0])
  return isinstance(value, str | tuple | list)


def says(completion: Completion) -> list[str]:
  """The texts that a completion says, but for ids: a message may also reason and call.

  They are what a template must show: content, reasoning, names of called functions.
  """
  if is_messages(completion) and len(completion) == 1:
    completion = completion[0]
  if isinstance(completion, str):
    return [completion]
  if not isinstance(completion, Mapping):
    return []
  texts = [completion.get(name) for name in _REASONING]
  for call in completion.get("tool_calls") or ():
    call = call.get("function", call) if isinstance(call, Mapping) else None
    texts.append(call.get("name") if isinstance(call, Mapping) else None)
  return [_said(completion), *(text for text in texts if isinstance(text, str))]


# ------------------------------------------------------------------ what was given


def clean(value: Any) -> Any:
  """A text, or what holds texts, with U+FFFD for halves of characters.

  JSON can spell half a character, where a text was cut as UTF-16; no tokenizer reads
  it.
  """
  if isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError:
      return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  elif isinstance(value, Mapping):
    return {clean(key): clean(x) for key, x in value.items()}
  elif isinstance(value, list | tuple):
    return [clean(x) for x in value]
  return value


def _checked(prompt: Any, name: str) -> Prompt:
  """The prompt, if it is a text or a list of messages, cleaned."""
  if isinstance(prompt, str) or is_messages(prompt):
    return clean(prompt)
  raise DataError(
    f"{name} is {prompt!r:.200}; give a text, or a list of messages such as "
    '{"role": "user", "content": "..."}'
  )


def _completion(completion: Any) -> Any:
  """The completion: a text or message that is cleaned, or ids."""
  if is_messages(completion) and len(completion) == 1:
    completion = completion[0]
  return clean(completion) if isinstance(completion, str | Mapping) else completion


def _turns(prompt: Prompt) -> list[Message]:
  if isinstance(prompt, str):
    return [{"role": "user", "content": clean(prompt)}]
  return list(clean(prompt))


def _said(completion: str | Message) -> str:
  """The text of a completion; "" where a message says none."""
  if isinstance(completion, str):
    return completion
  content = completion.get("content")
  if isinstance(content, list | tuple):  # parts
    parts = [x.get("text") if isinstance(x, Mapping) else x for x in content]
    return "".join(x for x in parts if isinstance(x, str))
  return content if isinstance(content, str) else ""


def _own_end(tokenizer: Any, eos_ids: Sequence[int]) -> int:
  own = tokenizer.eos_token_id
  return own if own in eos_ids else eos_ids[0]


def _ends(tokenizer: Any, eos_ids: Sequence[int]) -> dict[str, int]:
  """The text of each end of completions, with its id."""
  added = tokenizer.added_tokens_decoder
  size = len(tokenizer)
  return {
    added[i].content if i in added else tokenizer.decode([i]): i
    for i in eos_ids
    if 0 <= i < size
  }


def _without_end(text: str, ends: Mapping[str, int]) -> tuple[str, int | None]:
  """The text without the ends of completions that it brings, and the first one's id."""
  end = None
  while found := next((e for e in ends if e and text.rstrip().endswith(e)), None):
    text, end = text.rstrip().removesuffix(found), ends[found]
  return text, end


# ------------------------------------------------------------------ chats


def _chat_ids(own: Reader, seen: Rendering, cut: int | None = None) -> list[int]:
  """Ids of a rendering, up to `cut`, what messages said in it being plain text."""
  text = seen.text[:cut]
  if seen.spans is None:
    if any(own.pattern.search(said) for said in seen.said):
      raise ConfigError(
        "a message holds a special token of the tokenizer, and the chat template "
        f"alters texts so that it cannot be told from its own: {text!r:.200}"
      )
    return own.ids([text])[0]
  spans = [(a, min(b, len(text))) for a, b, _ in seen.spans if a < len(text)]
  if own.has_special(text, spans):
    return own.guarded(text, spans)
  return own.ids([text])[0]


def _replies(
  tokenizer: Any, eos_ids: list[int], rows: list[tuple[list[Message], Any]]
) -> list[list[int]]:
  """Ids of assistants' replies to conversations, with the end of their turns."""
  if not rows:
    return []
  own = reader(tokenizer)
  ends = _ends(tokenizer, eos_ids)
  replies = [
    {"role": "assistant", **reply}
    if isinstance(reply, Mapping)
    else {"role": "assistant", "content": reply}
    for _, reply in rows
  ]
  chats = [turns for turns, _ in rows]
  opened = render(tokenizer, chats, True)
  whole = render(tokenizer, [[*c, r] for c, r in zip(chats, replies)], False)
  # A reply that brings its own end is rendered again without.
  again = []
  for i, (reply, seen) in enumerate(zip(replies, whole)):
    _, at, cut = _reply_at(seen, _said(reply), ends)
    mark = seen.text[at:cut].rstrip()
    marks = {mark: -1, mark.lstrip(): -1, **ends}
    text, _ = _without_end(_said(reply), marks)
    if text != _said(reply):
      replies[i] = {**reply, "content": text}
      again.append(i)
  for i, seen in zip(
    again, render(tokenizer, [[*chats[i], replies[i]] for i in again], False)
  ):
    whole[i] = seen
  return [
    _reply_ids(own, tokenizer, eos_ids, ends, o, w, r)
    for o, w, r in zip(opened, whole, replies)
  ]


def _reply_at(seen: Rendering, said: str, ends: Mapping[str, int]):
  """(start, end) of the reply's text, and where its turn ends, in a conversation."""
  if seen.spans is not None:
    last = [(a, b) for a, b, of_last in seen.spans if of_last]
  else:
    at = seen.text.rfind(said.strip())
    last = [(at, at + len(said.strip()))] if at >= 0 and said.strip() else []
  if not last:
    raise ConfigError(
      f"the chat template does not show what an assistant says ({said!r:.60}): a "
      "completion cannot be trained in it"
    )
  start, end = last[0][0], last[-1][1]
  rest = seen.text[end:]
  found = [(rest.find(e), -len(e)) for e in ends if e and e in rest]
  cut = end + (sum((min(found)[0], -min(found)[1])) if found else len(rest))
  return start, end, cut


def _reply_ids(own, tokenizer, eos_ids, ends, opened, seen, reply) -> list[int]:
  said = _said(reply)
  start, end, cut = _reply_at(seen, said, ends)
  closed = any(seen.text[:cut].endswith(e) for e in ends) and cut > end
  close = [] if closed else [_own_end(tokenizer, eos_ids)]
  head = len(opened.text)
  if seen.text.startswith(opened.text) and start >= head:
    for text in says(reply):
      if not _holds(seen.text[head:cut], text):
        raise ConfigError(
          "the chat template drops a part of what an assistant says, which would not "
          f"be trained: {text!r:.100} becomes {seen.text[head:cut]!r:.100}"
        )
    before, ids = _chat_ids(own, opened), _chat_ids(own, seen, cut)
    if ids[: len(before)] == before:
      return ids[len(before) :] + close
    text = seen.text[head:cut]
    spans = [
      (a - head, min(b, cut) - head) for a, b, _ in seen.spans or () if head <= a < cut
    ]
  else:
    # The prompt opens more of the turn, or less, than the reply is given: what it opens
    # is not said twice.
    pairs = enumerate(zip(opened.text, seen.text))
    more = opened.text[next((i for i, (a, b) in pairs if a != b), head) :]
    said = said.removeprefix(more) if more.strip() else said
    if any(text.strip() for text in says(reply)[1:]):
      raise ConfigError(
        "the chat template does not begin the assistant's turn as its generation "
        f"prompt does: what is said beside the content ({says(reply)[1]!r:.60}) cannot "
        "follow it; write it into the content"
      )
    text, spans = said + seen.text[end:cut], [(0, len(said))]
  if own.pattern.search(text):
    return own.guarded(text, spans, inside=True) + close
  return own.inside(text) + close


def _holds(text: str, said: str) -> bool:
  """Whether all that was said is in the text, in order, but for spaces and case."""
  left = iter(text.casefold())
  return all(char in left for char in said.casefold() if not char.isspace())
