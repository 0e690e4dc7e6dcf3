"""How a run's base model and its adapted model continue the same prompts.

Rules:
1. Both models run in float32, one prompt at a time, so a prompt's continuation depends on no other.
2. Temperature 0 takes the most probable token each time. Above it tokens are drawn from softmax(logits /
   temperature), with the same random numbers for both models.
3. Of the model's own settings for generation only its end-of-text tokens count.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qpa.adapters.registry import KINDS
from qpa.documents import AdapterSpec, BaseModelReference, Document, FrozenAdapter, TrainedGenerator
from qpa.errors import ModelError, OptionError
from qpa.models.base_model import DEVICES, load_model, load_tokenizer, moved_base, torch_device
from qpa.pipeline.options import check_options, option
from qpa.pipeline.pass_protocol import newest
from qpa.progress import Progress, silent
from qpa.seeds import split_seed
from qpa.training.data.chat_template import ChatTemplate
from qpa.training.data.examples import Conversation
from qpa.training.data.records import Origin

if TYPE_CHECKING:
    from qpa.pipeline.pass_protocol import FileStore

Prompt = str | Sequence[int]
"""A text, or the tokens that it consists of."""


@dataclass(frozen=True)
class Continuation:
    """A prompt, and what the base model and the adapted model make of it, as text.

    Args:    prompt: as it was given; of tokens, their text.
    """

    prompt: str
    base: str
    adapted: str


@dataclass(frozen=True)
class ContinuePrompts:
    """How prompts are continued.

    Args:    chat: a prompt is a user's message, written as a chat template says.
             chat_template: a file with one, or "trl"; None is the tokenizer's.
             model: where the base model is now; None for where the adapter says.
             trust_remote_code: the user allows the model's own Python code to run, now.
    """

    section: ClassVar[str] = "generate"

    max_new_tokens: int = option(64, help="The most tokens to add to a prompt.", at_least=1)
    temperature: float = option(
        0.0, help="Temperature of the draw; 0 takes the most probable token.", at_least=0, at_most=100
    )
    seed: int = option(0, help="Draws the tokens where `temperature` is above 0.", at_least=0)
    chat: bool = option(False, help="Take a prompt as a user's message, in a chat template.")
    chat_template: str | None = option(
        None,
        help="File with the chat template of the training, or trl; see `qpa train`.",
        is_path=True,
        shown_default="the tokenizer's",
        provenance=False,
    )
    device: str = option("auto", help="Device to run on: {choices}.", choices=DEVICES)
    model: str | None = option(
        None, help="Base model to read.", shown_default="the one it was trained on", provenance=False
    )
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model.", provenance=False
    )

    def __call__(
        self,
        documents: Sequence[Document],
        files: FileStore,
        prompts: Sequence[Prompt],
        progress: Progress = silent,
    ) -> tuple[Continuation, ...]:
        """Return the continuations of prompts, in their order.

        Args:    documents: of a run, up to its frozen adapter.
                 files: of the run.
                 prompts: texts, and tokens that are taken as they are.
        Raises:  OptionError: an option is out of range, or a prompt is empty or too long.
                 ModelError: the base model cannot be loaded, has no chat template, or does not generate.
                 DataError: the chat template cannot be read, or refuses a prompt.
        """
        from qpa.adapters.attach import attach_frozen

        check_options(self)
        spec, frozen = newest(documents, AdapterSpec), newest(documents, FrozenAdapter)
        base = moved_base(spec.base, self.model)
        tokenizer = load_tokenizer(base, trust_remote_code=self.trust_remote_code)
        template = ChatTemplate(tokenizer, self.chat_template) if self.chat else None
        if template is not None:
            _check_template(template, documents, base)
        tokens = [_tokens_of(prompt, tokenizer, template) for prompt in prompts]
        model = load_model(base, keep_dtype=False, trust_remote_code=self.trust_remote_code)
        model = model.to(torch_device(self.device))
        self._check_length(tokens, spec, model.config)
        _use_plain_settings(model, tokenizer, base)
        before = self._continue(model, tokenizer, tokens, progress, "asking the base model")
        adapted = attach_frozen(model, spec, files.get(frozen.arrays))
        after = self._continue(adapted, tokenizer, tokens, progress, "asking the adapted model")
        texts = [
            prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt), skip_special_tokens=True)
            for prompt in prompts
        ]
        return tuple(Continuation(*parts) for parts in zip(texts, before, after, strict=True))

    def _check_length(self, tokens: Sequence[Sequence[int]], spec: AdapterSpec, config: Any) -> None:
        """Check that prompts and what is added to them fit the context, behind a prefix if there is one."""
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        n_used = max(map(len, tokens), default=0) + KINDS[spec.method].n_positions(spec.rank)
        if limit is not None and n_used + self.max_new_tokens > limit:
            expected = f"at most {max(limit - n_used, 0)}, what the longest prompt leaves of {limit}"
            raise OptionError("max_new_tokens", expected, str(self.max_new_tokens))

    def _continue(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        progress: Progress,
        description: str,
    ) -> list[str]:
        import torch

        continuations = []
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        for index, prompt in enumerate(prompts):
            progress(description, index, len(prompts))
            torch.manual_seed(split_seed(self.seed, f"prompt {index}"))
            tokens = torch.tensor([prompt], device=model.device)
            found = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=self.max_new_tokens,
                **(sampling if self.temperature else {"do_sample": False}),
            )
            continuations.append(_text_behind(prompt, found[0].tolist(), tokenizer))
        progress(description, len(prompts), len(prompts))
        return continuations


def _tokens_of(prompt: Prompt, tokenizer: Any, template: ChatTemplate | None) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise OptionError("prompt", "text in UTF-8", "half of a surrogate pair") from error
    tokens: list[int] = _message_tokens(prompt, template) if template else tokenizer(prompt).input_ids
    if not tokens:
        raise OptionError("prompt", "at least one token", f'none in "{prompt}"')
    return tokens


def _message_tokens(prompt: str, template: ChatTemplate) -> list[int]:
    """Return the tokens of a user's message, up to where the assistant's answer begins."""
    messages = [{"role": "user", "content": prompt}]
    conversation = Conversation(messages, Origin("prompts", "prompt", 1))
    text = template.render(conversation, messages, asks=True)
    tokens: list[int] = template.tokenizer(text, add_special_tokens=False).input_ids
    return tokens


def _check_template(template: ChatTemplate, documents: Sequence[Document], base: BaseModelReference) -> None:
    """Check that there is a chat template, and that a training on messages used the same.

    Raises:  ModelError, OptionError: it is not so.
    """
    if not template.exists:
        advice = "leave out `chat`, or give one by `chat_template`"
        raise ModelError(base.name_or_path, "a chat template in the tokenizer", "none", advice)
    for one in documents:
        used = one.data.chat_template if isinstance(one, TrainedGenerator) and one.data else None
        if used not in (None, template.digest):
            raise OptionError("chat_template", "the chat template of the training", "another one")


def _use_plain_settings(model: Any, tokenizer: Any, base: BaseModelReference) -> None:
    """Leave of a model's settings for generation its end-of-text tokens alone.

    Raises:  ModelError: the model does not generate.
    """
    from transformers import GenerationConfig

    if not model.can_generate():
        found = f"{type(model).__name__}, which transformers gives no such method"
        raise ModelError(base.name_or_path, "a model that generates text", found)
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    first = end[0] if isinstance(end, list) else end
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=first)


def _text_behind(prompt: list[int], tokens: list[int], tokenizer: Any) -> str:
    """Return the text of the tokens behind a prompt.

    Many tokenizers write the first token of a text without the space before it, so the whole is written.
    """
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, tokens))
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True))
