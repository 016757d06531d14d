"""What is trained on, in parts: the images of one folder that are treated alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from library.captions.options import CAPTION_EXTENSIONS
from library.captions.rules import PairRules, described_rules
from library.images.augmentation import Augmentation
from library.images.buckets import BucketRule

_NOT_COMPARED = ("captions", "cache_info")
SUBSET_MARK = "subset "
"""How the names of settings of one subset of several begin, where runs are compared."""


@dataclass(frozen=True)
class Subset:
    """Images of one folder that are treated alike.

    `dataset` numbers the data set that the subset belongs to: images of different data sets share no batch, those of
    one have its `batch_size`, and the buckets of its `rule`. Without a `metadata_file` the captions are read from the
    files beside the images, which end in `extension_l` and `extension_g`; with `one_caption` both encoders read one.
    `class_tokens` is the caption of an image without a file. The loss of each sample is multiplied by `loss_weight`;
    an image with `is_reg` is a regularization image, and so is one that metadata marks, whose loss is multiplied by
    `prior_loss_weight` as well. With `names_bucket` a cache is named with its bucket, with `cache_info` the sizes of
    images are remembered on disk. `key_prefix` tells the images of one subset from those of others.
    `validation_split` is the fraction of its images that is held out, as `validation_seed` decides.
    With a `mask_dir` the masks of the images are files there, else with `alpha_mask` their alpha channels.
    A subset that `is_of_file` is described by a data set file or the name of its folder, not by flags alone.
    """

    image_dir: Path
    metadata_file: Path | None
    rule: BucketRule
    dataset: int = 0
    batch_size: int = 1
    num_repeats: int = 1
    captions: PairRules = field(default_factory=PairRules)
    extension_l: str = CAPTION_EXTENSIONS["l"]
    extension_g: str = CAPTION_EXTENSIONS["g"]
    one_caption: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    alpha_mask: bool = False
    mask_dir: Path | None = None
    loss_weight: float = 1.0
    is_reg: bool = False
    class_tokens: str | None = None
    names_bucket: bool = False
    is_of_file: bool = False
    prior_loss_weight: float = 1.0
    cache_info: bool = False
    dataset_class: str | None = None
    key_prefix: str = ""
    validation_split: float = 0.0
    validation_seed: int = 0

    @property
    def source(self) -> Path | None:
        """What lists the images: a metadata file or the path of a class, None where the folder is read."""
        return self.metadata_file if self.dataset_class is None else Path(self.dataset_class)

    @property
    def has_masks(self) -> bool:
        """Whether images have masks."""
        return self.alpha_mask or self.mask_dir is not None

    @property
    def reads_folder(self) -> bool:
        """Whether the images are those of the folder, with the captions beside them."""
        return self.source is None

    def as_regularization(self) -> "Subset":
        """Return the same subset for regularization images."""
        return (
            self if self.is_reg else replace(self, is_reg=True, loss_weight=self.loss_weight * self.prior_loss_weight)
        )


def described_subsets(subsets: Sequence[Subset]) -> dict[str, str]:
    """Return every setting of the subsets as text, by a name: what runs are compared by.

    A subset of flags is described by the rules of its captions, since the options describe the rest.
    """
    if len(subsets) == 1 and not subsets[0].is_of_file:
        return described_rules(subsets[0].captions)
    described: dict[str, str] = {}
    for number, subset in enumerate(subsets):
        settings = {
            each.name: str(getattr(subset, each.name)) for each in fields(subset) if each.name not in _NOT_COMPARED
        }
        settings |= described_rules(subset.captions)
        described |= {f"{SUBSET_MARK}{number} {name}": value for name, value in settings.items()}
    return described
