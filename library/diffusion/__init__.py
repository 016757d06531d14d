"""What is learnt, and what does it look like?"""
