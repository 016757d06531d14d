"""What is in an image? Its file, its size and crop, and the pixels that training sees of it."""
