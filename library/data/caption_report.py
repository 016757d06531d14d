"""What the start of a run says about its captions, which encoders it can cache, and the captions it refuses."""

import logging
from collections.abc import Iterable, Iterator, Sequence

from library.captions.draws import ENCODERS, Encoder
from library.captions.listing import require_listable, unlistable_settings
from library.captions.options import CAPTION_EXTENSIONS
from library.captions.rules import CaptionRules
from library.config.errors import UserError, listed
from library.data.caption_notices import caption_notices, dropout_sentence, require_paired_lines
from library.data.columns import Captions
from library.data.found_images import FoundImage
from library.data.image_columns import FoundImages
from library.data.subsets import Subset
from library.data.training_set_options import TrainingSetOptions

log = logging.getLogger(__name__)


def report_captions(
    options: TrainingSetOptions,
    subsets: Sequence[Subset],
    found: Iterable[FoundImage],
    *,
    trains_unet: bool,
    trained: Sequence[Encoder],
) -> list[Encoder]:
    """Return the encoders whose outputs are cached; tell the user what happens to captions and what is trained.

    `trained` are the encoders that are. Raise `UserError` as `encoders_to_cache` and `check_captions` do.
    """
    cached, sentences = encoders_to_cache(options, subsets, trained)
    groups = FoundImages.of(found).captions_by_subset()
    notices = check_captions(groups, cached)
    if not options.update_captions:
        notices += idle_extensions(subsets)
    for sentence in (*captions_sentences(groups), *sentences):
        log.info(sentence)
    for notice in notices:
        log.warning(notice)
    log.info(trained_sentence(trains_unet=trains_unet, trains_l="l" in trained, trains_g="g" in trained))
    return cached


def idle_extensions(subsets: Iterable[Subset]) -> Iterator[str]:
    """Yield a sentence for each source of captions that is no caption files, although their ending is set."""
    idle = [
        each
        for each in subsets
        if not each.reads_folder and (each.extension_l, each.extension_g) != tuple(CAPTION_EXTENSIONS.values())
    ]
    for source in dict.fromkeys(each.source for each in idle):
        yield f"--caption_extension has no effect on captions of '{source}'; only on files beside images."


def encoders_to_cache(
    options: TrainingSetOptions, subsets: Iterable[Subset], trained: Iterable[Encoder]
) -> tuple[list[Encoder], list[str]]:
    """Return the encoders whose outputs are cached, and a sentence on each that works in every step nevertheless.

    Raise `UserError` naming the settings in the way where an encoder must be cached, by its form of the flag.
    """
    cached, sentences = [], []
    subsets, trained = list(subsets), list(trained)
    for encoder in ENCODERS:
        is_demanded = encoder in options.demanded_text_caches
        if not (options.caches_texts or is_demanded):
            continue
        obstacles = _obstacles(encoder, subsets, is_trained=encoder in trained)
        if not obstacles:
            cached.append(encoder)
        elif is_demanded:
            raise UserError(
                f"--cache_text_encoder_outputs_{encoder}: the outputs of encoder {encoder.upper()} cannot be cached, "
                f"because of {listed(obstacles)}.",
                f"Leave one of the two out, or draw texts before training with --caption_variants_{encoder}=10.",
            )
        else:
            sentences.append(
                f"text encoder {encoder.upper()} works in every step, because of {listed(obstacles)}"
                f"{'' if encoder in trained else f'; --caption_variants_{encoder}=10 would cache ten texts an image'}"
            )
    return cached, sentences


_Captions = Sequence[tuple[Subset, Captions]]
"""The captions of each subset, by image key."""


def check_captions(groups: _Captions, cached: Iterable[Encoder]) -> list[str]:
    """Return what should worry the user about the captions of the images and their rules.

    Raise `UserError` for captions that their rules cannot treat: lines that do not go together, and texts of the
    encoders to be `cached` that are too many to be listed.
    """
    notices: list[str] = []
    for subset, captions in groups:
        rules = subset.captions
        require_paired_lines(captions, rules)
        for encoder in cached:
            require_listable(captions, rules, encoder)
        notices += caption_notices(captions, rules)
    return list(dict.fromkeys(notices))


def captions_sentences(groups: _Captions) -> Iterator[str]:
    """Yield for each subset where its captions come from and what changes them, and how often they are dropped."""
    for subset, captions in groups:
        parts = [_encoder_part(subset, captions, encoder) for encoder in ENCODERS]
        where = "" if len(groups) == 1 else f" of '{subset.image_dir}'{' (regularization)' if subset.is_reg else ''}"
        yield f"captions{where}: {', '.join(parts)}"
        dropped = dropout_sentence(subset.captions.dropout)
        if dropped:
            yield dropped.replace("captions", f"captions{where}", 1)


def trained_sentence(*, trains_unet: bool, trains_l: bool, trains_g: bool) -> str:
    """Return what is trained and what is frozen."""
    is_trained = {"U-Net": trains_unet, "L": trains_l, "G": trains_g}
    trained = ", ".join(name for name, on in is_trained.items() if on)
    frozen = ", ".join(name for name, on in is_trained.items() if not on)
    hint = "" if trains_l else " (a frozen L learns no new style words: docs/separate-captions.md)"
    return f"trained: {trained}" + (f"; frozen: {frozen}{hint}" if frozen else "")


def _obstacles(encoder: Encoder, subsets: Iterable[Subset], *, is_trained: bool) -> list[str]:
    """Return the flags because of which the outputs of an encoder cannot be cached."""
    if is_trained:
        return ["--train_text_encoder"]
    names = [name for subset in subsets for name in unlistable_settings(subset.captions.of(encoder))]
    return [f"--{name}" for name in dict.fromkeys(names)]


def _encoder_part(subset: Subset, captions: Captions, encoder: Encoder) -> str:
    rules = subset.captions.of(encoder)
    source = str(subset.source)
    if subset.reads_folder:
        source = f"*{subset.extension_l if encoder == 'l' else subset.extension_g}"
    said = [f"{captions.variants(encoder).num_different} different", *_changes(rules)]
    return f"{encoder.upper()} from {source} ({', '.join(said)})"


def _changes(rules: CaptionRules) -> Iterator[str]:
    """Yield what the rules of one encoder do, in a few words each."""
    if rules.caption_prefix or rules.caption_suffix:
        yield f"'{rules.caption_prefix} ... {rules.caption_suffix}'".replace("' ...", "'...").replace("... '", "...'")
    if rules.enable_wildcard:
        yield "wildcards"
    if rules.shuffle_caption:
        yield "shuffled"
    if rules.caption_tag_dropout_rate:
        yield f"{100 * rules.caption_tag_dropout_rate:.4g} % tag dropout"
    if rules.token_warmup_step:
        yield "tag warm-up"
    if rules.weighted_captions:
        yield "weights"
    if rules.caption_variants:
        yield f"{rules.caption_variants} drawn texts an image"
