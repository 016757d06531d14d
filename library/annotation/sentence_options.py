"""The flags of the captioner: which model, what it is asked, and how it chooses its words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.annotation.image_options import ImageOptions, caption_extension
from library.config.magnitudes import MOST_SEED
from library.config.options import option
from library.config.spellings import Spellings

MOST_NEW_TOKENS = 4096
_MOST_BEAMS = 64
_LARGEST_SIDE = 16384


@dataclass(frozen=True)
class SentenceImageOptions(ImageOptions):
    """`ImageOptions` for sentences, which are those of encoder G unless told otherwise."""

    caption_extension: str = caption_extension(".caption")
    max_image_side: int = option(
        1024,
        "Shrink images to this longest side before the model sees them, about what training shows. 0 leaves them.",
        least=0,
        most=_LARGEST_SIDE,
    )


@dataclass(frozen=True)
class CaptionerOptions:
    """Which model writes, and what it is asked."""

    _argument_group_name: ClassVar[str] = "Model"

    model_name_or_path: str | None = option(
        None,
        "Folder of an image-to-text or vision-language model of transformers (BLIP, GIT, Florence-2, LLaVA, Qwen-VL "
        "...), or its name on the Hugging Face Hub, from where it is downloaded.",
    )
    prompt: str | None = option(
        None,
        "What the model is asked, or for BLIP and GIT the beginning of every caption. {tags} in it is where "
        "--also_read puts its text. Not given: a short description.",
    )
    also_read: str | None = option(
        None,
        "Hand the model the caption that each image has for this encoder, such as the tags of L, in the prompt.",
        choices=("l", "g"),
    )
    mixed_precision: str = option("no", "Precision of the model.", choices=("no", "fp16", "bf16"))

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if not self.model_name_or_path:
            yield "--model_name_or_path is missing: name the folder of a model, or a model of the hub."
        if self.prompt is not None and "{tags}" in self.prompt and self.also_read is None:
            yield "--prompt has a place for {tags}, and nothing is read: add --also_read l."


@dataclass(frozen=True)
class WordOptions:
    """How words are chosen."""

    _argument_group_name: ClassVar[str] = "Words"

    max_new_tokens: int = option(
        75, "Most tokens of a caption, counted by the model's tokenizer.", least=1, most=MOST_NEW_TOKENS
    )
    min_new_tokens: int = option(0, "Fewest tokens of a caption.", least=0, most=MOST_NEW_TOKENS)
    do_sample: bool = option(False, "Draw words by their probability. Otherwise take the most probable one.")
    temperature: float = option(1.0, "With --do_sample: above 1 draws rarer words.", least=0.01, most=100)
    top_p: float = option(
        0.9, "With --do_sample: draw from the likeliest words of this probability.", least=0.001, most=1
    )
    top_k: int = option(50, "With --do_sample: draw from so many words. 0 is no limit.", least=0, most=1_000_000)
    num_beams: int = option(1, "Sentences that are followed at once, without --do_sample.", least=1, most=_MOST_BEAMS)
    repetition_penalty: float = option(1.0, "Above 1 makes words less likely that were used.", least=0.01, most=100)
    seed: int = option(
        42, "Seed of what is drawn; the words for an image depend on it and the image alone.", least=0, most=MOST_SEED
    )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if self.do_sample and self.num_beams > 1:
            yield "--num_beams follows the likeliest sentences, --do_sample draws one. Keep one of them."
        if self.min_new_tokens > self.max_new_tokens:
            yield f"--min_new_tokens is {self.min_new_tokens}, more than --max_new_tokens {self.max_new_tokens}."


def conflicts(images: SentenceImageOptions, model: CaptionerOptions, words: WordOptions) -> Iterator[str]:
    """Yield what cannot work together."""
    if model.also_read is not None and images.caption_extension == EXTENSIONS[model.also_read]:
        yield (
            f"--also_read {model.also_read} reads the {images.caption_extension} files that are to be written. Set "
            "another --caption_extension."
        )


EXTENSIONS = {"l": ".txt", "g": ".caption"}
"""The suffixes of caption files by encoder; a test compares them with the columns of the metadata."""

CAPTIONER_SPELLINGS = Spellings(
    replaced={
        "--caption_weights": "--model_name_or_path",
        "--max_length": "--max_new_tokens",
        "--min_length": "--min_new_tokens",
        "--beam_search": "--do_sample=false",
    },
    refused={
        "--pin_memory": "makes no difference here: a batch is copied while the last one is worked on. Leave it off."
    },
)
