"""Adafactor's step over many weights of any shape at once, as programs of Triton: four launches for a chunk.

What they work on stands in tables on the device. A row of `parameters` has addresses and sizes of one weight (the
places below), a row of `tiles` the weight and the corner of the part that one program works on. What changes from step
to step (rate, decay, whether the loss is finite) is read from the device too: nothing is compiled again, and the host
waits for nothing. Sums are taken in two stages without atomics, so that they are the same in each run.
"""

from typing import Any

import triton
import triton.language as tl

# Places in a row of `parameters`, all int64.
WEIGHT, GRADIENT, ROWS, COLUMNS, RESIDUAL, SEED = (tl.constexpr(place) for place in range(6))
HEIGHT, WIDTH, KIND, TILES_DOWN, TILES_ACROSS, FIRST_TILE = (tl.constexpr(place) for place in range(6, 12))
ROW_SUMS, COLUMN_SUMS, SUMS_OF_ROWS, NUM_BLOCKS, TAPS_DOWN, TAPS_ACROSS = (tl.constexpr(n) for n in range(12, 18))
PLACES = tl.constexpr(18)
# Kinds of weights: a vector, a matrix, and kernels of a convolution, each of which is a small matrix.
VECTOR, MATRIX, KERNELS = (tl.constexpr(kind) for kind in range(3))
# Places in `numbers`, all float32.
RATE, SHRINK, BETA2, EPS, CLIP_THRESHOLD = (tl.constexpr(place) for place in range(5))
# Kinds of rounding.
TO_NEAREST, AT_RANDOM, WITH_RESIDUAL = (tl.constexpr(kind) for kind in range(3))

TILE_DOWN, TILE_ACROSS = 32, 256
"""Rows and columns of a tile of a matrix; vectors and kernels are cut into as many numbers."""
BLOCK = 1024
"""Means of rows or columns that one program updates."""

program: Any = triton.jit  # which has no types
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
"""Multiplications and additions round one by one, as in the operations of torch."""


@program
def _hashed(position, seed):
    # int32 wraps around; >> copies the sign, so that the upper bits are masked off (as in library/optim/rounding.py).
    bits = position * -1640531527 + seed
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * -2073254261
    return bits ^ ((bits >> 16) & 0xFFFF)


@program
def rounded_at_random(values, position, seed):
    """Return float32 `values` in bfloat16, rounded up or down at random with the value as the mean."""
    raw = values.to(tl.int32, bitcast=True)
    bits = (raw + (_hashed(position, seed) & 0xFFFF)) & -65536
    is_finite = (raw & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, bits.to(tl.float32, bitcast=True), values).to(tl.bfloat16)


@program
def _nearest(values):
    bits = values.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, near, values)


@program
def _inverse_root(values):
    return tl.div_rn(1.0, tl.sqrt_rn(values))


