"""What does an encoder read? The final texts of an image from its captions, as pure functions of rules and draws."""
