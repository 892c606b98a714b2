"""Makes tests/golden/sentencepiece.json: a small SentencePiece model and what it reads.

  pip install sentencepiece
  python tests/golden/make_sentencepiece.py

{"tokens", "scores", "types": as llama.cpp's converter writes them to a GGUF file,
 "texts": [[text, ids], ...] as SentencePiece encodes them}. Trained as Llama's was:
BPE, bytes for what is unknown, nothing normalised, a space before the text.
"""

from __future__ import annotations

import io
import json
import pathlib
import random

import sentencepiece as spm

HERE = pathlib.Path(__file__).parent
SENTENCE = (
  "the quick brown fox jumps over a lazy dog; naïve café, Straße, 日本語 текст "
  "12 345 6.78 hello world Hello  WORLD\n\n\tdef f(x):\n    return x**2 🙂 aaa aaaaa "
  "é e\u0301 \u200b \x00 <s> </s> <0x0A> ▁ ▁▁a [INST] it's don't \r\n ½ Ⅷ"
)
WORDS = SENTENCE.split(" ")


def train(lines: list[str], size: int) -> spm.SentencePieceProcessor:
  model = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    vocab_size=size,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    split_digits=True,
    character_coverage=0.999,
    minloglevel=2,
  )
  return spm.SentencePieceProcessor(model_proto=model.getvalue())


def vocabulary(model: spm.SentencePieceProcessor) -> dict[str, list]:
  ids = range(model.vocab_size())
  kind = lambda i: (
    2
    if model.is_unknown(i)
    else 3
    if model.is_control(i)
    else 6
    if model.is_byte(i)
    else 1
  )
  return {
    "tokens": [model.id_to_piece(i) for i in ids],
    "scores": [model.get_score(i) for i in ids],
    "types": [kind(i) for i in ids],
  }


def texts(count: int) -> list[str]:
  rng = random.Random(0)
  out = [" ".join(WORDS), "", " ", "  a", "a  ", "\n", "aaaaaaa", "▁a"]
  while len(out) < count:
    words = rng.choices(WORDS, k=rng.randrange(1, 12))
    out.append(rng.choice(["", " ", "  "]).join(words))
  return [text for text in out if "<" not in text]


if __name__ == "__main__":
  lines = (HERE.parents[1] / "README.md").read_text().splitlines()
  model = train([*lines, *WORDS], 500)
  pairs = [[text, model.encode(text)] for text in texts(120)]
  path = HERE / "sentencepiece.json"
  path.write_text(json.dumps(vocabulary(model) | {"texts": pairs}) + "\n")
