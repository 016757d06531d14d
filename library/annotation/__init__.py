"""How do captions come to be? Tags and sentences that models write beside images, and rules that clean them."""
