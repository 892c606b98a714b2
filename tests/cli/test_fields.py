"""What the help of each command lists."""

from __future__ import annotations

import dataclasses

from rlft.cli import fields, overrides


def test_every_field_has_a_sentence_and_a_default_that_reads_back(commands):
  assert {"ppo", "grpo", "eval", "quickstart"} <= commands.keys()
  for name, cls in commands.items():
    for one in fields.walk(cls):
      assert one.text, (name, one.path)
      if not one.group and one.default is not dataclasses.MISSING:
        text = fields.spell(one.default)
        assert overrides.read(text, one.kind, one.path) == one.default, (name, one)


def test_a_listing_has_every_field_and_fits_a_terminal(commands):
  for name, cls in commands.items():
    text = fields.listing(cls)
    assert max(map(len, text.splitlines())) <= 80, name
    for one in fields.walk(cls):
      assert (
        f"  {one.path}{' (none ' if one.group and one.default is None else ''}" in text
      )
  text = fields.listing(commands["ppo"])
  assert "    ppo.optimizer.learning_rate = 1e-06 (float)\n        the peak.\n" in text
  # Fields of one sentence share it; the defaults are those of where the group stands.
  assert "ppo.prompts_per_iteration = 32 (int)\n    ppo.samples_per_prompt" in text
  assert "    ppo.value_optimizer.learning_rate = 1e-05 (float)\n" in text
