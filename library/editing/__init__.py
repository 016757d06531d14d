"""How are captions changed by hand? The captions of a set, questions about them, edits, and their undoing."""
