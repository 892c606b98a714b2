"""The tokenizer of a GGUF file: byte-level BPE, or SentencePiece's BPE.

The file names how text is cut before BPE, but does not say it: the patterns are here.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Any

from rlft.core.errors import CheckpointError
from rlft.models.gguf_file import Header, open_gguf

if TYPE_CHECKING:
  import tokenizers
  import transformers

# ------------------------------------------------------------------ pre-tokenizers

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
  _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+END"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*END"
  r"|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
# Letters with case, of the Unicode version that DeepSeek's first tokenizer was made of.
# Those that normalising this file would change are escaped.
_DEEPSEEK_LETTERS = (
  "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
  "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
  "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎ"
  "ↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_MARKS = "[!-/:-~！-／：-～‘-‟\u3000-。]"
_DEEPSEEK_ASIAN = "[一-龥ࠀ-一가-퟿]+"


@dataclasses.dataclass(frozen=True)
class _Pre:
  """How text is cut before BPE: each pattern splits the pieces of the one before."""

  splits: tuple[str, ...]
  nfc: bool = False
  ignore_merges: bool = False
  add_bos: bool = False


_DIGITS_GPT2 = _Pre((r"\p{N}", _GPT2))
_BY_NAME: dict[str, _Pre] = {
  "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
  "gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum modern-bert "
  "jina-es jina-de jina-v2-es jina-v2-de granite-docling": _Pre((_GPT2,)),
  "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": _Pre(
    (_LLAMA3,), ignore_merges=True, add_bos=True
  ),
  "dbrx smaug-bpe glm4 chatglm-bpe": _Pre((_LLAMA3,)),
  # The tokenizers of Qwen compose what they read; llama.cpp leaves that out.
  "qwen2 deepseek-r1-qwen megrez kormo f2llmv2": _Pre((_QWEN2,), nfc=True),
  "stablelm2 hunyuan solar-open grok-2": _Pre((_QWEN2,)),
  "refact smollm starcoder command-r codeshell exaone minerva-7b mellum2": _DIGITS_GPT2,
  "falcon": _Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
  "deepseek-llm": _Pre(
    (
      r"[\r\n]",
      rf"\s?[{_DEEPSEEK_LETTERS}]+",
      rf"\s?{_DEEPSEEK_MARKS}+",
      r"\s+$",
      _DEEPSEEK_ASIAN,
      r"\p{N}+",
    )
  ),
  "deepseek-coder": _Pre(
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}")
  ),
  "deepseek-v3 hunyuan-dense joyai-llm": _Pre(
    (
      r"\p{N}{1,3}",
      "[一-龥\u3040-ゟ゠-ヿ]+",
      r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
      r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
      r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
  ),
  "tekken": _Pre(
    (_CASED.replace("END", "").replace("DIGITS", ""),),
    ignore_merges=True,
    add_bos=True,
  ),
  "gpt-4o llama4 kanana2": _Pre(
    (_CASED.replace("END", _SHORT + "?").replace("DIGITS", "{1,3}"),)
  ),
  "bloom poro-chat gpt3-finnish": _Pre((_BLOOM,)),
  "viking": _Pre((_BLOOM, r"\p{N}")),
  "bailingmoe bailingmoe2 llada-moe": _Pre(
    (
      r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
      r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    )
  ),
  "seed-coder": _Pre(
    (
      _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+"
      r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
  ),
}
PRE_TOKENIZERS = {
  name: pre for names, pre in _BY_NAME.items() for name in names.split()
}

# ------------------------------------------------------------------ tokens

# Name of a special token's key -> what transformers calls it.
_ROLES = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
# llama.cpp's ids of a SentencePiece model that names none.
_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

# Control tokens that end a turn by their text, as llama.cpp knows them.
_ENDS = {
  "<|eot_id|>",
  "<|eom_id|>",
  "<|im_end|>",
  "<|end|>",
  "<|return|>",
  "<|call|>",
  "<end_of_turn>",
  "<|endoftext|>",
  "<|end_of_text|>",
  "</s>",
  "<eos>",
  "<EOT>",
  "_<EOT>",
  "[EOT]",
  "[EOS]",
  "<end_of_utterance>",
  "<｜end▁of▁sentence｜>",
}


def _kinds(header: Header, tokens: list[Any]) -> list[int]:
  """Types of the tokens; as in llama.cpp an end is a control token, whatever it says.

  Only where no text would hold it: "</s>" is also a piece of HTML.
  """
  kinds = header.require("tokenizer.ggml.token_type", list)
  sure = [isinstance(t, str) and t in _ENDS and t[1:2] in "|｜" for t in tokens]
  return [_CONTROL if end else kind for end, kind in zip(sure, kinds)] + kinds[
    len(sure) :
  ]


def read_ends(path: str | pathlib.Path) -> dict[str, Any]:
  """What the file's generation_config.json would say: the tokens that end a completion.

  The end of text, of a turn and of a message by their keys, and the control tokens
  whose text says that they are one of these, as llama.cpp reads the file.

  Args:
    path: a GGUF file.

  Returns:
    {"eos_token_id": list of ids}, the end of text first; empty where there is none.
  """
  header = open_gguf(path)
  keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
  ids = [header.get(key, int) for key in keys]
  tokens = header.require("tokenizer.ggml.tokens", list)
  kinds = _kinds(header, tokens)
  if ids[0] is None and header.get("tokenizer.ggml.model", str) == "llama":
    ids[0] = _DEFAULTS["eos"]
  ids += [
    i
    for i, (text, kind) in enumerate(zip(tokens, kinds))
    if kind in (_CONTROL, _USER_DEFINED) and text in _ENDS
  ]
  ids = list(dict.fromkeys(i for i in ids if i is not None and 0 <= i < len(tokens)))
  return {"eos_token_id": ids} if ids else {}


def read_tokenizer(
  path: str | pathlib.Path,
) -> transformers.PreTrainedTokenizerFast:
  """Builds the tokenizer that a GGUF file holds.

  Args:
    path: a GGUF file whose `tokenizer.ggml.model` is "gpt2" (byte-level BPE) or "llama"
      (SentencePiece's BPE with bytes for what it does not know).

  Returns:
    A fast tokenizer with the file's ids: control tokens are special, the chat template
    and the beginning, end, padding and unknown tokens are set, and encoding adds the
    beginning and end tokens where the file says so. Ids that only fill up the
    embedding (type "unused") have no token.

  Raises:
    CheckpointError: the file is damaged or lacks a key, or its tokenizer model or
      pre-tokenizer is not a known one.
  """
  import tokenizers
  import transformers

  header = open_gguf(path)
  model = header.require("tokenizer.ggml.model", str)
  if model not in ("gpt2", "llama"):
    raise CheckpointError(
      f"{path}: tokenizer model {model!r} is not supported; supported: 'gpt2' "
      "(byte-level BPE), 'llama' (SentencePiece). Give a Hugging Face directory with a "
      "tokenizer.json instead."
    )
  tokens = header.require("tokenizer.ggml.tokens", list)
  kinds = _kinds(header, tokens)
  vocab = {t: i for i, (t, k) in enumerate(zip(tokens, kinds)) if k != _UNUSED}
  if (
    len(kinds) != len(tokens)
    or len(vocab) + kinds.count(_UNUSED) != len(tokens)
    or not all(isinstance(text, str) for text in tokens)
  ):
    raise CheckpointError(
      f"{path}: the tokenizer does not hold together: {len(tokens)} tokens, "
      f"{len(kinds)} types, {len(vocab)} distinct tokens in use; convert the model "
      "again."
    )
  names = _special_tokens(header, tokens, kinds, vocab)
  if model == "gpt2":
    pre = _pre_tokenizer(header)
    backend, add_bos = _byte_level_bpe(vocab, _merges(header, vocab), pre), pre.add_bos
  else:
    backend, add_bos = _sentencepiece(header, vocab, kinds, names), True
  ends = {}
  for role, default in (("bos", add_bos and "bos_token" in names), ("eos", False)):
    if header.get(f"tokenizer.ggml.add_{role}_token", bool, default):
      if f"{role}_token" not in names:
        raise CheckpointError(
          f"{path}: tokenizer.ggml.add_{role}_token is set, but the file names no "
          f"{role} token; convert the model again."
        )
      ends[role] = names[f"{role}_token"]
  # Control tokens in running text are tokens; user-defined ones are text as well.
  for wanted, special, add in (
    ((_CONTROL, _UNKNOWN), True, backend.add_special_tokens),
    ((_USER_DEFINED,), False, backend.add_tokens),
  ):
    chosen = (token for token, k in zip(tokens, kinds) if k in wanted)
    add([tokenizers.AddedToken(t, special=special, normalized=False) for t in chosen])
  # Set even when it adds nothing: transformers makes one of its own where none is.
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=[*filter(None, (ends.get("bos"), "$A", ends.get("eos")))],
    special_tokens=[(token, vocab[token]) for token in {*ends.values()}],
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=header.get("tokenizer.chat_template", str),
    clean_up_tokenization_spaces=False,
    **names,
  )


def _special_tokens(
  header: Header, tokens: list[str], kinds: list[int], vocab: dict[str, int]
) -> dict[str, str]:
  """{"bos_token": text, ...}, of the tokens that the file names."""
  names = {}
  for key, role in _ROLES.items():
    index = header.get(f"tokenizer.ggml.{key}_token_id", int)
    if index is None and header.values["tokenizer.ggml.model"] == "llama":
      index = _DEFAULTS.get(key)
      special = index is not None and index < len(kinds)
      index = index if special and kinds[index] in (_UNKNOWN, _CONTROL) else None
    if index is None:
      continue
    if 0 <= index < len(tokens) and tokens[index] in vocab:
      names[f"{role}_token"] = tokens[index]
    elif key not in ("eos", "padding"):  # ends nothing, and pads are known by masks
      raise CheckpointError(
        f"{header.path}: tokenizer.ggml.{key}_token_id is {index}, which is not one of "
        f"the file's {len(vocab)} tokens; the file is damaged, convert the model again."
      )
  return names


def _pre_tokenizer(header: Header) -> _Pre:
  name = header.require("tokenizer.ggml.pre", str)
  if name not in PRE_TOKENIZERS:
    raise CheckpointError(
      f"{header.path}: pre-tokenizer {name!r} is unknown; known: "
      f"{', '.join(PRE_TOKENIZERS)}. Give a Hugging Face directory with a "
      "tokenizer.json instead."
    )
  return PRE_TOKENIZERS[name]


def _merges(header: Header, vocab: dict[str, int]) -> list[tuple[str, ...]]:
  merges = header.require("tokenizer.ggml.merges", list)
  pairs = [tuple(str(merge).split(" ")) for merge in merges]
  for pair in pairs:
    if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
      raise CheckpointError(
        f"{header.path}: the tokenizer merges {pair}, which is not two tokens that "
        "make a third; convert the model again."
      )
  return pairs


def _byte_level_bpe(
  vocab: dict[str, int], merges: list[tuple[str, ...]], pre: _Pre
) -> tokenizers.Tokenizer:
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
  )
  if pre.nfc:
    backend.normalizer = normalizers.NFC()
  splits = [
    pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for pattern in pre.splits
  ]
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(
  header: Header, vocab: dict[str, int], kinds: list[int], names: dict[str, str]
) -> tokenizers.Tokenizer:
  """SentencePiece merges the pair whose token has the best score; BPE ranks pairs.

  They differ only where two pairs that overlap make one token: SentencePiece takes the
  left one.
  """
  import tokenizers
  from tokenizers import decoders, models, normalizers

  scores = header.require("tokenizer.ggml.scores", list)
  if len(scores) != len(kinds) or not all(
    isinstance(x, int | float) and math.isfinite(x) for x in scores
  ):
    raise CheckpointError(
      f"{header.path}: tokenizer.ggml.scores holds {len(scores)} entries for "
      f"{len(kinds)} tokens, or not finite numbers; convert the model again."
    )
  # What text cannot make: control tokens, and bytes.
  made = {t: i for t, i in vocab.items() if kinds[i] not in (_UNKNOWN, _CONTROL, _BYTE)}
  merges = [
    (-scores[index], index, cut, (token[:cut], token[cut:]))
    for token, index in made.items()
    for cut in range(1, len(token))
    if token[:cut] in made and token[cut:] in made
  ]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=[merge[-1] for merge in sorted(merges)],
      unk_token=names.get("unk_token"),
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  space = header.get("tokenizer.ggml.add_space_prefix", bool, True)
  replace = normalizers.Replace(" ", "▁")
  decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if space:  # before each piece of text between control tokens, as in llama.cpp
    replace = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    decoder.append(decoders.Strip(" ", 1, 0))
  backend.normalizer = replace
  backend.decoder = decoders.Sequence(decoder)
  return backend
