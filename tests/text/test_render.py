"""Chat templates rendered by a child that may be killed."""

from __future__ import annotations

import threading

import pytest
from transformers import PreTrainedTokenizerFast

from rlft.core.errors import ConfigError, DataError
from rlft.text.render import render
from rlft.text.render_main import Traced
from rlft.text.render_main import render as render_here

USER = {"role": "user", "content": " Hi <b> & 'you' "}
REPLY = {"role": "assistant", "content": "\nWell, hi\n"}


def tokenizer(template):
  import tokenizers

  core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
  return PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template
  )


TEMPLATES = [
  "{% for m in messages %}\n  {% if m.role == 'user' %}[{{ m['content'] | trim }}]\n"
  "  {%- else -%}{{ m.content.strip() }}{% endif %}\n{% endfor %}",
  "{{ bos_token + messages[0].content | upper ~ eos_token }}{{ messages | tojson }}",
  "{% set c = '<' + messages[0].content + '>' + messages[1].content %}{{ c.strip() }}",
  "{% macro say(x) %} {{ x }} {% endmacro %}{% for m in messages %}"
  "{{ say(m.content) | trim }}{% endfor %}",
  "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% generation %}"
  "{{ m.content.split(',')[-1].lstrip() }}{% endgeneration %}{% break %}{% endfor %}",
  "{{ strftime_now('%Y') }}{{ messages[1]['content'][1:-1] | replace('hi', 'ho') }}",
  "{% set n = namespace(x='') %}{% for m in messages[::-1] %}"
  "{% set n.x = n.x + m.content %}{% endfor %}{{ n.x }}{{ messages[0].nothing }}",
  "{{ messages[1].content.partition(',')[2] }}{{ '%s!' | format(messages[0].content) }}"
  "{{ add_generation_prompt }}{{ tools is none }}{{ messages[0].content | length }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_texts_are_those_of_transformers(template):
  own = tokenizer(template)
  (seen,) = render(own, [[USER, REPLY]], True)
  assert seen.text == own.apply_chat_template(
    [USER, REPLY], tokenize=False, add_generation_prompt=True
  )
  assert seen.spans  # each is followed, and is what a message said:
  said = USER["content"] + REPLY["content"]
  for start, end, _ in seen.spans:
    piece = seen.text[start:end].lower().replace("ho", "hi")
    assert piece.replace("\\n", "\n") in said.lower()


@pytest.mark.parametrize(
  ("template", "text", "spans"),
  [
    ("{{ 'user' }}{{ messages[0].content.strip() }}", "userx", [(4, 5, False)]),
    ("{{ (messages[0].content + '!').strip() }}", "x !", [(0, 2, False)]),
    ("{{ messages[0].content * 2 }}", " x  x ", [(0, 3, False), (3, 6, False)]),
    ("{{ messages[1].content ~ '|' }}", "y|", [(0, 1, True)]),
    ("{{ messages[0].content | wordwrap(1) }}", "x", None),
  ],
)
def test_where_a_message_stands(template, text, spans):
  messages = [{"role": "user", "content": " x "}, {"role": "assistant", "content": "y"}]
  got = render_here(template, messages, {})
  assert got["text"].strip() == text.strip()
  assert got["spans"] == spans


def test_a_traced_text_is_a_text():
  text = Traced("a-b c\nd", bytes([0, 0, 1, 1, 1, 2, 2]))
  assert text == "a-b c\nd" and len(text) == 7 and "b c" in text
  for name, args in (
    ("split", ()), ("split", ("-",)), ("rsplit", (None, 1)), ("partition", ("-",)),
    ("splitlines", (True,)), ("strip", ("ad",)), ("upper", ()), ("rpartition", ("q",)),
    ("replace", ("b", "xyz")), ("removesuffix", ("d",)), ("removeprefix", ("a-",)),
  ):  # fmt: skip
    got, wanted = getattr(text, name)(*args), getattr("a-b c\nd", name)(*args)
    assert got == wanted
  assert text[2:5].who == bytes([1, 1, 1]) and text.split()[1].who == bytes([1])
  assert ("<" + text + ">").who == bytes([0, *text.who, 0])


@pytest.mark.parametrize(
  ("template", "reason"),
  [
    (
      "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
      0,
    ),
    ("{{ 'a' * 10000000000 }}", "MemoryError"),
    ("{{ 'a' * 3000000 }}", "3000000 characters"),
    ("{{ 'a' | center(10 ** 10) }}", "MemoryError"),
    ("{{ 9 ** (9 ** 9) }}", 0),
    (
      "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
      "{% endfor %}{{ n.x }}",
      "MemoryError|more time or memory",  # of a slow machine its time ends first
    ),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ " + "(" * 5000, "RecursionError|TemplateSyntaxError"),
    ("{{ raise_exception('no\nsystem') }}", "TemplateError: no "),
    ("{% if", "TemplateSyntaxError"),
    ("{{ nothing.at.all }}", "UndefinedError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
  ],
)
def test_templates_that_cannot_be_rendered(template, reason):
  """Bounded on any thread; the next template is rendered all the same."""
  caught = []

  def go():
    try:
      render(tokenizer(template), [[USER]], True)
    except ConfigError as error:
      caught.append(str(error))

  thread = threading.Thread(target=go)
  thread.start()
  thread.join(60)
  (message,) = caught
  assert "\n" not in message
  assert pytest.importorskip("re").search(reason or "more time or memory", message)
  assert render(tokenizer("ok"), [[USER]], True)[0].text == "ok"


def test_many_conversations_keep_their_order():
  own = tokenizer("{{ messages[0].content }}")
  chats = [[{"role": "user", "content": str(i), "name": None}] for i in range(700)]
  assert [seen.text for seen in render(own, chats, False)] == list(map(str, range(700)))


def test_what_is_missing_is_said():
  with pytest.raises(ConfigError, match="no chat template"):
    render(tokenizer(None), [[USER]], True)
  with pytest.raises(DataError, match="other than JSON"):
    render(tokenizer("x"), [[{"role": "user", "content": object()}]], True)
  named = tokenizer({"rag": "x", "tool_use": "y"})
  with pytest.raises(ConfigError, match="multiple chat templates"):
    render(named, [[USER]], True)
