"""The 23 blocks of the U-Net, as `--block_lr` counts them from input to output."""

NUM_UNET_BLOCKS = 23

# First block of each list; the number behind the list's name is added to it.
_FIRST_OF_LIST = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
_ALONE = {"time_embed": 0, "label_emb": 0, "out": NUM_UNET_BLOCKS - 1}


def unet_block_index(single_file_name: str) -> int:
    """Return the block, 0 to 22, of a U-Net parameter named as in the single file, without `model.diffusion_model.`.

    0 is the embeddings of time and size, 1-9 the way down, 10-12 the middle, 13-21 the way up, 22 the output
    convolution (kohya's count). Raise `ValueError` for any other name.
    """
    part, _, rest = single_file_name.partition(".")
    if part in _ALONE:
        return _ALONE[part]
    if part not in _FIRST_OF_LIST:
        raise ValueError(f"'{single_file_name}' is no U-Net parameter of an SDXL single file")
    return _FIRST_OF_LIST[part] + int(rest.partition(".")[0])
