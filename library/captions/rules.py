"""The settings of captions, resolved: what `captions` does to the texts of L and G."""

import hashlib
from dataclasses import dataclass, field, fields
from functools import cached_property

from library.captions.draws import Encoder, Stream

EMPTY, ZEROS = "empty", "zeros"
"""What an encoder receives in place of a dropped caption: the encoding of "", or zeros."""


@dataclass(frozen=True)
class CaptionRules:
    """What happens to the captions of one encoder. Fields are named as the flags, which `CaptionOptions` explains."""

    caption_prefix: str = ""
    caption_suffix: str = ""
    enable_wildcard: bool = False
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    caption_tag_dropout_rate: float = 0.0
    protected_tags: frozenset[str] = frozenset()
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    weighted_captions: bool = False
    max_token_length: int = 75
    dropped_caption: str = EMPTY
    caption_variants: int = 0

    @cached_property
    def changes_pieces(self) -> bool:
        """Whether an operation on single tags is on; only then is a text taken apart and joined again."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    @cached_property
    def changes_nothing(self) -> bool:
        """Whether the final text is the first variant, byte for byte."""
        added = self.caption_prefix or self.caption_suffix
        separated = self.keep_tokens_separator or self.secondary_separator
        return not (added or separated or self.enable_wildcard or self.changes_pieces or self.caption_variants)


@dataclass(frozen=True)
class CaptionDropout:
    """How often whole captions are dropped. Fields are named as the flags: both captions, L alone, G alone."""

    caption_dropout_rate: float = 0.0
    caption_dropout_rate_l: float = 0.0
    caption_dropout_rate_g: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_dropout_every_n_epochs_l: int = 0
    caption_dropout_every_n_epochs_g: int = 0

    @property
    def rate_l(self) -> float:
        """How often L's caption is dropped in all."""
        return self.caption_dropout_rate + self.caption_dropout_rate_l

    @property
    def rate_g(self) -> float:
        """How often G's caption is dropped in all."""
        return self.caption_dropout_rate + self.caption_dropout_rate_g

    @cached_property
    def total_rate(self) -> float:
        """How often at least one of the two captions is dropped."""
        return self.caption_dropout_rate + self.caption_dropout_rate_l + self.caption_dropout_rate_g

    @property
    def table(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """How often L's caption is kept (first row) or dropped, with G's kept (first column) or dropped."""
        kept = 1 - self.total_rate
        return (kept, self.caption_dropout_rate_g), (self.caption_dropout_rate_l, self.caption_dropout_rate)

    @cached_property
    def has_epochs(self) -> bool:
        """Whether captions are dropped in whole epochs."""
        epochs = self.caption_dropout_every_n_epochs
        return bool(epochs or self.caption_dropout_every_n_epochs_l or self.caption_dropout_every_n_epochs_g)

    def drops(self, encoder: Encoder) -> bool:
        """Return whether captions of `encoder` are ever dropped."""
        alone = self.caption_dropout_every_n_epochs_l if encoder == "l" else self.caption_dropout_every_n_epochs_g
        rate = self.rate_l if encoder == "l" else self.rate_g
        return rate > 0 or self.caption_dropout_every_n_epochs > 0 or alone > 0


NO_DROPOUT = CaptionDropout()


@dataclass(frozen=True)
class PairRules:
    """What happens to the two captions of an image; `shared` lets both encoders use the same random numbers."""

    rules_l: CaptionRules = field(default_factory=CaptionRules)
    rules_g: CaptionRules = field(default_factory=CaptionRules)
    dropout: CaptionDropout = NO_DROPOUT
    shared: bool = False

    def of(self, encoder: Encoder) -> CaptionRules:
        """Return the rules of one encoder."""
        return self.rules_l if encoder == "l" else self.rules_g

    def stream(self, encoder: Encoder) -> Stream:
        """Return whose numbers an encoder uses."""
        return "both" if self.shared else encoder


def described_rules(rules: PairRules) -> dict[str, str]:
    """Return every setting as text, by the name of the flag that has this effect alone: what runs are compared by."""
    described = {
        f"{each.name}_{encoder}": _described(getattr(own, each.name))
        for encoder, own in (("l", rules.rules_l), ("g", rules.rules_g))
        for each in fields(own)
    }
    described |= {each.name: str(getattr(rules.dropout, each.name)) for each in fields(rules.dropout)}
    return described | {"caption_draws": "shared" if rules.shared else "separate"}


def _described(value: object) -> str:
    if not isinstance(value, frozenset):
        return str(value)
    tags = "\n".join(sorted(value)).encode("utf-8", errors="surrogatepass")
    return f"{len(value)} tags ({hashlib.blake2b(tags, digest_size=8).hexdigest()})"
