"""Chat templates and tokenizers in the styles of well-known families of models, small and made here.

Every style has the family's special tokens and the order in which its template sets them; the tokenizer has
a few merged tokens, some of them across the borders that a mask must find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

LLAMA_3 = """
{%- for message in messages -%}
  {%- if loop.first -%}{{- bos_token -}}{%- endif -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
  {{- message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

QWEN_3 = """
{%- if tools -%}
  {{- '<|im_start|>system\nTools:' -}}
  {%- for tool in tools -%}{{- '\n' -}}{{- tool | tojson -}}{%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- set seen = namespace(last=0) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set seen.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {%- set thought = message.reasoning_content or '' -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > seen.last and (loop.last or thought) -%}
      {{- '<think>\n' + thought + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- message.content -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '<tool_call>' + call.function.name + '</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>' + message.content + '</tool_response><|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

GEMMA_3 = """
{{- bos_token -}}
{%- set first = '' -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set first = messages[0].content + '\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('user and model take turns') -}}
  {%- endif -%}
  {%- set role = 'model' if message.role == 'assistant' else message.role -%}
  {{- '<start_of_turn>' + role + '\n' + (first if loop.first else '') -}}
  {{- message.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

PHI_3 = """
{%- for message in messages -%}
  {{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""

MISTRAL = """
{{- bos_token -}}
{%- set first = '' -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set first = messages[0].content + '\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message.role == 'user' -%}
    {{- '[INST] ' + (first if loop.first else '') + message.content + '[/INST]' -}}
  {%- else -%}
    {{- ' ' + message.content | trim + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Style:
    """A family's template, special tokens, and how its tokenizer splits a text.

    Args:    begin: the begin-of-text token, which the tokenizer also puts before a text; "" for none.
             end: the end-of-text token.
             turn_end: what ends an answer.
             special: further special tokens.
             added: added tokens that are not special.
             is_byte_level: bytes as in GPT-2, or characters with a sign for a space as in SentencePiece.
    """

    template: str
    begin: str
    end: str
    turn_end: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    is_byte_level: bool = True

    def tokenizer(self, template: str | None = None) -> Any:
        """Return a tokenizer with this template, or with another one."""
        tokenizer = _byte_level() if self.is_byte_level else _characters()
        names = [*filter(None, (self.begin, self.end)), *self.special]
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in self.added])
        if self.begin:
            place = (self.begin, tokenizer.token_to_id(self.begin))
            tokenizer.post_processor = TemplateProcessing(single=f"{self.begin} $A", special_tokens=[place])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=self.begin or None,
            eos_token=self.end,
            chat_template=self.template if template is None else template,
            clean_up_tokenization_spaces=False,
        )


STYLES = {
    "llama-3": Style(
        LLAMA_3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    ),
    "qwen-3": Style(
        QWEN_3,
        "",
        "<|im_end|>",
        "<|im_end|>",
        ("<|im_start|>", "<|endoftext|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "gemma-3": Style(
        GEMMA_3, "<bos>", "<eos>", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), is_byte_level=False
    ),
    "phi-3": Style(
        PHI_3,
        "",
        "<|endoftext|>",
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        is_byte_level=False,
    ),
    "mistral": Style(MISTRAL, "<s>", "</s>", "</s>", ("[INST]", "[/INST]"), is_byte_level=False),
}


def _byte_level() -> Tokenizer:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "i"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocabulary = {token: index for index, token in enumerate([*symbols, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _characters() -> Tokenizer:
    """Return a tokenizer of characters, of bytes for those it does not know, and of a few merged tokens."""
    symbols = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    merges = [("\n", "\n"), ("▁", "I"), ("▁", "t"), ("▁t", "h")]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *symbols, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
