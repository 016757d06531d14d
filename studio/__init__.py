"""The studio: a page that shows and changes the two captions of each image. Routes and pixels; the rest is library/."""