@program
def _place_of(parameters, tiles, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """Return the row of a tile's weight, and of each of its numbers row, column and place in the weight."""
    tile = tl.program_id(0)
    about = parameters + tl.load(tiles + 3 * tile) * PLACES
    down = tl.load(tiles + 3 * tile + 1) + tl.arange(0, DOWN)[:, None]
    across = tl.load(tiles + 3 * tile + 2) + tl.arange(0, ACROSS)[None, :]
    height = tl.load(about + HEIGHT)
    width = tl.load(about + WIDTH)
    inside = (down < height) & (across < width)
    return about, down, across, down * width + across, inside


@program
def _running(state, mean, inside, beta2, keeps):
    """Update the running means at these addresses, if it `keeps` what it computes; return them."""
    before = tl.load(state, inside, 0.0)
    now = tl.where(keeps, before * beta2 + mean * (1.0 - beta2), before)
    tl.store(state, now, inside)
    return now


@program
def _means_of_kernels(about, gradient, place, inside, beta2, eps, keeps, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """Running means of the squares of rows and columns of kernels: a row of the tile has `ACROSS` of them."""
    rows = tl.load(about + ROWS).to(tl.pointer_type(tl.float32))
    columns = tl.load(about + COLUMNS).to(tl.pointer_type(tl.float32))
    high, wide = tl.load(about + TAPS_DOWN), tl.load(about + TAPS_ACROSS)
    for y in range(high):
        total = tl.zeros((DOWN, ACROSS), tl.float32)
        for x in range(wide):
            each = tl.load(gradient + (place * high + y) * wide + x, inside, 0.0).to(tl.float32)
            total += each * each + eps
        _running(rows + place * high + y, tl.div_rn(total, wide.to(tl.float32)), inside, beta2, keeps)
    for x in range(wide):
        total = tl.zeros((DOWN, ACROSS), tl.float32)
        for y in range(high):
            each = tl.load(gradient + (place * high + y) * wide + x, inside, 0.0).to(tl.float32)
            total += each * each + eps
        _running(columns + place * wide + x, tl.div_rn(total, high.to(tl.float32)), inside, beta2, keeps)


@program
def sums(
    parameters, tiles, numbers, is_finite, scratch, NARROW: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr
):
    """First stage: squares summed along the rows and columns of each tile; vectors and kernels are done with it."""
    about, _down, _across, place, inside = _place_of(parameters, tiles, DOWN, ACROSS)
    kind = tl.load(about + KIND)
    eps = tl.load(numbers + EPS)
    dtype = tl.bfloat16 if NARROW else tl.float32
    gradient = tl.load(about + GRADIENT).to(tl.pointer_type(dtype))
    if kind == MATRIX:
        numbers_of = tl.load(gradient + place, inside, 0.0).to(tl.float32)
        squares = tl.where(inside, numbers_of * numbers_of + eps, 0.0)
        height, width = tl.load(about + HEIGHT), tl.load(about + WIDTH)
        row, column = tl.load(tiles + 3 * tl.program_id(0) + 1), tl.load(tiles + 3 * tl.program_id(0) + 2)
        rows = row + tl.arange(0, DOWN)
        columns = column + tl.arange(0, ACROSS)
        row_sums = scratch + tl.load(about + ROW_SUMS) + (column // ACROSS) * height
        column_sums = scratch + tl.load(about + COLUMN_SUMS) + (row // DOWN) * width
        tl.store(row_sums + rows, tl.sum(squares, 1), rows < height)
        tl.store(column_sums + columns, tl.sum(squares, 0), columns < width)
    else:
        beta2 = tl.load(numbers + BETA2)
        keeps = tl.load(is_finite) != 0
        if kind == VECTOR:
            state = tl.load(about + ROWS).to(tl.pointer_type(tl.float32))
            numbers_of = tl.load(gradient + place, inside, 0.0).to(tl.float32)
            _running(state + place, numbers_of * numbers_of + eps, inside, beta2, keeps)
        else:
            _means_of_kernels(about, gradient, place, inside, beta2, eps, keeps, DOWN, ACROSS)


@program
def means(parameters, blocks, numbers, is_finite, scratch, BLOCK: tl.constexpr):
    """Second stage: running means of the squares of rows and columns of matrices, and the sums of the rows' means."""
    at = 3 * tl.program_id(0)
    about = parameters + tl.load(blocks + at) * PLACES
    is_rows = tl.load(blocks + at + 1) == 0
    start = tl.load(blocks + at + 2)
    height, width = tl.load(about + HEIGHT), tl.load(about + WIDTH)
    length = tl.where(is_rows, height, width)
    other = tl.where(is_rows, width, height)
    num_parts = tl.where(is_rows, tl.load(about + TILES_ACROSS), tl.load(about + TILES_DOWN))
    parts = scratch + tl.where(is_rows, tl.load(about + ROW_SUMS), tl.load(about + COLUMN_SUMS))
    state = tl.where(is_rows, tl.load(about + ROWS), tl.load(about + COLUMNS)).to(tl.pointer_type(tl.float32))
    each = start + tl.arange(0, BLOCK)
    inside = each < length
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + part * length + each, inside, 0.0)
    beta2 = tl.load(numbers + BETA2)
    keeps = tl.load(is_finite) != 0
    now = _running(state + each, tl.div_rn(total, other.to(tl.float32)), inside, beta2, keeps)
    if is_rows:
        of_rows = scratch + tl.load(about + SUMS_OF_ROWS) + start // BLOCK
        tl.store(of_rows, tl.sum(tl.where(inside, now, 0.0), 0))


@program
def _updates(about, down, across, place, inside, scratch, y, x, NARROW: tl.constexpr):
    """Return the update before it is clipped, and its places; of kernels at the tap (y, x)."""
    kind = tl.load(about + KIND)
    dtype = tl.bfloat16 if NARROW else tl.float32
    gradient = tl.load(about + GRADIENT).to(tl.pointer_type(dtype))
    rows = tl.load(about + ROWS).to(tl.pointer_type(tl.float32))
    columns = tl.load(about + COLUMNS).to(tl.pointer_type(tl.float32))
    high, wide = tl.load(about + TAPS_DOWN), tl.load(about + TAPS_ACROSS)
    at = (place * high + y) * wide + x
    factor = tl.zeros_like(place).to(tl.float32)
    if kind == VECTOR:
        factor += _inverse_root(tl.load(rows + place, inside, 1.0))
    if kind == MATRIX:
        total = 0.0
        for block in range(tl.load(about + NUM_BLOCKS)):
            total += tl.load(scratch + tl.load(about + SUMS_OF_ROWS) + block)
        mean = tl.div_rn(total, tl.load(about + HEIGHT).to(tl.float32))
        row = _inverse_root(tl.div_rn(tl.load(rows + down, down < tl.load(about + HEIGHT), 1.0), mean))
        factor += row * _inverse_root(tl.load(columns + across, across < tl.load(about + WIDTH), 1.0))
    if kind == KERNELS:
        total = tl.zeros_like(place).to(tl.float32)
        for each in range(high):
            total += tl.load(rows + place * high + each, inside, 1.0)
        mean = tl.div_rn(total, high.to(tl.float32))
        row = _inverse_root(tl.div_rn(tl.load(rows + place * high + y, inside, 1.0), mean))
        factor += row * _inverse_root(tl.load(columns + place * wide + x, inside, 1.0))
    return factor * tl.load(gradient + at, inside, 0.0).to(tl.float32), at


@program
def norms(parameters, tiles, scratch, NARROW: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """Squares of the update summed over each tile, into the beginning of `scratch`."""
    about, down, across, place, inside = _place_of(parameters, tiles, DOWN, ACROSS)
    total = 0.0
    for y in range(tl.load(about + TAPS_DOWN)):
        for x in range(tl.load(about + TAPS_ACROSS)):
            update, _ = _updates(about, down, across, place, inside, scratch, y, x, NARROW)
            total += tl.sum(tl.where(inside, update * update, 0.0))
    tl.store(scratch + tl.program_id(0), total)


@program
def apply(
    parameters,
    tiles,
    numbers,
    is_finite,
    scratch,
    NARROW: tl.constexpr,
    ROUNDING: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clip the update, decay the weights, subtract and round."""
    about, down, across, place, inside = _place_of(parameters, tiles, DOWN, ACROSS)
    high, wide = tl.load(about + TAPS_DOWN), tl.load(about + TAPS_ACROSS)
    first, count = tl.load(about + FIRST_TILE), tl.load(about + TILES_DOWN) * tl.load(about + TILES_ACROSS)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        each = start + tl.arange(0, BLOCK)
        total += tl.load(scratch + first + each, each < count, 0.0)
    number = tl.load(about + HEIGHT) * tl.load(about + WIDTH) * high * wide
    size = tl.div_rn(tl.sqrt_rn(tl.sum(total, 0)), tl.sqrt_rn(number.to(tl.float32)))
    clip = tl.maximum(tl.div_rn(size, tl.load(numbers + CLIP_THRESHOLD)), 1.0)
    rate, shrink = tl.load(numbers + RATE), tl.load(numbers + SHRINK)
    keeps = tl.load(is_finite) != 0
    dtype = tl.bfloat16 if NARROW else tl.float32
    weight = tl.load(about + WEIGHT).to(tl.pointer_type(dtype))
    residual = tl.load(about + RESIDUAL).to(tl.pointer_type(tl.bfloat16))
    seed = tl.load(about + SEED).to(tl.int32)
    for y in range(high):
        for x in range(wide):
            update, at = _updates(about, down, across, place, inside, scratch, y, x, NARROW)
            before = tl.load(weight + at, inside, 0.0)
            values = before.to(tl.float32)
            if ROUNDING == WITH_RESIDUAL:
                left = tl.load(residual + at, inside, 0.0)
                values += left.to(tl.float32)
            values = values + values * shrink
            values = values - tl.div_rn(update, clip) * rate
            if ROUNDING == AT_RANDOM:
                now = rounded_at_random(values, at.to(tl.int32), seed)
            elif ROUNDING == WITH_RESIDUAL:
                near = _nearest(values)
                is_finite_there = (near.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
                missing = tl.where(is_finite_there, values - near, 0.0)
                tl.store(residual + at, tl.where(keeps, _nearest(missing).to(tl.bfloat16), left), inside)
                now = near.to(tl.bfloat16)
            elif NARROW:
                now = _nearest(values).to(tl.bfloat16)
            else:
                now = values
            tl.store(weight + at, tl.where(keeps, now, before), inside)


# Places in a row of the table of `round_all`, all int64.
SOURCE, TARGET, CUT_OFF, SEED_OF_ROW, SIZE = (tl.constexpr(place) for place in range(5))
ROUNDED_PLACES = tl.constexpr(5)


@program
def round_all(table, parts, BLOCK: tl.constexpr):
    """Round float32 numbers to bfloat16: to nearest where what is cut off has an address, otherwise at random."""
    at = tl.program_id(0)
    about = table + tl.load(parts + 2 * at) * ROUNDED_PLACES
    place = tl.load(parts + 2 * at + 1) + tl.arange(0, BLOCK)
    inside = place < tl.load(about + SIZE)
    values = tl.load(tl.load(about + SOURCE).to(tl.pointer_type(tl.float32)) + place, inside, 0.0)
    target = tl.load(about + TARGET).to(tl.pointer_type(tl.bfloat16))
    cut_off = tl.load(about + CUT_OFF)
    if cut_off == 0:
        seed = tl.load(about + SEED_OF_ROW).to(tl.int32)
        tl.store(target + place, rounded_at_random(values, place.to(tl.int32), seed), inside)
    else:
        near = _nearest(values)
        is_finite = (near.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
        missing = tl.where(is_finite, values - near, 0.0)
        tl.store(cut_off.to(tl.pointer_type(tl.bfloat16)) + place, _nearest(missing).to(tl.bfloat16), inside)
        tl.store(target + place, near.to(tl.bfloat16), inside)
