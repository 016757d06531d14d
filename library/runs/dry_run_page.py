"""A dry run as one page that needs nothing beside it: each image with its crop drawn, both captions, and the totals."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from library.config.errors import UserError
from library.config.file_names import writable_text
from library.data.caption_summary import BIN, EncoderSummary
from library.images.reading import load_rgb
from library.runs.dry_run_facts import ImageFacts, ReadCaption, SetFacts, Visit
from library.runs.dry_run_text import disk_line, encoder_sentence
from library.sdxl.thumbnail import jpeg_url

_LONGEST_SIDE = 320  # of an image on the page, in pixels
_QUALITY = 82  # of its JPEG

_STYLE = """
body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; margin: 2rem auto; max-width: 1180px; color: #1d2430;
  background: #f5f6f8; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
.note { color: #5a6576; } .card { background: #fff; border: 1px solid #dfe3ea; border-radius: 10px; padding: 1rem;
  margin: 1rem 0; } .totals { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.image { display: grid; grid-template-columns: 340px 1fr; gap: 1.2rem; } .frame { position: relative;
  display: inline-block; line-height: 0; } .frame img { border-radius: 4px; max-width: 320px; }
.crop { position: absolute; outline: 2px solid #fff; box-shadow: 0 0 0 9999px rgba(20, 25, 35, .45); }
.clip { overflow: hidden; border-radius: 4px; display: inline-block; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left;
  vertical-align: top; padding: .25rem .5rem; }
.visit { border-top: 1px solid #edf0f4; padding: .45rem 0; } .caption { display: grid;
  grid-template-columns: 1.6rem 1fr 200px; gap: .6rem; align-items: start; }
.l { color: #9a4d00; } .g { color: #0b5aa5; }
.name { font-weight: 700; } del { color: #b3261e; } .dropped { color: #8a93a3; font-style: italic; }
.bar { height: 7px; background: #e7eaf0; border-radius: 4px; overflow: hidden; }
.bar i { display: block; height: 100%; }
.l .bar i { background: #d9822b; } .g .bar i { background: #2d7dd2; } .small { font-size: .8rem; color: #5a6576; }
.row { display: grid; grid-template-columns: 6rem 1fr 4rem; gap: .5rem; align-items: center; font-size: .85rem; }
"""


def page(facts: SetFacts, images: Sequence[ImageFacts]) -> str:
    """Return the page as HTML, which UTF-8 can hold; all that comes from files is escaped, and images are embedded."""
    body = "\n".join([*_totals(facts, len(images)), *(_image(each) for each in images)])
    return writable_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Dry run</title><style>{_STYLE}</style>'
        f"</head>\n<body>\n{body}\n</body></html>\n"
    )


def _totals(facts: SetFacts, num_shown: int) -> Iterator[str]:
    summary = facts.captions
    yield "<h1>Dry run</h1>"
    yield (
        f'<p class="note">{facts.num_images} images, {facts.steps_per_epoch} steps per epoch, {facts.num_steps} steps '
        f"in {facts.num_epochs} epochs, seed {facts.seed}"
        f"{'' if facts.is_seed_given else ' (the run will draw another)'}. "
        f"{num_shown} images are shown. {escape(disk_line(facts))}.</p>"
    )
    yield '<div class="totals">'
    yield _encoder("L", summary.encoder_l)
    yield _encoder("G", summary.encoder_g)
    words = ", ".join(f"{escape(word)} ({count})" for word, count in summary.shared_words) or "none"
    yield (
        f'<div class="card"><h2>Both captions</h2><p>{summary.num_pairs} different pairs, {summary.num_encodings} '
        f"encodings before training.</p><p>Words in both captions of an image, which blur the division: {words}</p>"
        "</div>"
    )
    rows = "".join(
        f"<tr><th>{name}</th><td>{100 * rates[0]:.2f} %</td><td>{100 * rates[1]:.2f} %</td></tr>"
        for name, rates in zip(("L kept", "L dropped"), facts.dropout.table, strict=True)
    )
    yield (
        '<div class="card"><h2>Captions dropped</h2><table class="dropout"><tr><th></th><th>G kept</th>'
        f"<th>G dropped</th></tr>{rows}</table></div></div>"
    )


def _encoder(name: str, encoder: EncoderSummary) -> str:
    most = max(encoder.histogram, default=1) or 1
    rows = "".join(
        f'<div class="row"><span>{index * BIN}-{(index + 1) * BIN - 1} tokens</span>'
        f'<div class="bar"><i style="width:{100 * count / most:.1f}%"></i></div><span>{count}</span></div>'
        for index, count in enumerate(encoder.histogram)
    )
    return f'<div class="card {name.lower()}"><h2>{name}</h2><p>{encoder_sentence(encoder)}</p>{rows}</div>'


def _image(image: ImageFacts) -> str:
    sizes = f"{_size(image.size)} → {_size(image.bucket)}"
    visits = "".join(map(_visit, image.visits))
    return (
        f'<div class="card image" data-key="{escape(image.key)}"><div>{_picture(image)}<p class="small">{sizes}, '
        f"crop at {image.crop[0]:g}, {image.crop[1]:g}; latents {escape(image.latents)}</p></div>"
        f"<div><h2>{escape(image.key)}</h2>{visits}</div></div>"
    )


def _picture(image: ImageFacts) -> str:
    """Return the image, downsized, with the part that is trained left bright."""
    if image.file is None:
        return '<p class="note">only its latents are here</p>'
    try:
        picture = load_rgb(Path(image.file))
    except UserError as error:
        return f'<p class="note">{escape(str(error))}</p>'
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    scale = max(image.bucket[0] / image.size[0], image.bucket[1] / image.size[1])
    resized = image.resized or (image.size[0] * scale, image.size[1] * scale)
    left, top = (100 * offset / side for offset, side in zip(image.crop, resized, strict=True))
    width, height = (100 * cut / side for cut, side in zip(image.bucket, resized, strict=True))
    return (
        f'<div class="clip"><div class="frame"><img alt="" src="{jpeg_url(picture, _QUALITY)}">'
        f'<div class="crop" style="left:{left:.2f}%;top:{top:.2f}%;width:{width:.2f}%;height:{height:.2f}%"></div>'
        "</div></div>"
    )


def _visit(visit: Visit) -> str:
    flipped = ", flipped" if visit.is_flipped else ""
    return (
        f'<div class="visit"><span class="small">epoch {visit.epoch}{flipped}</span>'
        f"{_caption('L', visit.caption_l)}{_caption('G', visit.caption_g)}</div>"
    )


def _caption(name: str, caption: ReadCaption) -> str:
    text = '<span class="dropped">dropped</span>'
    if not caption.is_dropped:
        cut = f"<del>{escape(caption.cut)}</del>" if caption.cut else ""
        kept = escape(caption.text) or '<span class="dropped">empty</span>'
        text = f"<span>{kept}</span>{cut}"
    used = min(100.0, 100 * caption.num_tokens / caption.limit)
    return (
        f'<div class="caption {name.lower()}"><span class="name">{name}</span><div>{text}</div>'
        f'<div><div class="bar"><i style="width:{used:.0f}%"></i></div>'
        f'<span class="small">{caption.num_tokens} of {caption.limit} tokens, {caption.cache}</span></div></div>'
    )


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"
